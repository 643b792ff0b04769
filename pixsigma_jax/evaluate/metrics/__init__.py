"""Metrics of images, each by its published definition, on features or on pixels.

Nothing here knows a network: features, probabilities and texts are made elsewhere.
`docs/evaluation.md` has each definition with its source.
"""

from pixsigma_jax.evaluate.metrics.distributions import (
  Statistics,
  cmmd,
  fid,
  inception_score,
  kid,
)
from pixsigma_jax.evaluate.metrics.patches import patch_positions, patches
from pixsigma_jax.evaluate.metrics.text import (
  TextAccuracy,
  TextCounts,
  sum_counts,
  text_accuracy,
  text_counts,
)
from pixsigma_jax.evaluate.metrics.texture import (
  compression_ratio,
  glcm_entropy,
  glcm_score,
  high_frequency_share,
  seam_score,
)

__all__ = [
  "Statistics",
  "TextAccuracy",
  "TextCounts",
  "cmmd",
  "compression_ratio",
  "fid",
  "glcm_entropy",
  "glcm_score",
  "high_frequency_share",
  "inception_score",
  "kid",
  "patch_positions",
  "patches",
  "seam_score",
  "sum_counts",
  "text_accuracy",
  "text_counts",
]
