"""Forms with images to edit, as OpenAI's clients send them."""

import dataclasses
import io
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from pixsigma_jax.data import image_bytes
from pixsigma_jax.sample.settings import SETTINGS, Choice, Text
from pixsigma_jax.serve.fields import Refusal

_MOST_FIELDS = 100
_MOST_FILES = 4
_MOST_OF_FIELD = 64 * 1024  # bytes
# Fields of OpenAI's that are texts, whatever they look like.
_TEXTS = ("prompt", "model", "size", "user", "safety_identifier")


@dataclasses.dataclass(frozen=True)
class Form:
  """Fields with values as JSON has them, and files by name."""

  fields: Mapping[str, Any]
  files: Mapping[str, list[bytes]]


async def read(headers: Headers, content: bytes) -> Form:
  """The form of a request.

  A name that ends in [] may come several times, as a list.

  Raises:
    Refusal: it is none, or has too many parts.
  """

  async def stream() -> AsyncGenerator[bytes]:
    yield content
    yield b""

  parser = MultiPartParser(
    headers,
    stream(),
    max_files=_MOST_FILES,
    max_fields=_MOST_FIELDS,
    max_part_size=_MOST_OF_FIELD,
  )
  try:
    form = await parser.parse()
  except (MultiPartException, KeyError) as error:
    raise Refusal(
      400, "The body is not a form in multipart/form-data.", code="invalid_form"
    ) from error
  fields: dict[str, Any] = {}
  files: dict[str, list[bytes]] = {}
  for name, value in form.multi_items():
    plain = name.removesuffix("[]")
    if isinstance(value, UploadFile):
      files.setdefault(plain, []).append(await value.read())
    elif name.endswith("[]"):
      fields.setdefault(plain, []).append(_value(plain, value))
    elif name in fields:
      raise Refusal(400, f"{name[:80]} comes twice.", code="invalid_value", param=name)
    else:
      fields[name] = _value(name, value)
  await form.close()
  return Form(fields, files)


def images(
  files: Mapping[str, list[bytes]], max_pixels: int
) -> tuple[UInt8[np.ndarray, "H W 3"], Bool[np.ndarray, "H2 W2"] | None]:
  """The image to edit, and where: True where the file `mask` is transparent.

  Raises:
    Refusal: there is none, or more than one; or a file cannot be read or is too large.
  """
  unknown = [name for name in files if name not in ("image", "mask")]
  if unknown:
    raise Refusal(
      400,
      f"There is no file {unknown[0][:80]!r} in a request: known are image and mask.",
      code="unknown_parameter",
      param=unknown[0],
    )
  given = files.get("image", [])
  if len(given) != 1:
    raise Refusal(
      400,
      f"There must be one image to edit, not {len(given)}.",
      code="invalid_value" if given else "missing_required_parameter",
      param="image",
    )
  masks = files.get("mask", [])
  if len(masks) > 1:
    raise _invalid("mask", f"There must be one mask at most, not {len(masks)}.")
  _check_size("image", given[0], max_pixels)
  try:
    image = np.asarray(image_bytes.open_image(given[0]))
  except ValueError as error:
    raise _invalid("image", f"The image cannot be read: {error}.") from error
  return image, _transparent(masks[0], max_pixels) if masks else None


def _transparent(content: bytes, max_pixels: int) -> Bool[np.ndarray, "H2 W2"]:
  opened = _check_size("mask", content, max_pixels)
  try:
    if not opened.has_transparency_data:
      raise _invalid(
        "mask",
        "The mask has no transparency: give a PNG that is transparent where the image "
        "is to be drawn anew.",
      )
    return np.asarray(opened.convert("RGBA"))[..., 3] == 0
  except (OSError, SyntaxError, ValueError) as error:
    raise _invalid("mask", "The mask cannot be read.") from error


def _check_size(name: str, content: bytes, max_pixels: int) -> Image.Image:
  """The file as Pillow opens it: nothing is decoded yet."""
  try:
    opened = Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP"))
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
    raise _invalid(name, f"The {name} must be a PNG, JPEG or WebP.") from error
  width, height = opened.size
  if width * height > max_pixels:
    raise _invalid(
      name,
      f"The {name} has {width} x {height} pixels (width x height), and at most "
      f"{max_pixels:,} are allowed here.",
    )
  return opened


def _value(name: str, text: str) -> Any:
  """A field's text as JSON would have it: numbers, true, lists, or the text itself."""
  setting = SETTINGS.get(name)
  if name in _TEXTS or (setting and isinstance(setting.kind, Text | Choice)):
    return text
  try:
    return json.loads(text)
  except (ValueError, RecursionError):
    return text


def _invalid(name: str, message: str) -> Refusal:
  return Refusal(400, message, code="invalid_value", param=name)
