"""Images to edit: read, checked, and as latents and masks of the size that is drawn.

An image is not cropped: it is stretched to the size that the model draws at, by a few
percent in the training's sizes, and what is drawn is stretched back.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from PIL import Image

from pixsigma_jax.data import image_bytes
from pixsigma_jax.data.buckets import Bucket
from pixsigma_jax.sample import image_files

# How much of an image is drawn anew by default, without a mask and with one.
IMAGE_STRENGTH, MASK_STRENGTH = 0.8, 1.0
_WHITE = 128  # gray of a mask, of 255, from which on it is white


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
  """An image to edit.

  Attributes:
    image: upright, in sRGB.
    mask: True where it is drawn anew; None draws all of it anew.
    name: of its file, if it has one.
  """

  image: UInt8[np.ndarray, "H W 3"]
  mask: Bool[np.ndarray, "H W"] | None = None
  name: str | None = None

  @property
  def size(self) -> tuple[int, int]:
    """Height and width in pixels."""
    return self.image.shape[0], self.image.shape[1]

  def about(self, strength: float) -> dict[str, Any]:
    """What an image's settings say of its source."""
    about: dict[str, Any] = {"image_digest": digest(self.image), "strength": strength}
    if self.name is not None:
      about["image_name"] = self.name
    if self.mask is not None:
      about["mask_image_digest"] = digest(self.mask)
    return about

  def at(self, drawn: Bucket) -> Float32[np.ndarray, "h w 3"]:
    """The image in [-1, 1], stretched to the size that is drawn."""
    image = image_files.stretch(Image.fromarray(self.image), *drawn)
    return np.asarray(image_files.from_image(image), np.float32)

  def mask_at(self, drawn: Bucket, downsampling: int) -> Bool[np.ndarray, "h w"] | None:
    """True for latents of which any pixel is drawn anew, at the size that is drawn."""
    if self.mask is None:
      return None
    levels = Image.fromarray(self.mask.astype(np.uint8) * 255)
    size = (drawn.width, drawn.height)
    # Means over all pixels in reach: what is touched at all is above 0.
    touched: np.ndarray = np.asarray(levels.resize(size, Image.Resampling.BOX)) > 0
    height, width = (side // downsampling for side in drawn)
    cells = touched.reshape(height, downsampling, width, downsampling)
    return np.any(cells, axis=(1, 3))

  def over(self, drawn: Image.Image) -> Image.Image:
    """What was drawn, of the image's size, with all pixels outside of the mask."""
    if self.mask is None:
      return drawn
    return Image.fromarray(
      np.where(self.mask[..., None], np.asarray(drawn), self.image)
    )

  def over_array(
    self, drawn: Float32[np.ndarray, "H W 3"]
  ) -> Float32[np.ndarray, "H W 3"]:
    """As `over`, of numbers from 0 to 1."""
    if self.mask is None:
      return drawn
    return np.where(self.mask[..., None], drawn, self.image.astype(np.float32) / 255)

  def enlarged(self, margins: tuple[int, ...]) -> "Source":
    """The image on a larger canvas, whose margins are drawn anew.

    Args:
      margins: pixels to the left, above, to the right and below.
    """
    left, above, right, below = margins
    sides = ((above, below), (left, right))
    mask = np.zeros(self.size, bool) if self.mask is None else self.mask
    return Source(
      np.pad(self.image, (*sides, (0, 0)), mode="edge"),
      np.pad(mask, sides, constant_values=True),
      self.name,
    )


def sources(
  image: Any,
  mask_image: Any,
  count: int,
  margins: tuple[int, ...] | None,
) -> list[Source | None]:
  """The image to edit of each of `count` prompts; None for those that have none.

  Args:
    image, mask_image: one for all, or a list with one for each: a path, the bytes of a
      file, a PIL image, or a uint8 array `[H W 3]`. A mask may be `[H W]` or bool, and
      is white where the image is drawn anew.
    margins: see `Source.enlarged`.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: one cannot be read, or they do not go together.
  """
  images = _each("image", image, count)
  masks = _each("mask_image", mask_image, count)
  found: dict[tuple[int, int], Source] = {}
  result: list[Source | None] = []
  for i, pair in enumerate(zip(images, masks, strict=True)):
    one, mask = pair
    if one is None:
      for name, value in (("mask_image", mask), ("outpaint", margins)):
        if value is not None:
          raise ValueError(
            f"{name} is of an image, and prompt {i} has none: give image."
          )
      result.append(None)
      continue
    ids = id(one), id(mask)  # one that all prompts share is read once
    if ids not in found:
      found[ids] = _source(i, one, mask, margins)
    result.append(found[ids])
  return result


def digest(*arrays: np.ndarray) -> str:
  """The first half of a SHA-256 of arrays, in hexadecimal digits."""
  whole = hashlib.sha256()
  for array in arrays:
    whole.update(f"{array.dtype}{array.shape}".encode())
    whole.update(np.ascontiguousarray(array).tobytes())
  return whole.hexdigest()[:32]


def _source(i: int, image: Any, mask: Any, margins: tuple[int, ...] | None) -> Source:
  name = pathlib.Path(image).name if isinstance(image, str | os.PathLike) else None
  source = Source(_pixels("image", image), None, name)
  if mask is not None:
    levels = _pixels("mask_image", mask, is_mask=True)
    if levels.shape != source.image.shape:
      ours, theirs = (
        " x ".join(map(str, array.shape[:2])) for array in (source.image, levels)
      )
      raise ValueError(
        f"The image of prompt {i} has {ours} pixels (height x width) and its "
        f"mask_image {theirs}: resize one of them, so that they lie on each other."
      )
    source = dataclasses.replace(source, mask=_white(levels))
  return source if margins is None else source.enlarged(margins)


def mask_of(name: str, value: Any) -> Bool[np.ndarray, "H W"]:
  """A mask of any kind, True where it is white.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it cannot be read.
  """
  return _white(_pixels(name, value, is_mask=True))


def _white(levels: UInt8[np.ndarray, "H W 3"]) -> Bool[np.ndarray, "H W"]:
  return np.asarray(Image.fromarray(levels).convert("L")) >= _WHITE


def _each(name: str, value: Any, count: int) -> Sequence[Any]:
  several = isinstance(value, list | tuple) or getattr(value, "ndim", 0) == 4
  if not several:
    return [value] * count
  if len(value) != count:
    raise ValueError(
      f"{name} has {len(value)} values for {count} prompts: give one for all, or one "
      "for each."
    )
  return list(value)


def _pixels(
  name: str, value: Any, *, is_mask: bool = False
) -> UInt8[np.ndarray, "H W 3"]:
  """An image of any kind as it is displayed."""
  if isinstance(value, str | os.PathLike):
    path = pathlib.Path(value)
    try:
      data = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
      raise FileNotFoundError(f"{name}: there is no file {path}.") from None
    return np.asarray(_opened(f"{name} {path}", data))
  if isinstance(value, bytes):
    return np.asarray(_opened(name, value))
  if isinstance(value, Image.Image):
    try:
      return np.asarray(image_bytes.displayed(value))
    except ValueError as error:
      raise ValueError(f"{name} cannot be read: {error}.") from error
  array = np.asarray(value)
  if is_mask and array.ndim == 2 and array.dtype in (bool, np.uint8):
    levels = array.astype(np.uint8) * (255 if array.dtype == bool else 1)
    return np.repeat(levels[..., None], 3, axis=-1)
  if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
    raise ValueError(
      f"{name} must be a path, a file's bytes, a PIL image or an array [H W 3] of "
      f"uint8, not {type(value).__name__} of {array.dtype} {array.shape}."
    )
  return array


def _opened(name: str, data: bytes) -> Image.Image:
  try:
    return image_bytes.open_image(data)
  except ValueError as error:
    raise ValueError(f"{name} cannot be read: {error}.") from error
