"""JAX's splash attention, for cores that have no room for kernels of our own.

Its forward kernel, and its two of the backward pass: its one kernel of the backward
pass writes one dq for each block of keys, 6.5 GB at 4096 pixels.
"""

import functools
from typing import Any

import einops
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from pixsigma_jax.models.splash_kernels import HIDDEN, Options


def attend(
  options: Options,
  query: Float[Array, "b n k f"],
  key: Float[Array, "b m k f"],
  value: Float[Array, "b m k f"],
  mask: Bool[Array, "b m"],
) -> Float[Array, "b n k f"]:
  """softmax(q·kᵀ/√f)·v over keys that are seen; 0 where none is."""
  # The kernels do not scale. In the queries' own dtype: their rounding is relative.
  query = query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
  query = _with_feature(query, jnp.ones((), query.dtype))
  hidden = jnp.where(mask, 0.0, HIDDEN).astype(key.dtype)
  key = _with_feature(key, hidden[..., None, None])
  folded = (einops.rearrange(x, "b n k f -> (b k) n f") for x in (query, key, value))
  out: Any = _attend(options, *folded)
  out = einops.rearrange(out, "(b k) n f -> b n k f", b=len(mask))
  # With every key hidden, softmax would see them all alike.
  return jnp.where(mask.any(axis=-1).reshape(-1, 1, 1, 1), out, 0)


def _with_feature(x: Float[Array, "b n k f"], feature: Array) -> Float[Array, "..."]:
  # Chosen by lane: joining an array of one lane to another costs a pass over both.
  f = x.shape[-1]
  wider = jnp.pad(x, [(0, 0)] * 3 + [(0, 1)])
  return jnp.where(jnp.arange(f + 1) == f, feature, wider)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
  options: Options,
  query: Float[Array, "h n f1"],
  key: Float[Array, "h m f1"],
  value: Float[Array, "h m f"],
) -> Float[Array, "h n f"]:
  return _kernel_for(options, query, key, keep_sums=False)(query, key, value)


def _forward(options, query, key, value):
  kernel = _kernel_for(options, query, key, keep_sums=True)
  out, (logsumexp,) = kernel(query, key, value)
  # Turned while it is kept: a TPU stores the last axis 128 wide, 1.8 times the bytes.
  out = checkpoint_name(out.swapaxes(1, 2), options.residual_name)
  logsumexp = checkpoint_name(logsumexp, options.residual_name)
  return out.swapaxes(1, 2), (query, key, value, out, logsumexp)


def _backward(options, residuals, gradient):
  # Not public, and the only way to run the backward pass with residuals of one's own.
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

  query, key, value, out, logsumexp = residuals
  kernel = _kernel_for(options, query, key, keep_sums=False)
  gradients = splash_attention_kernel._splash_attention_bwd(
    **kernel.kwargs,
    res=(
      *(query, key, value, None, None, out.swapaxes(1, 2), logsumexp),
      *(kernel.dq_mask_info, kernel.dkv_mask_info),
    ),
    do=gradient,
  )
  return gradients[3:6]


_attend.defvjp(_forward, _backward)


def _kernel_for(options: Options, query: Array, key: Array, *, keep_sums: bool) -> Any:
  return _kernel(options, *query.shape[:2], key.shape[1], keep_sums)


@functools.lru_cache(maxsize=64)
def _kernel(
  options: Options,
  heads: int,
  queries: int,
  keys: int,
  keep_sums: bool,  # in 128 columns: 0.5 GiB at 4096 pixels
) -> Any:
  # Half a second that only TPUs have a use for.
  from jax.experimental.pallas.ops.tpu import splash_attention

  block_q, block_k = options.block_q, options.block_k
  sizes = splash_attention.BlockSizes(
    block_q=block_q,
    block_kv=options.at_once,
    block_kv_compute=block_k,
    block_q_dq=block_q,
    block_kv_dq=block_k,
    block_q_dkv=block_q,
    block_kv_dkv=block_k,
    block_kv_dkv_compute=block_k,
  )
  with jax.ensure_compile_time_eval():  # what is kept must not belong to one trace
    everything = splash_attention.FullMask((queries, keys))
    return splash_attention.make_splash_mha(
      splash_attention.MultiHeadMask([everything] * heads),
      block_sizes=sizes,
      head_shards=1,
      q_seq_shards=1,
      save_residuals=keep_sums,
      interpret=options.interpret,
    )
