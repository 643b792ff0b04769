"""The former name of `sample/encoders.py`, for one release."""

import warnings

from pixsigma_jax.sample.encoders import (
  RememberedCaptions,
  load_autoencoder,
  load_text_encoder,
)

__all__ = ["RememberedCaptions", "load_autoencoder", "load_text_encoder"]

warnings.warn(
  "pixsigma_jax.sample.frozen is called pixsigma_jax.sample.encoders now; the old name "
  "goes with the next release.",
  DeprecationWarning,
  stacklevel=2,
)
