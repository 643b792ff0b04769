"""Regions of an image with prompts of their own.

At each step the network sees every prompt by itself, and the predictions are averaged,
each with its region's weight where the region lies: conditioning by area, as ComfyUI
has it (MultiDiffusion, Bar-Tal et al. 2023, equation 5). Each region is one more call
of the network's conditional half.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32
from PIL import Image

from pixsigma_jax.data.buckets import Bucket
from pixsigma_jax.sample import editing
from pixsigma_jax.sample.settings import Number, Text, Whole, plain

_KEYS = ("prompt", "box", "mask", "weight")


class Region(NamedTuple):
  """A prompt of a part of an image.

  Attributes:
    weight: its share of the prediction there.
    inside: rows and columns of a box, or a mask: indices of its pixels.
    about: facts for the image's settings.
  """

  prompt: str
  weight: float
  inside: tuple[slice, slice] | Bool[np.ndarray, "H W"]
  about: dict[str, Any]


def read(given: Any, height: int, width: int) -> list[Region]:
  """Regions of an image of that size in pixels, checked.

  Args:
    given: dicts, each with a prompt; with a box, four whole numbers of pixels (left,
      top, right, bottom), or a mask, an image that is white where the region is; and
      perhaps with a weight from 0 to 1, by default 1: the rest is the prompt's own.

  Raises:
    ValueError: one is something else, lies outside or is empty.
  """
  if not isinstance(given, list | tuple):
    raise ValueError(f"regions must be a list of regions, not {given!r}.")
  return [_region(i, one, height, width) for i, one in enumerate(given)]


def _region(i: int, given: Any, height: int, width: int) -> Region:
  where = f"Region {i}"
  if not isinstance(given, Mapping) or not set(given) <= set(_KEYS):
    raise ValueError(f"{where} must have {', '.join(_KEYS)} and no more: {given!r}.")
  if ("box" in given) == ("mask" in given):
    raise ValueError(f"{where} must have either a box or a mask.")
  prompt = Text().check(f"{where}'s prompt", given.get("prompt"))
  weight = Number(1.0).check(f"{where}'s weight", plain(given.get("weight", 1.0)))
  about: dict[str, Any] = {"prompt": prompt, "weight": weight}
  if "mask" in given:
    inside = editing.mask_of(f"{where}'s mask", given["mask"])
    if inside.shape != (height, width):
      raise ValueError(
        f"{where}'s mask has {inside.shape[0]} x {inside.shape[1]} pixels (height x "
        f"width) and the image {height} x {width}: resize it."
      )
    if not inside.any():
      raise ValueError(f"{where}'s mask is black all over.")
    about["mask_digest"] = editing.digest(inside)
  else:
    box = plain(given["box"])
    if not isinstance(box, list | tuple) or len(box) != 4:
      raise ValueError(f"{where}'s box must be left, top, right, bottom, not {box!r}.")
    box = tuple(Whole().check(f"{where}'s box", plain(side)) for side in box)
    left, top, right, bottom = box
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
      raise ValueError(
        f"{where}'s box {box} (left, top, right, bottom) must lie inside the image, of "
        f"{height} x {width} pixels (height x width), and have an inside."
      )
    inside = slice(top, bottom), slice(left, right)
    about["box"] = list(box)
  return Region(prompt, weight, inside, about)


def weights(
  regions: Sequence[Region], height: int, width: int, drawn: Bucket, downsampling: int
) -> Float32[np.ndarray, "k h w"]:
  """Weights of the prompt's own prediction and of each region's; they add up to 1.

  The prompt's own is what regions leave. Of each latent, at the size that is drawn.

  Args:
    height, width: of the image in pixels.
  """
  size = drawn.width // downsampling, drawn.height // downsampling

  def share(region: Region) -> Float32[np.ndarray, "h w"]:
    pixels = np.zeros((height, width), np.float32)
    pixels[region.inside] = region.weight
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))

  shares = np.stack([share(region) for region in regions])
  # Means of whole regions come out of float32 as a little more or less than 1.
  shares = np.clip(np.round(shares, 6), 0.0, 1.0)
  all_weights = np.concatenate([np.prod(1 - shares, axis=0)[None], shares])
  return (all_weights / all_weights.sum(axis=0)[None]).astype(np.float32)
