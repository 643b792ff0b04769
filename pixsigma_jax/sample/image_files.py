"""Image files that say how they were made, and grids of images."""

import io
import json
import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from pixsigma_jax import disk

# Ending of a file → how it is written. Nothing that shows is lost in the lossy ones.
FORMATS: dict[str, dict[str, Any]] = {
  "png": {},
  "webp": {"quality": 95, "method": 6},
  "jpeg": {"quality": 95, "subsampling": 0},
}
# Longest side in pixels that a format can have.
_LONGEST_SIDES = {"png": 2**31 - 1, "webp": 16383, "jpeg": 65500}
_UNICODE_COMMENT = b"UNICODE\0"  # how EXIF marks the encoding of a comment

_GAP = 2  # pixels between the images of a grid
_READABLE_SIDE = 96  # pixels; smaller images are enlarged in a grid
_FONT_SIZE, _LINE_HEIGHT, _MARGIN = 11, 13, 6  # pixels


def to_image(image: Float[np.ndarray, "H W 3"]) -> Image.Image:
  """An image in [-1, 1], clipped to it, in eight bits a channel."""
  levels = np.round((image.astype(np.float64) + 1) * 127.5)
  return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))


def from_image(image: Image.Image) -> Float[np.ndarray, "H W 3"]:
  """The inverse of `to_image`, to half of one of its 255 levels."""
  return np.asarray(image, np.float32) / 127.5 - 1


def fit(image: Image.Image, height: int, width: int) -> Image.Image:
  """The image at another size: scaled to cover it, and cropped in the middle."""
  if (image.height, image.width) == (height, width):
    return image
  return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def stretch(image: Image.Image, height: int, width: int) -> Image.Image:
  """The image at another size, nothing cropped, whatever its aspect ratio."""
  if (image.height, image.width) == (height, width):
    return image
  return image.resize((width, height), Image.Resampling.LANCZOS)


def resized_array(
  resize: Callable[[Image.Image, int, int], Image.Image],
  image: Float[np.ndarray, "H W 3"],
  height: int,
  width: int,
) -> Float[np.ndarray, "h w 3"]:
  """As `fit` or `stretch`, of an image in [-1, 1], in full precision: from 0 to 1."""
  image = image.astype(np.float32) / 2 + 0.5
  if image.shape[:2] != (height, width):
    channels = (Image.fromarray(channel) for channel in np.moveaxis(image, -1, 0))
    resized = [np.asarray(resize(channel, height, width)) for channel in channels]
    image = np.stack(resized, axis=-1)
  return np.clip(image, 0.0, 1.0)


def next_number(directory: pathlib.Path) -> int:
  """The number after the highest of `directory`/NNNNN.*, 0 if there are none."""
  names = (path.name for path in directory.iterdir())
  endings = "|".join(FORMATS)
  numbers = [
    int(name.partition(".")[0])
    for name in names
    if re.fullmatch(rf"\d{{5,}}\.({endings})", name)
  ]
  return max(numbers, default=-1) + 1


def check_sides(form: str, height: int, width: int) -> None:
  """Refuses an image that files of a format cannot hold.

  Raises:
    ValueError: a side is too long.
  """
  longest = _LONGEST_SIDES[form]
  if max(height, width) > longest:
    raise ValueError(
      f"A {form} holds no image of {height} x {width} pixels (height x width): its "
      f"sides end at {longest}. Take the format png, or a smaller size."
    )


def save(
  path: pathlib.Path,
  image: Image.Image,
  settings: Mapping[str, Any],
  *,
  of_many: bool = False,
) -> None:
  """Writes an image, whole or not at all, with what it takes to make it again.

  The name's ending is one of `FORMATS`. A PNG has text chunks, `prompt` and `seed`
  where `settings` has them, and `settings`, all of them as JSON; a WebP or JPEG has
  that JSON as its EXIF user comment.

  Args:
    of_many: as in `disk.write_whole`.

  Raises:
    FileExistsError: there is a file of that name.
    OSError: the file cannot be written.
  """
  partial = disk.attempt_path(path) if of_many else disk.partial_path(path)
  try:
    _write(partial, path.suffix.removeprefix("."), image, settings)
    disk.publish_new(partial, path)
  finally:
    partial.unlink(missing_ok=True)


class ImageFolder:
  """A folder that images are added to under the next free numbers.

  Other processes may add theirs at the same time: no file is ever written over, and no
  image lost. As long as none does, images have their call's order, in whatever
  order they are ready.

  Attributes:
    directory: made if there is none.
    form: of the files, a key of `FORMATS`.
  """

  def __init__(self, directory: pathlib.Path, form: str = "png"):
    directory.mkdir(parents=True, exist_ok=True)
    self.directory, self.form = directory, form
    self._first = next_number(directory)
    self._partial = f"picture.{form}"
    disk.remove_abandoned(directory, self._partial)

  def save(
    self, number: int, image: Image.Image, settings: Mapping[str, Any]
  ) -> pathlib.Path:
    """Writes an image as `save` does, and says under which name.

    Args:
      number: of the image in its call, from 0 on.

    Raises:
      OSError: the file cannot be written.
    """
    partial = disk.attempt_path(self.directory / self._partial)
    try:
      _write(partial, self.form, image, settings)
      while True:
        path = self.directory / f"{self._first + number:05d}.{self.form}"
        try:
          disk.publish_new(partial, path)
        except FileExistsError:
          # Somebody else's: on behind all that are there by now.
          self._first = max(self._first + 1, next_number(self.directory) - number)
        else:
          return path
    finally:
      partial.unlink(missing_ok=True)


