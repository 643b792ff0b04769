"""Plots of trained comparisons: quality against steps, and samples in a grid."""

import io
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from PIL import Image

from pixsigma_jax.sample import image_files
from pixsigma_jax.wording import install

# Label of a curve → step → what each seed has.
Curves: TypeAlias = Mapping[str, Mapping[int, Sequence[float]]]

_PANEL = (4.2, 3.2)  # inches


def curves(panels: Mapping[str, Curves]) -> Image.Image | None:
  """A panel a measure: means over seeds as lines, lowest to highest as bands.

  Returns:
    None without matplotlib.
  """
  try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
  except ModuleNotFoundError as error:
    if error.name != "matplotlib":
      raise
    return None
  figure = Figure((_PANEL[0] * len(panels), _PANEL[1]), dpi=110, layout="constrained")
  for number, (title, lines) in enumerate(panels.items(), 1):
    axes = figure.add_subplot(1, len(panels), number)
    axes.set_title(title)
    axes.set_xlabel("step")
    for label, by_step in lines.items():
      steps = list(by_step)
      values = [by_step[step] for step in steps]
      means = [sum(own) / len(own) for own in values]
      axes.plot(steps, means, marker="o", markersize=3, label=label)
      lows, highs = [min(own) for own in values], [max(own) for own in values]
      axes.fill_between(steps, lows, highs, alpha=0.15)
    axes.grid(alpha=0.3)
    if number == 1:
      axes.legend(fontsize=7)
  buffer = io.BytesIO()
  FigureCanvasAgg(figure).print_png(buffer)
  with Image.open(buffer) as image:
    return image.convert("RGB")


def strips(rows: Mapping[str, Mapping[int, Image.Image]]) -> Image.Image:
  """Samples in a row for each label and a column for each step."""
  steps = sorted({step for by_step in rows.values() for step in by_step})
  nothing = Image.new("RGB", (1, 1))
  images, labels = [], []
  for label, by_step in rows.items():
    images += [by_step.get(step, nothing) for step in steps]
    labels += [f"{label}, step {step}" if step in by_step else "" for step in steps]
  return image_files.grid(images, len(steps), labels)


def stacked(images: Sequence[Image.Image]) -> Image.Image:
  """Images above each other, on white."""
  width = max(image.width for image in images)
  height = sum(image.height for image in images) + 8 * (len(images) - 1)
  sheet, top = Image.new("RGB", (width, height), "white"), 0
  for image in images:
    sheet.paste(image, (0, top))
    top += image.height + 8
  return sheet


WITHOUT_CURVES = f"There are no curves: matplotlib is missing: {install('eval')}."
