"""The aesthetic score of every image of an index."""

import functools
import hashlib
import pathlib
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from absl import logging
from PIL import Image

from pixsigma_jax import disk
from pixsigma_jax.data import ingest, sources
from pixsigma_jax.data.image_bytes import open_image
from pixsigma_jax.data.index import Index, open_index

_BATCH = 32  # images that CLIP sees at once


def score(
  index: Index, *, clip: str, head: str, beam_options: Sequence[str]
) -> dict[str, Any] | None:
  """Scores all images that can be read and are no duplicates; the others have none.

  Args:
    clip: folder or hub id of CLIP ViT-L/14.
    head: file of the aesthetic head.

  Returns:
    The report that is also written to scores/report.json; None if all is scored.

  Raises:
    FileNotFoundError: there is no such head.
    ValueError: as `aesthetics.Scorer`.
  """
  settings = {"clip": clip, "head": head, "head_sha256": _sha256(head)}
  missing = index.begin("scores", settings)
  if not missing:
    return None
  ingest.run_parts(
    functools.partial(_score_part, index.directory, clip, head),
    missing,
    what="Scored images",
    beam_options=beam_options,
    by_image=True,
    images=sum(map(index.rows, missing)),
  )
  report = {"clip": clip, "head": head, "images": 0, "without_score": 0}
  for part in range(index.num_parts):
    column = index.read(part, "scores")["aesthetic"]
    report["images"] += len(column)
    report["without_score"] += column.null_count
  index.write_json("scores/report.json", report)
  return report


def decoded(
  index: Index, part: int, batch: int, done: Container[str] = ()
) -> Iterator[tuple[list[int], list[Image.Image]]]:
  """The images of a part, at most `batch` at a time, and which rows they are.

  Images with an error are left out, and so are duplicates if scan has marked them. All
  are counted in the progress, those that come when the next ones are asked for.

  Args:
    done: further images to leave out, by `identity`.
  """
  marked = index.has_part("duplicates", part)
  steps = ("scan", "duplicates") if marked else ("scan",)
  rows: list[int] = []
  images: list[Image.Image] = []
  columns = ["id", "location", "error", "sha256", "duplicate_of"]
  for row, image in enumerate(index.read(part, *steps, columns=columns).to_pylist()):
    left_out = image["error"] is not None or image.get("duplicate_of") is not None
    if left_out or identity(image) in done:
      ingest.count()
      continue
    try:
      data = sources.read_bytes(index.source, image["location"])
      if image["sha256"] not in (None, hashlib.sha256(data).hexdigest()):
        raise ValueError("it has changed since the scan")
      images.append(open_image(data))
    except (OSError, ValueError) as error:
      logging.warning("%s is left out: %s.", image["id"], error)
      ingest.count()
      continue
    rows.append(row)
    if len(rows) == batch:
      yield rows, images
      ingest.count(len(rows))
      rows, images = [], []
  if rows:
    yield rows, images
    ingest.count(len(rows))


def identity(image: Mapping[str, Any]) -> str:
  """Identity of a row of `scan`, whatever its position: its file's hash."""
  return image["sha256"] or image["id"]


def _score_part(directory: str, clip: str, head: str, part: int) -> None:
  index = open_index(directory)
  found: list[float | None] = [None] * index.rows(part)
  for rows, images in decoded(index, part, _BATCH):
    for row, value in zip(rows, _scorer(clip, head).score(images), strict=True):
      found[row] = float(value) if np.isfinite(value) else None
  table = pa.table({"aesthetic": pa.array(found, pa.float32())})
  index.write("scores", part, table)


@functools.lru_cache(maxsize=1)
def _scorer(clip: str, head: str) -> Any:
  from pixsigma_jax.curate import aesthetics

  return aesthetics.Scorer(clip, head)


def _sha256(head: str) -> str:
  path = pathlib.Path(head)
  if not path.is_file():
    raise FileNotFoundError(
      f"There is no aesthetic head at {head}: give --head the file of one."
    )
  return disk.file_hash(path)
