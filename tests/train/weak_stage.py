"""The config of most tests' runs: the quickstart's weak stage, but by AdamW.

So they stay what they are whatever the quickstart is tuned to; the stage as it is has
its turn in `test_configs.py`.
"""

from configs.quickstart import low
from pixsigma_jax.train.config import use_optimizer


def get_config():
  """What `configs/quickstart/low.py` has, with another optimizer."""
  config = low.get_config()
  use_optimizer(config, name="adamw", b2=0.99)
  return config
