"""A run's directory: its lock, its identity, and the models that still count.

WORKDIR/lock       held by the process that trains, and says which one that is
WORKDIR/run.json   the run's identity, where it went back (`metadata.History`), and
                   the directory's own path, by which a copy of it is found out
WORKDIR/abandoned  models of steps that a run has gone back from
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import socket
import time
from collections.abc import Iterator
from typing import Any

from absl import logging
from etils import epath

from pixsigma_jax import checkpoint, disk, distributed
from pixsigma_jax.metadata import History

LOCK, IDENTITY, ABANDONED = "lock", "run.json", "abandoned"
# Where the models of steps lie, each in a directory that the step names.
_MODELS = (checkpoint.SNAPSHOTS, f"ema/*/{checkpoint.SNAPSHOTS}", "adapters")
_SAMPLE_SETS, _WHOLE = "sample_sets", "captions.jsonl"
# What file systems answer that know no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


class HeldError(OSError):
  """A directory that another process trains in."""


@contextlib.contextmanager
def held(workdir: pathlib.Path, remote: str = "") -> Iterator[None]:
  """Holds a run's directories in here, which no other process can hold meanwhile.

  Process 0 of a job holds them for all; all must come here together.

  The lock is `flock` on a file, which the kernel lets go of when the process ends,
  however it ends: there is nothing to clean up after a crash. Between hosts it holds on
  NFS (by Linux, unless mounted with `nolock` or `local_lock`), on Lustre and CephFS
  mounted with `flock`, and on Filestore. Where a file system keeps locks to each host
  (Lustre with `localflock`, buckets mounted as disks) it holds among the processes of
  one host; where it knows none, a warning says so.

  Args:
    remote: a second place for checkpoints; held too if it is a directory, while a
      bucket (`gs://…`) cannot be.

  Raises:
    ValueError: `remote` is the workdir itself.
    HeldError: another process holds one; says which, on which host, since when.
    checkpoint.SavingError: a directory cannot be made or written to.
  """
  directories = [pathlib.Path(workdir)]
  if remote and "://" not in remote:
    if pathlib.Path(remote).resolve() == directories[0].resolve():
      raise ValueError(
        f"config.checkpoint.remote={remote} is the --workdir itself: give a second "
        "place, or '' for none."
      )
    directories.append(pathlib.Path(remote))
  with contextlib.ExitStack() as locks:
    refused = None
    if distributed.is_first():
      try:
        for directory in directories:
          locks.enter_context(_locked(directory.absolute()))
      except OSError as error:
        refused = [isinstance(error, HeldError), str(error)]
    # All learn of it, and none waits for one that has gone.
    refused = distributed.of_first(refused)
    if refused is not None:
      is_held, message = refused
      raise HeldError(message) if is_held else checkpoint.SavingError(message)
    yield


@contextlib.contextmanager
def _locked(directory: pathlib.Path) -> Iterator[None]:
  path = directory / LOCK
  with checkpoint.saving(directory):
    directory.mkdir(parents=True, exist_ok=True)
    # Never deleted: who holds a file that is gone holds nothing.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
  try:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise HeldError(
        f"{directory} is held by {_holder(path)}: two runs in one place would undo "
        "each other's work. Wait for it or end it, or give another --workdir (and "
        "config.checkpoint.remote)."
      ) from None
    except OSError as error:
      if error.errno not in _NO_LOCKS:
        raise
      logging.warning(
        "The file system of %s knows no locks (%s): nothing keeps a second run out.",
        directory,
        error.strerror,
      )
    me = {"host": socket.gethostname(), "process": os.getpid(), "since": time.time()}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(me).encode(), 0)
    try:
      yield
    finally:
      os.ftruncate(descriptor, 0)
  finally:
    os.close(descriptor)


def _holder(path: pathlib.Path) -> str:
  """The process that wrote into a lock that is held."""
  try:
    holder = json.loads(path.read_text())
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
    return f"process {holder['process']} on {holder['host']} since {since}"
  except (OSError, ValueError, KeyError):  # it is just being written
    return "another process"


def identify(workdir: pathlib.Path, remote: str = "") -> History:
  """Identity of a directory's run; all processes must call it together.

  As it says itself, else as its newest checkpoint does, wherever that lies: a new
  machine goes on with the run. Where nothing does a run begins.
  """
  history = None
  if distributed.is_first():
    history = known(workdir, remote)
    if history is None:
      history = History.new()
    if original := _original(workdir):
      logging.warning(
        "%s is a copy of %s, and both count as the run %s. Give them no "
        "config.checkpoint.remote or .local in common: each would take the other's "
        "checkpoints for its own.",
        *(workdir, original, history.run),
      )
    _write(workdir, history)
    history = dataclasses.asdict(history)
  return History.from_json(distributed.of_first(history))


def known(workdir: pathlib.Path, remote: str = "") -> History | None:
  """Identity of a directory's run without writing anything; None without a run.

  Raises:
    ValueError: the file that says it is damaged.
  """
  path = workdir / IDENTITY
  if path.exists():
    try:
      return History.from_json(dict(json.loads(path.read_text())))
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(
        f"{path} does not say which run this is ({error}): it is damaged. Delete it; "
        "the newest checkpoint says it too."
      ) from error
  places: list[Any] = [workdir, *([epath.Path(remote)] if remote else [])]
  newest = {
    place: steps[-1]
    for place in places
    if (steps := checkpoint.steps_in(place / checkpoint.CHECKPOINTS))
  }
  for place in sorted(newest, key=newest.__getitem__, reverse=True):
    if history := checkpoint.stored_history(place, newest[place]):
      return history
  return None


def _original(workdir: pathlib.Path) -> str | None:
  """The directory that this one was copied from, if that is still there."""
  path = workdir / IDENTITY
  if not path.exists():
    return None
  own = json.loads(path.read_text())
  noted = own.get("workdir")  # not in what earlier versions wrote
  if noted is None:
    return None
  other = pathlib.Path(noted) / IDENTITY
  try:
    is_copy = (
      not other.samefile(path) and json.loads(other.read_text())["run"] == own["run"]
    )
  except (OSError, ValueError, KeyError, TypeError):  # it says nothing any more
    return None
  return noted if is_copy else None


def _write(workdir: pathlib.Path, history: History) -> None:
  noted = _original(workdir) or str(workdir.resolve())
  text = json.dumps({**dataclasses.asdict(history), "workdir": noted})
  path = workdir / IDENTITY
  if not path.exists() or path.read_text() != text:
    with checkpoint.saving(workdir):
      workdir.mkdir(parents=True, exist_ok=True)
      disk.write_text(path, text)


def models_after(workdir: pathlib.Path, step: int) -> list[pathlib.Path]:
  """Snapshots and adapters of later steps than this one."""
  return [
    path
    for pattern in _MODELS
    for path in sorted(workdir.glob(f"{pattern}/*"))
    if path.name.isdigit() and int(path.name) > step
  ]


def go_on_from(
  workdir: pathlib.Path, history: History, step: int, *, anew: bool = False
) -> History:
  """Moves models of later steps aside, for a run that goes on from a step.

  Models of later steps are of steps that will be made anew, by other settings or other
  data maybe: nobody is to take them for this run's, so they are moved to
  WORKDIR/abandoned, where they can be used by their own path. Sets of samples of later
  steps count as unfinished, and are drawn anew. All processes must come here together.

  Args:
    step: 0 for a run that starts over.
    anew: begin a branch even if nothing of later steps is there: the data is other.

  Returns:
    The history of what is made from now on.
  """
  told = None
  if distributed.is_first():
    later = models_after(workdir, step)
    if later or anew:
      history = history.branch_after(step)
      branch, _ = history.branches[-1]
      aside = workdir / ABANDONED / f"{branch}_after_{step:08d}"
      # First: a run that is killed in here finds the rest of the models again, but
      # nothing would tell it of a branch whose models have all been moved.
      _write(workdir, history)
      for path in later:
        target = aside / path.relative_to(workdir)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
      if later:
        logging.warning(
          "%s goes on from step %d: models of later steps are of another history and "
          "not this run's any more (%s). They lie in %s now.",
          workdir,
          step,
          ", ".join(str(path.relative_to(workdir)) for path in later),
          aside,
        )
    for path in sorted(workdir.glob(f"{_SAMPLE_SETS}/*/{_WHOLE}")):
      if path.parent.name.isdigit() and int(path.parent.name) > step:
        path.unlink()
        logging.info("%s is of a step to be made again: it is drawn anew.", path.parent)
    told = dataclasses.asdict(history)
  return History.from_json(distributed.of_first(told))
