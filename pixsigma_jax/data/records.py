"""The stored record: one image's latents and all its captions, in ArrayRecord shards.

A dataset is a directory:

  manifest.json                       who made the features, what they hold; comes last
  records-train-00000.array_record …  one `tf.train.Example` a record, uncompressed
  index.npz                           what is known of every record without reading it
  null_caption.npy                    the embedding of the empty caption, if it has any
  dataset_info.json, features.json    what tfds needs to read the same shards

Anyone with tfds reads it: `builder_from_directory(directory).as_data_source("train")`.
TensorFlow is needed neither to write nor to read. Damage does not pass: ArrayRecord
keeps a hash of each record (one chunk each) and checks it whenever the record is read.
"""

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import re
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from array_record.python import (
  array_record_module,  # pyright: ignore[reportAttributeAccessIssue]  (compiled)
)
from jaxtyping import Float, Float16

from pixsigma_jax.data import wire
from pixsigma_jax.wording import shortened

FORMAT_VERSION = 1
CAPTION_KINDS = ("long", "short")

Kind: TypeAlias = Literal["latents", "latent_moments"]
CaptionStorage: TypeAlias = Literal["embeddings", "text"]

MANIFEST, INDEX, NULL_CAPTION = "manifest.json", "index.npz", "null_caption.npy"
SHARD = re.compile(r"records-train-(\d{5,})\.array_record")
OWN_FILES = re.compile(
  rf"({SHARD.pattern}|records-train-\d{{5,}}\.index\.npz|unfinished\.json"
  r"|manifest\.json|index\.npz|null_caption\.npy|dataset_info\.json|features\.json"
  r"|contents\.parquet)"  # of `prepare`: what the records were made of
  r"(\.\w+\.partial)?"
)
# What NumPy raises for a damaged .npy or .npz: its own, its header's parser's, zlib's,
# and zipfile's (RuntimeError, where a flipped bit names an encryption).
DAMAGED_ARRAYS = (
  *(ValueError, EOFError, KeyError, RuntimeError, SyntaxError, tokenize.TokenError),
  *(zipfile.BadZipFile, zlib.error),
)
# An error of the system, in ArrayRecord's words: "read() failed: Stale file handle; …".
_OF_SYSTEM = re.compile(r"\b\w+\(\) failed: ")
_REPAIR = "Copy it again or prepare the dataset again."


class DamageError(ValueError):
  """A record, or a whole shard, whose bytes are not what was written."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)  # arrays: no one bool
class Record:
  """One image's features. Latents are as the autoencoder gives them, unscaled.

  A dataset holds `latents` or `latent_moments`, the other one is None. Sizes and the
  crop are in pixels of the image as it is displayed.
  """

  id: str
  captions: tuple[str, ...]
  caption_kinds: tuple[str, ...]  # "long" or "short", one for each caption
  caption_lengths: np.ndarray  # int32 [k], tokens of each caption
  # float16 [sum(caption_lengths) e], no padding; None where training embeds the text
  caption_embeddings: np.ndarray | None
  original_size: np.ndarray  # int32 [2], height and width of the source
  crop: np.ndarray  # float32 [4], what the latents show of it: top, left, bottom, right
  aesthetic_score: float = float("nan")  # of curate's `score`; nan if it has none
  latents: np.ndarray | None = None  # float16 [h' w' c]
  latent_moments: np.ndarray | None = None  # float16 [h' w' 2c], mean ‖ log-variance
  license: str = ""  # and attribution, of works of others; as the dataset's

  def embeddings(self, caption: int) -> Float16[np.ndarray, "t e"]:
    """Embeddings of one caption, a view of the stored ones."""
    assert self.caption_embeddings is not None
    start = self.caption_lengths[:caption].sum()
    return self.caption_embeddings[start : start + self.caption_lengths[caption]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features:
  """A dataset's features and the networks that make them, known beforehand."""

  kind: Kind
  channels: int  # of latents; moments have twice as many
  resolution: int  # side in pixels of the square whose area the images have
  autoencoder: Mapping[str, Any]  # its identity, for JSON
  scaling_factor: float  # what the trainer multiplies latents with
  text_encoder: Mapping[str, Any]  # its identity, for JSON
  caption_storage: CaptionStorage
  caption_length: int  # tokens that a caption may have
  caption_width: int  # of its embeddings
  crop_rule: Mapping[str, Any]  # how images got their buckets' sizes, for JSON
  # Of the weights and of the crop rule by `autoencoder`, `text_encoder`, `crop_rule`;
  # what has no weights is missing.
  hashes: Mapping[str, str]
  # License and attribution of works of others, which every record repeats; empty where
  # images have none in common.
  license: str = ""

  def __post_init__(self):
    json.dumps(dataclasses.asdict(self))  # what JSON cannot hold fails now, not later


