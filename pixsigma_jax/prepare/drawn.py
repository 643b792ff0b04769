"""Datasets of drawn scenes: written in one go, and known again when they are finished.

What is drawn is a function of a seed, so a dataset is known by a few of its records.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Container, Iterator

import numpy as np
from jaxtyping import Float

from pixsigma_jax import command, metadata
from pixsigma_jax.data.records import MANIFEST, Dataset, Features, Record, open_dataset
from pixsigma_jax.data.writing import RecordWriter
from pixsigma_jax.models.hashed_words import HashedWordEncoder
from pixsigma_jax.models.pixels import PixelAutoencoder

# Records are drawn at the size that they are kept at.
CROP_RULE = {"name": "none"}


def check_drawing(count: int, seed: int) -> None:
  """Refuses a number of records, or a seed, from which nothing can be drawn.

  Raises:
    ValueError: `count` is below 1, or `seed` below 0.
  """
  if count < 1:
    raise ValueError(f"count {count} must be at least 1.")
  if seed < 0:
    raise ValueError(f"seed {seed} must not be negative.")


def pixel_features(
  *,
  resolution: int,
  caption_length: int,
  scaling_factor: float,
  license: str = "",
) -> Features:
  """Features of records of pixels and hashed words, which need no network's files.

  Args:
    scaling_factor: what the trainer multiplies pixels with.

  Raises:
    ValueError: `scaling_factor` is not a positive number.
  """
  if not (np.isfinite(scaling_factor) and scaling_factor > 0):
    raise ValueError(f"scaling_factor {scaling_factor} must be positive.")
  autoencoder, text_encoder = PixelAutoencoder(scaling_factor), HashedWordEncoder()
  return Features(
    kind="latents",
    channels=autoencoder.channels,
    resolution=resolution,
    autoencoder=autoencoder.identity,
    scaling_factor=scaling_factor,
    text_encoder=text_encoder.identity,
    caption_storage="embeddings",
    caption_length=caption_length,
    caption_width=text_encoder.width,
    crop_rule=CROP_RULE,
    hashes={},
    license=license,
  )


def write_drawn(
  directory: pathlib.Path,
  features: Features,
  null_caption: Float[np.ndarray, "t e"] | None,
  records: Callable[[Container[int]], Iterator[Record]],
  *,
  count: int,
  compared: int = 16,
) -> bool:
  """Writes `count` drawn records, unless the very same ones are there.

  Args:
    directory: new, empty, or left behind by an interrupted run, which starts over.
    null_caption: see `RecordWriter`.
    records: those of the dataset's records whose number is among its argument.
    compared: records by which a finished dataset is known again.

  Returns:
    Whether anything was written; False if the very same dataset was there already.

  Raises:
    FileExistsError: the directory holds another dataset, or files of someone else.
    OSError: a file cannot be written.
  """
  if (directory / MANIFEST).exists():
    _check_same(open_dataset(directory), features, records, count, compared)
    return False
  with RecordWriter(directory, features, null_caption) as writer:
    for record in command.progress(records(range(count)), count, "Records"):
      writer.write(record)
  return True


def _check_same(
  dataset: Dataset,
  features: Features,
  records: Callable[[Container[int]], Iterator[Record]],
  count: int,
  compared: int,
) -> None:
  """Refuses a finished dataset that is not the one that was asked for."""
  have, want = map(dataclasses.asdict, (dataset.manifest.features, features))
  lines = metadata.disagreements(
    {**have, "count": len(dataset)}, {**want, "count": count}
  )
  if not lines:
    numbers = np.unique(np.linspace(0, count - 1, compared).astype(int)).tolist()
    asked = records(numbers)
    for there, here in zip(dataset.read(numbers), asked, strict=True):
      if not _same(there, here):
        lines = [f"record {there.id} → {here.id}, of another seed or version"]
        break
  if lines:
    raise FileExistsError(
      f"{dataset.directory} already holds another finished dataset than the one asked "
      f"for (have → want): {'; '.join(lines)}. Choose another --output, or delete it."
    )


def _same(a: Record, b: Record) -> bool:
  names = {field.name for field in dataclasses.fields(Record)} - {"aesthetic_score"}
  if a.latent_moments is not None:
    # Of networks, whose last bits are the machine's; their weights are the manifest's.
    names -= {"latent_moments", "caption_embeddings"}
  return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names)
