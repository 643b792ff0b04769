"""The former name of `sample/image_files.py`, for one release."""

import warnings

from pixsigma_jax.sample import image_files
from pixsigma_jax.sample.image_files import (
  FORMATS,
  check_sides,
  fit,
  grid,
  next_number,
  resized_array,
  save,
  settings_of,
  stretch,
  to_bytes,
)

__all__ = [
  "FORMATS",
  "PictureFolder",
  "check_sides",
  "fit",
  "from_picture",
  "grid",
  "next_number",
  "resized_array",
  "save",
  "settings_of",
  "stretch",
  "to_bytes",
  "to_picture",
]

PictureFolder = image_files.ImageFolder
from_picture, to_picture = image_files.from_image, image_files.to_image

warnings.warn(
  "pixsigma_jax.sample.pictures is called pixsigma_jax.sample.image_files now, with "
  "ImageFolder, from_image and to_image for PictureFolder, from_picture and "
  "to_picture; the old names go with the next release.",
  DeprecationWarning,
  stacklevel=2,
)
