"""The stored record: what was written comes back, and damage does not pass for data."""

import dataclasses
import functools
import io
import json
import os
import pathlib
import resource
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from pixsigma_jax.data import records, writing
from pixsigma_jax.data.records import Features, Record, open_dataset
from pixsigma_jax.data.writing import RecordWriter

WIDTH, LENGTH, CHANNELS = 6, 5, 3
SIZES = [(2, 4), (4, 2), (4, 4)]


def make_record(number, kind="latents"):
  rng = np.random.default_rng(number)
  count = number % 3 + 1
  lengths = rng.integers(1, LENGTH + 1, count).astype(np.int32)
  h, w = SIZES[number % len(SIZES)]
  channels = CHANNELS * (2 if kind == "latent_moments" else 1)
  return Record(
    id=f"träger/{number}",
    captions=tuple(f"eine rote 七, caption {i}" for i in range(count)),
    caption_kinds=("long", "short", "long")[:count],
    caption_lengths=lengths,
    caption_embeddings=rng.normal(size=(lengths.sum(), WIDTH)).astype(np.float16),
    original_size=np.array([10 * h, 10 * w], np.int32),
    crop=np.array([0.25, 0, 10 * h - 0.25, 10 * w], np.float32),
    aesthetic_score=number / 4,
    **{kind: rng.normal(size=(h, w, channels)).astype(np.float16)},
  )


NULL_CAPTION = np.arange(LENGTH * WIDTH, dtype=np.float32).reshape(LENGTH, WIDTH)


def features(**changes):
  fields = {
    "kind": "latents",
    "channels": CHANNELS,
    "resolution": 4,
    "autoencoder": {"name": "pixels", "version": 1},
    "scaling_factor": 0.5,
    "text_encoder": {"name": "hashed-words", "width": WIDTH},
    "caption_storage": "embeddings",
    "caption_length": LENGTH,
    "caption_width": WIDTH,
    "crop_rule": {"name": "none"},
    "hashes": {"autoencoder": "00ff"},
  }
  return Features(**fields | changes)


def writer(directory, shard_bytes=1500, **changes):
  return RecordWriter(directory, features(**changes), NULL_CAPTION, shard_bytes)


def write(directory, made=None, **changes):
  kind = changes.get("kind", "latents")
  with writer(directory, **changes) as file:
    for record in made or (make_record(number, kind) for number in range(12)):
      file.write(record)
  return directory


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  return write(tmp_path_factory.mktemp("records") / "dataset")


@pytest.fixture
def directory(finished, tmp_path):
  """A copy of a finished dataset, to be damaged."""
  return shutil.copytree(finished, tmp_path / "copy")


def assert_equal(record, expected):
  for field in dataclasses.fields(Record):
    value, wanted = getattr(record, field.name), getattr(expected, field.name)
    if isinstance(wanted, np.ndarray):
      assert value.dtype == wanted.dtype, field.name
      np.testing.assert_array_equal(value, wanted, err_msg=field.name)
    else:
      assert value == wanted, field.name


@pytest.mark.parametrize("kind", ["latents", "latent_moments"])
def test_what_was_written_comes_back_exactly(tmp_path, kind):
  dataset = open_dataset(write(tmp_path, kind=kind))
  assert len(dataset.manifest.shards) > 2
  assert len(dataset) == 12
  for number, record in enumerate(dataset):
    assert_equal(record, make_record(number, kind))


def test_records_come_in_the_order_they_were_asked_for(finished):
  numbers = [11, 0, 5, 0, 7]
  for number, record in zip(numbers, open_dataset(finished).read(numbers), strict=True):
    assert_equal(record, make_record(number))
  assert_equal(open_dataset(finished)[np.int32(7)], make_record(7))
  for number in (12, -1):
    with pytest.raises(IndexError, match=f"has 12 records, there is no {number}"):
      open_dataset(finished).read([3, number])


@pytest.mark.parametrize("kind", ["latents", "latent_moments"])
def test_tfds_reads_the_shards_without_tensorflow(tmp_path, kind):
  made = [make_record(number, kind) for number in range(11)]
  shards = open_dataset(write(tmp_path, made, kind=kind)).manifest.shards
  assert len({shard.records for shard in shards}) > 1  # lengths that tell shards apart
  source = tfds.builder_from_directory(tmp_path).as_data_source("train")
  assert len(source) == 11
  for number in range(11):
    read, expected = source[number], dataclasses.asdict(make_record(number, kind))
    assert read["id"].decode() == expected["id"]
    for name in ("captions", "caption_kinds"):
      assert [text.decode() for text in read[name]] == list(expected[name])
    assert read["aesthetic_score"] == expected["aesthetic_score"]
    arrays = ("caption_lengths", "caption_embeddings", "original_size", "crop")
    for name in (kind, *arrays):
      assert read[name].dtype == expected[name].dtype, name
      np.testing.assert_array_equal(read[name], expected[name], err_msg=name)
  assert "tensorflow" not in sys.modules


