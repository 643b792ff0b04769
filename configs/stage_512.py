"""PixArt-Σ at 512 pixels, 3 of 6 (table 4, "higher aesthetics").

  python -m pixsigma_jax.prepare --index=INDEX --resolution=512 --frozen=weights/frozen --output=runs/weak_to_strong/data/512px
  python -m pixsigma_jax.train --config=configs/stage_512.py --workdir=runs/weak_to_strong/stage_512

The first of larger images in all aspect ratios, by PE interpolation, from images that
were chosen for their looks.

Hardware: as stage_256_vae. Hours: 4.6 on 8 H100 at 30 % of their peak, $93 at $2.50 an
H100-hour; computed, not measured (docs/stages.md). The paper: 30 V100-days.

Expect, by the paper: good images after 100 steps; FID 9.75 and CLIP score 0.272 after
1,000, 8.91 and 0.276 after 100,000 (table 2, on images of its own). No loss is published.
"""

from pixsigma_jax.train.config import default_config


def get_config():
  """The aligned model on a grid twice as fine."""
  config = default_config()
  config.stage = "stage_512"
  config.total_steps = 10_000
  config.batch_size = 32 * 32
  config.data.path = "runs/weak_to_strong/data/512px"
  config.init.parent = "runs/weak_to_strong/stage_256_align"
  config.init.transforms = ({"name": "interpolate_pe", "base_size": 32},)
  config.model.base_size = 32
  config.model.pe_interpolation = 1.0
  config.log.sample_every = 1_000
  return config
