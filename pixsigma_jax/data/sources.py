"""Sources of images: folders, WebDataset tars, manifests, the official layout.

A source is listed as *units*, each small enough for one worker, and a unit yields
*entries*: an image's id, where its bytes are, and the captions found beside it. What is
wrong with one image is its entry's `error`; it stops nothing. What is neither image nor
caption is counted. What lies outside of the source's folder is never read, whatever a
manifest, a tar or a link says.
"""

import collections
import dataclasses
import functools
import itertools
import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import fsspec.core
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pixsigma_jax import errors
from pixsigma_jax.data import image_tables, parquet_images, tar_headers
from pixsigma_jax.data.rows import (
  CAPTION_ENDINGS,
  CAPTION_FIELDS,
  FALLBACK_FIELD,
  Captions,
  Reading,
  captions_in_file,
  captions_of,
  clean_captions,
  lines,
  parse_json,
)
from pixsigma_jax.wording import listed

PassedOver: TypeAlias = collections.Counter[str]  # what → how often

MOST_BYTES = 2**29  # of one image file
EXTENSIONS = (
  *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "avif", "tif", "tiff", "bmp", "gif"),
  "jp2",
  *("heic", "heif"),  # which need an extra
)

_PATH_FIELDS = ("path", "file_name")
_URL_FIELDS = ("url", "image_url")  # of lists like LAION's
_IMAGE_FIELD = "image"  # of the hub: the image itself, or its path
# What devices and programs leave among images: thumbnails, what was deleted.
_LITTER = frozenset(
  ("@eaDir", "@__thumb", "__MACOSX", "#recycle", "@Recycle", "$RECYCLE.BIN")
)
_MOST_CAPTION_BYTES = 2**20  # of one file of captions beside an image
_MOST_ROWS_PER_BYTE = 64  # of a Parquet file that does not lie about its rows
_OFFICIAL_LIST, _OFFICIAL_IMAGES = "InternData/data_info.json", "InternImgs"
_IN_A_TAR = re.compile(r"(.+\.(?i:tar))\?offset=(\d{1,18})&size=(\d{1,18})", re.DOTALL)
# UTF-16's marks, which JSON lines may not have.
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_ROWS_LOOKED_AT = 10_000  # of a manifest, for the fields that are asked for
_IN_PARQUET = re.compile(r"(.+\.(?i:parquet))\?row=(\d{1,18})&column=(.+)", re.DOTALL)
_URLS = ("http://", "https://")
_FETCH = "fetch the images first, as with img2dataset"
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


def list_units(
  source: str,
  *,
  per_unit: int,
  reading: Reading = Reading(),
  passed_over: PassedOver | None = None,
) -> list[Unit]:
  """The pieces of a source, in an order that depends on its content alone.

  Args:
    source: a folder of images; a .tar or a folder of them (WebDataset); a manifest,
      .jsonl or .parquet, or a folder of the latter; or a folder with
      InternData/data_info.json. A path, or a URL that fsspec knows.
    per_unit: images of a unit at most, except for tars, which are not split.
    passed_over: counts, if given, what lies in the source and is not read.

  Raises:
    FileNotFoundError: there is no such source.
    ValueError: it holds no images, is nothing of the above, has no such field as
      `reading` names, or cannot be reached without a package that is missing.
  """
  if per_unit < 1:
    raise ValueError(f"A part holds at least one image, not {per_unit}.")
  passed_over = collections.Counter() if passed_over is None else passed_over
  fs, path = file_system(source)
  if not fs.exists(path):
    raise FileNotFoundError(f"There is no {source}.")
  name = posixpath.basename(path)
  if fs.isdir(path):
    if _is_a_file(name):
      raise ValueError(f"{source} is a folder: its name must not end as a file's does.")
    if fs.exists(posixpath.join(path, _OFFICIAL_LIST)):
      units = _runs("official", _OFFICIAL_LIST, len(_official_list(source)), per_unit)
    else:
      units = _folder_units(source, per_unit, reading, passed_over)
  elif _extension(name) == "tar":
    _refuse_image_field(source, reading)
    units = [Unit("tar", name)]
  elif _extension(name) == "jsonl":
    with fs.open(path, "rb") as file:
      _check_lines(source, file, reading)
      units = _line_units(name, file, per_unit)
  elif _extension(name) == "parquet":
    units = _runs("parquet", name, _parquet_rows(source, name, reading), per_unit)
  elif name in image_tables.NAMES:
    raise ValueError(
      f"{source} is read with the images that it names: give its folder, "
      f"{source.removesuffix(name)}."
    )
  else:
    raise ValueError(
      f"{source} is no source of images: give a folder, a .tar or a folder of them, or "
      "a manifest (.jsonl, .parquet). Compressed tars have to be unpacked first."
    )
  if not units:
    there = ", ".join(f"{count} of {what}" for what, count in passed_over.most_common())
    raise ValueError(
      f"{source} holds no images: looked for .tar, for the rows of a manifest, and for "
      f"files that end in {', '.join(EXTENSIONS)}; passed over: {there or 'nothing'}."
    )
  return units


