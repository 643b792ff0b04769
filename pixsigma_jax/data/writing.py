"""Datasets of records are written here: by one process, or by many and in any order.

A shard, like every other file, has its name only when it is whole and on the disk, and
the manifest comes last. What was known of a shard's records while they were written
lies beside it until then, so that whoever finishes need not read them again.
"""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import types
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import (
  array_record_module,  # pyright: ignore[reportAttributeAccessIssue]  (compiled)
)
from etils import epath
from jaxtyping import Float

from pixsigma_jax import disk, metadata
from pixsigma_jax.data import records
from pixsigma_jax.data.records import (
  CAPTION_KINDS,
  FORMAT_VERSION,
  INDEX,
  MANIFEST,
  NULL_CAPTION,
  OWN_FILES,
  SHARD,
  Features,
  Manifest,
  Record,
  Shard,
)

_SPLIT = "train"
_SHARD_TEMPLATE = "{DATASET}-{SPLIT}-{SHARD_INDEX}.{FILEFORMAT}"  # tfds' words
UNFINISHED = "unfinished.json"  # what is being written here; gone when it is finished


class Unfinished:
  """A dataset of which some shards may be there already; `begin_dataset` opens it."""

  def __init__(
    self,
    directory: pathlib.Path,
    features: Features,
    null_caption: Float[np.ndarray, "t e"] | None,
    num_shards: int,
  ):
    self.directory, self.features = directory, features
    self._null_caption, self.num_shards = null_caption, num_shards

  def missing(self) -> list[int]:
    """Numbers of the shards that are not there yet."""
    there = {
      int(match[1]) for match in map(SHARD.fullmatch, _names(self.directory)) if match
    }
    return [number for number in range(self.num_shards) if number not in there]

  @contextlib.contextmanager
  def shard(self, number: int) -> Iterator["ShardWriter"]:
    """A writer of one shard, which appears whole when the block ends, or not at all."""
    writer = ShardWriter(self.directory, number, self.features)
    try:
      yield writer
      writer.close()
    finally:
      writer.abandon()

  def finish(self) -> None:
    """Makes a dataset of the shards, if nobody else has.

    Raises:
      ValueError: a shard is missing, or all of them are empty.
      OSError: a file cannot be written.
    """
    if missing := self.missing():
      raise ValueError(
        f"{self.directory} cannot be finished: {len(missing)} of {self.num_shards} "
        f"shards are missing, the first is {missing[0]}."
      )
    try:
      _finish(self.directory, self.features, self._null_caption, self.num_shards)
    except FileNotFoundError:
      if not (self.directory / MANIFEST).exists():  # another process was faster
        raise


def begin_dataset(
  directory: str | os.PathLike[str],
  features: Features,
  null_caption: Float[np.ndarray, "t e"] | None,
  num_shards: int,
) -> Unfinished:
  """Opens a directory for the shards of a dataset, new or begun by the same job before.

  Any number of processes may do so at once; which of them writes which shard is theirs
  to arrange.

  Args:
    directory: new, empty, or begun with the same arguments.
    features: what the records will hold.
    null_caption: embedding of the empty caption; None if captions are stored as text.
    num_shards: how many there will be.

  Raises:
    FileExistsError: the directory holds a finished dataset, another unfinished one, or
      files of someone else.
    ValueError: the null caption does not fit the features.
  """
  _check_null_caption(null_caption, features)
  directory = pathlib.Path(directory)
  _refuse_finished_or_foreign(directory)
  job = {
    "features": dataclasses.asdict(features),
    "null_caption_crc32": None if null_caption is None else records.crc32(null_caption),
    "num_shards": num_shards,
  }
  job = json.loads(json.dumps(job))  # as it will be read
  path = directory / UNFINISHED
  disk.remove_abandoned(directory)
  if path.exists():
    lines = metadata.disagreements(json.loads(path.read_text()), job)
    if lines:
      raise FileExistsError(
        f"{directory} was begun with other arguments (then → now): {'; '.join(lines)}. "
        "Give the same ones to go on, or choose a new directory."
      )
  else:
    if foreign := next(iter(disk.whole_files(directory)), None):
      raise FileExistsError(
        f"{directory} holds {foreign} and does not say what it is part of: delete it, "
        "or choose a new directory."
      )
    text = json.dumps(job, indent=2, sort_keys=True)
    _write_whole(path, lambda file: file.write(text.encode()))
  return Unfinished(directory, features, null_caption, num_shards)