@dataclasses.dataclass(frozen=True)
class Shard:
  """One file of records, as the manifest lists it."""

  file: str
  records: int
  bytes: int
  crc32: int  # of the records one after the other, without the container


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest(Features):
  """A finished dataset's manifest; `manifest.json` field by field."""

  format_version: int
  null_caption_crc32: int | None
  longest_caption: int  # tokens
  latent_sizes: tuple[tuple[int, int, int], ...]  # height, width, number of records
  num_records: int
  num_bytes: int
  shards: tuple[Shard, ...]

  @property
  def features(self) -> Features:
    """The features, which were known before the first record."""
    names = [field.name for field in dataclasses.fields(Features)]
    return Features(**{name: getattr(self, name) for name in names})

  def longest_sequence(self, patch_size: int) -> int:
    """Tokens of the largest latents, cut into patches of `patch_size`."""
    return max(h * w for h, w, _ in self.latent_sizes) // patch_size**2


def encode(record: Record, features: Features) -> bytes:
  """The record as a serialized `tf.train.Example`, the same bytes every time."""
  kind, latents = features.kind, getattr(record, features.kind)
  texts = {
    "id": [record.id.encode()],
    f"{kind}/value": [latents.tobytes()],
    "captions": [caption.encode() for caption in record.captions],
    "caption_kinds": [caption_kind.encode() for caption_kind in record.caption_kinds],
  }
  if features.license:
    texts["license"] = [record.license.encode()]
  if record.caption_embeddings is not None:
    texts["caption_embeddings"] = [record.caption_embeddings.tobytes()]
  integers = {
    f"{kind}/shape": latents.shape,
    "caption_lengths": record.caption_lengths.tolist(),
    "original_size": record.original_size.tolist(),
  }
  floats = {
    "crop": record.crop.tolist(),
    "aesthetic_score": [record.aesthetic_score],
  }
  return wire.encode(texts, integers, floats)


def decode(data: bytes, features: Features) -> Record:
  """The inverse of `encode`: arrays are views of `data`, which cannot be written.

  Raises:
    ValueError: the bytes are no record of a dataset of these features.
  """
  kind, example = features.kind, wire.Features(data)
  latents = {kind: example.array(f"{kind}/value", example.integers(f"{kind}/shape"))}
  embeddings = None
  if features.caption_storage == "embeddings":
    embeddings = example.array("caption_embeddings", (-1, features.caption_width))
  [score] = example.floats("aesthetic_score").tolist()
  return Record(
    id=example.texts("id")[0],
    captions=example.texts("captions"),
    caption_kinds=example.texts("caption_kinds"),
    caption_lengths=np.array(example.integers("caption_lengths"), np.int32),
    caption_embeddings=embeddings,
    original_size=np.array(example.integers("original_size"), np.int32),
    crop=example.floats("crop"),
    aesthetic_score=score,
    license=example.texts("license")[0] if features.license else "",
    **latents,
  )


