"""Metrics of a run: JSON lines, and TensorBoard where it is installed.

Weights & Biases gets the same where a config asks for it.
"""

import contextlib
import importlib
import importlib.util
import json
import math
import pathlib
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pixsigma_jax import disk
from pixsigma_jax.tensorboard import Board, writing
from pixsigma_jax.wording import install


class MetricWriter:
  """Appends JSON objects, one a line, to WORKDIR/metrics.jsonl; scalars to TensorBoard.

  A resumed run goes back to its checkpoint: lines of later steps are dropped first, so
  each step stands in the file once. `last` is the line that it went back to, or None.
  Without a workdir nothing is written: of several processes one writes.
  """

  def __init__(
    self,
    workdir: str | pathlib.Path | None,
    first_step: int,
    *,
    config: Mapping[str, Any] | None = None,
  ):
    """Opens the files.

    Args:
      first_step: where the run stands; what was written of later ones is dropped.
      config: of the run, which is shown as text; its section `log.wandb` counts.

    Raises:
      OSError: a file cannot be written; names it. So does every other method.
    """
    self.path: pathlib.Path | None = None
    if workdir is not None:
      self.path = pathlib.Path(workdir) / "metrics.jsonl"
    self._config = config
    self._file: Any = None
    self._board: Board | None = None
    self._wandb: Any = None
    if self.path is not None and config and config["log"]["wandb"]["project"]:
      self._wandb = _open_wandb(self.path.parent, config)
    self.rewind(first_step)

  def rewind(self, step: int) -> None:
    """Goes back to a step: what was written of later ones is dropped."""
    self._close_files()
    self.last: dict[str, Any] | None = None
    if self.path is None:
      return
    self.path.parent.mkdir(parents=True, exist_ok=True)
    kept = []
    with writing(self.path):
      if self.path.exists():
        kept = [line for line in _lines(self.path) if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        disk.write_text(self.path, text)
      self._file = self.path.open("a")
    self.last = kept[-1] if kept else None
    if importlib.util.find_spec("tensorboardX"):
      self._board = Board(self.path.parent / "tensorboard", step + 1)
      if self._config is not None:
        self._board.add_text("config", _as_text(self._config), step)

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Writes scalars, and lists of scalars (as `name/i` on TensorBoard)."""
    if self._file is None or self.path is None:
      return
    plain = {name: _plain(value) for name, value in values.items()}
    with writing(self.path):
      self._file.write(json.dumps({"step": step, **plain}) + "\n")
      self._file.flush()
    scalars = dict(_scalars(plain))
    if self._board is not None:
      self._board.add_scalars(scalars, step)
    if self._wandb is not None:
      self._wandb.log({"step": step, **scalars})

  def write_image(self, step: int, name: str, image: np.ndarray) -> None:
    """An `[H W 3]` uint8 image, on TensorBoard and Weights & Biases alone."""
    if self._board is not None:
      self._board.add_image(name, image, step)
    if self._wandb is not None:
      shown = importlib.import_module("wandb").Image(image)
      self._wandb.log({"step": step, name: shown})

  def close(self) -> None:
    """Closes the files."""
    try:
      self._close_files()
    finally:
      if self._wandb is not None:
        run, self._wandb = self._wandb, None
        run.finish()

  def _close_files(self) -> None:
    file, self._file = self._file, None
    board, self._board = self._board, None
    try:
      if file is not None and self.path is not None:
        with writing(self.path):
          file.close()
    finally:
      if board is not None:
        board.close()


def check_wandb(section: Mapping[str, str]) -> None:
  """Checks that the package that `config.log.wandb` needs is installed.

  Raises:
    ValueError: Weights & Biases is asked for and not there.
  """
  if section["project"] and not importlib.util.find_spec("wandb"):
    raise ValueError(
      f"config.log.wandb.project={section['project']!r} needs Weights & Biases, which "
      f"is not installed: {install('wandb')}, or set the project to ''."
    )
  if section["entity"] and not section["project"]:
    raise ValueError(
      f"config.log.wandb.entity={section['entity']!r} says whose project it is, and "
      "config.log.wandb.project is empty: name it, or set the entity to ''."
    )


def _open_wandb(workdir: pathlib.Path, config: Mapping[str, Any]) -> Any:
  """The workdir's run there, the same one however often the workdir is gone on with."""
  path = workdir / "wandb" / "run_id.txt"
  if not path.exists():
    text = uuid.uuid4().hex[:12]
    disk.write_text(path, text)
  section = config["log"]["wandb"]
  run = importlib.import_module("wandb").init(
    project=section["project"],
    entity=section["entity"] or None,
    id=path.read_text(),
    resume="allow",
    name=workdir.absolute().name,
    dir=str(workdir),
    config=json.loads(json.dumps(config)),
  )
  # Steps that are made anew are drawn over the abandoned ones.
  run.define_metric("step", hidden=True)
  run.define_metric("*", step_metric="step")
  return run


def _scalars(plain: Mapping[str, Any]) -> Iterator[tuple[str, int | float]]:
  """Every number by itself: those of a list as `name/i`."""
  for name, value in plain.items():
    values = enumerate(value) if isinstance(value, list) else [(None, value)]
    for i, scalar in values:
      if isinstance(scalar, int | float):
        yield (name if i is None else f"{name}/{i}"), scalar


def _as_text(config: Mapping[str, Any]) -> str:
  """A config as Markdown."""
  return f"```json\n{json.dumps(config, indent=2, default=str)}\n```"


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
  """The whole lines of a metrics file; a kill may have cut the last one short."""
  lines = []
  for text in path.read_text().splitlines():
    try:
      lines.append(json.loads(text))
    except json.JSONDecodeError:
      break
  return lines


def _plain(value: Any) -> Any:
  if isinstance(value, np.ndarray):
    return [_plain(x) for x in value.tolist()]
  value = value.item() if isinstance(value, np.generic) else value
  # JSON has no NaN: a tenth of the timesteps that no example fell in. Nor infinity.
  return None if isinstance(value, float) and not math.isfinite(value) else value


class Window:
  """Metrics since the last report: means over the steps, and time by its use."""

  def __init__(self, batch_size: int):
    self._batch_size = batch_size
    self.restart()

  def restart(self) -> None:
    """Forgets what happened since the last report."""
    self._steps: list[Mapping[str, Any]] = []
    self._bad = 0
    self._began = time.perf_counter()
    self._spent = {"data": 0.0, "saving": 0.0}

  def add(self, metrics: Mapping[str, Any]) -> None:
    """Takes the metrics of one step, on the host."""
    self._steps.append(metrics)

  def add_bad(self) -> None:
    """Counts a step that changed nothing."""
    self._bad += 1

  def is_empty(self) -> bool:
    """Whether no step came since the last report."""
    return not self._steps and not self._bad

  @contextlib.contextmanager
  def spent(self, what: str) -> Iterator[None]:
    """Counts the block's time as training's, spent on `data` or `saving`."""
    began = time.perf_counter()
    try:
      yield
    finally:
      self._spent[what] += time.perf_counter() - began

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Leaves the block's time out of the training's."""
    began = time.perf_counter()
    try:
      yield
    finally:
      self._began += time.perf_counter() - began

  def close(self) -> tuple[dict[str, Any], float, float]:
    """Returns this window's report, seconds and productive seconds; starts a new one.

    `decile_loss` has the mean loss of each tenth of the timesteps, NaN where no example
    fell. `replaced_examples` and `bad_steps` are sums, not means. Where every step was
    bad there is nothing but `bad_steps` and the times.
    """
    seconds = time.perf_counter() - self._began
    steps = len(self._steps)
    report: dict[str, Any] = {}
    if steps:
      sums = {
        name: np.sum([metrics[name] for metrics in self._steps], axis=0)
        for name in self._steps[0]
        if name not in ("example_loss", "bad")
      }
      count = sums.pop("decile_count")
      with np.errstate(invalid="ignore"):
        deciles = sums.pop("decile_loss") / count
      replaced = int(sums.pop("replaced_examples"))
      report = {name: float(total) / steps for name, total in sums.items()}
      report |= {"replaced_examples": replaced, "decile_loss": deciles}
    all_steps = steps + self._bad
    report |= {
      "bad_steps": self._bad,
      "step_time": seconds / all_steps,
      "images_per_second": all_steps * self._batch_size / seconds,
      **{f"{what}_share": spent / seconds for what, spent in self._spent.items()},
    }
    # A bad step taught nothing.
    productive = (seconds - sum(self._spent.values())) * steps / all_steps
    self.restart()
    return report, seconds, productive
