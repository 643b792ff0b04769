"""Fine texture of images: GLCM, bytes as JPEG, seams of tiles, spectrum."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import UInt8

from pixsigma_jax.evaluate.items import Item
from pixsigma_jax.evaluate.metrics import (
  compression_ratio,
  glcm_entropy,
  glcm_score,
  high_frequency_share,
  seam_score,
)
from pixsigma_jax.evaluate.options import Option
from pixsigma_jax.evaluate.scorers import ScorerType

_QUALITY = 95  # of Pillow's JPEG, as Diffusion-4K has it

_PERIOD = Option(
  "seam_period",
  768,
  "Pixels between the starts of the tiles that an autoencoder decodes; 768 is ours at "
  "4096 pixels, 512 at 2048.",
  int,
)


@dataclasses.dataclass(frozen=True)
class Texture:
  """Texture of one image at a time, however large.

  Attributes:
    period: pixels between two borders of tiles.
    batch_size: one, so that memory does not grow with the images.
  """

  period: int
  batch_size: int = 1

  def __post_init__(self):
    if self.period < 2:
      raise ValueError(f"--seam_period={self.period} must be at least 2.")

  def identity(self) -> dict[str, str]:
    return {
      "seam_period": str(self.period),
      "jpeg": f"Pillow's, quality {_QUALITY}",
      "version": "1",
    }

  def schema(self) -> pa.Schema:
    number = pa.float64()
    return pa.schema(
      [
        ("glcm_score", number),
        ("glcm_entropy", number),
        ("pixel_bytes", pa.int64()),
        ("jpeg_bytes", pa.int64()),
        ("seam_score", number),  # null where no border lies inside the image
        ("high_frequency_share", number),
      ]
    )

  def __call__(
    self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], items: Sequence[Item]
  ) -> Mapping[str, Any]:
    columns: dict[str, list[Any]] = {name: [] for name in self.schema().names}
    for image in images:
      columns["glcm_score"].append(glcm_score(image))
      columns["glcm_entropy"].append(glcm_entropy(image))
      columns["pixel_bytes"].append(image.size)
      ratio = compression_ratio([image], quality=_QUALITY)
      columns["jpeg_bytes"].append(round(image.size / ratio))
      columns["seam_score"].append(self._seams(image))
      columns["high_frequency_share"].append(high_frequency_share(image))
    return columns

  def _seams(self, image: UInt8[np.ndarray, "_ _ 3"]) -> float | None:
    if min(image.shape[:2]) <= self.period:
      return None
    return seam_score(image, self.period)


SCORERS = {
  "texture": ScorerType(
    options=(_PERIOD,), load=lambda options: Texture(options["seam_period"])
  )
}
