"""The training of one stage, top to bottom, in the order in which things happen."""

import contextlib
import dataclasses
import pathlib
import signal
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from pixsigma_jax import checkpoint, distributed, sharding, tree
from pixsigma_jax.convert.lora import write_lora
from pixsigma_jax.data import pipeline as data_pipeline
from pixsigma_jax.data.mixture import open_mixture
from pixsigma_jax.metadata import Metadata, software
from pixsigma_jax.sample import encoders
from pixsigma_jax.train import (
  actions,
  compatibility,
  guards,
  run_directory,
  sample_grids,
)
from pixsigma_jax.train.batches import Batches
from pixsigma_jax.train.config import call, complete, model_config
from pixsigma_jax.train.ema import save_snapshots
from pixsigma_jax.train.goodput import Arithmetic, Goodput
from pixsigma_jax.train.metrics import MetricWriter, Window, check_wandb
from pixsigma_jax.train.optimizer import rate_in_words
from pixsigma_jax.train.program import lower_step, make_program
from pixsigma_jax.train.progress import Progress
from pixsigma_jax.train.status import is_cleared
from pixsigma_jax.train.step import TrainState
from pixsigma_jax.train.validation import Validation
from pixsigma_jax.train.watchdog import Watchdog


def train(config: Mapping[str, Any], workdir: str | pathlib.Path) -> None:
  """Trains a stage from where it is (nowhere, its parent, a checkpoint) to its end.

  Args:
    config: what differs from the defaults, or all of it, as a plain dict.
    workdir: the run's directory; a run that is there already is continued.

  Raises:
    ValueError, FileNotFoundError: config, data, parent and checkpoint do not fit each
      other; raised before anything is compiled.
    guards.BadStepError: a step was bad, see `guards.Guards`, and the policy is to stop
      or there were too many; nothing of that step has been saved.
    run_directory.HeldError: another process trains in the workdir.
    checkpoint.SavingError: a checkpoint could not be written.
    SystemExit: after SIGTERM or SIGINT, with 128 + the signal's number as code, once
      the state is saved: a scheduler must not take it for a finished run.
  """
  workdir = pathlib.Path(workdir)
  compatibility.check_config(config)
  config = complete(config)
  with run_directory.held(workdir, config["checkpoint"]["remote"]):
    if distributed.of_first(is_cleared(config, workdir)):
      logging.info(
        "%s has all its %d steps already, and its checkpoints were cleared away.",
        workdir,
        config["total_steps"],
      )
      return
    with actions.Closing() as closing:
      run = Run(config, workdir, closing)
      run.start()
      if run.is_done():
        logging.info("%s has all its %d steps already.", workdir, config["total_steps"])
      else:
        run.compile()
        run.prepare_actions()
        run.train()
    run.finish()


