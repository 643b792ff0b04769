"""Files of events, as TensorBoard reads them."""

import contextlib
import importlib
import pathlib
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np


class Board:
  """A file of events for TensorBoard.

  Of all that write, each needs a directory of its own. Every method raises OSError,
  with the directory's name, where nothing can be written.

  Without tensorboardX's SummaryWriter, whose thread dies on a full disk without a word
  and then blocks whoever writes.
  """

  def __init__(self, directory: pathlib.Path, first_step: int):
    """Opens a file of events; earlier ones from `first_step` on are superseded."""
    from tensorboardX import event_file_writer

    protos: Any = importlib.import_module("tensorboardX.proto.event_pb2")
    self._directory, self._event = directory, protos.Event
    with writing(directory):
      directory.mkdir(parents=True, exist_ok=True)
      # A name of its own, for two may be begun in one second.
      suffix = f".{uuid.uuid4().hex[:8]}"
      self._events = event_file_writer.EventsWriter(str(directory / "events"), suffix)
    start = protos.SessionLog(status=protos.SessionLog.START)
    self._add(first_step, session_log=start)

  def add_scalars(self, scalars: Mapping[str, int | float], step: int) -> None:
    """Adds numbers by name."""
    from tensorboardX import summary

    for name, value in scalars.items():
      self._add(step, summary=summary.scalar(name, value))
    self._flush()

  def add_image(self, name: str, image: np.ndarray, step: int) -> None:
    """Adds an `[H W 3]` uint8 image."""
    from tensorboardX import summary

    self._add(step, summary=summary.image(name, image, dataformats="HWC"))
    self._flush()

  def add_text(self, name: str, text: str, step: int) -> None:
    """Adds Markdown."""
    from tensorboardX import summary

    self._add(step, summary=summary.text(name, text))
    self._flush()

  def close(self) -> None:
    """Closes the file."""
    with writing(self._directory):
      self._events.close()

  def _add(self, step: int, **content: Any) -> None:
    with writing(self._directory):
      self._events.write_event(self._event(step=step, wall_time=time.time(), **content))

  def _flush(self) -> None:
    with writing(self._directory):
      self._events.flush()


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
  """Turns errors of writing into one that names the file."""
  try:
    yield
  except OSError as error:
    raise OSError(
      error.errno, f"Could not write metrics: {error.strerror or error}", str(path)
    ) from error
