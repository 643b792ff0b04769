"""The Parquet index of a source: what each step of curation found, one row an image.

An index is a directory: index.json (format version, source, units) and, for every step,
STEP/00000.parquet and on, one part a unit of the source. A step's part has the rows of
scan's, in the same order. Parts are written whole or not at all, so that a step that
was killed goes on after its finished parts, whoever starts it again.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import pathlib
import posixpath
import re
from collections.abc import Mapping, Sequence
from typing import Any

import fsspec.core
import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging

from pixsigma_jax import disk, errors
from pixsigma_jax.data import sources
from pixsigma_jax.data.sources import Unit
from pixsigma_jax.wording import listed

FORMAT_VERSION = 1

_CAPTIONS = pa.list_(pa.struct([("text", pa.string()), ("kind", pa.string())]))
SCHEMAS = {
  "scan": pa.schema(
    [
      ("id", pa.string()),
      ("location", pa.string()),
      ("error", pa.string()),  # null if the image is fine
      ("bytes", pa.int64()),
      ("sha256", pa.string()),
      ("phash", pa.uint64()),  # null of images with too little in them to tell
      ("height", pa.int32()),  # as displayed, in pixels
      ("width", pa.int32()),
      ("format", pa.string()),
      # Of colors: null if there is none, sRGB, converted, or ignored as it is broken.
      ("profile", pa.string()),
      ("captions", _CAPTIONS),
    ]
  ),
  "duplicates": pa.schema([("duplicate_of", pa.string())]),
  "scores": pa.schema([("aesthetic", pa.float32())]),
  "captions": pa.schema([("captions", _CAPTIONS)]),  # all of them, scan's included
  "kept": pa.schema([("kept", pa.bool_()), ("reason", pa.string())]),
}
# Which command writes which step.
COMMANDS = {
  "scan": "scan",
  "duplicates": "scan",
  "scores": "score",
  "captions": "caption",
  "kept": "filter",
}
_INDEX = "index.json"
_SCAN = b"scan"  # in a part's metadata: which scan of the part it is of
_PART = re.compile(r"(\d{5,})\.parquet")


@dataclasses.dataclass(frozen=True)
class Index:
  """An index on a disk or in a store; opened and pickled at no cost."""

  directory: str
  source: str
  units: tuple[Unit, ...]

  @property
  def num_parts(self) -> int:
    return len(self.units)

  @property
  def captions_step(self) -> str:
    """The step whose `captions` hold."""
    return "captions" if self.has("captions") else "scan"

  def read(
    self, part: int, *steps: str, columns: Sequence[str] | None = None
  ) -> pa.Table:
    """One part of the steps' columns side by side; of the same name, the later's.

    Args:
      columns: which of them; None for all.

    A column that a part of an earlier version lacks is null.

    Raises:
      ValueError: a step has not been there yet, or its part is damaged.
    """
    merged: dict[str, pa.ChunkedArray] = {}
    for step in steps or ("scan",):
      wanted = [
        name for name in SCHEMAS[step].names if columns is None or name in columns
      ]
      table = self._read(part, step, wanted)
      merged |= dict(zip(table.column_names, table.columns, strict=True))
    lengths = {len(column) for column in merged.values()}
    if len(lengths) > 1:
      raise ValueError(
        f"Part {part} of {self.directory} has {sorted(lengths)} rows in its steps "
        f"{', '.join(steps)}: they are not of the same scan. {self._again(steps[-1])}"
      )
    return pa.table(merged)

  def rows(self, part: int) -> int:
    """Number of images in a part."""
    with self._opened(part, "scan") as file:
      return file.metadata.num_rows

  def write(self, step: str, part: int, table: pa.Table) -> None:
    """Writes one part, whole or not at all.

    The metadata of `table`'s schema is kept with it.

    Raises:
      ValueError: the table has other columns than the step, or not a row an image.
    """
    names = SCHEMAS[step].names
    if sorted(table.column_names) != sorted(names):
      raise ValueError(
        f"{step} has the columns {names}, not {listed(table.column_names)}."
      )
    if step != "scan" and len(table) != self.rows(part):
      raise ValueError(
        f"Part {part} of {self.directory} has {self.rows(part)} images, and {step} has "
        f"{len(table)} rows for them."
      )
    metadata = table.schema.metadata or {}
    table = table.select(names).cast(SCHEMAS[step])
    if step == "scan":
      metadata |= {_SCAN: _hash(table)}
      self._forget(part, metadata[_SCAN], len(table))
    elif scanned := self._noted(part, "scan").get(_SCAN):
      metadata |= {_SCAN: scanned}
    content = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), content)
    self._write(self._part(part, step), content.getvalue())

  def missing(self, step: str) -> list[int]:
    """The parts that a step has yet to write."""
    fs, directory = fsspec.core.url_to_fs(self.directory)
    folder, there = posixpath.join(directory, step), set()
    fs.invalidate_cache()
    if fs.isdir(folder):
      names = map(posixpath.basename, fs.ls(folder, detail=False))
      there = {int(match[1]) for name in names if (match := _PART.fullmatch(name))}
    return [part for part in range(self.num_parts) if part not in there]

  def has_part(self, step: str, part: int) -> bool:
    """Whether one part of a step is finished; the others are not listed for it."""
    fs, path = fsspec.core.url_to_fs(
      posixpath.join(self.directory, self._part(part, step))
    )
    fs.invalidate_cache()
    return fs.exists(path)

  def has(self, step: str) -> bool:
    """Whether all parts of a step are finished."""
    return not self.missing(step)

  def metadata(self, part: int, step: str) -> dict[bytes, bytes]:
    """Metadata that `write` stored with a part's schema."""
    noted = self._noted(part, step)
    noted.pop(_SCAN, None)
    return noted

  def settings(self, step: str) -> Any:
    """A step's settings as `begin` stored them; None before."""
    fs, path = fsspec.core.url_to_fs(self._settings(step))
    return json.loads(fs.cat_file(path)) if fs.exists(path) else None

  def begin(self, step: str, settings: Mapping[str, Any]) -> list[int]:
    """Begins a step with these settings; returns its missing parts.

    Parts that were written with others are taken away first.
    """
    found = self.settings(step)
    if found != settings:
      fs, directory = fsspec.core.url_to_fs(self.directory)
      for part in sorted({*range(self.num_parts)} - {*self.missing(step)}):
        fs.rm_file(posixpath.join(directory, self._part(part, step)))
      self.note(step, settings)
    return self.missing(step)

  def note(self, step: str, settings: Mapping[str, Any]) -> None:
    """Stores a step's settings beside its parts."""
    self.write_json(f"{step}/{COMMANDS[step]}.json", settings)

  def write_json(self, path: str, content: Any) -> None:
    """Writes a file of the index; `path` is relative to it."""
    self._write(path, (json.dumps(content, indent=2) + "\n").encode())

  def read_json(self, path: str) -> Any:
    """The inverse of `write_json`; None where there is no such file, or half of one."""
    fs, name = fsspec.core.url_to_fs(posixpath.join(self.directory, path))
    try:
      return json.loads(fs.cat_file(name))
    except (FileNotFoundError, ValueError):
      return None

  def remove(self, path: str) -> None:
    """Deletes a file of the index, if it is there."""
    fs, name = fsspec.core.url_to_fs(posixpath.join(self.directory, path))
    with contextlib.suppress(FileNotFoundError):
      fs.rm_file(name)

  def _noted(self, part: int, step: str) -> dict[bytes, bytes]:
    with self._opened(part, step) as file:
      return dict(file.schema_arrow.metadata or {})

  def _forget(self, part: int, scanned: bytes, rows: int) -> None:
    """Deletes the steps' results for a part whose scan has changed.

    Which images are duplicates, and which are kept, hangs together over all parts.
    """
    for step in COMMANDS:
      if step == "scan" or not self.has_part(step, part):
        continue
      try:
        of = self._noted(part, step).get(_SCAN)
        with self._opened(part, step) as file:
          same = of == scanned or (of is None and file.metadata.num_rows == rows)
      except ValueError:  # taken away by another part, or damaged: reading will say so
        continue
      if same:
        continue
      all_parts = step in ("duplicates", "kept")
      logging.warning(
        "Part %d of %s has changed: `curate %s` is to be run again, for %s.",
        *(part, self.directory, COMMANDS[step]),
        "all parts" if all_parts else "this part",
      )
      others = {*range(self.num_parts)} - {part} if all_parts else ()
      # Its own part last: as long as that is there, a scan that was killed in here
      # finds that the others are to go.
      for stale in (*others, part):
        self.remove(self._part(stale, step))

  def _settings(self, step: str) -> str:
    return posixpath.join(self.directory, step, f"{COMMANDS[step]}.json")

  def _part(self, part: int, step: str) -> str:
    if not 0 <= part < self.num_parts:
      raise ValueError(f"{self.directory} has {self.num_parts} parts, no part {part}.")
    return f"{step}/{part:05d}.parquet"

  def _opened(self, part: int, step: str) -> pq.ParquetFile:
    path = posixpath.join(self.directory, self._part(part, step))
    fs, name = fsspec.core.url_to_fs(path)
    if not fs.exists(name):
      raise ValueError(
        f"{self.directory} has no part {part} of {step}: run "
        f"`curate {COMMANDS[step]}` first."
      )
    try:
      return pq.ParquetFile(fs.open(name, "rb"), page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError) as error:
      if not errors.of_content(error):
        raise
      raise ValueError(self._damaged(part, step)) from error

  def _read(self, part: int, step: str, columns: Sequence[str]) -> pa.Table:
    with self._opened(part, step) as file:
      try:
        table = file.read(columns=list(columns))
      except (pa.ArrowException, OSError, ValueError) as error:
        if not errors.of_content(error):
          raise
        raise ValueError(self._damaged(part, step)) from error
      rows = file.metadata.num_rows
    for name in [name for name in columns if name not in table.column_names]:
      empty = pa.nulls(rows, SCHEMAS[step].field(name).type)
      table = (
        table.append_column(name, empty)
        if table.column_names
        else pa.table({name: empty})
      )
    return table.select(list(columns))

  def _damaged(self, part: int, step: str) -> str:
    path = posixpath.join(self.directory, self._part(part, step))
    return f"{path} is damaged: delete it. {self._again(step)}"

  def _again(self, step: str) -> str:
    return f"`curate {COMMANDS[step]}` then writes it again."

  def _write(self, path: str, content: bytes) -> None:
    _write_whole(posixpath.join(self.directory, path), content)


