"""Where images lie: folders, WebDataset tars, manifests, the official data layout.

A source is listed as *units*, each small enough for one worker, and a unit yields
*entries*: an image's id, where its bytes are, and the captions found beside it. What is
wrong with one image is its entry's `error`; it stops nothing. What lies outside of the
source's folder is never read, whatever a manifest, a tar or a link says.
"""

import dataclasses
import functools
import itertools
import json
import os
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import fsspec.core
import pyarrow as pa
import pyarrow.parquet as pq

from pixsigma_jax.data import tar_headers
from pixsigma_jax.wording import listed

Captions: TypeAlias = tuple[tuple[str, str], ...]  # (text, "long" or "short")

MOST_BYTES = 2**29  # of one image file
EXTENSIONS = (
  *("jpg", "jpeg", "jfif", "png", "webp", "avif", "tif", "tiff", "bmp", "gif", "jp2"),
  *("heic", "heif"),  # which Pillow cannot read: named, not passed over
)

_PATH_FIELDS = ("path", "file_name")
_CAPTION_FIELDS = {
  "caption_long": "long",
  "caption_short": "short",
  "sharegpt4v": "long",  # the official repository's names
  "prompt": "short",
}
_MOST_CAPTION_BYTES = 2**20  # of one .txt or .json file beside an image
_MOST_LINE_BYTES = 2**24  # of one line of a manifest
_MOST_ROWS_PER_BYTE = 64  # of a Parquet file that does not lie about its rows
_OFFICIAL_LIST, _OFFICIAL_IMAGES = "InternData/data_info.json", "InternImgs"
_IN_A_TAR = re.compile(r"(.+\.tar)\?offset=(\d{1,18})&size=(\d{1,18})", re.DOTALL)
# Unicode's categories: control characters, and halves of surrogate pairs.
_REPLACED = {"Cc": " ", "Cs": "\N{REPLACEMENT CHARACTER}"}
_OUTSIDE = "its path leads outside of the source's folder"


@dataclasses.dataclass(frozen=True)
class Unit:
  """One piece of listing work, which one worker does; its fields are JSON.

  `path` is relative to the source's folder. Of a folder: `count` images from path
  `first` to path `last`; of a tar: all of it; of lines: `count` of them from byte
  `start`; of Parquet and the official list: `count` rows from row `start`.
  """

  kind: Literal["folder", "tar", "lines", "parquet", "official"]
  path: str
  start: int = 0
  count: int = 0
  first: str = ""
  last: str = ""


@dataclasses.dataclass(frozen=True)
class Entry:
  """One image of a source, or, with an `error`, why there is none."""

  id: str
  location: str  # for `read_bytes`
  captions: Captions = ()
  error: str | None = None


# ---- what there is ----


def list_units(source: str, *, per_unit: int) -> list[Unit]:
  """The pieces of a source, in an order that depends on its content alone.

  Args:
    source: a folder of images; a .tar or a folder of them (WebDataset); a manifest,
      .jsonl or .parquet; or a folder with InternData/data_info.json. A path, or a URL
      that fsspec knows.
    per_unit: images of a unit at most, except for tars, which are not split.

  Raises:
    FileNotFoundError: there is no such source.
    ValueError: it holds no images, or is nothing of the above.
  """
  if per_unit < 1:
    raise ValueError(f"A part holds at least one image, not {per_unit}.")
  fs, path = fsspec.core.url_to_fs(source)
  if not fs.exists(path):
    raise FileNotFoundError(f"There is no {source}.")
  name = posixpath.basename(path)
  if fs.isdir(path):
    if _is_a_file(name):
      raise ValueError(f"{source} is a folder: its name must not end as a file's does.")
    if fs.exists(posixpath.join(path, _OFFICIAL_LIST)):
      units = _runs("official", _OFFICIAL_LIST, len(_official_list(source)), per_unit)
    else:
      units = _folder_units(source, per_unit)
  elif name.endswith(".tar"):
    units = [Unit("tar", name)]
  elif name.endswith(".jsonl"):
    with fs.open(path, "rb") as file:
      units = _line_units(name, file, per_unit)
  elif name.endswith(".parquet"):
    units = _runs("parquet", name, _parquet_rows(source), per_unit)
  else:
    raise ValueError(
      f"{source} is no source of images: give a folder, a .tar or a folder of them, or "
      "a manifest (.jsonl, .parquet). Compressed tars have to be unpacked first."
    )
  if not units:
    raise ValueError(
      f"{source} holds no images: looked for .tar, for the rows of a manifest, and for "
      f"files that end in {', '.join(EXTENSIONS)}."
    )
  return units


