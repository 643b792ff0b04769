"""What the paper's stages share beside the defaults: the compression of section 3.2.

Not a stage itself: `stage_256_vae.py` to `stage_4k.py` are, PixArt-Σ's table 4 from the
first row to the last. docs/stages.md lays their numbers beside the paper's, and says
what departs from it and why.

Files of an earlier version, those that `convert --from=mmcv` wrote among them, find
`get_config` and `use_optimizer` here, too: for one release, see CHANGELOG.md.
"""

import ml_collections

from pixsigma_jax.train.config import default_config, use_optimizer

get_config = default_config
__all__ = ["KV_COMPRESSION", "compress", "get_config", "use_optimizer"]

# 2×2 windows in the deeper half of the layers.
KV_COMPRESSION = {
  "ratio": 4,
  "layers": tuple(range(14, 28)),
  "operator": "conv",
  "norm": True,
}


def compress(config: ml_collections.ConfigDict, *, parent_compresses: bool) -> None:
  """Lets a stage compress, and its parent become one that does if it does not."""
  config.model.kv_compression = ml_collections.ConfigDict(KV_COMPRESSION)
  if not parent_compresses:
    config.init.transforms = (
      *config.init.transforms,
      {"name": "add_kv_compression", **KV_COMPRESSION, "initialization": "average"},
    )
