"""A second index of the same images: changes, and results that can be reused."""

import collections
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import pyarrow as pa

from pixsigma_jax.curate import captions
from pixsigma_jax.data import sources
from pixsigma_jax.data.index import Index, open_index

_NAMED = 5  # images of each kind of change


# An id, and how many images before it have the same.
_Key: TypeAlias = tuple[str, int]


class _Keys:
  """The keys of images, asked for in their order."""

  def __init__(self):
    self._seen: collections.Counter[str] = collections.Counter()

  def next(self, id: str) -> _Key:
    key = id, self._seen[id]
    self._seen[id] += 1
    return key


class _Before(NamedTuple):
  """An image's row in an earlier index."""

  sha256: str | None
  error: str | None
  captions: list[tuple[str, str]]  # of its scan
  more: list[tuple[str, str]]  # of `curate caption`
  score: float | None


class Earlier(NamedTuple):
  """An earlier index by image."""

  images: dict[_Key, _Before]
  has_captions: bool  # of `curate caption`, though a supplier may lack some parts
  suppliers: list[str]  # whose captions all of it has
  has_scores: bool
  settings: Any  # of its scores


def earlier(directory: str, new: str) -> Earlier:
  """Reads an index, to compare another with it.

  Raises:
    FileNotFoundError: there is no such index.
    ValueError: it is the new one itself, or its scan is unfinished.
  """
  index = open_index(directory)
  if index.directory == sources.absolute(new):
    raise ValueError(
      f"--previous={directory} is the index that is to be written: give the new one a "
      "directory of its own."
    )
  images: dict[_Key, _Before] = {}
  keys = _Keys()
  has_scores, has_captions = index.has("scores"), index.has("captions")
  for part in range(index.num_parts):
    columns = ["id", "sha256", "error", "captions"]
    rows = index.read(part, "scan", columns=columns).to_pylist()
    scores = _column(index, part, "scores", "aesthetic") if has_scores else None
    merged = _column(index, part, "captions", "captions") if has_captions else None
    for number, row in enumerate(rows):
      own = _pairs(row["captions"])
      texts = {text for text, _ in own}
      every = own if merged is None else _pairs(merged[number])
      more = [caption for caption in every if caption[0] not in texts]
      score = None if scores is None else scores[number]
      images[keys.next(row["id"])] = _Before(
        row["sha256"], row["error"], own, more, score
      )
  return Earlier(
    images,
    has_captions,
    captions.suppliers_of_all(index),
    has_scores,
    index.settings("scores"),
  )


def _column(index: Index, part: int, step: str, name: str) -> list[Any]:
  return index.read(part, step)[name].to_pylist()


def _pairs(captions_: list[dict[str, str]] | None) -> list[tuple[str, str]]:
  return [(caption["text"], caption["kind"]) for caption in captions_ or ()]


def changes(before: Earlier, index: Index) -> dict[str, Any]:
  """Numbers of images added, changed and removed, with the first of each."""
  found: dict[str, list[str]] = {
    "added": [],
    "with_other_pixels": [],
    "with_other_captions": [],
  }
  left, keys = dict.fromkeys(before.images), _Keys()
  for row in _rows(index):
    id = row["id"]
    key = keys.next(id)
    left.pop(key, None)
    was = before.images.get(key)
    if was is None:
      found["added"].append(id)
      continue
    if was.sha256 != row["sha256"]:
      found["with_other_pixels"].append(id)
    if was.captions != _pairs(row["captions"]):
      found["with_other_captions"].append(id)
  found["removed"] = [id for id, _ in left]
  return {
    name: {"images": len(ids), "first": ids[:_NAMED]} for name, ids in found.items()
  }


def _rows(index: Index) -> Iterator[dict[str, Any]]:
  for part in range(index.num_parts):
    columns = ["id", "sha256", "captions"]
    yield from index.read(part, "scan", columns=columns).to_pylist()


def take_over(before: Earlier, index: Index) -> None:
  """Copies scores and captions of images whose files are unchanged, where none are.

  Captions of `curate caption` are added to those that lie beside the images now.
  A part with an image that is new, has changed or could not be read before is left to
  `score` for its scores; of its captions, those of the others are kept, and whoever
  supplied them is asked again by the same command.
  """
  keys = _Keys()
  for part in range(index.num_parts):
    rows = index.read(part, "scan", columns=["id", "sha256", "error"]).to_pylist()
    known = [
      was if was is not None and _is_as_before(row, was) else None
      for row, was in ((row, before.images.get(keys.next(row["id"]))) for row in rows)
    ]
    fine = all(
      was is not None or row["error"] is not None
      for row, was in zip(rows, known, strict=True)
    )
    same_scorer = index.settings("scores") in (None, before.settings)
    takes_scores = before.has_scores and same_scorer and fine
    if takes_scores and not index.has_part("scores", part):
      index.note("scores", before.settings)
      scores = [None if was is None else was.score for was in known]
      index.write(
        "scores", part, pa.table({"aesthetic": pa.array(scores, pa.float32())})
      )
    if before.has_captions and not index.has_part("captions", part):
      more = [[] if was is None else was.more for was in known]
      captions.add_captions(index, part, before.suppliers if fine else [], more)
  if before.has_captions:
    captions.note_finished(index, before.suppliers)


def _is_as_before(row: dict[str, Any], was: _Before) -> bool:
  """Whether an image's file is unchanged, and no error of it has gone since."""
  return was.sha256 == row["sha256"] and (was.error is None or row["error"] is not None)
