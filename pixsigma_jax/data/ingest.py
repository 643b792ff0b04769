"""Work that is done part by part, by Apache Beam: on this machine or on a cluster.

Beam decides where a part is done; Dataflow, Flink and Spark are its own options. A
function is done with a part when it has written it, so a run that was killed is started
over with what is missing, on any runner and any number of workers.
"""

import collections
import contextlib
import contextvars
import io
import itertools
import logging
import os
import pathlib
import pickle
import tempfile
import threading
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pixsigma_jax import command, errors
from pixsigma_jax.wording import install

# Beam's own default, DirectRunner, may first fetch another, Prism, from the network.
_HERE = "FnApiRunner"
_LOCAL = (_HERE, "DirectRunner")
_SECONDS_BETWEEN_LOOKS = 0.1

# Where the function that is at work here is to say how far it is; None for nowhere.
_counted_in: contextvars.ContextVar[pathlib.Path | None] = contextvars.ContextVar(
  "counted_in", default=None
)


def beam() -> Any:
  """The module apache_beam.

  Raises:
    ValueError: it is not installed.
  """
  before = logging.root.manager.disable
  try:
    # It warns of each of Google's clouds that it finds no client for.
    logging.disable(logging.WARNING)
    import apache_beam
  except ImportError as error:
    if not errors.of_absence(error, "apache_beam"):
      raise
    raise ValueError(f"Curation needs Apache Beam: {install('curate')}.") from None
  finally:
    logging.disable(before)
  return apache_beam


def run_parts(
  function: Callable[[int], None],
  parts: Sequence[int],
  *,
  what: str,
  beam_options: Sequence[str],
  by_image: bool = False,
  images: int | None = None,
) -> None:
  """Calls `function` once with each of `parts`, in any order and any process.

  Args:
    function: can be pickled: a partial of a function that a module defines.
    what: says in the progress what is done.
    beam_options: Beam's, such as --direct_num_workers=8.
    by_image: whether images are the progress, as `function` will `count` them, and
      not parts.
    images: how many in all; None if that is not known.

  Raises:
    ValueError, OSError: as `function` raised it; no further parts are begun.
  """
  if not parts:
    return
  todo = list(parts)
  total = images if by_image else len(todo)
  with run(what, total, beam_options, by_image=by_image) as (pipeline, noting):
    _ = (
      pipeline
      | "Parts" >> beam().Create(todo)
      | "Spread" >> beam().Reshuffle()
      | what >> beam().Map(noting(function))
    )


def count(images: int = 1) -> None:
  """Reports from within a part that so many more images are done.

  Nothing happens where nobody looks: outside of `run_parts`, or on a cluster.
  """
  folder = _counted_in.get()
  if folder is not None and images:
    with open(folder / f"done-{os.getpid()}", "ab") as file:
      file.write(b"." * images)


@contextlib.contextmanager
def run(
  what: str, total: int | None, beam_options: Sequence[str], *, by_image: bool = False
) -> Iterator[tuple[Any, Callable[..., Callable[[Any], Any]]]]:
  """A Beam pipeline to be filled in the `with`; it is run at the end of it.

  Yields the pipeline and `noting(function)`: the function, which each time it is done
  (or, `by_image`, whenever it calls `count`) moves the progress on by one of `total`,
  where that is known, and whose ValueError or OSError is raised here as itself. Of
  runners elsewhere Beam tells both in its own way.
  """
  options = _options(beam_options)
  pipeline = _pipeline(options)
  if options.get_all_options()["runner"] not in _LOCAL:
    yield pipeline, _unchanged
    pipeline.run().wait_until_finish()
    return
  with tempfile.TemporaryDirectory() as folder:
    yield pipeline, lambda function: _Noted(function, folder, by_image)
    with _progress(folder, total, what):
      pipeline.run().wait_until_finish()
    for path in sorted(pathlib.Path(folder).glob("error-*")):
      raise pickle.loads(path.read_bytes())


