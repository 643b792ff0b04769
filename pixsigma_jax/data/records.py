"""The stored record: one image's latents and all its captions, in ArrayRecord shards.

A dataset is a directory:

  manifest.json                       who made the features, what they hold; comes last
  records-train-00000.array_record …  one `tf.train.Example` a record, uncompressed
  index.npz                           latent size and caption lengths of every record
  null_caption.npy                    the embedding of the empty caption
  dataset_info.json, features.json    what tfds needs to read the same shards

Anyone with tfds reads it: `builder_from_directory(directory).as_data_source("train")`.
TensorFlow is needed neither to write nor to read. Damage does not pass: ArrayRecord
keeps a hash of each record (one chunk each) and checks it whenever the record is read.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import types
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import (
  array_record_module,  # pyright: ignore[reportAttributeAccessIssue]  (compiled)
)
from etils import epath
from jaxtyping import Float
from tensorflow_datasets.proto import tf_example_pb2

FORMAT_VERSION = 1
CAPTION_KINDS = ("long", "short")

Kind: TypeAlias = Literal["latents", "latent_moments"]

_SPLIT = "train"
_SHARD_TEMPLATE = "{DATASET}-{SPLIT}-{SHARD_INDEX}.{FILEFORMAT}"  # tfds' words
_MANIFEST, _INDEX, _NULL_CAPTION = "manifest.json", "index.npz", "null_caption.npy"
_PARTIAL = ".partial"  # ends the name of a file that is being written
_REPAIR = "Copy it again or prepare the dataset again."
_OWN_FILES = re.compile(
  r"(records-train-\d{5,}\.array_record|manifest\.json|index\.npz|null_caption\.npy"
  r"|dataset_info\.json|features\.json)(\.partial)?"
)


@dataclasses.dataclass(frozen=True, eq=False)  # arrays do not compare to one bool
class Record:
  """One image's features. Latents are as the autoencoder gives them, unscaled.

  A dataset holds `latents` or `latent_moments`, the other one is None.
  """

  id: str
  captions: tuple[str, ...]
  caption_kinds: tuple[str, ...]  # "long" or "short", one for each caption
  caption_lengths: np.ndarray  # int32 [k], tokens of each caption
  caption_embeddings: np.ndarray  # float16 [sum(caption_lengths) e], no padding
  original_size: np.ndarray  # int32 [2], height and width of the source in pixels
  latents: np.ndarray | None = None  # float16 [h' w' c]
  latent_moments: np.ndarray | None = None  # float16 [h' w' 2c], mean ‖ log-variance


@dataclasses.dataclass(frozen=True)
class Shard:
  """One file of records, as the manifest lists it."""

  file: str
  records: int
  bytes: int
  crc32: int  # of the records one after the other, without the container


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a dataset holds and who made it; `manifest.json` field by field."""

  format_version: int
  kind: Kind
  channels: int  # of latents; moments have twice as many
  resolution: int
  autoencoder: Mapping[str, Any]
  scaling_factor: float
  text_encoder: Mapping[str, Any]
  caption_width: int
  null_caption_crc32: int
  longest_caption: int  # tokens
  latent_sizes: tuple[tuple[int, int, int], ...]  # height, width, number of records
  num_records: int
  num_bytes: int
  shards: tuple[Shard, ...]

  def longest_sequence(self, patch_size: int) -> int:
    """Tokens of the largest latents, cut into patches of `patch_size`."""
    return max(h * w for h, w, _ in self.latent_sizes) // patch_size**2


def _tfds_features(kind: Kind, channels: int, width: int) -> Any:
  """The schema in tfds' words; `_encode` and `_decode` speak its wire format."""
  text, tensor = tfds.features.Text, tfds.features.Tensor
  return tfds.features.FeaturesDict(
    {
      "id": text(),
      kind: tensor(
        shape=(None, None, channels * (2 if kind == "latent_moments" else 1)),
        dtype=np.float16,
        encoding="bytes",
      ),
      "captions": tfds.features.Sequence(text()),
      "caption_kinds": tfds.features.Sequence(text()),
      "caption_lengths": tensor(shape=(None,), dtype=np.int32),
      "caption_embeddings": tensor(
        shape=(None, width), dtype=np.float16, encoding="bytes"
      ),
      "original_size": tensor(shape=(2,), dtype=np.int32),
    }
  )


