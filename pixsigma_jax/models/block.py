"""One transformer block: adaLN-single, self-attention, cross-attention, MLP.

Reference: `PixArtMS.py: PixArtMSBlock`. The residual stream is float32; each branch
computes in the block's dtype.
"""

from typing import Any

import einops
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Float32, Int, Key

from pixsigma_jax.models import attention
from pixsigma_jax.models.embeddings import XL_WIDTH
from pixsigma_jax.models.kv_compression import (
  KVCompression,
  KVCompressor,
  compressed_mask,
)
from pixsigma_jax.models.layers import (
  Compute,
  LayerNorm,
  Linear,
  layer_norm,
  zeros_init,
)
from pixsigma_jax.models.tokens import token_mask

LAYER_NORM_EPSILON = 1e-6

# Name under which remat policies find the residual stream as it enters a block.
BLOCK_INPUT = "block_input"


def modulate(
  x: Float32[Array, "b n d"], shift: Float32[Array, "b d"], scale: Float32[Array, "b d"]
) -> Float32[Array, "b n d"]:
  """Layer norm without parameters, then x·(1 + scale) + shift."""
  x = layer_norm(x, LAYER_NORM_EPSILON)
  return x * (1 + scale[:, None, :]) + shift[:, None, :]


class SelfAttention(nn.Module):
  """Attention among the image's tokens; keys and values may be compressed."""

  num_heads: int
  qk_norm: bool
  compression: KVCompression
  compute: Compute

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    grid: Int[Array, "b 2"],
    discard_key: Key[Array, ""] | None,
    identity: Bool[Array, " b"] | None = None,
  ) -> Float32[Array, "b n d"]:
    n, width = x.shape[1:]
    query, key, value = Linear(width, self.compute, copies=3, name="qkv")(x)
    # Norms act on the full width, not per head, and come before compression.
    if self.qk_norm:
      query = LayerNorm(name="query_norm")(query)
      key = LayerNorm(name="key_norm")(key)
    own_value = value  # of each token, before compression mixes any
    if self.compression.layers:
      key, value = KVCompressor(self.compression, self.compute, name="kv_compressor")(
        key, value, discard_key
      )
      mask = compressed_mask(grid, self.compression.window, key.shape[1])
    else:
      mask = token_mask(grid, n)
    own_value = None if identity is None else (identity, own_value)
    return _attend_heads(self, query, key, value, mask, own_value=own_value)


class CrossAttention(nn.Module):
  """Attention from image tokens to caption tokens.

  `caption_kv`, keys and values `[2 b t d]`, spares making them of `captions` again.
  """

  num_heads: int
  compute: Compute

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    captions: Float[Array, "b t d"] | None,
    caption_mask: Bool[Array, "b t"],
    caption_kv: Float[Array, "2 b t d"] | None,
  ) -> Float32[Array, "b n d"]:
    width = x.shape[-1]
    query = Linear(width, self.compute, name="query")(x)
    if caption_kv is not None:
      key, value = caption_kv
    else:
      assert captions is not None, "either these or caption_kv"
      key, value = Linear(width, self.compute, copies=2, name="kv")(captions)
    return _attend_heads(
      *(self, query, key, value, caption_mask),
      out_init=zeros_init,
      keys_everywhere=caption_kv is not None,
    )


def _attend_heads(
  module: SelfAttention | CrossAttention,
  query,
  key,
  value,
  mask,
  out_init=None,
  own_value=None,
  keys_everywhere=False,
) -> Float32[Array, "b n d"]:
  """Splits heads, attends, joins heads and projects: the end of both attentions.

  `own_value` is the images `[b]` whose attention is the identity, and what it returns;
  for `keys_everywhere` see `attention.attend`.
  """
  compute = module.compute
  query, key, value = (
    einops.rearrange(
      x.astype(compute.dtype), "b n (k f) -> b n k f", k=module.num_heads
    )
    for x in (query, key, value)
  )
  out = attention.attend(
    *(query, key, value, mask, compute.attention, compute.mesh),
    keys_everywhere=keys_everywhere,
  )
  out = einops.rearrange(out, "b n k f -> b n (k f)")
  if own_value is not None:
    identity, passed = own_value
    out = jnp.where(identity[:, None, None], passed.astype(out.dtype), out)
  return Linear(out.shape[-1], compute, kernel_init=out_init, name="out")(out)


class MLP(nn.Module):
  """Two linear maps around a tanh-GELU."""

  hidden: int
  compute: Compute

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float32[Array, "b n d"]:
    hidden = Linear(self.hidden, self.compute, name="in")(x)
    hidden = jax.nn.gelu(hidden, approximate=True)
    return Linear(x.shape[-1], self.compute, name="out")(hidden)


# Scale-shift tables: the reference's N(0, 1/width), at XL/2's width.
table_init = nn.initializers.normal(XL_WIDTH**-0.5)


class BlockInputs(flax.struct.PyTreeNode):
  """What all blocks of a network take alike.

  Attributes:
    modulation: float32 `[b 6 d]`, of the timestep.
    grid: int `[b 2]`, (h, w) in tokens of each image.
    captions: float `[b t d]`, projected; None beside `LayerInputs.caption_kv`.
    caption_mask: bool `[b t]`, True where a caption token is to be seen.
  """

  modulation: Any
  grid: Any
  captions: Any
  caption_mask: Any


class LayerInputs(flax.struct.PyTreeNode):
  """What a block takes for itself; a run of blocks has them stacked, `[layers …]`.

  Attributes:
    discard_key: by which the operator `random_discard` draws; None for others.
    caption_kv: float `[2 b t d]`, keys and values of cross-attention; None beside
      `BlockInputs.captions`.
    identity_attention, skipped: bool `[b]`, see `Conditions`.
  """

  discard_key: Any = None
  caption_kv: Any = None
  identity_attention: Any = None
  skipped: Any = None


class Block(nn.Module):
  """tokens → tokens; `(carry, …) → (carry, None)`, as `nn.scan` wants it."""

  num_heads: int
  mlp_ratio: float
  qk_norm: bool
  compression: KVCompression
  compute: Compute

  @nn.compact
  def __call__(
    self,
    x: Float32[Array, "b n d"],
    inputs: BlockInputs,
    own: LayerInputs,
  ) -> tuple[Float32[Array, "b n d"], None]:
    x = before = checkpoint_name(x, BLOCK_INPUT)
    width = x.shape[-1]
    table = self.param("scale_shift_table", table_init, (6, width))
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = jnp.unstack(
      inputs.modulation + table[None], axis=1
    )
    x = x + gate_msa[:, None, :] * SelfAttention(
      self.num_heads,
      self.qk_norm,
      self.compression,
      self.compute,
      name="attention",
    )(
      modulate(x, shift_msa, scale_msa),
      inputs.grid,
      own.discard_key,
      own.identity_attention,
    )
    # Neither norm nor gate: the reference lets the captions act on x as it is.
    x = x + CrossAttention(self.num_heads, self.compute, name="cross_attention")(
      x, inputs.captions, inputs.caption_mask, own.caption_kv
    )
    x = x + gate_mlp[:, None, :] * MLP(
      round(width * self.mlp_ratio), self.compute, name="mlp"
    )(modulate(x, shift_mlp, scale_mlp))
    if own.skipped is not None:
      x = jnp.where(own.skipped[:, None, None], before, x)
    return x, None
