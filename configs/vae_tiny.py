"""Two small autoencoders, for swapping one for the other (PixArt-Σ, figure 8a).

  python -m pixsigma_jax.reproduce figure8a --output=runs/reproduce

trains both, `first` and then `second`: 4 pixels to a latent, four channels, on crops of
the photographs in the wheels of scikit-learn and scikit-image, and on handwritten
digits. Not a stage: `reproduce/autoencoder.py` trains it.

Hardware: two CPU cores. Expect: docs/results/figure8a.md.
"""

import ml_collections

from pixsigma_jax.train.config import choose

# Argument → channels from the image's resolution to the latents', and seed.
_WHICH = {"first": ((16, 16, 32), 0), "second": ((24, 24, 48), 1)}


def get_config(which: str = "first") -> ml_collections.ConfigDict:
  """The narrow one that a model begins with, or the wider one that it moves to."""
  channels, seed = choose(which, _WHICH)
  return ml_collections.ConfigDict(
    {
      "channels": channels,
      "blocks_per_level": 1,
      "latent_channels": 4,
      "norm_groups": 8,
      "seed": seed,
      "total_steps": 3000,
      "batch_pixels": 16 * 32**2,
      # Sides in turn: norms see a whole image, and learned of one digit alone would know
      # nothing of several.
      "crops": (32, 64),
      "photographs": 0.5,  # share of crops; the others are digits
      "learning_rate": 2e-3,
      "kl_weight": 1e-4,  # of the divergence over pixels, beside the error of a value
    }
  )