def test_a_record_is_what_tfds_would_have_written():
  record = make_record(2)
  fields = dataclasses.asdict(record)
  del fields["latent_moments"], fields["license"]
  theirs = writing.tfds_features(features()).serialize_example(
    {name: list(x) if isinstance(x, tuple) else x for name, x in fields.items()}
  )
  parse = tf_example_pb2.Example.FromString
  assert parse(records.encode(record, features())) == parse(theirs)
  assert_equal(records.decode(theirs, features()), record)


def test_the_license_of_works_of_others_goes_with_every_record(tmp_path):
  free = dataclasses.replace(make_record(0), license="CC BY 4.0, Somebody")
  dataset = open_dataset(write(tmp_path, [free], license=free.license))
  assert_equal(dataset[0], free)
  assert dataset.manifest.license == free.license
  source = tfds.builder_from_directory(tmp_path).as_data_source("train")
  assert source[0]["license"].decode() == free.license


@pytest.mark.parametrize("license", ["", "CC BY 4.0, Somebody"])
def test_a_record_of_another_license_than_its_datasets_is_refused(tmp_path, license):
  other = dataclasses.replace(make_record(0), license="all rights reserved")
  with pytest.raises(ValueError, match="its license is 'all rights reserved'"):
    write(tmp_path, [other], license=license)


def test_a_record_is_the_same_bytes_in_every_process():
  # Protobuf's own order of a map differs from process to process.
  data = records.encode(make_record(2), features())
  names = [b"captions", b"caption_lengths", b"id", b"latents/shape", b"original_size"]
  places = [data.index(name) for name in sorted(names)]
  assert places == sorted(places)


def test_the_manifest_tells_all_that_a_trainer_checks(finished):
  manifest = open_dataset(finished).manifest
  assert manifest.kind == "latents"
  assert (manifest.channels, manifest.resolution, manifest.caption_width) == (3, 4, 6)
  assert manifest.scaling_factor == 0.5
  assert manifest.autoencoder == {"name": "pixels", "version": 1}
  assert manifest.text_encoder == {"name": "hashed-words", "width": WIDTH}
  assert manifest.latent_sizes == ((2, 4, 4), (4, 2, 4), (4, 4, 4))
  assert manifest.longest_caption == max(
    make_record(number).caption_lengths.max() for number in range(12)
  )
  assert manifest.longest_sequence(patch_size=2) == 4
  assert sum(shard.records for shard in manifest.shards) == manifest.num_records == 12
  for shard in manifest.shards:
    assert shard.bytes == (finished / shard.file).stat().st_size


def test_the_index_knows_sizes_and_captions_of_every_record(finished):
  index = open_dataset(finished).index
  made = [make_record(number) for number in range(12)]
  assert index["latent_size"].tolist() == [[*x.latents.shape[:2]] for x in made]
  assert index["num_captions"].tolist() == [len(x.captions) for x in made]
  lengths = np.concatenate([x.caption_lengths for x in made])
  np.testing.assert_array_equal(index["caption_lengths"], lengths)
  kinds = [records.CAPTION_KINDS[kind] for kind in index["caption_kinds"]]
  assert kinds == [kind for x in made for kind in x.caption_kinds]


def test_the_null_caption_comes_back_exactly(finished):
  null_caption = open_dataset(finished).null_caption
  assert null_caption.dtype == np.float32
  np.testing.assert_array_equal(
    null_caption, np.arange(LENGTH * WIDTH).reshape(LENGTH, WIDTH)
  )


def test_the_fingerprint_is_of_the_content(finished, tmp_path):
  fingerprint = open_dataset(finished).fingerprint
  assert open_dataset(write(tmp_path / "again")).fingerprint == fingerprint
  for number in range(3):
    made = [make_record(number) for number in range(12)]
    latents = made[number].latents + np.float16(1)  # as many bytes, other values
    made[number] = dataclasses.replace(made[number], latents=latents)
    other = open_dataset(write(tmp_path / str(number), made))
    assert other.fingerprint != fingerprint


# --- what cannot be written


def with_changes(**changes):
  return dataclasses.replace(make_record(2), **changes)


