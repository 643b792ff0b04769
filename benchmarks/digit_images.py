"""A miniature's images of digits, drawn exactly or by some shortcut, in numbers."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pixsigma_jax.data.digits import CELLS
from pixsigma_jax.evaluate.digits import (
  EvaluationPrompt,
  evaluation_prompts,
  prompt_accuracy,
)
from pixsigma_jax.sample import Pipeline, image_files


def prompts_of(task: str, per_task: int) -> list[EvaluationPrompt]:
  """Evaluation's prompts of one task."""
  return [p for p in evaluation_prompts(0, per_task) if p.task == task]


def draw(
  pipeline: Pipeline, prompts: Sequence[EvaluationPrompt], **options: Any
) -> tuple[np.ndarray, list[dict[str, Any]]]:
  """An image for each prompt of a task, `[b h w 3]`, and its settings."""
  rows, columns = (cells * pipeline.resolution for cells in CELLS[prompts[0].task])
  output = pipeline([p.prompt for p in prompts], height=rows, width=columns, **options)
  images = np.stack([image_files.from_image(image) for image in output.images])
  return images, output.settings


def percent_apart(images: np.ndarray, exact: np.ndarray) -> float:
  """Root mean square over all pixels, relative to the exact ones' deviation."""
  return 100 * float(np.sqrt(np.mean((images - exact) ** 2)) / exact.std())


def percent_right(images: np.ndarray, prompts: Sequence[EvaluationPrompt]) -> float:
  """How many show what their prompt says."""
  scenes = [p.scene for p in prompts]
  return 100 * float(np.mean(prompt_accuracy(list(images), scenes)))
