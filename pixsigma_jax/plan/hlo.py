"""Static counts of a compiled program, from the compiler's text.

XLA's `cost_analysis` counts the body of a loop once. Here every instruction counts as
often as it runs: a loop says how often it turns, or its condition compares its counter
with a constant. Read are the cycles that XLA:TPU estimates for what it makes itself,
which Pallas kernels it calls (those it does not estimate: see `kernels.py`), and what
is sent.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_KNOWN_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')  # GPU's compiler
_CALLS = re.compile(r"(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NO_ESTIMATE = 2**63 - 1  # written for small scatters, as of losses by their tenth
_CONSTANT = re.compile(r"%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)")
_COMPARED = re.compile(r"compare\((.*)\), direction=LT")
_COLLECTIVE = re.compile(
  r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
  r"(-start)?\("
)
_CHAIN = re.compile(r'chain_id="(\d+)"')
_ARRAY = re.compile(
  r"(pred|s8|u8|bf16|f16|s16|u16|f32|s32|u32|f64|s64|u64)\[([\d,]*)\]"
)
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_BYTES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}


@dataclasses.dataclass(frozen=True)
class Static:
  """Counts of what a device does in one run of a program.

  Attributes:
    cycles: estimated by the compiler, of all that it estimates.
    sent: bytes of the results of collectives, by their kind.
    kernels: instructions that call Pallas kernels, and how often each runs.
  """

  cycles: float
  sent: Mapping[str, float]
  kernels: tuple[tuple[str, float], ...] = ()


def read(text: str) -> Static:
  """Counts a compiled module's text (`Compiled.as_text()`).

  Raises:
    ValueError: a loop in it has no constant number of turns.
  """
  bodies, entry = _computations(text)
  cycles, kernels = 0.0, []
  collectives: dict[str, tuple[str, float]] = {}
  for name, times in _times(bodies, entry).items():
    for line in bodies[name]:
      if 'custom_call_target="tpu_custom_call"' in line:
        kernels.append((line, times))
        continue
      for found in map(int, _CYCLES.findall(line)):
        cycles += times * found * (found < _NO_ESTIMATE)
      if match := _COLLECTIVE.search(line):
        shapes, kind, start = match.groups()
        size = times * (_started(shapes) if start else _size(shapes))
        # XLA writes one collective into each fusion that overlaps with it, a chain. Its
        # channel says less: all that one `shard_map` calls have the same.
        chain = _CHAIN.search(line)
        key = f"chain {chain[1]}" if chain else f"{name}: {line}"
        if size > collectives.get(key, ("", 0.0))[1]:
          collectives[key] = (kind, size)
  sent: dict[str, float] = {}
  for kind, size in collectives.values():
    sent[kind] = sent.get(kind, 0.0) + size
  return Static(cycles, dict(sorted(sent.items())), tuple(kernels))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """Lines of each computation, and the name of the entry computation."""
  bodies: dict[str, list[str]] = {}
  entry, current = "", None
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      current = bodies.setdefault(match[2], [])
      entry = match[2] if match[1] else entry
    elif line.rstrip() == "}":
      current = None
    elif current and not line.startswith(" "):
      current[-1] += line  # a kernel's own words about itself may go over several
    elif current is not None:
      current.append(line.strip())
  return bodies, entry


def _times(bodies: Mapping[str, list[str]], entry: str) -> dict[str, float]:
  """Number of times that each computation runs."""
  times: dict[str, float] = {}

  def run(name: str, count: float) -> None:
    times[name] = times.get(name, 0.0) + count
    for line in bodies[name]:
      if match := _WHILE.search(line):
        known = _KNOWN_TURNS.search(line)
        turns = int(known[1]) if known else _turns(match[1], bodies)
        run(match[2], count * turns)
        continue
      called = _CALLS.findall(line)
      if match := _BRANCHES.search(line):
        called += [branch.strip(" %") for branch in match[1].split(",")]
      for other in called:
        if other in bodies:
          run(other, count)

  run(entry, 1.0)
  return times


def _turns(condition: str, bodies: Mapping[str, list[str]]) -> int:
  constants = dict(
    found for line in bodies[condition] for found in _CONSTANT.findall(line)
  )
  for line in bodies[condition]:
    if match := _COMPARED.search(line):
      for name in re.findall(r"%?([\w.\-]+)", match[1]):
        if name in constants:
          return int(constants[name])
  raise ValueError(f"The loop of {condition} has no constant number of turns.")


def _sizes(shapes: str) -> list[int]:
  return [
    _BYTES[kind] * math.prod(int(side) for side in sides.split(",") if side)
    for kind, sides in _ARRAY.findall(shapes)
  ]


def _size(shapes: str) -> float:
  return float(sum(_sizes(shapes)))


def _started(shapes: str) -> float:
  # What starts a collective returns its operand as well as its result, and what starts
  # several at once all operands, in a tuple of their own, before all results.
  sizes = _sizes(shapes)
  if not shapes.startswith("(("):
    return float(max(sizes, default=0.0))
  depths = list(itertools.accumulate((c == "(") - (c == ")") for c in shapes))
  operands = len(_sizes(shapes[: depths.index(1, 2)]))
  return float(sum(map(max, sizes[:operands], sizes[operands:])))
