"""Measures of a model of handwritten digits: accuracy, distance, held-out loss.

The distance is Fréchet's (FID's) between features of a small classifier, trained on the
same handwriting at the same resolution; features have unit variance over real cells.
Its reference are real cells of the very digits that the prompts ask for, in handwriting
that trained neither; its floor is the distance of as many other real cells.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from PIL import Image
from sklearn.neural_network import MLPClassifier

from pixsigma_jax import checkpoint, sharding
from pixsigma_jax.data import digits
from pixsigma_jax.data.digits import Item
from pixsigma_jax.data.mixture import open_mixture
from pixsigma_jax.evaluate.digits import (
  EvaluationPrompt,
  evaluation_prompts,
  prompt_accuracy,
)
from pixsigma_jax.evaluate.metrics.distributions import fid
from pixsigma_jax.models.layers import Compute
from pixsigma_jax.sample import image_files
from pixsigma_jax.sample.pipeline import Pipeline
from pixsigma_jax.train.batches import Batches
from pixsigma_jax.train.config import call
from pixsigma_jax.train.program import make_program
from pixsigma_jax.train.validation import Validation

_BATCH = 32  # images that are drawn together
_HIDDEN = (64, 16)  # the features are the last: few, as there are few images
_REPEATS = 8  # real cells of the reference for each that is drawn


@dataclasses.dataclass(frozen=True)
class Drawn:
  """Images of the evaluation's prompts."""

  images: Sequence[Image.Image]
  prompts: Sequence[EvaluationPrompt]

  def strip(self) -> Image.Image:
    """The first image of each task side by side, as samples to look at."""
    first: dict[str, Image.Image] = {}
    for image, prompt in zip(self.images, self.prompts, strict=True):
      first.setdefault(prompt.task, image)
    height = max(image.height for image in first.values())
    width = sum(image.width for image in first.values()) + 2 * (len(first) - 1)
    strip, left = Image.new("RGB", (width, height)), 0
    for image in first.values():
      strip.paste(image, (left, 0))
      left += image.width + 2
    return strip


@functools.cache
def prompts_of(per_task: int) -> tuple[EvaluationPrompt, ...]:
  """The prompts of all measurements.

  Args:
    per_task: of each task, of seen and of unseen scenes each.
  """
  return tuple(evaluation_prompts(0, per_task))


def draw(
  snapshot: pathlib.Path,
  *,
  pixels: int,
  per_task: int,
  sampling_steps: int,
  frozen: pathlib.Path | None = None,
) -> Drawn:
  """Draws the evaluation's prompts, each at the size of its kind.

  Args:
    snapshot: of a model at `pixels` a cell.
    per_task: prompts of each task, of seen and of unseen scenes each.
    sampling_steps: of an image.
    frozen: folder of the autoencoder's files, where the model is of latents.

  Raises:
    ValueError: an image is not made of finite numbers.
  """
  prompts = prompts_of(per_task)
  compute = Compute(dtype=jnp.float32, attention="xla", remat="none", unroll=True)
  pipeline = Pipeline.from_checkpoint(
    snapshot, compute=compute, batch_size=_BATCH, frozen=frozen
  )
  rows, columns = zip(*(digits.CELLS[prompt.task] for prompt in prompts), strict=True)
  output = pipeline(
    [prompt.prompt for prompt in prompts],
    height=[pixels * count for count in rows],
    width=[pixels * count for count in columns],
    seed=list(range(len(prompts))),
    num_inference_steps=sampling_steps,
  )
  return Drawn(output.images, prompts)


def accuracies(drawn: Drawn) -> dict[str, float]:
  """Percentage of prompts that the exact reader finds followed.

  Returns:
    Of each task, of `pairs` (both tasks of two digits) and of `seen` and `unseen`
    scenes.
  """
  images = [image_files.from_image(image) for image in drawn.images]
  right = prompt_accuracy(images, [prompt.scene for prompt in drawn.prompts])
  tasks = np.array([prompt.task for prompt in drawn.prompts])
  novelties = np.array([prompt.novelty for prompt in drawn.prompts])
  chosen = {task: tasks == task for task in digits.TASKS}
  chosen |= {"pairs": tasks != "single"}
  chosen |= {name: novelties == name for name in ("seen", "unseen")}
  return {name: 100 * float(right[which].mean()) for name, which in chosen.items()}


@functools.cache
def distances(pixels: int, per_task: int, taught: int, epochs: int) -> "Distances":
  """The distance at a resolution, for a number of prompts; made once."""
  prompts = prompts_of(per_task)
  return Distances(pixels, prompts, taught=taught, epochs=epochs)


