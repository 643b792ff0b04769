"""Ratio of measured to modelled step times, by kind of device.

`python -m benchmarks.step_seconds` times a stage's train step on the machine that it
runs on, and adds a line to `measured.jsonl` beside this module: the config, the
machine, the seconds. The model is worked out anew for each, so that a line stays true
when the model changes.
"""

import dataclasses
import functools
import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pixsigma_jax.plan import roofline
from pixsigma_jax.plan import topology as topologies
from pixsigma_jax.plan.stage import stage_on

MEASURED = pathlib.Path(__file__).with_name("measured.jsonl")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
  """A train step that was timed.

  Attributes:
    config: of the stage, with what was changed of it.
    topology, slices: the machines, see `topology.parse`.
    seconds: median of its steps.
    date: when, as ISO has it.
    versions: of what it ran on.
  """

  config: Mapping[str, Any]
  topology: str
  slices: int
  seconds: float
  date: str
  versions: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Calibration:
  """Calibration of the model by the steps measured on one kind of device.

  Attributes:
    factor: by which they took longer, their geometric mean.
    error: how far the worst of them lies from what the others make of the model,
      relative; None where there are no others.
    count: of them.
  """

  factor: float
  error: float | None
  count: int


def read(path: pathlib.Path) -> list[Measurement]:
  """The measurements of a file; none if there is no file.

  Raises:
    ValueError: a line is none.
  """
  if not path.exists():
    return []
  found = []
  for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
    try:
      fields = json.loads(line)
      found.append(Measurement(**{**fields, "config": _with_tuples(fields["config"])}))
    except (KeyError, TypeError, ValueError) as error:
      raise ValueError(f"{path}, line {number} is no measurement: {error}") from error
  return found


def _with_tuples(value: Any) -> Any:
  """A value from JSON with its lists as tuples, as in a config."""
  if isinstance(value, dict):
    return {name: _with_tuples(each) for name, each in value.items()}
  return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def add(measurement: Measurement, path: pathlib.Path) -> None:
  """Appends the measurement to a file."""
  with path.open("a", encoding="utf-8") as file:
    file.write(json.dumps(dataclasses.asdict(measurement)) + "\n")


@functools.cache
def of_kind(kind: str, path: pathlib.Path = MEASURED) -> Calibration | None:
  """The calibration of a kind of device; None if nothing was measured on it.

  Raises:
    ValueError: a line of the file is no measurement, or of a config that this version
      does not take.
  """
  ratios = []
  for measured in read(path):
    machines = topologies.parse(measured.topology, measured.slices)
    if machines.kind != kind:
      continue
    try:
      stage = stage_on(measured.config, machines)
    except ValueError as error:
      raise ValueError(
        f"{path} has a step of {measured.date} on {machines} whose config is no longer "
        f"one: measure it again. {error}"
      ) from error
    ratios.append(measured.seconds / roofline.step_time(stage).seconds)
  return _calibration(ratios) if ratios else None


def _calibration(ratios: Sequence[float]) -> Calibration:
  errors = []
  for i, ratio in enumerate(ratios):
    if others := [*ratios[:i], *ratios[i + 1 :]]:
      errors.append(abs(ratio / statistics.geometric_mean(others) - 1))
  return Calibration(
    factor=statistics.geometric_mean(ratios),
    error=max(errors, default=None),
    count=len(ratios),
  )
