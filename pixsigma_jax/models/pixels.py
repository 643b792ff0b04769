"""The autoencoder that changes nothing: latents are the pixels themselves.

It stands where SDXL's autoencoder stands, for images so small that there is nothing to
compress. Its scaling factor does the same work: a network learns best on latents whose
standard deviation is near 1, and small figures on black are far from it.
"""

import dataclasses
from typing import Any, TypeAlias

Arrays: TypeAlias = Any  # NumPy in, NumPy out; JAX in, JAX out


@dataclasses.dataclass(frozen=True)
class PixelAutoencoder:
  """Hands `[b H W 3]` images in [-1, 1] through as latents, and latents as images.

  `scaling_factor` is what the trainer multiplies latents with and the sampler divides
  them by, as for any autoencoder: `encode` and `decode` leave it alone.
  """

  scaling_factor: float = 1.0
  channels = 3
  downsampling = 1

  @property
  def identity(self) -> dict[str, Any]:
    """Identity in checkpoints and records, by which other latents are refused."""
    return {"name": "pixels", "version": 1}

  def encode(self, images: Arrays) -> Arrays:
    """Images `[b H W 3]` to latents of the same shape.

    Raises:
      ValueError: the images have other than 3 channels.
    """
    return self._checked(images, "images")

  def decode(self, latents: Arrays) -> Arrays:
    """Latents `[b H W 3]` to images of the same shape, not clipped to [-1, 1].

    Raises:
      ValueError: the latents have other than 3 channels.
    """
    return self._checked(latents, "latents")

  def _checked(self, arrays: Arrays, what: str) -> Arrays:
    if arrays.ndim != 4 or arrays.shape[-1] != self.channels:
      raise ValueError(
        f"The pixel autoencoder takes {what} of shape [b H W {self.channels}], not "
        f"{tuple(arrays.shape)}: latents of another autoencoder need that one."
      )
    return arrays