def entries(source: str, unit: Unit) -> Iterator[Entry]:
  """The images of a unit, and what is wrong with those that cannot be used."""
  listed = {
    "folder": _folder_entries,
    "tar": _tar_entries,
    "lines": _line_entries,
    "parquet": _parquet_entries,
    "official": _official_entries,
  }[unit.kind](source, unit)
  return map(_storable, listed)


def absolute(source: str) -> str:
  """The source by a name that holds in every process and working directory."""
  fs, path = fsspec.core.url_to_fs(source)
  return os.path.abspath(path) if is_local(fs) else source


def is_local(fs: Any) -> bool:
  """Whether a file system is this machine's own."""
  return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def _is_a_file(name: str) -> bool:
  return name.endswith((".tar", ".jsonl", ".parquet"))


def folder_of(source: str) -> tuple[Any, str]:
  """The file system and the folder that locations are relative to."""
  fs, path = fsspec.core.url_to_fs(source)
  return fs, posixpath.dirname(path) if _is_a_file(path) else path


def _runs(
  kind: Literal["parquet", "official"], path: str, rows: int, per_unit: int
) -> list[Unit]:
  return [
    Unit(kind, path, start, min(per_unit, rows - start))
    for start in range(0, rows, per_unit)
  ]


def _storable(entry: Entry) -> Entry:
  """A file's name may be any bytes; an index holds text."""
  try:
    (entry.id + entry.location).encode()
  except UnicodeEncodeError:
    id, location = (
      text.encode(errors="backslashreplace").decode()
      for text in (entry.id, entry.location)
    )
    return Entry(id, location, error="its name is not UTF-8")
  return entry


def _stem(path: str) -> str:
  return posixpath.splitext(path)[0]


def _extension(path: str) -> str:
  return posixpath.splitext(path)[1][1:].lower()


# ---- folders ----


class _File(NamedTuple):
  path: str  # relative to the source
  beside: tuple[str, ...] = ()  # files of captions
  error: str | None = None


def _order(path: str) -> tuple[str, ...]:
  """A folder's content stays together: "a/b" comes before "a-b"."""
  return tuple(path.split("/"))


def _files(source: str, first: str = "", last: str | None = None) -> Iterator[_File]:
  """Images and tars below a folder, in order, from `first` to `last`.

  Folders that cannot hold any of these are not listed. Links to folders are named, not
  followed: they may lead in circles.
  """
  fs, root = folder_of(source)
  low, high = _order(first), None if last is None else _order(last)
  stack: list[_File | str] = [""]
  while stack:
    item = stack.pop()
    if isinstance(item, _File):
      place = _order(item.path)
      if place >= low and (high is None or place <= high):
        yield item
      continue
    place = _order(item)
    if item and (place < low[: len(place)] or (high and place > high[: len(place)])):
      continue
    try:
      listing = fs.ls(posixpath.join(root, item) if item else root, detail=True)
    except OSError as error:
      yield _File(item, error=f"cannot be listed: {type(error).__name__}")
      continue
    stack += reversed(_of_a_folder(fs, item, listing))


