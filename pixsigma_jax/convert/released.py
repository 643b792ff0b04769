"""The published releases of PixArt, with the numbers that their files lack."""

import dataclasses

from pixsigma_jax.models.autoencoders import SD_SCALING_FACTOR, SDXL_SCALING_FACTOR


@dataclasses.dataclass(frozen=True, kw_only=True)
class Release:
  """A checkpoint of PixArt-alpha's hub page, by the numbers it was trained with.

  Attributes:
    resolution: side in pixels of its square images.
    pe_interpolation: see `PixArtConfig`.
    caption_length: tokens of T5.
    scaling_factor: of its latents.
  """

  resolution: int
  pe_interpolation: float
  caption_length: int
  scaling_factor: float

  @property
  def base_size(self) -> int:
    """Token grid side: 8 pixels to a latent, 2 latents to a token."""
    return self.resolution // 16


def _sigma(resolution: int, pe_interpolation: float) -> Release:
  return Release(
    resolution=resolution,
    pe_interpolation=pe_interpolation,
    caption_length=300,
    scaling_factor=SDXL_SCALING_FACTOR,
  )


def _alpha(resolution: int, pe_interpolation: float) -> Release:
  return Release(
    resolution=resolution,
    pe_interpolation=pe_interpolation,
    caption_length=120,
    scaling_factor=SD_SCALING_FACTOR,
  )


RELEASES: dict[str, Release] = {
  "sigma-256": _sigma(256, 0.5),
  "sigma-512": _sigma(512, 1.0),
  "sigma-1024": _sigma(1024, 2.0),
  "sigma-2048": _sigma(2048, 4.0),
  "alpha-256": _alpha(256, 1.0),
  "alpha-512": _alpha(512, 1.0),
  "alpha-1024": _alpha(1024, 2.0),
}

# On the hub: pages of diffusers' folders, and files of the official layout.
HUB_RELEASES: dict[str, str] = {
  "PixArt-alpha/PixArt-Sigma-XL-2-256x256": "sigma-256",
  "PixArt-alpha/PixArt-Sigma-XL-2-512-MS": "sigma-512",
  "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": "sigma-1024",
  "PixArt-alpha/PixArt-Sigma-XL-2-2K-MS": "sigma-2048",
  "PixArt-alpha/PixArt-Sigma/PixArt-Sigma-XL-2-256x256.pth": "sigma-256",
  "PixArt-alpha/PixArt-Sigma/PixArt-Sigma-XL-2-512-MS.pth": "sigma-512",
  "PixArt-alpha/PixArt-Sigma/PixArt-Sigma-XL-2-1024-MS.pth": "sigma-1024",
  "PixArt-alpha/PixArt-Sigma/PixArt-Sigma-XL-2-2K-MS.pth": "sigma-2048",
  "PixArt-alpha/PixArt-XL-2-512x512": "alpha-512",
  "PixArt-alpha/PixArt-XL-2-1024-MS": "alpha-1024",
  "PixArt-alpha/PixArt-Alpha-DMD-XL-2-512x512": "alpha-512",
  "PixArt-alpha/PixArt-LCM-XL-2-1024-MS": "alpha-1024",
}
