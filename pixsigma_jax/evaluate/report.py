"""Report of an evaluation: models side by side, in JSON, Markdown and images.

report.json report.md report.png contact_sheet.jpg; without matplotlib no report.png.
"""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
from PIL import Image

import pixsigma_jax
from pixsigma_jax import disk
from pixsigma_jax.evaluate import scoring
from pixsigma_jax.evaluate.folder import EvaluationFolder, ModelFolder
from pixsigma_jax.evaluate.suites import (
  Figure,
  NotScoredError,
  Published,
  ScoredModel,
  Suite,
)
from pixsigma_jax.sample import image_files
from pixsigma_jax.wording import install, shortened

_SHEET_ROWS = 8  # prompts of the contact sheet
_SHEET_SIDE = 256  # pixels of its images' longer side
_PANEL = (3.2, 2.4)  # inches of one figure's plot
_COLUMNS = 4


def write(
  suite: Suite,
  folder: EvaluationFolder,
  *,
  resamples: int = 1000,
  distance_resamples: int = 20,
  seed: int = 0,
) -> dict[str, Any]:
  """Writes the report of all models that are scored; returns what report.json has.

  Args:
    resamples, distance_resamples, seed: of bootstrap intervals.

  Raises:
    ValueError: no model is scored.
  """
  counts = {"resamples": resamples, "distance_resamples": distance_resamples}
  for name, count in counts.items():
    if count < 0:
      raise ValueError(f"--{name}={count} must be 0 or more.")
  shown: list[ModelFolder] = []
  figures: dict[str, list[Figure]] = {}
  remarks: list[str] = []
  references: dict[str, pa.Table | None] = {}
  for model in folder.models():
    run = _scored(folder, model, references, {**counts, "seed": seed})
    try:
      figures[model.name] = list(suite.figures(run))
    except NotScoredError as error:
      remarks.append(f"{model.name} is left out: {error}")
      continue
    shown.append(model)
  if not shown:
    raise ValueError(
      f"{folder.path} has no model to report on. "
      + (" ".join(remarks) or "Run `evaluate sample` and `evaluate score`.")
    )
  remarks += differences(figures, suite.published)
  plots = _can_plot()
  if not plots:
    remarks.append(f"There is no report.png: matplotlib is missing: {install('eval')}.")
  content = {
    "suite": folder.about["suite"],
    "version": folder.about["version"],
    "options": folder.about["options"],
    "sources": folder.about["sources"],
    "prompts": len(folder.items),
    "images_per_item": folder.images_per_item,
    **counts,
    "bootstrap_seed": seed,
    "pixsigma_jax": pixsigma_jax.__version__,
    "models": [
      {
        "name": model.name,
        **model.about,
        "figures": [dataclasses.asdict(figure) for figure in figures[model.name]],
      }
      for model in shown
    ],
    "published": [dataclasses.asdict(number) for number in suite.published],
    "remarks": remarks,
  }
  disk.write_text(folder.path / "report.json", json.dumps(content, indent=2) + "\n")
  text = markdown(folder.about["suite"], figures, suite.published, remarks)
  disk.write_text(folder.path / "report.md", text)
  if plots:
    disk.write_whole(
      folder.path / "report.png",
      lambda partial: plot(partial, figures, suite.published),
    )
  else:  # one of earlier scores would not be of this report
    (folder.path / "report.png").unlink(missing_ok=True)
  sheet = contact_sheet(folder, shown)
  disk.write_whole(
    folder.path / "contact_sheet.jpg",
    lambda partial: sheet.save(partial, format="JPEG", quality=90),
  )
  print(text)
  print(folder.path / "report.md")
  return content


def _scored(
  folder: EvaluationFolder,
  model: ModelFolder,
  references: dict[str, pa.Table | None],
  bootstrap: Mapping[str, int],
) -> ScoredModel:
  """A model's scores, each read once, and those of the references once for all."""
  own: dict[str, pa.Table | None] = {}

  def read(scorer: str, of_references: bool) -> pa.Table | None:
    known = references if of_references else own
    if scorer not in known:
      owner = None if of_references else model
      known[scorer] = scoring.read_scores(folder, owner, scorer)
    return known[scorer]

  return ScoredModel(
    name=model.name,
    items=folder.items,
    images_per_item=folder.images_per_item,
    options=folder.about["options"],
    read=read,
    sizes="any" if model.about["settings"].get("any_size") else "as asked",
    **bootstrap,
  )


def differences(
  figures: Mapping[str, Sequence[Figure]], published: Sequence[Published]
) -> list[str]:
  """A line for any two numbers that stand side by side and may not be compared."""
  by_name: dict[str, dict[str, Figure]] = {}
  for model, own in figures.items():
    for figure in own:
      by_name.setdefault(figure.name, {})[model] = figure
  # Reason → the figures that it holds for: FID and KID have the same ones.
  found: dict[str, dict[str, None]] = {}
  for name, models in by_name.items():
    for (a, ours), (b, theirs) in itertools.combinations(models.items(), 2):
      for key in sorted({*ours.basis, *theirs.basis}):
        values = [figure.basis.get(key, "none") for figure in (ours, theirs)]
        if values[0] != values[1]:
          reason = f"{a} and {b}: {key} is {values[0]} and {values[1]}"
          found.setdefault(reason, {})[name] = None
    figure = next(iter(models.values()))
    for number in published:
      if number.figure != name:
        continue
      reasons = [number.note] if number.note else []
      reasons += [
        f"{key} is {value} there and {figure.basis.get(key, 'none')} here"
        for key, value in number.basis.items()
        if figure.basis.get(key) != value
      ]
      for reason in reasons:
        found.setdefault(f"ours and {number.source}: {reason}", {})[name] = None
  return [
    f"Not comparable in {', '.join(names)}, {reason}" for reason, names in found.items()
  ]


