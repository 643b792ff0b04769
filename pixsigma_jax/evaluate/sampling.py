"""Images of a checkpoint for the items of a suite, resumed image by image."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import logging

from pixsigma_jax import checkpoint, command, disk, distributed, sharding
from pixsigma_jax.convert.model import Options
from pixsigma_jax.evaluate.folder import EvaluationFolder, ModelFolder
from pixsigma_jax.sample import companions, image_files, weights
from pixsigma_jax.sample.pipeline import Pipeline
from pixsigma_jax.sample.program import compute_here
from pixsigma_jax.sample.settings import Settings
from pixsigma_jax.sample.weights import Located


def find_checkpoints(
  words: Sequence[str], options: Options | None = None
) -> dict[str, Located]:
  """Snapshots by model name, from [NAME=]DIR each.

  A name that is not given is the run's own, with @STEP where two would be the same; of
  weights of another format, the file's or folder's.

  Args:
    options: what weights of other formats leave open.

  Raises:
    FileNotFoundError: there is no checkpoint; see `weights.locate`.
    ValueError: two models have one name, or options are given for none.
  """
  given, found, runs = [], [], []
  sources = []
  for word in words:
    # A folder may have an equals sign in its own name.
    name, equals, path = word.partition("=")
    named = bool(equals) and not pathlib.Path(word).exists()
    given.append(name if named else None)
    sources.append(path if named else word)
  ours = [weights.is_ours(source) for source in sources]
  for source, own in zip(sources, ours, strict=True):
    # Where all are ours, answers are refused.
    located = weights.locate(source, options if not own or all(ours) else None)
    snapshot = checkpoint.find_snapshot(located.checkpoint)
    found.append(dataclasses.replace(located, checkpoint=snapshot))
    # WORKDIR/snapshots/STEP
    runs.append(snapshot.parents[1].name if own else pathlib.Path(source).name)
  names = [name or run for name, run in zip(given, runs, strict=True)]
  if len(set(names)) < len(names):
    steps = [f"{run}@{at.checkpoint.name}" for run, at in zip(runs, found, strict=True)]
    names = [name or step for name, step in zip(given, steps, strict=True)]
  if twice := sorted({name for name in names if names.count(name) > 1}):
    raise ValueError(
      f"--checkpoints has two models called {', '.join(twice)}: tell them apart with "
      "NAME=DIR."
    )
  return dict(zip(names, found, strict=True))


def sample(
  folder: EvaluationFolder,
  name: str,
  path: pathlib.Path,
  *,
  settings: Settings,
  dtype: str,
  batch_size: int | None,
  frozen: str | os.PathLike[str] | None,
  further: companions.Located | None = None,
  replace: bool = False,
) -> ModelFolder:
  """Draws what is missing of a checkpoint's images; all processes of a job together.

  Process i of n draws items i, i + n, and so on. An image is a function of its prompt,
  seed, size and settings, so that none depends on what was there already.

  Args:
    name: of the model.
    path: of its snapshot.
    settings: of sampling; seeds and sizes are the items' own.
    batch_size: images that a process draws together; None for one a device.
    frozen: see `Pipeline.from_checkpoint`.
    further: what draws beside it.
    replace: see `EvaluationFolder.begin_model`.

  Raises:
    FileExistsError: the name is taken by another checkpoint or other settings.
    ValueError: the model cannot draw a prompt or a size.
  """
  snapshot = checkpoint.read_snapshot(path).with_fingerprint()
  origin = {"kind": "checkpoint", **snapshot.origin}
  del snapshot
  identities = {} if further is None else further.identities()
  about = {**settings.of_all(), "dtype": dtype, **identities}
  if distributed.is_first():
    found = origin.pop("path")
    folder.begin_model(name, path=found, origin=origin, settings=about, replace=replace)
  distributed.wait_for_all()
  model = folder.model(name)
  index, count = jax.process_index(), jax.process_count()
  mine = {item.id for item in folder.items[index::count]}
  of_all = model.missing()
  missing = [(item, copy) for item, copy in of_all if item.id in mine]
  # Decided by all: to read a checkpoint they must all come, those with nothing to draw
  # too.
  if not distributed.of_first(bool(of_all)):
    logging.info("All images of %s are there.", name)
    return model

  devices = jax.local_devices()
  size = len(devices) if batch_size is None else batch_size
  pipeline = Pipeline.from_checkpoint(
    path,
    frozen=frozen,
    compute=compute_here(dtype),
    batch_size=size,
    mesh=sharding.mesh_of_rows(size, devices),
    **({} if further is None else further.arguments),
  )
  if missing:
    _draw(pipeline, model, missing, settings)
  distributed.wait_for_all()
  return model


def _draw(
  pipeline: Pipeline,
  model: ModelFolder,
  missing: Sequence[Any],
  settings: Settings,
) -> None:
  sizes = [item.size(pipeline.resolution) for item, _ in missing]
  drawn = pipeline.stream(
    [item.prompt for item, _ in missing],
    **_shared(settings),
    seed=[item.seed + copy for item, copy in missing],
    height=[height for height, _ in sizes],
    width=[width for _, width in sizes],
  )
  images = model.path / "images"
  images.mkdir(parents=True, exist_ok=True)
  disk.remove_abandoned(images)
  total = len(missing)
  done = 0
  try:
    for number, image, about in command.progress(drawn, total, f"{model.name}"):
      item, copy = missing[number]
      image_files.save(model.image_path(item, copy), image, about, of_many=True)
      done += 1
  except KeyboardInterrupt:
    raise command.Interrupted(
      f"{done} of {total} images of {model.name} are written to {images}. The same "
      "command draws the others."
    ) from None


def _shared(settings: Settings) -> Mapping[str, Any]:
  """Settings that all images share, as `Pipeline.stream` takes them."""
  return settings.of_all()
