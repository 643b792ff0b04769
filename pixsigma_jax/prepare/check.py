"""Checks records by eye: decodes some beside the images that they were made of."""

import math
import os
import pathlib

import jax.numpy as jnp
import numpy as np
from PIL import Image

from pixsigma_jax import disk
from pixsigma_jax.convert import vae
from pixsigma_jax.data.records import open_dataset
from pixsigma_jax.prepare.cropped_images import CroppedImages
from pixsigma_jax.prepare.load import weights_hash
from pixsigma_jax.sample import image_files

_CHECKED = 8  # records that `check` looks at
_SHEET_SIDE = 512  # pixels of an image on its sheet, at most


def check(
  images: CroppedImages,
  directory: str | os.PathLike[str],
  frozen: str,
  sheet: str | os.PathLike[str],
) -> float:
  """Decodes some records and shows them beside the images that they were made of.

  Prints each one's peak signal-to-noise ratio. With SDXL's autoencoder photographs are
  around 30 dB.

  Args:
    images: those that the dataset was made of.
    directory: of the finished dataset.
    frozen: folder with the vae/ that made it.
    sheet: PNG file to write, left the image and right the decoded record.

  Returns:
    the ratio of all pixels together, in dB.

  Raises:
    FileNotFoundError: dataset or autoencoder is not there.
    ValueError: the dataset was made with another autoencoder, or of other images.
  """
  dataset = open_dataset(directory)
  vae_folder = pathlib.Path(frozen) / "vae"
  if weights_hash(vae_folder) != dataset.manifest.hashes.get("autoencoder"):
    raise ValueError(
      f"{directory} was not made with the autoencoder of {vae_folder}: give --frozen "
      "as when it was prepared."
    )
  autoencoder = vae.load_autoencoder(vae_folder, dtype=jnp.float32)
  count = min(_CHECKED, len(dataset))
  numbers = np.linspace(0, len(dataset) - 1, count).astype(int).tolist()
  shown, labels, errors = [], [], []
  for number, record in zip(numbers, dataset.read(numbers), strict=True):
    shard, _ = dataset.place(number)
    if shard >= images.num_shards or record.id not in images.ids(shard):
      raise ValueError(
        f"{record.id} of {directory} is not among the images of "
        f"{images.directory}: give --pictures as when it was prepared."
      )
    [cropped] = images.read(shard, [images.ids(shard).index(record.id)])
    moments = record.latent_moments
    assert moments is not None  # the features say so
    mean = moments[None, ..., : dataset.manifest.channels].astype(np.float32)
    decoded = np.clip(autoencoder.decode(mean)[0], -1, 1)
    original = image_files.from_image(cropped.image())
    error = float(np.square(decoded - original).mean())
    errors.append((error, original.size))
    print(f"{_psnr(error):6.2f} dB  {record.id}")
    shown += [_small(cropped.image()), _small(image_files.to_image(decoded))]
    labels += [record.id, f"{_psnr(error):.2f} dB"]
  values, weights = zip(*errors, strict=True)
  ratio = _psnr(float(np.average(values, weights=weights)))
  print(f"{ratio:6.2f} dB  in all {count} records that were decoded")
  grid = image_files.grid(shown, columns=2, labels=labels)
  disk.write_whole(pathlib.Path(sheet), lambda partial: grid.save(partial, "png"))
  return ratio


def _psnr(error: float) -> float:
  """Peak signal-to-noise ratio in dB from the mean square error in [-1, 1]."""
  return math.inf if error == 0 else 10 * math.log10(4 / error)


def _small(image: Image.Image) -> Image.Image:
  image = image.copy()
  image.thumbnail((_SHEET_SIDE, _SHEET_SIDE))
  return image
