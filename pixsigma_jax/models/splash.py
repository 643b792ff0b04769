"""Attention on TPU by JAX's splash kernel, forward and backward in blocks.

Nothing quadratic in tokens leaves the chip. The kernel knows no padding mask but
segment ids, of which it compares a whole block at a time; here the mask rides on the
head width instead, which the matrix unit pads to 128 anyway: queries get one feature
more, always 1, and keys one that is 0 where they may be seen and hugely negative where
not. That is free, where segment ids cost a fourteenth of the forward pass on v5e and an
eighth on v6e, and rows of one batch may fold into the heads, whatever their masks.

What a step of each kernel's grid costs is measured by `benchmarks/splash_cycles.py` and
stands in `pixsigma_jax/plan/kernels.py`, by chip and blocks: blocks of 1024 are best on
all, with two thousand keys fetched at once in the forward pass. The backward pass is a
kernel of our own, `models/splash_backward.py`, where a core's memory holds the dq of a
head, and JAX's two kernels elsewhere. JAX's one kernel is not used: it writes one dq
for each block of keys, 6.5 GB at 4096 pixels.
"""

import functools
from typing import Any

import einops
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from pixsigma_jax.models import splash_backward

_LANES = 128  # blocks are multiples of it
_BLOCK = 1024  # queries, and keys at a time, at most: the best on v5e and v6e alike
_HIDDEN = -1e9  # added to scores of keys that are not to be seen

# What a kernel may have of a core's own memory, by kind of device; others have too
# little for the backward pass in one kernel.
_CORE_MEMORY = {
  "TPU v5 lite": 96 * 2**20,
  "TPU v5": 60 * 2**20,
  "TPU v6 lite": 96 * 2**20,
}


def attend(
  query: Float[Array, "b n k f"],
  key: Float[Array, "b m k f"],
  value: Float[Array, "b m k f"],
  mask: Bool[Array, "b m"],
  *,
  residual_name: str,
  device_kind: str,
  interpret: bool = False,
) -> Float[Array, "b n k f"]:
  """See `models/attention.py: attend`.

  Args:
    residual_name: under which remat policies find what the backward pass needs of the
      forward pass: the output and the logarithm of each query's sum.
    device_kind: what it is to run on.
    interpret: runs the kernel step by step in XLA, on any platform; for tests.
  """
  f, n = query.shape[-1], query.shape[1]
  block_q, block_k = block_size(n), block_size(key.shape[1])
  # The kernel does not scale. In the queries' own dtype: their rounding is relative.
  query = query * jnp.asarray(f**-0.5, query.dtype)
  query = _with_feature(query, jnp.ones((), query.dtype))
  hidden = jnp.where(_fill(mask, block_k), 0.0, _HIDDEN).astype(key.dtype)
  key = _with_feature(_fill(key, block_k), hidden[..., None, None])
  query = _fill(query, block_q)
  options = residual_name, in_one_kernel(n, device_kind), interpret
  out: Any = _attend(options, query, key, _fill(value, block_k))
  # With every key hidden, softmax would see them all alike.
  seen = mask.any(axis=-1).reshape(-1, 1, 1, 1)
  return jnp.where(seen, out[:, :n], 0).astype(value.dtype)


def in_one_kernel(queries: int, device_kind: str) -> bool:
  """Whether a core of the device has room for the backward pass of so many queries."""
  length = _padded(queries, block_size(queries))
  return splash_backward.room(length) <= _CORE_MEMORY.get(device_kind, 0)


# The kernel's own derivative keeps its output as it is, [heads n f], whose last axis a
# TPU stores 128 wide: 1.8 times the bytes. This one keeps it with the heads joined.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
  options: tuple[str, bool, bool],
  query: Float[Array, "b n k f1"],
  key: Float[Array, "b m k f1"],
  value: Float[Array, "b m k f"],
) -> Float[Array, "b n k f"]:
  _, _, interpret = options
  kernel = _kernel_for(query, key, interpret, keep_sums=False)
  return _unfolded(kernel(_folded(query), _folded(key), _folded(value)), len(query))


