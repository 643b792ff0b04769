"""Key/value token compression for long image sequences (PixArt-Σ, section 3.3).

Tokens come in window-major order (`models/tokens.py`), so merging a window is a reshape
and a sum over its neighbours, the same numbers as the reference's strided depthwise
convolution. Queries keep every token; keys and values become one token a window.
"""

import dataclasses
import functools
from typing import Literal, TypeAlias

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Key

from pixsigma_jax.models.layers import Compute, LayerNorm
from pixsigma_jax.models.tokens import Grid

Operator: TypeAlias = Literal["conv", "average", "discard", "random_discard"]

# The paper's ratio is tokens over compressed tokens. Ratio 2 has no square window and
# no reference; neighbours in a row are its natural reading.
WINDOWS: dict[int, Grid] = {1: (1, 1), 2: (1, 2), 4: (2, 2), 9: (3, 3), 16: (4, 4)}
OPERATORS = ("conv", "average", "discard", "random_discard")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCompression:
  """Settings of compression: layers, ratio and operator.

  Attributes:
    ratio: tokens per compressed token, a key of `WINDOWS`; 1 compresses nothing.
    layers: 0-based indices of the layers that compress.
    operator: `conv`, one learned filter a channel, shared by keys and values;
      `average`, the mean of the window; `discard`, its first token; `random_discard`,
      one of its tokens by a random key (the paper's "token discarding"; the published
      code has only the fixed one).
    norm: LayerNorm after the convolution, as in the reference; `conv` only. The paper's
      0.018 % of parameters counts it.

  Raises:
    ValueError: an unknown ratio or operator, layers that repeat, or layers named for a
      ratio that does nothing (or the other way round).
  """

  ratio: int = 1
  layers: tuple[int, ...] = ()
  operator: Operator = "conv"
  norm: bool = True

  def __post_init__(self):
    object.__setattr__(self, "layers", tuple(sorted(self.layers)))
    if self.ratio not in WINDOWS:
      raise ValueError(
        f"KV compression ratio {self.ratio} is unknown; choose one of {list(WINDOWS)}."
      )
    if self.operator not in OPERATORS:
      raise ValueError(
        f"KV compression operator {self.operator!r} is unknown; "
        f"choose one of {list(OPERATORS)}."
      )
    if len(set(self.layers)) != len(self.layers):
      raise ValueError(f"KV compression layers {self.layers} name a layer twice.")
    if (self.ratio == 1) != (not self.layers):
      raise ValueError(
        f"KV compression of ratio {self.ratio} in layers {self.layers} contradicts "
        "itself: give a ratio above 1 and its layers, or ratio 1 and no layers."
      )

  @property
  def window(self) -> Grid:
    """Height and width, in tokens, of what becomes one compressed token."""
    return WINDOWS[self.ratio]


def compressed_mask(
  grid: Int[Array, "b 2"], window: Grid, length: int
) -> Bool[Array, "b m"]:
  """True where a compressed token stands for a whole window of the image.

  Trailing rows and columns that fill no window are cropped, as the reference does.
  """
  windows = jnp.prod(grid // jnp.asarray(window, grid.dtype)[None, :], axis=-1)
  return jnp.arange(length)[None, :] < windows[:, None]


class KVCompressor(nn.Module):
  """Merges the tokens of each window of keys and of values, with shared parameters."""

  compression: KVCompression
  compute: Compute

  @nn.compact
  def __call__(
    self,
    key: Float[Array, "b n d"],
    value: Float[Array, "b n d"],
    discard_key: Key[Array, ""] | None,
  ) -> tuple[Float32[Array, "b m d"], Float32[Array, "b m d"]]:
    window, width = self.compression.window, key.shape[-1]
    r = window[0] * window[1]
    m = key.shape[1] // r  # a last incomplete chunk is trailing tokens or padding
    operator = self.compression.operator

    # A window's tokens side by side in a row: an axis of r would be padded to a tile.
    def windows(x: Array) -> list[Array]:
      side_by_side = einops.rearrange(x[:, : m * r], "b (m r) d -> b m (r d)", r=r)
      return jnp.split(side_by_side, r, axis=-1)

    if operator == "discard":
      return tuple(windows(x)[0].astype(jnp.float32) for x in (key, value))  # pyright: ignore
    if operator == "random_discard":
      # One draw a window, the same for every image: an image's result does not depend
      # on its neighbours in the batch.
      assert discard_key is not None, "PixArt passes one for this operator"
      pick = jax.random.randint(discard_key, (m,), 0, r) + r * jnp.arange(m)
      return tuple(jnp.take(x, pick, axis=1).astype(jnp.float32) for x in (key, value))  # pyright: ignore
    if operator == "average":
      return tuple(
        functools.reduce(jnp.add, (part.astype(jnp.float32) for part in windows(x))) / r
        for x in (key, value)
      )  # pyright: ignore
    kernel = self.param("kernel", nn.initializers.constant(1 / r), (*window, width))
    bias = self.param("bias", nn.initializers.zeros, (width,))
    kernel = einops.rearrange(kernel, "p q d -> (p q) d").astype(self.compute.dtype)
    norm = LayerNorm(name="norm") if self.compression.norm else lambda x: x

    def merged(x: Array) -> Float32[Array, "b m d"]:
      parts = windows(x.astype(self.compute.dtype))
      total = sum(
        part.astype(jnp.float32) * weight.astype(jnp.float32)
        for part, weight in zip(parts, kernel[:, None, None], strict=True)
      )
      return norm(total + bias.reshape(1, 1, -1))

    return merged(key), merged(value)
