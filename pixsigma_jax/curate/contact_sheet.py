"""A contact sheet: images, and what the network will see of them."""

import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from absl import logging
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from pixsigma_jax import disk
from pixsigma_jax.data.buckets import BUCKETS, Buckets, read_table
from pixsigma_jax.data.crops import Crop, CropRule, filter_at
from pixsigma_jax.data.image_bytes import open_image
from pixsigma_jax.data.index import Index, open_index
from pixsigma_jax.data.sources import read_bytes

_SIDE = 320  # pixels: each image is fitted into a square of it
_GAP, _MARGIN = 12, 28
_FONT_SIZE, _LINE_HEIGHT = 15, 20
_MOST_LINES = 5  # of captions
_LONGEST_TEXT = 1000  # characters that are looked at to fill them
_PAPER, _INK, _FAINT = (250, 250, 248), (36, 38, 42), (120, 124, 130)
_EMPTY, _FRAME, _WARNING = (232, 232, 230), (230, 60, 50), (200, 40, 30)
_DIMMED = 0.35  # brightness of what is cropped away


_Line: TypeAlias = tuple[str, tuple[int, int, int]]  # text and color


class _Row(NamedTuple):
  """An image's row of the index."""

  id: str
  location: str
  captions: list[tuple[str, str]]  # text and kind


def run(
  index: str, *, resolution: int, table: str | None, output: str, count: int
) -> None:
  """Draws images of an index and their crops into a PNG file.

  The images are spread evenly over those that `filter` kept, or, before it, over all
  that can be read. Captions are drawn with the font that comes with Pillow: scripts
  that it lacks are rows of boxes.

  Args:
    index: its directory.
    resolution: of the stage that the images are for, in pixels.
    table: JSON file of the stage's sizes; None for the published ones.
    output: the file.
    count: how many images, if there are as many.

  Raises:
    FileNotFoundError: there is no such index or table.
    ValueError: there are no images, no table of the resolution, or the output is no
      PNG.
    OSError: the file cannot be written.
  """
  path = pathlib.Path(output)
  if path.suffix.lower() != ".png":
    raise ValueError(f"--output={output} must end in .png.")
  if count < 1:
    raise ValueError(f"--count={count} must be at least 1.")
  rule = CropRule(_buckets(resolution, table), filter_at(resolution))
  opened = open_index(index)
  rows = _evenly(opened, count)
  cells = [_cell(opened.source, row, rule) for row in rows]
  sheet = _sheet(
    f"Left: the image, and its crop in a frame. Right: what a network of {resolution} "
    "pixels sees.",
    cells,
  )
  disk.write_whole(path, lambda partial: sheet.save(partial, "png"))
  logging.info("Wrote %d images and their crops to %s.", len(cells), path)


def _buckets(resolution: int, table: str | None) -> Buckets:
  if table is not None:
    return read_table(table)
  if resolution not in BUCKETS:
    raise ValueError(
      f"There is no published table of sizes for {resolution} pixels, only for "
      f"{', '.join(map(str, BUCKETS))}: make one with `curate buckets` and give "
      "it as --table=FILE.json."
    )
  return BUCKETS[resolution]