def entries(
  source: str,
  unit: Unit,
  *,
  reading: Reading = Reading(),
  passed_over: PassedOver | None = None,
) -> Iterator[Entry]:
  """The images of a unit, and what is wrong with those that cannot be used.

  Args:
    passed_over: counts, if given, what is in the unit's tar and is not read, and files
      of captions that have none; `list_units` has counted the rest.
  """
  passed_over = collections.Counter() if passed_over is None else passed_over
  listed = {
    "folder": _folder_entries,
    "tar": _tar_entries,
    "lines": _line_entries,
    "parquet": _parquet_entries,
    "official": _official_entries,
  }[unit.kind](source, unit, reading, passed_over)
  return map(_storable, listed)


def file_system(url: str) -> tuple[Any, str]:
  """The file system of a path or URL, and the path in it.

  Raises:
    ValueError: nobody knows such URLs, or the package that does is not installed.
  """
  try:
    return fsspec.core.url_to_fs(url)
  except ImportError as error:  # which says the package to install
    raise ValueError(f"{url} cannot be reached: {error}.") from None
  except ValueError as error:
    if "://" not in url:
      raise
    raise ValueError(f"{url} cannot be reached: {error}.") from None


def absolute(source: str) -> str:
  """The source by a name that holds in every process and working directory."""
  fs, path = file_system(source)
  return os.path.abspath(path) if is_local(fs) else source


def is_local(fs: Any) -> bool:
  """Whether a file system is this machine's own."""
  return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def _is_a_file(name: str) -> bool:
  return _extension(name) in ("tar", "jsonl", "parquet")


def folder_of(source: str) -> tuple[Any, str]:
  """The file system and the folder that locations are relative to."""
  fs, path = file_system(source)
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
  tables: tuple[str, ...] = ()  # metadata.csv and the like, of its folder and above
  error: str | None = None


class _Folder(NamedTuple):
  path: str
  tables: tuple[str, ...] = ()  # of the folders above


def _order(path: str) -> tuple[str, ...]:
  """A folder's content stays together: "a/b" comes before "a-b"."""
  return tuple(path.split("/"))


def _files(
  source: str, first: str = "", last: str | None = None, *, passed_over: PassedOver
) -> Iterator[_File]:
  """Images, tars and Parquet below a folder, in order, from `first` to `last`.

  Folders that cannot hold any of these are not listed. Links to folders are named, not
  followed: they may lead in circles.
  """
  fs, root = folder_of(source)
  low, high = _order(first), None if last is None else _order(last)
  stack: list[_File | _Folder] = [_Folder("")]
  while stack:
    item = stack.pop()
    place = _order(item.path)
    if isinstance(item, _File):
      if place >= low and (high is None or place <= high):
        yield item
      continue
    if item.path and (
      place < low[: len(place)] or (high and place > high[: len(place)])
    ):
      continue
    try:
      path = posixpath.join(root, item.path) if item.path else root
      listing = fs.ls(path, detail=True)
    except OSError as error:
      problem = f"cannot be listed: {type(error).__name__}"
      yield _File(item.path, error=problem)
      continue
    stack += reversed(_of_a_folder(fs, item, listing, passed_over))


