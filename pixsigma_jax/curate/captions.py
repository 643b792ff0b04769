"""Captions of the images of an index: read from JSON lines, and added to.

What comes is added to what is there. Each part notes whose captions it has, so that a
command that was killed goes on after its finished parts.
"""

import collections
import hashlib
import itertools
import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pixsigma_jax import command
from pixsigma_jax.data import sources
from pixsigma_jax.data.index import SCHEMAS, Index
from pixsigma_jax.data.rows import (
  Reading,
  captions_of,
  clean_captions,
  lines,
  parse_json,
)

_NAME_FIELDS = ("id", "path", "file_name")
_NAMED = 5  # of the lines that name no image
_OFFSET_BITS = 48  # of a place in one of several files
_SUPPLIERS = b"captions_from"  # in a part's metadata
_SUFFIXES = [f".{end}" for e in sources.EXTENSIONS for end in (e, e.upper())]


def import_captions(
  index: Index, files: Sequence[str], *, caption_fields: Sequence[str] = ()
) -> dict[str, Any] | None:
  """Adds the captions in JSON-lines files to the images that they name.

  A line names its image by `id`, `path` or `file_name`, with or without the extension,
  and has captions as `captions_of` reads them. Several files, several lines and
  several captions of one image are all its captions.

  Args:
    caption_fields: what is read in place of the usual, as `Reading.caption_fields`.

  Returns:
    The report that is also written to captions/report.json; None if the captions of
    these files are in already. `lines_refused` counts by reason; `unknown` are lines
    that name no image of the index. Captions that were `empty` or `repeated` are
    dropped. A run that goes on after one that was killed counts what it did itself.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: a file has no line that can be used.
  """
  reading = Reading(tuple(caption_fields))
  fields = f":{','.join(caption_fields)}" if caption_fields else ""
  suppliers = [f"import:{_sha256(file)}{fields}" for file in files]
  if not set(suppliers) - set(suppliers_of_all(index)):
    return None
  book = _Book(files, index.source, reading)
  used: set[int] = set()
  counts: collections.Counter[str] = collections.Counter()
  for part in command.progress(range(index.num_parts), index.num_parts, "Captions"):
    found = []
    for row in index.read(part, columns=["id", "location"]).to_pylist():
      places = book.places(row["id"], row["location"])
      used.update(places)
      found.append([caption for place in places for caption in book.captions(place)])
    if set(suppliers) - set(suppliers_of(index, part)):
      counts += add_captions(index, part, suppliers, found)
  unknown = [name for place, name in book.names.items() if place not in used]
  return finish(
    index,
    suppliers,
    {
      "files": list(files),
      "lines": book.lines,
      "lines_refused": dict(sorted(book.refused.items())),
      "unknown": len(unknown),
      "first_unknown": unknown[:_NAMED],
      "added": counts["added"],
      "empty": counts["empty"],
      "repeated": counts["repeated"],
    },
  )


def add_captions(
  index: Index,
  part: int,
  suppliers: Sequence[str],
  captions: Sequence[Sequence[tuple[str, str]]],
) -> collections.Counter[str]:
  """Adds captions to a part; counts which were new, known or empty.

  Args:
    suppliers: whose captions the part then has, besides those that it had.
    captions: of each row.
  """
  earlier = suppliers_of(index, part)
  step = "captions" if index.has_part("captions", part) else "scan"
  merged, counts = [], collections.Counter[str]()
  rows = index.read(part, step, columns=["captions"])["captions"].to_pylist()
  for old, new in zip(rows, captions, strict=True):
    kinds = {caption["text"]: caption["kind"] for caption in old}
    for caption in new:
      cleaned = clean_captions([caption])
      if not cleaned:
        counts["empty"] += 1
      elif cleaned[0][0] in kinds:
        counts["repeated"] += 1
      else:
        counts["added"] += 1
        kinds |= dict(cleaned)
    merged.append([{"text": text, "kind": kind} for text, kind in kinds.items()])
  table = pa.table({"captions": merged}, schema=SCHEMAS["captions"])
  from_all = json.dumps([*earlier, *(s for s in suppliers if s not in earlier)])
  index.write("captions", part, table.replace_schema_metadata({_SUPPLIERS: from_all}))
  return counts


def suppliers_of(index: Index, part: int) -> list[str]:
  """Whose captions a part has, in the order in which they came."""
  if not index.has_part("captions", part):
    return []
  return json.loads(index.metadata(part, "captions")[_SUPPLIERS])


def suppliers_of_all(index: Index) -> list[str]:
  """Whose captions are finished, and in all parts: one may have been deleted."""
  return _in_all_parts(index, _noted(index))