class RecordWriter:
  """Streams records into a directory from one process; used as a context manager.

  If the block ends in an exception there is no manifest, and the next writer into the
  directory starts over.

  Args:
    directory: new, empty, or left behind by an interrupted writer.
    features: what the records hold.
    null_caption: embedding of the empty caption; None if captions are stored as text.
    shard_bytes: a shard is closed when its records have reached this size.

  Raises:
    FileExistsError: the directory holds a finished dataset, or files of someone else.
    ValueError: a record or an argument is wrong (the message names the record).
    OSError: a shard cannot be written, for example because the disk is full.
  """

  def __init__(
    self,
    directory: str | os.PathLike[str],
    features: Features,
    null_caption: Float[np.ndarray, "t e"] | None,
    shard_bytes: int = 1 << 30,
  ):
    _check_null_caption(null_caption, features)
    self._directory = pathlib.Path(directory)
    self._features, self._null_caption = features, null_caption
    self._shard_bytes = shard_bytes
    self._num_shards = 0
    self._shard: ShardWriter | None = None
    _refuse_finished_or_foreign(self._directory)
    for name in _names(self._directory):
      (self._directory / name).unlink()

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
        self._close_shard()
        _finish(self._directory, self._features, self._null_caption, self._num_shards)
    finally:
      if self._shard is not None:
        self._shard.abandon()

  def write(self, record: Record) -> None:
    """Appends one record.

    Raises:
      ValueError: a field has a wrong shape, type or value.
      OSError: the shard cannot be written.
    """
    if self._shard is None:
      self._shard = ShardWriter(self._directory, self._num_shards, self._features)
    self._shard.write(record)
    if self._shard.num_bytes >= self._shard_bytes:
      self._close_shard()

  def _close_shard(self) -> None:
    if self._shard is not None:
      self._shard.close()
      self._shard = None
      self._num_shards += 1


class ShardWriter:
  """One shard under a temporary name, until it is whole."""

  def __init__(self, directory: pathlib.Path, number: int, features: Features):
    self.num_bytes = 0  # of the records so far
    self._features = features
    self._path = directory / f"records-{_SPLIT}-{number:05d}.array_record"
    self._partial = disk.partial_path(self._path)
    self._known: dict[str, list[Any]] = collections.defaultdict(list)
    self._crc32 = 0
    # Grain wants one record a chunk; float16 features do not compress.
    options = "group_size:1,uncompressed"
    with _writing(self._partial):
      self._writer = array_record_module.ArrayRecordWriter(str(self._partial), options)

  def write(self, record: Record) -> None:
    """Appends one record; the errors are those of `RecordWriter.write`."""
    if problem := records.problem(record, self._features):
      raise ValueError(f"Record {record.id!r}: {problem}")
    data = records.encode(record, self._features)
    with _writing(self._partial):
      self._writer.write(data)
    self.num_bytes += len(data)
    self._crc32 = zlib.crc32(data, self._crc32)
    known = self._known
    known["latent_size"].append(getattr(record, self._features.kind).shape[:2])
    known["original_size"].append(record.original_size.tolist())
    known["aesthetic_score"].append(record.aesthetic_score)
    known["id_hash"].append(records.id_hash(record.id))
    known["num_captions"].append(len(record.captions))
    known["caption_lengths"] += record.caption_lengths.tolist()
    known["caption_kinds"] += map(CAPTION_KINDS.index, record.caption_kinds)

  def close(self) -> None:
    """Gives the shard its name, with what is known of its records beside it."""
    known = self._known
    about = {
      "latent_size": np.array(known["latent_size"], np.int32).reshape(-1, 2),
      "original_size": np.array(known["original_size"], np.int32).reshape(-1, 2),
      "aesthetic_score": np.array(known["aesthetic_score"], np.float32),
      "id_hash": np.array(known["id_hash"], np.uint64),
      "num_captions": np.array(known["num_captions"], np.int32),
      "caption_lengths": np.array(known["caption_lengths"], np.int32),
      "caption_kinds": np.array(known["caption_kinds"], np.uint8),
      "bytes": np.int64(self.num_bytes),
      "crc32": np.uint32(self._crc32),
    }
    with _writing(self._partial):
      self._writer.close()
      # The shard last: where it is, what is known of it is too.
      _write_whole(_index_of(self._path), lambda file: _savez(file, about))
      disk.publish(self._partial, self._path)

  def abandon(self) -> None:
    """Leaves nothing behind of a shard that was not closed."""
    if hasattr(self, "_writer"):
      del self._writer  # closed, it would raise again what ended the block
    self._partial.unlink(missing_ok=True)


