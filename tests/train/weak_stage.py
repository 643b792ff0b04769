"""The config of most tests' runs: the quickstart's weak stage, but by AdamW.

So they stay what they are whatever the quickstart is tuned to; the stage as it is has
its turn in `test_configs.py`.
"""

from configs import paper
from configs.quickstart import low


def get_config():
  """What `configs/quickstart/low.py` has, with another optimizer."""
  config = low.get_config()
  paper.use_optimizer(config, name="adamw", b1=0.9, b2=0.99, eps=1e-8)
  return config