# The class is built at import, out of a description that type checkers do not read.
_Example = tf_example_pb2.Example  # pyright: ignore[reportAttributeAccessIssue]


def _encode(record: Record, kind: Kind) -> bytes:
  """The record as a serialized `tf.train.Example`, the same bytes every time."""
  latents = getattr(record, kind)
  example = _Example()
  features = example.features.feature
  for name, texts in {
    "id": [record.id.encode()],
    f"{kind}/value": [latents.tobytes()],
    "captions": [caption.encode() for caption in record.captions],
    "caption_kinds": [caption_kind.encode() for caption_kind in record.caption_kinds],
    "caption_embeddings": [record.caption_embeddings.tobytes()],
  }.items():
    features[name].bytes_list.value.extend(texts)
  for name, integers in {
    f"{kind}/shape": latents.shape,
    "caption_lengths": record.caption_lengths.tolist(),
    "original_size": record.original_size.tolist(),
  }.items():
    features[name].int64_list.value.extend(integers)
  # Protobuf orders a map by the process's own hash seed unless told otherwise.
  return example.SerializeToString(deterministic=True)


def _decode(data: bytes, kind: Kind, width: int) -> Record:
  """The inverse of `_encode`, several times as fast as tfds' own decoder."""
  features = _Example.FromString(data).features.feature
  latent_shape = features[f"{kind}/shape"].int64_list.value
  latents = {kind: _floats(features[f"{kind}/value"], latent_shape)}
  return Record(
    id=_texts(features["id"])[0],
    captions=_texts(features["captions"]),
    caption_kinds=_texts(features["caption_kinds"]),
    caption_lengths=_integers(features["caption_lengths"]),
    caption_embeddings=_floats(features["caption_embeddings"], (-1, width)),
    original_size=_integers(features["original_size"]),
    **latents,
  )


def _texts(feature: Any) -> tuple[str, ...]:
  return tuple([text.decode() for text in feature.bytes_list.value])


def _floats(feature: Any, shape: Sequence[int]) -> np.ndarray:
  return np.frombuffer(feature.bytes_list.value[0], np.float16).reshape(shape)


def _integers(feature: Any) -> np.ndarray:
  return np.array(feature.int64_list.value, np.int32)


