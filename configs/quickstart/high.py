"""Quickstart, stage 2 of 3: twice the resolution, by PE interpolation.

  python -m pixsigma_jax.prepare --dataset=digits --resolution=16 --count=10000 --seed=1 --output=runs/quickstart/data/16px
  python -m pixsigma_jax.train --config=configs/quickstart/high.py --workdir=runs/quickstart/high

With the argument `:extended` positions go on at their old spacing instead, as they do
without interpolation: the baseline of PixArt-Σ's figure 8b. It stops at step 200, where
the stage itself leaves a snapshot to hold it against.
"""

from configs.quickstart import base
from pixsigma_jax.train.config import choose

# Argument → transform, length, and scale of the positions.
_POSITIONS = {
  "interpolated": ("interpolate_pe", 2500, 2.0),
  "extended": ("extend_pe", 200, 1.0),
}


def get_config(positions: str = "interpolated"):
  """The low model at 16×16, 16×32 and 32×16 pixels, 64 to 128 tokens."""
  transform, total_steps, pe_interpolation = choose(positions, _POSITIONS)
  config = base.get_config()
  config.stage = f"quickstart/high_{positions}"
  config.total_steps = total_steps
  config.batch_size = 16
  config.data.path = "runs/quickstart/data/16px"
  config.init.parent = "runs/quickstart/low"
  config.init.transforms = ({"name": transform, "base_size": 8},)
  config.model.base_size = 8
  config.model.pe_interpolation = pe_interpolation
  config.optimizer.learning_rate = 2e-3
  config.optimizer.warmup_steps = 20
  config.ema.values = (0.99,)
  config.checkpoint.every = 200
  config.checkpoint.snapshot_every = 200
  config.log.sample_every = 0
  return config
