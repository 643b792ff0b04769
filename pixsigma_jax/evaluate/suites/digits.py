"""Suite `digits`: whether handwritten digits follow their prompts, read exactly."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pixsigma_jax.data.digits import CELLS, TASKS
from pixsigma_jax.evaluate.digits import evaluation_prompts
from pixsigma_jax.evaluate.intervals import mean_interval
from pixsigma_jax.evaluate.items import Item, ItemSet
from pixsigma_jax.evaluate.options import Option
from pixsigma_jax.evaluate.suites import Figure, Published, ScoredModel, column

NOVELTIES = ("seen", "unseen")
# Figures at the end: tasks taken together.
TOTALS = {"single": ("single",), "pairs": ("left_of", "above")}


class Digits:
  """Prompt accuracy by task, and by whether training may show the scene."""

  name = "digits"
  version = "1"
  options = (
    Option(
      "per_task", 100, "Prompts of each task, of seen and of unseen scenes each.", int
    ),
    Option("prompts_seed", 0, "Seed of the prompts and of the first image.", int),
  )
  score_options: tuple[Option, ...] = ()
  all_scorers = ("digits",)
  published: tuple[Published, ...] = ()

  def items(self, options: Mapping[str, Any]) -> ItemSet:
    per_task, seed = options["per_task"], options["prompts_seed"]
    if per_task < 1:
      raise ValueError(f"--per_task={per_task} must be at least 1.")
    prompts = evaluation_prompts(seed, per_task)
    return ItemSet(
      tuple(
        Item(
          id=f"{i:05d}",
          prompt=prompt.prompt,
          seed=seed + i,
          cells=CELLS[prompt.task],
          data={"task": prompt.task, "novelty": prompt.novelty},
        )
        for i, prompt in enumerate(prompts)
      )
    )

  def scorers(self, options: Mapping[str, Any]) -> tuple[str, ...]:
    return self.all_scorers

  def reference_scorers(self, options: Mapping[str, Any]) -> tuple[str, ...]:
    return ()

  def figures(self, run: ScoredModel) -> Sequence[Figure]:
    right = column(run.table("digits"), "right").astype(np.float64)
    basis = run.basis("digits")

    def figure(name: str, tasks: Sequence[str], novelties: Sequence[str]) -> Figure:
      chosen = np.array(
        [i.data["task"] in tasks and i.data["novelty"] in novelties for i in run.items]
      )
      values = 100 * right[chosen]
      low, high = mean_interval(values, resamples=run.resamples, seed=run.seed)
      return Figure(
        name=name, value=float(values.mean()), low=low, high=high, unit="%", basis=basis
      )

    each = [
      figure(f"{task} {novelty}", [task], [novelty])
      for task in TASKS
      for novelty in NOVELTIES
    ]
    return each + [figure(name, tasks, NOVELTIES) for name, tasks in TOTALS.items()]


SUITE = Digits()
