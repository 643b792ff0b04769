"""Matrix products of 8-bit integers, by qwix: weights once, activations as they come.

Post-training quantization without calibration. A weight has one scale an output
channel, an activation one a token, each the largest magnitude over 127.5; products add
up in 32-bit integers and are scaled back in float32. Only the blocks' linear maps take
part, nearly all of a network's weights: what enters and leaves it, timesteps, norms,
compression and attention's own products keep their precision.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pixsigma_jax import errors
from pixsigma_jax.wording import install

_MAPS = ("qkv", "query", "kv", "in", "out")


def quantize(params: Any) -> Any:
  """`params` with every block's kernels `[… i o]` as qwix's `QArray`.

  Other leaves are shared. `Linear` takes either.

  Raises:
    ValueError: qwix is not installed.
  """
  quantized = jax.jit(_quantized, static_argnames="shared_axis")

  def one(path: Any, leaf: Any) -> Any:
    names = [key.key for key in path]
    if not names[0].startswith("block") or names[-1] != "kernel":
      return leaf
    if names[-2] not in _MAPS:
      return leaf
    return quantized(jnp.asarray(leaf), shared_axis=leaf.ndim - 2)

  _qwix()
  return jax.tree_util.tree_map_with_path(one, params)


def is_quantized(kernel: Any) -> bool:
  """Whether `kernel` is a `QArray`, without importing what defines it."""
  return hasattr(kernel, "qvalue")


def matmul(x: Float[Array, "*b i"], kernel: Any) -> Float32[Array, "..."]:
  """x · kernel, of a kernel that `quantize` made."""
  rows = _quantized(x.astype(jnp.float32), shared_axis=x.ndim - 1)
  with jax.numpy_dtype_promotion("standard"):  # qwix scales integers by floats
    return _qwix().dot(rows, kernel, preferred_element_type=jnp.float32)


def _quantized(x: Float[Array, "..."], shared_axis: int) -> Any:
  """`x` with scales of its own for every index of all axes but one."""
  own = [axis for axis in range(x.ndim) if axis != shared_axis]
  return _qwix().quantize(x, jnp.int8, channelwise_axes=own)


def _qwix() -> Any:
  try:
    import qwix
  except ImportError as error:
    if not errors.of_absence(error, "qwix"):
      raise
    raise ValueError(f"int8 needs qwix: {install('int8')}.") from None
  return qwix
