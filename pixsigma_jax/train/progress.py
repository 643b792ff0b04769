"""Progress of a run: a bar in a terminal or notebook, plain lines elsewhere."""

import time
from collections.abc import Mapping
from typing import Any

from absl import logging
from tqdm.auto import tqdm

from pixsigma_jax import command

_SHOWN = (
  "loss",
  "norm/gradients",
  "learning_rate",
  "images_per_second",
  "mfu",
  "data_share",
  "validation/loss",
  "images_seen",
  "epochs",
)


class Progress:
  """Steps done of a total, with the time that the rest will take.

  As a bar only where it is `shown`: of several processes by one. The first step is left
  out of the time: it waits for what is compiled, allocated and read ahead.
  """

  def __init__(self, start: int, total: int, *, shown: bool = True):
    self._start, self._total = start, total
    self._began: float | None = None  # when the first step had ended
    self._bar = None
    if shown and command.draws_bars():
      self._bar = tqdm(initial=start, total=total, unit="step")

  def advance(self, step: int) -> None:
    """Moves the bar, if there is one; called when a step is under way, each in turn."""
    if self._began is None and step > self._start + 1:
      self._start, self._began = step - 1, time.monotonic()
      if self._bar is not None:
        self._bar.unpause()
    if self._bar is not None:
      self._bar.update(step - self._bar.n)

  def report(self, step: int, values: Mapping[str, Any]) -> None:
    """Shows a step's metrics."""
    shown = {name: f"{values[name]:.3g}" for name in _SHOWN if name in values}
    if self._bar is not None:
      self._bar.update(step - self._bar.n)
      self._bar.set_postfix(shown)
      return
    left = self._left(step)
    text = "  ".join(f"{name} {value}" for name, value in shown.items())
    logging.info("step %d/%d  %s  eta %s", step, self._total, text, left)

  def go_back(self, step: int) -> None:
    """Goes back after a rollback; the remaining time is estimated anew."""
    self._start, self._began = step, None
    if self._bar is not None:
      self._bar.update(step - self._bar.n)

  def _left(self, step: int) -> str:
    """The time that the rest will take, by the steps since the first."""
    if self._began is None or step <= self._start:
      return "00:00" if step == self._total else "?"
    rate = (time.monotonic() - self._began) / (step - self._start)
    return tqdm.format_interval(rate * (self._total - step))

  def close(self) -> None:
    """Leaves the bar as it stands."""
    if self._bar is not None:
      self._bar.close()
