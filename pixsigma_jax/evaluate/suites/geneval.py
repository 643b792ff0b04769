"""Suite `geneval`: whether images show the objects of their prompts.

Prompts and rules are GenEval's (Ghosh et al. 2023, djghosh13/geneval): 553 prompts of
six tasks, four images each; a task's score is the share of right images, the overall
score the mean over tasks.
"""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pixsigma_jax import disk
from pixsigma_jax.evaluate import geneval, intervals
from pixsigma_jax.evaluate.geneval import CLASSES, COLORS, PROMPTS, RELATIONS, TASKS
from pixsigma_jax.evaluate.items import Item, ItemSet, read_json_lines
from pixsigma_jax.evaluate.options import Option
from pixsigma_jax.evaluate.suites import Figure, Published, ScoredModel

_SOURCE = "djghosh13/geneval, README.md"
_BASIS = {
  "prompts": str(sum(PROMPTS.values())),
  "images": str(4 * sum(PROMPTS.values())),
  "detections detector": "mmdetection's Mask2Former Swin-S",
  "detections colors": "CLIP, 14 x 14 patches",
}
_OF_README = {
  "Stable Diffusion v2.1": (0.50, 0.98, 0.51, 0.44, 0.85, 0.07, 0.17),
  "Stable Diffusion XL": (0.55, 0.98, 0.74, 0.39, 0.85, 0.15, 0.23),
  "IF-XL": (0.61, 0.97, 0.74, 0.66, 0.81, 0.13, 0.35),
}


class GenEval:
  """Objects, their number, colors and positions."""

  name = "geneval"
  version = "1"
  options = (
    Option(
      "metadata",
      None,
      "GenEval's prompts/evaluation_metadata.jsonl, or a file of its form.",
    ),
    Option("images_per_prompt", 4, "Images of each prompt; 4 are published.", int),
    Option("first_seed", 0, "Seed of the first image; all later ones follow.", int),
  )
  score_options: tuple[Option, ...] = ()
  all_scorers = ("detections",)
  published = (
    Published(
      figure="overall",
      model="PixArt-Σ",
      value=0.53,
      source="leaderboard of GenEval",
      basis=_BASIS,
    ),
    Published(
      figure="overall",
      model="PixArt-Σ, as Sana measured it",
      value=0.54,
      source="NVlabs/Sana, README.md",
      basis=_BASIS,
    ),
    *(
      Published(figure=name, model=model, value=value, source=_SOURCE, basis=_BASIS)
      for model, values in _OF_README.items()
      for name, value in zip(("overall", *TASKS), values, strict=True)
    ),
  )

  def items(self, options: Mapping[str, Any]) -> ItemSet:
    path, copies = options["metadata"], options["images_per_prompt"]
    if path is None:
      raise ValueError(
        "GenEval's prompts are not part of this project: give --metadata=FILE, the "
        "prompts/evaluation_metadata.jsonl of djghosh13/geneval."
      )
    if copies < 1:
      raise ValueError(f"--images_per_prompt={copies} must be at least 1.")
    lines = read_json_lines(path, "GenEval metadata")
    for number, line in enumerate(lines, 1):
      if why := _wrong(line):
        raise ValueError(f"{path}:{number} is no prompt of GenEval: {why}.")
    return ItemSet(
      items=tuple(
        Item(
          id=f"{i:05d}",
          prompt=line["prompt"],
          seed=options["first_seed"] + i * copies,
          data=line,
        )
        for i, line in enumerate(lines)
      ),
      images_per_item=copies,
      sources={str(path): disk.file_hash(path)},
    )

  def scorers(self, options: Mapping[str, Any]) -> tuple[str, ...]:
    return self.all_scorers

  def reference_scorers(self, options: Mapping[str, Any]) -> tuple[str, ...]:
    return ()

  def figures(self, run: ScoredModel) -> Sequence[Figure]:
    shares = _shares(run)
    tasks = {
      task: np.array(
        [i for i, item in enumerate(run.items) if item.data["tag"] == task]
      )
      for task in TASKS
    }
    tasks = {task: rows for task, rows in tasks.items() if len(rows)}
    basis = {"prompts": str(len(run.items)), **run.basis("detections")}
    note = ""
    have = {task: len(rows) for task, rows in tasks.items()}
    if have != PROMPTS:
      note = "Not the published 553 prompts: " + ", ".join(
        f"{have.get(task, 0)} of {count} {task}" for task, count in PROMPTS.items()
      )

    def overall(rows: np.ndarray) -> float:
      """The mean over tasks of the prompts in `rows`, which may be repeated."""
      chosen = [shares[rows[np.isin(rows, of_task)]] for of_task in tasks.values()]
      return float(np.mean([part.mean() for part in chosen if len(part)]))

    def figure(name: str, value: float, ends: tuple[Any, Any]) -> Figure:
      low, high = ends
      return Figure(name=name, value=value, low=low, high=high, note=note, basis=basis)

    drawing = {"resamples": run.resamples, "seed": run.seed}
    everything = np.arange(len(run.items))
    ends = intervals.interval(overall, len(run.items), **drawing)
    found = [figure("overall", overall(everything), ends)]
    for task, rows in tasks.items():
      ends = intervals.mean_interval(shares[rows], **drawing)
      found.append(figure(task, float(shares[rows].mean()), ends))
    return found


def _shares(run: ScoredModel) -> np.ndarray:
  """Share of right images of each prompt, in the items' order."""
  data = {item.id: item.data for item in run.items}
  right: dict[str, list[bool]] = collections.defaultdict(list)
  for row in run.table("detections").to_pylist():
    try:
      verdict = geneval.score(row["detections"], data[row["id"]])
    except ValueError as error:
      raise ValueError(
        f"Image {row['image']} of prompt {row['id']} ({run.name}): {error}"
      ) from error
    right[row["id"]].append(verdict.correct)
  return np.array([np.mean(right[item.id]) for item in run.items])


def _wrong(line: Mapping[str, Any]) -> str | None:
  """What keeps the rules from judging a prompt."""
  if line.get("tag") not in TASKS:
    return f"its tag is {line.get('tag')!r}, none of {', '.join(TASKS)}"
  if not isinstance(line.get("prompt"), str) or not line["prompt"].strip():
    return "it has no text `prompt`"
  include, exclude = line.get("include"), line.get("exclude", [])
  if not isinstance(include, list) or not include:
    return "it has no list `include` of what to show"
  if not isinstance(exclude, list):
    return "its `exclude` is no list"
  for number, clause in enumerate([*include, *exclude]):
    if not isinstance(clause, dict) or clause.get("class") not in CLASSES:
      return f"clause {clause!r} has no class of COCO's 80, by GenEval's names"
    if not isinstance(clause.get("count"), int) or clause["count"] < 1:
      return f"clause {clause!r} has no count of at least 1"
    if clause.get("color", COLORS[0]) not in COLORS:
      return f"clause {clause!r} has a color that is none of {', '.join(COLORS)}"
    match clause.get("position", [RELATIONS[0], -1]):
      case [relation, int(target)] if relation in RELATIONS and target < number:
        pass
      case position:
        return (
          f"clause {clause!r} has the position {position!r}: a relation "
          f"({', '.join(RELATIONS)}) and the number of an earlier clause"
        )
  return None


SUITE = GenEval()
