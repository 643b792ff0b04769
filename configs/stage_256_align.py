"""PixArt-Σ at 256 pixels, 2 of 6: what captions say (table 4, "better text-image align").

  python -m pixsigma_jax.train --config=configs/stage_256_align.py --workdir=runs/weak_to_strong/stage_256_align

The long stage of the chain; its parent, data and program are the stage's before it.

Hardware and memory: as stage_256_vae. Hours: 9.6 on 8 H100 at 30 % of their peak, $192
at $2.50 an H100-hour; computed, not measured (docs/stages.md). The paper: 50 V100-days.

Expect, by the paper's table 2 (on images of its own): FID 16.56 and CLIP score 0.270
after 20,000 steps. No loss is published.
"""

from pixsigma_jax.train.config import default_config


def get_config():
  """Ten times the steps of the VAE's adaptation, and a longer average."""
  config = default_config()
  config.stage = "stage_256_align"
  config.total_steps = 80_000
  config.batch_size = 64 * 16
  config.data.path = "runs/weak_to_strong/data/256px"
  config.init.parent = "runs/weak_to_strong/stage_256_vae"
  config.ema.values = (0.9999,)
  config.checkpoint.every = 1_000
  config.checkpoint.snapshot_every = 20_000
  config.log.sample_every = 5_000
  return config
