"""Attention on TPU by kernels that keep scores in the core, forward and backward.

Nothing quadratic in tokens leaves the chip. No kernel is asked for a mask: it rides on
features that a head has more than its width, which the matrix unit pads to 128 anyway.
That is free but for widths that fill the unit, where the segment ids of JAX's kernels
cost a fourteenth of the forward pass on v5e and an eighth on v6e, and images of one
batch may fold into the heads, whatever their masks.

The kernels are our own, `models/splash_kernels.py`, where a core's memory has room for
them, and JAX's elsewhere, `models/splash_of_jax.py`. What a step of each kernel's grid
costs is measured by `benchmarks/splash_cycles.py` and stands in
`pixsigma_jax/plan/kernels.py`, by chip and blocks: blocks of 1024 are best on all, and
two of them at once in the forward pass, of queries in ours and of keys in JAX's.
"""

from typing import Any

import einops
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Shaped

from pixsigma_jax.models import splash_kernels, splash_of_jax
from pixsigma_jax.models.splash_kernels import padded

_LANES = 128  # blocks are multiples of it
_BLOCK = 1024  # queries or keys, at most: the best on v5e and v6e alike

# What a kernel may have of a core's own memory, by kind of device; others have too
# little for ours.
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
  n, f, itemsize = query.shape[1], query.shape[-1], query.dtype.itemsize
  block_q, block_k = block_size(n), block_size(key.shape[1])
  blocks = block_q, block_k, block_k
  query, key, value = map(_filled, (query, key, value), blocks)
  mask = _filled(mask, block_k)
  if has_room(n, f, device_kind):
    options = residual_name, block_q, block_k, at_once(n, itemsize), interpret
    operands = map(_in_rows, (query, key, value))
    out: Any = splash_kernels.attend(*options, *operands, _of_images(mask))
    out = _out_of_rows(out, len(mask))
  else:
    fetched = at_once(mask.shape[1], itemsize)
    options = residual_name, block_q, block_k, fetched, interpret
    out = splash_of_jax.attend(*options, query, key, value, mask)
  return out[:, :n].astype(value.dtype)


def _in_rows(x: Float[Array, "b n k f"]) -> Float[Array, "bk f n"]:
  # Heads joined while it is turned: their 72 features by themselves would take 128
  # places, and XLA a pass over twice the bytes. So a matrix product writes it turned.
  f = x.shape[-1]
  x = einops.rearrange(x, "b n k f -> b n (k f)").swapaxes(1, 2)
  return einops.rearrange(x, "b (k f) n -> (b k) f n", f=f)


def _out_of_rows(x: Float[Array, "bk f n"], batch: int) -> Float[Array, "b n k f"]:
  f = x.shape[1]
  x = einops.rearrange(x, "(b k) f n -> b (k f) n", b=batch).swapaxes(1, 2)
  return einops.rearrange(x, "b n (k f) -> b n k f", f=f)


def _of_images(mask: Bool[Array, "b m"]) -> Float32[Array, "b 1 m"]:
  return mask[:, None].astype(jnp.float32)


def has_room(queries: int, width: int, device_kind: str) -> bool:
  """Whether a core of the device has room for our kernels, with heads so wide."""
  needed = splash_kernels.room(padded(queries, block_size(queries)), width)
  known = width <= splash_kernels.WIDEST
  return known and needed <= _CORE_MEMORY.get(device_kind, 0)


def block_size(length: int) -> int:
  """The least block of which as few as possible cover `length`."""
  blocks = -(-length // _BLOCK)
  return padded(-(-length // blocks), _LANES)


def at_once(length: int, itemsize: int) -> int:
  """Queries or keys that a forward pass takes together: two blocks, if they are even.

  Of numbers of four bytes a kernel has no room for more than one.
  """
  block = block_size(length)
  whole = padded(length, block) % (2 * block) == 0
  return 2 * block if whole and itemsize == 2 else block


def _filled(x: Shaped[Array, "b n *rest"], block: int) -> Shaped[Array, "b m *rest"]:
  """Pads the second axis to whole blocks with zeros, or False."""
  padding = [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2)
  return jnp.pad(x, padding)
