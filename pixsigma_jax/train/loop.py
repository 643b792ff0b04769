"""The training of one stage, top to bottom, in the order in which things happen."""

import contextlib
import dataclasses
import json
import pathlib
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from pixsigma_jax import checkpoint, metadata, sharding, tree
from pixsigma_jax.data import pipeline as data_pipeline
from pixsigma_jax.data.mixture import Mixture, open_mixture
from pixsigma_jax.diffusion.schedule import linear_schedule
from pixsigma_jax.metadata import Metadata
from pixsigma_jax.models.autoencoders import downsampling
from pixsigma_jax.models.layers import Compute
from pixsigma_jax.models.pixart import PixArt, PixArtConfig, init_params
from pixsigma_jax.sample import frozen
from pixsigma_jax.sample.pipeline import Pipeline
from pixsigma_jax.train.config import (
  DATA_FIELDS,
  FIELDS,
  call,
  check_fields,
  model_config,
)
from pixsigma_jax.train.loss import make_loss
from pixsigma_jax.train.metrics import MetricWriter, Window
from pixsigma_jax.train.optimizer import make_optimizer, make_schedule
from pixsigma_jax.train.progress import Progress
from pixsigma_jax.train.step import TrainState, init_state, make_train_step
from pixsigma_jax.transforms import Model, apply_transforms


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
  check_fields("", config, FIELDS)
  check_fields("init", config["init"], ("parent", "transforms"))
  check_fields("data", config["data"], DATA_FIELDS)
  check_fields(
    "checkpoint",
    config["checkpoint"],
    ("every", "keep_last", "keep_every", "snapshot_every"),
  )
  check_fields("log", config["log"], ("every", "sample_every", "prompts"))
  if config["init"]["transforms"] and not config["init"]["parent"]:
    raise ValueError(
      "config.init.transforms are for a parent, and config.init.parent is empty: name "
      "the parent's --workdir, or give no transforms."
    )
  if config["log"]["every"] < 1:
    raise ValueError(f"config.log.every={config['log']['every']} must be at least 1.")
  every, logs = config["checkpoint"], config["log"]
  total_steps, batch_size = config["total_steps"], config["batch_size"]
  model_fields = model_config(config["model"])
  mesh = call(sharding.make_mesh, "mesh", config["mesh"], devices=jax.devices())
  compute = call(
    Compute, "compute", config["compute"], merge_rows=mesh.shape["context"] == 1
  )
  data = config["data"]
  mixture = open_mixture(
    data["path"].split(","),
    weights=data["weights"],
    holdout=data["holdout"],
    split="train",
  )
  _check_data(model_fields, mixture)
  _check_hashes(data["hashes"], mixture)
  _check_batch(batch_size, mesh)

  # --------------------------------------------- model, loss, optimizer, train step
  schedule = linear_schedule()
  model = PixArt(model_fields, compute)
  loss_fn = call(
    make_loss,
    "loss",
    config["loss"],
    model,
    schedule,
    scaling_factor=mixture.features.scaling_factor,
  )
  rates = ("learning_rate", "schedule", "warmup_steps")
  optimizer = dict(config["optimizer"])
  check_fields("optimizer", {r: 0 for r in rates if r in optimizer}, rates)
  learning_rate = make_schedule(
    **{rate: optimizer.pop(rate) for rate in rates}, total_steps=total_steps
  )
  tx = call(make_optimizer, "optimizer", optimizer, learning_rate)
  train_step = make_train_step(
    loss_fn,
    tx,
    ema_decay=config["ema_decay"],
    num_timesteps=schedule.num_timesteps,
  )

  # ------------------------------------------------------------------------- state
  # From, in this order: the newest checkpoint of this run; the parent stage's
  # snapshot, through the transforms; fresh parameters. Nothing is ever built unsharded.
  init_key, key = jax.random.split(jax.random.key(config["seed"]))
  captions = None  # who embeds those that are stored as text
  if mixture.null_caption is None:
    captions = frozen.load_text_encoder(
      mixture.features, config["frozen"] or None, dtype=compute.dtype, mesh=mesh
    )
    null_captions, _ = captions.encode([""], model_fields.caption_length)
    null_caption = null_captions[0]
  else:
    null_caption = mixture.null_caption[: model_fields.caption_length]
  null_caption = null_caption.astype(np.float32)

  def fresh(init_key: Any, key: Any, null_caption: Any) -> TrainState:
    return init_state(init_params(model_fields, init_key), null_caption, tx, key)

  abstract_state = jax.eval_shape(fresh, init_key, key, null_caption)
  places = sharding.shardings(abstract_state, mesh)
  checkpoints = checkpoint.Checkpoints(
    workdir, keep_last=every["keep_last"], keep_every=every["keep_every"]
  )
  start = checkpoints.latest_step()
  parent = None
  if start is None and config["init"]["parent"]:
    parent = checkpoint.read_snapshot(config["init"]["parent"], mesh)
    transformed = _transformed(parent, config["init"]["transforms"], model_fields, mesh)
    parent = dataclasses.replace(
      parent, params=transformed.params, metadata=transformed.metadata
    )
  if start is not None:
    about = _check_same_run(checkpoints.metadata(start), config, model_fields, mixture)
  else:
    about = _metadata(config, model_fields, mixture, parent)

  first_example = 0
  if start is not None:
    logging.info("Resuming %s from step %d.", workdir, start)
    placed = sharding.placed(abstract_state, places)
    state, position = checkpoints.restore(start, placed)
    first_example = data_pipeline.resume_from(position, mixture, seed=config["seed"])
  elif parent is not None:
    logging.info("Starting %s from %s.", workdir, parent.path)
    build = jax.jit(lambda p, n, k: init_state(p, n, tx, k), out_shardings=places)
    state = build(parent.params, null_caption, key)
    # The parent as the transforms left it, for looking at before any training.
    _snapshot(workdir, state, about)
  else:
    logging.info("Starting %s from fresh parameters.", workdir)
    state = jax.jit(fresh, out_shardings=places)(init_key, key, null_caption)
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
  longest = mixture.longest_sequence(model_fields.patch_size)
  batches = data_pipeline.batches(
    mixture,
    batch_size=batch_size,
    seed=config["seed"],
    start_example=first_example,
    patch_size=model_fields.patch_size,
    window=model_fields.window,
    caption_length=model_fields.caption_length,
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
      train_step,
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
    sampler = _sampler(config, model_fields, state, mixture, compute, captions)
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
        values["learning_rate"] = float(np.asarray(learning_rate(step - 1)))
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
          _write_samples(sampler, state, logs["prompts"], workdir, step, writer)
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


def _check_data(model: PixArtConfig, mixture: Mixture) -> None:
  """Compares the model's hyper-parameters with what the mixture holds."""
  features = mixture.features
  pairs = {
    "in_channels": (model.in_channels, features.channels),
    "caption_width": (model.caption_width, features.caption_width),
  }
  for name, (ours, theirs) in pairs.items():
    if ours != theirs:
      raise ValueError(
        f"config.model.{name}={ours}, but {mixture} was prepared with "
        f"{theirs}: change the one or prepare the other again."
      )
  latents = features.resolution / downsampling(features.autoencoder)
  side = latents / model.patch_size
  if side != model.base_size:
    raise ValueError(
      f"config.model.base_size={model.base_size}, but {mixture} holds images "
      f"of {features.resolution} pixels, {side:g} tokens a side: set base_size="
      f"{side:g} (with pe_interpolation, see the transform interpolate_pe), or give "
      "data of the other resolution."
    )


def _check_hashes(wanted: Mapping[str, str], mixture: Mixture) -> None:
  """Compares the config's hashes, of those that it names, with the manifests'."""
  check_fields("data.hashes", wanted, ("autoencoder", "text_encoder", "crop_rule"))
  named = {name: value for name, value in wanted.items() if value}
  for dataset in mixture.datasets:
    have = {name: dataset.manifest.hashes.get(name) for name in named}
    if lines := metadata.disagreements(have, named):
      raise ValueError(
        f"{dataset.directory} was not prepared with what config.data.hashes names "
        f"(have → want): {'; '.join(lines)}. Prepare it again, or correct the config."
      )


def _check_batch(batch_size: int, mesh: Mesh) -> None:
  rows = mesh.shape["data"] * mesh.shape["fsdp"]
  if batch_size % rows:
    raise ValueError(
      f"config.batch_size={batch_size} must be a multiple of data × fsdp = {rows} of "
      f"the mesh {dict(mesh.shape)}."
    )


def _metadata(
  config: Mapping[str, Any],
  model: PixArtConfig,
  mixture: Mixture,
  parent: checkpoint.Snapshot | None,
) -> Metadata:
  """What this run's checkpoints will say about themselves."""
  entry: dict[str, Any] = {
    "stage": config["stage"],
    "parent": None,
    "transforms": list(config["init"]["transforms"]),
    "config": config,
  }
  if parent is not None:
    entry["parent"] = {
      "path": str(parent.path),
      "stage": parent.metadata.stage,
      "step": parent.step,
    }
  features = mixture.features
  about = Metadata(
    stage=config["stage"],
    model=_as_dict(model),
    autoencoder=dict(features.autoencoder),
    scaling_factor=features.scaling_factor,
    text_encoder=dict(features.text_encoder),
    resolution=features.resolution,
    provenance=(*(parent.metadata.provenance if parent else ()), entry),
  )
  # As it will be read: tuples become lists now, not between two saves.
  about = Metadata.from_json(json.loads(json.dumps(about.to_json())))
  if parent is not None:
    _check_inputs(parent.metadata, about, f"The parent {parent.path}", mixture)
  return about


def _check_inputs(have: Metadata, want: Metadata, whose: str, mixture: Mixture) -> None:
  """Latents and captions must come from the same frozen networks."""
  names = ("autoencoder", "scaling_factor", "text_encoder")
  lines = metadata.disagreements(
    {name: getattr(have, name) for name in names},
    {name: getattr(want, name) for name in names},
  )
  if lines:
    raise ValueError(
      f"{whose} was trained on other features than {mixture} holds: "
      f"{'; '.join(lines)}. Prepare the data with the former."
    )


def _check_same_run(
  stored: Metadata,
  config: Mapping[str, Any],
  model: PixArtConfig,
  mixture: Mixture,
) -> Metadata:
  """The stored metadata, if the config still describes the run that wrote it."""
  _refuse_disagreements(
    stored.model, model, "The checkpoint of this workdir", "choose a new --workdir"
  )
  ours = _metadata(config, model, mixture, None)
  _check_inputs(stored, ours, "This run", mixture)
  changed = metadata.disagreements(
    stored.provenance[-1]["config"], ours.provenance[-1]["config"]
  )
  if changed:
    logging.warning("The config has changed since step 0: %s.", "; ".join(changed))
  return stored


def _transformed(
  parent: checkpoint.Snapshot,
  transforms: Sequence[Mapping[str, Any]],
  want: PixArtConfig,
  mesh: Mesh,
) -> Model:
  """The parent after the transforms, which leads to the model of the config."""

  def read(path: str) -> tuple[Metadata, Callable[[], Any]]:
    about = checkpoint.read_metadata(path)
    return about, lambda: checkpoint.read_snapshot(path, mesh).params

  model = Model(
    config=parent.config,
    params=parent.params,
    null_caption=parent.null_caption,
    metadata=parent.metadata,
  )
  model = apply_transforms(model, transforms, read=read)
  _refuse_disagreements(
    model.metadata.model,
    want,
    f"The parent {parent.path} after {len(transforms)} transforms",
    "add the transform to config.init.transforms",
  )
  return model


def _refuse_disagreements(
  have: Mapping[str, Any], want: PixArtConfig, whose: str, way_out: str
) -> None:
  bridges = {
    "base_size": "interpolate_pe",
    "pe_interpolation": "interpolate_pe",
    "kv_compression": "add_kv_compression",
    "in_channels": "swap_vae",
    "caption_length": "alpha_to_sigma",
    "size_conditions": "alpha_to_sigma",
  }
  lines = metadata.disagreements(dict(have), _as_dict(want))
  if lines:
    named = {bridges.get(line.split(":")[0].split(".")[0]) for line in lines} - {None}
    bridge = f" ({', '.join(sorted(map(str, named)))} would bridge it)" if named else ""
    raise ValueError(
      f"{whose} has another model than config.model (have → want): "
      f"{'; '.join(lines)}{bridge}. Change config.model, or {way_out}."
    )


def _as_dict(model: PixArtConfig) -> dict[str, Any]:
  return json.loads(json.dumps(model.to_dict()))


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


def _sampler(
  config: Mapping[str, Any],
  model: PixArtConfig,
  state: TrainState,
  mixture: Mixture,
  compute: Compute,
  text_encoder: Any | None,
) -> Pipeline:
  """Draws the fixed prompts, whose embeddings are all that it keeps of the encoder."""
  features, source = mixture.features, config["frozen"] or None
  if text_encoder is None:
    text_encoder = frozen.load_text_encoder(features, source, dtype=compute.dtype)
  return Pipeline(
    model,
    state.ema_params,
    np.asarray(jax.device_get(state.null_caption)),
    frozen.load_autoencoder(features, source, dtype=compute.dtype),
    frozen.RememberedCaptions.of(
      text_encoder, config["log"]["prompts"], model.caption_length
    ),
    features.resolution,
    compute,
  )


def _write_samples(
  sampler: Pipeline,
  state: TrainState,
  prompts: Sequence[str],
  workdir: pathlib.Path,
  step: int,
  writer: MetricWriter,
) -> None:
  """Fixed prompts and seeds, so that the pictures of a run form a film."""
  # A copy: the next step is given the state's own buffers to write over.
  params = jax.tree.map(jnp.copy, state.ema_params)
  image = sampler.replace(params=params)(list(prompts), seed=0).grid()
  directory = workdir / "samples"
  directory.mkdir(parents=True, exist_ok=True)
  image.save(directory / f"{step:08d}.png")
  writer.write_image(step, "samples", np.asarray(image))
