"""Captioned images in several shapes, composed of real handwritten digits.

The world of the miniature: 1797 digits written by hand (UCI, Alpaydin and Kaynak 1998,
8x8 pixels with 17 grey levels, inside scikit-learn's wheel), in seven colors on black,
alone or in pairs. What a prompt asks for is exact, so whether an image follows it is a
question with an answer (`evaluate/digits.py`); some colored digits never occur in
training, so a network that draws them has taken its prompts apart.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float32
from sklearn.datasets import load_digits

from pixsigma_jax.data.draws import draws, unit
from pixsigma_jax.models.hashed_words import split_words
from pixsigma_jax.wording import listed, shortened

Relation: TypeAlias = Literal["left_of", "above"]
Task: TypeAlias = Literal["single", "left_of", "above"]
Split: TypeAlias = Literal["training", "reader"]

CELL = 8  # pixels along a side of a glyph as it was scanned
DIGITS = (
  *("zero", "one", "two", "three", "four"),
  *("five", "six", "seven", "eight", "nine"),
)
COLORS = {  # corners of the color cube: the nearest two are 35 degrees apart
  "red": (1.0, 0.0, 0.0),
  "green": (0.0, 1.0, 0.0),
  "blue": (0.0, 0.0, 1.0),
  "yellow": (1.0, 1.0, 0.0),
  "cyan": (0.0, 1.0, 1.0),
  "magenta": (1.0, 0.0, 1.0),
  "white": (1.0, 1.0, 1.0),
}
TASKS: tuple[Task, ...] = ("single", "left_of", "above")
# Rows and columns of cells in an image of each task.
CELLS: dict[Task, tuple[int, int]] = {
  "single": (1, 1),
  "left_of": (1, 2),
  "above": (2, 1),
}
# The first of a list is canonical. {0} and {1} are items, such as "red seven".
PHRASES: dict[Task, dict[str, tuple[str, ...]]] = {
  "single": {
    "long": ("a {0}", "a handwritten {0}", "a picture of a {0}"),
    "short": ("{0}",),
  },
  "left_of": {
    "long": ("a {0} left of a {1}", "a {0} to the left of a {1}"),
    "short": ("{0} left of {1}",),
  },
  "above": {
    "long": ("a {0} above a {1}", "a {0} on top of a {1}"),
    "short": ("{0} above {1}",),
  },
}


@dataclasses.dataclass(frozen=True)
class Item:
  """One colored digit."""

  color: str
  digit: int

  def __post_init__(self):
    if self.color not in COLORS:
      raise ValueError(f"There is no color {self.color!r}: use {', '.join(COLORS)}.")
    if self.digit not in range(10):
      raise ValueError(f"There is no digit {self.digit}: use 0 to 9.")

  def __str__(self) -> str:
    return f"{self.color} {DIGITS[self.digit]}"


@dataclasses.dataclass(frozen=True)
class Scene:
  """One item, or two of which the first is `relation` the second."""

  items: tuple[Item, ...]
  relation: Relation | None = None

  def __post_init__(self):
    if self.task not in TASKS or len(self.items) != np.prod(CELLS[self.task]):
      raise ValueError(
        f"A scene is one item with no relation, or two with 'left_of' or 'above': "
        f"not {len(self.items)} with {self.relation!r}."
      )

  @property
  def task(self) -> Task:
    """The kind of prompt this is, by which accuracies are counted."""
    return self.relation or "single"


# One digit of each color and no digit twice: 10 % of the 70 items. Seen are therefore
# every color and every digit, each of them in at least six combinations.
HELD_OUT = frozenset(
  {
    Item("red", 4),
    Item("green", 9),
    Item("blue", 6),
    Item("yellow", 0),
    Item("cyan", 5),
    Item("magenta", 8),
    Item("white", 1),
  }
)


@functools.cache
def scenes(task: Task, *, seen: bool) -> tuple[Scene, ...]:
  """Every scene of a task that training may show (`seen`), or that it never does.

  A scene is unseen when at least one of its items is held out: 63 and 7 single ones,
  3969 and 931 pairs.
  """
  items = [Item(color, digit) for color in COLORS for digit in range(10)]
  relation = None if task == "single" else task
  count = int(np.prod(CELLS[task]))
  return tuple(
    Scene(chosen, relation)
    for chosen in itertools.product(items, repeat=count)
    if HELD_OUT.isdisjoint(chosen) == seen
  )


def captions(scene: Scene) -> dict[str, list[str]]:
  """All the ways to ask for a scene, long and short, the canonical one first."""
  return {
    length: [phrase.format(*scene.items) for phrase in phrases]
    for length, phrases in PHRASES[scene.task].items()
  }


def _phrases() -> Iterator[tuple[Task, str]]:
  for task, lengths in PHRASES.items():
    for phrase in itertools.chain.from_iterable(lengths.values()):
      yield task, phrase


@functools.cache
def _readings() -> tuple[tuple[Task, re.Pattern[str]], ...]:
  item = f"({'|'.join(COLORS)}) ({'|'.join(DIGITS)})"
  return tuple(
    (task, re.compile(phrase.format(item, item))) for task, phrase in _phrases()
  )


def parse(prompt: str) -> Scene:
  """The scene that a prompt asks for: the inverse of each of `captions`.

  Capitals, punctuation and spacing do not matter.

  Raises:
    ValueError: the prompt is none of this world's phrases.
  """
  words = split_words(prompt)
  for task, pattern in _readings():
    if match := pattern.fullmatch(" ".join(words)):
      names = iter(match.groups())
      items = tuple(
        Item(color, DIGITS.index(digit))
        for color, digit in zip(names, names, strict=True)
      )
      return Scene(items, None if task == "single" else task)
  known = {*COLORS, *DIGITS}.union(*(phrase.split() for _, phrase in _phrases()))
  unknown = [repr(word) for word in words if word not in known]
  raise ValueError(
    f"Cannot read the prompt {shortened(prompt)}"
    + (f" (unknown: {listed(unknown)})" if unknown else "")
    + ": write it like 'a red seven', 'a red seven left of a blue two' or 'a red seven "
    f"above a blue two', with the colors {', '.join(COLORS)} and the digits zero to "
    "nine."
  )


@functools.cache
def _glyphs() -> tuple[Float32[np.ndarray, "g 8 8"], tuple[int, ...]]:
  """All handwriting: ink in [0, 1] (exact sixteenths), and which digit each is."""
  pixels, labels = map(np.asarray, load_digits(return_X_y=True))
  ink = (pixels.reshape(-1, CELL, CELL) / 16).astype(np.float32)
  ink.setflags(write=False)  # cached, so shared by every caller
  return ink, tuple(labels.tolist())


@functools.cache
def handwriting(split: Split, digit: int) -> tuple[int, ...]:
  """Indices of one digit's glyphs in one split; the two splits share none.

  Every other glyph trains the network and the rest teach the reader, so that a network
  cannot please the reader by copying what the reader has learned by heart.
  """
  _, labels = _glyphs()
  parity = {"training": 0, "reader": 1}[split]
  return tuple(i for i in range(parity, len(labels), 2) if labels[i] == digit)


def glyph(index: int) -> Float32[np.ndarray, "8 8"]:
  """One scanned digit as ink in [0, 1]."""
  return _glyphs()[0][index]


def _refine(ink: Float32[np.ndarray, "h w"], times: int) -> Float32[np.ndarray, "h2 w"]:
  """Splits each row into `times` rows whose mean it is, sloped like its neighbours.

  Average-interpolating refinement (Donoho 1993) with a central difference for slope,
  limited so that ink stays within [0, 1].
  """
  padded = np.pad(ink, ((1, 1), (0, 0)), mode="edge")
  slope = (padded[2:] - padded[:-2]) / 2
  offsets = (np.arange(times, dtype=np.float32) + 0.5) / times - 0.5
  room = np.minimum(ink, 1 - ink) / offsets[-1]
  slope = np.clip(slope, -room, room)
  fine = ink[:, None] + slope[:, None] * offsets[:, None]
  return fine.reshape(-1, ink.shape[1])


@functools.lru_cache(maxsize=4096)
def _enlarged(index: int, cell: int) -> Float32[np.ndarray, "cell cell"]:
  ink = glyph(index)
  while (factor := cell // len(ink)) > 1:
    times = 2 if factor % 2 == 0 else factor
    ink = _refine(_refine(ink, times).T, times).T
  ink.setflags(write=False)
  return ink


def render(
  scene: Scene, glyphs: Sequence[int], cell: int
) -> Float32[np.ndarray, "H W 3"]:
  """Draws a scene with the handwriting `glyphs`, one index for each item.

  A cell of 8 pixels shows a glyph as it was scanned; a larger one shows it smoothly
  enlarged, such that averaging the large image gives the small one.

  Returns:
    An image in [-1, 1]: `cell` pixels a side for one item, twice as wide for a pair
    side by side, twice as high for one above the other.

  Raises:
    ValueError: a glyph is of another digit than its item, or `cell` is no multiple
      of 8.
  """
  if cell < CELL or cell % CELL:
    raise ValueError(
      f"A cell of {cell} pixels cannot be drawn: use multiples of {CELL}."
    )
  _, labels = _glyphs()
  digits = [labels[index] for index in glyphs]
  if digits != [item.digit for item in scene.items]:
    raise ValueError(
      f"The glyphs {tuple(glyphs)} are of the digits {digits}, and the scene "
      f"{captions(scene)['short'][0]!r} needs "
      f"{[item.digit for item in scene.items]}: choose them with `handwriting`."
    )
  drawn = [
    2 * _enlarged(index, cell)[..., None] * np.array(COLORS[item.color], np.float32) - 1
    for item, index in zip(scene.items, glyphs, strict=True)
  ]
  return np.concatenate(drawn, axis=0 if scene.relation == "above" else 1)


def training_scenes(
  seed: int, count: int, weights: Mapping[str, float]
) -> Iterator[tuple[Scene, tuple[int, ...]]]:
  """Scenes to train on, with the handwriting to draw each of them with.

  The i-th is a function of (seed, i) alone. No item is held out, no glyph is one of
  the reader's.

  Args:
    weights: how often each task comes, relative to the others.

  Raises:
    ValueError: a weight is of no known task or negative, or all are zero.
  """
  shares = np.cumsum([weights.get(task, 0.0) for task in TASKS])
  if (
    set(weights) - set(TASKS) or min(weights.values(), default=0) < 0 or not shares[-1]
  ):
    raise ValueError(
      f"The weights {dict(weights)} do not mix tasks: give any of {', '.join(TASKS)} a "
      "number of at least 0, and one of them more."
    )
  for i in range(count):
    numbers = draws("scene", seed, i)
    share = unit(next(numbers)) * shares[-1]
    task = TASKS[int(np.searchsorted(shares, share, side="right"))]
    choices = scenes(task, seen=True)
    scene = choices[next(numbers) % len(choices)]
    glyphs = (handwriting("training", item.digit) for item in scene.items)
    yield scene, tuple(indices[next(numbers) % len(indices)] for indices in glyphs)
