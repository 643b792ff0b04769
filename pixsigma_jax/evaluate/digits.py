"""Whether an image follows its prompt: an exact reader of colored handwritten digits.

What it says of real renders, so how far its word goes on samples (`tests/evaluate/`
repeats the measurement): all colors and 0.995 of the digits right on the handwriting
that trains the network, none of which the reader was taught with.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64
from scipy import ndimage
from sklearn.svm import SVC

from pixsigma_jax.data import digits
from pixsigma_jax.data.digits import Item, Scene, Task
from pixsigma_jax.data.draws import draws


class EvaluationPrompt(NamedTuple):
  """A prompt to draw, what it asks for, and the row of the table it counts in."""

  task: Task
  novelty: Literal["seen", "unseen"]
  prompt: str
  scene: Scene


def evaluation_prompts(seed: int, per_task: int) -> list[EvaluationPrompt]:
  """`per_task` prompts of each task, of seen and of unseen scenes each.

  Scenes come in an order that `seed` decides, none again before all have been (there
  are only seven unseen single digits).
  """
  prompts = []
  for task, novelty in itertools.product(digits.TASKS, ("seen", "unseen")):
    scenes = digits.scenes(task, seen=novelty == "seen")
    ranks = [next(draws("prompt", seed, task, i)) for i in range(len(scenes))]
    order = itertools.cycle(np.argsort(ranks, kind="stable"))
    for i in itertools.islice(order, per_task):
      prompt = digits.captions(scenes[i])["long"][0]
      prompts.append(EvaluationPrompt(task, novelty, prompt, scenes[i]))
  return prompts


def _direction(ink: Float[np.ndarray, "b 8 8"]) -> Float64[np.ndarray, "b 64"]:
  """Ink as a unit vector, so that a faint digit reads like a bold one."""
  flat = ink.reshape(len(ink), -1).astype(np.float64)
  return flat / np.maximum(np.linalg.norm(flat, axis=-1, keepdims=True), 1e-9)


@functools.cache
def _classifier() -> SVC:
  """Digits from 8x8 ink: a support vector machine with virtual examples.

  A first machine finds the glyphs that matter, its support vectors; the second also
  learns those glyphs moved and slanted a little (Schölkopf et al. 1996, "virtual
  support vectors"), which tells it what does not matter.
  """
  examples = [
    (digits.glyph(i), digit)
    for digit in range(10)
    for i in digits.handwriting("reader", digit)
  ]
  ink = np.stack([glyph for glyph, _ in examples])
  labels = np.array([digit for _, digit in examples])

  def machine() -> SVC:
    return SVC().set_params(C=10.0, gamma=5.0)

  support = machine().fit(_direction(ink), labels).support_
  # (rows down, columns right, slant in columns from top to bottom), in pixels.
  moves = [
    (0.3, 0, 0),
    (-0.3, 0, 0),
    (0, 0.3, 0),
    (0, -0.3, 0),
    (0, 0, 1.4),
    (0, 0, -1.4),
  ]
  inks, centre = [ink], (digits.CELL - 1) / 2
  for down, right, slant in moves:
    lean = slant / (digits.CELL - 1)
    # Homogeneous, from where a pixel is to where its ink comes from.
    source = np.array(
      [[1, 0, 0, 0], [0, 1, 0, -down], [0, lean, 1, -right - lean * centre]]
    )
    inks.append(
      ndimage.affine_transform(ink[support], source, order=1, mode="grid-constant")
    )
  labels = np.concatenate([labels, *[labels[support]] * len(moves)])
  return machine().fit(_direction(np.concatenate(inks)), labels)


def read_batch(
  images: Float[np.ndarray, "b H W 3"], cells: tuple[int, int]
) -> list[tuple[Item, ...]]:
  """The items that images in [-1, 1] show, one for each cell in row-major order.

  A cell is averaged down to 8x8, its color is the palette's nearest ray through black,
  its digit what the light along that ray spells. It always reads something: on noise
  it is right by chance, one item in seventy.

  Args:
    cells: rows and columns of cells in each image.

  Raises:
    ValueError: a cell is not square with a multiple of 8 pixels along a side.
  """
  (count, height, width, _), (rows, columns) = images.shape, cells
  cell = height // rows
  if height != rows * cell or width != columns * cell or cell < 8 or cell % 8:
    raise ValueError(
      f"A {height}x{width} image does not divide into {rows}x{columns} cells of "
      f"{digits.CELL}, {2 * digits.CELL}, {3 * digits.CELL}, … pixels a side."
    )
  side = digits.CELL
  blocks = images.reshape(count, rows, side, cell // side, columns, side, -1, 3)
  light = (blocks.mean(axis=(3, 6), dtype=np.float64) + 1) / 2
  light = np.clip(light, 0, 1).transpose(0, 1, 3, 2, 4, 5).reshape(-1, side, side, 3)

  palette = np.array(list(digits.COLORS.values()))
  rays = palette / np.linalg.norm(palette, axis=-1, keepdims=True)
  # The least light off a ray is the most along it: their squares add to a constant.
  colors = np.sum((light @ rays.T) ** 2, axis=(1, 2)).argmax(axis=-1)
  ink = np.einsum("ihwc,ic->ihw", light, rays[colors])
  values = _classifier().predict(_direction(ink))
  names = list(digits.COLORS)
  items = [Item(names[c], int(d)) for c, d in zip(colors, values, strict=True)]
  per_image = rows * columns
  return [tuple(items[i : i + per_image]) for i in range(0, len(items), per_image)]


def read(image: Float[np.ndarray, "H W 3"], cells: tuple[int, int]) -> tuple[Item, ...]:
  """The items that one image shows: `read_batch` of it alone."""
  return read_batch(image[None], cells)[0]


def prompt_accuracy(
  images: Sequence[Float[np.ndarray, "_ _ 3"]], scenes: Sequence[Scene]
) -> Bool[np.ndarray, " b"]:
  """Whether each image shows its whole scene: every color and digit in its place.

  Raises:
    ValueError: there are not as many images as scenes, or an image has not the shape
      of its scene.
  """
  if len(images) != len(scenes):
    raise ValueError(
      f"{len(images)} images cannot be held against {len(scenes)} scenes."
    )
  right = np.zeros(len(scenes), bool)
  groups: dict[tuple[tuple[int, ...], Task], list[int]] = {}
  for i, (image, scene) in enumerate(zip(images, scenes, strict=True)):
    groups.setdefault((image.shape, scene.task), []).append(i)
  for (_, task), members in groups.items():
    batch = np.stack([images[i] for i in members])
    readings = read_batch(batch, digits.CELLS[task])
    right[members] = [
      items == scenes[i].items for i, items in zip(members, readings, strict=True)
    ]
  return right