class RecordWriter:
  """Streams records into a directory; used as a context manager.

  A shard is written under a temporary name, synced to disk and renamed when it is
  whole. The manifest comes last, so that a directory with a manifest is complete. If
  the block ends in an exception there is no manifest, and the next writer into the
  directory starts over.

  Args:
    directory: new, empty, or left behind by an interrupted writer.
    kind: "latents" or "latent_moments".
    channels: channels of the latents (moments have twice as many).
    resolution: side in pixels of the square whose area the images have.
    autoencoder: identity of the autoencoder that made the latents, for JSON.
    scaling_factor: what the trainer multiplies latents with.
    text_encoder: identity of the text encoder, for JSON.
    null_caption: embedding of the empty caption, `[t e]`; captions may have up to t
      tokens.
    shard_bytes: a shard is closed when its records have reached this size.

  Raises:
    FileExistsError: the directory holds a finished dataset, or files of someone else.
    ValueError: a record or an argument is wrong (the message names the record).
    OSError: a shard cannot be written, for example because the disk is full.
  """

  def __init__(
    self,
    directory: str | os.PathLike[str],
    *,
    kind: Kind,
    channels: int,
    resolution: int,
    autoencoder: Mapping[str, Any],
    scaling_factor: float,
    text_encoder: Mapping[str, Any],
    null_caption: Float[np.ndarray, "t e"],
    shard_bytes: int = 1 << 30,
  ):
    if kind not in ("latents", "latent_moments"):
      raise ValueError(f"{kind=} must be 'latents' or 'latent_moments'.")
    if not np.isfinite(null_caption).all():
      raise ValueError("The null caption holds values that are not finite.")
    self._directory = pathlib.Path(directory)
    self._kind: Kind = kind
    self._channels = channels
    self._null_caption = null_caption
    self._shard_bytes = shard_bytes
    self._identity = {
      "resolution": resolution,
      "autoencoder": dict(autoencoder),
      "scaling_factor": scaling_factor,
      "text_encoder": dict(text_encoder),
    }
    json.dumps(self._identity)  # what JSON cannot hold fails now, not after days
    self._shards: list[Shard] = []
    self._shard: _ShardWriter | None = None
    self._latent_sizes: list[tuple[int, ...]] = []
    self._caption_lengths: list[np.ndarray] = []
    self._caption_kinds: list[int] = []
    self._num_bytes = 0
    _clear_unfinished(self._directory)

  def __enter__(self) -> "RecordWriter":
    return self

  def __exit__(
    self,
    exc_type: type[BaseException] | None,
    exc_value: BaseException | None,
    traceback: types.TracebackType | None,
  ) -> None:
    try:
      if exc_type is None:
        self._finish()
    finally:
      if self._shard is not None:
        self._shard.abandon()

  def write(self, record: Record) -> None:
    """Appends one record.

    Raises:
      ValueError: a field has a wrong shape, type or value.
      OSError: the shard cannot be written.
    """
    limit, width = self._null_caption.shape
    if problem := _problem(record, self._kind, self._channels, width, limit):
      raise ValueError(f"Record {record.id!r}: {problem}")
    if self._shard is None:
      self._shard = _ShardWriter(self._directory, len(self._shards))
    data = _encode(record, self._kind)
    self._shard.write(data)
    self._num_bytes += len(data)
    self._latent_sizes.append(getattr(record, self._kind).shape[:2])
    self._caption_lengths.append(record.caption_lengths.copy())
    self._caption_kinds += map(CAPTION_KINDS.index, record.caption_kinds)
    if self._shard.num_bytes >= self._shard_bytes:
      self._close_shard()

  def _close_shard(self) -> None:
    if self._shard is not None:
      self._shards.append(self._shard.close())
      self._shard = None

  def _finish(self) -> None:
    if not self._latent_sizes:
      raise ValueError(f"No record was written into {self._directory}.")
    self._close_shard()
    self._write_tfds_metadata()
    lengths = np.concatenate(self._caption_lengths)
    index = {
      "latent_size": np.array(self._latent_sizes, np.int32),
      "num_captions": np.array([len(x) for x in self._caption_lengths], np.int32),
      "caption_lengths": lengths,
      "caption_kinds": np.array(self._caption_kinds, np.uint8),
    }
    _write_whole(self._directory / _INDEX, lambda file: np.savez(file, **index))
    _write_whole(
      self._directory / _NULL_CAPTION, lambda file: np.save(file, self._null_caption)
    )
    sizes = collections.Counter(self._latent_sizes)
    manifest = Manifest(
      format_version=FORMAT_VERSION,
      kind=self._kind,
      channels=self._channels,
      caption_width=self._null_caption.shape[1],
      null_caption_crc32=_crc32(self._null_caption),
      longest_caption=int(lengths.max()),
      latent_sizes=tuple((h, w, count) for (h, w), count in sorted(sizes.items())),
      num_records=len(self._latent_sizes),
      num_bytes=self._num_bytes,
      shards=tuple(self._shards),
      **self._identity,
    )
    text = json.dumps(dataclasses.asdict(manifest), indent=2, sort_keys=True) + "\n"
    _write_whole(self._directory / _MANIFEST, lambda file: file.write(text.encode()))

  def _write_tfds_metadata(self) -> None:
    template = tfds.core.ShardedFileTemplate(
      data_dir=epath.Path(self._directory),
      dataset_name="records",
      split=_SPLIT,
      filetype_suffix="array_record",
      template=_SHARD_TEMPLATE,
    )
    split = tfds.core.SplitInfo(
      name=_SPLIT,
      shard_lengths=[shard.records for shard in self._shards],
      num_bytes=self._num_bytes,
      filename_template=template,
    )
    features = _tfds_features(self._kind, self._channels, self._null_caption.shape[1])
    with _writing(self._directory):
      tfds.folder_dataset.write_metadata(
        data_dir=self._directory,
        features=features,
        split_infos=[split],
        filename_template=template,
        description="Image latents and caption embeddings for pixsigma_jax.",
        homepage=None,
        supervised_keys=None,
        check_data=False,  # the check reads through TensorFlow
      )
      for name in ("dataset_info.json", "features.json"):
        _sync(self._directory / name)