def note_finished(index: Index, suppliers: Sequence[str]) -> None:
  """Notes which of these suppliers all parts have, beside those noted before."""
  both = dict.fromkeys([*_noted(index), *suppliers])
  index.note("captions", {"from": _in_all_parts(index, list(both))})


def _noted(index: Index) -> list[str]:
  return (index.settings("captions") or {"from": []})["from"]


def _in_all_parts(index: Index, suppliers: Sequence[str]) -> list[str]:
  if not suppliers or not index.has("captions"):
    return []
  parts = [suppliers_of(index, part) for part in range(index.num_parts)]
  return [supplier for supplier in suppliers if all(supplier in p for p in parts)]


def finish(
  index: Index, suppliers: Sequence[str], report: Mapping[str, Any]
) -> dict[str, Any]:
  """Notes that all parts have a supplier's captions, and returns the whole report.

  It is written to captions/report.json, too.
  """
  images, without = 0, 0
  for part in range(index.num_parts):
    table = index.read(part, "scan", "captions", columns=["error", "captions"])
    lengths = np.array([len(captions) for captions in table["captions"].to_pylist()])
    fine = table["error"].is_null().to_numpy()
    images += int(fine.sum())
    without += int((fine & (lengths == 0)).sum())
  note_finished(index, suppliers)
  whole = {**report, "images": images, "images_without_caption": without}
  index.write_json("captions/report.json", whole)
  return whole


def _sha256(file: str) -> str:
  fs, path = sources.file_system(file)
  if not fs.isfile(path):
    raise FileNotFoundError(f"There are no captions at {file}: no such file.")
  with fs.open(path, "rb") as content:
    digest = hashlib.sha256()
    while block := content.read(2**20):
      digest.update(block)
  return digest.hexdigest()


class _Book:
  """Positions of each image's captions in files of JSON lines.

  Places stay in memory, about 200 bytes a line; the captions themselves do not.
  """

  def __init__(self, files: Sequence[str], source: str, reading: Reading):
    self._fields = reading.caption_fields
    _, self._root = sources.folder_of(source)
    self._files = [fs.open(path, "rb") for fs, path in map(sources.file_system, files)]
    self._places: dict[str, tuple[int, ...]] = {}  # name → its lines
    self.names: dict[int, str] = {}  # line → the first of its names
    self.lines = 0
    self.refused: collections.Counter[str] = collections.Counter()
    for number, name in enumerate(files):
      self._enter(number, name)

  def places(self, id: str, location: str) -> list[int]:
    """The lines that name an image."""
    names = [id, location, *(id + suffix for suffix in _SUFFIXES)]
    found = itertools.chain.from_iterable(
      self._places.get(unicodedata.normalize("NFC", name), ()) for name in names
    )
    return list(dict.fromkeys(found))

  def captions(self, place: int) -> list[tuple[str, str]]:
    """The captions in a line, unchanged."""
    file = self._files[place >> _OFFSET_BITS]
    file.seek(place & (1 << _OFFSET_BITS) - 1)
    line, _ = next(lines(file))
    return captions_of(_row(line), self._fields)

  def _enter(self, number: int, name: str) -> None:
    start, of_this_file = 0, 0
    for line, end in lines(self._files[number]):
      place, start = number << _OFFSET_BITS | start, end
      self.lines += 1
      try:
        row = _row(line)
        names = self._names(row)
        if not captions_of(row, self._fields):
          raise ValueError("no caption")
      except ValueError as problem:
        self.refused[str(problem).partition(":")[0]] += 1
        continue
      of_this_file += 1
      self.names[place] = names[0]
      for each in dict.fromkeys(names):
        self._places[each] = (*self._places.get(each, ()), place)
    if not of_this_file:
      raise ValueError(
        f"{name} has no captions: none of its lines is a JSON object with "
        f"{' or '.join(_NAME_FIELDS)} and a caption (--caption_field names where it "
        f"is). {dict(self.refused)}"
      )

  def _names(self, row: Mapping[str, Any]) -> list[str]:
    given = [row[field] for field in _NAME_FIELDS if row.get(field) is not None]
    names = [str(name) for name in given if isinstance(name, str | int)]
    if not names:
      raise ValueError(f"no {' or '.join(_NAME_FIELDS)}")
    # File systems decompose what people type: names are compared composed.
    return [
      unicodedata.normalize("NFC", name.removeprefix(f"{self._root}/")).removeprefix(
        "./"
      )
      for name in names
    ]


def _row(line: bytes | None) -> Mapping[str, Any]:
  if line is None:
    raise ValueError("a line of many megabytes")
  row = parse_json(line)
  if not isinstance(row, Mapping):
    raise ValueError("not an object of fields")
  return row