def _of_a_folder(
  fs: Any,
  folder: _Folder,
  listing: Iterable[Mapping[str, Any]],
  passed_over: PassedOver,
) -> list[_File | _Folder]:
  infos = {posixpath.basename(info["name"].rstrip("/")): info for info in listing}
  beside = _caption_files(infos)
  tables = (
    *folder.tables,
    *(
      posixpath.join(folder.path, name)
      for name in image_tables.NAMES
      if name in infos and infos[name]["type"] != "directory"
    ),
  )
  found: list[_File | _Folder] = []
  first_of: dict[str, str] = {}  # id → the file that has it
  of_an_image: set[str] = set()
  for name in sorted(infos):
    info, path = infos[name], posixpath.join(folder.path, name)
    if not name:
      continue
    if _is_litter(name):
      passed_over[_what(name)] += 1
    elif info["type"] == "directory":
      found.append(_Folder(path, tables))
    elif info.get("islink") and fs.isdir(info["name"]):
      error = "a link to a folder, which is not followed"
      found.append(_File(path, error=error))
    elif _extension(name) in ("tar", "parquet"):
      found.append(_File(path))
    elif _extension(name) in EXTENSIONS:
      owner = first_of.setdefault(_stem(name), name)
      files = [*beside.get(_stem(name), ()), *beside.get(name, ())]
      of_an_image.update(files)
      found.append(
        _File(
          path,
          tuple(posixpath.join(folder.path, file) for file in files),
          tables,
          None if owner == name else f"has the id of another file: {owner}",
        )
      )
    elif name in image_tables.NAMES:
      passed_over[_beside_no_image(name)] += 1  # until it is known to be beside one
    elif _extension(name) not in CAPTION_ENDINGS:
      passed_over[_what(name)] += 1
  orphans = {file for files in beside.values() for file in files} - of_an_image
  passed_over.update(_beside_no_image(file) for file in orphans)
  return found


