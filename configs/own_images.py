"""Your own images at 512 pixels, from the published model of that size.

  python -m pixsigma_jax.train --config=configs/own_images.py --workdir=runs/own/512px

docs/own_images.md leads here from a folder of images, command by command. Every
parameter is trained. On one accelerator of 40 GB or more; on several, parameters and
batch are sharded over all of them. Not measured: no accelerator was at hand. For the
other published sizes set `base_size` to the resolution / 16, `pe_interpolation` to the
resolution / 512, and the parent.
"""

from pixsigma_jax.train.config import default_config


def get_config():
  """PixArt-Σ 512 as released, with the paper's optimizer at a fine-tuning's length."""
  config = default_config()
  config.stage = "own_images"
  config.total_steps = 2000
  config.batch_size = 32
  config.model.base_size = 32
  config.model.pe_interpolation = 1.0
  config.data.path = "runs/own/data/512px"
  config.data.holdout = 0.0
  config.data.num_threads = 8
  config.data.damaged = "stop"
  config.init.parent = "weights/sigma-512"
  config.mesh.data, config.mesh.fsdp, config.mesh.context = 1, -1, 1
  config.checkpoint.snapshot_every = 500
  config.guards.bad_step = "stop"
  config.validation.every = 0
  config.validation.examples = 0
  config.log.sample_every = 500
  config.log.prompts = ("a photograph of a cat",)
  return config