def to_bytes(
  image: Image.Image,
  settings: Mapping[str, Any],
  form: str,
  quality: int | None = None,
) -> bytes:
  """The file that `save` would write, in memory.

  Args:
    form: a key of `FORMATS`.
    quality: of a lossy format, 0 … 100; None for that of `FORMATS`.
  """
  content = io.BytesIO()
  _write(content, form, image, settings, quality)
  return content.getvalue()


def _write(
  file: pathlib.Path | io.BytesIO,
  form: str,
  image: Image.Image,
  settings: Mapping[str, Any],
  quality: int | None = None,
) -> None:
  note = json.dumps(dict(settings), ensure_ascii=False)
  options = dict(FORMATS[form])
  if quality is not None:
    options["quality"] = quality
  if form == "png":
    chunks = PngInfo()
    for name in ("prompt", "seed"):
      if name in settings:
        chunks.add_text(name, str(settings[name]))
    chunks.add_text("settings", note)
    options["pnginfo"] = chunks
  else:
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = (
      _UNICODE_COMMENT + note.encode("utf-16-be")
    )
    options["exif"] = exif
  image.save(file, format=form, **options)


def settings_of(path: pathlib.Path | io.BytesIO) -> dict[str, Any]:
  """Settings that `save` wrote into an image, in any of its formats.

  Raises:
    ValueError: the file says nothing of the kind.
  """
  with Image.open(path) as image:
    note = image.info.get("settings")
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif)
    comment = comment.get(ExifTags.Base.UserComment, b"")
  if note is None and comment.startswith(_UNICODE_COMMENT):
    note = comment.removeprefix(_UNICODE_COMMENT).decode("utf-16-be")
  if note is None:
    raise ValueError(f"{path} does not say how it was made.")
  return json.loads(note)


def grid(
  images: Sequence[Image.Image],
  columns: int | None = None,
  labels: Sequence[str] | None = None,
) -> Image.Image:
  """Lays images out in rows on black, in reading order.

  Tiny ones are enlarged, all by the same whole number, with square pixels.

  Args:
    columns: images in a row; by default about as many as there are rows.
    labels: a text to stand under each image.

  Raises:
    ValueError: there are no images, no columns, or not a label for each image.
  """
  if not images:
    raise ValueError("A grid needs at least one image.")
  if columns is None:
    columns = math.ceil(len(images) ** 0.5)
  if columns < 1:
    raise ValueError(f"A grid needs at least 1 column, not {columns}.")
  if labels is not None and len(labels) != len(images):
    raise ValueError(f"{len(labels)} labels cannot stand under {len(images)} images.")

  width, height = (max(sides) for sides in zip(*(p.size for p in images), strict=True))
  scale = max(1, _READABLE_SIDE // max(width, height))
  width, height = scale * width, scale * height
  texts = [_wrapped(label, width - _MARGIN) for label in labels or []]
  label_height = _LINE_HEIGHT * max((len(lines) for lines in texts), default=0)
  rows, columns = -(-len(images) // columns), min(columns, len(images))
  step_x, step_y = width + _GAP, height + label_height + _GAP
  sheet = Image.new("RGB", (columns * step_x - _GAP, rows * step_y - _GAP))
  for i, image in enumerate(images):
    x, y = i % columns * step_x, i // columns * step_y
    side = (scale * image.width, scale * image.height)
    corner = (x + (width - side[0]) // 2, y + (height - side[1]) // 2)
    sheet.paste(image.resize(side, Image.Resampling.NEAREST), corner)
    if texts:
      sheet.paste(_label(texts[i], (width, label_height)), (x, y + height))
  return sheet


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
  return ImageFont.load_default(_FONT_SIZE)


def _wrapped(text: str, width: int) -> list[str]:
  """Lines of whole words, no wider than `width` pixels where a word is not alone."""
  lines, font = [""], _font()
  for word in text.split():
    longer = f"{lines[-1]} {word}".strip()
    if lines[-1] and font.getlength(longer) > width:
      lines.append(word)
    else:
      lines[-1] = longer
  return lines


def _label(lines: list[str], size: tuple[int, int]) -> Image.Image:
  # An image of its own, at whose edge a word that is too long is cut off.
  label = Image.new("RGB", size)
  draw = ImageDraw.Draw(label)
  for i, line in enumerate(lines):
    draw.text((0, i * _LINE_HEIGHT), line, fill=(200, 200, 200), font=_font())
  return label
