"""Embedded color profiles (ICC): an image's numbers as sRGB, which networks are fed.

By relative colorimetric intent with black point compensation: white stays white, black
becomes black, colors that sRGB has stay exact, and those outside are cut off at its
edge. Profiles of two curves and a matrix (Display P3, Adobe RGB, ProPhoto) know no
other intent; of those with tables (CMYK) the perceptual one is each maker's own taste.
"""

import functools
import io
from typing import Any, Literal, TypeAlias

import numpy as np
from PIL import Image, ImageCms

# What became of an image's profile; None if it has none.
Fate: TypeAlias = Literal["sRGB", "converted", "ignored"] | None

# Color space in a profile's header → the mode of the pixels that it speaks of.
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
# Levels of 255: profiles of sRGB itself differ by rounding, the nearest other by 20.
_SAME = 1


def to_srgb(image: Image.Image) -> tuple[Image.Image, Fate]:
  """A decoded image of 8 bits a channel in the colors of sRGB, by its own profile.

  The image that was given, where there is nothing to convert: no profile, one of sRGB,
  or one that is broken or speaks of other pixels, which says nothing of these.

  Args:
    image: of any mode; where it has an alpha channel, that stays.
  """
  if "icc_profile" not in image.info:
    return image, None
  profile = image.info["icc_profile"]  # None of a PNG's that does not inflate
  if not profile:
    return image, "ignored"
  if image.mode in ("P", "PA"):
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
  elif image.mode in ("RGBa", "La"):  # multiplied by alpha, which no profile means
    image = image.convert(f"{image.mode[:-1]}A")
  elif image.mode in ("1", "YCbCr"):
    image = image.convert("L" if image.mode == "1" else "RGB")
  if image.mode in ("L", "RGB") and image.has_transparency_data:
    image = image.convert(f"{image.mode}A")  # one color is transparent: while it is it
  colors = image.convert(image.mode[:-1]) if image.mode in ("RGBA", "LA") else image
  transform = _transform(profile, colors.mode)
  if isinstance(transform, str):
    return image, transform
  converted = ImageCms.applyTransform(colors, transform)
  assert converted is not None  # as not in place
  if colors is not image:
    converted.putalpha(image.getchannel("A"))
  return converted, "converted"


@functools.lru_cache(maxsize=32)
def _transform(
  profile: bytes, mode: str
) -> ImageCms.ImageCmsTransform | Literal["sRGB", "ignored"]:
  """The transform from pixels of `mode` to sRGB, or the reason for none."""
  try:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space: Any = source.profile
    if _MODES.get(space.xcolor_space.strip()) != mode:
      return "ignored"
    flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
    if mode == "L":  # what lcms makes of one curve to save time is 10 levels off
      flags |= ImageCms.Flags.NOOPTIMIZE
    transform = ImageCms.buildTransform(
      source,
      ImageCms.createProfile("sRGB"),
      mode,
      "RGB",
      ImageCms.Intent.RELATIVE_COLORIMETRIC,
      flags,
    )
  except (ImageCms.PyCMSError, OSError):
    return "ignored"
  if mode == "CMYK":
    return transform
  probe = _probe(mode)
  shown = ImageCms.applyTransform(probe, transform)
  assert shown is not None
  before = np.asarray(probe.convert("RGB"), int)
  return "sRGB" if np.abs(np.asarray(shown) - before).max() <= _SAME else transform


def _probe(mode: str) -> Image.Image:
  """Colors from all over the cube, or all grays."""
  levels = np.arange(0, 256, 15, dtype=np.uint8)
  if mode == "L":
    return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
  cube = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1)
  return Image.fromarray(cube.reshape(len(levels), -1, 3))
