"""PixArt-Σ at 4096 pixels, 6 of 6, keys and values compressed (table 4).

  python -m pixsigma_jax.prepare --index=INDEX --resolution=4096 --frozen=weights/frozen --output=runs/weak_to_strong/data/4096px
  python -m pixsigma_jax.train --config=configs/stage_4k.py --workdir=runs/weak_to_strong/stage_4k

65,536 tokens an image. Arguments, whose workdirs are runs/weak_to_strong/stage_4k_…:

  :full      the row of table 4 without compression, from stage_2k:full
  :uhd       the area of 2880², 3840x2112 among its sizes, 32,400 tokens; its data are
             of --resolution=2880. What the paper timed as "4K" in table 3d took 3.41
             times as long as 2K: its operations are 3.26 times as many at 2880², 11.9
             times at 4096². Never compare the one to the other.
  :uhd_full  the same without compression, the paper's other time

Hardware: 8 to 32 devices as in stage_256_vae, with --config.accumulation=2 where 8 have
80 GB each; on more, several share the tokens of an image, as with 256: 4 x 8 x 8 of
data, fsdp and context.
Hours on 8 H100 at 30 % of their peak: 4.7, $94 at $2.50 an H100-hour (`:full` 7.0,
$140; `:uhd` 1.3, $27; `:uhd_full` 1.9, $38); computed, not measured, and about three
times that where attention has no kernel; by the roofline at least
$40 (docs/stages.md). The paper: 12
A800-days (`:full`: 16).

Expect, by the paper: good images after 100 steps. No loss is published. Samples are
not drawn on the way: `python -m pixsigma_jax.sample` draws them from a snapshot.
"""

from configs import paper
from pixsigma_jax.train.config import choose, default_config

# Argument → resolution, the scale of its positions, and whether it compresses.
_KINDS = {
  "compressed": (4096, 8.0, True),
  "full": (4096, 8.0, False),
  "uhd": (2880, 5.625, True),
  "uhd_full": (2880, 5.625, False),
}


def get_config(kind: str = "compressed"):
  """The 2K model on a grid twice as fine, or 1.4 times."""
  resolution, pe_interpolation, compressed = choose(kind, _KINDS)
  config = default_config()
  config.stage = "stage_4k" if kind == "compressed" else f"stage_4k_{kind}"
  config.total_steps = 1_000
  config.batch_size = 4 * 8
  config.data.path = f"runs/weak_to_strong/data/{resolution}px"
  config.init.parent = (
    f"runs/weak_to_strong/{'stage_2k' if compressed else 'stage_2k_full'}"
  )
  config.init.transforms = ({"name": "interpolate_pe", "base_size": resolution // 16},)
  config.model.base_size = resolution // 16
  config.model.pe_interpolation = pe_interpolation
  if compressed:
    paper.compress(config, parent_compresses=True)
  config.ema.values = (0.99,)
  config.checkpoint.every = 50
  config.checkpoint.snapshot_every = 250
  config.validation.every = 100
  config.validation.examples = config.batch_size
  config.log.every = 10
  return config