class Run:
  """One stage's training in one workdir. Its methods are called in their order.

  Attributes:
    at: where the run stands, from `start` on.
  """

  at: actions.LoopState

  # ------------------------------------------------------------- config, mesh, data

  def __init__(
    self, config: Mapping[str, Any], workdir: pathlib.Path, closing: actions.Closing
  ):
    """Opens what the config names, and sees whether it fits together.

    Args:
      closing: gets all that is to be closed when the run ends, however it does.
    """
    check_wandb(config["log"]["wandb"])
    self.config, self.workdir, self._closing = config, workdir, closing
    self._total, self._batch_size = config["total_steps"], config["batch_size"]
    self._mesh = call(
      sharding.make_mesh_of_slices,
      "mesh",
      config["mesh"],
      devices=jax.devices(),
      batch_size=self._batch_size // config["accumulation"],
      width=model_config(config["model"]).width,
    )
    compatibility.check_batch(self._batch_size, config["accumulation"], self._mesh)
    data = config["data"]
    opened = {
      "paths": data["path"].split(","),
      "weights": data["weights"],
      "holdout": data["holdout"],
    }
    self._mixture = open_mixture(**opened, split="train")
    self._program = make_program(
      config,
      mesh=self._mesh,
      scaling_factor=self._mixture.features.scaling_factor,
    )
    self._model = self._program.model.config
    compatibility.check_data(config, self._model, self._mixture)
    self._rollbacks: dict[int, int] = {}  # by the step of the checkpoint
    self._held_out = None
    if config["validation"]["every"]:
      self._held_out = open_mixture(**opened, split="holdout")

  # ------------------------------------------------------------------------- state

  def start(self) -> None:
    """Gets the state that the run goes on from.

    It comes from, in this order: the newest checkpoint of this run; the parent stage's
    snapshot, through the transforms; fresh parameters. Nothing is ever built unsharded.
    """
    config, mesh, mixture, program = (
      self.config,
      self._mesh,
      self._mixture,
      self._program,
    )
    abstract_state = program.abstract_state()
    places = program.ema.places(abstract_state.shardings(mesh))
    self._places = places
    self._placed = sharding.placed(abstract_state, places).replace(frozen=None)
    distributed.check_same("code", software())
    distributed.check_same("config", config)
    distributed.check_same("dataset", mixture.fingerprint)
    every = config["checkpoint"]
    history = run_directory.identify(self.workdir, every["remote"])
    self._checkpoints = checkpoint.Checkpoints(
      self.workdir,
      history=history,
      mesh=mesh,
      keep_last=every["keep_last"],
      keep_every=every["keep_every"],
      local=every["local"],
      remote=every["remote"],
    )
    self._closing.add("the checkpoints", self._checkpoints.close)
    start = self._checkpoints.latest_step()
    distributed.check_same("newest checkpoint", start)
    if (start or 0) < self._total:
      self._checkpoints.check_space(self._placed)
    parent = None
    if config["init"]["parent"] and (start is None or program.lora):
      parent = checkpoint.read_snapshot(config["init"]["parent"], mesh)
      parent = parent.with_fingerprint()
      transformed = compatibility.transformed(
        parent, config["init"]["transforms"], self._model, mesh
      )
      parent = dataclasses.replace(
        parent, params=transformed.params, metadata=transformed.metadata
      )
    self._has_parent = parent is not None
    if start is not None:
      stored = self._checkpoints.metadata(start)
      about = compatibility.check_same_run(stored, config, self._model, mixture, parent)
    else:
      about = compatibility.metadata_of(config, self._model, mixture, parent)
    history = run_directory.go_on_from(self.workdir, history, start or 0)
    self._about: Metadata = dataclasses.replace(about, history=history)
    self._base: str | None = None  # the fingerprint of what an adapter changes

    null_caption = self._open_captions()
    init_key, key = jax.random.split(jax.random.key(config["seed"]))
    first_example = 0
    if start is not None:
      logging.info("Resuming %s from step %d.", self.workdir, start)
      state, position = self._checkpoints.restore(start, self._placed)
      if parent is not None:
        state = state.replace(frozen=jax.device_put(parent.params, places.frozen))
      first_example = data_pipeline.resume_from(position, mixture, seed=config["seed"])
    elif parent is not None:
      logging.info("Starting %s from %s.", self.workdir, parent.path)
      build = jax.jit(program.first_state, out_shardings=places)
      state = build(parent.params, null_caption, key)
      # The parent as the transforms left it, for looking at before any training.
      self._write_snapshot(state)
    else:
      logging.info("Starting %s from fresh parameters.", self.workdir)
      build = jax.jit(program.fresh_state, out_shardings=places)
      state = build(init_key, null_caption, key)
    logging.info(
      "%s: %.2fM parameters to train, %s, mesh %s, batch %d.",
      config["stage"],
      tree.size(state.params) / 1e6,
      program.model.compute,
      dict(mesh.shape),
      self._batch_size,
    )
    optimizer = config["optimizer"]
    logging.info(
      rate_in_words(
        optimizer["learning_rate"],
        rule=optimizer["scale_rule"],
        batch_size=self._batch_size,
      )
    )
    self._first_step = start or 0
    self._stand(state, self._first_step, first_example)

  def _open_captions(self) -> np.ndarray:
    """Loads the encoder of captions stored as text; returns the null caption.

    All else is known to fit by now.
    """
    length, compute = self._model.caption_length, self._program.model.compute
    self._captions = None
    if self._mixture.null_caption is None:
      self._captions = encoders.load_text_encoder(
        self._mixture.features,
        self.config["frozen"] or None,
        dtype=compute.dtype,
        mesh=self._mesh,
      )
      null_captions, _ = self._captions.encode([""], length)
      null_caption = null_captions[0]
    else:
      null_caption = self._mixture.null_caption[:length]
    return null_caption.astype(np.float32)

  def _stand(self, state: TrainState, step: int, first_example: int) -> None:
    """Starts all counts of the run with this state."""
    self.at = actions.LoopState(
      state=state,
      step=step,
      making=step,
      origin=step,
      first_example=first_example,
      saved=dict.fromkeys(self._checkpoints.locations_of(step), step),
      window=Window(self._batch_size),
      arithmetic=Arithmetic(self._model, self._program.model.compute.dtype),
    )

  def is_done(self) -> bool:
    """Whether all steps are made."""
    return self.at.step >= self._total

  # ------------------------------------------------------------ batches, train step

  def compile(self) -> None:
    """Reads the first batch and compiles the step for it; every other has its shape."""
    index, self._parts = sharding.batch_part(self._mesh, jax.process_index())
    self._part = {"process_index": index, "process_count": self._parts}
    self._batches = self._batches_of(self._mixture)
    self._closing.add("the data", self._let_go)
    self._batches.start(self.at.first_example)
    self._next_batch()
    logging.info("Compiling the train step …")
    began = time.perf_counter()
    lowered = lower_step(
      self._program, self.at.state, self.at.batch, self._places, self._mesh
    )
    self._compiled = lowered.compile()
    distributed.wait_for_all()
    logging.info("Compiled in %.1f s.", time.perf_counter() - began)

  def _batches_of(self, mixture: Any) -> Batches:
    return Batches(
      mixture, self.config, self._model, self._mesh, self._captions, **self._part
    )

  def _next_batch(self) -> None:
    local = self._batches.next_local()
    # Processes that share the tokens of the same images share their arithmetic.
    share = self._parts / jax.process_count()
    self.at.needed = self.at.arithmetic.of_batch(local) * share
    self.at.batch = self._batches.put(local)

  # ----------------------------------------------------------- what looks at the run

  def prepare_actions(self) -> None:
    """Makes the actions, in the order in which they run."""
    config, program, workdir = self.config, self._program, self.workdir
    logs, every = config["log"], config["checkpoint"]
    first, at = distributed.is_first(), self.at
    writer = MetricWriter(workdir if first else None, at.step, config=config)
    self._closing.add("the metrics", writer.close)
    self._progress = Progress(at.step, self._total, shown=first)
    self._closing.add("the progress bar", self._progress.close)
    hang_factor = program.guards.hang_factor
    self._watchdog = Watchdog(workdir / "hangs", hang_factor=hang_factor)
    self._closing.add("the watchdog", self._watchdog.close)
    self._stop = distributed.Stop(self._plan)
    # Closing may take its time; Ctrl-C ends that, too.
    self._closing.add("the hearing of signals", self._stop.close, last=True)

    self._actions: list[actions.Action] = [actions.Profile(logs["profile"], workdir)]
    if self._held_out is not None:
      validation = Validation(
        program.validation_loss,
        self._batches_of(self._held_out),
        examples=config["validation"]["examples"],
        batch_size=self._batch_size,
        num_timesteps=program.num_timesteps,
        mesh=self._mesh,
      )
      validate = actions.Validate(config["validation"]["every"], validation, program)
      self._actions.append(validate)
    self._report = actions.Report(
      logs["every"],
      total_steps=self._total,
      batch_size=self._batch_size,
      epoch=self._mixture.num_examples,
      learning_rate=program.learning_rate,
      writer=writer,
      goodput=Goodput(workdir, writer.last),
      progress=self._progress,
    )
    self._actions.append(self._report)
    kept = self._checkpoints, self._position, lambda: self._about, self._total
    self._save = actions.Save(every["every"], "workdir", *kept)
    self._save_locally = actions.Save(every["local_every"], "local", *kept)
    self._save_remotely = actions.Save(every["remote_every"], "remote", *kept)
    self._actions += [
      self._save,
      self._save_locally,
      self._save_remotely,
      actions.Snapshot(every["snapshot_every"], self._save, self._write_snapshot),
    ]
    self._actions += self._drawing(writer)
    for action in self._actions:
      self._closing.add(type(action).__name__, action.close)
    at.window.restart()

  def _drawing(self, writer: MetricWriter) -> list[actions.Action]:
    """Actions that draw sample grids and sample sets, where the config has some."""
    config, model, mixture = self.config, self._model, self._mixture
    compute, logs = self._program.model.compute, self.config["log"]
    sample_set = shown = None
    if logs["sample_set"]["every"]:
      sample_set = sample_grids.SampleSet(mixture, model, logs["sample_set"]["count"])
      shown = sample_set.captions
    grid_every = logs["sample_every"] if logs["prompts"] else 0
    if grid_every:
      shown = sample_grids.prompts_of(config, model, mixture, compute, self._captions)
    if shown is None:
      return []
    sampler = sample_grids.make_sampler(
      config, model, self.at.state, mixture, compute, shown
    )
    with_model = self._program, self.workdir
    drawing: list[actions.Action] = [
      actions.SampleGrid(grid_every, sampler, logs["prompts"], *with_model, writer)
    ]
    if sample_set is not None:
      every = logs["sample_set"]["every"]
      drawing.append(actions.DrawSet(every, sampler, sample_set, *with_model))
    return drawing

  def _plan(self) -> str:
    return f"finishing step {self.at.making}, then saving"

  def _position(self, at: actions.LoopState) -> data_pipeline.Position:
    return data_pipeline.position(
      self._mixture, seed=self.config["seed"], examples=at.examples(self._batch_size)
    )

  # --------------------------------------------------------------------------- loop

  def train(self) -> None:
    """Makes the steps that are left, until the last or a signal; saves the last.

    An error of the disk or the data ends it, too, once the last sound step is saved.
    """
    while True:
      try:
        while not self.is_done() and not self._stop.is_due():
          self._make_step()
        self._save_last()
        self._report.finish(self.at)
        return
      except _RollBack as bad:
        self._roll_back(bad)
      except checkpoint.SavingError:
        raise
      except (OSError, ValueError, data_pipeline.WorkerError) as error:
        # A signal to all processes may have met a worker that was just starting.
        if isinstance(error, data_pipeline.WorkerError) and self._stop.is_wished():
          continue
        self._rescue()
        raise

  def _let_go(self) -> None:
    """Drops the batch that is not used: it may lie in memory shared with a worker."""
    self.at.batch = None
    self._batches.close()

  def _save_last(self) -> None:
    """Returns when the step that was made last is saved, and told of."""
    self._drain()
    saves = [self._save]
    if self.config["checkpoint"]["remote"]:
      saves.append(self._save_remotely)
    for save in saves:
      self._do(save)
    self._checkpoints.wait()
    for save in saves:
      save.report()

  def _rescue(self) -> None:
    """Saves the last step that is sound, as far as one process can, before an error."""
    if jax.process_count() > 1:
      return  # a save is made by all, and the others are under way with the next step
    try:
      self._save_last()
    except (_RollBack, guards.BadStepError, OSError, ValueError) as why:
      logging.error("Nor could step %d be saved: %s", self.at.step, why)

  def _make_step(self) -> None:
    at = self.at
    for action in self._actions:
      action.before(at.step + 1)
    assert at.batch is not None
    batch, at.batch = at.batch, None
    at.making = at.step + 1
    at.state, metrics = self._compiled(at.state, batch)
    at.step = at.making
    at.arithmetic.add(at.needed)
    self._drain()  # the step before: this one runs meanwhile
    at.pending = (at.step, metrics, batch["example"])
    self._progress.advance(at.step)
    if not self.is_done() and not self._stop.is_due():
      with (
        contextlib.suppress(distributed.Stopping),
        at.window.spent("data"),
        self._stop.breaking_off(),
      ):
        self._next_batch()
    for action in self._actions:
      if action.due(at.step):
        self._drain()
        self._do(action)

  def _do(self, action: actions.Action) -> None:
    with self._spent(action.share):
      action.run(self.at)

  @contextlib.contextmanager
  def _spent(self, share: actions.Share) -> Iterator[None]:
    """Counts the time of an action as its `share` says, and not as a hang if none."""
    window = self.at.window
    if share == "saving":
      with window.spent("saving"):
        yield
    elif share == "nobody":
      with window.paused(), self._watchdog.paused():
        yield
    else:
      yield

  def _drain(self) -> None:
    """Reads what the last step measured, and deals with it if it was bad."""
    at, policy = self.at, self._program.guards
    if at.pending is None:
      return
    number, metrics, examples = at.pending
    metrics = jax.device_get(metrics)
    self._watchdog.beat(number)
    if number == 1 and self._has_parent:
      # A step measures what was there before its update: what the transforms left.
      logging.info(
        "Before any training, on the first batch: loss %.4f (mse %.4f, vb %.4f).",
        *(metrics[name] for name in ("loss", "mse", "vb")),
      )
    if not guards.is_bad(metrics):
      at.pending = None
      at.window.add(metrics)
      return
    # A bad one stays pending: whatever goes wrong from here on, nothing of it is saved.
    why = guards.describe(number, metrics, examples, self._mixture)
    if policy.bad_step == "rollback":
      raise _RollBack(number, why)
    row = int(metrics.get("bad", 0))  # 0: bad, but by nothing that can be skipped
    if policy.bad_step == "skip" and 0 < row < policy.max_bad_steps:
      logging.warning("%s The step is skipped.", why)
      at.pending = None
      at.window.add_bad()
      return
    many = f" {row} bad steps in a row." if row > 1 else ""
    raise guards.BadStepError(
      f"{why}{many} Nothing of this step is saved. Look at these records, or lower "
      "config.optimizer.learning_rate; the same command goes on from the newest "
      f"checkpoint in {self.workdir}."
    )

  def _roll_back(self, bad: "_RollBack") -> None:
    """Back to the newest checkpoint, and on with the data after the bad batch."""
    limit = self._program.guards.max_bad_steps
    with self._watchdog.paused():
      self._checkpoints.wait()
      newest = self._checkpoints.latest_step()
      times = 0 if newest is None else self._rollbacks.get(newest, 0)
      if newest is None or times >= limit:
        tried = f"rolled back to {times} times" if times else "not there yet"
        raise guards.BadStepError(
          f"{bad.why} The checkpoint to roll back to was {tried} "
          f"(config.guards.max_bad_steps={limit}). Look at these "
          "records, or lower config.optimizer.learning_rate."
        ) from bad
      self._rollbacks[newest] = times + 1
      logging.warning("%s Rolling back to step %d.", bad.why, newest)
      assert self._about.history is not None
      history = run_directory.go_on_from(
        self.workdir, self._about.history, newest, anew=True
      )
      self._about = dataclasses.replace(self._about, history=history)
      left = self.at
      state, _ = self._checkpoints.restore(newest, self._placed)
      self._stand(
        state.replace(frozen=left.state.frozen),
        newest,
        left.first_example + (bad.step - left.origin) * self._batch_size,
      )
      self._batches.start(self.at.first_example)
      self._next_batch()
      for action in self._actions:
        action.reset(newest)
    self.at.window.restart()

  # ---------------------------------------------------------------------------- end

  def finish(self) -> None:
    """Writes the model for use, or says where the run was stopped; all is closed.

    Raises:
      SystemExit: it was stopped.
    """
    if not self.is_done():
      number = self._stop.number or signal.SIGTERM
      logging.info(
        "Stopped by %s at step %d, which is saved. The same command goes on.",
        signal.Signals(number).name,
        self.at.step,
      )
      raise SystemExit(128 + number)
    self._write_snapshot(self.at.state)
    if self.at.step == self._first_step:
      return
    logging.info(
      "%s has ended: %d steps, in %s.", self.config["stage"], self._total, self.workdir
    )

  def _write_snapshot(self, state: TrainState) -> None:
    """The model as it is for use and, if one is trained, the adapter by itself."""
    lora, step = self._program.lora, int(state.step)
    model_of = self._program.model_of if lora else None
    save_snapshots(self.workdir, self._program.ema, state, self._about, model_of)
    snapshot = self.workdir / checkpoint.SNAPSHOTS / str(step)
    logging.info("The model of step %d is saved: %s.", step, snapshot)
    if not lora or not step:
      return
    if self._base is None:
      self._base = tree.fingerprint(state.frozen)  # asked of all processes
    if distributed.is_first():
      adapter = jax.device_get(self._program.ema.for_use(state.ema_params))
      history = self._about.history
      note = {"base": self._base, "run": history and history.run, "step": step}
      model, folder = self._program.model.config, self.workdir / "adapters" / str(step)
      write_lora(folder, model, adapter, lora, note)


class _RollBack(Exception):
  """A bad step, whose policy is to roll back."""

  def __init__(self, step: int, why: str):
    super().__init__(why)
    self.step, self.why = step, why
