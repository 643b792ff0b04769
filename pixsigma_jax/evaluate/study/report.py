"""What the raters of a study said."""

import statistics as python_statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pixsigma_jax.evaluate.study.answers import Answer, Database, Rater
from pixsigma_jax.evaluate.study.design import CRITERIA, Design, Task
from pixsigma_jax.evaluate.study.presentation import (
  cell,
  preferences_to_json,
  preferences_to_markdown,
)
from pixsigma_jax.evaluate.study.statistics import (
  Preferences,
  comparisons_of,
  summarize,
)


def of_study(database: Database, name: str) -> tuple[dict[str, Any], list[str]]:
  """Report of a study as JSON holds it, and as lines of Markdown.

  Prompts that a rater saw twice count once, by the first answer; the second only says
  how consistent the rater is.

  Raises:
    ValueError: there is no such study, or no answer yet.
  """
  study = database.study(name)
  design = study.design
  raters = list(database.raters(study).values())
  answers = {rater.id: database.answers(rater) for rater in raters}
  tasks = {rater.id: design.tasks(rater.number) for rater in raters}
  if not any(answers.values()):
    raise ValueError(
      f"Nobody has answered anything in the study {name} yet: `evaluate study serve` "
      "shows it to the raters."
    )
  criteria = {
    criterion: _preferences(design, raters, tasks, answers, criterion)
    for criterion in CRITERIA
  }
  about_raters = [_about(rater, tasks[rater.id], answers[rater.id]) for rater in raters]
  notes = [
    {
      "rater": rater.name,
      "item": tasks[rater.id][number].subject.id,
      "note": answer.note,
    }
    for rater in raters
    for number, answer in sorted(answers[rater.id].items())
    if answer.note
  ]
  report = {
    "kind": "study",
    "name": design.name,
    "models": list(design.models),
    "prompts": len(design.subjects),
    "answers": sum(map(len, answers.values())),
    "criteria": {key: preferences_to_json(value) for key, value in criteria.items()},
    "consistency": _share(about_raters),
    "raters": about_raters,
    "notes": notes,
  }
  return report, _markdown(report, criteria)


def _preferences(
  design: Design,
  raters: Sequence[Rater],
  tasks: Mapping[int, list[Task]],
  answers: Mapping[int, dict[int, Answer]],
  criterion: str,
) -> Preferences:
  comparisons = [
    comparison
    for rater in raters
    for number, answer in answers[rater.id].items()
    if not (task := tasks[rater.id][number]).repeated
    for comparison in comparisons_of(
      answer.ranks[criterion], rater.name, task.subject.id
    )
  ]
  return summarize(comparisons, design.models)


def _about(
  rater: Rater, tasks: Sequence[Task], answers: Mapping[int, Answer]
) -> dict[str, Any]:
  """One rater: how far, how fast, how consistent."""
  first = {
    tasks[number].subject.id: answer
    for number, answer in answers.items()
    if not tasks[number].repeated
  }
  same = twice = 0
  for number, answer in answers.items():
    before = first.get(tasks[number].subject.id)
    if not tasks[number].repeated or before is None:
      continue
    for criterion in CRITERIA:
      pairs = zip(
        comparisons_of(before.ranks[criterion], "", ""),
        comparisons_of(answer.ranks[criterion], "", ""),
        strict=True,
      )
      agreed = [one.score == other.score for one, other in pairs]
      same, twice = same + sum(agreed), twice + len(agreed)
  seconds = [answer.seconds for answer in answers.values()]
  return {
    "name": rater.name,
    "answered": len(answers),
    "tasks": len(tasks),
    "compared_twice": twice,
    "same_twice": same,
    "median_seconds": python_statistics.median(seconds) if seconds else None,
  }


def _share(raters: Sequence[Mapping[str, Any]]) -> float | None:
  """Of all that was compared twice, what was judged the same both times."""
  twice = sum(rater["compared_twice"] for rater in raters)
  return sum(rater["same_twice"] for rater in raters) / twice if twice else None


def _markdown(
  report: Mapping[str, Any], criteria: Mapping[str, Preferences]
) -> list[str]:
  lines = [
    f"# Study {report['name']}",
    "",
    f"{report['answers']} answers of {len(report['raters'])} raters to "
    f"{report['prompts']} prompts.",
    "",
    "![Win rates](report.png)",
  ]
  for criterion, preferences in criteria.items():
    lines += ["", f"## By {criterion}", "", *preferences_to_markdown(preferences)]
    if preferences.agreement is not None:
      alpha = "undefined" if preferences.alpha is None else f"{preferences.alpha:.3f}"
      lines += [
        "",
        f"Agreement of raters: Krippendorff's alpha {alpha} (interval metric); two "
        f"raters are of one opinion in {100 * preferences.agreement:.1f} % of what "
        "both compared.",
      ]
  consistency = report["consistency"]
  lines += ["", "## Raters", ""]
  if consistency is not None:
    lines += [
      f"Of pairs that a rater compared twice, {100 * consistency:.1f} % were judged "
      "the same.",
      "",
    ]
  lines += [
    "| rater | answered | of | same when asked twice | median seconds |",
    "|---|---|---|---|---|",
  ]
  for rater in report["raters"]:
    twice, seconds = rater["compared_twice"], rater["median_seconds"]
    same = f"{rater['same_twice']} of {twice}" if twice else "–"
    lines.append(
      f"| {cell(rater['name'])} | {rater['answered']} | {rater['tasks']} | {same} | "
      + ("–" if seconds is None else f"{seconds:.1f}")
      + " |"
    )
  if report["notes"]:
    lines += ["", "## Notes", "", "| prompt | rater | note |", "|---|---|---|"]
    lines += [
      f"| {note['item']} | {cell(note['rater'])} | {cell(note['note'])} |"
      for note in report["notes"]
    ]
  return lines