class _ShardWriter:
  """One shard under its temporary name, until it is whole."""

  def __init__(self, directory: pathlib.Path, number: int):
    self._path = directory / f"records-{_SPLIT}-{number:05d}.array_record"
    self._partial = self._path.with_name(self._path.name + _PARTIAL)
    self.num_bytes = self._records = self._crc32 = 0
    # Grain wants one record a chunk; float16 features do not compress.
    options = "group_size:1,uncompressed"
    with _writing(self._partial):
      self._writer = array_record_module.ArrayRecordWriter(str(self._partial), options)

  def write(self, data: bytes) -> None:
    with _writing(self._partial):
      self._writer.write(data)
    self.num_bytes += len(data)
    self._records += 1
    self._crc32 = zlib.crc32(data, self._crc32)

  def close(self) -> Shard:
    with _writing(self._partial):
      self._writer.close()
      _publish(self._partial, self._path)
    size = self._path.stat().st_size
    return Shard(self._path.name, self._records, size, self._crc32)

  def abandon(self) -> None:
    del self._writer  # closed, it would raise again what ended the block
    self._partial.unlink(missing_ok=True)


def _problem(
  record: Record, kind: Kind, channels: int, width: int, limit: int
) -> str | None:
  """What is wrong with a record and would be found only in the middle of training."""
  other = "latents" if kind == "latent_moments" else "latent_moments"
  latents, lengths = getattr(record, kind), record.caption_lengths
  if getattr(record, other) is not None or latents is None:
    return f"a dataset of {kind} takes {kind} and no {other}."
  channels *= 2 if kind == "latent_moments" else 1
  arrays = {
    kind: (latents, (None, None, channels), np.float16),
    "caption_lengths": (lengths, (len(record.captions),), np.int32),
    "caption_embeddings": (record.caption_embeddings, (None, width), np.float16),
    "original_size": (record.original_size, (2,), np.int32),
  }
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
  for caption, length in zip(record.captions, lengths.tolist(), strict=True):
    if not 1 <= length <= limit:
      return (
        f"caption {caption!r} has {length} tokens, expected 1 to {limit}, the length "
        "of the null caption: shorten it, or encode with a greater length."
      )
  if lengths.sum() != len(record.caption_embeddings):
    return (
      f"caption_lengths add up to {lengths.sum()} tokens, caption_embeddings hold "
      f"{len(record.caption_embeddings)}."
    )
  if record.original_size.min() < 1:
    return f"original_size {record.original_size.tolist()} must be positive."
  return None


def _clear_unfinished(directory: pathlib.Path) -> None:
  """Makes `directory` ready for a new dataset, or refuses to."""
  if (directory / _MANIFEST).exists():
    raise FileExistsError(
      f"{directory} already holds a finished dataset. Use it as it is, choose another "
      "directory, or delete it first."
    )
  directory.mkdir(parents=True, exist_ok=True)
  files = sorted(directory.iterdir())
  for path in files:  # all of them before the first one is removed
    if not _OWN_FILES.fullmatch(path.name):
      raise FileExistsError(
        f"{directory} holds {path.name}, which is no part of a dataset. Choose a new "
        "or an empty directory."
      )
  for path in files:
    path.unlink()


def _write_whole(path: pathlib.Path, write: Callable[[Any], Any]) -> None:
  """Lets `path` appear on disk complete or not at all."""
  partial = path.with_name(path.name + _PARTIAL)
  with _writing(partial):
    with open(partial, "wb") as file:
      write(file)
    _publish(partial, path)


def _publish(partial: pathlib.Path, path: pathlib.Path) -> None:
  """Gives a whole file its name, and returns when a power cut cannot undo it."""
  _sync(partial)
  partial.rename(path)
  _sync(path.parent)


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except (OSError, RuntimeError) as error:  # ArrayRecord raises RuntimeError
    raise OSError(
      f"Cannot write {path}: {error}. Make room or choose another directory, and run "
      "the command again."
    ) from error


