"""A dataset written by many: in any order, any number of times, by anyone."""

import dataclasses
import json
import os
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from pixsigma_jax.data import writing
from pixsigma_jax.data.records import Features, Record, open_dataset
from pixsigma_jax.data.writing import RecordWriter, begin_dataset

FEATURES = Features(
  kind="latents",
  channels=3,
  resolution=4,
  autoencoder={"name": "pixels"},
  scaling_factor=0.5,
  text_encoder={"name": "words"},
  caption_storage="embeddings",
  caption_length=5,
  caption_width=6,
  crop_rule={"name": "none"},
  hashes={"autoencoder": "00ff"},
)
AS_TEXT = dataclasses.replace(FEATURES, caption_storage="text")
NULL_CAPTION = np.ones((5, 6), np.float32)
SHARDS = [range(3), range(3, 4), range(4, 9)]


def make_record(number, stored=True):
  rng = np.random.default_rng(number)
  return Record(
    id=f"image/{number}",
    captions=("a red seven",),
    caption_kinds=("short",),
    caption_lengths=np.array([3], np.int32),
    caption_embeddings=rng.normal(size=(3, 6)).astype(np.float16) if stored else None,
    original_size=np.array([20, 30], np.int32),
    crop=np.array([0, 5, 20, 25], np.float32),
    latents=rng.normal(size=(2, 2, 3)).astype(np.float16),
  )


def begin(directory, features=FEATURES, null_caption=NULL_CAPTION, num_shards=3):
  return begin_dataset(directory, features, null_caption, num_shards)


def write_shard(job, number, stored=True):
  with job.shard(number) as shard:
    for name in SHARDS[number]:
      shard.write(make_record(name, stored))


def content(directory):
  return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_order_of_the_shards_and_who_writes_them_changes_no_byte(tmp_path):
  for directory, order in [("a", (0, 1, 2)), ("b", (2, 0, 1))]:
    for number in order:
      write_shard(begin(tmp_path / directory), number)  # each a process of its own
    begin(tmp_path / directory).finish()
  assert content(tmp_path / "a") == content(tmp_path / "b")
  dataset = open_dataset(tmp_path / "a")
  assert [dataset[i].id for i in range(9)] == [f"image/{i}" for i in range(9)]


def test_one_writer_and_many_write_the_same_dataset(tmp_path):
  job = begin(tmp_path / "many", num_shards=1)
  with (
    job.shard(0) as shard,
    RecordWriter(tmp_path / "one", FEATURES, NULL_CAPTION) as writer,
  ):
    for number in range(4):
      shard.write(make_record(number))
      writer.write(make_record(number))
  job.finish()
  assert content(tmp_path / "many") == content(tmp_path / "one")


def test_what_is_missing_is_known_after_a_restart(tmp_path):
  write_shard(begin(tmp_path), 1)
  with (
    pytest.raises(ValueError, match="Record 'image/4'"),
    begin(tmp_path).shard(2) as shard,
  ):
    shard.write(make_record(4, stored=False))
  job = begin(tmp_path)
  assert job.missing() == [0, 2]
  with pytest.raises(ValueError, match="2 of 3 shards are missing, the first is 0"):
    job.finish()
  with pytest.raises(FileNotFoundError, match="unfinished dataset"):
    open_dataset(tmp_path)


def test_two_that_write_the_same_shard_and_both_finish_do_no_harm(tmp_path):
  one, other = begin(tmp_path), begin(tmp_path)
  for number in (0, 1):
    write_shard(one, number)
  with one.shard(2) as shard:
    shard.write(make_record(4))
    write_shard(other, 2)
    for number in SHARDS[2][1:]:
      shard.write(make_record(number))
  one.finish()
  before = content(tmp_path)
  other.finish()
  assert content(tmp_path) == before
  assert len(open_dataset(tmp_path)) == 9
  assert not list(tmp_path.glob("*.partial"))


def test_a_shard_without_records_is_no_gap(tmp_path):
  job = begin(tmp_path, num_shards=3)
  write_shard(job, 0)
  with job.shard(1):
    pass  # every image of it was refused
  write_shard(job, 2)
  job.finish()
  dataset = open_dataset(tmp_path)
  names = [f"image/{i}" for i in (*SHARDS[0], *SHARDS[2])]
  assert [dataset[i].id for i in range(len(dataset))] == names
  source = tfds.builder_from_directory(tmp_path).as_data_source("train")
  assert [source[i]["id"].decode() for i in range(len(source))] == names


def test_captions_may_be_text_alone(tmp_path):
  job = begin(tmp_path, AS_TEXT, None)
  for number in range(3):
    write_shard(job, number, stored=False)
  job.finish()
  dataset = open_dataset(tmp_path)
  assert dataset.null_caption is None
  assert dataset[0].caption_embeddings is None
  assert dataset[0].captions == ("a red seven",)
  assert dataset.manifest.longest_caption == 3
  assert dataset.manifest.features == AS_TEXT
  source = tfds.builder_from_directory(tmp_path).as_data_source("train")
  assert "caption_embeddings" not in source[0]


