"""Latents to token sequences and back: patches in window-major order.

The network works on sequences. A token is one patch of latents, flattened with its
channels fastest, `(p q c)`. Tokens lie window by window, so that the R×R neighbours
which key/value compression merges (PixArt-Σ, section 3.3) are adjacent: its strided
convolution becomes a reshape and a weighted sum, on one device or on many. Tokens of
trailing rows and columns that fill no window follow after all windows, padding is last.

The functions take NumPy arrays on the host and JAX arrays in a program alike.
"""

import functools
from typing import Any, TypeAlias

import einops
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

Grid: TypeAlias = tuple[int, int]
Arrays: TypeAlias = Any  # NumPy in, NumPy out; JAX in, JAX out


@functools.lru_cache(maxsize=4096)
def window_order(grid: Grid, window: Grid) -> Int[np.ndarray, " n"]:
  """Row-major index of the i-th token of the sequence, for an (h, w) grid of tokens."""
  (h, w), (wh, ww) = grid, window
  if min(h, w, wh, ww) < 1:
    raise ValueError(f"Grid {grid} and window {window} need sides of at least 1.")
  index = np.arange(h * w, dtype=np.int32).reshape(h, w)
  rows, columns = h // wh * wh, w // ww * ww  # what whole windows cover
  windows = einops.rearrange(
    index[:rows, :columns], "(h p) (w q) -> (h w p q)", p=wh, q=ww
  )
  trailing = np.ones((h, w), bool)
  trailing[:rows, :columns] = False
  order = np.concatenate([windows, index[trailing]])
  order.setflags(write=False)  # cached, so shared by every caller
  return order


@functools.lru_cache(maxsize=4096)
def _inverse_order(grid: Grid, window: Grid) -> Int[np.ndarray, " n"]:
  inverse = np.argsort(window_order(grid, window)).astype(np.int32)
  inverse.setflags(write=False)
  return inverse


@functools.lru_cache(maxsize=4096)
def coordinates(grid: Grid, window: Grid) -> Int[np.ndarray, "n 2"]:
  """Row and column of each token, in the order of the sequence."""
  rows, columns = np.divmod(window_order(grid, window), np.int32(grid[1]))
  table = np.stack([rows, columns], axis=-1)
  table.setflags(write=False)
  return table


def token_grid(latent_size: Grid, patch_size: int) -> Grid:
  """The token grid (h, w) of latents of `latent_size` (h', w').

  Raises:
    ValueError: a side is not a multiple of the patch size.
  """
  h, w = latent_size
  if h % patch_size or w % patch_size:
    raise ValueError(
      f"Latents of {h}x{w} cannot be cut into patches of {patch_size}x{patch_size}: "
      f"both sides must be multiples of {patch_size}."
    )
  return h // patch_size, w // patch_size


def to_tokens(latents: Arrays, patch_size: int, window: Grid) -> Arrays:
  """Cuts `[... h' w' c]` latents into `[... n p*p*c]` tokens in window-major order."""
  grid = token_grid(latents.shape[-3:-1], patch_size)
  if not (grid[0] % window[0] or grid[1] % window[1]):  # windows cover it: one copy
    return einops.rearrange(
      latents,
      "... (y r p) (x s q) c -> ... (y x r s) (p q c)",
      r=window[0],
      s=window[1],
      p=patch_size,
      q=patch_size,
    )
  tokens = einops.rearrange(
    latents, "... (h p) (w q) c -> ... (h w) (p q c)", p=patch_size, q=patch_size
  )
  return tokens[..., window_order(grid, window), :]


def from_tokens(tokens: Arrays, grid: Grid, patch_size: int, window: Grid) -> Arrays:
  """The inverse of `to_tokens`; padding after the grid's tokens is dropped."""
  tokens = tokens[..., _inverse_order(grid, window), :]
  return einops.rearrange(
    tokens,
    "... (h w) (p q c) -> ... (h p) (w q) c",
    h=grid[0],
    p=patch_size,
    q=patch_size,
  )


def token_mask(grid: Int[Array, "b 2"], length: int) -> Bool[Array, "b n"]:
  """True where a position of the padded sequence holds a token of the image."""
  return jnp.arange(length)[None, :] < jnp.prod(grid, axis=-1)[:, None]
