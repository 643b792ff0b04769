"""Images as bytes: their size before decoding, and decoded as they are displayed."""

import contextlib
import io
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from pixsigma_jax import errors
from pixsigma_jax.data import jpegs
from pixsigma_jax.data.color_profiles import Fate, to_srgb
from pixsigma_jax.wording import install

# Pillow's own limit, above which it suspects a decompression bomb: 9459 x 9459.
MOST_PIXELS = 89_478_485

_HEIF = "HEIF"  # by the extra `heif`, which registers it with Pillow
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# How files begin that are images and cannot be read.
_NOT_READ = {
  b"\xff\x0a": "JPEG XL",
  b"\0\0\0\x0cJXL ": "JPEG XL",
  b"8BPS": "a Photoshop file",
  b"FUJIFILMCCD-RAW": "a raw photograph",
}
# Not every plug-in of Pillow: the one for EPS starts Ghostscript on what it is given.
# JPEG's also opens MPO, which is what many phones and cameras write.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000")
_JPEGS = ("JPEG", "MPO")
_ORIENTATION = 0x0112  # the EXIF tag
_PNG_DEPTH = 24  # the byte that says how many bits a sample has
_PHOTOMETRIC, _BITS_PER_SAMPLE = 262, 258  # TIFF's tags
_MARKS_OF_EXIF = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # in a PNG
_UPRIGHT = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}


# What Pillow's decoders raise when they come across bytes that they did not expect.
_OF_DECODERS = (
  *(OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError),
  *(ArithmeticError, AttributeError, RuntimeError, struct.error, zlib.error),
)


class Header(NamedTuple):
  """Format and size of an image before it is decoded; the sides as displayed."""

  format: str
  height: int
  width: int


def image_header(data: bytes) -> Header:
  """Format and size out of an image's first bytes; nothing is decoded.

  Raises:
    ValueError: these are not an image's, or it has more than `MOST_PIXELS`.
  """
  image, orientation = _opened(data)
  width, height = image.size
  if orientation > 4:
    width, height = height, width
  return Header(str(image.format), height, width)


class Decoded(NamedTuple):
  """An image's pixels, and how its color profile was handled."""

  image: Image.Image
  profile: Fate


def open_image(data: bytes, *, at_least: int | None = None) -> Image.Image:
  """A decoded image: upright as EXIF says, sRGB, what is transparent over white.

  Colors are converted by the image's own profile. All that reads users' images reads
  them here.

  Args:
    at_least: it may come smaller, its shorter side at least this: a JPEG is then
      decoded at a fraction of the cost.

  Raises:
    ValueError: with the reason in a few words: not an image, truncated, damaged, too
      many pixels.
  """
  return decode(data, at_least=at_least).image


def displayed(image: Image.Image) -> Image.Image:
  """An image that Pillow has opened already, as `open_image` gives it.

  Raises:
    ValueError: with the reason in a few words.
  """
  orientation = _orientation(image, _MARKS_OF_EXIF[0])
  with _decoding():
    image.load()
  turned, _ = _rgb(image)
  if orientation in _UPRIGHT:
    turned = turned.transpose(_UPRIGHT[orientation])
  turned.info = {}
  return turned


def decode(data: bytes, *, at_least: int | None = None) -> Decoded:
  """`open_image`, and how the color profile was handled."""
  image, orientation = _opened(data)
  with _decoding():
    # HEIF would give a thumbnail, whatever the image itself is like.
    if at_least is not None and image.format != _HEIF:
      image.draft(None, (at_least, at_least))  # pyright: ignore[reportArgumentType]
    image.load()
    is_whole = image.format not in _JPEGS or jpegs.is_whole(data, image)
    if image.format == "PNG":
      _match_transparency(image, depth=data[_PNG_DEPTH])
  image, profile = _rgb(image)
  if orientation in _UPRIGHT:
    image = image.transpose(_UPRIGHT[orientation])
  if not is_whole:
    raise ValueError("truncated: part of the image is missing")
  image.info = {}  # the profile holds no longer, and would be saved with the image
  return Decoded(image, profile)


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
  """Says of an image that Pillow cannot decode why, in a few words."""
  try:
    yield
  except _OF_DECODERS as error:
    said = str(error).lower()
    reason = "truncated" if "truncated" in said else "damaged"
    if "memory" in said:  # what it was to hold may still be sound
      reason = "cannot be decoded"
    raise ValueError(f"{reason}: {type(error).__name__}: {error}") from None


