"""PixArt-Σ at 2048 pixels, 5 of 6, keys and values compressed (table 4).

  python -m pixsigma_jax.prepare --index=INDEX --resolution=2048 --frozen=weights/frozen --output=runs/weak_to_strong/data/2048px
  python -m pixsigma_jax.train --config=configs/stage_2k.py --workdir=runs/weak_to_strong/stage_2k

Its parent compresses already, so only positions change. The argument `:full` gives the
row of table 4 without compression, from stage_1k:full; its workdir is
runs/weak_to_strong/stage_2k_full.

Hardware: 8 to 32 devices as in stage_256_vae; on more, several share the tokens of an
image, as with 256: 4 x 8 x 8 of data, fsdp and context. Hours on 8 H100 at 30 % of their peak: 0.9, $18 at $2.50 an H100-hour (`:full`: 1.2,
$24); computed, not measured (docs/stages.md). The paper: 7 A800-days (`:full`: 10).

Expect, by the paper: good images after 100 steps. No loss is published. Samples are
not drawn on the way: `python -m pixsigma_jax.sample` draws them from a snapshot.
"""

from configs import paper
from pixsigma_jax.train.config import choose, default_config


def get_config(attention: str = "compressed"):
  """The 1K model on a grid twice as fine."""
  compressed = choose(attention, {"compressed": True, "full": False})
  config = default_config()
  config.stage = "stage_2k" if compressed else "stage_2k_full"
  config.total_steps = 2_000
  config.batch_size = 4 * 8
  config.data.path = "runs/weak_to_strong/data/2048px"
  config.init.parent = (
    f"runs/weak_to_strong/{'stage_1k' if compressed else 'stage_1k_full'}"
  )
  config.init.transforms = ({"name": "interpolate_pe", "base_size": 128},)
  config.model.base_size = 128
  config.model.pe_interpolation = 4.0
  if compressed:
    paper.compress(config, parent_compresses=True)
  config.ema.values = (0.995,)
  config.checkpoint.every = 100
  config.checkpoint.snapshot_every = 500
  config.validation.every = 200
  config.validation.examples = 2 * config.batch_size
  config.log.every = 10
  return config
