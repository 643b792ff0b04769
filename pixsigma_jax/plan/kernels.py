"""Cycles of attention's kernels on TPU, which XLA:TPU runs and does not estimate.

A kernel does the same for each block of queries and each of keys: a step of its grid.
What a step costs is counted in the instructions that libtpu schedules for it, a bundle
a cycle, and is never less than its matrix products take of the matrix units. No chip
was there: waiting for memory is not in it. `python -m benchmarks.splash_cycles` counts,
and writes `kernel_cycles.jsonl` beside this module.
"""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import TypeAlias

import jax.numpy as jnp
from absl import logging

from pixsigma_jax import disk
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

CYCLES = pathlib.Path(__file__).with_name("kernel_cycles.jsonl")

# Kind of device → dtype → kernel → (queries, keys) of a block → its step.
Steps: TypeAlias = dict[str, dict[str, dict[str, dict[tuple[int, int], Step]]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counted:
  """A step whose instructions were counted: a line of `kernel_cycles.jsonl`.

  Attributes:
    libtpu: version that scheduled them.
    kind: of the device.
    dtype: of queries, keys and values.
    kernel: a name of `_KERNELS`.
    queries, keys: of a block.
    each, row: see `Step`.
  """

  libtpu: str
  kind: str
  dtype: str
  kernel: str
  queries: int
  keys: int
  each: int
  row: int


def read(path: pathlib.Path = CYCLES) -> list[Counted]:
  """The steps of a file.

  Raises:
    ValueError: a line is none.
  """
  found = []
  for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
    try:
      found.append(Counted(**json.loads(line)))
    except (TypeError, ValueError) as error:
      raise ValueError(f"{path}, line {number} is no counted step: {error}") from error
  return found


def keep(counted: Sequence[Counted], path: pathlib.Path = CYCLES) -> None:
  """Puts steps into a file, in place of all others of their devices and dtypes."""
  anew = {(step.kind, step.dtype) for step in counted}
  others = [step for step in read(path) if (step.kind, step.dtype) not in anew]
  ordered = sorted(
    [*others, *counted],
    key=lambda s: (s.kind, s.dtype, s.kernel, -s.queries * s.keys, -s.queries),
  )
  text = "".join(json.dumps(dataclasses.asdict(step)) + "\n" for step in ordered)
  disk.write_text(path, text)


def steps_of(counted: Iterable[Counted]) -> Steps:
  """The steps by device, dtype, kernel and block."""
  steps: Steps = {}
  for step in counted:
    kernels = steps.setdefault(step.kind, {}).setdefault(step.dtype, {})
    blocks = kernels.setdefault(step.kernel, {})
    blocks[step.queries, step.keys] = Step(step.each, step.row)
  return steps


# Heads are 72 wide; JAX's forward pass takes the keys of a block by 1024. In float32 no
# kernel takes two blocks at once, see `models/splash.py: at_once`.
STEPS = steps_of(read())


def check_libtpu(kind: str, dtype: str, *, refuse: bool) -> None:
  """Refuses steps that another libtpu has scheduled than the one that is installed.

  Args:
    kind: of the device, whose steps in that dtype are wanted.
    refuse: whether to; else there is a warning.

  Raises:
    ValueError: see above.
  """
  try:
    installed = metadata.version("libtpu")
  except metadata.PackageNotFoundError:
    return  # who compiles says so
  counted = {s.libtpu for s in read() if (s.kind, s.dtype) == (kind, dtype)}
  if counted <= {installed}:
    return
  others = ", ".join(sorted(counted))
  message = (
    f"The cycles of attention's kernels on {kind} in {dtype} are those of libtpu "
    f"{others}, and {installed} is installed, which may schedule them otherwise"
  )
  if refuse:
    raise ValueError(
      f"{message}: install libtpu {others}, count them anew with python -m "
      "benchmarks.splash_cycles, or give --any_libtpu to plan with them all the same."
    )
  logging.warning("%s.", message)


@dataclasses.dataclass(frozen=True)
class Call:
  """A kernel as a compiled program calls it.

  Attributes:
    kernel: a name of `_KERNELS`.
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
