"""Preferences as JSON, as Markdown, and as a plot like the paper's figure 9.

What `study report` and `judge` write is of one form, so that people and judges stand
side by side: `criteria` has `Preferences` by the criterion's name.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure

from pixsigma_jax import disk
from pixsigma_jax.evaluate.study.statistics import Estimate, Preferences
from pixsigma_jax.wording import listed

# People blue, judges orange and green, as in the paper; then what can be told apart.
_BLUES = ("#1f5fa8", "#7fb2e5")
_OTHERS = ("#f28e2b", "#59a14f", "#e6b800", "#86bcb6", "#b07aa1", "#9c755f")
_WIDTH = 0.8  # of a group of bars


def preferences_to_json(preferences: Preferences) -> dict[str, Any]:
  """`Preferences` with plain values; None is what the data do not say."""
  return dataclasses.asdict(preferences)


def preferences_to_markdown(preferences: Preferences) -> list[str]:
  """Tables of models and of pairs, and a line on how they are to be read."""
  lines = [
    "| model | win rate, % | Bradley-Terry strength |",
    "|---|---|---|",
    *(
      f"| {m.name} | {_percent(m.win_rate)} | {_number(m.strength)} |"
      for m in preferences.models
    ),
    "",
    "| first | second | wins | ties | losses | win rate of the first, % |",
    "|---|---|---|---|---|---|",
    *(
      f"| {p.first} | {p.second} | {p.wins} | {p.ties} | {p.losses} "
      f"| {_percent(p.win_rate)} |"
      for p in preferences.pairs
    ),
    "",
    f"{preferences.comparisons} comparisons of {preferences.items} prompts. "
    + _how_drawn(preferences),
  ]
  if preferences.no_strengths:
    lines += ["", preferences.no_strengths]
  return lines


def write(
  output: pathlib.Path,
  report: Mapping[str, Any],
  markdown: Sequence[str],
  subject: str,
  beside: Sequence[pathlib.Path] = (),
) -> list[pathlib.Path]:
  """Writes report.json, report.md and report.png.

  Args:
    report: with `name`, `models` and `criteria`.
    subject: model whose win rates are plotted.
    beside: other reports of this form, to plot beside this one.

  Returns:
    The paths of the three.

  Raises:
    ValueError: a report beside this one is none, or is of other models.
  """
  reports = [report, *(_read(path, report) for path in beside)]
  paths = [output / f"report.{ending}" for ending in ("json", "md", "png")]
  texts = (
    json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
    "\n".join(markdown) + "\n",
  )
  for path, text in zip(paths, texts, strict=False):
    disk.write_text(path, text)
  figure = plot(reports, subject)
  disk.write_whole(paths[-1], lambda part: figure.savefig(part, format="png", dpi=150))
  return paths


def plot(
  reports: Sequence[Mapping[str, Any]], subject: str
) -> matplotlib.figure.Figure:
  """Bars of one model's win rate against each other model, with intervals.

  Args:
    reports: people's first; each criterion of each is a color.
  """
  opponents = [name for name in reports[0]["models"] if name != subject]
  series = [
    (f"{report['name']}: {criterion}", _against(content["pairs"], subject))
    for report in reports
    for criterion, content in report["criteria"].items()
  ]
  people = len(reports[0]["criteria"]) if reports[0]["kind"] == "study" else 0
  colors = (*_BLUES[:people], *_OTHERS)
  figure = matplotlib.figure.Figure(
    figsize=(2.5 + 1.1 * len(opponents) * max(1, len(series) / 3), 4),
    layout="constrained",
  )
  axes = figure.subplots()
  width = _WIDTH / len(series)
  for i, (label, rates) in enumerate(series):
    color = colors[i % len(colors)]
    places = [o + (i - (len(series) - 1) / 2) * width for o in range(len(opponents))]
    known = [rates.get(name, (math.nan, None, None)) for name in opponents]
    values = [100 * value for value, _, _ in known]
    axes.bar(places, values, width, label=label, color=color)
    for place, (value, low, high) in zip(places, known, strict=True):
      if low is not None and high is not None:
        error = [[100 * (value - low)], [100 * (high - value)]]
        axes.errorbar(place, 100 * value, error, color="black", capsize=2, lw=1)
  axes.axhline(50, color="black", lw=0.8, ls="--")
  axes.set_xticks(range(len(opponents)), opponents)
  axes.set_ylim(0, 100)
  axes.set_ylabel(f"{subject} preferred, %")
  axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
  return figure


def cell(text: str) -> str:
  """A text for a cell of a table, which cannot end it or be HTML."""
  text = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
  return text.replace("&", "&amp;").replace("<", "&lt;")


def _against(
  pairs: Sequence[Mapping[str, Any]], subject: str
) -> dict[str, tuple[float, float | None, float | None]]:
  """Opponent → win rate of `subject` with its interval."""
  rates = {}
  for pair in pairs:
    value, low, high = (pair["win_rate"][key] for key in ("value", "low", "high"))
    if value is None:
      continue
    if pair["first"] == subject:
      rates[pair["second"]] = (value, low, high)
    elif pair["second"] == subject:
      turned = None if low is None or high is None else (1 - high, 1 - low)
      rates[pair["first"]] = (1 - value, *(turned or (None, None)))
  return rates


def _read(path: pathlib.Path, report: Mapping[str, Any]) -> dict[str, Any]:
  try:
    other = json.loads(path.read_text(encoding="utf-8"))
    models = sorted(other["models"])
    for content in other["criteria"].values():
      _against(content["pairs"], models[0])
    known = isinstance(other["name"], str) and other["kind"] in ("study", "judge")
  except (ValueError, KeyError, TypeError, AttributeError):
    known, other, models = False, {}, []
  if not known:
    raise ValueError(
      f"{path} is no report of preferences: give a report.json that `study report` or "
      "`judge` wrote."
    )
  if models != sorted(report["models"]):
    raise ValueError(
      f"{path} is about {listed(models, 20)}, and this report about "
      f"{listed(sorted(report['models']), 20)}: plot reports of the same models."
    )
  return other


def _how_drawn(preferences: Preferences) -> str:
  if not preferences.resampled:
    return "There is too little to draw intervals from."
  return (
    "In parentheses: 95 % intervals of a bootstrap over "
    f"{' and '.join(preferences.resampled)}."
  )


def _percent(estimate: Estimate) -> str:
  return _with_interval(estimate, lambda value: f"{100 * value:.1f}")


def _number(estimate: Estimate) -> str:
  # Adding 0 has -0.00 written as +0.00.
  return _with_interval(estimate, lambda value: f"{round(value, 2) + 0:+.2f}")


def _with_interval(estimate: Estimate, form: Any) -> str:
  if estimate.value is None:
    return "–"
  if estimate.low is None or estimate.high is None:
    return form(estimate.value)
  return f"{form(estimate.value)} ({form(estimate.low)} to {form(estimate.high)})"
