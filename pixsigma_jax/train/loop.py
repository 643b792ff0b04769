"""The training of one stage, top to bottom, in the order in which things happen."""

import contextlib
import dataclasses
import pathlib
import signal
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from pixsigma_jax import checkpoint, sharding, tree
from pixsigma_jax.data import pipeline as data_pipeline
from pixsigma_jax.data.mixture import Mixture, open_mixture
from pixsigma_jax.metadata import Metadata
from pixsigma_jax.sample import frozen
from pixsigma_jax.train import agreement, sheets
from pixsigma_jax.train.config import call
from pixsigma_jax.train.metrics import MetricWriter, Window
from pixsigma_jax.train.program import make_program
from pixsigma_jax.train.progress import Progress
from pixsigma_jax.train.step import TrainState


class NonFiniteError(ArithmeticError):
  """A loss or a gradient is not a finite number."""


def train(config: Mapping[str, Any], workdir: str | pathlib.Path) -> None:
  """Trains a stage from where it is (nowhere, its parent, a checkpoint) to its end.

  Args:
    config: what a file of `configs/` returns, as a plain dict.
    workdir: the run's directory; a run that is there already is continued.

  Raises:
    ValueError, FileNotFoundError: config, data, parent and checkpoint do not fit each
      other; raised before anything is compiled.
    NonFiniteError: a loss is not finite; nothing of that step has been saved.
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
  mesh = call(sharding.make_mesh, "mesh", config["mesh"], devices=jax.devices())
  agreement.check_batch(batch_size, mesh)
  mixture = open_mixture(
    data["path"].split(","),
    weights=data["weights"],
    holdout=data["holdout"],
    split="train",
  )
  program = make_program(
    config,
    context=mesh.shape["context"],
    scaling_factor=mixture.features.scaling_factor,
  )
  model, compute = program.model.config, program.model.compute
  agreement.check_data(config, model, mixture)

  # ------------------------------------------------------------------------- state
  # From, in this order: the newest checkpoint of this run; the parent stage's
  # snapshot, through the transforms; fresh parameters. Nothing is ever built unsharded.
  abstract_state = program.abstract_state()
  places = sharding.shardings(abstract_state, mesh)
  checkpoints = checkpoint.Checkpoints(
    workdir, keep_last=every["keep_last"], keep_every=every["keep_every"]
  )
  start = checkpoints.latest_step()
  parent = None
  if start is None and config["init"]["parent"]:
    parent = checkpoint.read_snapshot(config["init"]["parent"], mesh)
    transformed = agreement.transformed(
      parent, config["init"]["transforms"], model, mesh
    )
    parent = dataclasses.replace(
      parent, params=transformed.params, metadata=transformed.metadata
    )
  if start is not None:
    stored = checkpoints.metadata(start)
    about = agreement.check_same_run(stored, config, model, mixture)
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
    placed = sharding.placed(abstract_state, places)
    state, position = checkpoints.restore(start, placed)
    first_example = data_pipeline.resume_from(position, mixture, seed=config["seed"])
  elif parent is not None:
    logging.info("Starting %s from %s.", workdir, parent.path)
    build = jax.jit(program.first_state, out_shardings=places)
    state = build(parent.params, null_caption, key)
    # The parent as the transforms left it, for looking at before any training.
    _snapshot(workdir, state, about)
  else:
    logging.info("Starting %s from fresh parameters.", workdir)
    build = jax.jit(program.fresh_state, out_shardings=places)
    state = build(init_key, null_caption, key)
  logging.info(
    "%s: %.2fM parameters, %s, mesh %s, batch %d.",
    config["stage"],
    tree.size(state.params) / 1e6,
    compute,
    dict(mesh.shape),
    batch_size,
  )

  # ------------------------------------------------------------------------ batches
  context = mesh.shape["context"]
  longest = mixture.longest_sequence(model.patch_size)
  batches = data_pipeline.batches(
    mixture,
    batch_size=batch_size,
    seed=config["seed"],
    start_example=first_example,
    patch_size=model.patch_size,
    window=model.window,
    caption_length=model.caption_length,
    long_caption_ratio=data["long_caption_ratio"],
    sequence_length=-(-longest // context) * context,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    num_threads=data["num_threads"],
    num_workers=data["num_workers"],
    damaged=data["damaged"],
    read_captions=captions.read_captions if captions else None,
  )

  def next_batch() -> dict[str, Any]:
    local = next(batches)
    batch = sharding.global_batch(local, sharding.batch_shardings(local, mesh))
    if captions and "caption_ids" in batch:
      place = batch["caption_mask"].sharding
      ids = batch.pop("caption_ids")
      embeddings = captions.embed(ids, batch["caption_mask"], place)
      batch["caption_embeddings"] = embeddings.astype(np.float16)  # as it is stored
    return batch

  step = start or 0
  if step >= total_steps:
    logging.info("%s has all its %d steps already.", workdir, total_steps)
    checkpoints.close()
    _snapshot(workdir, state, about)
    return
  batch = next_batch()
  batch_places = sharding.batch_shardings(batch, mesh)

  # ------------------------------------------------------------------------ compile
  logging.info("Compiling the train step …")
  began = time.perf_counter()
  # One program for the stage: every aspect ratio comes padded to the same length.
  compiled = (
    jax.jit(
      program.train_step,
      in_shardings=(places, batch_places),
      out_shardings=(places, sharding.replicated(mesh)),
      donate_argnums=0,
    )
    .lower(state, batch)
    .compile()
  )
  logging.info("Compiled in %.1f s.", time.perf_counter() - began)

  # --------------------------------------------------------------------------- loop
  writer = MetricWriter(workdir, step)
  progress = Progress(step, total_steps)
  window = Window(batch_size)
  signals: list[int] = []
  handlers = {
    number: signal.signal(number, lambda number, _: signals.append(number))
    for number in (signal.SIGTERM, signal.SIGINT)
  }
  sampler = None
  if logs["sample_every"] and logs["prompts"]:
    sampler = sheets.make_sampler(config, model, state, mixture, compute, captions)
  saved = start
  pending: tuple[int, Any, Any] | None = None  # the step whose metrics are not read yet

  def settle() -> None:
    """Reads what the last step measured; raises if it was not finite."""
    nonlocal pending
    if pending is not None:
      number, metrics, examples = pending
      pending = None
      metrics = jax.device_get(metrics)
      _check_finite(number, metrics, examples, mixture, workdir)
      window.add(metrics)

  def save() -> None:
    # Only what is known to be finite is saved, and hence ever written over anything.
    nonlocal saved
    settle()
    if saved != step:
      examples = first_example + (step - (start or 0)) * batch_size
      position = data_pipeline.position(mixture, seed=config["seed"], examples=examples)
      checkpoints.save(step, state, position, about)
      saved = step

  try:
    while step < total_steps and not signals:
      examples = batch["example"]
      state, metrics = compiled(state, batch)
      settle()  # of the step before: this one runs meanwhile
      step += 1
      pending = (step, metrics, examples)
      if step < total_steps:
        with window.waiting_for_data():
          batch = next_batch()

      if step % logs["every"] == 0 or step == total_steps:
        settle()
        values = window.close()
        # The rate of the update that was just made.
        values["learning_rate"] = float(np.asarray(program.learning_rate(step - 1)))
        writer.write(step, values)
        progress.report(step, values)
      else:
        progress.advance(step)
      if every["every"] and step % every["every"] == 0:
        save()
      if every["snapshot_every"] and step % every["snapshot_every"] == 0:
        save()
        _snapshot(workdir, state, about)
      if sampler and step % logs["sample_every"] == 0:
        settle()
        with window.paused():
          sheets.write_sheet(sampler, state, logs["prompts"], workdir, step, writer)
    save()
    checkpoints.wait()
  except BaseException:
    # Whatever ends the run, a checkpoint that is being written is let finish.
    with contextlib.suppress(checkpoint.SavingError):
      checkpoints.close()
    raise
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)
    progress.close()
    writer.close()
    batches.close()
  checkpoints.close()

  if step < total_steps:
    name = signal.Signals(signals[0]).name
    logging.info(
      "Stopped by %s at step %d, which is saved. The same command goes on.", name, step
    )
    raise SystemExit(128 + signals[0])
  _snapshot(workdir, state, about)
  logging.info("%s has ended: %d steps, in %s.", config["stage"], total_steps, workdir)


def _snapshot(workdir: pathlib.Path, state: TrainState, about: Metadata) -> None:
  checkpoint.save_snapshot(
    workdir,
    int(state.step),
    params=state.ema_params,
    null_caption=state.null_caption,
    metadata=about,
  )


def _check_finite(
  step: int, metrics: Any, examples: Any, mixture: Mixture, workdir: pathlib.Path
) -> None:
  watched = ("loss", "norm/gradients", "norm/params")
  if all(np.isfinite(metrics[name]) for name in watched):
    return
  bad = np.flatnonzero(~np.isfinite(metrics["example_loss"]))
  which = "no example of its own, every one's loss is finite"
  if len(bad):
    numbers = np.asarray(examples)[bad].tolist()
    names = [
      f"{mixture.read([number])[0].id} (record {number})" for number in numbers[:8]
    ]
    which = f"the examples {', '.join(names)}"
    which += f" and {len(bad) - 8} more" if len(bad) > 8 else ""
  raise NonFiniteError(
    f"{', '.join(f'{name} {float(metrics[name])}' for name in watched)} at step "
    f"{step}, from {which} of {mixture}. Nothing of this step is saved. "
    f"Look at these records, or lower config.optimizer.learning_rate; the same "
    f"command goes on from the newest checkpoint in {workdir}."
  )
