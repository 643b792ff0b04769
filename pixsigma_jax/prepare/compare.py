"""Compares the dataset that a directory holds with the one that is asked for."""

import dataclasses
import json
import pathlib
import time
from typing import Any

from absl import logging

from pixsigma_jax import disk, metadata
from pixsigma_jax.convert import files
from pixsigma_jax.data import records
from pixsigma_jax.data.records import Features, open_dataset
from pixsigma_jax.data.writing import UNFINISHED
from pixsigma_jax.prepare import contents
from pixsigma_jax.prepare.contents import Contents

# How long processes of an update wait for the first one, which makes room for it.
_SECONDS_FOR_THE_FIRST, _SECONDS_BETWEEN_LOOKS = 600, 1


def is_finished(
  directory: pathlib.Path,
  features: Features,
  num_shards: int,
  made_of: Contents | None,
  *,
  can_update: bool = True,
) -> bool:
  """Whether a directory holds the finished dataset of these features and contents.

  Args:
    can_update: whether whoever asks knows --update.

  Raises:
    FileExistsError: it holds another one, or a part of it.
  """
  finished = (directory / records.MANIFEST).exists()
  if lines := differences(directory, features, num_shards, made_of):
    way = "Give --update to encode again what has changed, c" if can_update else "C"
    raise FileExistsError(
      f"{directory} already holds another {'' if finished else 'un'}finished dataset "
      f"than the one asked for (have → want): {'; '.join(lines)}. {way}hoose another "
      "--output, or delete it."
    )
  if finished and made_of is not None and contents.read(directory) is None:
    logging.warning(
      "%s is of an earlier version, which did not note what records were made of: "
      "whether images and captions are still the same cannot be told. Delete it to "
      "make it anew.",
      directory,
    )
  return finished


def differences(
  directory: pathlib.Path,
  features: Features,
  num_shards: int,
  made_of: Contents | None,
) -> list[str]:
  """Differences of a dataset, finished or begun, from the one asked for, in words."""
  if (directory / records.MANIFEST).exists():
    manifest = open_dataset(directory).manifest
    have = {**as_json(manifest.features), "shards": len(manifest.shards)}
  elif (directory / UNFINISHED).exists():
    job = files.read_json(directory / UNFINISHED)
    have = {**job["features"], "shards": job["num_shards"]}
  else:
    return []
  lines = metadata.disagreements(have, {**as_json(features), "shards": num_shards})
  before = contents.read(directory)
  if before is not None and made_of is not None:
    lines += before.differences(made_of)
  elif made_of is not None and not (directory / records.MANIFEST).exists():
    names = map(records.SHARD.fullmatch, disk.whole_files(directory))
    if any(names):
      lines.append(
        "its first shards are by an earlier version, which noted no contents"
      )
  return lines


def make_room(
  directory: pathlib.Path,
  features: Features,
  num_shards: int,
  made_of: Contents | None,
  process_index: int,
) -> None:
  """Sets aside what is in a directory, if it differs from what is asked for.

  Of several processes the first one does, and the others wait for it.

  Raises:
    ValueError: the first one does not come.
  """
  waited = time.monotonic()
  while lines := differences(directory, features, num_shards, made_of):
    if process_index == 0:
      logging.info("Updating %s: %s.", directory, "; ".join(lines))
      is_complete = (directory / records.MANIFEST).exists()
      contents.set_aside(directory, is_complete=is_complete)
      return
    if time.monotonic() - waited > _SECONDS_FOR_THE_FIRST:
      raise ValueError(
        f"{directory} is to be updated, and process 0 has not begun to for "
        f"{_SECONDS_FOR_THE_FIRST} seconds: start it with --update too."
      )
    time.sleep(_SECONDS_BETWEEN_LOOKS)


def as_json(features: Features) -> dict[str, Any]:
  """The features as JSON gives them back."""
  return json.loads(json.dumps(dataclasses.asdict(features)))
