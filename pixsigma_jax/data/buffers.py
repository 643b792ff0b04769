"""Memory for the large arrays of batches, used again when nobody holds the array.

A batch of 1K features is 90 MB. Asking the system for as much memory anew, batch after
batch, costs more than filling it does, since every page of it is cleared first.
"""

import collections
import ctypes
import dataclasses
import math
import threading
import weakref
from collections.abc import Iterable

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Int64


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
  """Sequences of different lengths in the rows of an array, zero behind their ends."""

  array: np.ndarray  # [b n …]
  _used: Int64[np.ndarray, " b"]  # how much of each row may be other than zero

  def put(self, rows: Iterable[int], sequences: Iterable[np.ndarray]) -> None:
    """Sets each of `rows` to a sequence `[m …]`, m at most n, zeros behind it."""
    for row, sequence in zip(rows, sequences, strict=True):
      length = len(sequence)
      self.array[row, :length] = sequence
      self.array[row, length : self._used[row]] = 0
      self._used[row] = length


class Buffers:
  """Lends `Rows`; their memory goes back when the last view of the array has gone.

  A JAX array that shares its memory, or still copies from it, is a view. Threads may
  share an instance; another process gets an empty one.
  """

  def __init__(self):
    _keep_freed_memory()
    self._lock = threading.Lock()
    # By shape and type: memory, and how much of each row was used.
    self._free: dict[tuple, list[tuple[bytearray, np.ndarray]]] = (
      collections.defaultdict(list)
    )

  def __reduce__(self):
    return Buffers, ()

  def rows(self, shape: tuple[int, ...], dtype: DTypeLike) -> Rows:
    """Rows of zeros, or of what was put there before: each must be put anew."""
    dtype = np.dtype(dtype)
    key = (shape, dtype)
    with self._lock:
      free = self._free[key]
      if free:
        memory, used = free.pop()
      else:
        memory = bytearray(math.prod(shape) * dtype.itemsize)
        used = np.zeros(shape[0], np.int64)
    # Views refer to `owner`, and not past it: its memory is no array.
    owner = np.frombuffer(memory, dtype)
    weakref.finalize(owner, free.append, (memory, used)).atexit = False
    return Rows(owner.reshape(shape), used)


def _keep_freed_memory() -> None:
  """Lets the allocator keep a record's freed memory for the next one.

  By default glibc gives pieces of this size back to the system, in some phases of a
  process after each record, and reading one then takes six times as long.
  """
  m_trim_threshold, m_mmap_threshold = -1, -3  # of malloc.h
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (OSError, AttributeError):  # another allocator, with habits of its own
    return
  mallopt(m_mmap_threshold, 1 << 25)  # the most that it takes
  mallopt(m_trim_threshold, 1 << 30)
