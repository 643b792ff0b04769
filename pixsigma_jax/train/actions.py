"""Actions after some steps of a run: report, save, validate and draw."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import numpy as np
from absl import logging

from pixsigma_jax import checkpoint
from pixsigma_jax.metadata import Metadata
from pixsigma_jax.sample.pipeline import Pipeline
from pixsigma_jax.train import sample_grids
from pixsigma_jax.train.goodput import Arithmetic, Goodput
from pixsigma_jax.train.metrics import MetricWriter, Window
from pixsigma_jax.train.program import Program
from pixsigma_jax.train.progress import Progress
from pixsigma_jax.train.step import TrainState
from pixsigma_jax.train.validation import Validation

# Whose time an action takes: that of the training's, of its saving, or nobody's.
Share: TypeAlias = Literal["training", "saving", "nobody"]


@dataclasses.dataclass(kw_only=True)
class LoopState:
  """State of a run between two steps; a roll-back replaces it.

  Attributes:
    state: the train state after `step` steps.
    step: updates done.
    making: the step that is under way, or was made last.
    origin: the step after which `first_example` of the stream came.
    first_example: of the stream, since the run was started or rolled back.
    saved: the last step that each place was given.
    window: what the steps since the last report measured.
    arithmetic: and what they needed.
    batch: of the next step; None where there is none.
    needed: arithmetic of that batch, in this process.
    pending: a step whose metrics are not read yet, they and its examples.
    found: what the last validation measured, until it is reported.
  """

  state: TrainState
  step: int
  making: int
  origin: int
  first_example: int
  saved: dict[checkpoint.Location, int]
  window: Window
  arithmetic: Arithmetic
  batch: dict[str, Any] | None = None
  needed: float = 0.0
  pending: tuple[int, Any, Any] | None = None
  found: dict[str, Any] = dataclasses.field(default_factory=dict)

  def examples(self, batch_size: int) -> int:
    """Examples of the stream that were used, by steps that were abandoned too."""
    return self.first_example + (self.step - self.origin) * batch_size


class Action:
  """Something that is done after every so many steps.

  Attributes:
    share: whose time it takes.
  """

  share: Share = "nobody"

  def __init__(self, every: int):
    """Takes the steps between two times; 0 for never."""
    self._every = every

  def due(self, step: int) -> bool:
    """Whether it is to be done after this step."""
    return bool(self._every) and step % self._every == 0

  def next_due(self, step: int, total: int) -> int | None:
    """The step after this one when it is due again; None if that is not to come."""
    following = (step // self._every + 1) * self._every if self._every else total + 1
    return following if following <= total else None

  def before(self, step: int) -> None:
    """Comes before each step."""

  def run(self, at: LoopState) -> None:
    """Runs the action; the metrics of all steps have been read."""
    raise NotImplementedError

  def reset(self, step: int) -> None:
    """Goes back to a step, after which all are made anew."""

  def close(self) -> None:
    """Ends work under way."""


class Profile(Action):
  """A trace of some steps for XProf and TensorBoard, in WORKDIR/profile/.

  A run that goes on from a step among them, or is rolled back to one, traces what is
  left of them from there.
  """

  share = "training"

  def __init__(self, steps: Sequence[int], workdir: pathlib.Path):
    """Takes the first and the last step; none for no trace."""
    super().__init__(0)
    self._steps, self._workdir = tuple(steps), workdir
    self._began: int | None = None

  def before(self, step: int) -> None:
    if self._steps and self._began is None and self._is_among(step):
      jax.profiler.start_trace(str(self._workdir / "profile"))
      self._began = step

  def due(self, step: int) -> bool:
    return self._began is not None and step >= self._steps[1]

  def run(self, at: LoopState) -> None:
    began = self._began
    self.close()
    logging.info("Steps %d to %d are profiled in %s.", began, at.step, self._workdir)

  def reset(self, step: int) -> None:
    self.close()

  def close(self) -> None:
    if self._began is not None:
      self._began = None
      jax.profiler.stop_trace()

  def _is_among(self, step: int) -> bool:
    first, last = self._steps
    return first <= step <= last


class Validate(Action):
  """The loss on images that are never trained on, for the next report."""

  def __init__(self, every: int, validation: Validation, program: Program):
    super().__init__(every)
    self._validation, self._program = validation, program

  def run(self, at: LoopState) -> None:
    params = self._program.model_of(at.state)
    at.found = self._validation(params, at.state.null_caption)
    at.found["validation/step"] = at.step

  def close(self) -> None:
    self._validation.close()


class Report(Action):
  """A line of metrics, and how far the run is."""

  share = "training"

  def __init__(
    self,
    every: int,
    *,
    total_steps: int,
    batch_size: int,
    epoch: int,
    learning_rate: Callable[[int], Any],
    writer: MetricWriter,
    goodput: Goodput,
    progress: Progress,
  ):
    """Stores the writers of reports.

    Args:
      total_steps: of the run; the last is always reported.
      batch_size: rows of a batch.
      epoch: examples that the data has.
      learning_rate: update → rate.
    """
    super().__init__(every)
    self._total, self._learning_rate = total_steps, learning_rate
    self._batch_size, self._epoch = batch_size, epoch
    self._writer, self._goodput, self._progress = writer, goodput, progress
    self._rollbacks = 0

  def due(self, step: int) -> bool:
    return super().due(step) or step == self._total

  def run(self, at: LoopState) -> None:
    values, seconds, productive = at.window.close()
    # The rate of the update that was just made.
    values["learning_rate"] = float(np.asarray(self._learning_rate(at.step - 1)))
    values["rollbacks"] = self._rollbacks
    images = at.examples(self._batch_size)
    values |= {"images_seen": images, "epochs": images / self._epoch}
    values |= at.arithmetic.close(seconds) | self._goodput.add(productive)
    values |= at.found
    at.found = {}
    self._writer.write(at.step, values)
    self._progress.report(at.step, values)

  def finish(self, at: LoopState) -> None:
    """Reports what came since the last time, if anything did: the run stops here."""
    if not at.window.is_empty():
      self.run(at)

  def reset(self, step: int) -> None:
    self._rollbacks += 1
    self._writer.rewind(step)
    self._goodput.go_on_from(self._writer.last)
    self._progress.go_back(step)


class Save(Action):
  """Saves checkpoints in one location; only sound states come here."""

  share = "saving"

  def __init__(
    self,
    every: int,
    place: checkpoint.Location,
    checkpoints: checkpoint.Checkpoints,
    position: Callable[[LoopState], Any],
    about: Callable[[], Metadata],
    total_steps: int,
  ):
    """Takes what tells what goes with the state: its position, and the metadata."""
    super().__init__(every)
    self._total = total_steps
    self._under_way: int | None = None
    self._place: checkpoint.Location = place
    self._checkpoints, self._position, self._about = checkpoints, position, about

  def run(self, at: LoopState) -> None:
    if at.saved.get(self._place) == at.step:
      return
    whole = at.state.replace(frozen=None)
    self._checkpoints.save(
      at.step, whole, self._position(at), self._about(), place=self._place
    )
    self.report()  # of the one before, for which this one has waited
    at.saved[self._place] = self._under_way = at.step

  def wait(self) -> None:
    """Returns when what was being saved is whole."""
    self._checkpoints.wait()
    self.report()

  def before(self, step: int) -> None:
    if self._under_way is not None and not self._checkpoints.is_saving(self._place):
      self.report()

  def reset(self, step: int) -> None:
    self._under_way = None

  def report(self) -> None:
    """Says of the last step that was to be saved that it is, if it is whole by now."""
    step, self._under_way = self._under_way, None
    if step is None:
      return
    directory = self._checkpoints.directory(self._place)
    # Asked of the disk: where saving failed, that is said when the next save waits.
    if step not in checkpoint.steps_in(directory):
      return
    due = self.next_due(step, self._total)
    following = (
      f"the next is due at step {due}" if due else "the next is due at the end"
    )
    logging.info(
      "Step %d is saved: %s; %s.",
      step,
      directory / str(step),
      following if step < self._total else "it is the last",
    )


class Snapshot(Action):
  """A checkpoint, and the model for use as it is then."""

  share = "saving"

  def __init__(self, every: int, save: Save, write: Callable[[TrainState], None]):
    super().__init__(every)
    self._save, self._write = save, write

  def run(self, at: LoopState) -> None:
    self._save.run(at)
    self._save.wait()  # no snapshot is ahead of the checkpoint that a run goes on from
    self._write(at.state)


class SampleGrid(Action):
  """Samples of fixed prompts."""

  def __init__(
    self,
    every: int,
    sampler: Pipeline,
    prompts: Sequence[str],
    program: Program,
    workdir: pathlib.Path,
    writer: MetricWriter,
  ):
    super().__init__(every)
    self._sampler, self._prompts, self._program = sampler, prompts, program
    self._workdir, self._writer = workdir, writer

  def run(self, at: LoopState) -> None:
    params = self._program.model_of(at.state)
    sample_grids.write_grid(
      self._sampler, params, self._prompts, self._workdir, at.step, self._writer
    )


class DrawSet(Action):
  """Samples of the data's first captions, for FID."""

  def __init__(
    self,
    every: int,
    sampler: Pipeline,
    sample_set: sample_grids.SampleSet,
    program: Program,
    workdir: pathlib.Path,
  ):
    super().__init__(every)
    self._sampler, self._set, self._program = sampler, sample_set, program
    self._directory = workdir / "sample_sets"

  def run(self, at: LoopState) -> None:
    params = self._program.model_of(at.state)
    self._set.write(self._sampler, params, self._directory / f"{at.step:08d}")


class Closing(contextlib.AbstractContextManager):
  """Closes all that a run has opened, the last first, whatever fails on the way.

  The first error is the one that is raised; others are logged.
  """

  def __init__(self):
    self._closers: list[tuple[str, Callable[[], Any]]] = []

  def add(self, what: str, close: Callable[[], Any], *, last: bool = False) -> None:
    """Lets `close` be called at the end; `what` names it in a message."""
    self._closers.insert(0 if last else len(self._closers), (what, close))

  def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
    failed: BaseException | None = None
    while self._closers:
      what, close = self._closers.pop()
      try:
        close()
      except BaseException as another:  # whatever it is, the rest is closed
        if error is None and failed is None:
          failed = another
        else:
          logging.error(
            "Closing %s failed too: %s: %s", what, type(another).__name__, another
          )
    if failed is not None:
      raise failed
