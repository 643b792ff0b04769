"""Suite `4k`: fine detail of large images, at their own resolution.

Patch-FID as UltraHR-100K has it, GLCM score and compression ratio as Diffusion-4K, and
beside them seams of tiles and the spectrum.
"""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from pixsigma_jax import disk
from pixsigma_jax.evaluate import items as items_
from pixsigma_jax.evaluate.intervals import interval
from pixsigma_jax.evaluate.items import Item, ItemSet
from pixsigma_jax.evaluate.metrics import fid
from pixsigma_jax.evaluate.options import Option
from pixsigma_jax.evaluate.suites import (
  Figure,
  NotScoredError,
  Published,
  ScoredModel,
  chosen_scorers,
  column,
  distance_figure,
  mean_figure,
  score_means,
  scorers_option,
)

_SCORERS = ("texture", "fid-patch", "fid", "clip", "aesthetic")
_PATCHES = 20  # of an image, see `scorers.inception`
_LEAST_SIDE = 299  # pixels, of a patch

_ULTRA = "UltraHR-100K (arXiv 2510.20661), eval4K"
_HPD = "LWD (ICLR 2026), HPD prompts at 4K"
_OTHER_PROMPTS = "other prompts and references"


def _published() -> tuple[Published, ...]:
  ultra = {
    "PixArt-Σ": (32.198, 33.171),
    "SANA": (38.80, 37.07),
    "Diffusion-4K": (38.52, 39.86),
    "SD3.5 + BSRGAN": (25.60, 31.87),
    "SANA + FAPT": (15.795, 31.748),
  }
  numbers = [
    Published(
      figure=figure,
      model=model,
      value=value,
      source=_ULTRA,
      basis={"images": "2000"},
      note=_OTHER_PROMPTS,
    )
    for model, values in ultra.items()
    for figure, value in zip(("fid-patch", "fid"), values, strict=True)
  ]
  numbers += [
    Published(
      figure=figure, model="PixArt-Σ", value=value, source=_HPD, note=_OTHER_PROMPTS
    )
    for figure, value in (("glcm-score", 0.48), ("compression-ratio", 45.15))
  ]
  return tuple(numbers)


class Ultra:
  """Texture of images of 2048 pixels a side and more, in memory of one image."""

  name = "4k"
  version = "1"
  options = (
    Option(
      "prompts_file",
      None,
      "JSON lines of prompt, and of id, reference (an image's path), height, width.",
    ),
    Option("height", 4096, "Height in pixels of prompts that say none.", int),
    Option("width", 4096, "Width in pixels of prompts that say none.", int),
    Option("prompts_seed", 0, "Seed of the first prompt; the next has one more.", int),
  )
  score_options = (scorers_option(["texture"], _SCORERS),)
  all_scorers = _SCORERS
  published = _published()

  def items(self, options: Mapping[str, Any]) -> ItemSet:
    if options["prompts_file"] is None:
      raise ValueError("Give --prompts_file=FILE.jsonl, a prompt a line.")
    path = pathlib.Path(options["prompts_file"])
    root = path.absolute().parent
    found = []
    for i, line in enumerate(items_.read_json_lines(path, "file of prompts")):
      found.append(_item(path, i, line, options))
    for item in found:
      if item.reference is not None:
        _check_reference(root / item.reference)
    return ItemSet(
      tuple(found),
      sources={path.name: disk.file_hash(path)},
      references=str(root),
    )

  def scorers(self, options: Mapping[str, Any]) -> tuple[str, ...]:
    return chosen_scorers(options["scorers"], _SCORERS)

  def reference_scorers(self, options: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(name for name in self.scorers(options) if name in ("fid-patch", "fid"))

  def figures(self, run: ScoredModel) -> Sequence[Figure]:
    found: list[Figure] = []
    for name, rows in (("fid-patch", _PATCHES), ("fid", 1)):
      if run.has(name):
        found.append(distance_figure(run, name, name, fid, rows=rows))
    if run.has("texture"):
      found += texture_figures(run)
    found += score_means(run)
    if not found:
      raise NotScoredError("no scorer has scored all its images yet.")
    return found


def _item(path: pathlib.Path, i: int, line: Mapping[str, Any], options: Any) -> Item:
  where = f"{path}, prompt {i + 1}"
  known = {"id", "prompt", "reference", "height", "width", "seed"}
  if unknown := sorted(set(line) - known):
    raise ValueError(
      f"{where} has {unknown[0]!r}: known are {', '.join(sorted(known))}."
    )
  if not isinstance(line.get("prompt"), str):
    raise ValueError(f"{where} has no prompt.")
  sizes = [line.get(name, options[name]) for name in ("height", "width")]
  if not all(isinstance(side, int) and side >= _LEAST_SIDE for side in sizes):
    raise ValueError(
      f"{where} is {sizes[0]} x {sizes[1]} (height x width): sides must be whole "
      f"numbers of at least {_LEAST_SIDE}, so that a patch fits in."
    )
  return Item(
    id=str(line.get("id", f"{i:05d}")),
    prompt=line["prompt"],
    seed=line.get("seed", options["prompts_seed"] + i),
    height=sizes[0],
    width=sizes[1],
    reference=line.get("reference"),
  )


def _check_reference(path: pathlib.Path) -> None:
  if not path.is_file():
    raise FileNotFoundError(f"The reference {path} is not there.")
  with Image.open(path) as image:
    if min(image.size) < _LEAST_SIDE:
      raise ValueError(
        f"The reference {path} is {image.height} x {image.width}: no patch of "
        f"{_LEAST_SIDE} x {_LEAST_SIDE} fits in."
      )


def texture_figures(run: ScoredModel) -> list[Figure]:
  """Figures of the scorer `texture`."""
  table = run.table("texture")

  def mean(name: str, key: str, **fields: Any) -> Figure:
    return mean_figure(run, name, "texture", column(table, key), **fields)

  pixels, jpeg = (
    column(table, name).astype(np.float64).reshape(len(run.items), -1).sum(axis=1)
    for name in ("pixel_bytes", "jpeg_bytes")
  )

  def ratio(rows: np.ndarray) -> float:
    return float(pixels[rows].sum() / jpeg[rows].sum())

  low, high = interval(ratio, len(pixels), resamples=run.resamples, seed=run.seed)
  found = [
    mean("glcm-score", "glcm_score"),
    mean("glcm-entropy", "glcm_entropy", unit="bits"),
    Figure(
      name="compression-ratio",
      value=ratio(np.arange(len(pixels))),
      low=low,
      high=high,
      higher_is_better=False,
      basis=run.basis("texture"),
    ),
    mean("high-frequency-share", "high_frequency_share", higher_is_better=None),
  ]
  seams = column(table, "seam_score").astype(np.float64)
  if np.isfinite(seams).all():
    found.append(mean("seam-score", "seam_score", higher_is_better=False))
  elif not all(math.isnan(seam) for seam in seams):
    inside = seams[np.isfinite(seams)]
    found.append(
      Figure(
        name="seam-score",
        value=float(inside.mean()),
        higher_is_better=False,
        note=f"of {len(inside)} of {len(seams)} images, the others have no border",
        basis=run.basis("texture"),
      )
    )
  return found


SUITE = Ultra()