def _of_a_folder(
  fs: Any, folder: str, listing: Iterable[Mapping[str, Any]]
) -> list[_File | str]:
  infos = {posixpath.basename(info["name"].rstrip("/")): info for info in listing}
  found: list[_File | str] = []
  first_of: dict[str, str] = {}  # id → the file that has it
  for name in sorted(infos):
    info, path = infos[name], posixpath.join(folder, name)
    if not name or name.startswith("."):  # also what macOS leaves beside each file
      continue
    if info["type"] == "directory":
      found.append(path)
    elif info.get("islink") and fs.isdir(info["name"]):
      found.append(_File(path, error="a link to a folder, which is not followed"))
    elif name.endswith(".tar"):
      found.append(_File(path))
    elif _extension(name) in EXTENSIONS:
      owner = first_of.setdefault(_stem(name), name)
      beside = [_stem(name) + end for end in (".txt", ".json")]
      found.append(
        _File(
          path,
          tuple(posixpath.join(folder, other) for other in beside if other in infos),
          None if owner == name else f"has the id of another file: {owner}",
        )
      )
  return found


def _folder_units(source: str, per_unit: int) -> list[Unit]:
  tars, units, loose = [], [], 0
  files = _files(source)
  while run := list(itertools.islice(files, per_unit)):
    tars += [Unit("tar", f.path) for f in run if f.path.endswith(".tar")]
    run = [f for f in run if not f.path.endswith(".tar")]
    if run:
      units.append(
        Unit("folder", "", count=len(run), first=run[0].path, last=run[-1].path)
      )
      loose += sum(f.error is None for f in run)
  if tars and loose:
    raise ValueError(
      f"{source} holds {len(tars)} tars and {loose} images beside them, which may be "
      "the same: move the ones or the others to a folder of their own."
    )
  return tars + units


def _folder_entries(source: str, unit: Unit) -> Iterator[Entry]:
  for file in _files(source, unit.first, unit.last):
    if file.path.endswith(".tar"):
      continue
    captions, error = [], file.error
    try:
      for beside in file.beside:
        content = _read(source, beside, _MOST_CAPTION_BYTES)
        captions += _captions_in_file(_extension(beside), content)
    except (OSError, ValueError) as problem:
      error = error or f"its captions cannot be read: {_reason(problem)}"
    yield Entry(_stem(file.path), file.path, clean_captions(captions), error)


def _reason(error: Exception) -> str:
  if isinstance(error, FileNotFoundError):
    return "no such file"
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  return str(error)


# ---- tars ----


def _tar_entries(source: str, unit: Unit) -> Iterator[Entry]:
  shard, seen, damage = _stem(unit.path), set(), []
  try:
    fs, path, size = _located(source, unit.path)
    with fs.open(path, "rb") as file:
      members = _until_damage(tar_headers.members(file, size), damage)
      for key, group in itertools.groupby(members, lambda member: _key(member.name)):
        yield from _of_a_key(unit.path, f"{shard}/{key}", group, file, key in seen)
        seen.add(key)
  except (OSError, ValueError) as problem:
    damage.append(problem)
  for problem in damage:
    error = f"a tar that cannot be read: {_reason(problem)}"
    yield Entry(shard, unit.path, error=error)


def _until_damage(
  members: Iterator[tar_headers.Member], damage: list[Exception]
) -> Iterator[tar_headers.Member]:
  """What can be read; why no more can, if so, is added to `damage` at the end."""
  try:
    yield from (member for member in members if member.type != tar_headers.FOLDER)
  except ValueError as problem:
    damage.append(problem)


def _key(name: str) -> str:
  """WebDataset's: what stands before the first dot of a file's name."""
  folder, file = posixpath.split(name)
  return posixpath.join(folder, file.partition(".")[0])


