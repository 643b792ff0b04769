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
from pixsigma_jax.metadata import Metadata
from pixsigma_jax.sample import frozen
from pixsigma_jax.train import agreement, guards, sheets
from pixsigma_jax.train.batches import Batches
from pixsigma_jax.train.config import call, model_config
from pixsigma_jax.train.ema import save_snapshots
from pixsigma_jax.train.goodput import Arithmetic, Goodput
from pixsigma_jax.train.metrics import MetricWriter, Window
from pixsigma_jax.train.optimizer import rate_in_words
from pixsigma_jax.train.program import Program, lower_step, make_program
from pixsigma_jax.train.progress import Progress
from pixsigma_jax.train.step import TrainState
from pixsigma_jax.train.validation import Validation
from pixsigma_jax.train.watchdog import Watchdog


def train(config: Mapping[str, Any], workdir: str | pathlib.Path) -> None:
  """Trains a stage from where it is (nowhere, its parent, a checkpoint) to its end.

  Args:
    config: what a file of `configs/` returns, as a plain dict.
    workdir: the run's directory; a run that is there already is continued.

  Raises:
    ValueError, FileNotFoundError: config, data, parent and checkpoint do not fit each
      other; raised before anything is compiled.
    guards.BadStepError: a step was bad, see `guards.Guards`, and the policy is to stop
      or there were too many; nothing of that step has been saved.
    checkpoint.SavingError: a checkpoint could not be written.
    SystemExit: after SIGTERM or SIGINT, with 128 + the signal's number as code, once
      the state is saved: a scheduler must not take it for a finished run.
  """
  workdir = pathlib.Path(workdir)

  # ------------------------------------------------------------- config, mesh, data
  agreement.check_config(config)
  every, logs = config["checkpoint"], config["log"]
  total_steps, batch_size = config["total_steps"], config["batch_size"]
  data = config["data"]
  mesh = call(
    sharding.make_mesh_of_slices,
    "mesh",
    config["mesh"],
    devices=jax.devices(),
    batch_size=batch_size // config["accumulation"],
    width=model_config(config["model"]).width,
  )
  agreement.check_batch(batch_size, config["accumulation"], mesh)
  opened = {
    "paths": data["path"].split(","),
    "weights": data["weights"],
    "holdout": data["holdout"],
  }
  mixture = open_mixture(**opened, split="train")
  program = make_program(
    config,
    mesh=mesh,
    scaling_factor=mixture.features.scaling_factor,
  )
  model, compute = program.model.config, program.model.compute
  agreement.check_data(config, model, mixture)
  held_out = None
  if config["validation"]["every"]:
    held_out = open_mixture(**opened, split="holdout")

  # ------------------------------------------------------------------------- state
  # From, in this order: the newest checkpoint of this run; the parent stage's
  # snapshot, through the transforms; fresh parameters. Nothing is ever built unsharded.
  abstract_state = program.abstract_state()
  places = program.ema.places(sharding.shardings(abstract_state, mesh))
  placed = sharding.placed(abstract_state, places).replace(frozen=None)
  distributed.check_same("config", config)
  distributed.check_same("dataset", mixture.fingerprint)
  checkpoints = checkpoint.Checkpoints(
    workdir,
    mesh=mesh,
    keep_last=every["keep_last"],
    keep_every=every["keep_every"],
    local=every["local"],
    remote=every["remote"],
  )
  start = checkpoints.latest_step()
  distributed.check_same("newest checkpoint", start)
  parent = None
  if config["init"]["parent"] and (start is None or program.lora):
    parent = checkpoint.read_snapshot(config["init"]["parent"], mesh)
    transformed = agreement.transformed(
      parent, config["init"]["transforms"], model, mesh
    )
    parent = dataclasses.replace(
      parent, params=transformed.params, metadata=transformed.metadata
    )
  if start is not None:
    stored = checkpoints.metadata(start)
    about = agreement.check_same_run(stored, config, model, mixture, parent)
  else:
    about = agreement.metadata_of(config, model, mixture, parent)

  # Who embeds captions that are stored as text: loaded once all else is known to fit.
  captions = None
  if mixture.null_caption is None:
    captions = frozen.load_text_encoder(
      mixture.features, config["frozen"] or None, dtype=compute.dtype, mesh=mesh
    )
    null_captions, _ = captions.encode([""], model.caption_length)
    null_caption = null_captions[0]
  else:
    null_caption = mixture.null_caption[: model.caption_length]
  null_caption = null_caption.astype(np.float32)

  init_key, key = jax.random.split(jax.random.key(config["seed"]))
  first_example = 0
  if start is not None:
    logging.info("Resuming %s from step %d.", workdir, start)
    state, position = checkpoints.restore(start, placed)
    if parent is not None:
      state = state.replace(frozen=jax.device_put(parent.params, places.frozen))
    first_example = data_pipeline.resume_from(position, mixture, seed=config["seed"])
  elif parent is not None:
    logging.info("Starting %s from %s.", workdir, parent.path)
    build = jax.jit(program.first_state, out_shardings=places)
    state = build(parent.params, null_caption, key)
    # The parent as the transforms left it, for looking at before any training.
    _snapshot(workdir, program, state, about)
  else:
    logging.info("Starting %s from fresh parameters.", workdir)
    build = jax.jit(program.fresh_state, out_shardings=places)
    state = build(init_key, null_caption, key)
  if parent is not None:
    parent = dataclasses.replace(parent, params=None)  # the state has its own
  logging.info(
    "%s: %.2fM parameters to train, %s, mesh %s, batch %d.",
    config["stage"],
    tree.size(state.params) / 1e6,
    compute,
    dict(mesh.shape),
    batch_size,
  )
  optimizer = config["optimizer"]
  logging.info(
    rate_in_words(
      optimizer["learning_rate"], rule=optimizer["scale_rule"], batch_size=batch_size
    )
  )

  # ------------------------------------------------------------------------ batches
  step = start or 0
  if step >= total_steps:
    logging.info("%s has all its %d steps already.", workdir, total_steps)
    checkpoints.close()
    _snapshot(workdir, program, state, about)
    return
  index, parts = sharding.batch_part(mesh, jax.process_index())
  part = {"process_index": index, "process_count": parts}
  batches = Batches(mixture, config, model, mesh, captions, **part)
  arithmetic = Arithmetic(model, compute.dtype)

  def next_batch() -> tuple[dict[str, Any], float]:
    local = batches.next_local()
    # Processes that share the tokens of the same images share their arithmetic.
    share = parts / jax.process_count()
    return batches.put(local), arithmetic.of_batch(local) * share

  batches.start(first_example)
  batch, needed = next_batch()

  # ------------------------------------------------------------------------ compile
  logging.info("Compiling the train step …")
  began = time.perf_counter()
  compiled = lower_step(program, state, batch, places, mesh).compile()
  distributed.wait_for_all()
  logging.info("Compiled in %.1f s.", time.perf_counter() - began)

  # ----------------------------------------------------------- what looks at the run
  sampler = sample_set = shown = validation = None
  sheet_every = logs["sample_every"] if logs["prompts"] else 0
  if logs["sample_set"]["every"]:
    sample_set = sheets.SampleSet(mixture, model, logs["sample_set"]["count"])
    shown = sample_set.captions
  if sheet_every:
    shown = sheets.prompts_of(config, model, mixture, compute, captions)
  if shown is not None:
    sampler = sheets.make_sampler(config, model, state, mixture, compute, shown)
  if held_out is not None:
    validation = Validation(
      program.validation_loss,
      Batches(held_out, config, model, mesh, captions, **part),
      examples=config["validation"]["examples"],
      batch_size=batch_size,
      num_timesteps=program.num_timesteps,
      mesh=mesh,
    )
  first = distributed.is_first()
  writer = MetricWriter(workdir if first else None, step)
  goodput = Goodput(workdir, writer.last)
  progress = Progress(step, total_steps, shown=first)
  window = Window(batch_size)
  watchdog = Watchdog(workdir / "hangs", hang_factor=program.guards.hang_factor)
  stop = distributed.Stop()

  # --------------------------------------------------------------------------- loop
  policy = program.guards
  origin = step  # the step that began with `first_example`
  saved = dict.fromkeys(checkpoints.places_of(step), step)  # the last, by place
  rollbacks: dict[int, int] = {}  # by the step of the checkpoint
  found: dict[str, Any] = {}  # what the last validation measured, until it is written
  pending: tuple[int, Any, Any] | None = None  # the step whose metrics are not read yet

  def settle() -> None:
    """Reads what the last step measured, and deals with it if it was bad."""
    nonlocal pending
    if pending is None:
      return
    number, metrics, examples = pending
    pending = None
    metrics = jax.device_get(metrics)
    watchdog.beat(number)
    if number == 1 and parent is not None:
      # A step measures what was there before its update: what the transforms left.
      logging.info(
        "Before any training, on the first batch: loss %.4f (mse %.4f, vb %.4f).",
        *(metrics[name] for name in ("loss", "mse", "vb")),
      )
    if not guards.is_bad(metrics):
      window.add(metrics)
      return
    why = guards.describe(number, metrics, examples, mixture)
    if policy.bad_step == "rollback":
      raise _RollBack(number, why)
    row = int(metrics.get("bad", 0))  # 0: bad, but by nothing that can be skipped
    if policy.bad_step == "skip" and 0 < row < policy.max_bad_steps:
      logging.warning("%s The step is skipped.", why)
      window.add_bad()
      return
    many = f" {row} bad steps in a row." if row > 1 else ""
    raise guards.BadStepError(
      f"{why}{many} Nothing of this step is saved. Look at these records, or lower "
      "config.optimizer.learning_rate; the same command goes on from the newest "
      f"checkpoint in {workdir}."
    )

  def roll_back(bad: _RollBack) -> None:
    """Back to the newest checkpoint, and on with the data after the bad batch."""
    nonlocal state, batch, needed, step, origin, first_example, pending
    with _spent(window, watchdog):
      checkpoints.wait()
      newest = checkpoints.latest_step()
      times = 0 if newest is None else rollbacks.get(newest, 0)
      if newest is None or times >= policy.max_bad_steps:
        tried = f"rolled back to {times} times" if times else "not there yet"
        raise guards.BadStepError(
          f"{bad.why} The checkpoint to roll back to was {tried} "
          f"(config.guards.max_bad_steps={policy.max_bad_steps}). Look at these "
          "records, or lower config.optimizer.learning_rate."
        ) from bad
      rollbacks[newest] = times + 1
      logging.warning("%s Rolling back to step %d.", bad.why, newest)
      first_example += (bad.step - origin) * batch_size
      origin = step = newest
      saved.update(dict.fromkeys(checkpoints.places_of(newest), newest))
      pending = None
      base = state.frozen
      state, _ = checkpoints.restore(newest, placed)
      state = state.replace(frozen=base)
      batches.start(first_example)
      batch, needed = next_batch()
      writer.rewind(newest)
      goodput.go_on_from(writer.last)
      progress.go_back(newest)
    window.restart()

  def save(place: checkpoint.Place = "workdir") -> None:
    # Only what is known to be finite is saved, and hence ever written over anything.
    settle()
    if saved.get(place) != step:
      examples = first_example + (step - origin) * batch_size
      position = data_pipeline.position(mixture, seed=config["seed"], examples=examples)
      with window.spent("saving"):
        whole = state.replace(frozen=None)
        checkpoints.save(step, whole, position, about, place=place)
      saved[place] = step

  def report() -> None:
    settle()
    values, seconds, productive = window.close()
    # The rate of the update that was just made.
    values["learning_rate"] = float(np.asarray(program.learning_rate(step - 1)))
    values["rollbacks"] = sum(rollbacks.values())
    values |= arithmetic.close(seconds) | goodput.add(productive)
    values |= found
    found.clear()
    writer.write(step, values)
    progress.report(step, values)

  def one_step() -> None:
    nonlocal state, batch, needed, step, pending
    examples = batch["example"]
    if logs["profile"] and step + 1 == logs["profile"][0]:
      settle()
      jax.profiler.start_trace(str(workdir / "profile"))
    state, metrics = compiled(state, batch)
    arithmetic.add(needed)
    settle()  # of the step before: this one runs meanwhile
    step += 1
    pending = (step, metrics, examples)
    if logs["profile"] and step == logs["profile"][1]:
      settle()
      jax.profiler.stop_trace()
      logging.info("Steps %d to %d are profiled in %s.", *logs["profile"], workdir)
    if step < total_steps:
      with window.spent("data"):
        batch, needed = next_batch()

    if validation and _due(config["validation"]["every"], step):
      settle()
      with _spent(window, watchdog):
        found.update(validation(program.model_of(state), state.null_caption))
        found["validation/step"] = step
    if step % logs["every"] == 0 or step == total_steps:
      report()
    else:
      progress.advance(step)
    if _due(every["every"], step):
      save()
    if _due(every["local_every"], step):
      save("local")
    if _due(every["remote_every"], step):
      save("remote")
    if _due(every["snapshot_every"], step):
      save()
      with window.spent("saving"):
        _snapshot(workdir, program, state, about)
    if sampler and _due(sheet_every, step):
      settle()
      with _spent(window, watchdog):
        params = program.model_of(state)
        sheets.write_sheet(sampler, params, logs["prompts"], workdir, step, writer)
    if sampler and sample_set and _due(logs["sample_set"]["every"], step):
      settle()
      with _spent(window, watchdog):
        params = program.model_of(state)
        directory = workdir / "sample_sets" / f"{step:08d}"
        sample_set.write(sampler, params, directory)

  try:
    while True:
      try:
        while step < total_steps and not stop.is_due():
          one_step()
        save()
        if every["remote"]:
          save("remote")
        break
      except _RollBack as bad:
        roll_back(bad)
    checkpoints.wait()
  except BaseException:
    # Whatever ends the run, a checkpoint that is being written is let finish.
    with contextlib.suppress(checkpoint.SavingError):
      checkpoints.close()
    raise
  finally:
    stop.close()
    watchdog.close()
    progress.close()
    writer.close()
    batches.close()
  checkpoints.close()

  if step < total_steps:
    number = stop.number or signal.SIGTERM
    name = signal.Signals(number).name
    logging.info(
      "Stopped by %s at step %d, which is saved. The same command goes on.", name, step
    )
    raise SystemExit(128 + number)
  _snapshot(workdir, program, state, about)
  logging.info("%s has ended: %d steps, in %s.", config["stage"], total_steps, workdir)


class _RollBack(Exception):
  """A bad step, whose policy is to roll back."""

  def __init__(self, step: int, why: str):
    super().__init__(why)
    self.step, self.why = step, why


def _due(every: int, step: int) -> bool:
  return bool(every) and step % every == 0


@contextlib.contextmanager
def _spent(window: Window, watchdog: Watchdog) -> Iterator[None]:
  """Time that is no step's, however long it takes."""
  with window.paused(), watchdog.paused():
    yield


def _snapshot(
  workdir: pathlib.Path, program: Program, state: TrainState, about: Metadata
) -> None:
  """The model as it is for use and, if one is trained, the adapter by itself."""
  lora, step = program.lora, int(state.step)
  save_snapshots(workdir, program.ema, state, about, program.model_of if lora else None)
  if lora and step and distributed.is_first():
    adapter = jax.device_get(program.ema.for_use(state.ema_params))
    write_lora(workdir / "adapters" / str(step), program.model.config, adapter, lora)
