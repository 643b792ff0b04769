"""Detects a step that does not end, and writes every thread's stack."""

import contextlib
import faulthandler
import pathlib
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator

import jax
from absl import logging

_REMEMBERED = 50  # steps whose median is the usual
_LOOKS = 5.0  # at most so many seconds between two looks


class Watchdog:
  """A thread that looks at the clock while steps are under way."""

  def __init__(
    self, directory: pathlib.Path, *, hang_factor: float, min_seconds: float = 60.0
  ):
    """Begins to watch after the first few steps.

    Args:
      directory: where the stacks of all threads are written, a file for each hang.
      hang_factor: a step hangs that takes this many times the median; 0 watches
        nothing.
      min_seconds: and at least so long.
    """
    self._directory, self._factor, self._least = directory, hang_factor, min_seconds
    self._steps: deque[float] = deque(maxlen=_REMEMBERED)
    self._lock = threading.Lock()
    self._began: float | None = None
    self._told = False
    self._step = 0
    self._ended = threading.Event()
    self._thread = None
    if hang_factor:
      self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
      self._thread.start()

  def beat(self, step: int) -> None:
    """Marks the end of a step and the beginning of the next."""
    with self._lock:
      now = time.monotonic()
      if self._began is not None:
        self._steps.append(now - self._began)
      self._began, self._told, self._step = now, False, step

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Does not count the block's time as a hang."""
    with self._lock:
      self._began = None
    try:
      yield
    finally:
      with self._lock:
        self._began = time.monotonic()

  def close(self) -> None:
    """Ends the thread."""
    self._ended.set()
    if self._thread is not None:
      self._thread.join()

  def _watch(self) -> None:
    while not self._ended.wait(min(_LOOKS, self._least / 2)):
      with self._lock:
        if self._began is None or self._told or len(self._steps) < 3:
          continue
        usual = statistics.median(self._steps)
        taken = time.monotonic() - self._began
        if taken < max(self._factor * usual, self._least):
          continue
        self._told, step = True, self._step
      self._dump(step, taken, usual)

  def _dump(self, step: int, taken: float, usual: float) -> None:
    self._directory.mkdir(parents=True, exist_ok=True)
    name = f"{step:08d}_{time.strftime('%H%M%S')}_process_{jax.process_index()}.txt"
    path = self._directory / name
    with path.open("w") as file:
      file.write(f"After step {step}: {taken:.0f} s, the median is {usual:.2f} s.\n")
      file.flush()
      faulthandler.dump_traceback(file, all_threads=True)
    logging.error(
      "The step after step %d has taken %.0f s, %.0f times the median of %.2f s: it "
      "hangs. What every thread is doing stands in %s. The run goes on waiting; if "
      "nothing follows, end it and give the same command again.",
      step,
      taken,
      taken / max(usual, 1e-9),
      usual,
      path,
    )