def _of_a_key(
  tar: str, id: str, members: Iterable[tar_headers.Member], file: Any, is_taken: bool
) -> Iterator[Entry]:
  images, captions, error = [], [], None
  for member in members:
    end = posixpath.basename(member.name).partition(".")[2].lower()
    if posixpath.basename(member.name).startswith("."):
      continue
    if end in EXTENSIONS:
      images.append(member)
    elif end in ("txt", "json") and member.type in tar_headers.PLAIN:
      try:
        if member.size > _MOST_CAPTION_BYTES:
          raise ValueError(f"{member.size} bytes")
        file.seek(member.offset)
        captions += _captions_in_file(end, file.read(member.size))
      except ValueError as problem:
        error = f"its captions cannot be read: {problem}"
  for number, member in enumerate(images):
    # Another image of the key, say .jpg beside .png, is told by its whole name.
    own = id if not number else f"{posixpath.dirname(id)}/{_base(member)}"
    if member.type not in tar_headers.PLAIN:
      problem = "a link, a device or a sparse file in a tar"
    elif member.name.startswith("/") or ".." in member.name.split("/"):
      problem = _OUTSIDE
    elif is_taken or number:
      problem = "has the id of another file"
    else:
      problem = error
    place = f"{tar}?offset={member.offset}&size={member.size}"
    yield Entry(own, place, clean_captions(captions), problem)


def _base(member: tar_headers.Member) -> str:
  return posixpath.basename(member.name)


# ---- manifests ----


def _line_units(name: str, file: Any, per_unit: int) -> list[Unit]:
  units, start = [], 0
  rows = lines(file)
  while run := list(itertools.islice(rows, per_unit)):
    units.append(Unit("lines", name, start, len(run)))
    start = run[-1][1]
  return units


def lines(file: Any) -> Iterator[tuple[bytes | None, int]]:
  """Lines that are not blank, and where each ends; None for one of many megabytes."""
  while line := file.readline(_MOST_LINE_BYTES):
    too_long = len(line) == _MOST_LINE_BYTES and not line.endswith(b"\n")
    while too_long and line and not line.endswith(b"\n"):
      line = file.readline(_MOST_LINE_BYTES)
    if too_long:
      yield None, file.tell()
    elif line.strip():
      yield line, file.tell()


def _line_entries(source: str, unit: Unit) -> Iterator[Entry]:
  fs, path, _ = _located(source, unit.path)
  with fs.open(path, "rb") as file:
    file.seek(unit.start)
    position = unit.start
    for line, end in itertools.islice(lines(file), unit.count):
      name = f"{unit.path}@{position}"
      try:
        if line is None:
          raise ValueError("a line of many megabytes")
        yield _row_entry(source, parse_json(line), name)
      except ValueError as problem:
        yield Entry(name, unit.path, error=f"a bad row: {problem}")
      position = end


def _parquet_rows(source: str) -> int:
  fs, path = fsspec.core.url_to_fs(source)
  try:
    with fs.open(path, "rb") as file:
      metadata = pq.ParquetFile(file).metadata
      groups = [
        metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)
      ]
      names = metadata.schema.to_arrow_schema().names
  except (pa.ArrowException, OSError, ValueError) as error:
    raise ValueError(f"{source} is damaged, or not Parquet: {error}") from error
  rows, size = metadata.num_rows, fs.size(path)
  if min([0, *groups]) < 0 or sum(groups) != rows or rows > _MOST_ROWS_PER_BYTE * size:
    raise ValueError(f"{source} is damaged: {rows} rows in {size} bytes.")
  if not set(_PATH_FIELDS) & set(names):
    raise ValueError(
      f"{source} does not say where its images are: it has the columns "
      f"{listed(names)}, and none of {', '.join(_PATH_FIELDS)}."
    )
  return rows


def _parquet_entries(source: str, unit: Unit) -> Iterator[Entry]:
  fs, path, _ = _located(source, unit.path)
  row = unit.start
  try:
    with fs.open(path, "rb") as file:
      for batch in _parquet_batches(pq.ParquetFile(file), unit.start, unit.count):
        for single in map(batch.slice, range(len(batch)), itertools.repeat(1)):
          name = f"{unit.path}@{row}"
          row += 1
          try:
            yield _row_entry(source, single.to_pylist()[0], name)
          except ValueError as problem:  # also of text that is not UTF-8
            yield Entry(name, unit.path, error=f"a bad row: {problem}")
  except (pa.ArrowException, OSError) as problem:
    name = f"{unit.path}@{row}"
    error = f"cannot be read from this row on: {type(problem).__name__}"
    yield Entry(name, unit.path, error=error)