class Distances:
  """Fréchet distance of drawn cells to real ones.

  Attributes:
    floor: distance of as many real cells as the prompts have.
    accuracy: percentage of real cells, in unknown handwriting, that the classifier
      tells the color and the digit of.
  """

  def __init__(
    self, pixels: int, prompts: Sequence[EvaluationPrompt], *, taught: int, epochs: int
  ):
    """Trains the classifier, and renders the reference.

    Args:
      pixels: side of a cell.
      taught: cells of each colored digit that the classifier learns from.
      epochs: how often it sees them.
    """
    self._pixels = pixels
    items = [item for prompt in prompts for item in prompt.scene.items]
    everything = [Item(color, d) for color in digits.COLORS for d in range(10)]
    lessons = everything * taught
    cells = self._cells(lessons, "training", seed=0)
    network = MLPClassifier(_HIDDEN, random_state=0)
    labels = np.array([everything.index(item) for item in lessons])
    for _ in range(epochs):
      network.partial_fit(cells, labels, classes=np.arange(len(everything)))
    self._layers = list(zip(network.coefs_, network.intercepts_, strict=True))
    reference = self._cells(items * _REPEATS, "reader", seed=1)
    self._scale = np.ones(_HIDDEN[-1])
    spread = self._features(reference).std(axis=0)
    # Some units hardly ever fire: by themselves they would be most of the distance.
    self._scale = np.maximum(spread, np.median(spread) / 4)
    self._reference = self._features(reference)
    found = network.predict(reference)
    wanted = [everything.index(item) for item in items * _REPEATS]
    self.accuracy = 100 * float(np.mean(found == np.array(wanted)))
    others = self._cells(items, "reader", seed=2)
    self.floor = fid(self._features(others), self._reference)

  def __call__(self, drawn: Drawn) -> float:
    """The distance of drawn images' cells."""
    cells = []
    for image, prompt in zip(drawn.images, drawn.prompts, strict=True):
      rows, columns = digits.CELLS[prompt.task]
      array = np.asarray(image_files.from_image(image))
      for row, column in itertools.product(range(rows), range(columns)):
        top, left = row * self._pixels, column * self._pixels
        cells.append(array[top : top + self._pixels, left : left + self._pixels])
    return fid(self._features(np.stack(cells).reshape(len(cells), -1)), self._reference)

  def _cells(
    self, items: Sequence[Item], split: digits.Split, seed: int
  ) -> Float[np.ndarray, "n f"]:
    """Real renders of items in a split's handwriting, as rows."""
    generator = np.random.default_rng(seed)
    cells = []
    for item in items:
      glyph = int(generator.choice(digits.handwriting(split, item.digit)))
      image = digits.render(digits.Scene((item,)), [glyph], self._pixels)
      cells.append(image.reshape(-1))
    return np.stack(cells)

  def _features(self, cells: Float[np.ndarray, "n f"]) -> Float[np.ndarray, "n g"]:
    hidden = cells.astype(np.float64)
    for kernel, bias in self._layers[:-1]:
      hidden = np.maximum(hidden @ kernel + bias[None], 0)
    return hidden / self._scale[None]


def held_out_loss(
  snapshot: pathlib.Path,
  config: Mapping[str, Any],
  *,
  examples: int,
) -> dict[str, Any]:
  """The loss on images that were never trained on, and that by tenth of the timesteps.

  Examples, noise and timesteps are the same for all models of a resolution.

  Args:
    config: of the run, complete, with the path of its data.
    examples: how many, rounded up to whole batches.

  Returns:
    `loss`, and ten of `decile_loss`, from little noise to much; NaN is None.
  """
  data, batch_size = config["data"], config["batch_size"]
  mixture = open_mixture(
    data["path"].split(","),
    weights=data["weights"],
    holdout=data["holdout"],
    split="holdout",
  )
  program = make_program(
    config, mesh=None, scaling_factor=mixture.features.scaling_factor
  )
  model = program.model.config
  mesh = call(
    sharding.make_mesh_of_slices,
    "mesh",
    config["mesh"],
    devices=jax.devices()[:1],
    batch_size=batch_size,
    width=model.width,
  )
  batches = Batches(
    mixture, config, model, mesh, None, process_index=0, process_count=1
  )
  validation = Validation(
    program.validation_loss,
    batches,
    examples=examples,
    batch_size=batch_size,
    num_timesteps=program.num_timesteps,
    mesh=mesh,
  )
  try:
    read = checkpoint.read_snapshot(str(snapshot), mesh)
    found = validation(read.params, read.null_caption)
  finally:
    validation.close()
  deciles = [float(loss) for loss in found["validation/decile_loss"]]
  return {
    "loss": found["validation/loss"],
    "decile_loss": [None if np.isnan(loss) else loss for loss in deciles],
  }
