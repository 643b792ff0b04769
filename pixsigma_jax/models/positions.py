"""Position encoding of a token: fixed sines and cosines of its row and column.

PixArt has no learned table of positions. A token at row i of h rows sits at
i / (h / base_size) / pe_interpolation, so that an image of any aspect ratio spans
[0, base_size / pe_interpolation) on both axes. "PE interpolation" (PixArt-Σ, section
3.4; `PixArt.py: get_2d_sincos_pos_embed`) is the choice of these two numbers: when a
resolution doubles, both double, and the finer grid reads the same field between the
old points.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

_MAX_PERIOD = 1e4


def sincos_2d(
  coordinates: Int[Array, "b n 2"],
  grid: Int[Array, "b 2"],
  width: int,
  *,
  base_size: int,
  pe_interpolation: float,
) -> Float32[Array, "b n d"]:
  """Position encoding at (row, column) `coordinates` of a `grid` of (h, w) tokens.

  Computed in the program, in float32: a table of 65,536 tokens would be a 300 MB
  constant. The first half of the features encodes the column, the second the row,
  each as sines followed by cosines.
  """
  scale = grid.astype(jnp.float32) / base_size
  # Two divisions, in this order, as the reference rounds them.
  places = coordinates.astype(jnp.float32) / scale[:, None, :] / pe_interpolation
  frequencies = _MAX_PERIOD ** -(np.arange(width // 4) / (width // 4))
  angles = places[..., None] * frequencies.astype(np.float32).reshape(1, 1, 1, -1)
  codes = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
  rows, columns = codes[..., 0, :], codes[..., 1, :]
  return jnp.concatenate([columns, rows], axis=-1)
