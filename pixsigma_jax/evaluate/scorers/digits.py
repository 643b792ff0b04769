"""The reader of handwritten digits as a scorer: whether an image shows its scene."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import UInt8

from pixsigma_jax.data import digits
from pixsigma_jax.evaluate.digits import prompt_accuracy
from pixsigma_jax.evaluate.items import Item
from pixsigma_jax.evaluate.scorers import ScorerType


class DigitReader:
  """Scores 1 where every digit and color is in its place."""

  batch_size = 256

  def identity(self) -> dict[str, str]:
    return {"reader": "support vectors of scikit-learn's digits", "version": "1"}

  def schema(self) -> pa.Schema:
    return pa.schema([("right", pa.bool_())])

  def __call__(
    self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], items: Sequence[Item]
  ) -> Mapping[str, Any]:
    scenes = [digits.parse(item.prompt) for item in items]
    pixels = [image.astype(np.float32) / 127.5 - 1 for image in images]
    return {"right": prompt_accuracy(pixels, scenes)}


SCORERS = {"digits": ScorerType(options=(), load=lambda _options: DigitReader())}
