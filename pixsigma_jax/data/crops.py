"""Fits an image to its bucket's size: scaled to cover it, then cropped.

Source: `diffusion/data/datasets/InternalData_ms.py` of PixArt-alpha/PixArt-sigma, its
path without precomputed features. (Its feature extraction squashes images to the
bucket's size instead; nothing here does.)
"""

import dataclasses
import hashlib
import json
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float32
from PIL import Image

from pixsigma_jax.data.buckets import Bucket, Buckets, nearest

Filter: TypeAlias = Literal["bicubic", "lanczos"]

_FILTERS: dict[Filter, Image.Resampling] = {
  "bicubic": Image.Resampling.BICUBIC,
  "lanczos": Image.Resampling.LANCZOS,
}


def filter_at(resolution: int) -> Filter:
  """The filter that the reference resizes with at a resolution."""
  return "lanczos" if resolution >= 2048 else "bicubic"


class Crop(NamedTuple):
  """Scaling and cropping of images of one size.

  Attributes:
    bucket: size of the image.
    scaled_height, scaled_width: of the whole image before it is cropped, in pixels; no
      side is shorter than the bucket's.
    top, left: of the crop in the scaled image.
    box: top, left, bottom, right of what is shown, in pixels of the original.
    enlarges: whether the original is smaller than this.
  """

  bucket: Bucket
  scaled_height: int
  scaled_width: int
  top: int
  left: int
  box: Float32[np.ndarray, "4"]
  enlarges: bool


@dataclasses.dataclass(frozen=True)
class CropRule:
  """Nearest bucket by aspect ratio, scale to cover it, crop the center.

  The aspect ratio is never changed by more than rounding to whole pixels does.

  Attributes:
    buckets: sizes to choose from; of two ratios as near, the earlier one is taken.
    filter: of the resizing, Pillow's, which smooths when it shrinks.

  Raises:
    ValueError: there is no bucket.
  """

  buckets: Buckets
  filter: Filter

  def __post_init__(self):
    if not self.buckets:
      raise ValueError("A crop rule needs at least one size to choose from.")

  def plan(self, height: int, width: int) -> Crop:
    """Plans the crop of an image of `height` x `width` pixels, as it is displayed.

    Raises:
      ValueError: the image has no pixels.
    """
    if height < 1 or width < 1:
      raise ValueError(f"An image of {height}x{width} pixels cannot be cropped.")
    bucket = nearest(self.buckets, height, width)
    # The reference truncates the other side. The product comes before the division:
    # then not even rounding makes it shorter than the bucket's.
    if bucket.height / height > bucket.width / width:
      scaled_height = bucket.height
      scaled_width = int(width * bucket.height / height)
    else:
      scaled_height = int(height * bucket.width / width)
      scaled_width = bucket.width
    # torchvision's center_crop: Python's round, half to even.
    top = round((scaled_height - bucket.height) / 2)
    left = round((scaled_width - bucket.width) / 2)
    # Rows and columns have scales of their own, by less than a pixel's difference.
    rows, columns = height / scaled_height, width / scaled_width
    box = (
      top * rows,
      left * columns,
      (top + bucket.height) * rows,
      (left + bucket.width) * columns,
    )
    return Crop(
      bucket=bucket,
      scaled_height=scaled_height,
      scaled_width=scaled_width,
      top=top,
      left=left,
      box=np.array(box, np.float32),
      enlarges=scaled_height > height or scaled_width > width,
    )

  def apply(self, image: Image.Image) -> Image.Image:
    """The image at the size of its bucket, enlarged if it is smaller."""
    crop = self.plan(image.height, image.width)
    size = (crop.scaled_width, crop.scaled_height)
    if image.size != size:
      image = image.resize(size, _FILTERS[self.filter])
    right, bottom = crop.left + crop.bucket.width, crop.top + crop.bucket.height
    return image.crop((crop.left, crop.top, right, bottom))

  @property
  def identity(self) -> dict[str, Any]:
    """Identity stored in records; equal for rules that give equal images."""
    return {
      "name": "cover-center",
      "version": 1,
      "filter": self.filter,
      # In a list: which ratio comes first decides draws.
      "buckets": [[ratio, *size] for ratio, size in self.buckets.items()],
    }

  @property
  def hash(self) -> str:
    """SHA-256 of `identity`, in hex."""
    return identity_hash(self.identity)


def identity_hash(identity: Any) -> str:
  """SHA-256 of what JSON holds, in hex, whatever the order of its fields."""
  return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
