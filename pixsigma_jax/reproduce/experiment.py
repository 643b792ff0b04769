"""Trains and measures the runs of a budget, each piece stored when it is finished.

FOLDER/autoencoders/NAME       a small autoencoder
FOLDER/data/NAME               records of handwritten digits
FOLDER/runs/KEY                a run of the trainer, resumable by itself
FOLDER/measured/KEY_STEP.json  what a model of it is worth; its samples as KEY_STEP.png

A kill loses the piece that was under way; a training goes on from its newest
checkpoint.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Iterable, Sequence
from typing import Any

from absl import logging
from PIL import Image

from pixsigma_jax import checkpoint, disk
from pixsigma_jax.data.records import MANIFEST
from pixsigma_jax.models.pixart import VARIANTS
from pixsigma_jax.prepare.digits import prepare_digits
from pixsigma_jax.reproduce import latents, measures
from pixsigma_jax.reproduce.miniature import DATA_SEED, Budget, Data, Run
from pixsigma_jax.train import loop

# Seconds on two cores (AMD EPYC with AVX-512), of nothing else to do, for the estimate:
# a step of "Mini/2" by pixels, and an image, of a 14-step sampler; what a run, a
# measurement and a network's programs take beside that.
_STEP_SECONDS = {8: 0.035, 16: 0.06, 24: 0.16, 32: 0.04}
_IMAGE_SECONDS = {8: 0.012, 16: 0.025, 24: 0.06, 32: 0.02}
_RUN_SECONDS, _MEASURE_SECONDS, _COMPILE_SECONDS = 6, 3, 20
_DATA_SECONDS = 12


@dataclasses.dataclass(frozen=True)
class Point:
  """A model to be measured: a run after so many steps, 0 for its parent transformed."""

  run: Run
  step: int


class Experiment:
  """The runs of a budget in a folder of their own."""

  def __init__(self, folder: pathlib.Path, budget: Budget):
    """Stores where, and how long; nothing is done yet."""
    self._folder, self._budget = folder, budget

  def estimate(self, points: Sequence[Point]) -> float:
    """Seconds that two cores take for what is not done yet of these measurements."""
    runs = [run for run in _ancestors(points) if not self._is_trained(run)]
    open_points = [point for point in points if not self._path(point).exists()]
    size = VARIANTS[self._budget.variant]["depth"] / VARIANTS["Mini/2"]["depth"]
    images = 6 * self._budget.per_task * self._budget.sampling_steps / 14
    data = {run.data.name for run in runs}
    missing = [name for name in data if not (self._folder / "data" / name).exists()]
    networks = {
      json.dumps(run.config["model"], sort_keys=True, default=list)
      for run in [*runs, *(point.run for point in open_points)]
    }
    return (
      _DATA_SECONDS * len(missing) * self._budget.records / 8000
      + sum(size * run.steps * _STEP_SECONDS[run.data.pixels] for run in runs)
      + _RUN_SECONDS * len(runs)
      + sum(size * images * _IMAGE_SECONDS[p.run.data.pixels] for p in open_points)
      + _MEASURE_SECONDS * len(open_points)
      + size * _COMPILE_SECONDS * len(networks)
    )

  def measure(self, points: Sequence[Point]) -> list[dict[str, Any]]:
    """What the models are worth, trained first where they are not there yet.

    Returns:
      Of each point `accuracy`, `distance`, `loss`, `decile_loss` and `step_seconds`:
      see `measures`.
    """
    found = []
    for number, point in enumerate(points):
      if not self._path(point).exists():
        logging.info(
          "%s after step %d: measurement %d of %d, about %s left on two cores.",
          *(point.run.name, point.step, number + 1, len(points)),
          duration(self.estimate(points[number:])),
        )
      found.append(self._measured(point))
    return found

  def samples(self, point: Point) -> Image.Image:
    """Samples of a model that is measured."""
    with Image.open(self._path(point).with_suffix(".png")) as image:
      return image.convert("RGB")

  def autoencoder_folder(self, name: str) -> pathlib.Path:
    """Where an autoencoder of that name is, or is to be."""
    return self._folder / "autoencoders" / name

  def distances(self, pixels: int) -> measures.Distances:
    """The distance at a resolution."""
    budget = self._budget
    return measures.distances(pixels, budget.per_task, budget.taught, budget.epochs)

  def _measured(self, point: Point) -> dict[str, Any]:
    path, run, budget = self._path(point), point.run, self._budget
    if path.exists():
      return json.loads(path.read_text(encoding="utf-8"))
    self._train(run)
    workdir, name = self._workdir(run), run.data.autoencoder
    snapshot = workdir / checkpoint.SNAPSHOTS / str(point.step)
    drawn = measures.draw(
      snapshot,
      pixels=run.data.pixels,
      per_task=budget.per_task,
      sampling_steps=budget.sampling_steps,
      frozen=None if name is None else self.autoencoder_folder(name),
    )
    found = {
      "run": run.key,
      "step": point.step,
      "accuracy": measures.accuracies(drawn),
      "distance": self.distances(run.data.pixels)(drawn),
      **measures.held_out_loss(snapshot, self._config(run), examples=budget.held_out),
      "step_seconds": _step_seconds(workdir),
    }
    strip = drawn.strip()
    # The numbers last: they say that all of the piece is there.
    disk.write_whole(path.with_suffix(".png"), lambda p: strip.save(p, "png"))
    disk.write_text(path, json.dumps(found, indent=2) + "\n")
    return found

  def _train(self, run: Run) -> None:
    if self._is_trained(run):
      return
    if run.parent is not None:
      self._train(run.parent)
    self._prepare(run.data)
    began = time.monotonic()
    loop.train(self._config(run), self._workdir(run))
    logging.info("%s: %.0f s.", run.name, time.monotonic() - began)

  def _prepare(self, data: Data) -> None:
    """Writes the records, unless they are there."""
    pixels = dataclasses.replace(data, autoencoder=None)
    if data.autoencoder is None or not (self._data(data) / MANIFEST).exists():
      prepare_digits(
        self._data(pixels),
        resolution=data.pixels,
        count=data.records,
        seed=DATA_SEED,
        scaling_factor=1.0,
      )
    if data.autoencoder is not None:
      latents.encode(
        self._data(pixels),
        self.autoencoder_folder(data.autoencoder),
        self._data(data),
      )

  def _config(self, run: Run) -> dict[str, Any]:
    """The run's config with the paths of this folder."""
    config = {**run.config, "data": {**run.config["data"]}}
    config["data"]["path"] = str(self._data(run.data))
    config["init"] = {**run.config["init"]}
    if run.parent is not None:
      config["init"]["parent"] = str(self._workdir(run.parent))
    return config

  def _is_trained(self, run: Run) -> bool:
    snapshots = checkpoint.steps_in(self._workdir(run) / checkpoint.SNAPSHOTS)
    return run.steps in snapshots

  def _workdir(self, run: Run) -> pathlib.Path:
    return self._folder / "runs" / run.key

  def _data(self, data: Data) -> pathlib.Path:
    return self._folder / "data" / data.name

  def _path(self, point: Point) -> pathlib.Path:
    return self._folder / "measured" / f"{point.run.key}_{point.step}.json"


def duration(seconds: float) -> str:
  """A length of time for people: "40 s", "12 minutes"."""
  if seconds < 90:
    return f"{seconds:.0f} s"
  return f"{seconds / 60:.0f} minutes"


def _ancestors(points: Iterable[Point]) -> list[Run]:
  """Runs of all points and what they start from, each once, parents first."""
  found = {run.key: run for point in points for run in point.run.lineage}
  return list(found.values())


def _step_seconds(workdir: pathlib.Path) -> float | None:
  """Seconds of a step in the fastest stretch between two lines of metrics."""
  lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
  rows = map(json.loads, lines)
  times = [row["step_time"] for row in rows if row.get("step_time")]
  return min(times, default=None)