def _sync(path: pathlib.Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _crc32(array: np.ndarray) -> int:
  return zlib.crc32(np.ascontiguousarray(array).tobytes())


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """A finished dataset, read by record number: `dataset[i]`, `dataset.read(numbers)`.

  Holds no open file, so that it can be sent to another process; threads may share it.
  """

  directory: pathlib.Path
  manifest: Manifest
  null_caption: Float[np.ndarray, "t e"]
  fingerprint: str  # of the manifest, records' checksums included

  def __len__(self) -> int:
    return self.manifest.num_records

  def __getitem__(self, number: int | np.integer) -> Record:
    return self.read([int(number)])[0]

  def read(self, numbers: Sequence[int] | np.ndarray) -> list[Record]:
    """The records of these numbers, in this order.

    Raises:
      IndexError: there is no record of such a number.
      ValueError: a record is damaged; the message names file and record.
    """
    numbers = np.asarray(numbers, np.int64)
    for number in numbers[(numbers < 0) | (numbers >= len(self))]:
      raise IndexError(
        f"{self.directory} has {len(self)} records, there is no {number}."
      )
    shards = np.searchsorted(self._ends, numbers, side="right")
    records: list[Record | None] = [None] * len(numbers)
    for shard in np.unique(shards).tolist():
      rows = np.flatnonzero(shards == shard)
      first = self._ends[shard] - self.manifest.shards[shard].records
      positions = (numbers[rows] - first).tolist()
      for row, record in zip(rows, self._read_shard(shard, positions), strict=True):
        records[row] = record
    return records  # pyright: ignore[reportReturnType]  (every row has its shard)

  @functools.cached_property
  def index(self) -> dict[str, np.ndarray]:
    """What is known of every record without reading it.

    `latent_size` int32 [r 2], `num_captions` int32 [r], and for the captions of all
    records one after the other `caption_lengths` int32 and `caption_kinds` uint8
    (positions in `CAPTION_KINDS`).
    """
    path = self.directory / _INDEX
    try:
      with open(path, "rb") as file, np.load(file) as arrays:
        return dict(arrays)
    except Exception as error:  # zipfile, zlib and NumPy each raise their own
      raise ValueError(f"{path} cannot be read: {error}. {_REPAIR}") from error

  @functools.cached_property
  def _ends(self) -> np.ndarray:
    return np.cumsum([shard.records for shard in self.manifest.shards])

  def _read_shard(self, number: int, positions: list[int]) -> list[Record]:
    shard, kind = self.manifest.shards[number], self.manifest.kind
    reader = _open_shard(self.directory, shard)
    try:
      return [
        _decode(data, kind, self.manifest.caption_width)
        for data in reader.read(positions)
      ]
    except Exception as error:  # RuntimeError of Riegeli, or bytes that are no record
      if len(positions) > 1:  # the reader does not say which: read them one at a time
        return [self._read_shard(number, [position])[0] for position in positions]
      first = int(self._ends[number]) - shard.records
      raise ValueError(
        f"Record {first + positions[0]} of {self.directory} is damaged (record "
        f"{positions[0]} of {shard.file}): {error}. {_REPAIR}"
      ) from error


# Bounded: a dataset may have more shards than a process may open files.
@functools.lru_cache(maxsize=256)
def _open_shard(directory: pathlib.Path, shard: Shard) -> Any:
  """A reader of a shard, shared by all threads; it has no state between reads."""
  reader = array_record_module.ArrayRecordReader(
    str(directory / shard.file),
    options="readahead_buffer_size:0,max_parallelism:0",  # random access
  )
  # A file that it does not understand is to ArrayRecord one of no records.
  if not reader.ok() or reader.num_records() != shard.records:
    raise ValueError(
      f"{directory / shard.file} is damaged: {reader.num_records()} records can be "
      f"found, the manifest lists {shard.records}. {_REPAIR}"
    )
  return reader


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
  path = directory / _MANIFEST
  if not path.exists():
    if any(_OWN_FILES.fullmatch(file.name) for file in directory.iterdir()):
      raise FileNotFoundError(
        f"{directory} is an unfinished dataset: writing was interrupted before "
        f"{_MANIFEST}. Run the command that prepares it again."
      )
    raise FileNotFoundError(
      f"{directory} is no dataset of records: it has no {_MANIFEST}. Correct the path, "
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
      if not _OWN_FILES.fullmatch(shard.file):
        raise ValueError(f"{shard.file!r} is no name of a shard")
    if sum(shard.records for shard in manifest.shards) != manifest.num_records:
      raise ValueError("shards and num_records disagree")
    return manifest
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f"{path} is no manifest of a dataset: {error!r}. {_REPAIR}"
    ) from error


def _read_null_caption(directory: pathlib.Path, manifest: Manifest) -> np.ndarray:
  path = directory / _NULL_CAPTION
  try:
    null_caption = np.load(path)
  except (OSError, ValueError, EOFError) as error:
    raise ValueError(f"{path} cannot be read: {error}. {_REPAIR}") from error
  if _crc32(null_caption) != manifest.null_caption_crc32:
    raise ValueError(
      f"{path} is not the null caption that {_MANIFEST} speaks of. {_REPAIR}"
    )
  return null_caption
