"""Suite `textatlas`: long texts in images, read by OCR (TextAtlasEval).

Source: CSU-JPG/TextAtlas, `evaluation/`. Of each subset: words that an OCR finds again
(accuracy, F1, CER), FID to the subset's own images by torchvision's Inception-v3, and
the cosine of CLIP ViT-B/32 with prompts cut to 77 tokens.
"""

import collections
import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pixsigma_jax import disk
from pixsigma_jax.data.parquet_images import holds_images
from pixsigma_jax.evaluate import metrics
from pixsigma_jax.evaluate.intervals import interval
from pixsigma_jax.evaluate.items import Item, ItemSet
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
  scorers_option,
)
from pixsigma_jax.wording import listed

SUBSETS = ("styledtextsynth", "textsceneshq", "textvisionblend")
_SCORERS = ("ocr", "fid-textatlas", "clip-textatlas")
# Column of the published tables, or field of a list in JSON → ours.
_TABLE = {"image_path": "name", "annotation": "prompt", "raw_text": "text"}
_LIST = {
  "image_path": "name",
  "prompt": "prompt",
  "raw_text": "text",
  "original_image_path": "reference",
}
_HUB = "CSU-JPG/TextAtlasEval of the Hugging Face hub"

_BASIS = {
  "ocr": {"ocr engine": "paddleocr 2.9.1"},
  "fid": {"fid-textatlas weights": "Inception-v3, torchvision"},
  "clip": {"clip-textatlas weights": "CLIP, 32 x 32 patches"},
}
# FID, CLIP, accuracy, F1 and CER of PixArt-Σ, on TextAtlasEval's leaderboard.
_PIXART_SIGMA = {
  "styledtextsynth": (82.83, 0.2764, 0.42, 0.62, 0.90),
  "textsceneshq": (72.62, 0.2347, 0.34, 0.53, 0.91),
  "textvisionblend": (81.29, 0.1891, 2.40, 1.57, 0.83),
}