def check(beam_options: Sequence[str]) -> None:
  """Refuses options of Beam that cannot be used, before there is work for it.

  Raises:
    ValueError: there is no such runner or option here, or its value is none.
  """
  _pipeline(_options(beam_options))


def _options(beam_options: Sequence[str]) -> Any:
  beam()
  from apache_beam.options.pipeline_options import PipelineOptions

  said, discarded = io.StringIO(), _Discarded()
  log = logging.getLogger(PipelineOptions.__module__)
  log.addFilter(discarded)
  try:
    with contextlib.redirect_stderr(said):
      options = PipelineOptions([f"--runner={_HERE}", *beam_options])
      runner = options.get_all_options()["runner"]
  except SystemExit:  # argparse prints how Beam is called, and what is wrong at the end
    problem = said.getvalue().strip().rpartition("error: ")[2]
    raise ValueError(f"--beam: {problem}.") from None
  finally:
    log.removeFilter(discarded)
  # Other runners hand what Beam does not know to their cluster.
  if runner in _LOCAL and discarded.arguments:
    raise ValueError(f"--beam: Beam has no {' '.join(discarded.arguments)}.")
  return options


class _Discarded(logging.Filter):
  """Options that Beam discarded, which it says only in its log."""

  def __init__(self):
    super().__init__()
    self.arguments: dict[str, None] = {}

  def filter(self, record: logging.LogRecord) -> bool:
    if not str(record.msg).startswith("Discarding"):
      return True
    for given in record.args or ():
      several = given if isinstance(given, list) else [given]
      self.arguments |= dict.fromkeys(map(str, several))
    return False


def _pipeline(options: Any) -> Any:
  try:
    return beam().Pipeline(options=options)
  except (ValueError, ImportError, AttributeError, RuntimeError) as error:
    runner = options.get_all_options()["runner"]
    raise ValueError(
      f"--beam: the runner {runner} cannot be used: {str(error).rstrip('.')}."
    ) from error


def _unchanged(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
  return function


class _Noted:
  """A function that records progress and errors in a folder, for another process.

  Beam itself tells of a worker's exception the text alone, and of its progress nothing.
  """

  def __init__(self, function: Callable[[Any], Any], folder: str, by_image: bool):
    self._function, self._folder = function, pathlib.Path(folder)
    self._by_image = by_image

  def __call__(self, element: Any) -> Any:
    if any(self._folder.glob("error-*")):
      return None  # the run has failed
    outer = _counted_in.set(self._folder if self._by_image else None)
    try:
      result = self._function(element)
    except (ValueError, OSError) as error:
      self._keep(error)
      return None
    finally:
      _counted_in.reset(outer)
    if not self._by_image:
      with open(self._folder / f"done-{os.getpid()}", "ab") as file:
        file.write(b".")
    return result

  def _keep(self, error: Exception) -> None:
    error.add_note(traceback.format_exc())
    try:
      data = pickle.dumps(error)
      pickle.loads(data)
    # An exception is pickled by its `args`, which may not fit its constructor.
    except (TypeError, AttributeError, pickle.PickleError):
      data = pickle.dumps(ValueError(f"{type(error).__name__}: {error}"))
    partial = self._folder / f"partial-{uuid.uuid4()}"
    partial.write_bytes(data)
    partial.rename(partial.with_name(partial.name.replace("partial", "error")))


@contextlib.contextmanager
def _progress(folder: str, total: int | None, what: str) -> Iterator[None]:
  """Shows what `_Noted` has finished, until the end of the `with`."""
  is_over = threading.Event()

  def finished() -> Iterator[None]:
    shown = 0
    while total is None or shown < total:
      over = is_over.wait(_SECONDS_BETWEEN_LOOKS)
      done = sum(path.stat().st_size for path in pathlib.Path(folder).glob("done-*"))
      done = done if total is None else min(done, total)
      yield from itertools.repeat(None, done - shown)
      shown = done
      if over:
        return

  shown = command.progress(finished(), total, what)
  watch = threading.Thread(target=lambda: collections.deque(shown, maxlen=0))
  watch.start()
  try:
    yield
  finally:
    is_over.set()
    watch.join()