def _caption_files(infos: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
  """Names of images, with or without extension → the files that may caption them."""
  named = [
    (CAPTION_ENDINGS.index(_extension(name)), name)
    for name, info in infos.items()
    if _extension(name) in CAPTION_ENDINGS
    and info["type"] != "directory"
    and not _is_litter(name)
  ]
  beside: dict[str, list[str]] = {}
  for _, name in sorted(named):
    beside.setdefault(_stem(name), []).append(name)
  return beside


def _is_litter(name: str) -> bool:
  """Whether a file or folder is none of the user's: also macOS's ._x beside each x."""
  return name.startswith(".") or name in _LITTER


def _what(name: str) -> str:
  """Name under which a file that is passed over is counted."""
  if name in _LITTER:
    return f"{name} (folder)"
  if name.startswith("."):
    return "hidden (the name begins with a dot)"
  stem, extension = posixpath.splitext(name)
  if posixpath.splitext(stem)[1].lower() == ".tar":  # compressed
    return f".tar{extension.lower()}"
  return extension.lower() or "no extension"


def _beside_no_image(path: str) -> str:
  name = posixpath.basename(path)
  return f"{name if name in image_tables.NAMES else _what(name)} beside no image"


def _folder_units(
  source: str, per_unit: int, reading: Reading, passed_over: PassedOver
) -> list[Unit]:
  tars, tables, units, loose = [], [], [], 0
  named = _NamedImages(source, reading)
  files = _files(source, passed_over=passed_over)
  while run := list(itertools.islice(files, per_unit)):
    tars += [Unit("tar", f.path) for f in run if _extension(f.path) == "tar"]
    tables += [f.path for f in run if _extension(f.path) == "parquet"]
    run = [f for f in run if _is_an_image(f)]
    if run:
      units.append(
        Unit("folder", "", count=len(run), first=run[0].path, last=run[-1].path)
      )
      loose += sum(f.error is None for f in run)
      named.note(run)
  if tars and loose:
    raise ValueError(
      f"{source} holds {len(tars)} tars and {loose} images beside them, which may be "
      "the same: move the ones or the others to a folder of their own."
    )
  named.count(passed_over)
  if (tars or loose) and not named:
    _refuse_image_field(source, reading)
  if (tars or loose) and tables:
    # What img2dataset leaves beside its tars, or a list of the images.
    passed_over[".parquet"] += len(tables)
    tables = []
  units_of_tables = (
    _runs("parquet", table, _parquet_rows(source, table, reading), per_unit)
    for table in tables
  )
  return [*tars, *units, *itertools.chain.from_iterable(units_of_tables)]


def _refuse_image_field(source: str, reading: Reading) -> None:
  if reading.image_field is not None:
    raise ValueError(
      f"--image_field={reading.image_field} is a field of a manifest's rows, and "
      f"{source} has none: leave it out."
    )


def _is_an_image(file: _File) -> bool:
  return _extension(file.path) not in ("tar", "parquet")


class _NamedImages:
  """Rows of a folder's tables that name an image that is there."""

  def __init__(self, source: str, reading: Reading):
    self._source, self._reading = source, reading
    self._missed: dict[str, np.ndarray] = {}  # table → which rows name none
    self._refused: PassedOver = collections.Counter()

  def __bool__(self) -> bool:
    """Whether any image has a table."""
    return bool(self._missed)

  def note(self, files: Iterable[_File]) -> None:
    for path, images in _by_table(files).items():
      table = _table(self._source, path, self._reading)
      if path not in self._missed:
        self._missed[path] = np.ones(len(table), bool)
        for reason, count in table.refused.items():
          self._refused[f"row of {posixpath.basename(path)}: {reason}"] += count
      for image in images:
        self._missed[path][table.numbers(_relative_to_table(image, path))] = False

  def count(self, passed_over: PassedOver) -> None:
    """Counts refused rows and rows that name no image, in place of their tables."""
    passed_over += self._refused
    passed_over -= collections.Counter(map(_beside_no_image, self._missed))
    for path, missed in self._missed.items():
      if missed.any():
        what = f"row of {posixpath.basename(path)} that names no image"
        passed_over[what] += int(missed.sum())


def _by_table(files: Iterable[_File]) -> dict[str, list[str]]:
  """Tables, those of the folders above first, and the images that they may name."""
  of_table: dict[str, list[str]] = {}
  for file in files:
    for path in file.tables:
      of_table.setdefault(path, []).append(file.path)
  return of_table


def _relative_to_table(path: str, table: str) -> str:
  folder = posixpath.dirname(table)
  return path.removeprefix(f"{folder}/") if folder else path


_TABLES: dict[tuple[int, str], tuple[Any, image_tables.ImageTable]] = {}


def _table(source: str, path: str, reading: Reading) -> image_tables.ImageTable:
  # Content changes the key. The place is that of the folder's depth: files come folder
  # by folder, so that a table above is read once for all the folders below it.
  place = path.count("/"), posixpath.basename(path)
  try:
    fs, full_path, _ = _located(source, path)
    key = source, path, reading, fs.ukey(full_path)
    found, table = _TABLES.get(place, (None, None))
    if found != key or table is None:
      table = image_tables.ImageTable(fs, full_path, reading)
      _TABLES[place] = key, table
    return table
  except (OSError, ValueError) as problem:
    raise ValueError(
      f"{path} of {source} cannot be read: {_reason(problem)}: mend it, or give it "
      "another name, which leaves its captions out."
    ) from problem


def _folder_entries(
  source: str, unit: Unit, reading: Reading, passed_over: PassedOver
) -> Iterator[Entry]:
  listed = _files(source, unit.first, unit.last, passed_over=collections.Counter())
  files = [file for file in listed if _is_an_image(file)]
  in_tables = _captions_in_tables(source, files, reading)
  for file in files:
    found = _Found()
    for beside in file.beside:
      try:
        fs, path, size = _located(source, beside)
        if found.is_small_enough(beside, size):
          found.read(beside, fs.cat_file(path), reading)
      except (OSError, ValueError) as problem:
        found.problems.append((beside, _reason(problem)))
    captions = clean_captions((*found.captions, *in_tables.get(file.path, ())))
    error = found.close(passed_over, has_captions=bool(captions))
    yield Entry(_stem(file.path), file.path, captions, file.error or error)


def _captions_in_tables(
  source: str, files: Sequence[_File], reading: Reading
) -> dict[str, list[tuple[str, str]]]:
  found: dict[str, list[tuple[str, str]]] = {}
  for path, images in _by_table(files).items():
    table = _table(source, path, reading)
    names = {_relative_to_table(image, path): image for image in images}
    for name, captions in table.captions(names).items():
      found.setdefault(names[name], []).extend(captions)
  return found


class _Found:
  """Captions found in the files beside one image."""

  def __init__(self):
    self.names: list[str] = []
    self.captions: list[tuple[str, str]] = []
    self.problems: list[tuple[str, str]] = []  # a file, and why it cannot be read
    self.counted: PassedOver = collections.Counter()

  def is_small_enough(self, name: str, size: int) -> bool:
    if size <= _MOST_CAPTION_BYTES:
      return True
    if _extension(name) == "json":  # masks, a workflow: nobody's caption
      self.counted[".json without captions"] += 1
    else:
      self.problems.append((name, f"{size} bytes"))
    return False

  def read(self, name: str, data: bytes, reading: Reading) -> None:
    """Adds a file's captions.

    Raises:
      ValueError: it cannot be read.
    """
    captions = captions_in_file(_extension(name), data, reading)
    self.captions += captions
    if not captions:
      self.counted[f".{_extension(name)} without captions"] += 1

  def close(self, passed_over: PassedOver, *, has_captions: bool) -> str | None:
    """Counts files without captions; returns why the image has none, if by mistake."""
    passed_over.update(self.counted)
    if self.problems and not has_captions:
      return f"its captions cannot be read: {self.problems[0][1]}"
    for name, _ in self.problems:
      passed_over[f".{_extension(name)} that cannot be read, beside others"] += 1
    return None


def _reason(error: Exception) -> str:
  if isinstance(error, FileNotFoundError):
    return "no such file"
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  return str(error)


# ---- tars ----


def _tar_entries(
  source: str, unit: Unit, reading: Reading, passed_over: PassedOver
) -> Iterator[Entry]:
  """Images in their order; captions join them wherever they are in the tar.

  Its headers and captions are in memory, about 300 bytes a member and the texts.
  """
  damage: list[Exception] = []
  images: list[tar_headers.Member] = []
  beside: dict[str, _Found] = {}  # the name of a file of captions, without its ending
  try:
    fs, path, size = _located(source, unit.path)
    with fs.open(path, "rb") as file:
      for member in _until_damage(tar_headers.members(file, size), damage):
        name = posixpath.basename(member.name)
        litter = [part for part in member.name.split("/")[:-1] if part in _LITTER]
        if litter or _is_litter(name):
          passed_over[_what([*litter, name][0])] += 1
        elif _extension(name) in EXTENSIONS:
          images.append(member)
        elif _extension(name) in CAPTION_ENDINGS and member.type in tar_headers.PLAIN:
          _read_member(file, member, beside, reading)
        else:
          passed_over[_what(name)] += 1
  except (OSError, ValueError) as problem:
    damage.append(problem)
  yield from _images_of_a_tar(unit.path, images, beside, passed_over)
  for problem in damage:
    error = f"a tar that cannot be read: {_reason(problem)}"
    yield Entry(_stem(unit.path), unit.path, error=error)


def _until_damage(
  members: Iterator[tar_headers.Member], damage: list[Exception]
) -> Iterator[tar_headers.Member]:
  """Yields what can be read; adds the reason to `damage` where it ends early."""
  try:
    yield from (member for member in members if member.type != tar_headers.FOLDER)
  except ValueError as problem:
    damage.append(problem)


def _read_member(
  file: Any, member: tar_headers.Member, beside: dict[str, _Found], reading: Reading
) -> None:
  found = beside.setdefault(_stem(member.name), _Found())
  found.names.append(member.name)
  if found.names.count(member.name) > 1:  # the first, as of images
    found.counted[f".{_extension(member.name)} whose name is in the tar twice"] += 1
  elif found.is_small_enough(member.name, member.size):
    file.seek(member.offset)
    try:
      found.read(member.name, file.read(member.size), reading)
    except ValueError as problem:
      found.problems.append((member.name, str(problem)))


def _key(name: str) -> str:
  """WebDataset's key: the part of a file's name before the first dot."""
  folder, file = posixpath.split(name)
  return posixpath.join(folder, file.partition(".")[0])


def _images_of_a_tar(
  tar: str,
  images: Sequence[tar_headers.Member],
  beside: Mapping[str, _Found],
  passed_over: PassedOver,
) -> Iterator[Entry]:
  shard, owners = _stem(tar), dict[str, str]()
  used: dict[str, bool] = {}  # as `named`: whether an image has captions by it
  for member in images:
    stem = _stem(member.name)
    of_its_own = [name for name in (stem, member.name) if name in beside]
    # What a key of several images has, 0.txt beside 0.left.jpg, is said of each.
    named = of_its_own or [name for name in [_key(member.name)] if name in beside]
    captions = clean_captions(c for name in named for c in beside[name].captions)
    used |= {name: bool(captions) for name in named}
    owner = owners.setdefault(stem, member.name)
    is_first = owner is member.name
    if member.type not in tar_headers.PLAIN:
      problem = "a link, a device or a sparse file in a tar"
    elif member.name.startswith("/") or ".." in member.name.split("/"):
      problem = _OUTSIDE
    elif not is_first and owner == member.name:
      problem = "its name is in the tar twice"
    elif not is_first:
      problem = f"has the id of another file: {posixpath.basename(owner)}"
    else:
      problems = [problem for name in named for _, problem in beside[name].problems]
      is_mute = bool(problems) and not captions
      problem = f"its captions cannot be read: {problems[0]}" if is_mute else None
    yield Entry(
      # Another image of the id, say .jpg beside .png, is told by its whole name.
      f"{shard}/{stem if is_first else member.name}",
      f"{tar}?offset={member.offset}&size={member.size}",
      captions,
      problem,
    )
  for name, found in beside.items():
    if name in used:
      found.close(passed_over, has_captions=used[name])
    else:
      passed_over.update(map(_beside_no_image, found.names))


# ---- manifests ----


def _line_units(name: str, file: Any, per_unit: int) -> list[Unit]:
  units, start = [], 0
  rows = lines(file)
  while run := list(itertools.islice(rows, per_unit)):
    units.append(Unit("lines", name, start, len(run)))
    start = run[-1][1]
  return units


def _check_lines(source: str, file: Any, reading: Reading) -> None:
  """Refuses a manifest whose first rows have none of the fields that are asked for."""
  first = file.read(len(_UTF_16[0]))
  if first in _UTF_16:
    raise ValueError(
      f"{source} is UTF-16: write it as UTF-8, `iconv -f UTF-16 -t UTF-8`."
    )
  file.seek(0)
  fields: dict[str, None] = {}
  for line, _ in itertools.islice(lines(file), _ROWS_LOOKED_AT):
    try:
      row = parse_json(line or b"")
    except ValueError:
      continue
    fields |= dict.fromkeys(row if isinstance(row, Mapping) else ())
  file.seek(0)
  if fields:
    _check_fields(source, list(fields), reading)


def _check_fields(source: str, names: Sequence[str], reading: Reading) -> None:
  captions = [name for name, _ in reading.named_caption_fields()]
  if captions and not set(captions) & set(names):
    raise ValueError(
      f"{source} has none of the fields of --caption_field={','.join(captions)}, only "
      f"{', '.join(map(str, names))}."
    )
  if reading.image_field not in (None, *names):
    raise ValueError(
      f"{source} has no field of --image_field={reading.image_field}, only "
      f"{', '.join(map(str, names))}."
    )


def _line_entries(
  source: str, unit: Unit, reading: Reading, passed_over: PassedOver
) -> Iterator[Entry]:
  fs, path, _ = _located(source, unit.path)
  with fs.open(path, "rb") as file:
    file.seek(unit.start)
    position = unit.start
    for line, end in itertools.islice(lines(file), unit.count):
      name = f"{unit.path}@{position}"
      try:
        if line is None:
          raise ValueError("a line of many megabytes")
        yield _row_entry(source, parse_json(line), name, reading)
      except ValueError as problem:
        yield Entry(name, unit.path, error=f"a bad row: {problem}")
      position = end


def _parquet_rows(source: str, table: str, reading: Reading) -> int:
  """Number of rows that a Parquet file of the source declares.

  Raises:
    ValueError: it is damaged, or does not say where its images are.
  """
  fs, path, size = _located(source, table)
  try:
    with fs.open(path, "rb") as file:
      metadata = pq.ParquetFile(file).metadata
      groups = [
        metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)
      ]
      schema = metadata.schema.to_arrow_schema()
  except (pa.ArrowException, OSError, ValueError) as error:
    if not errors.of_content(error):
      raise
    raise ValueError(f"{table} is damaged, or not Parquet: {error}") from error
  count = metadata.num_rows
  if (
    min([0, *groups]) < 0 or sum(groups) != count or count > _MOST_ROWS_PER_BYTE * size
  ):
    raise ValueError(f"{table} is damaged: {count} rows in {size} bytes.")
  _check_fields(table, schema.names, reading)
  _image_column(table, schema, reading)
  return count