def _finish(
  directory: pathlib.Path,
  features: Features,
  null_caption: np.ndarray | None,
  num_shards: int,
) -> None:
  """Writes all that a dataset has beside its shards, the manifest last."""
  shards, parts = [], []
  for number in range(num_shards):
    path = directory / f"records-{_SPLIT}-{number:05d}.array_record"
    with np.load(_index_of(path)) as arrays:
      part = dict(arrays)
    count, checksum = len(part["latent_size"]), int(part.pop("crc32"))
    num_bytes = int(part.pop("bytes"))
    shards.append((Shard(path.name, count, path.stat().st_size, checksum), num_bytes))
    parts.append(part)
  if not any(shard.records for shard, _ in shards):
    raise ValueError(f"No record was written into {directory}.")
  _write_tfds_metadata(directory, features, shards)
  index = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
  _write_whole(directory / INDEX, lambda file: _savez(file, index))
  if null_caption is not None:
    _write_whole(directory / NULL_CAPTION, lambda file: np.save(file, null_caption))
  sizes = collections.Counter(map(tuple, index["latent_size"].tolist()))
  manifest = Manifest(
    format_version=FORMAT_VERSION,
    null_caption_crc32=None if null_caption is None else records.crc32(null_caption),
    longest_caption=int(index["caption_lengths"].max()),
    latent_sizes=tuple((h, w, count) for (h, w), count in sorted(sizes.items())),
    num_records=len(index["latent_size"]),
    num_bytes=sum(num_bytes for _, num_bytes in shards),
    shards=tuple(shard for shard, _ in shards),
    **dataclasses.asdict(features),
  )
  about = dataclasses.asdict(manifest)
  if not features.license:
    del about["license"]  # fingerprints of datasets stay those of earlier versions
  text = json.dumps(about, indent=2, sort_keys=True) + "\n"
  _write_whole(directory / MANIFEST, lambda file: file.write(text.encode()))
  for name in _names(directory):
    if name == UNFINISHED or name.endswith(".index.npz"):
      (directory / name).unlink(missing_ok=True)
  disk.remove_abandoned(directory)


