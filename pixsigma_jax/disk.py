"""Files that are whole or not there: written beside their place, synced, then named."""

import os
import pathlib
import uuid
from collections.abc import Callable
from typing import Any


def partial_path(path: pathlib.Path) -> pathlib.Path:
  """Where to write what will be `path`.

  A name of its own for every attempt: two processes may be writing the same file.
  """
  return path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")


def whole_files(folder: pathlib.Path) -> list[str]:
  """The names in a folder, in order, without what a kill has left half written."""
  names = (path.name for path in folder.iterdir())
  return sorted(name for name in names if not name.endswith(".partial"))


def publish(partial: pathlib.Path, path: pathlib.Path) -> None:
  """Gives a whole file its name, and returns when a power cut cannot undo it."""
  sync(partial)
  partial.rename(path)
  sync(path.parent)


def write_whole(path: pathlib.Path, write: Callable[[pathlib.Path], Any]) -> None:
  """Lets `write` fill a temporary file, which gets its name when it is on the disk."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = partial_path(path)
  try:
    write(partial)
    publish(partial, path)
  finally:
    partial.unlink(missing_ok=True)


def sync(path: pathlib.Path) -> None:
  """Returns when a file's content, or a folder's names, are on the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def way_out(directory: Any, flag: str) -> str:
  """What helps where `directory` could not be written to.

  Args:
    directory: a path, perhaps of a bucket.
    flag: what names it on the command line.
  """
  if directory.exists():
    return f"Make room there, see that it may be written to, or choose another {flag}"
  return f"{directory} is not there (any more): make it again, or choose another {flag}"
