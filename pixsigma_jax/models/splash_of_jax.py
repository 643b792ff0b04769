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

_HIDDEN = -1e9  # added to scores of keys that are not to be seen


def attend(
  residual_name: str,
  block_q: int,
  block_k: int,
  fetched: int,
  interpret: bool,
  query: Float[Array, "b n k f"],
  key: Float[Array, "b m k f"],
  value: Float[Array, "b m k f"],
  mask: Bool[Array, "b m"],
) -> Float[Array, "b n k f"]:
  """softmax(q·kᵀ/√f)·v over keys that are seen; 0 where none is.

  Args:
    residual_name: of what the backward pass needs of the forward pass.
    block_q, block_k: multiples of 128 that divide the lengths.
    fetched: keys that the forward pass fetches together, a multiple of `block_k`.
    interpret: runs the kernels step by step in XLA, on any platform.
  """
  # The kernels do not scale. In the queries' own dtype: their rounding is relative.
  query = query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
  query = _with_feature(query, jnp.ones((), query.dtype))
  hidden = jnp.where(mask, 0.0, _HIDDEN).astype(key.dtype)
  key = _with_feature(key, hidden[..., None, None])
  folded = (einops.rearrange(x, "b n k f -> (b k) n f") for x in (query, key, value))
  out: Any = _attend(residual_name, block_q, block_k, fetched, interpret, *folded)
  out = einops.rearrange(out, "(b k) n f -> b n k f", b=len(mask))
  # With every key hidden, softmax would see them all alike.
  return jnp.where(mask.any(axis=-1).reshape(-1, 1, 1, 1), out, 0)


def _with_feature(x: Float[Array, "b n k f"], feature: Array) -> Float[Array, "..."]:
  # Chosen by lane: joining an array of one lane to another costs a pass over both.
  f = x.shape[-1]
  wider = jnp.pad(x, [(0, 0)] * 3 + [(0, 1)])
  return jnp.where(jnp.arange(f + 1) == f, feature, wider)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _attend(
  residual_name: str,
  block_q: int,
  block_k: int,
  fetched: int,
  interpret: bool,
  query: Float[Array, "h n f1"],
  key: Float[Array, "h m f1"],
  value: Float[Array, "h m f"],
) -> Float[Array, "h n f"]:
  del residual_name
  kernel = _kernel_for(
    query, key, block_q, block_k, fetched, interpret, keep_sums=False
  )
  return kernel(query, key, value)


def _forward(residual_name, block_q, block_k, fetched, interpret, query, key, value):
  kernel = _kernel_for(query, key, block_q, block_k, fetched, interpret, keep_sums=True)
  out, (logsumexp,) = kernel(query, key, value)
  # Turned while it is kept: a TPU stores the last axis 128 wide, 1.8 times the bytes.
  out = checkpoint_name(out.swapaxes(1, 2), residual_name)
  logsumexp = checkpoint_name(logsumexp, residual_name)
  return out.swapaxes(1, 2), (query, key, value, out, logsumexp)


def _backward(residual_name, block_q, block_k, fetched, interpret, residuals, gradient):
  # Not public, and the only way to run the backward pass with residuals of one's own.
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

  query, key, value, out, logsumexp = residuals
  kernel = _kernel_for(
    query, key, block_q, block_k, fetched, interpret, keep_sums=False
  )
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


def _kernel_for(query: Array, key: Array, *options: Any, keep_sums: bool) -> Any:
  return _kernel(*query.shape[:2], key.shape[1], *options, keep_sums)


@functools.lru_cache(maxsize=64)
def _kernel(
  heads: int,
  queries: int,
  keys: int,
  block_q: int,
  block_k: int,
  fetched: int,
  interpret: bool,
  keep_sums: bool,  # in 128 columns: 0.5 GiB at 4096 pixels
) -> Any:
  # Half a second that only TPUs have a use for.
  from jax.experimental.pallas.ops.tpu import splash_attention

  sizes = splash_attention.BlockSizes(
    block_q=block_q,
    block_kv=fetched,
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
      interpret=interpret,
    )
