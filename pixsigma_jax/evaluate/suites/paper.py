"""Suite `paper`: FID, CMMD and CLIP score on a held-out set of images and captions.

The paper's own set, of 30,000 pairs, was never published; `evaluate make-set` builds
one by its description.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pixsigma_jax import disk
from pixsigma_jax.evaluate import items as items_
from pixsigma_jax.evaluate.items import ItemSet
from pixsigma_jax.evaluate.metrics import cmmd, fid, inception_score, kid
from pixsigma_jax.evaluate.options import Option
from pixsigma_jax.evaluate.set_files import MANIFEST, PROMPTS, read_manifest
from pixsigma_jax.evaluate.suites import (
  Figure,
  NotScoredError,
  Published,
  ScoredModel,
  chosen_scorers,
  column,
  distance_figure,
  score_means,
  scorers_option,
)

_DEFAULT = ("fid", "cmmd", "clip")
_SCORERS = ("fid", "fid-clean", "cmmd", "clip", "aesthetic")
_SUBSETS, _SUBSET = 100, 1000  # of KID
_OWN_SET = "the paper's set of 30,000 pairs was never published"
_TABLE_3 = "PixArt-Σ, table 3"


def _published() -> tuple[Published, ...]:
  rows = {
    "512 px": (8.244, 0.276),
    "512 px, deep layers compressed": (8.532, 0.275),
    "1024 px": (5.685, 0.277),
    "1024 px, ratio 2": (5.512, 0.273),
    "1024 px, ratio 4": (5.644, 0.276),
    "1024 px, ratio 9": (5.712, 0.275),
  }
  return tuple(
    Published(
      figure=figure,
      model=f"PixArt-Σ {model}",
      value=value,
      source=_TABLE_3,
      basis={"images": "30000"},
      note=_OWN_SET + (", and it names no CLIP" if figure == "clip" else ""),
    )
    for model, values in rows.items()
    for figure, value in zip(("fid", "clip"), values, strict=True)
  )


class Paper:
  """Distances to the set's images, and agreement with its captions."""

  name = "paper"
  version = "1"
  options = (Option("set", None, "Folder of a set that `evaluate make-set` made."),)
  score_options = (scorers_option(_DEFAULT, _SCORERS),)
  all_scorers = _SCORERS
  published = _published()

  def items(self, options: Mapping[str, Any]) -> ItemSet:
    if options["set"] is None:
      raise ValueError("Give --set=DIR, a set that `evaluate make-set` made.")
    directory = pathlib.Path(options["set"])
    manifest = read_manifest(directory)
    found = tuple(items_.read(directory / PROMPTS))
    digest = disk.file_hash(directory / PROMPTS)
    if (len(found), digest) != (manifest["count"], manifest["prompts_sha256"]):
      raise ValueError(
        f"{directory / PROMPTS} was changed: it has {len(found)} prompts, and "
        f"{MANIFEST} is of {manifest['count']}. Make the set again."
      )
    gone = [item for item in found if not (directory / str(item.reference)).is_file()]
    if gone:
      raise FileNotFoundError(
        f"{directory} lacks {len(gone)} of {len(found)} images, {gone[0].reference} "
        "first: run `evaluate make-set` again, which makes what is missing."
      )
    return ItemSet(
      found,
      sources={PROMPTS: digest, MANIFEST: disk.file_hash(directory / MANIFEST)},
      references=str(directory.absolute()),
    )

  def scorers(self, options: Mapping[str, Any]) -> tuple[str, ...]:
    return chosen_scorers(options["scorers"], _SCORERS)

  def reference_scorers(self, options: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(name for name in self.scorers(options) if name != "clip")

  def figures(self, run: ScoredModel) -> Sequence[Figure]:
    found: list[Figure] = []
    for name in ("fid", "fid-clean", "cmmd"):
      if run.has(name):
        distance = cmmd if name == "cmmd" else fid
        found.append(distance_figure(run, name, name, distance))
    if run.has("fid"):
      # A hundred subsets already: resampling them would take hours of a large set.
      once = dataclasses.replace(run, distance_resamples=0)
      found.append(distance_figure(once, "kid", "fid", _kid))
      p = column(run.table("fid"), "probabilities")
      if len(p) >= 10:  # splits of the published form
        value, deviation = inception_score(p)
        note = f"mean of 10 splits, which deviate by {deviation:.3g}"
        found.append(
          Figure(name="inception-score", value=value, note=note, basis=run.basis("fid"))
        )
    found += score_means(run)
    if not found:
      raise NotScoredError("no scorer has scored all its images yet.")
    return found


def _kid(a: np.ndarray, b: np.ndarray) -> float:
  size = min(_SUBSET, len(a), len(b))
  return kid(a, b, subsets=_SUBSETS, subset_size=size)


SUITE = Paper()
