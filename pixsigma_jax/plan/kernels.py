"""Cycles of attention's kernels on TPU, which XLA:TPU runs and does not estimate.

A kernel does the same for each block of queries and each of keys: a step of its grid.
What a step costs is counted in the instructions that libtpu schedules for it, a bundle
a cycle (`python -m benchmarks.splash_cycles`), and is never less than its matrix
products take of the matrix units. No chip was there: waiting for memory is not in it.
"""

import dataclasses
import json
import math
import re
from collections.abc import Sequence

import jax.numpy as jnp

from pixsigma_jax.chips import Chip
from pixsigma_jax.models import splash_kernels
from pixsigma_jax.models.splash_kernels import TILE_ROWS, padded, tile_rows

# Cycles a second: those at which the matrix units of a chip, each its width squared of
# products a cycle, reach its peak.
CLOCKS = {
  "TPU v3": 0.94e9,
  "TPU v4": 1.05e9,
  "TPU v5 lite": 1.50e9,
  "TPU v5": 1.75e9,
  "TPU v6 lite": 1.75e9,
}

# Cores of a device that share the heads of a kernel which lets them.
_CORES = {"TPU v4": 2, "TPU v5": 2}


@dataclasses.dataclass(frozen=True)
class Step:
  """Cost of a step of a kernel's grid, in cycles of one core.

  Attributes:
    each: what every step takes.
    row: what its beginning and its end take beside that, once for a row of steps.
  """

  each: int
  row: int


@dataclasses.dataclass(frozen=True)
class _Kernel:
  """Properties that all steps of a kernel share.

  Attributes:
    wide: products of matrices, in a step, that take a head to be as wide as the
      matrix unit.
    narrow: those that take it as it is, to whole tiles: it lies in their rows.
    divides: whether the cores of a device share its heads.
  """

  wide: int
  narrow: int
  divides: bool


# JAX's, which lets the cores share the heads of the forward pass alone; and ours.
_KERNELS = {
  "fwd": _Kernel(2, 0, True),
  "dq": _Kernel(3, 0, False),
  "dkv": _Kernel(4, 0, False),
  "forward": _Kernel(1, 1, True),
  "backward": _Kernel(2, 3, True),
}

# Kind of device → dtype → kernel → (queries, keys) of a block → its step. Heads are 72
# wide; JAX's forward pass takes the keys of a block by 1024. In float32 no kernel takes
# two blocks at once, see `models/splash.py: at_once`.
STEPS: dict[str, dict[str, dict[str, dict[tuple[int, int], Step]]]] = {
  "TPU v4": {
    "bfloat16": {
      "fwd": {
        (1024, 2048): Step(12255, 2001),
        (1024, 1024): Step(6385, 2001),
        (1024, 384): Step(4450, 0),
      },
      "dq": {(1024, 1024): Step(7139, 389), (1024, 384): Step(3387, 0)},
      "dkv": {(1024, 1024): Step(8857, 773), (1024, 384): Step(3710, 293)},
    },
    "float32": {
      "fwd": {(1024, 1024): Step(6613, 1937), (1024, 384): Step(4591, 0)},
      "dq": {(1024, 1024): Step(7458, 388), (1024, 384): Step(3907, 0)},
      "dkv": {(1024, 1024): Step(8744, 772), (1024, 384): Step(3725, 292)},
    },
  },
  "TPU v5 lite": {
    "bfloat16": {
      "forward": {
        (2048, 1024): Step(6314, 381),
        (1024, 1024): Step(3374, 209),
        (2048, 384): Step(2874, 0),
      },
      "backward": {(1024, 1024): Step(7533, 542), (1024, 384): Step(3126, 214)},
    },
    "float32": {
      "forward": {(1024, 1024): Step(3646, 272), (1024, 384): Step(1717, 0)},
      "backward": {(1024, 1024): Step(7462, 788), (1024, 384): Step(3161, 312)},
    },
  },
  "TPU v5": {
    "bfloat16": {
      "forward": {
        (2048, 1024): Step(6481, 383),
        (1024, 1024): Step(3455, 209),
        (2048, 384): Step(2837, 0),
      },
      "backward": {(1024, 1024): Step(7399, 539), (1024, 384): Step(3023, 194)},
    },
    "float32": {
      "forward": {(1024, 1024): Step(3714, 272), (1024, 384): Step(1730, 0)},
      "backward": {(1024, 1024): Step(7596, 749), (1024, 384): Step(3145, 256)},
    },
  },
  "TPU v6 lite": {
    "bfloat16": {
      "forward": {
        (2048, 1024): Step(4734, 247),
        (1024, 1024): Step(2778, 126),
        (2048, 384): Step(2095, 0),
      },
      "backward": {(1024, 1024): Step(4363, 357), (1024, 384): Step(1955, 127)},
    },
    "float32": {
      "forward": {(1024, 1024): Step(2773, 151), (1024, 384): Step(1418, 0)},
      "backward": {(1024, 1024): Step(4921, 470), (1024, 384): Step(2163, 171)},
    },
  },
}


@dataclasses.dataclass(frozen=True)
class Call:
  """A kernel as a compiled program calls it.

  Attributes:
    kernel: a name of `STEPS`.
    dtype: of queries, keys and values.
    heads: of the whole batch.
    blocks: of queries and of keys.
    block: queries and keys of one.
    width: of a head.
  """

  kernel: str
  dtype: str
  heads: int
  blocks: tuple[int, int]
  block: tuple[int, int]
  width: int