def test_another_job_in_the_same_place_is_refused(tmp_path):
  begin(tmp_path)
  with pytest.raises(FileExistsError, match=r"begun with other .*resolution: 4 → 8"):
    begin(tmp_path, dataclasses.replace(FEATURES, resolution=8))
  with pytest.raises(FileExistsError, match=r"null_caption_crc32: \d+ → \d+"):
    begin(tmp_path, null_caption=2 * NULL_CAPTION)
  with pytest.raises(FileExistsError, match="num_shards: 3 → 4"):
    begin(tmp_path, num_shards=4)
  write_shard(begin(tmp_path), 0)  # the same one goes on
  (tmp_path / "unfinished.json").unlink()
  with pytest.raises(FileExistsError, match=r"records-train-00000.* part of"):
    begin(tmp_path)


def test_where_a_shard_is_there_what_is_known_of_it_is_too(tmp_path, monkeypatch):
  def full(*_):
    raise OSError("No space left on device")

  monkeypatch.setattr(writing, "_savez", full)
  with pytest.raises(OSError, match="No space left"):
    write_shard(begin(tmp_path), 0)
  assert begin(tmp_path).missing() == [0, 1, 2]


def test_what_a_kill_has_left_half_written_is_in_nobodys_way(tmp_path):
  half = tmp_path / "unfinished.json.0a1b2c3d.partial"
  half.write_text("{")
  os.utime(half, (0, 0))  # by whom is not known: gone when it is old
  write_shard(begin(tmp_path, num_shards=1), 0)
  begin(tmp_path, num_shards=1).finish()
  assert not list(tmp_path.glob("*.partial"))


def test_a_null_caption_goes_with_embeddings_and_only_with_them(tmp_path):
  with pytest.raises(ValueError, match=r"stored as embeddings: .*null caption"):
    begin(tmp_path, null_caption=None)
  with pytest.raises(ValueError, match=r"stored as text: .*with text none"):
    begin(tmp_path, AS_TEXT)
  with pytest.raises(ValueError, match=r"is \[4, 6\], .* up to 5 tokens of width 6"):
    begin(tmp_path, null_caption=NULL_CAPTION[:4])


def test_what_json_cannot_hold_fails_before_anything_is_written():
  with pytest.raises(TypeError, match="not JSON serializable"):
    dataclasses.replace(FEATURES, crop_rule={"name": object()})


def test_the_holdout_of_an_image_is_a_function_of_its_id_alone(tmp_path):
  indexes = []
  for directory, numbers in [("a", range(9)), ("b", [7, 2])]:
    with RecordWriter(tmp_path / directory, FEATURES, NULL_CAPTION) as writer:
      for number in numbers:
        writer.write(make_record(number))
    indexes.append(open_dataset(tmp_path / directory).index["id_hash"])
  assert indexes[0].dtype == np.uint64
  assert len(set(indexes[0].tolist())) == 9
  assert indexes[1].tolist() == indexes[0][[7, 2]].tolist()


def test_the_manifest_is_plain_json(tmp_path):
  with RecordWriter(tmp_path, FEATURES, NULL_CAPTION) as writer:
    writer.write(make_record(0))
  fields = json.loads((tmp_path / "manifest.json").read_text())
  assert fields["hashes"] == {"autoencoder": "00ff"}
  assert fields["caption_storage"] == "embeddings"


def test_two_and_a_half_gigabytes_are_one_shard_and_need_no_tensorflow(tmp_path):
  # tfds' own writer ends at 1000 MiB, and 2³¹ is where 32-bit offsets do.
  side, count = 2048, 100  # 25 MB each
  latents = np.zeros((side, side, 3), np.float16)
  with RecordWriter(tmp_path, FEATURES, NULL_CAPTION, shard_bytes=1 << 40) as writer:
    for number in range(count):
      latents[number, number] = number + 1
      writer.write(dataclasses.replace(make_record(number), latents=latents))
  dataset = open_dataset(tmp_path)
  [shard] = dataset.manifest.shards
  assert shard.bytes > 2.5e9
  source = tfds.builder_from_directory(tmp_path).as_data_source("train")
  for number in (0, 50, 99):
    for read in (dataset[number].latents, source[number]["latents"]):
      assert read[number, number, 0] == number + 1
      assert not read[number + 1 :].any()
  assert "tensorflow" not in sys.modules
  shutil.rmtree(tmp_path)  # pytest would keep it for a while


def test_a_directory_that_is_gone_is_not_said_to_be_full(tmp_path):
  directory = tmp_path / "data"
  gone = pytest.raises(FileNotFoundError, match=r"data is not there \(any more\)")
  with gone, writing._writing(directory / "records-train-00000.array_record"):
    (directory / "a").write_text("")