class TextAtlas:
  """Texts of three subsets, each with figures of its own."""

  name = "textatlas"
  version = "1"
  options = (
    Option(
      "data",
      None,
      "Folder of TextAtlasEval: SUBSET/*.parquet as on the hub, or SUBSET.json.",
    ),
    Option("subsets", list(SUBSETS), f"Which of {', '.join(SUBSETS)}.", list),
    Option("first_seed", 0, "Seed of the first image; all later ones follow.", int),
  )
  score_options = (scorers_option(_SCORERS, _SCORERS),)
  all_scorers = _SCORERS
  published = tuple(
    Published(
      figure=f"{subset}/{name}",
      model="PixArt-Σ",
      value=value,
      source="leaderboard of TextAtlasEval",
      basis=_BASIS.get(name, _BASIS["ocr"]),
    )
    for subset, values in _PIXART_SIGMA.items()
    for name, value in zip(
      ("fid", "clip", "accuracy", "f1", "cer"), values, strict=True
    )
  )

  def items(self, options: Mapping[str, Any]) -> ItemSet:
    if options["data"] is None:
      raise ValueError(f"Give --data=FOLDER, a copy of {_HUB}.")
    root = pathlib.Path(options["data"])
    subsets = options["subsets"]
    if unknown := [subset for subset in subsets if subset not in SUBSETS]:
      raise ValueError(
        f"--subsets has {unknown[0]!r}, and TextAtlasEval {', '.join(SUBSETS)}."
      )
    sources: dict[str, str] = {}
    rows: list[dict[str, str]] = []
    for subset in (each for each in SUBSETS if each in subsets):
      for path, read in _files(root, subset):
        sources[str(path.relative_to(root))] = disk.file_hash(path)
        rows += [{**row, "subset": subset} for row in read(root, path)]
    if not rows:
      raise ValueError(f"--subsets is empty: give some of {', '.join(SUBSETS)}.")
    names = _names(rows)
    return ItemSet(
      items=tuple(
        Item(
          id=name,
          prompt=row["prompt"],
          seed=options["first_seed"] + i,
          reference=row["reference"],
          data={"subset": row["subset"], "text": row["text"]},
        )
        for i, (name, row) in enumerate(zip(names, rows, strict=True))
      ),
      sources=sources,
      references=str(root.absolute()),
    )

  def scorers(self, options: Mapping[str, Any]) -> tuple[str, ...]:
    return chosen_scorers(options["scorers"], _SCORERS)

  def reference_scorers(self, options: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(name for name in self.scorers(options) if name == "fid-textatlas")

  def figures(self, run: ScoredModel) -> Sequence[Figure]:
    found: list[Figure] = []
    for subset in SUBSETS:
      part = _part(run, subset)
      if part.items:
        found += _figures(part, subset)
    if not found:
      raise NotScoredError("no scorer has scored all its images yet.")
    return found


def _part(run: ScoredModel, subset: str) -> ScoredModel:
  """One subset's items and scores."""
  items = tuple(item for item in run.items if item.data["subset"] == subset)
  ids = pa.array([item.id for item in items], pa.string())

  def read(scorer: str, references: bool) -> pa.Table | None:
    table = run.read(scorer, references)
    if table is None:
      return None
    return table.filter(pc.is_in(table["id"], value_set=ids))  # pyright: ignore[reportAttributeAccessIssue]

  return dataclasses.replace(run, items=items, read=read)


def _figures(run: ScoredModel, subset: str) -> list[Figure]:
  found: list[Figure] = []
  if run.has("fid-textatlas"):
    found.append(distance_figure(run, f"{subset}/fid", "fid-textatlas", metrics.fid))
  if run.has("clip-textatlas"):
    cosines = column(run.table("clip-textatlas"), "cosine")
    found.append(mean_figure(run, f"{subset}/clip", "clip-textatlas", cosines))
  if run.has("ocr"):
    texts = run.table("ocr")["text"].to_pylist()
    counts = [
      metrics.text_counts(item.data["text"], text)
      for item, text in zip(run.items, texts, strict=True)
    ]
    for name, unit, better in (
      ("accuracy", "%", True),
      ("f1", "%", True),
      ("cer", "", False),
    ):

      def statistic(rows: Any, name: str = name) -> float:
        return getattr(metrics.sum_counts(counts[i] for i in rows), name)

      low, high = interval(
        statistic, len(counts), resamples=run.resamples, seed=run.seed
      )
      found.append(
        Figure(
          name=f"{subset}/{name}",
          value=statistic(range(len(counts))),
          low=low,
          high=high,
          unit=unit,
          higher_is_better=better,
          basis=run.basis("ocr"),
        )
      )
  return found


def _names(rows: Sequence[Mapping[str, str]]) -> list[str]:
  """Ids: the published file names, with the subset before them where two are alike."""
  stems = [
    re.sub(r"[^A-Za-z0-9._-]", "_", pathlib.PurePosixPath(row["name"]).stem)
    for row in rows
  ]
  if len({stem.lower() for stem in stems}) == len(stems):
    return stems
  names = [f"{row['subset']}-{stem}" for row, stem in zip(rows, stems, strict=True)]
  counts = collections.Counter(name.lower() for name in names)
  if twice := [
    row for name, row in zip(names, rows, strict=True) if counts[name.lower()] > 1
  ]:
    raise ValueError(
      f"{twice[0]['subset']} has {twice[0]['name']} twice, or two names that differ in "
      "signs that a file name cannot have: take one of them away."
    )
  return names


_Reader = Callable[[pathlib.Path, pathlib.Path], list[dict[str, str]]]


def _files(root: pathlib.Path, subset: str) -> list[tuple[pathlib.Path, _Reader]]:
  """The files of a subset, each with the function that reads its rows.

  Raises:
    FileNotFoundError: there is none.
  """
  if not root.is_dir():
    raise FileNotFoundError(f"--data={root} is no folder; give a copy of {_HUB}.")
  there = {path.name.lower(): path for path in root.iterdir()}
  if (path := there.get(f"{subset}.json")) is not None:
    return [(path, _read_list)]
  folder = there.get(subset)
  tables = sorted(folder.rglob("*.parquet")) if folder is not None else []
  if not tables:
    raise FileNotFoundError(
      f"{root} has neither {subset}/*.parquet nor {subset}.json, only "
      f"{listed(sorted(there))}. Name the subsets that are there in --subsets=…, or "
      f"fetch the others from {_HUB}."
    )
  return [(path, _read_table) for path in tables]


def _read_table(root: pathlib.Path, path: pathlib.Path) -> list[dict[str, str]]:
  """Rows of a table as published: image, image_path, annotation, raw_text."""
  try:
    schema = pq.read_schema(path)
    missing = [name for name in (*_TABLE, "image") if name not in schema.names]
    if not missing and not holds_images(schema.field("image").type):
      missing = ["image with the bytes of images"]
    if missing:
      raise ValueError(
        f"{path} is not of TextAtlasEval: it has no column {listed(missing)}, only "
        f"{listed(schema.names)}."
      )
    rows = pq.read_table(path, columns=list(_TABLE)).to_pylist()
  except (pa.ArrowException, OSError) as error:
    raise ValueError(
      f"{path} is no whole Parquet file: {type(error).__name__}. Fetch it again."
    ) from error
  place = path.relative_to(root).as_posix()
  return [
    {**_renamed(row, _TABLE, f"{path}, row {i}"), "reference": f"{place}#{i}"}
    for i, row in enumerate(rows)
  ]


def _read_list(root: pathlib.Path, path: pathlib.Path) -> list[dict[str, str]]:
  """Entries of a list as published: image_path, original_image_path, prompt, raw_text.

  Paths of original images are relative to the list's folder.
  """
  try:
    entries = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path} is not JSON: {error}.") from error
  if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
    raise ValueError(f"{path} must be a list of objects with {', '.join(_LIST)}.")
  rows = []
  for i, entry in enumerate(entries):
    row = _renamed(entry, _LIST, f"{path}, entry {i}")
    if not (root / row["reference"]).is_file():
      raise FileNotFoundError(
        f"{path}, entry {i}: there is no {root / row['reference']}, its original image."
      )
    rows.append(row)
  return rows


def _renamed(
  row: Mapping[str, Any], names: Mapping[str, str], where: str
) -> dict[str, str]:
  renamed = {}
  for theirs, ours in names.items():
    value = row.get(theirs)
    if not isinstance(value, str):
      raise ValueError(f"{where}: {theirs} must be a text, not {value!r}.")
    renamed[ours] = value
  return renamed


SUITE = TextAtlas()
