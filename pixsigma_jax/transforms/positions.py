"""Carries a model to the next resolution: position-embedding interpolation.

Neither α nor Σ has a learned table of positions that could be resampled, but a fixed
field (`models/positions.py`; `convert` refuses a `pos_embed` that is another). So both
transforms change two hyper-parameters and hand every parameter on as it is.
"""

import dataclasses
from typing import Any

from pixsigma_jax.models.pixart import PixArtConfig


def interpolate_pe(
  config: PixArtConfig, params: Any, *, base_size: int
) -> tuple[PixArtConfig, Any]:
  """Fits the finer grid of `base_size` into the range of positions the model knows.

  PixArt-Σ, section 3.4, "PE Interp.": positions of a grid of `base_size` span what
  those of the old base size spanned.

  Args:
    base_size: token grid side of the new resolution.

  Raises:
    ValueError: `base_size` is below 1.
  """
  extended, params = extend_pe(config, params, base_size=base_size)
  scale = config.pe_interpolation * base_size / config.base_size
  return dataclasses.replace(extended, pe_interpolation=scale), params


def extend_pe(
  config: PixArtConfig, params: Any, *, base_size: int
) -> tuple[PixArtConfig, Any]:
  """Extends the positions beyond what the model knows, at the old spacing.

  What a change of resolution does without interpolation: the baseline of the paper's
  comparison (figure 8b). Arguments and errors as `interpolate_pe`.
  """
  if base_size < 1:
    raise ValueError(f"base_size {base_size} must be at least 1.")
  return dataclasses.replace(config, base_size=base_size), params