def _parquet_batches(
  file: pq.ParquetFile, start: int, count: int
) -> Iterator[pa.RecordBatch]:
  """Rows `start` to `start + count`, of the groups that hold them."""
  fields = {"id", *_PATH_FIELDS, *_CAPTION_FIELDS, "caption", "captions", "kind"}
  columns = [name for name in file.schema_arrow.names if name in fields]
  metadata, groups, begin, skip = file.metadata, [], 0, start
  for group in range(metadata.num_row_groups):
    rows = metadata.row_group(group).num_rows
    if begin < start + count and begin + rows > start:
      if not groups:
        skip = start - begin
      groups.append(group)
    begin += rows
  for batch in file.iter_batches(min(count, 1024), row_groups=groups, columns=columns):
    taken = batch.slice(min(skip, len(batch)), count)
    skip = max(0, skip - len(batch))
    count -= len(taken)
    if len(taken):
      yield taken
    if not count:
      return


@functools.lru_cache(maxsize=1)
def _official_list(source: str) -> list[Any]:
  fs, root = folder_of(source)
  rows = parse_json(fs.cat_file(posixpath.join(root, _OFFICIAL_LIST)))
  if not isinstance(rows, list):
    raise ValueError(f"{_OFFICIAL_LIST} of {source} is not a list of images.")
  return rows


def _official_entries(source: str, unit: Unit) -> Iterator[Entry]:
  rows = _official_list(source)[unit.start : unit.start + unit.count]
  for number, row in enumerate(rows, unit.start):
    name = f"{unit.path}@{number}"
    try:
      yield _row_entry(source, row, name, _OFFICIAL_IMAGES)
    except ValueError as problem:
      yield Entry(name, unit.path, error=f"a bad row: {problem}")


def _row_entry(source: str, row: Any, name: str, folder: str = "") -> Entry:
  """One row of a manifest; its images are in `folder`.

  Raises:
    ValueError: the row says no image, or captions that are none.
  """
  if not isinstance(row, Mapping):
    raise ValueError("not an object of fields")
  paths = [row[field] for field in _PATH_FIELDS if row.get(field) is not None]
  if not paths or not isinstance(paths[0], str):
    raise ValueError(f"no {' or '.join(_PATH_FIELDS)}")
  _, root = folder_of(source)
  try:
    path = _inside(posixpath.join(root, folder) if folder else root, paths[0])
  except ValueError as problem:
    return Entry(name, paths[0], error=str(problem))
  id = row.get("id")
  if id is not None and not isinstance(id, str | int):
    raise ValueError("an id that is neither text nor a number")
  captions = clean_captions(captions_of(row))
  return Entry(
    _stem(path) if id is None else str(id), posixpath.join(folder, path), captions
  )


def parse_json(data: bytes | str) -> Any:
  """JSON out of others' hands.

  Raises:
    ValueError: it is none, or is nested too deep to be meant.
  """
  try:
    return json.loads(data)
  except (ValueError, RecursionError) as error:
    reason = str(error) if isinstance(error, json.JSONDecodeError) else "unreadable"
    raise ValueError(f"not JSON: {reason}") from None


# ---- captions ----


def captions_of(row: Mapping[str, Any]) -> list[tuple[str, str]]:
  """The captions in the fields of a manifest's row or a file beside an image.

  As they stand there. `caption` with a `kind`; `captions`, a list of texts or of
  `{text, kind}`; `caption_short`, `caption_long`; the official `prompt` (short) and
  `sharegpt4v` (long). Without a kind a caption is short.

  Raises:
    ValueError: one is something else than text, or of another kind.
  """
  found = [("captions", item) for item in _listed(row.get("captions"))]
  found.append(("caption", {"text": row.get("caption"), "kind": row.get("kind")}))
  found += [
    (field, {"text": row.get(field), "kind": kind})
    for field, kind in _CAPTION_FIELDS.items()
  ]
  captions = []
  for field, item in found:
    item = item if isinstance(item, Mapping) else {"text": item}
    text, kind = item.get("text"), item.get("kind")
    if text is None or text != text:  # pandas writes NaN where there is none
      continue
    if not isinstance(text, str):
      raise ValueError(f"{field} has {type(text).__name__} where text belongs")
    if kind not in (None, "long", "short"):
      raise ValueError(f"{field} is of kind {kind!r}, not long or short")
    captions.append((text, kind or "short"))
  return captions