def markdown(
  title: str,
  figures: Mapping[str, Sequence[Figure]],
  published: Sequence[Published],
  remarks: Sequence[str],
) -> str:
  """The report as tables: a row a figure, a column a model."""
  first = _merged(figures)
  lines = [f"# {title}", "", *_row(["", *figures]), *_rule(1 + len(figures))]
  for name, figure in first.items():
    cells = [
      next((_cell(f) for f in own if f.name == name), "–") for own in figures.values()
    ]
    lines += _row([f"{name}{_unit(figure)} {_arrow(figure)}".strip(), *cells])
  if any(figure.low is not None for figure in first.values()):
    lines += ["", "In brackets: bootstrap intervals of 95 %."]
  if notes := {f.name: f.note for f in first.values() if f.note}:
    lines += ["", *(f"- {name}: {note}" for name, note in notes.items())]
  beside = [number for number in published if number.figure in first]
  if beside:
    lines += ["", "## Published", "", *_row(["", "Model", "Value", "Source"])]
    lines += _rule(4)
    for number in beside:
      lines += _row([number.figure, number.model, f"{number.value:g}", number.source])
  if remarks:
    lines += ["", "## Remarks", "", *(f"- {remark}" for remark in remarks)]
  return "\n".join(lines) + "\n"


def _merged(figures: Mapping[str, Sequence[Figure]]) -> dict[str, Figure]:
  """The first model's figure of each name, in order."""
  merged: dict[str, Figure] = {}
  for own in figures.values():
    for figure in own:
      merged.setdefault(figure.name, figure)
  return merged


def _row(cells: Sequence[str]) -> list[str]:
  escaped = (cell.replace("|", "\\|") for cell in cells)
  return [f"| {' | '.join(escaped)} |"]


def _rule(columns: int) -> list[str]:
  return ["|---" + "|---:" * (columns - 1) + "|"]


def _unit(figure: Figure) -> str:
  return f" ({figure.unit})" if figure.unit else ""


def _arrow(figure: Figure) -> str:
  return {True: "↑", False: "↓", None: ""}[figure.higher_is_better]


def _cell(figure: Figure) -> str:
  value = f"{figure.value:.4g}"
  if figure.low is None or figure.high is None:
    return value
  return f"{value} [{figure.low:.4g}, {figure.high:.4g}]"


def _can_plot() -> bool:
  try:
    import matplotlib  # noqa: F401
  except ModuleNotFoundError as error:
    if error.name != "matplotlib":
      raise
    return False
  return True


def plot(
  path: pathlib.Path,
  figures: Mapping[str, Sequence[Figure]],
  published: Sequence[Published],
) -> None:
  """A panel a figure: models with their intervals, published numbers as lines."""
  from matplotlib.figure import Figure as Canvas

  merged = _merged(figures)
  columns = min(_COLUMNS, len(merged))
  rows = -(-len(merged) // columns)
  canvas = Canvas(
    figsize=(_PANEL[0] * columns, _PANEL[1] * rows), dpi=120, layout="constrained"
  )
  panels = list(canvas.subplots(rows, columns, squeeze=False).flat)
  for panel in panels[len(merged) :]:
    panel.set_axis_off()
  for panel, (name, figure) in zip(panels, merged.items(), strict=False):
    for x, own in enumerate(figures.values()):
      for mine in own:
        if mine.name == name:
          _draw_point(panel, x, mine)
    for number in published:
      if number.figure == name:
        panel.axhline(number.value, color="0.6", linewidth=0.8, linestyle="--")
        panel.annotate(number.model, (0, number.value), fontsize=6, color="0.4")
    panel.set_xticks(range(len(figures)), list(figures), rotation=20, fontsize=7)
    panel.set_xlim(-0.5, len(figures) - 0.5)
    panel.tick_params(axis="y", labelsize=7)
    panel.set_title(f"{name}{_unit(figure)} {_arrow(figure)}", fontsize=8)
  canvas.savefig(path, format="png")


def _draw_point(panel: Any, x: int, figure: Figure) -> None:
  spread = None
  if figure.low is not None and figure.high is not None:
    ends = [[figure.value - figure.low], [figure.high - figure.value]]
    spread = [[max(0.0, end[0])] for end in ends]
  panel.errorbar([x], [figure.value], yerr=spread, fmt="o", color="C0", capsize=3)


def contact_sheet(
  folder: EvaluationFolder, models: Sequence[ModelFolder]
) -> Image.Image:
  """Some prompts, evenly taken: a row a prompt, a column a model."""
  count = min(_SHEET_ROWS, len(folder.items))
  chosen = [folder.items[i * len(folder.items) // count] for i in range(count)]

  def cells() -> Iterator[tuple[Image.Image, str]]:
    for item in chosen:
      for model in models:
        with Image.open(model.image_path(item)) as image:
          small = image.convert("RGB")
        small.thumbnail((_SHEET_SIDE, _SHEET_SIDE))
        yield small, f"{model.name}: {shortened(item.prompt, 60)}"

  images, labels = zip(*cells(), strict=True)
  return image_files.grid(images, columns=len(models), labels=labels)
