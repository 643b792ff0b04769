"""The order of examples: permutations that are computed point by point.

Nothing is as long as the dataset, any position costs the same, and the numbers depend
on no library: the order of a run's examples must outlive any version.
"""

import numpy as np
from jaxtyping import Float64, Int64, UInt64

# Streams of random numbers, the first word of each, so that no two share their bits.
RECORDS, CAPTION_KIND, CAPTION, OTHER_RECORDS, BLOCKS = range(5)

_ROUNDS = 4


def permuted(
  positions: Int64[np.ndarray, " b"], *, seed: tuple[int, ...], n: int
) -> tuple[Int64[np.ndarray, " b"], Int64[np.ndarray, " b"]]:
  """Epoch and place in 0 … n - 1 of these positions of an endless stream.

  Each epoch, n positions long, is a permutation of its own. It is a Feistel network
  over the next power of two (a bijection whatever its round function), applied again to
  what lands outside the n until it lands inside ("cycle walking": Black and Rogaway,
  "Ciphers with arbitrary finite domains", 2002, section 4).
  """
  epoch, index = np.divmod(positions, n)
  bits = max(6, (n - 1).bit_length())  # halves of a bit or two mix poorly
  low_bits = np.uint64(bits // 2)
  low_mask = np.uint64((1 << bits // 2) - 1)
  high_mask = np.uint64((1 << bits - bits // 2) - 1)
  keys = [hashed(*seed, epoch, i) for i in range(2 * _ROUNDS)]

  outside, point = np.arange(len(index)), index.astype(np.uint64)
  while len(outside):
    high, low = point[outside] >> low_bits, point[outside] & low_mask
    for i in range(0, 2 * _ROUNDS, 2):
      high ^= _scramble(keys[i][outside] ^ low) & high_mask
      low ^= _scramble(keys[i + 1][outside] ^ high) & low_mask
    point[outside] = (high << low_bits) | low
    outside = outside[point[outside] >= n]
  return epoch, point.astype(np.int64)


def hashed(*words: int | Int64[np.ndarray, " b"]) -> UInt64[np.ndarray, " b"]:
  """Random bits for each row, a function of all the words."""
  state = np.zeros(1, np.uint64)
  for word in words:
    state = _scramble((state + np.uint64(0x9E3779B97F4A7C15)) ^ np.uint64(word))
  return state


def uniform(bits: UInt64[np.ndarray, " b"]) -> Float64[np.ndarray, " b"]:
  """Numbers in [0, 1) from random bits."""
  return (bits >> np.uint64(11)) * 2.0**-53


def _scramble(x: UInt64[np.ndarray, " b"]) -> UInt64[np.ndarray, " b"]:
  """A bijection in which every bit depends on every bit.

  Stafford's variant 13, the output function of SplitMix64 (Steele, Lea and Flood, "Fast
  splittable pseudorandom number generators", 2014).
  """
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))
