"""Records of an autoencoder's latents, from records of pixels."""

import collections
import dataclasses
import pathlib
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from pixsigma_jax import command
from pixsigma_jax.convert.vae import load_autoencoder
from pixsigma_jax.data.records import MANIFEST, Dataset, Record, open_dataset
from pixsigma_jax.data.writing import RecordWriter
from pixsigma_jax.models.vae import KLAutoencoder

_BATCH = 32


def encode(pixels: pathlib.Path, frozen: pathlib.Path, target: pathlib.Path) -> None:
  """Writes the same records with moments of latents, unless they are there.

  Args:
    pixels: dataset of pixels.
    frozen: folder with `vae/`.
    target: new, or left behind by an interrupted call, which starts over.

  Raises:
    FileNotFoundError: there is no dataset, or no autoencoder.
  """
  if (target / MANIFEST).exists():
    return
  dataset = open_dataset(pixels)
  autoencoder = load_autoencoder(frozen / "vae", dtype=jnp.float32)
  features = dataclasses.replace(
    dataset.manifest.features,
    kind="latent_moments",
    channels=autoencoder.channels,
    autoencoder=autoencoder.identity,
    scaling_factor=autoencoder.scaling_factor,
  )
  with RecordWriter(target, features, dataset.null_caption) as writer:
    starts = range(0, len(dataset), _BATCH)
    for start in command.progress(starts, len(starts), "Batches of latents"):
      numbers = list(range(start, min(start + _BATCH, len(dataset))))
      for record in _encoded(dataset, numbers, autoencoder):
        writer.write(record)


def _encoded(
  dataset: Dataset, numbers: Sequence[int], autoencoder: KLAutoencoder
) -> list[Record]:
  """Records in their order; those of a size are encoded together."""
  records = dataset.read(numbers)
  by_size: dict[tuple[int, ...], list[int]] = collections.defaultdict(list)
  for place, record in enumerate(records):
    assert record.latents is not None
    by_size[record.latents.shape].append(place)
  found: dict[int, Record] = {}
  for size, places in by_size.items():
    images = np.zeros((_BATCH, *size), np.float32)  # one program a size
    for row, place in enumerate(places):
      images[row] = records[place].latents
    moments = np.concatenate(autoencoder.moments(images), axis=-1).astype(np.float16)
    for row, place in enumerate(places):
      found[place] = dataclasses.replace(
        records[place], latents=None, latent_moments=moments[row]
      )
  return [found[place] for place in range(len(records))]
