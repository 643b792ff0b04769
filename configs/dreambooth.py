"""DreamBooth with prior preservation: the whole model learns one subject at 512 pixels.

  python -m pixsigma_jax.train --config=configs/dreambooth.py --workdir=runs/dreambooth/512px

Ruiz et al. 2023: a few images of a subject, captioned with a rare word and its class,
"a photo of sks dog", and as many examples again of images that the model itself draws
of the class, "a photo of a dog", so that it does not forget what other dogs look like.
The two are two datasets, of equal weight. Their common loss is half of equation 2 with
λ = 1, and AdamW's steps do not depend on a factor; another λ is `data.weights` = (1, λ).
docs/fine_tuning.md#dreambooth has the commands.

Learning rate, decay, epsilon and clipping are those of PixArt-α's DreamBooth config,
which trains the whole model without prior preservation, too. With an adapter in place
of all parameters: --config.adapter.rank=16 --config.optimizer.learning_rate=1e-4.

Hardware: one accelerator of 24 GB or more, of which parameters, gradients, EMA and
AdamW's two moments take 12.2 GB. Computed, not measured: no accelerator was at hand.
"""

from configs import own_images
from pixsigma_jax.train.config import use_optimizer


def get_config():
  """The fine-tuning of own images, on a subject and its class."""
  config = own_images.get_config()
  config.stage = "dreambooth"
  config.total_steps = 800
  config.batch_size = 4
  config.data.path = (
    "runs/dreambooth/data/subject/512px,runs/dreambooth/data/class/512px"
  )
  config.data.weights = (1.0, 1.0)
  use_optimizer(config, name="adamw", eps=1e-10)
  config.optimizer.learning_rate = 5e-6
  config.optimizer.weight_decay = 0.03
  config.optimizer.clip_norm = 0.01
  config.optimizer.warmup_steps = 0
  config.ema.values = (0.99,)
  config.checkpoint.every = 200
  config.checkpoint.snapshot_every = 200
  config.log.sample_every = 200
  config.log.prompts = ("a photo of sks dog", "a photo of a dog")
  return config
