"""What a call asks for, as one request an image: checked, and placed on token grids."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Float32

from pixsigma_jax.data import buckets
from pixsigma_jax.data.buckets import Bucket
from pixsigma_jax.models.pixart import PixArtConfig
from pixsigma_jax.models.tokens import Grid
from pixsigma_jax.sample import captions, editing, regions
from pixsigma_jax.sample.call_arguments import CallArguments, Embedded
from pixsigma_jax.sample.editing import Source
from pixsigma_jax.sample.settings import Settings

# Areas, relative to the training resolution's, beyond which a size is remarked upon,
# or refused because the positions of its tokens lie too far from any that were learned.
_UNUSUAL_AREA, _IMPOSSIBLE_AREA = 2.0, 4.5
# Share of an image that is cropped away, beyond which it is remarked upon; between two
# sizes of a table it is 0.15 at most.
_UNUSUAL_CROP = 0.2


class Request(NamedTuple):
  """One image to make: drawn at `drawn`, then resized to its size.

  Attributes:
    captions: the prompt after cleaning; with regions those of all that weigh anything.
    weights: of the captions' predictions, of each latent; None for one caption.
    noise: given; None for the seed's.
    source: an image to edit.
    steps: how many of the last steps are taken.
    about: further facts for the image's settings.
  """

  prompt: str
  negative_prompt: str
  captions: tuple[str | Embedded, ...]
  weights: Float32[np.ndarray, "k h w"] | None
  negative: str | Embedded
  seed: int
  noise: Float32[np.ndarray, "h w c"] | None
  source: Source | None
  steps: int
  height: int
  width: int
  drawn: Bucket
  grid: Grid
  about: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Planner:
  """Makes requests for a model.

  Attributes:
    config: the model's.
    downsampling: the autoencoder's, pixels to a latent along a side.
    resolution: side in pixels of the square images of the training.
  """

  config: PixArtConfig
  downsampling: int
  resolution: int

  def requests(
    self, prompts: list[str], asked: Settings, given: CallArguments
  ) -> list[Request]:
    """One request an image.

    Raises:
      FileNotFoundError: an image to edit is not there.
      ValueError: sizes do not go with the model, or arguments not with each other.
    """
    config, count = self.config, len(prompts)
    embedded, negatives = (
      given.captions(negative, count, config.caption_length, config.caption_width)
      for negative in (False, True)
    )
    sources = editing.sources(given.image, given.mask_image, count, asked.outpaint)
    all_regions = given.regions_of(count)
    binned = asked.use_resolution_binning and self.resolution in buckets.BUCKETS
    places: dict[tuple[int, int, bool], tuple[Bucket, Grid]] = {}
    requests = []
    for i, own in enumerate(asked.of_prompts(count)):
      source = sources[i]
      height, width = self._size(i, own, source)
      stretched = source is not None
      if (height, width, stretched) not in places:
        place = self._place(height, width, binned, stretched)
        places[height, width, stretched] = place
      drawn, grid = places[height, width, stretched]
      caption, negative = (
        captions.clean_caption(text, asked.caption_cleaning)
        if instead is None
        else instead[i]
        for text, instead in (
          (prompts[i], embedded),
          (own["negative_prompt"], negatives),
        )
      )
      strength = strength_of(i, own["strength"], source)
      about: dict[str, Any] = {} if source is None else source.about(strength)
      all_captions, weights = (caption,), None
      if all_regions[i]:
        found = regions.read(all_regions[i], height, width)
        about["regions"] = [region.about for region in found]
        cleaned = (
          captions.clean_caption(r.prompt, asked.caption_cleaning) for r in found
        )
        weights = regions.weights(found, height, width, drawn, self.downsampling)
        all_captions, weights = _heard((caption, *cleaned), weights)
      requests += [
        Request(
          prompt=prompts[i],
          negative_prompt=own["negative_prompt"],
          captions=all_captions,
          weights=weights,
          negative=negative,
          seed=own["seed"] + copy,
          noise=None,
          source=source,
          steps=steps_of(asked.num_inference_steps, strength),
          height=height,
          width=width,
          drawn=drawn,
          grid=grid,
          about=about,
        )
        for copy in range(asked.num_images_per_prompt)
      ]
    noise = given.noise([self.latent_shape(request.grid) for request in requests])
    if noise is not None:
      requests = [r._replace(noise=own) for r, own in zip(requests, noise, strict=True)]
    return requests

  def latent_shape(self, grid: Grid) -> tuple[int, int, int]:
    """Height, width and channels of an image's latents."""
    patch = self.config.patch_size
    return grid[0] * patch, grid[1] * patch, self.config.in_channels

  def _size(
    self, i: int, own: dict[str, Any], source: Source | None
  ) -> tuple[int, int]:
    """Height and width of an image in pixels: as asked for, or those of its source."""
    default = (self.resolution,) * 2 if source is None else source.size
    height, width = (
      default[axis] if own[name] is None else own[name]
      for axis, name in enumerate(("height", "width"))
    )
    if source is not None and (height, width) != source.size:
      raise ValueError(
        f"The image of prompt {i} has {source.size[0]} x {source.size[1]} pixels "
        f"(height x width), and {height} x {width} are asked for: leave out height and "
        "width, or resize the image."
      )
    return height, width

  def _place(
    self, height: int, width: int, binned: bool, stretched: bool
  ) -> tuple[Bucket, Grid]:
    """The size to draw at for an image of this size, and its token grid."""
    drawn = Bucket(height, width)
    if binned and min(height, width) > 0:
      drawn = buckets.nearest(buckets.sampling_buckets(self.resolution), height, width)
    grid = self._grid(*drawn)
    if drawn != (height, width):
      _remark_upon_fitting(drawn, height, width, stretched)
    return drawn, grid

  def _grid(self, height: int, width: int) -> Grid:
    """The token grid of images of this size, if the model can draw them."""
    config = self.config
    unit = self.downsampling * config.patch_size
    if min(height, width) < 1 or height % unit or width % unit:
      near = " x ".join(
        str(max(1, round(side / unit)) * unit) for side in (height, width)
      )
      raise ValueError(
        f"An image of {height} x {width} pixels (height x width) cannot be cut into "
        f"tokens: both sides must be multiples of {unit}, for example {near}."
      )
    grid = (height // unit, width // unit)
    count, learned = grid[0] * grid[1], config.base_size**2
    if not 1 / _IMPOSSIBLE_AREA <= count / learned <= _IMPOSSIBLE_AREA:
      raise ValueError(
        f"An image of {height} x {width} pixels (height x width) has {grid[0]} x "
        f"{grid[1]} tokens, but the checkpoint's position embedding is laid out for "
        f"base_size={config.base_size}, {config.base_size} x {config.base_size}: it "
        f"would draw nothing sensible. Ask for --height and --width near "
        f"{config.base_size * unit} x {config.base_size * unit}, or train a stage at "
        "this size after the transform interpolate_pe with "
        f"base_size={round(count**0.5)}."
      )
    area = height * width / self.resolution**2
    if not 1 / _UNUSUAL_AREA <= area <= _UNUSUAL_AREA:
      logging.warning(
        "An image of %d x %d pixels has %.2g times the area of those that this "
        "checkpoint was trained on (%d x %d): expect it to be worse.",
        height,
        width,
        area,
        self.resolution,
        self.resolution,
      )
    return grid


def strength_of(i: int, strength: float | None, source: Source | None) -> float:
  """Share of the steps that are taken; all of them without an image."""
  if source is None:
    if strength is not None:
      raise ValueError(
        f"strength={strength} is of an image, and prompt {i} has none: give image."
      )
    return 1.0
  if strength is None:
    masked = source.mask is not None
    return editing.MASK_STRENGTH if masked else editing.IMAGE_STRENGTH
  return strength


def steps_of(num_inference_steps: int, strength: float) -> int:
  """Number of the last steps that are taken."""
  steps = int(num_inference_steps * strength + 1e-6)  # 0.29 of 100 are 29
  if steps == 0 and strength > 0:
    raise ValueError(
      f"strength={strength:g} of num_inference_steps={num_inference_steps} is no step: "
      f"give at least {1 / num_inference_steps:.3g}, or 0, or more steps."
    )
  return steps


def _heard(
  all_captions: tuple[str | Embedded, ...], weights: Float32[np.ndarray, "k h w"]
) -> tuple[tuple[str | Embedded, ...], Float32[np.ndarray, "k2 h w"] | None]:
  """The captions that weigh anything anywhere; no weights if that is one."""
  heard = np.flatnonzero(weights.any(axis=(1, 2)))
  chosen = tuple(all_captions[k] for k in heard)
  return chosen, None if len(chosen) == 1 else weights[heard]


def _remark_upon_fitting(
  drawn: Bucket, height: int, width: int, stretched: bool
) -> None:
  """Says what resizing and cropping do to an image, unless it is hardly anything."""
  scale = max(height / drawn.height, width / drawn.width)
  cropped = 1 - height * width / (scale**2 * drawn.height * drawn.width)
  remarks = []
  if scale**2 > _UNUSUAL_AREA:
    remarks.append(f"enlarged {scale:.3g} times, with no more detail than it had")
  if scale**2 < 1 / _UNUSUAL_AREA:
    remarks.append(f"reduced {1 / scale:.3g} times")
  if cropped > _UNUSUAL_CROP:
    how = "stretched" if stretched else "cropped"
    remarks.append(f"{how} by {100 * cropped:.0f} %")
  if remarks:
    logging.warning(
      "An image of %d x %d pixels is drawn at %d x %d, the nearest size of this "
      "checkpoint's training, and then %s. use_resolution_binning=False draws at the "
      "size itself, if the model can.",
      height,
      width,
      *drawn,
      " and ".join(remarks),
    )
