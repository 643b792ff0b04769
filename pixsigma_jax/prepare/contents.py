"""Contents of cropped images and records, to find what has changed.

Beside a directory's plan or manifest stands contents.parquet: of every image that was
to go in, in order, the hash of its file and of its captions, and its score.
"""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import pathlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pixsigma_jax import disk, errors, metadata
from pixsigma_jax.wording import listed

CONTENTS = "contents.parquet"

_SCHEMA = pa.schema(
  [
    ("id", pa.string()),
    ("image", pa.string()),
    ("captions", pa.string()),
    ("score", pa.float32()),
  ]
)
_SETTINGS = b"settings"
_SET_ASIDE = "set_aside"  # in what an update has moved, and may delete
_NAMED = 3  # images of each kind of change


@dataclasses.dataclass(frozen=True)
class Contents:
  """Contents of a directory of cropped images or records.

  Attributes:
    images: `id`, `image` and `captions` (hashes), `score`; one row an image.
    settings: how they are made, as far as nothing else says it; for JSON.
  """

  images: pa.Table
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def write(self, directory: pathlib.Path) -> None:
    """Writes the contents into a directory, unless they are there."""
    path = directory / CONTENTS
    if path.exists():
      return
    about = {_SETTINGS: json.dumps(self.settings).encode()}
    table = self.images.replace_schema_metadata(about)
    disk.write_whole(path, lambda partial: pq.write_table(table, partial))

  def differences(self, now: "Contents") -> list[str]:
    """Differences from these contents to `now`, in words; empty without any."""
    settings = json.loads(json.dumps(now.settings))  # as they were read
    lines = metadata.disagreements(self.settings, settings)
    return lines + _changes(self.images, now.images)

  def unchanged_images(self, now: "Contents") -> frozenset[str]:
    """The ids whose pixels `now` are the same as here; none that comes twice."""
    pairs, twice = [], set()
    for images in (self.images, now.images):
      ids = images["id"].to_pylist()
      pairs.append(set(zip(ids, images["image"].to_pylist(), strict=True)))
      twice |= {id for id, count in collections.Counter(ids).items() if count > 1}
    same = pairs[0] & pairs[1]
    return frozenset(id for id, image in same if image and id not in twice)


def read(directory: pathlib.Path) -> Contents | None:
  """Reads a directory's contents; None if an older version made it without.

  Raises:
    ValueError: the file is damaged.
  """
  path = directory / CONTENTS
  try:
    table = pq.read_table(path)
    settings = json.loads((table.schema.metadata or {})[_SETTINGS])
    return Contents(table.cast(_SCHEMA), settings)
  except FileNotFoundError:
    return None
  except (pa.ArrowException, OSError, KeyError, ValueError) as error:
    if not errors.of_content(error):
      raise
    raise ValueError(
      f"{path} is damaged: {error}. Delete {directory}, or copy it again."
    ) from error


def images(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
  """The table of `Contents` from rows of `id`, `image`, `captions` and `score`.

  Captions, what JSON holds, are kept as a hash.
  """
  made = [{**row, "captions": digest(row["captions"])} for row in rows]
  return pa.Table.from_pylist(made, schema=_SCHEMA)


def digest(value: Any) -> str:
  """64 bits of the hash of what JSON holds, in hex."""
  return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _changes(before: pa.Table, now: pa.Table) -> list[str]:
  if before.equals(now):
    return []
  had, has = _by_name(before), _by_name(now)
  both = [name for name in had if name in has]
  changed = {
    "added": [name for name in has if name not in had],
    "removed": [name for name in had if name not in has],
    "with other pixels": [n for n in both if had[n][0] != has[n][0]],
    "with other captions": [n for n in both if had[n][1] != has[n][1]],
    "with another score": [n for n in both if had[n][2] != has[n][2]],
  }
  lines = [_line(what, names) for what, names in changed.items() if names]
  return lines or ["the same images in another order"]


def _by_name(images: pa.Table) -> dict[tuple[str, int], list[Any]]:
  """Image, captions and score by id, and by number among those of the same id."""
  seen: dict[str, itertools.count] = {}
  columns = (images[name].to_pylist() for name in _SCHEMA.names)
  return {
    (id, next(seen.setdefault(id, itertools.count()))): values
    for id, *values in zip(*columns, strict=True)
  }


def _line(what: str, names: Sequence[tuple[str, int]]) -> str:
  few = listed([id for id, _ in names], _NAMED)
  return f"{len(names)} image{'s' * (len(names) > 1)} {what} ({few})"


# ---- what there was before ----


def previous_of(directory: pathlib.Path) -> pathlib.Path:
  """Path where an update keeps a directory's old files until it is finished."""
  return directory.with_name(f"{directory.name}-previous")


def set_aside(directory: pathlib.Path, *, is_complete: bool) -> None:
  """Makes room for an update, which takes over what has not changed.

  Args:
    is_complete: whether the directory is finished. If not, and another is set aside
      already, by an update that was interrupted, that one stays and this one goes.

  Raises:
    FileExistsError: something else has the name of what is set aside.
  """
  previous = previous_of(directory)
  if previous.exists() and not (previous / _SET_ASIDE).exists():
    raise FileExistsError(
      f"{previous} is there, and no update has put it there: give it another name, as "
      f"an update of {directory} keeps what was there under that one."
    )
  if previous.exists() and not is_complete:
    shutil.rmtree(directory)
    return
  drop_previous(directory)
  (directory / _SET_ASIDE).touch()
  directory.rename(previous)


def drop_previous(directory: pathlib.Path) -> None:
  """Deletes what an update had set aside, now that it is finished, and nothing else."""
  previous = previous_of(directory)
  if not (previous / _SET_ASIDE).exists():
    return
  going = disk.partial_path(previous)  # a kill leaves nothing that looks whole
  with contextlib.suppress(FileNotFoundError):  # another process was faster
    previous.rename(going)
    shutil.rmtree(going)
