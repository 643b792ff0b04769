"""Prompt accuracy of trained models, by task and by whether the scene was ever seen."""

from collections.abc import Sequence
from typing import Any, TypeAlias

from pixsigma_jax import command
from pixsigma_jax.data.digits import CELLS, TASKS
from pixsigma_jax.evaluate.digits import EvaluationPrompt, prompt_accuracy
from pixsigma_jax.sample import pictures
from pixsigma_jax.sample.pipeline import Pipeline

# {"single": {"seen": {"right": 9, "asked": 10}, "unseen": …}, "left_of": …}
Counts: TypeAlias = dict[str, dict[str, dict[str, int]]]

NOVELTIES = ("seen", "unseen")
# Columns at the end of a table: tasks taken together.
TOTALS = {"single": ("single",), "pairs": ("left_of", "above")}


def count_right(
  pipeline: Pipeline,
  prompts: Sequence[EvaluationPrompt],
  *,
  num_inference_steps: int,
  guidance_scale: float,
  seed: int,
) -> Counts:
  """Draws every prompt, prompt i with seed + i, and reads what the pictures show.

  A prompt's size follows from its task and the pipeline's resolution, the pixels of
  one digit's cell.

  Raises:
    ValueError: the pipeline refuses a prompt, or its resolution is no multiple of 8.
  """
  cells = [CELLS[prompt.task] for prompt in prompts]
  drawn = pipeline.stream(
    [prompt.prompt for prompt in prompts],
    negative_prompt="",
    height=[rows * pipeline.resolution for rows, _ in cells],
    width=[columns * pipeline.resolution for _, columns in cells],
    num_inference_steps=num_inference_steps,
    guidance_scale=guidance_scale,
    seed=seed,
    sampler="dpm++",
    num_images_per_prompt=1,
  )
  # Through eight bits, as a user gets them.
  images = {
    number: pictures.from_picture(picture)
    for number, picture, _ in command.progress(drawn, len(prompts), "Pictures")
  }
  right = prompt_accuracy(
    [images[i] for i in range(len(prompts))], [prompt.scene for prompt in prompts]
  )
  counts = {
    task: {novelty: {"right": 0, "asked": 0} for novelty in NOVELTIES} for task in TASKS
  }
  for prompt, is_right in zip(prompts, right, strict=True):
    count = counts[prompt.task][prompt.novelty]
    count["right"] += int(is_right)
    count["asked"] += 1
  return counts


def totals(counts: Counts) -> dict[str, float]:
  """Share of right pictures of single digits and of pairs, seen and unseen together."""
  return {
    name: _share([counts[task][n] for task in tasks for n in NOVELTIES])
    for name, tasks in TOTALS.items()
  }


def table(counts_by_name: dict[str, Counts]) -> str:
  """A row a checkpoint, in percent: each task seen and unseen, then the totals."""
  header: list[str] = [
    "",
    *(f"{task} {n}" for task in TASKS for n in NOVELTIES),
    *TOTALS,
  ]
  rows: list[list[Any]] = [header]
  for name, counts in counts_by_name.items():
    shares = [_share([counts[task][n]]) for task in TASKS for n in NOVELTIES]
    shares += totals(counts).values()
    rows.append([name, *(f"{100 * share:.1f}" for share in shares)])
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    "  ".join(
      cell.ljust(width) if i == 0 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    for row in rows
  ]
  return "\n".join(line.rstrip() for line in lines)


def _share(counts: Sequence[dict[str, int]]) -> float:
  return sum(c["right"] for c in counts) / sum(c["asked"] for c in counts)
