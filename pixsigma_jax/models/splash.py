"""Attention on TPU by kernels that keep scores in the core, forward and backward.

Nothing quadratic in tokens leaves the chip. The key mask uses a padding row of the head
dimension, which the matrix unit pads to 128 anyway. That is free except for widths that
fill the unit, while the segment ids of JAX's kernels cost a fourteenth of the forward
pass on v5e and an eighth on v6e. It also lets images of one batch fold into the heads,
whatever their masks.

The kernels are our own, `models/splash_kernels.py`, where a core's memory has room for
them, and JAX's elsewhere, `models/splash_of_jax.py`. What a step of each kernel's grid
costs is measured by `benchmarks/splash_cycles.py` and stands, by chip and blocks, in
`pixsigma_jax/plan/kernel_cycles.jsonl`: blocks of 1024 are best on all, and two of them
at once in the forward pass, of queries in ours and of keys in JAX's.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

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
  """Attention on TPU; see `models/attention.py: attend`.

  Args:
    residual_name: under which remat policies find what the backward pass needs of the
      forward pass: the output and the logarithm of each query's sum.
    device_kind: what it is to run on.
    interpret: runs the kernel step by step in XLA, on any platform; for tests.
  """
  n, m, f = query.shape[1], key.shape[1], query.shape[-1]
  ours = has_room(n, f, device_kind)
  options = splash_kernels.Options(
    residual_name=residual_name,
    block_q=block_size(n),
    block_k=block_size(m),
    at_once=at_once(n if ours else m, query.dtype.itemsize),
    interpret=interpret,
  )
  key, value, mask = (_filled(x, options.block_k) for x in (key, value, mask))
  kernels = splash_kernels if ours else splash_of_jax
  out = kernels.attend(options, _filled(query, options.block_q), key, value, mask)
  return out[:, :n].astype(value.dtype)


def has_room(queries: int, width: int, device_kind: str) -> bool:
  """Whether a core of the device has room for our kernels, with heads so wide."""
  needed = splash_kernels.room(padded(queries, block_size(queries)), width)
  known = width <= splash_kernels.WIDEST
  return known and needed <= _CORE_MEMORY.get(device_kind, 0)


def block_size(length: int) -> int:
  """Smallest block among those of which the fewest cover `length`."""
  blocks = -(-length // _BLOCK)
  return padded(-(-length // blocks), _LANES)


def at_once(length: int, itemsize: int) -> int:
  """Chunk size of a forward pass: two blocks, if their number is even.

  Of numbers of four bytes a kernel has no room for more than one.
  """
  block = block_size(length)
  whole = padded(length, block) % (2 * block) == 0
  return 2 * block if whole and itemsize == 2 else block


def _filled(x: Shaped[Array, "b n *rest"], block: int) -> Shaped[Array, "b m *rest"]:
  """Pads the second axis to whole blocks with zeros, or False."""
  padding = [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2)
  return jnp.pad(x, padding)
