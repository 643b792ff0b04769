"""The published code's names and layouts, as this suite's golden files hold them.

`tests/golden/model_*.npz` were written by running PixArt-alpha/PixArt-sigma @ 1ce521a
in float32 on CPU with tiny random weights: `w.<official key>`, inputs `in.*`, outputs,
and gradients `g.<official key>` of mean((out - target)²).
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from pixsigma_jax.convert import layouts
from pixsigma_jax.convert.pixart import NULL_CAPTION, POSITIONS
from pixsigma_jax.models.kv_compression import KVCompression
from pixsigma_jax.models.pixart import PixArtConfig

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"

_COMPRESSED = (2, 3)
CASES: dict[str, dict] = {
  "ms_plain": {},
  "plain_square": {},
  "ms_kv2": {"kv_compression": KVCompression(ratio=4, layers=_COMPRESSED)},
  "ms_kv2_odd": {"kv_compression": KVCompression(ratio=4, layers=_COMPRESSED)},
  "ms_kv3": {"kv_compression": KVCompression(ratio=9, layers=_COMPRESSED)},
  "ms_qknorm": {"qk_norm": True},
  "ms_micro": {"size_conditions": True},
}


def load(case: str) -> tuple[PixArtConfig, dict[str, np.ndarray]]:
  config = PixArtConfig(
    depth=4,
    width=48,
    num_heads=4,
    patch_size=2,
    base_size=4,
    # The non-multi-scale model was saved with the table of its own resolution.
    pe_interpolation=2.0,
    caption_width=32,
    caption_length=10,
    **CASES[case],
  )
  with np.load(GOLDEN / f"model_{case}.npz") as file:
    return config, dict(file)


def channels_last(x: np.ndarray) -> np.ndarray:
  return np.moveaxis(x, 1, -1)


def params_from(
  arrays: dict[str, np.ndarray], prefix: str, config: PixArtConfig
) -> dict:
  """Our tree out of the official keys that start with `prefix` (`w.` or `g.`)."""
  buffers = (POSITIONS, NULL_CAPTION)
  source = {
    name.removeprefix(prefix): array
    for name, array in arrays.items()
    if name.startswith(prefix) and name.removeprefix(prefix) not in buffers
  }
  params = layouts.params_from(source, config, layouts.OFFICIAL)
  return jax.tree.map(jnp.asarray, params)