def id_hash(identity: str) -> int:
  """64-bit hash of an image's id, by which holdouts are drawn in every dataset."""
  digest = hashlib.blake2b(identity.encode(), digest_size=8).digest()
  return int.from_bytes(digest, "little")


def problem(record: Record, features: Features) -> str | None:
  """Faults of a record that would otherwise show only during training."""
  kind, limit = features.kind, features.caption_length
  other = "latents" if kind == "latent_moments" else "latent_moments"
  latents, lengths = getattr(record, kind), record.caption_lengths
  embeddings = record.caption_embeddings
  if getattr(record, other) is not None or latents is None:
    return f"a dataset of {kind} takes {kind} and no {other}."
  stored = features.caption_storage == "embeddings"
  if stored != (embeddings is not None):
    wanted, got = ("", "no") if stored else ("no ", "some")
    return f"the dataset takes {wanted}caption_embeddings, and there are {got}."
  if record.license != features.license:
    return f"its license is {record.license!r}, and the dataset's {features.license!r}."
  channels = features.channels * (2 if kind == "latent_moments" else 1)
  arrays = {
    kind: (latents, (None, None, channels), np.float16),
    "caption_lengths": (lengths, (len(record.captions),), np.int32),
    "original_size": (record.original_size, (2,), np.int32),
    "crop": (record.crop, (4,), np.float32),
  }
  if stored:
    shape = (None, features.caption_width)
    arrays["caption_embeddings"] = (embeddings, shape, np.float16)
  for name, (array, shape, dtype) in arrays.items():
    fits = len(shape) == array.ndim and all(
      want in (None, have) for want, have in zip(shape, array.shape, strict=True)
    )
    if not fits or array.dtype != dtype:
      sides = ", ".join("any" if side is None else str(side) for side in shape)
      return (
        f"{name} is {array.dtype} {list(array.shape)}, expected "
        f"{np.dtype(dtype)} [{sides}]."
      )
    if not array.size:
      return f"{name} is empty; every image needs latents and at least one caption."
    if not np.isfinite(array).all():
      return (
        f"{name} holds values that are not finite. float16 ends at 65504: check the "
        "encoder's output before it is stored, it may have overflowed."
      )
  if len(record.caption_kinds) != len(record.captions):
    return (
      f"{len(record.captions)} captions need as many caption_kinds, "
      f"got {len(record.caption_kinds)}."
    )
  for caption_kind in record.caption_kinds:
    if caption_kind not in CAPTION_KINDS:
      return f"caption kind {caption_kind!r} is none of {', '.join(CAPTION_KINDS)}."
  for text in (record.id, *record.captions):
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
      return f"the text {shortened(text)} holds half a character and is no Unicode."
  for caption, length in zip(record.captions, lengths.tolist(), strict=True):
    if not 1 <= length <= limit:
      return (
        f"caption {shortened(caption)} has {length} tokens, expected 1 to {limit}, the "
        "caption length: shorten it, or encode with a greater length."
      )
  if embeddings is not None and lengths.sum() != len(embeddings):
    return (
      f"caption_lengths add up to {lengths.sum()} tokens, caption_embeddings hold "
      f"{len(embeddings)}."
    )
  if record.original_size.min() < 1:
    return f"original_size {record.original_size.tolist()} must be positive."
  (height, width), (top, left, bottom, right) = record.original_size, record.crop
  # Half a pixel: a rounded scale may reach that far over the edge.
  if not (-0.5 <= top < bottom <= height + 0.5 and -0.5 <= left < right <= width + 0.5):
    return (
      f"crop {record.crop.tolist()} is no part of an image of {height}x{width} pixels."
    )
  return None


