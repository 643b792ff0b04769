"""Quickstart, stage 1 of 3: the weak model, at 8 pixels a digit.

  python -m pixsigma_jax.prepare --dataset=digits --resolution=8 --count=10000 --seed=1 --output=runs/quickstart/data/8px
  python -m pixsigma_jax.train --config=configs/quickstart/low.py --workdir=runs/quickstart/low

README.md says how long it takes on two CPU cores, and what it reached.
"""

from configs.quickstart import base


def get_config():
  """The weak model: fresh parameters, 8×8, 8×16 and 16×8 pixels, 16 to 32 tokens."""
  config = base.get_config()
  config.stage = "quickstart/low"
  config.total_steps = 5500
  config.data.path = "runs/quickstart/data/8px"
  return config