def open_index(directory: str) -> Index:
  """The index in a directory.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is damaged, or of a newer version.
  """
  path = posixpath.join(directory, _INDEX)
  fs, name = sources.file_system(path)
  if not fs.exists(name):
    raise FileNotFoundError(
      f"{directory} is not an index: it has no {_INDEX}. `curate scan` makes one."
    )
  try:
    content = json.loads(fs.cat_file(name))
    version = content["format_version"]
    units = tuple(Unit(**unit) for unit in content["units"])
    source = content["source"]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{path} is damaged: delete it and run `curate scan`.") from error
  if version != FORMAT_VERSION:
    raise ValueError(
      f"{directory} is an index of format {version}, and this program reads "
      f"{FORMAT_VERSION}: use the version that wrote it, or scan again."
    )
  return Index(sources.absolute(directory), source, units)


def create_index(directory: str, source: str, units: Sequence[Unit]) -> Index:
  """A new index of a source, or the one that is there if it is of the same source.

  The units of an index stay: part 7 is always of the same images.

  Raises:
    FileExistsError: the directory holds the index of another source.
  """
  source = sources.absolute(source)
  if exists(directory):
    index = open_index(directory)
    if index.source != source:
      raise FileExistsError(
        f"{directory} is the index of {index.source}, not of {source}: give the index "
        "of another source a directory of its own."
      )
    return index
  content = {
    "format_version": FORMAT_VERSION,
    "source": source,
    "units": [dataclasses.asdict(unit) for unit in units],
  }
  text = json.dumps(content, indent=1) + "\n"
  _write_whole(posixpath.join(directory, _INDEX), text.encode())
  return open_index(directory)


def exists(directory: str) -> bool:
  """Whether there is an index in a directory."""
  fs, path = sources.file_system(posixpath.join(directory, _INDEX))
  return fs.exists(path)


def _hash(table: pa.Table) -> bytes:
  """Hash of a part's content, whatever wrote it."""
  text = json.dumps(table.to_pylist()).encode()
  return hashlib.sha256(text).hexdigest()[:16].encode()


def _write_whole(path: str, content: bytes) -> None:
  fs, name = fsspec.core.url_to_fs(path)
  if sources.is_local(fs):
    disk.write_whole(pathlib.Path(name), lambda partial: partial.write_bytes(content))
  else:  # in a store an object appears when it is whole
    fs.makedirs(posixpath.dirname(name), exist_ok=True)
    fs.pipe_file(name, content)