def crc32(array: np.ndarray) -> int:
  """The checksum of an array's values, in row-major order."""
  return zlib.crc32(np.ascontiguousarray(array).tobytes())


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """A finished dataset, read by record number: `dataset[i]`, `dataset.read(numbers)`.

  Holds no open file, so that it can be sent to another process; threads may share it.
  """

  directory: pathlib.Path
  manifest: Manifest
  null_caption: Float[np.ndarray, "t e"] | None  # None where captions are text
  fingerprint: str  # of the manifest, records' checksums included

  def __len__(self) -> int:
    return self.manifest.num_records

  def __getitem__(self, number: int | np.integer) -> Record:
    return self.read([int(number)])[0]

  def read(self, numbers: Sequence[int] | np.ndarray) -> list[Record]:
    """The records of these numbers, in this order.

    Raises:
      IndexError: there is no record of such a number.
      DamageError: a record is damaged; the message names file and record.
      OSError: a file is not there any more, or cannot be read.
    """
    by_shard: dict[int, list[tuple[int, int]]] = {}  # row, position in the shard
    for row, number in enumerate(np.asarray(numbers).tolist()):
      if not 0 <= number < len(self):
        raise IndexError(
          f"{self.directory} has {len(self)} records, there is no {number}."
        )
      shard, position = self.place(number)
      by_shard.setdefault(shard, []).append((row, position))
    records: dict[int, Record] = {}
    for shard, places in by_shard.items():
      rows, positions = zip(*places, strict=True)
      read = self._read_shard(shard, list(positions))
      records.update(zip(rows, read, strict=True))
    return [records[row] for row in range(len(records))]

  def place(self, number: int) -> tuple[int, int]:
    """The shard that holds a record, and the record's position in it."""
    shard = bisect.bisect_right(self._starts, number) - 1
    return shard, number - self._starts[shard]

  @functools.cached_property
  def index(self) -> dict[str, np.ndarray]:
    """Reads the index: what is known of every record without reading it.

    `latent_size` and `original_size` int32 [r 2], `aesthetic_score` float32 [r],
    `id_hash` uint64 [r], `num_captions` int32 [r], and for the captions of all records
    one after the other `caption_lengths` int32 and `caption_kinds` uint8 (positions in
    `CAPTION_KINDS`).
    """
    path = self.directory / INDEX
    try:
      with open(path, "rb") as file, np.load(file) as arrays:
        return dict(arrays)
    except (FileNotFoundError, *DAMAGED_ARRAYS) as error:
      raise ValueError(f"{path} cannot be read: {error}. {_REPAIR}") from error

  @functools.cached_property
  def _starts(self) -> list[int]:
    """The number of each shard's first record; an empty shard shares the next one's."""
    counts = [shard.records for shard in self.manifest.shards]
    return [0, *itertools.accumulate(counts[:-1])]

  def _read_shard(self, number: int, positions: list[int]) -> list[Record]:
    shard = self.manifest.shards[number]
    reader = _open_shard(self.directory, shard)
    try:
      return [decode(data, self.manifest) for data in reader.read(positions)]
    except (RuntimeError, ValueError, IndexError) as error:  # ArrayRecord's, `decode`'s
      check_damage(self.directory / shard.file, error)
      if len(positions) > 1:  # the reader does not say which: read them one at a time
        return [self._read_shard(number, [position])[0] for position in positions]
      first = self._starts[number]
      raise DamageError(
        f"Record {first + positions[0]} of {self.directory} is damaged (record "
        f"{positions[0]} of {shard.file}): {error}. {_REPAIR}"
      ) from error


# Bounded: a dataset may have more shards than a process may open files.
@functools.lru_cache(maxsize=256)
def _open_shard(directory: pathlib.Path, shard: Shard) -> Any:
  """A reader of a shard, shared by all threads; it has no state between reads."""
  reader = open_shard(directory / shard.file)
  if not reader.ok() or reader.num_records() != shard.records:
    raise DamageError(
      f"{directory / shard.file} is damaged: {reader.num_records()} records can be "
      f"found, the manifest lists {shard.records}. {_REPAIR}"
    )
  return reader


