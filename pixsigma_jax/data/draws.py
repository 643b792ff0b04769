"""Random integers of drawn scenes, which outlive any version of any library."""

import hashlib
import itertools
from collections.abc import Iterator

import numpy as np


def draws(*key: str | int) -> Iterator[int]:
  """Endless random 64-bit integers that only `key` decides, the same everywhere."""
  for block in itertools.count():
    digest = hashlib.shake_256(repr((*key, block)).encode()).digest(64)
    yield from np.frombuffer(digest, "<u8").tolist()


def unit(number: int) -> float:
  """A number of `draws` as one in [0, 1), with all the bits that a float holds."""
  return (number >> 11) / 2**53