def _forward(options, query, key, value):
  residual_name, _, interpret = options
  kernel = _kernel_for(query, key, interpret, keep_sums=True)
  out, (logsumexp,) = kernel(_folded(query), _folded(key), _folded(value))
  out = einops.rearrange(out, "(b k) n f -> b n (k f)", b=len(query))
  out = checkpoint_name(out, residual_name)
  logsumexp = checkpoint_name(logsumexp, residual_name)
  residuals = query, key, value, out, logsumexp
  return einops.rearrange(out, "b n (k f) -> b n k f", f=value.shape[-1]), residuals


def _backward(options, residuals, gradient):
  _, in_one_kernel, interpret = options
  query, key, value, out, logsumexp = residuals
  operands = _folded(query), _folded(key), _folded(value), _folded(gradient)
  if in_one_kernel:
    split = einops.rearrange(out, "b n (k f) -> b n k f", f=value.shape[-1])
    correction = jnp.einsum(
      "bnkf,bnkf->bkn", split, gradient, preferred_element_type=jnp.float32
    )
    gradients = splash_backward.gradients(
      *operands,
      logsumexp,
      einops.rearrange(correction, "b k n -> (b k) n"),
      block_q=block_size(query.shape[1]),
      block_k=block_size(key.shape[1]),
      interpret=interpret,
    )
  else:
    gradients = _in_two_kernels(query, key, operands, out, logsumexp, interpret)
  return tuple(_unfolded(x, len(query)) for x in gradients)


def _in_two_kernels(query, key, operands, out, logsumexp, interpret):
  """By JAX's kernels, for a core that has no room for ours."""
  # Not public, and the only way to run the backward pass with residuals of one's own.
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

  *inputs, gradient = operands
  out = einops.rearrange(out, "b n (k f) -> (b k) n f", f=gradient.shape[-1])
  kernel = _kernel_for(query, key, interpret, keep_sums=False)
  gradients = splash_attention_kernel._splash_attention_bwd(
    **kernel.kwargs,
    res=(
      *(*inputs, None, None, out, logsumexp),
      *(kernel.dq_mask_info, kernel.dkv_mask_info),
    ),
    do=gradient,
  )
  return gradients[3:6]


_attend.defvjp(_forward, _backward)


def _folded(x: Float[Array, "b n k f"]) -> Float[Array, "bk n f"]:
  return einops.rearrange(x, "b n k f -> (b k) n f")


def _unfolded(x: Float[Array, "bk n f"], batch: int) -> Float[Array, "b n k f"]:
  return einops.rearrange(x, "(b k) n f -> b n k f", b=batch)


def block_size(length: int) -> int:
  """The least block of which as few as possible cover `length`."""
  blocks = -(-length // _BLOCK)
  return _padded(-(-length // blocks), _LANES)


def fetched(keys: int, itemsize: int) -> int:
  """Keys that the forward pass fetches together: two blocks if there are two.

  Of numbers of four bytes a kernel has no room for more than one.
  """
  block = block_size(keys)
  whole = _padded(keys, block) % (2 * block) == 0
  return 2 * block if whole and itemsize == 2 else block


def _padded(length: int, block: int) -> int:
  return -(-length // block) * block


def _fill(x: Array, block: int) -> Array:
  """Pads the second axis to whole blocks with zeros, or False."""
  padding = [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2)
  return jnp.pad(x, padding)


def _with_feature(x: Float[Array, "b n k f"], feature: Array) -> Float[Array, "..."]:
  # Chosen by lane: joining an array of one lane to another costs a pass over both.
  f = x.shape[-1]
  wider = jnp.pad(x, [(0, 0)] * 3 + [(0, 1)])
  return jnp.where(jnp.arange(f + 1) == f, feature, wider)


def _kernel_for(query: Array, key: Array, interpret: bool, *, keep_sums: bool) -> Any:
  b, n, k, _ = query.shape
  itemsize = jnp.dtype(key.dtype).itemsize
  return _kernel(b * k, n, key.shape[1], itemsize, interpret, keep_sums)


@functools.lru_cache(maxsize=64)
def _kernel(
  heads: int, queries: int, keys: int, itemsize: int, interpret: bool, keep_sums: bool
) -> Any:
  # Half a second that only TPUs have a use for.
  from jax.experimental.pallas.ops.tpu import splash_attention

  block_q, block_k = block_size(queries), block_size(keys)
  sizes = splash_attention.BlockSizes(
    block_q=block_q,
    block_kv=fetched(keys, itemsize),
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