def _write_tfds_metadata(
  directory: pathlib.Path, features: Features, shards: list[tuple[Shard, int]]
) -> None:
  template = tfds.core.ShardedFileTemplate(
    data_dir=epath.Path(directory),
    dataset_name="records",
    split=_SPLIT,
    filetype_suffix="array_record",
    template=_SHARD_TEMPLATE,
  )
  split = tfds.core.SplitInfo(
    name=_SPLIT,
    shard_lengths=[shard.records for shard, _ in shards],
    num_bytes=sum(num_bytes for _, num_bytes in shards),
    filename_template=template,
  )
  with _writing(directory):
    tfds.folder_dataset.write_metadata(
      data_dir=directory,
      features=tfds_features(features),
      split_infos=[split],
      filename_template=template,
      description="Image latents and caption embeddings for pixsigma_jax.",
      homepage=None,
      supervised_keys=None,
      check_data=False,  # the check reads through TensorFlow
    )
    for name in ("dataset_info.json", "features.json"):
      disk.sync(directory / name)


def tfds_features(features: Features) -> Any:
  """The schema of a record in tfds' words; `records.encode` writes its wire format."""
  text, tensor, kind = tfds.features.Text, tfds.features.Tensor, features.kind
  channels = features.channels * (2 if kind == "latent_moments" else 1)
  schema: dict[str, Any] = {
    "id": text(),
    kind: tensor(shape=(None, None, channels), dtype=np.float16, encoding="bytes"),
    "captions": tfds.features.Sequence(text()),
    "caption_kinds": tfds.features.Sequence(text()),
    "caption_lengths": tensor(shape=(None,), dtype=np.int32),
    "original_size": tensor(shape=(2,), dtype=np.int32),
    "crop": tensor(shape=(4,), dtype=np.float32),
    "aesthetic_score": tensor(shape=(), dtype=np.float32),
  }
  if features.license:
    schema["license"] = text()
  if features.caption_storage == "embeddings":
    schema["caption_embeddings"] = tensor(
      shape=(None, features.caption_width), dtype=np.float16, encoding="bytes"
    )
  return tfds.features.FeaturesDict(schema)


def _check_null_caption(null_caption: np.ndarray | None, features: Features) -> None:
  if (null_caption is not None) != (features.caption_storage == "embeddings"):
    raise ValueError(
      f"Captions are stored as {features.caption_storage}: with embeddings goes the "
      "null caption's, with text none."
    )
  if null_caption is None:
    return
  wanted = (features.caption_length, features.caption_width)
  if null_caption.shape != wanted:
    raise ValueError(
      f"The null caption is {list(null_caption.shape)}, and captions have up to "
      f"{wanted[0]} tokens of width {wanted[1]}."
    )
  if not np.isfinite(null_caption).all():
    raise ValueError("The null caption holds values that are not finite.")


def _refuse_finished_or_foreign(directory: pathlib.Path) -> None:
  if (directory / MANIFEST).exists():
    raise FileExistsError(
      f"{directory} already holds a finished dataset. Use it as it is, choose another "
      "directory, or delete it first."
    )
  directory.mkdir(parents=True, exist_ok=True)
  for name in sorted(_names(directory)):
    if not OWN_FILES.fullmatch(name):
      raise FileExistsError(
        f"{directory} holds {name}, which is no part of a dataset. Choose a new or an "
        "empty directory."
      )


def _names(directory: pathlib.Path) -> list[str]:
  return [path.name for path in directory.iterdir()]


def _index_of(shard: pathlib.Path) -> pathlib.Path:
  return shard.with_suffix(".index.npz")


def _write_whole(path: pathlib.Path, write: Callable[[Any], Any]) -> None:
  """Lets `path` appear on disk complete or not at all; `write` takes an open file."""

  def fill(partial: pathlib.Path) -> None:
    with open(partial, "wb") as file:
      write(file)

  with _writing(path):
    disk.write_whole(path, fill)


def _savez(file: Any, arrays: Mapping[str, np.ndarray | np.generic]) -> None:
  np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]  (a name of NumPy's)


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except (OSError, RuntimeError) as error:  # ArrayRecord raises RuntimeError
    # Whoever finishes a dataset tells a file that is gone from all else.
    kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
    raise kind(
      f"Cannot write {path}: {error}. {disk.way_out(path.parent, '--output')}, and run "
      "the command again."
    ) from error