def _evenly(index: Index, count: int) -> list[_Row]:
  """At most `count` images, as far apart in the index as they can be."""
  step, column = ("kept", "kept") if index.has("kept") else ("scan", "error")
  usable = []  # for each part, the numbers of its rows
  for part in range(index.num_parts):
    values = index.read(part, step, columns=(column,))[column].to_pylist()
    wanted = True if column == "kept" else None
    usable.append([row for row, value in enumerate(values) if value is wanted])
  total = sum(map(len, usable))
  if not total:
    raise ValueError(
      f"{index.directory} has no image to show: "
      + ("`curate filter` kept none." if step == "kept" else "none can be read.")
    )
  count = min(count, total)
  # The middle of each of `count` equal stretches.
  chosen = [(2 * i + 1) * total // (2 * count) for i in range(count)]
  rows, before = [], 0
  for part, numbers in enumerate(usable):
    here = [numbers[i - before] for i in chosen if before <= i < before + len(numbers)]
    before += len(numbers)
    if here:
      columns = ("id", "location", "captions")
      known = index.read(part, "scan", index.captions_step, columns=columns)
      rows += [_row(content) for content in known.take(here).to_pylist()]
  return rows


def _row(content: Mapping[str, Any]) -> _Row:
  captions = [(c["text"], c["kind"]) for c in content["captions"] or []]
  return _Row(content["id"], content["location"], captions)


# ---- drawing ----


class _Cell(NamedTuple):
  """An image, whole and cropped, and lines of text in their colors."""

  images: tuple[Image.Image, ...]
  lines: list[_Line]


def _cell(source: str, row: _Row, rule: CropRule) -> _Cell:
  lines = _wrapped(row.id, 1, _INK)
  try:
    image = open_image(read_bytes(source, row.location))
  except (OSError, ValueError) as error:
    return _Cell((), [*lines, *_wrapped(f"Cannot be shown: {error}", 3, _WARNING)])
  crop = rule.plan(image.height, image.width)
  images = (_original(image, crop), _fitted(rule.apply(image)))
  return _Cell(images, [*lines, *_facts(image, crop), *_caption_lines(row.captions)])


def _original(image: Image.Image, crop: Crop) -> Image.Image:
  """The whole image, what is cut off dimmed, and a frame around the rest."""
  small = _fitted(image)
  scale_x, scale_y = small.width / image.width, small.height / image.height
  top, left, bottom, right = crop.box.tolist()
  box = (
    max(0, round(left * scale_x)),
    max(0, round(top * scale_y)),
    min(small.width, round(right * scale_x)),
    min(small.height, round(bottom * scale_y)),
  )
  dimmed = ImageEnhance.Brightness(small).enhance(_DIMMED)
  if box[0] < box[2] and box[1] < box[3]:
    dimmed.paste(small.crop(box), box[:2])
    frame = (box[0], box[1], box[2] - 1, box[3] - 1)
    ImageDraw.Draw(dimmed).rectangle(frame, outline=_FRAME, width=2)
  return dimmed


def _fitted(image: Image.Image) -> Image.Image:
  """The image, no larger than a cell; smaller ones in whole pixels of their own."""
  scale = min(_SIDE / image.width, _SIDE / image.height)
  if scale >= 1:
    scale, filter = math.floor(scale), Image.Resampling.NEAREST
  else:
    filter = Image.Resampling.LANCZOS
  size = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
  return image.resize(size, filter)


def _facts(image: Image.Image, crop: Crop) -> list[_Line]:
  scale = crop.scaled_height / image.height
  top, left, bottom, right = crop.box.tolist()
  lost = 1 - (bottom - top) * (right - left) / (image.height * image.width)
  fact = (
    f"{image.height} x {image.width} to {crop.bucket.height} x {crop.bucket.width}, "
    f"scaled by {scale:.3g}, {max(0, lost):.0%} cut off"
  )
  if not crop.enlarges:
    return _wrapped(fact, 2, _FAINT)
  left_out = "Too small: left out unless prepare is given --allow_upscaling."
  return _wrapped(f"{fact}. {left_out}", 2, _WARNING)


def _caption_lines(
  captions: Sequence[tuple[str, str]],
) -> list[_Line]:
  if not captions:
    return _wrapped("No caption.", 1, _FAINT)
  # Of each kind the first, the short one before the long one, which fills the rest.
  first = {kind: text for text, kind in reversed(captions)}
  lines = []
  for kind in sorted(first, key=lambda kind: kind == "long"):
    rest = _MOST_LINES - len(lines)
    most = rest if kind == "long" or len(first) == 1 else min(2, rest)
    lines += _wrapped(f"{kind}: {first[kind]}", most, _INK)
  if len(captions) > len(first):
    lines += _wrapped(f"{len(captions)} captions in all", 1, _FAINT)
  return lines


def _wrapped(text: str, most: int, color: tuple[int, int, int]) -> list[_Line]:
  """At most `most` lines as wide as a cell; more is cut, and three dots say so.

  Breaks at white space, and in a word, or a script without spaces, where it must.
  """
  # One line of text measures and draws what is printable and nothing else.
  text = "".join(c if c.isprintable() else " " for c in text[:_LONGEST_TEXT])
  font, width = _font(), 2 * _SIDE + _GAP
  lines, rest = [], " ".join(text.split())
  while rest and len(lines) < most:
    fits = _longest_fit(rest, width, font)
    if fits < len(rest) and (space := rest.rfind(" ", 0, fits + 1)) > 0:
      fits = space
    lines.append(rest[:fits].strip())
    rest = rest[fits:].strip()
  if rest and lines:
    fits = _longest_fit(lines[-1], width - font.getlength(" …"), font)
    lines[-1] = f"{lines[-1][:fits].rstrip()} …"
  return [(line, color) for line in lines]


def _longest_fit(text: str, width: int | float, font: Any) -> int:
  """Number of leading characters that fit; at least one."""
  low, high = 1, len(text)
  while low < high:
    middle = (low + high + 1) // 2
    if font.getlength(text[:middle]) <= width:
      low = middle
    else:
      high = middle - 1
  return low


def _sheet(title: str, cells: Sequence[_Cell]) -> Image.Image:
  """Cells in two columns below a title, each row as high as it must be."""
  heading = _wrapped(title, 3, _FAINT)
  columns = min(2, len(cells))
  width = 2 * _SIDE + _GAP
  rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
  heights = [max(_image_height(cell) for cell in row) for row in rows]
  texts = [_LINE_HEIGHT * max(len(cell.lines) for cell in row) for row in rows]
  sheet = Image.new(
    "RGB",
    (
      _MARGIN + columns * (width + _MARGIN),
      (_MARGIN + _LINE_HEIGHT * len(heading) + _GAP)
      + sum(heights)
      + sum(texts)
      + len(rows) * (_GAP + _MARGIN),
    ),
    _PAPER,
  )
  draw, top = ImageDraw.Draw(sheet), _MARGIN
  top = _draw_lines(draw, _MARGIN, top, heading) + _GAP
  for row, height, text in zip(rows, heights, texts, strict=True):
    for column, cell in enumerate(row):
      left = _MARGIN + column * (width + _MARGIN)
      for i in range(2):
        x = left + i * (_SIDE + _GAP)
        draw.rectangle((x, top, x + _SIDE - 1, top + height - 1), fill=_EMPTY)
        if cell.images:
          image = cell.images[i]
          corner = (
            x + (_SIDE - image.width) // 2,
            top + (height - image.height) // 2,
          )
          sheet.paste(image, corner)
      _draw_lines(draw, left, top + height + _GAP, cell.lines)
    top += height + _GAP + text + _MARGIN
  return sheet


def _draw_lines(
  draw: ImageDraw.ImageDraw, left: int, top: int, lines: Sequence[_Line]
) -> int:
  """Draws lines below each other; returns where the next one would be."""
  for line, color in lines:
    draw.text((left, top), line, color, _font())
    top += _LINE_HEIGHT
  return top


def _image_height(cell: _Cell) -> int:
  return max((image.height for image in cell.images), default=_SIDE // 4)


@functools.cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
  return ImageFont.load_default(_FONT_SIZE)
