"""What the stages of the quickstart share: a miniature, and how it is trained.

Not a stage itself: `low.py`, `high.py` and `compressed.py` are.
"""

import ml_collections

from pixsigma_jax.train.config import default_config, use_optimizer


def get_config() -> ml_collections.ConfigDict:
  """The fields of all stages; a stage sets its own name, data, parent and length."""
  config = default_config()
  config.batch_size = 32
  config.model.variant = "Mini/2"
  config.model.base_size = 4
  config.model.pe_interpolation = 1.0
  config.model.in_channels = 3
  config.model.caption_width = 64
  config.model.caption_length = 12
  # The official code's norm would set a trained model's keys and values to another
  # scale: from the average 22 % of pairs are left then, else 96 %.
  config.model.kv_compression.norm = False
  config.compute.dtype = "float32"
  config.compute.attention = "xla"
  config.compute.remat = "none"
  config.compute.unroll = True
  config.data.holdout = 0.0
  config.data.num_threads = 1
  config.data.damaged = "stop"
  config.frozen = ""
  # After 4000 steps of this loss AdamW follows one prompt in five, Muon nine in ten.
  use_optimizer(config, name="muon", adam_b2=0.99)
  config.optimizer.learning_rate = 6e-3
  config.optimizer.schedule = "cosine"
  config.optimizer.clip_norm = 1.0
  config.ema.values = (0.998,)
  config.mesh.data, config.mesh.fsdp, config.mesh.context = -1, 1, 1
  config.checkpoint.every = 1000
  config.guards.bad_step = "stop"
  config.validation.every = 0
  config.validation.examples = 0
  config.log.every = 100
  config.log.sample_every = 2000
  config.log.prompts = ("a red seven", "a white three", "a blue two", "a cyan nine")
  return config
