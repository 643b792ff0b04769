"""A line of JSON for each request, without what was asked for."""

import dataclasses
import datetime
import json
import logging
import sys
from collections.abc import Mapping
from typing import Any

from starlette.types import Scope

_PATH = 200  # characters of an address


@dataclasses.dataclass(frozen=True)
class Log:
  """Where lines go, and whether they show prompts.

  Attributes:
    file: of text; None for nowhere.
    prompts: also write prompts.
  """

  file: Any = None
  prompts: bool = False

  def request(
    self, scope: Scope, status: int, seconds: float, note: Mapping[str, Any]
  ) -> None:
    """Writes the line of an answered request."""
    hidden = () if self.prompts else ("prompt",)
    self.event(
      "request",
      method=scope["method"],
      path=scope["path"][:_PATH],
      status=status,
      seconds=round(seconds, 4),
      **{name: value for name, value in note.items() if name not in hidden},
    )

  def event(self, name: str, **fields: Any) -> None:
    """Writes a line."""
    if self.file is None:
      return
    line = {"time": _now(), "event": name, **fields}
    print(json.dumps(line), file=self.file, flush=True)


class JsonFormatter(logging.Formatter):
  """Lines of Python's logging as JSON too."""

  def format(self, record: logging.LogRecord) -> str:
    line = {
      "time": _now(),
      "event": "log",
      "level": record.levelname.lower(),
      "message": record.getMessage(),
    }
    if record.exc_info:
      line["traceback"] = self.formatException(record.exc_info)
    return json.dumps(line)


def to_stderr(*, prompts: bool) -> Log:
  """A log on standard error, where Python's logging goes too."""
  return Log(sys.stderr, prompts)


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