_SPLASH = re.compile(r"^%?splash_mha_(fwd|dq|dkv)_")
_OURS = re.compile(rf"^%?\w*{splash_kernels.NAME}_(forward|backward)_(\d+)_(\d+)")
_OPERANDS = re.compile(r"operand_layout_constraints=\{(.*?\})\}")
_SHAPE = re.compile(r"(\w+)\[([\d,]+)\]")
_DTYPES = {"bf16": "bfloat16", "f32": "float32"}  # XLA's names
_BLOCKS = re.compile(r'"xprof_metadata": ?"(.*?[^\\])"')
# What JAX calls the sizes of a kernel's blocks.
_FIELDS = {
  "fwd": ("block_q", "block_kv"),
  "dq": ("block_q_dq", "block_kv_dq"),
  "dkv": ("block_q_dkv", "block_kv_dkv"),
}


def call_of(line: str) -> Call | None:
  """The kernel that an instruction of a compiled program calls; None if unknown.

  Shapes of its operands and sizes of its blocks stand in the instruction's text: JAX's
  as JSON beside it, ours in its name.
  """
  line = line.removeprefix("ROOT ")
  operands = _OPERANDS.search(line)
  if not operands:
    return None
  found = _SHAPE.findall(operands[1])
  shapes = [tuple(map(int, sides.split(","))) for _, sides in found]
  if match := _OURS.match(line):
    kernel, block = match[1], (int(match[2]), int(match[3]))
    (heads, _, queries), (*_, keys), (_, width, _) = shapes[:3]
    dtype = found[0][0]
  elif (match := _SPLASH.match(line)) and (told := _BLOCKS.search(line)):
    kernel = match[1]
    sizes = json.loads(told[1].replace('\\"', '"'))
    block = sizes[_FIELDS[kernel][0]], sizes[_FIELDS[kernel][1]]
    # First come tables of which blocks are masked.
    cubes = [i for i, shape in enumerate(shapes) if len(shape) == 3][2:5]
    (heads, queries, _), (_, keys, _), (*_, width) = (shapes[i] for i in cubes)
    dtype = found[cubes[0]][0]
  else:
    return None
  if dtype not in _DTYPES:
    return None
  blocks = queries // block[0], keys // block[1]
  return Call(kernel, _DTYPES[dtype], heads, blocks, block, width)


def cycles(call: Call, kind: str, chip: Chip) -> float | None:
  """Cycles of a call on a device; None if the table does not have it.

  Blocks that are not in the table cost as much as the nearest that are, by their area.
  """
  of_dtype = STEPS.get(kind, {}).get(call.dtype, {})
  known, clock = of_dtype.get(call.kernel), CLOCKS.get(kind)
  if not known or not clock:
    return None
  about, cores = _KERNELS[call.kernel], min(_CORES.get(kind, 1), call.heads)
  area = math.prod(call.block)
  nearest = min(known, key=lambda block: abs(math.log(math.prod(block) / area)))
  share = area / math.prod(nearest)
  # Forward there are ones beside the values, in rows of bfloat16's whatever the dtype.
  itemsize = jnp.dtype(call.dtype).itemsize
  tile = TILE_ROWS if call.kernel == "forward" else tile_rows(itemsize)
  wide, narrow = (padded(call.width, unit) for unit in (chip.matrix_unit, tile))
  products_a_cycle = chip.peak(call.dtype) / 2 / clock / cores
  floor = area * (about.wide * wide + about.narrow * narrow) / products_a_cycle
  each = max(known[nearest].each * share, floor)
  queries, keys = call.blocks
  rows = {"dkv": keys, "backward": max(call.blocks)}.get(call.kernel, queries)
  a_head = queries * keys * each + rows * known[nearest].row * share
  return call.heads * a_head / (cores if about.divides else 1)


def total(
  lines: Sequence[tuple[str, float]], kind: str, chip: Chip
) -> dict[str, float] | None:
  """Cycles by kernel of calls and how often each runs; None if one is not known."""
  taken: dict[str, float] = {}
  for line, times in lines:
    call = call_of(line)
    each = call and cycles(call, kind, chip)
    if call is None or each is None:
      return None
    taken[call.kernel] = taken.get(call.kernel, 0.0) + times * each
  return taken


_BUNDLE = re.compile(r"\s*(0x[0-9a-f]+|\d+)\s")
_SKIP = re.compile(r"sbr\.rel \(%p\d+_p\d+\) target = \$region(\d+)")
_TARGET = re.compile(r"Start/End empty region (\d+)|Start region (\d+)")


def scheduled(text: str) -> Step:
  """One step of a kernel, out of the instructions that libtpu dumps of it.

  A branch that may skip instructions, and no other branch in them, is taken by most
  steps; but for the largest, which is the work itself.
  """
  bundles = [line for line in text.splitlines() if _BUNDLE.match(line)]
  branches = [
    (number, found[1])
    for number, line in enumerate(bundles)
    if (found := _SKIP.search(line))
  ]
  skipped = []
  for number, region in branches:
    ends = (
      end
      for end in range(number + 1, len(bundles))
      if any(region in found for found in _TARGET.findall(bundles[end]))
    )
    if (end := next(ends, None)) is not None:
      skipped.append((number + 1, end))
  inner = [
    (start, end)
    for start, end in skipped
    if not any(start <= a and b <= end and (a, b) != (start, end) for a, b in skipped)
  ]
  sizes = [end - start for start, end in inner if 2 * (end - start) < len(bundles)]
  return Step(len(bundles) - sum(sizes), sum(sizes))