def _opened(data: bytes) -> tuple[Image.Image, int]:
  """The image, not yet decoded, and its EXIF orientation."""
  try:
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
  except (Image.DecompressionBombError, Image.DecompressionBombWarning):
    raise ValueError(f"too many pixels: more than {MOST_PIXELS}") from None
  except _OF_DECODERS:
    image = _opened_heif(data)
  width, height = image.size
  if width * height > MOST_PIXELS:
    raise ValueError(f"too many pixels: {height}x{width}")
  if min(width, height) < 1:
    raise ValueError(f"not an image: {height}x{width}")
  return image, _orientation(image, data)


def _opened_heif(data: bytes) -> Image.Image:
  """An image that Pillow cannot open by itself.

  Raises:
    ValueError: none can be opened; it names the format if it is known, and a way out.
  """
  if data[4:8] != b"ftyp" or data[8:12] not in _HEIF_BRANDS:
    for start, name in _NOT_READ.items():
      if data.startswith(start):
        raise ValueError(f"{name}, which is not read: save it as JPEG or PNG")
    raise ValueError("not an image")
  try:
    import pillow_heif
  except ImportError as error:
    if not errors.of_absence(error, "pillow_heif"):
      raise
    raise ValueError(
      f"HEIC, which needs pillow-heif: {install('heif')} and scan anew, or save it as "
      "JPEG"
    ) from None
  pillow_heif.register_heif_opener()
  try:
    return Image.open(io.BytesIO(data), formats=(_HEIF,))
  except (Image.DecompressionBombError, Image.DecompressionBombWarning):
    raise ValueError(f"too many pixels: more than {MOST_PIXELS}") from None
  except _OF_DECODERS as error:
    raise ValueError(f"damaged: HEIC: {type(error).__name__}") from None


def _orientation(image: Image.Image, data: bytes) -> int:
  if image.format == "TIFF":  # Pillow turns these itself, as pillow-heif does HEIF
    return 1
  # To look for EXIF behind the pixels, Pillow decodes a whole PNG.
  if image.format == "PNG" and not any(mark in data for mark in _MARKS_OF_EXIF):
    return 1
  try:
    found = image.getexif().get(_ORIENTATION, 1)
  except _OF_DECODERS:  # an image without readable EXIF is shown as it is
    return 1
  return found if isinstance(found, int) else 1


def _match_transparency(image: Image.Image, *, depth: int) -> None:
  """Says a PNG's transparent color in the levels that Pillow has made of its samples.

  Pillow leaves the color as it is in the file, whatever the file's samples are.
  """
  color = image.info.get("transparency")
  if isinstance(color, int) and image.mode == "L":  # of 2, 4 or 8 bits
    most = 2**depth - 1
    image.info["transparency"] = (color & most) * 255 // most
  elif isinstance(color, tuple) and depth == 16:  # of which Pillow keeps the upper half
    image.info["transparency"] = tuple(level >> 8 for level in color)


def _rgb(image: Image.Image) -> tuple[Image.Image, Fate]:
  if image.mode.startswith("I"):  # 16 bits a pixel
    image = _eight_bits(image)
  if image.mode == "F":
    raise ValueError("floating-point pixels, whose white is unknown")
  image, profile = to_srgb(image)
  if image.has_transparency_data:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image)
  return image.convert("RGB"), profile


def _eight_bits(image: Image.Image) -> Image.Image:
  """Grays of more bits, with black, white and what is transparent where they were."""
  levels = np.asarray(image).astype(np.int64)
  white, about = 65535, dict(image.info)
  if image.format == "TIFF" and image.mode.startswith("I;16"):
    tags = getattr(image, "tag_v2", {})
    white = 2 ** tags.get(_BITS_PER_SAMPLE, (16,))[0] - 1  # scanners write 12
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero: Pillow only sees to 8 bits
      levels = white - levels
  if levels.min() < 0 or levels.max() > white:
    raise ValueError("more than 16 bits a pixel")
  gray = Image.fromarray((levels * 255 // white).astype(np.uint8))
  if isinstance(color := about.pop("transparency", None), int):
    gray.putalpha(Image.fromarray(np.where(levels == color, 0, 255).astype(np.uint8)))
  gray.info = about
  return gray
