"""The paper's table 1 and figure 6 for one's own captions.

Every part of an index is counted by itself and kept under INDEX/stats, and counts are
added up: in any order and grouping the sum is what one pass over all captions gives.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import fsspec.core
from absl import logging
from PIL import Image, ImageDraw, ImageFont

from pixsigma_jax import disk
from pixsigma_jax.convert import files
from pixsigma_jax.curate.nouns import Tagger, load_tagger
from pixsigma_jax.data.index import Index, open_index
from pixsigma_jax.data.ingest import run_parts

Caption: TypeAlias = tuple[str, str]  # text and kind

# PixArt-Σ, table 1: a noun is valid if it occurs more often than this.
_VALID_ABOVE = 10
_FORMAT_VERSION = 1
_MOST_COMMON = 50  # nouns that statistics.json lists

HEADER = ("Dataset", "Volume", "Caption", "VN/DN", "Total nouns", "ACL", "Average")
# PixArt-Σ, table 1. ACL is the average caption length in words, Average nouns an image.
PAPER = (
  ("Internal-α", "14M", "Raw", "187K/931K", "175M", "25", "11.7/Img"),
  ("Internal-α", "14M", "LLaVA", "28K/215K", "536M", "98", "29.3/Img"),
  ("Internal-α", "14M", "Share-Captioner", "51K/420K", "815M", "184", "54.4/Img"),
  ("Internal-Σ", "33M", "Raw", "294K/1512K", "485M", "35", "14.4/Img"),
  ("Internal-Σ", "33M", "Share-Captioner", "77K/714K", "1804M", "180", "53.6/Img"),
  ("4K-Σ", "2.3M", "Share-Captioner", "24K/96K", "115M", "163", "49.5/Img"),
)


@dataclasses.dataclass(frozen=True)
class Counts:
  """Counts over captions of one kind.

  Attributes:
    images: with at least one such caption.
    captions: of all those images.
    lengths: words of a caption → how many captions have as many.
    nouns: noun → how often it occurs.
  """

  images: int
  captions: int
  lengths: Mapping[int, int]
  nouns: Mapping[str, int]

  @property
  def average_length(self) -> float:
    """Words a caption (ACL), separated by white space."""
    return sum(length * n for length, n in self.lengths.items()) / self.captions

  @property
  def total_nouns(self) -> int:
    return sum(self.nouns.values())

  @property
  def distinct_nouns(self) -> int:
    """Number of distinct nouns (DN)."""
    return len(self.nouns)

  @property
  def valid_nouns(self) -> int:
    """VN: distinct nouns that occur more than ten times."""
    return sum(n > _VALID_ABOVE for n in self.nouns.values())

  @property
  def nouns_per_image(self) -> float:
    return self.total_nouns / self.images


@dataclasses.dataclass(frozen=True)
class Statistics:
  """Counts over captions, by kind.

  Attributes:
    tagger: name of what found the nouns.
    images: all that were looked at, with captions or without.
    kinds: kind of caption → its counts; only kinds that occur.
  """

  tagger: str
  images: int
  kinds: Mapping[str, Counts]


def count(images: Iterable[Sequence[Caption]], tagger: Tagger) -> Statistics:
  """One pass over images, each given by its captions."""
  total, sums = 0, collections.defaultdict(_Sum)
  for captions in images:
    total += 1
    for kind in {kind for _, kind in captions}:
      sums[kind].images += 1
    for text, kind in captions:
      sums[kind].captions += 1
      sums[kind].lengths[len(text.split())] += 1
      sums[kind].nouns.update(tagger.nouns(text))
  return Statistics(tagger.name, total, {kind: s.counts() for kind, s in sums.items()})


def merge(parts: Iterable[Statistics]) -> Statistics:
  """Sum of the parts' counts: equal to those of one pass over all images.

  Raises:
    ValueError: there are no parts, or their nouns were found by different taggers.
  """
  taggers, total, sums = set(), 0, collections.defaultdict(_Sum)
  for part in parts:
    taggers.add(part.tagger)
    total += part.images
    for kind, counts in part.kinds.items():
      sums[kind].images += counts.images
      sums[kind].captions += counts.captions
      sums[kind].lengths.update(counts.lengths)
      sums[kind].nouns.update(counts.nouns)
  if len(taggers) != 1:
    raise ValueError(
      f"Nouns of the taggers {', '.join(sorted(taggers)) or 'of no parts'} cannot be "
      "added up: count every part with the same one."
    )
  return Statistics(
    taggers.pop(), total, {kind: s.counts() for kind, s in sums.items()}
  )


@dataclasses.dataclass
class _Sum:
  """Counts that grow."""

  images: int = 0
  captions: int = 0
  lengths: collections.Counter[int] = dataclasses.field(
    default_factory=collections.Counter
  )
  nouns: collections.Counter[str] = dataclasses.field(
    default_factory=collections.Counter
  )

  def counts(self) -> Counts:
    return Counts(self.images, self.captions, dict(self.lengths), dict(self.nouns))


# ---- the step ----


def run(
  index: str, *, tagger: str, output: str | None, beam_options: Sequence[str]
) -> None:
  """Counts the captions of an index, prints table 1 and writes it and figure 6.

  Captions are counted of images that `filter` kept, or, before it, of all that can be
  read. A part whose captions were counted before, with the same tagger, is not counted
  again.

  Args:
    index: its directory.
    tagger: as `load_tagger` takes it.
    output: directory for statistics.json and caption_lengths.png; None for neither.
    beam_options: of Apache Beam.

  Raises:
    FileNotFoundError: there is no such index.
    ValueError: there is no such tagger, or the index has no captions.
  """
  total = count_index(index, tagger=tagger, beam_options=beam_options)
  print(table(total, posixpath.basename(open_index(index).directory)))
  if output is not None:
    folder = pathlib.Path(output)
    report = {"only_kept": open_index(index).has("kept"), **as_dict(total)}
    files.write_json(folder / "statistics.json", report)
    image = draw_lengths(total)
    disk.write_whole(
      folder / "caption_lengths.png", lambda partial: image.save(partial, "png")
    )
    logging.info("Wrote statistics.json and caption_lengths.png to %s.", folder)


def count_index(index: str, *, tagger: str, beam_options: Sequence[str]) -> Statistics:
  """Statistics of an index; arguments and errors are those of `run`."""
  load_tagger(tagger)  # what it lacks is said before the work
  opened = open_index(index)
  kept = opened.has("kept")
  parts = range(opened.num_parts)
  work = functools.partial(count_part, opened.directory, tagger, kept)
  run_parts(work, parts, what="stats", beam_options=beam_options)
  total = merge(_from_json(_read_part(opened, part)) for part in parts)
  if not total.kinds:
    raise ValueError(
      f"{index} has no captions to count in {total.images} images: run "
      "`curate caption` first."
    )
  return total


def count_part(directory: str, tagger: str, kept: bool, part: int) -> None:
  """Counts the captions of one part of an index, unless that is done already.

  Args:
    kept: whether the index was filtered.
  """
  index = open_index(directory)
  captions = list(_captions(index, part, kept))
  # Not when they were counted, but what: captions or thresholds may have changed.
  counted = [_FORMAT_VERSION, tagger, captions]
  fingerprint = hashlib.sha256(json.dumps(counted).encode()).hexdigest()
  try:
    if _read_part(index, part)["of"] == fingerprint:
      return
  except (FileNotFoundError, ValueError, KeyError):  # none, or one that is damaged
    pass
  statistics = count(captions, load_tagger(tagger))
  content = {"of": fingerprint, **dataclasses.asdict(statistics)}
  index.write_json(_part(part), content)


def _captions(index: Index, part: int, kept: bool) -> Iterator[list[Caption]]:
  """Captions of each counted image of a part."""
  steps = ["scan", index.captions_step, "kept"][: 3 if kept else 2]
  rows = index.read(part, *steps, columns=("error", "captions", "kept"))
  counted = rows["kept"] if kept else rows["error"].is_null()
  for captions in rows.filter(counted)["captions"].to_pylist():
    yield [(caption["text"], caption["kind"]) for caption in captions or []]


def _part(part: int) -> str:
  return f"stats/{part:05d}.json"


def _read_part(index: Index, part: int) -> Any:
  fs, path = fsspec.core.url_to_fs(posixpath.join(index.directory, _part(part)))
  return json.loads(fs.cat_file(path))


def _from_json(content: Mapping[str, Any]) -> Statistics:
  kinds = {
    kind: Counts(
      images=counts["images"],
      captions=counts["captions"],
      lengths={int(length): n for length, n in counts["lengths"].items()},
      nouns=counts["nouns"],
    )
    for kind, counts in content["kinds"].items()
  }
  return Statistics(content["tagger"], content["images"], kinds)


def as_dict(statistics: Statistics) -> dict[str, Any]:
  """The statistics as statistics.json has them."""
  kinds = {}
  for kind, counts in sorted(statistics.kinds.items()):
    most = sorted(counts.nouns.items(), key=lambda pair: (-pair[1], pair[0]))
    kinds[kind] = {
      "images": counts.images,
      "captions": counts.captions,
      "average_caption_length": counts.average_length,
      "valid_nouns": counts.valid_nouns,
      "distinct_nouns": counts.distinct_nouns,
      "total_nouns": counts.total_nouns,
      "nouns_per_image": counts.nouns_per_image,
      "most_common_nouns": dict(most[:_MOST_COMMON]),
      "captions_by_length": dict(sorted(counts.lengths.items())),
    }
  return {"tagger": statistics.tagger, "images": statistics.images, "kinds": kinds}


# ---- table 1 ----


def table(statistics: Statistics, dataset: str) -> str:
  """The paper's table 1 in lines of text, with a row for each kind of caption."""
  rows = table_rows(statistics, dataset)
  widths = [max(map(len, column)) for column in zip(HEADER, *rows, *PAPER, strict=True)]
  rule = "  ".join("-" * width for width in widths)

  def line(row: Sequence[str]) -> str:
    # Names to the left, figures to the right.
    cells = [
      cell.ljust(width) if i in (0, 2) else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()

  return "\n".join(
    [
      line(HEADER),
      rule,
      *map(line, rows),
      rule,
      *map(line, PAPER),
      "",
      *remarks(statistics),
    ]
  )


def table_rows(statistics: Statistics, dataset: str) -> list[tuple[str, ...]]:
  """Rows of table 1 under `HEADER`, one for each kind of caption."""
  return [
    (
      dataset,
      _short(statistics.images),
      kind,
      f"{_short(counts.valid_nouns)}/{_short(counts.distinct_nouns)}",
      _short(counts.total_nouns),
      f"{counts.average_length:.1f}",
      f"{counts.nouns_per_image:.1f}/Img",
    )
    for kind, counts in sorted(statistics.kinds.items())
  ]


def remarks(statistics: Statistics) -> tuple[str, ...]:
  """Remarks that table 1 is to be read with."""
  return (
    f"Nouns found by the tagger: {statistics.tagger}. The paper does not name its "
    "own, so compare lengths, and nouns only roughly.",
    "VN: distinct nouns that occur more than 10 times. DN: distinct nouns. ACL: "
    "average caption length in words. Average: nouns an image.",
  )


def _short(number: int) -> str:
  """A number as the paper writes large ones: 187K, 175M."""
  if number < 10_000:
    return str(number)
  if number < 10_000_000:
    return f"{number / 1e3:.0f}K"
  return f"{number / 1e6:.0f}M"


# ---- figure 6 ----

_SIZE = (1280, 720)
_FRAME = (110, 92, 1240, 620)  # left, top, right, bottom of what the bars stand in
_INK, _FAINT, _PAPER_WHITE = (40, 44, 52), (222, 226, 232), (255, 255, 255)
# By kind of caption; the color-blind tell them apart too.
_COLORS = {"short": (230, 126, 34), "long": (38, 110, 180)}
_OTHER_COLOR = (110, 110, 110)
_SHOWN = 0.995  # share of captions that the axis reaches
_MOST_BARS = 60


def draw_lengths(statistics: Statistics) -> Image.Image:
  """The paper's figure 6: how long captions are, in words, by kind."""
  kinds = sorted(statistics.kinds.items())
  limit = max(quantile(counts.lengths, _SHOWN) for _, counts in kinds) + 1
  width = max(1, _nice(limit / _MOST_BARS))
  bars = -(-limit // width)
  shares = {kind: _shares(counts, width, bars) for kind, counts in kinds}
  tallest = 100 * max(max(heights) for heights in shares.values())
  step_y = _nice_fraction(tallest / 5)
  top_y = step_y * math.ceil(tallest / step_y + 0.05)
  step_x = _nice(width * bars / 8)

  left, top, right, bottom = _FRAME

  def x(words: int | float) -> float:
    return left + (right - left) * words / (width * bars)

  def y(percent: int | float) -> float:
    return bottom - (bottom - top) * percent / top_y

  image = Image.new("RGBA", _SIZE, (*_PAPER_WHITE, 255))
  draw = ImageDraw.Draw(image)
  for i in range(round(top_y / step_y) + 1):
    height = y(i * step_y)
    draw.line((left, height, right, height), fill=_FAINT)
    text = f"{i * step_y:g} %"
    draw.text((left - 12, height), text, _INK, _font(20), anchor="rm")
  for words in range(0, width * bars + 1, step_x):
    draw.line((x(words), bottom, x(words), bottom + 8), fill=_INK, width=2)
    draw.text((x(words), bottom + 14), str(words), _INK, _font(20), anchor="mt")
  for kind, counts in kinds:
    # Each kind on a sheet of its own, so that one shines through the other.
    sheet = Image.new("RGBA", _SIZE)
    pen = ImageDraw.Draw(sheet)
    color = _COLORS.get(kind, _OTHER_COLOR)
    for i, share in enumerate(shares[kind]):
      if share:
        box = (x(i * width), y(100 * share), x((i + 1) * width) - 1, bottom)
        pen.rectangle(box, fill=(*color, 120), outline=(*color, 255))
    mean = x(counts.average_length + 0.5)  # a bar of n begins at n
    if mean <= right:
      for dash in range(top, bottom, 14):
        pen.line((mean, dash, mean, min(dash + 8, bottom)), (*color, 255), 3)
    image.alpha_composite(sheet)
  draw.line((left, bottom, right, bottom), fill=_INK, width=2)
  draw.line((left, top, left, bottom), fill=_INK, width=2)

  draw.text((left, 26), "Caption length", _INK, _font(30))
  beyond = sum(
    n
    for _, counts in kinds
    for length, n in counts.lengths.items()
    if length >= width * bars
  )
  note = f"words in a caption, {width} a bar" if width > 1 else "words in a caption"
  if beyond:
    note += f"; {beyond:,} longer captions are not shown"
  note += "; dashed: the average"
  draw.text(((left + right) / 2, bottom + 58), note, _INK, _font(20), anchor="mt")
  draw.text((left - 12, top - 34), "share", _INK, _font(20), anchor="rt")
  _draw_legend(draw, kinds)
  return image.convert("RGB")


def _draw_legend(draw: ImageDraw.ImageDraw, kinds: Sequence[tuple[str, Counts]]):
  """Draws the legend above the frame, where it hides no bar."""
  lines = {
    kind: f"{kind}: {counts.captions:,} captions, ACL {counts.average_length:.1f}"
    for kind, counts in kinds
  }
  x = _FRAME[2] - max(_font(22).getlength(line) for line in lines.values())
  y = _FRAME[1] - 12 - 32 * len(lines)
  for kind, line in lines.items():
    color = _COLORS.get(kind, _OTHER_COLOR)
    draw.rectangle((x - 32, y + 4, x - 12, y + 24), fill=color)
    draw.text((x, y), line, _INK, _font(22))
    y += 32


def _shares(counts: Counts, width: int, bars: int) -> list[float]:
  """Share of all captions in each bar."""
  heights = [0] * bars
  for length, n in counts.lengths.items():
    if length < width * bars:
      heights[length // width] += n
  return [n / counts.captions for n in heights]


def quantile(lengths: Mapping[int, int], share: float) -> int:
  """The smallest length that at least this share of the captions does not exceed."""
  needed, seen = share * sum(lengths.values()), 0
  for length, n in sorted(lengths.items()):
    seen += n
    if seen >= needed:
      return length
  return max(lengths)


def _nice(least: float) -> int:
  """The smallest of 1, 2, 5, 10, 20, 50 … that is not below `least`."""
  return round(_nice_fraction(max(least, 1.0)))


def _nice_fraction(least: float) -> float:
  power = 10.0 ** math.floor(math.log10(least))
  return next(power * m for m in (1, 2, 5, 10) if power * m >= least * (1 - 1e-9))


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
  return ImageFont.load_default(size)
