"""Captions in metadata.jsonl or metadata.csv, as image folders of Hugging Face have."""

import array
import collections
import csv
import posixpath
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int64

from pixsigma_jax.data import rows
from pixsigma_jax.data.rows import Reading

NAMES = ("metadata.jsonl", "metadata.csv")
_PATH_FIELDS = ("file_name", "path")
_HASH_MASK = 2**63 - 1


class ImageTable:
  """Positions of images' captions in a file, with 16 bytes a row in memory.

  A row names its image by `file_name`, relative to the file's folder. `refused` counts
  the rows that say no image or no text, by reason.
  """

  def __init__(self, fs: Any, path: str, reading: Reading):
    self._fs, self._path, self._reading = fs, path, reading
    field = reading.image_field
    self._path_fields = _PATH_FIELDS if field is None else (field,)
    self._header: list[str] | None = None
    self.refused: collections.Counter[str] = collections.Counter()
    keys, places = array.array("q"), array.array("q")
    with fs.open(path, "rb") as file:
      if path.endswith(".csv"):
        self._read_header(file)
      for place, row in self._rows(file):
        try:
          name = self._name(row)
          self._captions(row)
        except ValueError as problem:
          self.refused[str(problem).partition(":")[0]] += 1
          continue
        keys.append(hash(name) & _HASH_MASK)
        places.append(place)
    order = np.argsort(np.array(keys, np.int64))
    self._keys = np.array(keys, np.int64)[order]
    self._places = np.array(places, np.int64)[order]

  def __len__(self) -> int:
    return len(self._keys)

  def numbers(self, name: str) -> Int64[np.ndarray, "n"]:
    """Numbers of the rows that name an image, in an order of the table's own."""
    key = hash(normal(name)) & _HASH_MASK
    first, end = np.searchsorted(self._keys, [key, key + 1])
    return np.arange(first, end)

  def captions(self, names: Iterable[str]) -> dict[str, list[tuple[str, str]]]:
    """The captions of each image that has any, as they stand in the file."""
    wanted = sorted(
      (int(self._places[number]), name)
      for name in names
      for number in self.numbers(name)
    )
    found: dict[str, list[tuple[str, str]]] = {}
    if wanted:
      with self._fs.open(self._path, "rb") as file:
        for place, name in wanted:
          file.seek(place)
          _, row = next(self._rows(file))
          if self._name(row) == normal(name):  # hashes of two names may be the same
            found.setdefault(name, []).extend(self._captions(row))
    return found

  def _read_header(self, file: Any) -> None:
    _, header = next(_records(file), (0, None))
    self._header = [name.strip() for name in header or []]

  def _rows(self, file: Any) -> Iterator[tuple[int, Any]]:
    """Each row from here on, and where it starts; None for what is none."""
    if self._header is not None:
      for place, record in _records(file):
        is_row = record is not None and len(record) == len(self._header)
        yield (
          place,
          dict(zip(self._header, record or (), strict=True)) if is_row else None,
        )
      return
    place = file.tell()
    for line, end in rows.lines(file):
      try:
        row = None if line is None else rows.parse_json(line)
      except ValueError:
        row = None
      yield place, row
      place = end

  def _name(self, row: Any) -> str:
    if not isinstance(row, Mapping):
      raise ValueError("not a row of fields")
    names = [row[field] for field in self._path_fields if row.get(field)]
    if not names or not isinstance(names[0], str):
      raise ValueError(f"no {' or '.join(self._path_fields)}")
    return normal(names[0])

  def _captions(self, row: Mapping[str, Any]) -> list[tuple[str, str]]:
    return rows.captions_of(row, self._reading.caption_fields)


def normal(name: str) -> str:
  """A path as names are compared: without detours, and composed (NFC)."""
  return unicodedata.normalize("NFC", posixpath.normpath(name))


def _records(file: Any) -> Iterator[tuple[int, list[str] | None]]:
  """Records of a .csv from here on, and where each starts; None for what is none."""

  def texts() -> Iterator[str]:
    while line := file.readline(rows.MOST_LINE_BYTES):
      yield line.decode("utf-8-sig", "surrogateescape")

  reader = csv.reader(texts())
  while True:
    place = file.tell()
    try:
      record = next(reader)
    except StopIteration:
      return
    except csv.Error:
      yield place, None
      continue
    if record:
      whole = "".join(record)
      is_text = whole.isascii() or not any("\ud800" <= c <= "\udfff" for c in whole)
      yield place, record if is_text else None