def _image_column(table: str, schema: pa.Schema, reading: Reading) -> str | None:
  """The column that holds the images themselves; None if some hold their paths.

  Raises:
    ValueError: no column does either.
  """
  name = reading.image_field or _IMAGE_FIELD
  if name in schema.names and parquet_images.holds_images(schema.field(name).type):
    return name
  paths = _PATH_FIELDS if reading.image_field is None else ()
  texts = [
    field.name
    for field in schema
    if field.name in (*paths, name) and _is_text(field.type)
  ]
  if texts:
    return None
  if set(paths) & set(schema.names):  # each row will say what is wrong with it
    return None
  hint = [f.name for f in schema if parquet_images.holds_images(f.type)]
  urls = [f.name for f in schema if f.name.lower() in _URL_FIELDS]
  raise ValueError(
    f"{table} does not say where its images are: it has the columns "
    f"{listed(schema.names)}, "
    f"and none of {', '.join((*paths, name))} holds paths or images. "
    + (f"Give --image_field={hint[0]}." if hint else "--image_field names another.")
    + (f" URLs ({listed(urls)}) are not followed: {_FETCH}." if urls else "")
  )


def _is_text(type: pa.DataType) -> bool:
  if pa.types.is_dictionary(type):
    type = type.value_type
  return (
    pa.types.is_string(type)
    or pa.types.is_large_string(type)
    or pa.types.is_string_view(type)
  )


