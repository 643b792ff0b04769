"""The accelerator side of preparing: cropped images through VAE and T5 into records.

Any number of processes work on one dataset, each on shards of its own. A shard is
written whole or not at all and depends on nothing but its images, so that killed
processes, more of them or fewer, leave the same files behind.
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pixsigma_jax.convert import t5, vae
from pixsigma_jax.data.writing import begin_dataset
from pixsigma_jax.prepare import contents, load
from pixsigma_jax.prepare.compare import is_finished, make_room
from pixsigma_jax.prepare.contents import Contents
from pixsigma_jax.prepare.cropped_images import CroppedImages
from pixsigma_jax.prepare.encode import Encode
from pixsigma_jax.prepare.reuse import Previous
from pixsigma_jax.prepare.settings import Settings
from pixsigma_jax.prepare.write import check_process, finish_with_report, write_shards


def prepare_features(
  images: CroppedImages,
  directory: str | os.PathLike[str],
  settings: Settings,
  *,
  process_index: int = 0,
  process_count: int = 1,
  devices: Sequence[Any] | None = None,
  update: bool = False,
) -> bool:
  """Writes this process's shards of records that are missing, and finishes the dataset.

  Whichever process finds that nothing is missing any more writes the manifest. Reports
  go beside the dataset, see `write.reports_of`.

  Args:
    images: cropped, all of them there.
    directory: new, or begun by the same job.
    process_index, process_count: this process takes the shards whose number leaves the
      remainder process_index when divided by process_count.
    devices: that share the work; this process's own if None.
    update: if the directory holds records of other contents, or made by other networks
      or arguments, whether the dataset is made anew: encoded is what has changed, the
      rest is taken over. What was there stays in `contents.previous_of(directory)`
      until it is finished.

  Returns:
    whether anything was missing; False if the very same dataset was there already.

  Raises:
    FileExistsError: the directory holds another dataset, or files of someone else: the
      message names what differs.
    FileNotFoundError: a network's files are missing.
    ValueError: they are not those of a VAE or T5, images are missing, no record is
      left, or an argument is out of its range.
    OSError: a file cannot be written.
  """
  directory = pathlib.Path(directory)
  check_process(process_index, process_count)
  if missing := images.missing():
    raise ValueError(
      f"{len(missing)} of {images.num_shards} shards of images are missing in "
      f"{images.directory}, the first is {missing[0]}: finish --parts=pictures first."
    )
  folder = pathlib.Path(settings.frozen)
  devices = jax.local_devices() if devices is None else devices
  mesh = load.mesh_of(devices, data=len(devices))
  autoencoder = vae.load_autoencoder(folder / "vae", dtype=jnp.float32, mesh=mesh)
  t5_config = t5.text_encoder_config(folder / "text_encoder")
  features = load.features_of(
    settings,
    autoencoder,
    t5_config,
    resolution=images.resolution,
    crop_rule=images.crop_rule,
  )
  made_of = _made_of(images, settings)
  if update:
    make_room(directory, features, images.num_shards, made_of, process_index)
  if is_finished(directory, features, images.num_shards, made_of):
    contents.drop_previous(directory)
    return False
  shapes = {size for i in range(images.num_shards) for size in images.sizes(i)}
  autoencoder = load.in_tiles(autoencoder, shapes, settings.tile_size)
  encoder = load.text_encoder(folder, settings, t5_config, devices)
  null_caption = None
  if settings.captions == "embeddings":
    # Where padding is, too: as the reference's file of it.
    null_caption = encoder.encode([""], settings.caption_length)[0][0]
  try:
    unfinished = begin_dataset(directory, features, null_caption, images.num_shards)
  except FileExistsError:
    # Loading T5 takes minutes, in which others may have written the last shards.
    if is_finished(directory, features, images.num_shards, made_of):
      return False
    raise
  if made_of is not None:
    made_of.write(directory)
  previous = Previous(directory, features, made_of)
  encode = Encode(images, settings, autoencoder, encoder, len(devices), previous)
  sizes = [len(images.ids(shard)) for shard in range(images.num_shards)]
  write_shards(unfinished, encode, process_index, process_count, sizes)
  if finish_with_report(unfinished, images.refusals()):
    contents.drop_previous(directory)
  return True


def _made_of(images: CroppedImages, settings: Settings) -> Contents | None:
  """Contents of the records of cropped images, and how they are made."""
  made_of = images.contents()
  if made_of is None:
    return None
  how = {
    "truncate_captions": settings.truncate_captions,
    "text_dtype": jnp.dtype(settings.text_dtype).name,
    "tile_size": settings.tile_size,
  }
  if settings.captions == "text":
    del how["text_dtype"]
  return dataclasses.replace(made_of, settings=how)
