"""Previews: what clean latents look like, by a linear map in place of the decoder.

The map has no weights of its own. It is the least-squares answer to how the
autoencoder at hand turns a latent into the mean color of the pixels that it stands for.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float32
from PIL import Image

from pixsigma_jax.sample import image_files

# Latents that the map is fitted to: a few small images, smooth and rough.
_IMAGES, _SIDE = 4, 8
_SMOOTHNESS = (1, 2, 4, 8)  # latents along a side that share one draw, one for an image


@dataclasses.dataclass(frozen=True)
class Previewer:
  """A linear map from scaled latents to colors in [-1, 1].

  Attributes:
    weights: a row for each channel of latents, and a last one for the constant.
  """

  weights: Float32[np.ndarray, "c1 3"]

  def colors(
    self, latents: Float32[np.ndarray, "h w c"]
  ) -> Float32[np.ndarray, "h w 3"]:
    """Estimated mean color of the pixels of each latent, not clipped."""
    return latents @ self.weights[:-1] + self.weights[-1][None, None]

  def __call__(self, latents: Float32[np.ndarray, "h w c"]) -> Image.Image:
    """The same as an image, a pixel for each latent; what has diverged is gray."""
    return image_files.to_image(np.nan_to_num(self.colors(latents)))


def fit(autoencoder: Any, seed: int = 0) -> Previewer:
  """The linear map that is nearest to an autoencoder's decoder.

  Unit normal latents, some of them constant over several neighbors, are decoded, and
  colors beyond [-1, 1] clipped.

  Args:
    autoencoder: see `models/autoencoders.py`.
    seed: of the latents.
  """
  draw = np.random.default_rng(seed)
  latents = np.stack(
    [
      np.kron(
        draw.normal(size=(_SIDE // same, _SIDE // same, autoencoder.channels)),
        np.ones((same, same, 1)),
      )
      for same in np.resize(_SMOOTHNESS, _IMAGES)
    ]
  ).astype(np.float32)
  decoded = np.asarray(autoencoder.decode(latents / autoencoder.scaling_factor))
  colors = mean_colors(decoded, autoencoder.downsampling)
  known = latents.reshape(-1, autoencoder.channels)
  known = np.concatenate([known, np.ones_like(known[:, :1])], axis=1)
  weights, *_ = np.linalg.lstsq(known, colors.reshape(-1, 3), rcond=None)
  return Previewer(weights.astype(np.float32))


def mean_colors(
  images: Float32[np.ndarray, "b H W 3"], downsampling: int
) -> Float32[np.ndarray, "b h w 3"]:
  """Mean color of each latent's pixels, clipped to [-1, 1] as images are."""
  b, height, width, _ = images.shape
  shape = b, height // downsampling, downsampling, width // downsampling, downsampling
  return np.clip(images, -1, 1).reshape(*shape, 3).mean(axis=(2, 4), dtype=np.float32)


class PreviewFiles:
  """A `callback_on_step_end` that says where drawing is, and shows it in files.

  Attributes:
    directory: of the previews, NNNNN.png by the image's number in its call, each
      written over by the next step's.
    total: images of the call.
  """

  def __init__(self, directory: pathlib.Path, total: int):
    directory.mkdir(parents=True, exist_ok=True)
    self.directory, self.total = directory, total

  def __call__(
    self, pipeline: Any, step: int, timestep: float, known: dict[str, Any]
  ) -> None:
    """See `Pipeline.stream`."""
    for number, latents in zip(known["images"], known["clean_latents"], strict=True):
      logging.info(
        "Image %d of %d, step %d of %d.",
        *(number + 1, self.total, step + 1, known["num_steps"]),
      )
      pipeline.preview(latents).save(self.directory / f"{number:05d}.png")