OVERFLOWN = np.full((4, 4, CHANNELS), np.inf, np.float16)
REFUSED = {
  "latents is float32 .*expected float16": {"latents": np.zeros((4, 4, 3), np.float32)},
  r"latents is float16 \[4, 4, 4\], expected float16 \[any, any, 3\]": {
    "latents": np.zeros((4, 4, 4), np.float16)
  },
  "latents is empty": {"latents": np.zeros((0, 4, 3), np.float16)},
  "latents holds values that are not finite": {"latents": OVERFLOWN},
  "takes latents and no latent_moments": {
    "latent_moments": np.zeros((4, 4, 6), np.float16)
  },
  r"caption_lengths is int32 \[2\], expected int32 \[3\]": {
    "caption_lengths": np.ones(2, np.int32)
  },
  "3 captions need as many caption_kinds, got 1": {"caption_kinds": ("long",)},
  "caption kind 'medium' is none of long, short": {
    "caption_kinds": ("long", "medium", "short")
  },
  "caption_lengths add up to 3 tokens, caption_embeddings hold": {
    "caption_lengths": np.ones(3, np.int32)
  },
  "has 6 tokens, expected 1 to 5": {"caption_lengths": np.array([1, 6, 1], np.int32)},
  r"original_size \[0, 40\] must be positive": {
    "original_size": np.array([0, 40], np.int32)
  },
  r"the text 'a \\ud83d' holds half a character": {
    "captions": ("a \ud83d", "b", "c"),
  },
  r"crop \[0.0, 0.0, 40.0, 41.0\] is no part of an image of 40x40 pixels": {
    "crop": np.array([0, 0, 40, 41], np.float32)
  },
  "the dataset takes caption_embeddings, and there are no": {
    "caption_embeddings": None
  },
}


def test_a_record_may_be_changed_once_it_is_written(tmp_path):
  record, expected = make_record(2), make_record(2)
  with writer(tmp_path) as file:
    file.write(record)
    record.caption_lengths[:] = 0  # an encoder that reuses its buffers
    record.latents[:] = 0
  dataset = open_dataset(tmp_path)
  assert_equal(dataset[0], expected)
  assert dataset.index["caption_lengths"].tolist() == expected.caption_lengths.tolist()


def test_a_file_has_its_name_only_when_it_is_on_disk(tmp_path, monkeypatch):
  synced, named = set(), []
  fsync, rename = os.fsync, pathlib.Path.rename

  def watch_fsync(descriptor):
    synced.add(os.fstat(descriptor).st_ino)
    fsync(descriptor)

  def watch_rename(path, target):
    assert path.stat().st_ino in synced, path
    synced.discard(tmp_path.stat().st_ino)  # the new name must be synced as well
    named.append(target.name)
    return rename(path, target)

  monkeypatch.setattr(os, "fsync", watch_fsync)
  monkeypatch.setattr(pathlib.Path, "rename", watch_rename)
  write(tmp_path)
  assert {path.stat().st_ino for path in (tmp_path, *tmp_path.iterdir())} <= synced
  assert named[-1] == "manifest.json"
  assert "records-train-00000.array_record" in named


def test_the_manifest_comes_last(tmp_path, monkeypatch):
  def disk_full(**_):
    raise OSError("No space left on device")

  monkeypatch.setattr(tfds.folder_dataset, "write_metadata", disk_full)
  with pytest.raises(OSError, match=f"Cannot write {tmp_path}: No space left"):
    write(tmp_path)
  with pytest.raises(FileNotFoundError, match="unfinished dataset"):
    open_dataset(tmp_path)


@pytest.mark.parametrize("message", REFUSED)
def test_a_wrong_record_is_refused_by_name(tmp_path, message):
  with writer(tmp_path) as file:
    file.write(make_record(0))
    with pytest.raises(ValueError, match=f"Record 'träger/2': .*{message}"):
      file.write(with_changes(**REFUSED[message]))
  assert len(open_dataset(tmp_path)) == 1  # the refused one left nothing behind


def test_an_image_without_captions_is_refused(tmp_path):
  nothing = with_changes(
    captions=(), caption_kinds=(), caption_lengths=np.zeros(0, np.int32)
  )
  with (
    pytest.raises(ValueError, match="caption_lengths is empty"),
    writer(tmp_path) as file,
  ):
    file.write(nothing)


def test_an_empty_dataset_is_refused(tmp_path):
  with pytest.raises(ValueError, match="No record was written"), writer(tmp_path):
    pass


def test_a_finished_dataset_is_not_written_over(directory):
  with pytest.raises(FileExistsError, match="already holds a finished dataset"):
    writer(directory)
  assert len(open_dataset(directory)) == 12


