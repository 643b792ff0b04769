"""Patches of large images at their own resolution, for FID and KID of fine detail."""

import numpy as np
from jaxtyping import Int64, UInt8


def patch_positions(
  height: int, width: int, *, size: int = 299, count: int = 20, seed: int = 42
) -> Int64[np.ndarray, "count 2"]:
  """Upper left corners of random patches: a function of size and seed alone.

  Images of one size are so cut at equal positions, whichever set they belong to, as
  patch-FID wants it (20 patches of 299 x 299, seed 42, UltraHR-100K).

  Raises:
    ValueError: a patch does not fit into the image.
  """
  if size > min(height, width):
    raise ValueError(
      f"Patches of {size}x{size} pixels do not fit into an image of {height}x{width}."
    )
  random = np.random.default_rng([seed, height, width, size])
  rows = random.integers(0, height - size, count, endpoint=True)
  columns = random.integers(0, width - size, count, endpoint=True)
  return np.stack([rows, columns], axis=1)


def patches(
  image: UInt8[np.ndarray, "H W 3"], positions: Int64[np.ndarray, "n 2"], size: int
) -> UInt8[np.ndarray, "n size size 3"]:
  """The patches of one image with these upper left corners."""
  return np.stack([image[i : i + size, j : j + size] for i, j in positions])
