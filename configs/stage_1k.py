"""PixArt-Σ at 1024 pixels, 4 of 6, keys and values compressed (table 4).

  python -m pixsigma_jax.prepare --index=INDEX --resolution=1024 --frozen=weights/frozen --output=runs/weak_to_strong/data/1024px
  python -m pixsigma_jax.train --config=configs/stage_1k.py --workdir=runs/weak_to_strong/stage_1k

From 512 pixels straight to compressed 1024, which is what the paper counts 20 V100-days
for in place of 50 (section A.1). The argument `:full` gives the latter, table 4's row
without compression at twice the batch; its workdir is runs/weak_to_strong/stage_1k_full.

Hardware: 8 to 64 devices as in stage_256_vae (`:full`: 128); on more, two or more share
the tokens of an image, as with 256: 8 x 8 x 4 of data, fsdp and context. Hours on 8 H100 at 30 % of their peak: 2.0, $39 at $2.50 an H100-hour (`:full`: 4.5,
$89); computed, not measured (docs/stages.md).

Expect, by the paper: good images after 100 steps; FID 5.64 and CLIP score 0.276, in
place of 5.69 and 0.277 without compression (table 3c, on images of its own). No loss is
published.
"""

from configs import paper
from pixsigma_jax.train.config import choose, default_config


def get_config(attention: str = "compressed"):
  """The 512 model on a grid twice as fine, attending to a quarter of its tokens."""
  compressed = choose(attention, {"compressed": True, "full": False})
  config = default_config()
  config.stage = "stage_1k" if compressed else "stage_1k_full"
  config.total_steps = 5_000
  config.batch_size = 12 * 16 if compressed else 12 * 32
  config.data.path = "runs/weak_to_strong/data/1024px"
  config.init.parent = "runs/weak_to_strong/stage_512"
  config.init.transforms = ({"name": "interpolate_pe", "base_size": 64},)
  config.model.base_size = 64
  config.model.pe_interpolation = 2.0
  if compressed:
    paper.compress(config, parent_compresses=False)
  config.optimizer.learning_rate = 1e-5
  config.ema.values = (0.998,)
  config.checkpoint.every = 250
  config.validation.every = 500
  config.validation.examples = 2 * config.batch_size
  config.log.sample_every = 500
  return config
