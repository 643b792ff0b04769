"""Metrics of a server, in Prometheus' format.

Names follow those of other servers of images: the queue, batches, seconds by stage.
"""

from collections.abc import Callable

import jax.monitoring
from prometheus_client import (
  CollectorRegistry,
  Counter,
  Gauge,
  Histogram,
  ProcessCollector,
  generate_latest,
)

_COMPILED = "/jax/core/compile/backend_compile_duration"
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
_SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)


class Metrics:
  """What an engine and its HTTP application count."""

  def __init__(self):
    self.registry = CollectorRegistry()
    ProcessCollector(registry=self.registry)

    def counter(name: str, help_: str, *labels: str) -> Counter:
      return Counter(f"pixsigma_{name}", help_, labels, registry=self.registry)

    def histogram(name: str, help_: str, buckets: tuple[float, ...]) -> Histogram:
      return Histogram(
        f"pixsigma_{name}", help_, registry=self.registry, buckets=buckets
      )

    self.requests = counter(
      "requests", "Answered requests, by route and status.", "route", "status"
    )
    self.request_seconds = histogram(
      "request_seconds", "From a request for images to its last byte.", _SECONDS
    )
    self.queue_seconds = histogram(
      "queue_seconds", "That an image waited for its batch to begin.", _SECONDS
    )
    self.batch_size = histogram(
      "batch_size", "Images of a batch, rows that fill it up not counted.", _SIZES
    )
    self.stage_seconds = counter("stage_seconds", "Spent in each stage.", "stage")
    self.images = counter("images", "Drawn and handed over.")
    self.refused = counter("refused", "Requests refused because the queue was full.")
    self.cancelled = counter("cancelled", "Requests whose client was gone.")
    self.failures = counter("failures", "Batches that failed, by error.", "error")
    self.compilations = counter("compilations", "Programs that were compiled.")
    jax.monitoring.register_event_duration_secs_listener(self._on_event)

  def watch(self, name: str, help_: str, value: Callable[[], float]) -> None:
    """Adds a gauge that is read whenever somebody looks."""
    gauge = Gauge(f"pixsigma_{name}", help_, registry=self.registry)
    gauge.set_function(value)

  def text(self) -> bytes:
    """All of them, as Prometheus reads them."""
    return generate_latest(self.registry)

  def close(self) -> None:
    """No longer counts what JAX compiles."""
    jax.monitoring.unregister_event_duration_listener(self._on_event)

  def _on_event(self, event: str, duration_secs: float, **_: str | int) -> None:
    if event == _COMPILED:
      self.compilations.inc()
