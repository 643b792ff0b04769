"""Known autoencoders, from their identity in a checkpoint to the object."""

from collections.abc import Mapping
from typing import Any

from pixsigma_jax.models.pixels import PixelAutoencoder

_NAMES = {"pixels": PixelAutoencoder}


def autoencoder_from(
  identity: Mapping[str, Any], scaling_factor: float
) -> PixelAutoencoder:
  """The autoencoder that an `identity` names, as records and checkpoints hold it.

  Args:
    scaling_factor: what its latents are multiplied with for the network.

  Raises:
    ValueError: there is none of that name, or it is of another version.
  """
  name = identity.get("name")
  if name not in _NAMES:
    raise ValueError(
      f"Unknown autoencoder {name!r}: this version of pixsigma_jax knows "
      f"{', '.join(_NAMES)}."
    )
  autoencoder = _NAMES[name](scaling_factor=scaling_factor)
  if autoencoder.identity != dict(identity):
    raise ValueError(
      f"The autoencoder {dict(identity)} is not what this version of pixsigma_jax has "
      f"under that name, {autoencoder.identity}: use the version that wrote it."
    )
  return autoencoder


def downsampling(identity: Mapping[str, Any]) -> int:
  """Pixels to a latent, along a side, of the autoencoder that an `identity` names.

  Raises:
    ValueError: there is none of that name, or it is of another version.
  """
  if "downsampling" in identity:  # of weights in files, which need not be here
    return identity["downsampling"]
  return autoencoder_from(identity, 1.0).downsampling


# Of the two autoencoders that PixArt was trained with: Σ's and α's.
SDXL_SCALING_FACTOR, SD_SCALING_FACTOR = 0.13025, 0.18215
_VAE_NAMES = {SDXL_SCALING_FACTOR: "sdxl-vae", SD_SCALING_FACTOR: "sd-vae"}


def vae_identity(
  scaling_factor: float, channels: int, downsampling: int
) -> dict[str, Any]:
  """The identity of a VAE with learned weights, by what configs say of it.

  Args:
    channels: of its latents.
    downsampling: pixels to a latent, along a side.
  """
  return {
    "name": _VAE_NAMES.get(scaling_factor, "kl-vae"),
    "latent_channels": channels,
    "downsampling": downsampling,
  }
