"""A comparison of trained models: its runs, its measurements over seeds, its verdicts.

A figure is the mean over seeds with the lowest and the highest of them. Two models
differ where these ranges do not meet; else the difference is called none.
"""

import dataclasses
import os
import pathlib
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
from absl import logging

from pixsigma_jax.models.pixart import VARIANTS
from pixsigma_jax.reproduce import drawing, full_size
from pixsigma_jax.reproduce.experiment import Experiment, Point, duration
from pixsigma_jax.reproduce.full_size import FullSize
from pixsigma_jax.reproduce.miniature import (
  BUDGETS,
  Budget,
  Miniature,
  Run,
  Variant,
)
from pixsigma_jax.reproduce.registry import Options
from pixsigma_jax.reproduce.result import Result, Table

Verdict: TypeAlias = Literal["better", "worse", "none"]
# (label of a row, step) → what `Experiment.measure` returns of each seed.
Measured: TypeAlias = Mapping[tuple[str, int], Sequence[Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Measure:
  """A figure of a model.

  Attributes:
    title: of a column.
    higher_is_better: or the lower.
    digits: after the point.
    of: takes it out of what `Experiment.measure` returns.
  """

  title: str
  higher_is_better: bool
  digits: int
  of: Callable[[Mapping[str, Any]], float]


MEASURES = {
  "single": Measure("Single digits, %", True, 1, lambda m: m["accuracy"]["single"]),
  "pairs": Measure("Pairs, %", True, 1, lambda m: m["accuracy"]["pairs"]),
  "distance": Measure("Fréchet distance", False, 2, lambda m: m["distance"]),
  "loss": Measure("Held-out loss", False, 4, lambda m: m["loss"]),
}
_STEP = Measure("Step, ms", False, 0, lambda m: 1000 * m["step_seconds"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """A model of the comparison.

  Attributes:
    label: in tables and plots.
    run: the run that it is, of a seed.
    every_mark: whether it is measured on the way, and not at the end alone.
    marks: after which steps, if these are not a branch's.
  """

  label: str
  run: Callable[[Miniature, int], Run]
  every_mark: bool = False
  marks: tuple[int, ...] | None = None

  @classmethod
  def of(cls, variant: Variant, *, every_mark: bool = False) -> "Row":
    """A branch of the miniature."""
    return cls(
      label=variant.label,
      run=lambda miniature, seed: miniature.branch(variant, seed),
      every_mark=every_mark,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
  """Something that the paper says, as a difference between two models.

  Attributes:
    says: it, in a sentence.
    of, than: labels of rows.
    measure: of `MEASURES`.
    expected: of the first, compared with the second; "none" where both are alike.
    at: which of a row's marks, 0 before any training and -1 at the end; for both.
  """

  says: str
  of: str
  than: str
  measure: str
  expected: Verdict = "better"
  at: int = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
  """A table or figure of trained models.

  Attributes:
    name: of the reproduction.
    title: of its page.
    setting: what this comparison is, beside what all have in common.
    paper: its numbers, or what it shows.
    rows: the models.
    claims: what the paper says of them.
    remarks: paragraphs to read the result with.
    full_size: the same with PixArt-Σ itself, and
    variants: the rows that it has.
    timed: whether seconds of a step are compared.
    plotted: whether curves and samples are drawn.
  """

  name: str
  title: str
  setting: str
  paper: Table
  rows: Sequence[Row]
  claims: Sequence[Claim]
  full_size: FullSize
  variants: Sequence[Variant]
  remarks: Sequence[str] = ()
  timed: bool = False
  plotted: bool = False

  def run(self, options: Options) -> Result:
    """Trains, measures and compares; or says how to, for a budget of full size.

    Raises:
      ValueError: an unknown budget.
    """
    if options.budget in full_size.BUDGETS:
      return self._commands(options.budget)
    budget = BUDGETS[options.budget]
    experiment = Experiment(pathlib.Path(options.output) / options.budget, budget)
    points = self.points(budget)
    flat = [point for own in points.values() for point in own]
    logging.info(
      "%s of budget %s takes about %s on two cores, %d measurements among it.",
      *(self.name, options.budget, duration(experiment.estimate(flat)), len(flat)),
    )
    found = experiment.measure(flat)
    rows: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for (row, point), measured in zip(
      ((row, point) for row, own in points.items() for point in own),
      found,
      strict=True,
    ):
      rows.setdefault((row, point.step), []).append(measured)
    result = self._result(options.budget, budget, experiment, points, rows)
    return self._plotted(result, experiment, points, rows) if self.plotted else result

  def points(self, budget: Budget) -> dict[str, list[Point]]:
    """What is measured: label of a row → its points, step by step over all seeds."""
    miniature, points = Miniature(budget), {}
    for row in self.rows:
      runs = [row.run(miniature, seed) for seed in range(budget.seeds)]
      steps = budget.marks if row.every_mark else (runs[0].steps,)
      steps = steps if row.marks is None else row.marks
      points[row.label] = [Point(run, step) for step in steps for run in runs]
    return points

  def tables(self, rows: Measured) -> list[Table]:
    """The paper's table, ours, what it claims, and losses by tenth of the timesteps."""
    measures = [*MEASURES.values(), *([_STEP] if self.timed else [])]
    ours = [
      (label, str(step), *(_cell(measure, found) for measure in measures))
      for (label, step), found in rows.items()
    ]
    last = {label: found for (label, _), found in rows.items()}
    return [
      self.paper,
      Table("Ours", ("", "Step", *(measure.title for measure in measures)), ours),
      Table(
        "What the paper says, and what we find",
        ("The paper", "Ours", "Verdict"),
        [judged(claim, rows) for claim in self.claims],
      ),
      Table(
        "Held-out loss by tenth of the timesteps, from little noise to much",
        ("", *map(str, range(1, 11))),
        [(label, *_deciles(found)) for label, found in last.items()],
      ),
    ]

  def _commands(self, budget: str) -> Result:
    lines = self.full_size.commands(self.name, self.variants, budget, seeds=3)
    block = "\n".join(["```bash", *lines, "```"])
    return Result(
      title=f"{self.title}, budget {budget}",
      setting={"state": "not run", "devices": full_size.DEVICES[budget]},
      tables=[self.paper],
      remarks=[
        "Parents are stages of docs/stages.md. SET is a folder of `evaluate make-set`.",
        block,
      ],
      data={"commands": lines},
    )

  def _result(
    self,
    name: str,
    budget: Budget,
    experiment: Experiment,
    points: Mapping[str, Sequence[Point]],
    rows: Measured,
  ) -> Result:
    pixels = sorted({p.run.data.pixels for own in points.values() for p in own})
    floors = {side: experiment.distances(side) for side in pixels}
    remarks = [
      "A figure is the mean over seeds, in brackets the lowest and the highest. Where "
      "these ranges of two models meet, their difference is called none. The Fréchet "
      "distance is that of features of a small classifier; real digits are at "
      + ", ".join(f"{d.floor:.2f} at {side} pixels" for side, d in floors.items())
      + ", its floor.",
      *self.remarks,
    ]
    return Result(
      title=self.title,
      setting={
        "comparison": self.setting,
        **_setting(name, budget, _steps(points)),
        "machine": machine(),
      },
      tables=self.tables(rows),
      remarks=remarks,
      data={
        "budget": {"name": name, **dataclasses.asdict(budget)},
        "floors": {str(side): distance.floor for side, distance in floors.items()},
        "classifier": {str(side): d.accuracy for side, d in floors.items()},
        "measured": [
          {"model": label, "step": step, "seeds": list(found)}
          for (label, step), found in rows.items()
        ],
      },
    )

  def _plotted(
    self,
    result: Result,
    experiment: Experiment,
    points: Mapping[str, Sequence[Point]],
    rows: Measured,
  ) -> Result:
    """The result with curves over all seeds, and samples of the first."""
    panels: dict[str, dict[str, dict[int, list[float]]]] = {}
    for measure in MEASURES.values():
      curves = panels.setdefault(measure.title, {})
      for (label, step), found in rows.items():
        curves.setdefault(label, {})[step] = [measure.of(m) for m in found]
    samples = {
      label: {
        point.step: experiment.samples(point)
        for point in own
        if point.run.config["seed"] == 0
      }
      for label, own in points.items()
    }
    curves, strips = drawing.curves(panels), drawing.strips(samples)
    if curves is None:
      remarks = [*result.remarks, drawing.WITHOUT_CURVES]
      return dataclasses.replace(result, remarks=remarks, plot=strips)
    return dataclasses.replace(result, plot=drawing.stacked([curves, strips]))


def compared(
  first: Sequence[float], second: Sequence[float], *, higher_is_better: bool
) -> Verdict:
  """The first of two models, compared with the second, by the ranges of their seeds."""
  if not higher_is_better:
    first, second = [-v for v in first], [-v for v in second]
  if min(first) > max(second):
    return "better"
  if max(first) < min(second):
    return "worse"
  return "none"


def judged(claim: Claim, rows: Measured) -> tuple[str, str, str]:
  """What is claimed, both figures, and whether it is so here.

  Args:
    rows: (label, step) → what was measured of each seed.

  Raises:
    ValueError: there is no row of that label.
  """
  measure = MEASURES[claim.measure]
  both = []
  for label in (claim.of, claim.than):
    steps = [step for name, step in rows if name == label]
    if not steps:
      raise ValueError(f"The claim {claim.says!r} names {label!r}, which is no row.")
    both.append(rows[label, steps[claim.at]])
  first, second = ([measure.of(m) for m in found] for found in both)
  verdict = compared(first, second, higher_is_better=measure.higher_is_better)
  cells = [_cell(measure, found) for found in both]
  ours = f"{measure.title}: {claim.of} {cells[0]}, {claim.than} {cells[1]}"
  if verdict == claim.expected:
    said = (
      "so here" if verdict != "none" else "so here: no difference beyond the spread"
    )
  elif verdict == "none":
    said = "not reproduced: the difference is inside the spread"
  else:
    said = f"not reproduced: {claim.of} is {verdict}"
  return claim.says, ours, said


def machine() -> str:
  """The devices that this runs on, for people."""
  device = jax.devices()[0]
  if device.platform != "cpu":
    return f"{len(jax.devices())} x {device.device_kind}"
  try:
    text = pathlib.Path("/proc/cpuinfo").read_text()
  except OSError:  # not Linux
    text = ""
  found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
  model = found[1] if found else platform.machine()
  return f"{os.cpu_count()} cores of {model}"


def _setting(name: str, budget: Budget, steps: str) -> dict[str, str]:
  sizes = VARIANTS[budget.variant]
  return {
    "budget": name,
    "data": f"{budget.records} captioned images of handwritten digits (scikit-learn) "
    "at each resolution",
    "model": f"{budget.variant}, width {sizes['width']}, {sizes['depth']} layers",
    "steps": steps,
    "seeds": f"{budget.seeds}, each with parents of its own",
    "prompts": f"{6 * budget.per_task}, {budget.sampling_steps} steps of the sampler",
  }


def _steps(points: Mapping[str, Sequence[Point]]) -> str:
  """Steps of the runs, each after what it starts from."""
  lines: dict[str, None] = {}
  for own in points.values():
    line = (f"{run.steps} at {run.data.pixels} pixels" for run in own[0].run.lineage)
    lines[", then ".join(line)] = None
  return "; ".join(lines)


def _cell(measure: Measure, found: Sequence[Mapping[str, Any]]) -> str:
  values = [measure.of(m) for m in found]
  mean, low, high = (
    f"{value:.{measure.digits}f}"
    for value in (sum(values) / len(values), min(values), max(values))
  )
  return f"{mean} [{low}, {high}]"


def _deciles(found: Sequence[Mapping[str, Any]]) -> list[str]:
  """Means over seeds."""
  cells = []
  for losses in zip(*(m["decile_loss"] for m in found), strict=True):
    known = [loss for loss in losses if loss is not None]
    cells.append(f"{sum(known) / len(known):.4f}" if known else "–")
  return cells
