"""Sizes for training and sampling: a table of aspect ratios for each resolution.

Source: `diffusion/data/datasets/utils.py` of PixArt-alpha/PixArt-sigma. A ratio is
height over width. The published tables of 256 to 2048 are one table scaled; 4096 is
that table again (the published code has no table of its own for it), and 2880² has
the area of a UHD screen and other ratios.

The rule behind them: all sizes in steps of a sixteenth of the resolution whose area is
90 to 100 % of the square's and whose sides are at most as 1 to 4. `generate` makes
tables by it for any resolution. It gives the published ones and one size more, 21 x 11
steps, which they leave out. That of 2880 is the one of 256 times 45 / 16, rounded down
to its step, but for 33 x 60 and 60 x 33, which the rounding would make 59.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias


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


# Areas may be off by this much of the square's before `check` speaks of it.
_AREA_TOLERANCE = 0.1
# And sizes' ratios from what they are called: the published are, by up to 2.3 %.
_RATIO_TOLERANCE = 0.03


def generate(
  resolution: int, step: int | None = None, *, largest_ratio: float = 4.0
) -> dict[float, Bucket]:
  """A table by the rule of the published ones: see the file's opening.

  Args:
    resolution: side of the square in pixels.
    step: sides are multiples of it; a sixteenth of the resolution if None. A step half
      as long gives four times as many sizes.
    largest_ratio: of the longer side to the shorter.

  Returns:
    From wide to high, by ratios of as many digits as it takes to tell them apart, two
    at least.

  Raises:
    ValueError: the step does not divide the resolution, or a ratio is below 1.
  """
  if step is None:
    step = resolution // 16
  if resolution < 1 or step < 1 or resolution % step:
    raise ValueError(
      f"{resolution} pixels cannot be cut in steps of {step}: give a step that divides "
      "the resolution."
    )
  if not 1 <= largest_ratio < math.inf:
    raise ValueError(f"largest_ratio {largest_ratio} must be a number from 1 on.")
  area = resolution**2
  smallest = area * (1 - _AREA_TOLERANCE)
  sizes = []
  for height in range(step, math.isqrt(math.ceil(area * largest_ratio)) + 1, step):
    for width in range(area // height // step * step, 0, -step):
      if height * width < smallest:
        break
      if max(height, width) <= largest_ratio * min(height, width):
        sizes.append(Bucket(height, width))
  # Sizes of one ratio: the larger is worth having.
  largest = {size.height / size.width: size for size in sorted(sizes)}
  ratios = sorted(largest)
  digits = next(
    digits
    for digits in range(2, 17)
    if len({round(ratio, digits) for ratio in ratios}) == len(ratios)
  )
  return {round(ratio, digits): largest[ratio] for ratio in ratios}


class Check(NamedTuple):
  """Findings about a table of sizes.

  Attributes:
    unusable: sizes that the networks cannot take, a sentence each.
    doubtful: what is likely a mistake and can be worked with.
    longest_sequence: tokens of the largest size.
    padding_share: of all tokens, if every size is as frequent and is padded to the
      longest.
  """

  unusable: tuple[str, ...]
  doubtful: tuple[str, ...]
  longest_sequence: int
  padding_share: float


def check(
  table: Buckets, resolution: int, patch_size: int = 2, downsampling: int = 8
) -> Check:
  """Checks a table for everything that would go wrong in training.

  Args:
    resolution: side of the square in pixels that the sizes should have the area of.
    patch_size: latents along a side of a token.
    downsampling: pixels to a latent, along a side.
  """
  unit, area = patch_size * downsampling, resolution**2
  unusable, doubtful, sequences = [], [], []
  for ratio, (height, width) in table.items():
    name = f"{ratio:g}: {height}x{width}"
    if height % unit or width % unit:
      unusable.append(
        f"{name}: both sides must be multiples of {unit} = {downsampling} (pixels to a "
        f"latent) x {patch_size} (latents to a token)."
      )
    share = height * width / area
    if abs(share - 1) > _AREA_TOLERANCE:
      doubtful.append(
        f"{name} has {share:.0%} of the area of {resolution}x{resolution}."
      )
    if abs(height / width - ratio) > _RATIO_TOLERANCE * ratio:
      turned = abs(width / height - ratio) <= _RATIO_TOLERANCE * ratio
      hint = "; ratios are height over width" if turned else ""
      doubtful.append(f"{name} has the ratio {height / width:.3g}{hint}.")
    elif (other := nearest(table, height, width)) != (height, width):
      doubtful.append(
        f"{name} has the ratio {height / width:.3g}: images of this shape go to "
        f"{other.height}x{other.width}."
      )
    sequences.append((height // unit) * (width // unit))
  longest = max(sequences)
  padding = 1 - sum(sequences) / (longest * len(sequences)) if longest else 0.0
  return Check(tuple(unusable), tuple(doubtful), longest, padding)


def read_table(path: str | os.PathLike[str]) -> dict[float, Bucket]:
  """A table of one's own: JSON, `{"RATIO": [HEIGHT, WIDTH], ...}`.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is something else; says what and where.
  """
  path = pathlib.Path(path)
  try:
    # Pairs, because a dict would hide that a ratio stands there twice.
    pairs = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=tuple)
  except FileNotFoundError:
    raise FileNotFoundError(f"There is no table of sizes at {path}.") from None
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} is not JSON: {error}.") from error
  form = f'{path} is no table of sizes like {{"0.5": [704, 1408], "1.0": [1024, 1024]}}'
  if not isinstance(pairs, tuple):
    raise ValueError(f"{form}: it is no object.")
  if not pairs:
    raise ValueError(f"{form}: it is empty.")
  table: dict[float, Bucket] = {}
  for key, size in pairs:
    ratio = _ratio(key)
    if ratio is None:
      raise ValueError(f"{form}: {key!r} is no ratio.")
    if not _is_size(size):
      raise ValueError(f"{form}: {key!r} has {size!r}, not [HEIGHT, WIDTH] in pixels.")
    if ratio in table:
      raise ValueError(f"{form}: the ratio {key} is there twice.")
    table[ratio] = Bucket(*size)
  return table


def table_text(table: Buckets) -> str:
  """A table as JSON for `read_table`, a line for each size."""
  lines = [
    f'  "{ratio}": [{size.height}, {size.width}]' for ratio, size in table.items()
  ]
  return "{\n" + ",\n".join(lines) + "\n}\n"


def _ratio(key: str) -> float | None:
  try:
    ratio = float(key)
  except ValueError:
    return None
  return ratio if 0 < ratio < math.inf else None


def _is_size(size: Any) -> bool:
  return (
    isinstance(size, list)
    and len(size) == 2
    and all(type(side) is int and 0 < side < 1 << 20 for side in size)
  )
