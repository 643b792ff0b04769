"""PixArt-Σ at 256 pixels, 1 of 6: another VAE (table 4, "VAE adaption").

  python -m pixsigma_jax.convert --from=pixart --to=orbax weights/PixArt-XL-2-256x256.pth weights/alpha-256 --release=alpha-256
  python -m pixsigma_jax.prepare --index=INDEX --resolution=256 --frozen=weights/frozen --output=runs/weak_to_strong/data/256px
  python -m pixsigma_jax.train --config=configs/stage_256_vae.py --workdir=runs/weak_to_strong/stage_256_vae

PixArt-α of that size learns the latents of SDXL's VAE and captions of 300 tokens.

Hardware: 8 to 1024 devices, a power of two, as replicas of 8 that share the parameters
(the mesh is chosen, and logged). Hours: 1.0 on 8 H100 at 30 % of their peak, $19 at $2.50 an H100-hour; computed,
not measured (docs/stages.md). The paper: 5 V100-days.

Expect, by the paper: as good as before after about 2,000 steps. No loss is published.
"""

from pixsigma_jax.train.config import default_config


def get_config():
  """α-256 as released, become Σ: its VAE, its captions, its positions."""
  config = default_config()
  config.stage = "stage_256_vae"
  config.total_steps = 8_000
  config.batch_size = 64 * 16
  config.data.path = "runs/weak_to_strong/data/256px"
  config.init.parent = "weights/alpha-256"
  config.init.transforms = (
    {
      "name": "alpha_to_sigma",
      "caption_length": 300,
      "pe_interpolation": 0.5,
      "scaling_factor": None,
    },
    {"name": "swap_vae", "scaling_factor": 0.13025},
  )
  config.log.sample_every = 1_000
  return config