def _parquet_entries(
  source: str, unit: Unit, reading: Reading, passed_over: PassedOver
) -> Iterator[Entry]:
  fs, path, _ = _located(source, unit.path)
  row, folder = unit.start, posixpath.dirname(unit.path)
  try:
    with fs.open(path, "rb") as file:
      table = pq.ParquetFile(file)
      column = _image_column(unit.path, table.schema_arrow, reading)
      for batch in _parquet_batches(table, unit.start, unit.count, column, reading):
        for single in map(batch.slice, range(len(batch)), itertools.repeat(1)):
          name, number = f"{unit.path}@{row}", row
          row += 1
          try:
            fields = single.to_pylist()[0]
            if column is None:
              yield _row_entry(source, fields, name, reading, folder)
            else:
              yield Entry(
                _id_of(fields) or f"{_stem(unit.path)}/{number}",
                f"{unit.path}?row={number}&column={column}",
                clean_captions(captions_of(fields, reading.caption_fields)),
              )
          except ValueError as problem:  # also of text that is not UTF-8
            yield Entry(name, unit.path, error=f"a bad row: {problem}")
  except (pa.ArrowException, OSError) as problem:
    if not errors.of_content(problem):
      raise
    name = f"{unit.path}@{row}"
    error = f"cannot be read from this row on: {type(problem).__name__}"
    yield Entry(name, unit.path, error=error)


