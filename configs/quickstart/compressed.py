"""Quickstart, stage 3 of 3: key/value compression added to the trained model.

  python -m pixsigma_jax.train --config=configs/quickstart/compressed.py --workdir=runs/quickstart/compressed

The deeper half of the layers attends to one key for every 2×2 tokens. With the argument
`:random` the merging convolution starts at random instead of at the average: the
baseline of PixArt-Σ's figure 8c.
"""

from configs.quickstart import high
from pixsigma_jax.train.config import choose

# Argument, the initialization of the transform → name of the stage.
_STAGES = {
  "average": "quickstart/compressed_average",
  "random": "quickstart/compressed_random",
}


def get_config(initialization: str = "average"):
  """The high model, compressed 2×2 in layers 2 and 3 of 4."""
  config = high.get_config()
  config.stage = choose(initialization, _STAGES)
  config.total_steps = 100
  config.init.parent = "runs/quickstart/high"
  config.model.kv_compression.ratio = 4
  config.model.kv_compression.layers = (2, 3)
  config.init.transforms = (
    {
      "name": "add_kv_compression",
      **config.model.kv_compression.to_dict(),
      "initialization": initialization,
    },
  )
  config.optimizer.learning_rate = 1e-3
  config.optimizer.warmup_steps = 10
  return config