def test_files_of_someone_else_are_not_touched(tmp_path):
  (tmp_path / "features.json").write_text("ours, by its name")
  (tmp_path / "thesis.tex").write_text("years of work")
  with pytest.raises(FileExistsError, match=r"holds thesis\.tex, which is no part"):
    writer(tmp_path)
  assert len(list(tmp_path.iterdir())) == 2


def test_an_interrupted_dataset_is_refused_and_can_be_written_again(tmp_path):
  def pressed_ctrl_c():
    yield from map(make_record, range(8))
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    write(tmp_path, pressed_ctrl_c())
  assert (tmp_path / "records-train-00000.array_record").exists()  # whole shards stay
  assert not list(tmp_path.glob("*.partial"))
  with pytest.raises(FileNotFoundError, match=r"unfinished dataset.*prepares it again"):
    open_dataset(tmp_path)
  write(tmp_path, [make_record(0), make_record(1)])
  assert len(open_dataset(tmp_path)) == 2


def test_a_killed_writer_leaves_an_unfinished_dataset(tmp_path):
  file = writer(tmp_path)
  file.write(make_record(0))  # and nothing after it, not even __exit__
  assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
  with pytest.raises(FileNotFoundError, match="unfinished dataset"):
    open_dataset(tmp_path)


def test_a_full_disk_is_reported_with_the_file(tmp_path):
  large = with_changes(latents=np.zeros((128, 128, CHANNELS), np.float16))
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    with pytest.raises(OSError, match=r"Cannot write .*00000\.array_record.*Make room"):
      write(tmp_path, [large] * 3, shard_bytes=1 << 30)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  with pytest.raises(FileNotFoundError, match="no dataset of records"):
    open_dataset(tmp_path)


# --- what cannot be read