def _parquet_batches(
  file: pq.ParquetFile, start: int, count: int, column: str | None, reading: Reading
) -> Iterator[pa.RecordBatch]:
  """Rows `start` to `start + count`, of the groups that hold them; not the images."""
  captions = [name for name, _ in reading.named_caption_fields()]
  fields = {"id", "kind", *(captions or (*CAPTION_FIELDS, FALLBACK_FIELD))}
  if column is None:
    fields |= {*_PATH_FIELDS, reading.image_field or _IMAGE_FIELD}
  names = file.schema_arrow.names
  # A row of no column at all would be none.
  columns = [name for name in names if name in fields - {column}] or names[:1]
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


def _official_entries(
  source: str, unit: Unit, reading: Reading, passed_over: PassedOver
) -> Iterator[Entry]:
  listed = _official_list(source)[unit.start : unit.start + unit.count]
  for number, row in enumerate(listed, unit.start):
    name = f"{unit.path}@{number}"
    try:
      yield _row_entry(source, row, name, reading, _OFFICIAL_IMAGES)
    except ValueError as problem:
      yield Entry(name, unit.path, error=f"a bad row: {problem}")


def _row_entry(
  source: str, row: Any, name: str, reading: Reading, folder: str = ""
) -> Entry:
  """One row of a manifest; its images are in `folder`.

  Raises:
    ValueError: the row says no image, or captions that are none.
  """
  if not isinstance(row, Mapping):
    raise ValueError("not an object of fields")
  named = _path_of(row, reading)
  if named.startswith(_URLS):
    raise ValueError(f"a URL, which is not followed: {_FETCH}")
  _, root = folder_of(source)
  try:
    path = _inside(posixpath.join(root, folder) if folder else root, named)
  except ValueError as problem:
    return Entry(name, named, error=str(problem))
  location = posixpath.join(folder, path)
  # The official layout's ids are relative to its folder of images.
  name = path if folder == _OFFICIAL_IMAGES else location
  captions = clean_captions(captions_of(row, reading.caption_fields))
  return Entry(_id_of(row) or _stem(name), location, captions)


