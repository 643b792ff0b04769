"""Seconds that the parts of drawing take, and those that JAX compiles for them."""

import contextlib
import time
from collections.abc import Iterator

import jax.monitoring

# JAX reports tracing, lowering and compiling (or reading from its cache) under these.
_COMPILING = "/jax/core/compile/"
COMPILATION = "compilation"

# When this process was compiling, in its order; what happened inside of another is
# part of it: tracing one function traces those that it calls.
_intervals: list[tuple[float, float]] = []


def _remember(event: str, duration_secs: float, **_: str | int) -> None:
  if event.startswith(_COMPILING):
    now = time.perf_counter()
    start = now - duration_secs
    while _intervals and _intervals[-1][0] >= start:
      _intervals.pop()
    _intervals.append((start, now))


jax.monitoring.register_event_duration_secs_listener(_remember)


class Timing:
  """Adds up the wall time of named parts, without what was compiled in them.

  A part has to end with its results on the host, as NumPy arrays: JAX returns before
  it has computed.
  """

  def __init__(self):
    self.seconds: dict[str, float] = {}

  @contextlib.contextmanager
  def part(self, name: str) -> Iterator[None]:
    """Counts what happens inside under `name`, and compiling under `COMPILATION`."""
    began = time.perf_counter()
    try:
      yield
    finally:
      ended = time.perf_counter()
      spans = [end - start for start, end in _intervals if start >= began]
      compiling = sum(spans, 0.0)
      self._add(name, ended - began - compiling)
      self._add(COMPILATION, compiling)

  def _add(self, name: str, seconds: float) -> None:
    self.seconds[name] = self.seconds.get(name, 0.0) + seconds

  def __str__(self) -> str:
    return ", ".join(f"{name} {spent:.2f} s" for name, spent in self.seconds.items())