def open_shard(path: pathlib.Path) -> Any:
  """A reader of an ArrayRecord file, for random access.

  Raises:
    OSError: the file is not there, or may not be read.
  """
  path.open("rb").close()  # ArrayRecord opens an unreadable file as an empty one
  return array_record_module.ArrayRecordReader(
    str(path), options="readahead_buffer_size:0,max_parallelism:0"
  )


def check_damage(path: pathlib.Path, error: Exception) -> None:
  """Tells an error of the file system from damage, which ArrayRecord does not.

  Raises:
    OSError: the file could not be read; it may be sound.
  """
  if _OF_SYSTEM.search(str(error)):
    raise OSError(f"{path} could not be read: {error}.") from error


def open_dataset(directory: str | os.PathLike[str]) -> Dataset:
  """Opens a finished dataset and checks that all its files are there and whole.

  Raises:
    FileNotFoundError: no such directory, an unfinished dataset, or a file is missing.
    ValueError: a file is truncated, or of another format version.
  """
  directory = pathlib.Path(directory).resolve()
  if not directory.is_dir():
    raise FileNotFoundError(
      f"There is no dataset at {directory}: prepare it first, or correct the path."
    )
  path = directory / MANIFEST
  if not path.exists():
    if any(OWN_FILES.fullmatch(file.name) for file in directory.iterdir()):
      raise FileNotFoundError(
        f"{directory} is an unfinished dataset: writing was interrupted before "
        f"{MANIFEST}. Run the command that prepares it again."
      )
    raise FileNotFoundError(
      f"{directory} is no dataset of records: it has no {MANIFEST}. Correct the path, "
      "or prepare the dataset first."
    )
  text = path.read_bytes()
  manifest = _parse_manifest(path, text)
  for shard in manifest.shards:
    file = directory / shard.file
    if not file.exists():
      raise FileNotFoundError(
        f"{file} is missing; {path} lists it with {shard.records} records. {_REPAIR}"
      )
    if (size := file.stat().st_size) != shard.bytes:
      raise ValueError(
        f"{file} has {size} bytes, {path} says {shard.bytes}: it was truncated or "
        f"replaced. {_REPAIR}"
      )
  return Dataset(
    directory=directory,
    manifest=manifest,
    null_caption=_read_null_caption(directory, manifest),
    fingerprint=hashlib.sha256(text).hexdigest()[:16],
  )


def _parse_manifest(path: pathlib.Path, text: bytes) -> Manifest:
  try:
    fields = json.loads(text)
    version = fields["format_version"]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f"{path} is no manifest of a dataset: {error!r}. {_REPAIR}"
    ) from error
  if version != FORMAT_VERSION:
    raise ValueError(
      f"{path} has format version {version}, this program reads {FORMAT_VERSION}: "
      "prepare the dataset again, or use the release that wrote it."
    )
  try:
    fields["latent_sizes"] = tuple(map(tuple, fields["latent_sizes"]))
    fields["shards"] = tuple(Shard(**shard) for shard in fields["shards"])
    manifest = Manifest(**fields)
    for shard in manifest.shards:  # a path from outside must not lead outside
      if not SHARD.fullmatch(shard.file):
        raise ValueError(f"{shard.file!r} is no name of a shard")
    if sum(shard.records for shard in manifest.shards) != manifest.num_records:
      raise ValueError("shards and num_records disagree")
    return manifest
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f"{path} is no manifest of a dataset: {error!r}. {_REPAIR}"
    ) from error


def _read_null_caption(
  directory: pathlib.Path, manifest: Manifest
) -> np.ndarray | None:
  if manifest.caption_storage == "text":
    return None
  path = directory / NULL_CAPTION
  try:
    null_caption = np.load(path)
  except (FileNotFoundError, *DAMAGED_ARRAYS) as error:
    raise ValueError(f"{path} cannot be read: {error}. {_REPAIR}") from error
  if crc32(null_caption) != manifest.null_caption_crc32:
    raise ValueError(
      f"{path} is not the null caption that {MANIFEST} speaks of. {_REPAIR}"
    )
  return null_caption