def _path_of(row: Mapping[str, Any], reading: Reading) -> str:
  fields = (*_PATH_FIELDS, _IMAGE_FIELD)
  if reading.image_field is not None:
    fields = (reading.image_field,)
  paths = [row[field] for field in fields if row.get(field) is not None]
  path = paths[0] if paths else None
  if isinstance(path, Mapping):  # the hub's {bytes, path}
    path = path.get("path")
  if not isinstance(path, str):
    raise ValueError(f"no {' or '.join(fields)}")
  return path


def _id_of(row: Mapping[str, Any]) -> str | None:
  id = row.get("id")
  if id is not None and not isinstance(id, str | int):
    raise ValueError("an id that is neither text nor a number")
  return None if id is None else str(id)


# ---- bytes ----


def read_bytes(source: str, location: str) -> bytes:
  """An image file's bytes.

  Args:
    location: an entry's: relative to the source's folder, "a/b.jpg"; inside of a tar,
      "shard.tar?offset=1536&size=20011"; or of Parquet, "x.parquet?row=7&column=image".

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is outside of the source's folder, is no ordinary file, is larger
      than `MOST_BYTES`, or is no image's bytes in Parquet.
  """
  match = _IN_PARQUET.fullmatch(location)
  if match is not None:
    return _read_cell(source, match[1], int(match[2]), match[3])
  match = _IN_A_TAR.fullmatch(location)
  if match is None:
    return _read(source, location, MOST_BYTES)
  start, length = int(match[2]), int(match[3])
  fs, path, size = _located(source, match[1])
  if start + length > size:
    raise ValueError(f"truncated: {match[1]} ends at byte {size}")
  _refuse_large(length, MOST_BYTES)
  return fs.cat_file(path, start=start, end=start + length)


def _read_cell(source: str, table: str, row: int, column: str) -> bytes:
  fs, path, _ = _located(source, table)
  value = parquet_images.cell(fs, path, column, row, is_local=is_local(fs))
  if isinstance(value, Mapping):  # the hub's: bytes, or else the path of a file
    data, beside = value.get("bytes"), value.get("path")
    if data is None and isinstance(beside, str):
      return _read(source, posixpath.join(posixpath.dirname(table), beside), MOST_BYTES)
    value = data
  if not isinstance(value, bytes):
    raise ValueError(f"no image in the column {column}")
  _refuse_large(len(value), MOST_BYTES)
  return value


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
