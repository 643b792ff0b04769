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
      "total_steps": 1500,
      "batch_size": 16,
      "crop": 32,  # pixels along a side
      "photographs": 0.5,  # share of crops; the others are digits
      "learning_rate": 2e-3,
      "kl_weight": 1e-5,  # of the divergence of a crop, beside errors of a pixel
    }
  )
