"""Memory for the large arrays of batches, used again when nobody holds the array.

A batch of 1K features is 90 MB. Asking the system for as much memory anew, batch after
batch, costs more than filling it does, since every page of it is cleared first.
"""

import collections
import math
import threading
import weakref

import numpy as np
from jax.typing import DTypeLike

_SMALLEST = 1 << 22  # bytes; below, the allocator itself keeps memory for reuse


class Buffers:
  """Lends arrays; one goes back when the last reference to it or to a view has gone.

  A JAX array that shares an array's memory, or still copies from it, is a reference.
  Threads may share an instance; another process gets an empty one.
  """

  def __init__(self):
    self._lock = threading.Lock()
    self._free: dict[int, list[bytearray]] = collections.defaultdict(list)

  def __reduce__(self):
    return Buffers, ()

  def array(self, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """An array whose values are whatever was there before."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if size < _SMALLEST:
      return np.empty(shape, dtype)
    with self._lock:
      memory = self._free[size].pop() if self._free[size] else bytearray(size)
    # Views refer to `owner`, and not past it: its memory is no array.
    owner = np.frombuffer(memory, np.uint8)
    weakref.finalize(owner, self._free[size].append, memory).atexit = False
    return owner.view(dtype).reshape(shape)
