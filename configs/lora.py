"""A LoRA of some twenty images at 512 pixels, on the published model of that size.

  python -m pixsigma_jax.train --config=configs/lora.py --workdir=runs/lora/512px

docs/fine_tuning.md leads here from a folder of images, command by command. Trained are
13.4 million numbers beside the model's 611 million, which stay as they are; the run
leaves them in runs/lora/512px/adapters/ as PEFT and diffusers load them. With
`--config.adapter.dora=True` it is a DoRA.

Hardware: one accelerator of 16 GB or more. The train step takes 6.9 GiB as XLA compiles
it for a TPU v5e, of which 2.3 are the model; T5, for the sample grids' prompts, 9.5 GB before
the first step. Compiled, not run: no accelerator was at hand. For the other published
sizes see configs/own_images.py.

Expect: no loss is published, and that of twenty images says little; look at the sample grids
of samples, which are drawn every 250 steps. If other subjects begin to look like the
images, take an earlier adapter.
"""

from configs import own_images
from pixsigma_jax.train.config import use_optimizer


def get_config():
  """The fine-tuning of own images, with an adapter in place of all parameters."""
  config = own_images.get_config()
  config.stage = "lora"
  config.total_steps = 1000
  config.batch_size = 4
  config.data.path = "runs/lora/data/512px"
  config.adapter.rank = 16
  use_optimizer(config, name="adamw")
  config.optimizer.learning_rate = 1e-4
  config.optimizer.weight_decay = 1e-2
  config.optimizer.clip_norm = 1.0
  config.optimizer.warmup_steps = 50
  config.ema.values = (0.99,)
  config.mesh.data, config.mesh.fsdp = -1, 1
  config.checkpoint.every = 250
  config.checkpoint.snapshot_every = 250
  config.log.sample_every = 250
  config.log.prompts = ("a photo of sks dog", "a photo of a dog")
  return config
