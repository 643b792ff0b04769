"""Sizes that pictures are trained and drawn at: a table of aspect ratios a resolution.

Source: `diffusion/data/datasets/utils.py` of PixArt-alpha/PixArt-sigma. A ratio is
height over width. The published tables of 256 to 2048 are one table scaled; 4096 is
that table again (the published code has no table of its own for it), and 2880² has
the area of a UHD screen and other ratios.
"""

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias


class Bucket(NamedTuple):
  """A size in pixels."""

  height: int
  width: int


Buckets: TypeAlias = Mapping[float, Bucket]

# Ratio: height and width at 256, in steps of 16 pixels.
_AT_256 = """
0.25 8x32   0.26 8x31   0.27 8x30   0.28 8x29   0.32 9x28   0.33 9x27   0.35 9x26
0.4 10x25   0.42 10x24  0.48 11x23  0.5 11x22   0.52 11x21  0.57 12x21  0.6 12x20
0.68 13x19  0.72 13x18  0.78 14x18  0.82 14x17  0.88 15x17  0.94 15x16  1.0 16x16
1.07 16x15  1.13 17x15  1.21 17x14  1.29 18x14  1.38 18x13  1.46 19x13  1.67 20x12
1.75 21x12  2.0 22x11   2.09 23x11  2.4 24x10   2.5 25x10   2.89 26x9   3.0 27x9
3.11 28x9   3.62 29x8   3.75 30x8   3.88 31x8   4.0 32x8
"""
# The same of 2880, in steps of 64 pixels.
_AT_2880 = """
0.25 22x90  0.26 22x87  0.27 22x84  0.28 22x81  0.32 25x78  0.33 25x75  0.34 25x73
0.4 28x70   0.42 28x67  0.47 30x64  0.49 30x61  0.51 30x59  0.55 33x60  0.59 33x56
0.68 36x53  0.72 36x50  0.78 39x50  0.83 39x47  0.89 42x47  0.93 42x45  1.0 45x45
1.07 45x42  1.12 47x42  1.21 47x39  1.28 50x39  1.39 50x36  1.47 53x36  1.7 56x33
1.82 60x33  2.03 61x30  2.13 64x30  2.39 67x28  2.5 70x28   2.92 73x25  3.0 75x25
3.12 78x25  3.68 81x22  3.82 84x22  3.95 87x22  4.0 90x22
"""
# Below 2048 the published samplers leave these ratios out.
_NOT_SAMPLED = (0.26, 0.27, 2.89, 3.11, 3.62, 3.75, 3.88)


def _table(text: str, step: int) -> dict[float, Bucket]:
  words = text.split()
  table = {}
  for ratio, size in zip(words[::2], words[1::2], strict=True):
    height, width = size.split("x")
    table[float(ratio)] = Bucket(step * int(height), step * int(width))
  return table


BUCKETS: dict[int, Buckets] = {
  **{resolution: _table(_AT_256, resolution // 16) for resolution in (256, 512, 1024)},
  2048: _table(_AT_256, 128),
  2880: _table(_AT_2880, 64),
  4096: _table(_AT_256, 256),
}


def sampling_buckets(resolution: int) -> Buckets:
  """The sizes that a model of this resolution draws, as diffusers chooses among them.

  Raises:
    ValueError: there is no table of the resolution.
  """
  if resolution not in BUCKETS:
    raise ValueError(
      f"There is no table of sizes for {resolution} pixels, only for "
      f"{', '.join(map(str, BUCKETS))}."
    )
  table = BUCKETS[resolution]
  left_out = _NOT_SAMPLED if resolution < 2048 else ()
  return {ratio: size for ratio, size in table.items() if ratio not in left_out}


def nearest(buckets: Buckets, height: int, width: int) -> Bucket:
  """The size whose ratio is nearest to height / width; the earlier one in a draw."""
  ratio = height / width
  return buckets[min(buckets, key=lambda known: abs(known - ratio))]