def test_a_directory_that_is_no_dataset_is_told_apart(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no dataset at .*correct the path"):
    open_dataset(tmp_path / "typo")
  (tmp_path / "holiday.jpg").touch()
  with pytest.raises(FileNotFoundError, match=r"no dataset of records.*manifest\.json"):
    open_dataset(tmp_path)


def test_a_missing_shard_is_named(directory):
  (directory / "records-train-00001.array_record").unlink()
  with pytest.raises(FileNotFoundError, match=r"00001\.array_record is missing"):
    open_dataset(directory)


def test_a_truncated_shard_is_named(directory):
  shard = directory / "records-train-00001.array_record"
  shard.write_bytes(shard.read_bytes()[:-1])
  with pytest.raises(
    ValueError, match=r"00001\.array_record has .* bytes, .*truncated"
  ):
    open_dataset(directory)


def test_a_flipped_byte_never_passes_for_data(directory):
  """Wherever it is: the record comes back as it was, or an error names it."""
  dataset = open_dataset(directory)
  shard = directory / dataset.manifest.shards[1].file
  first = dataset.manifest.shards[0].records
  count = dataset.manifest.shards[1].records
  whole = shard.read_bytes()
  rng = np.random.default_rng(0)
  starts = np.flatnonzero(np.frombuffer(whole, np.uint8))  # blocks end in zeros
  named = 0
  for offset in rng.choice(starts, 30, replace=False):
    damaged = bytearray(whole)
    damaged[offset] ^= 1 << rng.integers(8)
    shard.write_bytes(damaged)
    records._open_shard.cache_clear()
    for position in range(count):
      try:
        assert_equal(dataset[first + position], make_record(first + position))
      except ValueError as error:
        named += shard.name in str(error) and "prepare the dataset again" in str(error)
  assert named >= 20
  records._open_shard.cache_clear()


def test_a_damaged_record_is_named_and_its_neighbours_are_read(directory):
  dataset = open_dataset(directory)
  shard = dataset.manifest.shards[1]
  first = dataset.manifest.shards[0].records
  latents = make_record(first + 1).latents.tobytes()
  path = directory / shard.file
  damaged = bytearray(path.read_bytes())
  damaged[damaged.index(latents) + 3] ^= 4
  path.write_bytes(damaged)
  message = rf"Record {first + 1} of .* \(record 1 of {shard.file}\).*hash mismatch"
  with pytest.raises(ValueError, match=message):
    dataset.read(range(12))
  for number in {*range(12)} - {first + 1}:
    assert_equal(dataset[number], make_record(number))


def test_a_shard_of_something_else_is_named(directory):
  """Sound by its hashes, of the right length, and no record of ours."""
  dataset = open_dataset(directory)
  shard = dataset.manifest.shards[0]
  path = directory / shard.file
  other = writing.array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for _ in range(shard.records):
    other.write(b"not a tf.train.Example")
  other.close()
  with pytest.raises(ValueError, match=rf"Record 2 of .*record 2 of {shard.file}"):
    dataset[2]
  path.write_bytes(bytes(shard.bytes))  # not even an ArrayRecord file
  records._open_shard.cache_clear()
  with pytest.raises(ValueError, match=f"{shard.file} is damaged: 0 records"):
    dataset[2]


def test_a_shard_that_may_not_be_read_is_not_called_damaged(directory, monkeypatch):
  dataset = open_dataset(directory)
  shard = dataset.manifest.shards[0]
  records._open_shard.cache_clear()

  def denied(self, *_):  # permissions do not stop root
    raise PermissionError(13, "Permission denied", str(self))

  with monkeypatch.context() as patch:
    patch.setattr(pathlib.Path, "open", denied)
    with pytest.raises(PermissionError, match=shard.file):
      dataset[0]

  class Gone:
    """ArrayRecord's reader where the file's server does not answer any more."""

    def read(self, _):
      raise RuntimeError("read() failed: Stale file handle; reading x; at byte 64")

  monkeypatch.setattr(records, "_open_shard", lambda *_: Gone())
  with pytest.raises(OSError, match=rf"{shard.file} could not be read: .*Stale file"):
    dataset[0]


def test_too_little_memory_is_no_damage(directory, monkeypatch):
  def decode(*_):
    raise MemoryError("Unable to allocate 3 GiB")

  monkeypatch.setattr(records, "decode", decode)
  with pytest.raises(MemoryError, match="3 GiB"):
    open_dataset(directory)[0]
  monkeypatch.setattr(records.np, "load", decode)
  with pytest.raises(MemoryError, match="3 GiB"):
    open_dataset(directory)


def test_whatever_byte_of_the_null_caption_is_damaged_it_is_named(directory):
  path = directory / "null_caption.npy"
  data, named, sound = path.read_bytes(), 0, 0
  for place in range(128):  # the header
    for bit in (1, 4, 32):
      changed = bytearray(data)
      changed[place] ^= bit
      path.write_bytes(changed)
      try:
        found = open_dataset(directory).null_caption
      except ValueError as error:
        named += "null_caption.npy" in str(error)
      else:  # a space of no consequence
        np.testing.assert_array_equal(found, np.load(io.BytesIO(data)))
        sound += 1
  assert named + sound == 3 * 128


@pytest.mark.parametrize("name", ["index.npz", "null_caption.npy"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_damaged_files_beside_the_shards_are_named(directory, name, damage):
  path = directory / name
  data = bytearray(path.read_bytes())
  data[len(data) * 3 // 4] ^= 1  # behind the header
  if damage == "missing":
    path.unlink()
  else:
    path.write_bytes(data if damage == "flipped" else data[: len(data) // 2])
  with pytest.raises(ValueError, match=f"{name} .*prepare the dataset again"):
    open_dataset(directory).index  # noqa: B018


def test_a_manifest_that_is_none_is_named(directory):
  path = directory / "manifest.json"
  fields = json.loads(path.read_text())

  def refused(text, message):
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
      open_dataset(directory)

  refused(json.dumps(fields | {"format_version": 99}), "has format version 99.*reads 1")
  refused(path.read_text()[:100], "no manifest of a dataset")
  refused("[]", "no manifest of a dataset")
  for name in fields.keys() - {"format_version"}:
    left = {key: value for key, value in fields.items() if key != name}
    refused(json.dumps(left), f"no manifest of a dataset.*{name}")
  shards = [{**fields["shards"][0], "file": "../../escaped.array_record"}]
  refused(json.dumps(fields | {"shards": shards}), "escaped.* no name of a shard")
  refused(json.dumps(fields | {"num_records": 13}), "shards and num_records disagree")


def test_a_dataset_of_more_shards_than_open_files_is_read(tmp_path, monkeypatch):
  open_shard = functools.lru_cache(maxsize=2)(records._open_shard.__wrapped__)
  monkeypatch.setattr(records, "_open_shard", open_shard)
  dataset = open_dataset(write(tmp_path, shard_bytes=1))
  assert len(dataset.manifest.shards) == 12
  open_files = pathlib.Path("/dev/fd")
  before = len(list(open_files.iterdir()))
  for number in (*range(12), *range(12)):
    assert_equal(dataset[number], make_record(number))
    assert len(list(open_files.iterdir())) <= before + 2