def _listed(captions: Any) -> list[Any]:
  if captions is None:
    return []
  if isinstance(captions, str):
    return [captions]
  if not isinstance(captions, list):
    raise ValueError(f"captions is {type(captions).__name__}, not a list")
  return captions


def clean_captions(captions: Iterable[tuple[str, str]]) -> Captions:
  """In Unicode's composed form (NFC), on one line, without empty ones and repetitions.

  Control characters become spaces. The marks that order scripts from right to left
  stay; half a surrogate pair, which no file can hold, becomes U+FFFD.
  """
  cleaned: dict[str, str] = {}
  for text, kind in captions:
    if not text.isprintable():
      text = "".join(_REPLACED.get(unicodedata.category(c), c) for c in text)
    text = " ".join(unicodedata.normalize("NFC", text).split())
    if text:
      cleaned.setdefault(text, kind)
  return tuple(cleaned.items())


def _captions_in_file(end: str, data: bytes) -> list[tuple[str, str]]:
  try:
    text = data.decode("utf-8-sig")
  except UnicodeDecodeError:
    raise ValueError("not UTF-8") from None
  if end == "txt":
    return [(text, "short")]
  row = parse_json(text)
  if not isinstance(row, Mapping):
    raise ValueError("not an object of fields")
  return captions_of(row)


# ---- bytes ----


def read_bytes(source: str, location: str) -> bytes:
  """An image file's bytes.

  Args:
    location: an entry's: relative to the source's folder, "a/b.jpg" or, inside of a
      tar, "shard.tar?offset=1536&size=20011".

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is outside of the source's folder, is no ordinary file, or is larger
      than `MOST_BYTES`.
  """
  match = _IN_A_TAR.fullmatch(location)
  if match is None:
    return _read(source, location, MOST_BYTES)
  start, length = int(match[2]), int(match[3])
  fs, path, size = _located(source, match[1])
  if start + length > size:
    raise ValueError(f"truncated: {match[1]} ends at byte {size}")
  _refuse_large(length, MOST_BYTES)
  return fs.cat_file(path, start=start, end=start + length)


def _read(source: str, location: str, most: int) -> bytes:
  fs, path, size = _located(source, location)
  _refuse_large(size, most)
  return fs.cat_file(path)


def _refuse_large(size: int, most: int) -> None:
  if size > most:
    raise ValueError(f"too large: {size} bytes, more than {most}")


def _located(source: str, location: str) -> tuple[Any, str, int]:
  """The file system, path and size of a file that is inside of the source's folder."""
  fs, root = folder_of(source)
  path = posixpath.join(root, _inside(root, location))
  if is_local(fs):
    folder = os.path.realpath(root).rstrip("/")
    if not os.path.realpath(path).startswith(f"{folder}/"):
      raise ValueError(_OUTSIDE)
  info = fs.info(path)
  if info["type"] != "file":  # a pipe would be waited for
    raise ValueError("not an ordinary file")
  return fs, path, info["size"]


def _inside(root: str, path: str) -> str:
  """`path` relative to `root`, without detours."""
  if "\0" in path:
    raise ValueError("its path has a zero byte")
  if path.startswith("/"):
    if not path.startswith(f"{root}/"):
      raise ValueError(_OUTSIDE)
    path = path.removeprefix(f"{root}/")
  path = posixpath.normpath(path)
  if path.startswith("/") or path.split("/")[0] in ("", ".", ".."):
    raise ValueError(_OUTSIDE)
  return path
