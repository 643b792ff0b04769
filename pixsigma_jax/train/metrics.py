"""What a run writes about itself: JSON lines always, TensorBoard where it is there."""

import contextlib
import importlib.util
import json
import math
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pixsigma_jax import disk


class MetricWriter:
  """Appends JSON objects, one a line, to WORKDIR/metrics.jsonl; scalars to TensorBoard.

  A resumed run goes back to its checkpoint: lines of later steps are dropped first, so
  each step stands in the file once. `last` is the line that it went back to, or None.
  Without a workdir nothing is written: of several processes one writes.
  """

  def __init__(self, workdir: str | pathlib.Path | None, first_step: int):
    self.path: pathlib.Path | None = None
    if workdir is not None:
      self.path = pathlib.Path(workdir) / "metrics.jsonl"
    self._file: Any = None
    self._board: Any = None
    self.rewind(first_step)

  def rewind(self, step: int) -> None:
    """Goes back to a step: what was written of later ones is dropped."""
    self.close()
    self.last: dict[str, Any] | None = None
    if self.path is None:
      return
    self.path.parent.mkdir(parents=True, exist_ok=True)
    kept = []
    if self.path.exists():
      kept = [line for line in _lines(self.path) if line["step"] <= step]
      text = "".join(json.dumps(line) + "\n" for line in kept)
      disk.write_whole(self.path, lambda partial: partial.write_text(text))
    self.last = kept[-1] if kept else None
    self._file = self.path.open("a")
    if importlib.util.find_spec("tensorboardX"):
      from tensorboardX import SummaryWriter

      self._board = SummaryWriter(
        str(self.path.parent / "tensorboard"), purge_step=step + 1
      )

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Writes scalars, and lists of scalars (as `name/i` on TensorBoard)."""
    if self._file is None:
      return
    plain = {name: _plain(value) for name, value in values.items()}
    self._file.write(json.dumps({"step": step, **plain}) + "\n")
    self._file.flush()
    if self._board is None:
      return
    for name, value in plain.items():
      scalars = value if isinstance(value, list) else [value]
      for i, scalar in enumerate(scalars):
        tag = f"{name}/{i}" if isinstance(value, list) else name
        if isinstance(scalar, int | float):
          self._board.add_scalar(tag, scalar, step)
    self._board.flush()

  def write_image(self, step: int, name: str, image: np.ndarray) -> None:
    """An `[H W 3]` uint8 image, on TensorBoard alone."""
    if self._board is not None:
      self._board.add_image(name, image, step, dataformats="HWC")

  def close(self) -> None:
    """Closes the files."""
    if self._file is not None:
      self._file.close()
    if self._board is not None:
      self._board.close()


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
  """What happened since the last report: means of the steps, and where time went."""

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

  @contextlib.contextmanager
  def spent(self, what: str) -> Iterator[None]:
    """Time in here is the training's, but went into `data` or `saving`."""
    began = time.perf_counter()
    yield
    self._spent[what] += time.perf_counter() - began

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Time in here is none of the training's."""
    began = time.perf_counter()
    yield
    self._began += time.perf_counter() - began

  def close(self) -> tuple[dict[str, Any], float, float]:
    """The report of this window, which starts a new one; its seconds; the productive.

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
