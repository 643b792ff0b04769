"""The HTTP server of a service: patience with its clients, and its end.

The first SIGTERM or Ctrl-C lets what was begun be finished, while new requests for
images are refused with 503 and `/health/ready` says no; a second ends at once.
"""

import asyncio
import signal
import socket
import time
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from pixsigma_jax.serve.app import Service

_HEADER_SECONDS = 10.0  # within which a connection has to say what it wants
_MOST_CONNECTIONS = 1000
_BETWEEN_LOOKS = 0.05  # seconds


class Server(uvicorn.Server):
  """Serves a service, and drains its engine before it ends."""

  def __init__(self, service: Service, *, drain_delay: float = 0.0):
    """Prepares it.

    Args:
      drain_delay: seconds for which new requests are still answered, with a refusal,
        after nothing is left to draw, until a balancer has noticed.
    """
    # A log of its own: uvicorn's would hold addresses, and nothing else.
    config = uvicorn.Config(
      service.app(),
      log_config=None,
      log_level="error",
      access_log=False,
      server_header=False,
      http=_ImpatientProtocol,
      ws="none",
      lifespan="off",
      limit_concurrency=_MOST_CONNECTIONS,
    )
    super().__init__(config)
    self._service, self._drain_delay = service, drain_delay
    self._signals: list[int] = []

  @property
  def interrupted(self) -> bool:
    """Whether Ctrl-C has ended it."""
    return signal.SIGINT in self._signals

  def handle_exit(self, sig: int, frame: FrameType | None) -> None:
    """Begins to drain; at a second signal ends at once."""
    if self._signals:
      self.should_exit = self.force_exit = True
    self._signals.append(sig)

  async def main_loop(self) -> None:
    """Runs until a signal has come, and everything that was begun is finished."""
    log = self._service.log
    while not self._signals:
      await self.on_tick(0)
      await asyncio.sleep(_BETWEEN_LOOKS)
    engine = self._service.engine
    log.event("draining")
    engine.drain()
    began = time.monotonic()
    while not self.should_exit and not (
      engine.idle and time.monotonic() - began >= self._drain_delay
    ):
      await asyncio.sleep(_BETWEEN_LOOKS)
    self.should_exit = True
    log.event("ended", seconds=round(time.monotonic() - began, 3))


def listen(host: str, port: int) -> socket.socket:
  """A socket that listens there.

  Raises:
    OSError: the port is taken, or the address is another machine's.
  """
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  try:
    return socket.create_server((host, port), family=family, backlog=2048)
  except OSError as error:
    raise OSError(
      f"Cannot listen at {host}:{port}: {error}. Give others with --host and --port."
    ) from error


class _ImpatientProtocol(H11Protocol):
  """HTTP/1.1 that closes connections which take too long to say what they want."""

  _patience: asyncio.TimerHandle | None = None

  def connection_made(self, transport: Any) -> None:
    super().connection_made(transport)
    self._wait_for_request()

  def connection_lost(self, exc: Exception | None) -> None:
    self._stop_waiting()
    super().connection_lost(exc)

  def handle_events(self) -> None:
    super().handle_events()
    if self.cycle is not None and not self.cycle.response_complete:
      self._stop_waiting()

  def on_response_complete(self) -> None:
    self._stop_waiting()
    super().on_response_complete()
    if self.cycle.response_complete and not self.transport.is_closing():
      self._wait_for_request()

  def _wait_for_request(self) -> None:
    self._patience = self.loop.call_later(
      _HEADER_SECONDS, self.timeout_keep_alive_handler
    )

  def _stop_waiting(self) -> None:
    if self._patience is not None:
      self._patience.cancel()
      self._patience = None
