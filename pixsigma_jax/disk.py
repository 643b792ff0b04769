"""Files that are whole or not there: written beside their place, synced, then named."""

import contextlib
import errno
import functools
import glob
import hashlib
import os
import pathlib
import platform
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

_ROOM = 2**20  # bytes; a disk that has no more is full
# What file systems without links answer: FAT, some that lie on a network.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
# NAME.MACHINE_PROCESS_ATTEMPT.partial; before they had a process, NAME.ATTEMPT.partial.
_PARTIAL = re.compile(r"\.(?:([0-9a-f]{8})_(\d+)_)?[0-9a-f]{8}\.partial")
# Whether a process of another machine lives cannot be seen from here. One that has not
# written for so long does not.
_SECONDS_OF_SILENCE = 24 * 3600


def partial_path(path: pathlib.Path) -> pathlib.Path:
  """Temporary path at which to write the future `path`.

  A name of its own for every attempt: two processes may be writing the same file. What
  killed ones had begun of it is taken away.
  """
  remove_abandoned(path.parent, path.name)
  return attempt_path(path)


def attempt_path(path: pathlib.Path) -> pathlib.Path:
  """`partial_path` of what is written often: the folder is not looked through."""
  attempt = f"{_machine()}_{os.getpid()}_{uuid.uuid4().hex[:8]}"
  return path.with_name(f"{path.name}.{attempt}.partial")


def remove_abandoned(folder: pathlib.Path, name: str | None = None) -> None:
  """Deletes files that killed processes had begun to write.

  What a live process of this machine writes stays, and of other machines what has
  changed within a day.

  Args:
    folder: where; it need not be there.
    name: of the one file whose partials are meant; None for all.
  """
  pattern = "*" if name is None else glob.escape(name)
  for path in folder.glob(f"{pattern}.*.partial"):
    found = _PARTIAL.search(path.name)
    if found is None or found.end() < len(path.name):
      continue
    if name is not None and path.name[: found.start()] != name:
      continue  # of a file whose name begins like this
    try:
      if _is_alive(path, *found.groups()):
        continue
    except FileNotFoundError:  # just published, or taken away by another
      continue
    if path.is_dir():
      shutil.rmtree(path, ignore_errors=True)
    else:
      path.unlink(missing_ok=True)


def _is_alive(path: pathlib.Path, machine: str | None, process: str | None) -> bool:
  """Whether somebody may still be writing a partial file."""
  if machine != _machine() or process is None:
    return time.time() - path.stat().st_mtime < _SECONDS_OF_SILENCE
  try:
    os.kill(int(process), 0)
  except ProcessLookupError:
    return False
  except PermissionError:  # somebody else's
    return True
  return True


@functools.cache
def _machine() -> str:
  """Identity of the machine since its start, within which process ids are valid.

  In a container, which has numbers of its own, the container.
  """
  parts = [platform.node()]
  for read in (
    lambda: pathlib.Path("/proc/sys/kernel/random/boot_id").read_text(),
    lambda: os.readlink("/proc/self/ns/pid"),
  ):
    try:
      parts.append(read())
    except OSError:  # not Linux
      parts.append("")
  return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def whole_files(folder: pathlib.Path) -> list[str]:
  """The names in a folder, in order, without what a kill has left half written."""
  names = (path.name for path in folder.iterdir())
  return sorted(name for name in names if not name.endswith(".partial"))


def publish(partial: pathlib.Path, path: pathlib.Path) -> None:
  """Gives a whole file its name, durably."""
  sync(partial)
  partial.rename(path)
  sync(path.parent)


def publish_new(partial: pathlib.Path, path: pathlib.Path) -> None:
  """As `publish`, but never in place of another file, whoever else is writing.

  Raises:
    FileExistsError: there is a file of that name; the partial one is left, too.
  """
  sync(partial)
  try:
    try:
      os.link(partial, path)
    except OSError as error:
      if error.errno not in _NO_LINKS:
        raise
      # Only one process gets the name, and no other writes over it from then on.
      os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
      partial.replace(path)
    else:
      partial.unlink()
  except FileExistsError:
    raise FileExistsError(f"{path} exists already and is left as it is.") from None
  sync(path.parent)


def check_writable(folder: pathlib.Path) -> None:
  """Refuses a folder that nothing can be written to, before work for it is begun.

  The folder need not exist. Whatever this writes is gone when it returns.

  Raises:
    NotADirectoryError: it is a file, or lies below one.
    OSError: it is read-only, its disk is full, or it may not be written to.
  """
  there = folder
  while not os.path.lexists(there):
    there = there.parent
  if not there.is_dir():
    raise NotADirectoryError(f"{there} is a file: give a directory.")
  probe = partial_path(there / "writable")
  try:
    with probe.open("xb") as file:
      try:
        file.write(bytes(_ROOM))
        file.flush()
        os.fsync(file.fileno())
      finally:
        probe.unlink()
  except OSError as error:
    raise OSError(
      f"Nothing can be written to {there}: {error.strerror}. Give another directory, "
      "or make room or rights there."
    ) from error


def write_whole(
  path: pathlib.Path, write: Callable[[pathlib.Path], Any], *, of_many: bool = False
) -> None:
  """Lets `write` fill a temporary file, which gets its name when it is on the disk.

  Args:
    of_many: the folder has very many files, and is not looked through for each of them
      (`attempt_path`); whoever writes them does that once (`remove_abandoned`).
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = attempt_path(path) if of_many else partial_path(path)
  try:
    write(partial)
    publish(partial, path)
  finally:
    partial.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a text in UTF-8, whole or not at all."""
  write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


@contextlib.contextmanager
def whole_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """A temporary folder to fill, which gets its name when the block has ended well.

  One that is there already must be empty. It may be a mount that nothing can replace:
  it gets the files at the end, in the order they were written.
  """
  is_there = folder.is_dir()
  folder.parent.mkdir(parents=True, exist_ok=True)
  partial = partial_path(folder / "whole" if is_there else folder)
  partial.mkdir()
  try:
    yield partial
    if is_there:
      for path in sorted(partial.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        publish(path, folder / path.name)
    else:
      publish(partial, folder)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def file_hash(path: str | os.PathLike[str]) -> str:
  """SHA-256 of a file, in hex."""
  with pathlib.Path(path).open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def user_cache() -> pathlib.Path:
  """Folder of what may be made again: PIXSIGMA_JAX_CACHE, or in the user's caches."""
  if own := os.environ.get("PIXSIGMA_JAX_CACHE"):
    return pathlib.Path(own).expanduser().absolute()
  caches = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
  return caches.absolute() / "pixsigma_jax"


def sync(path: pathlib.Path) -> None:
  """Returns when a file's content, or a folder's names, are on the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def way_out(directory: Any, flag: str) -> str:
  """Advice for a `directory` that could not be written to.

  Args:
    directory: a path, perhaps of a bucket.
    flag: what names it on the command line.
  """
  if directory.exists():
    return f"Make room there, see that it may be written to, or choose another {flag}"
  return f"{directory} is not there (any more): make it again, or choose another {flag}"
