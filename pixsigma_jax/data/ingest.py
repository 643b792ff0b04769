"""Work that is done part by part, by Apache Beam: on this machine or on a cluster.

Beam decides where a part is done; Dataflow, Flink and Spark are its own options. A
function is done with a part when it has written it, so a run that was killed is started
over with what is missing, on any runner and any number of workers.
"""

import collections
import contextlib
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

from pixsigma_jax import command
from pixsigma_jax.wording import install

# Beam's own default, DirectRunner, may first fetch another, Prism, from the network.
_HERE = "FnApiRunner"
_LOCAL = (_HERE, "DirectRunner")
_SECONDS_BETWEEN_LOOKS = 0.1


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
  except ImportError:
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
) -> None:
  """Calls `function` once with each of `parts`, in any order and any process.

  Args:
    function: can be pickled: a partial of a function that a module defines.
    what: says in the progress what is done.
    beam_options: Beam's, such as --direct_num_workers=8.

  Raises:
    ValueError, OSError: as `function` raised it; no further parts are begun.
  """
  if not parts:
    return
  pipeline_parts = list(parts)
  with run(what, len(pipeline_parts), beam_options) as (pipeline, noting):
    _ = (
      pipeline
      | "Parts" >> beam().Create(pipeline_parts)
      | "Spread" >> beam().Reshuffle()
      | what >> beam().Map(noting(function))
    )


@contextlib.contextmanager
def run(
  what: str, total: int, beam_options: Sequence[str]
) -> Iterator[tuple[Any, Callable[..., Callable[[Any], Any]]]]:
  """A Beam pipeline to be filled in the `with`; it is run at the end of it.

  Yields the pipeline and `noting(function)`: the function, which each time it is done
  moves the progress on by one of `total`, and whose ValueError or OSError is raised
  here as itself. Of runners elsewhere Beam tells both in its own way.
  """
  options = _options(beam_options)
  pipeline = beam().Pipeline(options=options)
  if options.get_all_options()["runner"] not in _LOCAL:
    yield pipeline, _unchanged
    pipeline.run().wait_until_finish()
    return
  with tempfile.TemporaryDirectory() as folder:
    yield pipeline, lambda function: _Noted(function, folder)
    with _progress(folder, total, what):
      pipeline.run().wait_until_finish()
    for path in sorted(pathlib.Path(folder).glob("error-*")):
      raise pickle.loads(path.read_bytes())


def _options(beam_options: Sequence[str]) -> Any:
  beam()
  from apache_beam.options.pipeline_options import PipelineOptions

  return PipelineOptions([f"--runner={_HERE}", *beam_options])


def _unchanged(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
  return function


class _Noted:
  """A function that leaves what became of it in a folder, for another process to see.

  Beam itself tells of a worker's exception the text alone, and of its progress nothing.
  """

  def __init__(self, function: Callable[[Any], Any], folder: str):
    self._function, self._folder = function, pathlib.Path(folder)

  def __call__(self, element: Any) -> Any:
    if any(self._folder.glob("error-*")):
      return None  # the run has failed
    try:
      result = self._function(element)
    except (ValueError, OSError) as error:
      self._keep(error)
      return None
    with open(self._folder / f"done-{os.getpid()}", "ab") as file:
      file.write(b".")
    return result

  def _keep(self, error: Exception) -> None:
    error.add_note(traceback.format_exc())
    try:
      data = pickle.dumps(error)
      pickle.loads(data)
    except Exception:  # an exception is pickled by its `args`, which may not fit
      data = pickle.dumps(ValueError(f"{type(error).__name__}: {error}"))
    partial = self._folder / f"partial-{uuid.uuid4()}"
    partial.write_bytes(data)
    partial.rename(partial.with_name(partial.name.replace("partial", "error")))


@contextlib.contextmanager
def _progress(folder: str, total: int, what: str) -> Iterator[None]:
  """Shows what `_Noted` has finished, until the end of the `with`."""
  is_over = threading.Event()

  def finished() -> Iterator[None]:
    shown = 0
    while shown < total:
      over = is_over.wait(_SECONDS_BETWEEN_LOOKS)
      done = sum(path.stat().st_size for path in pathlib.Path(folder).glob("done-*"))
      yield from itertools.repeat(None, min(done, total) - shown)
      shown = min(done, total)
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
