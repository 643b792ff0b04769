"""Datasets read as one: their shares, holdouts, and what a damaged record does."""

import collections
import contextlib
import dataclasses
import itertools
import logging

import numpy as np
import pytest

from pixsigma_jax.data import mixture as mixtures
from pixsigma_jax.data import pipeline
from pixsigma_jax.data.mixture import open_mixture
from pixsigma_jax.data.records import Features, Record, open_dataset
from pixsigma_jax.data.writing import RecordWriter

FEATURES = Features(
  kind="latents",
  channels=2,
  resolution=8,
  autoencoder={"name": "pixels"},
  scaling_factor=1.0,
  text_encoder={"name": "words"},
  caption_storage="embeddings",
  caption_length=3,
  caption_width=4,
  crop_rule={"name": "none"},
  hashes={"autoencoder": "aa"},
)
SIZES = {"a": 60, "b": 40, "c": 300}


def make_record(name):
  seed = sum(map(ord, name))
  return Record(
    id=name,
    captions=(name,),
    caption_kinds=("long",),
    caption_lengths=np.array([1], np.int32),
    caption_embeddings=np.full((1, 4), seed % 1000, np.float16),
    original_size=np.array([8, 8], np.int32),
    crop=np.array([0, 0, 8, 8], np.float32),
    latents=np.random.default_rng(seed).normal(size=(4, 4, 2)).astype(np.float16),
  )


def write(directory, names, features=FEATURES, null=0.0):
  null_caption = np.full((features.caption_length, 4), null, np.float32)
  if features.caption_storage == "text":
    null_caption = None
  with RecordWriter(directory, features, null_caption, shard_bytes=2000) as writer:
    for name in names:
      record = make_record(name)
      if features.caption_storage == "text":
        record = dataclasses.replace(record, caption_embeddings=None)
      writer.write(record)
  return directory


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
  folder = tmp_path_factory.mktemp("mixture")
  return [
    write(folder / name, [f"{name}/{i}" for i in range(count)])
    for name, count in SIZES.items()
  ]


def read(paths, weights=(), holdout=0.0, split="train"):
  return open_mixture(paths, weights=weights, holdout=holdout, split=split)


def ids(mixture, count, start=0, seed=5):
  _, numbers = mixture.examples_at(np.arange(start, start + count), seed=seed)
  return [record.id for record in mixture.read(numbers)]


def first_batches(mixture, count=4, **changes):
  settings = {
    "batch_size": 8,
    "seed": 5,
    "start_example": 0,
    "patch_size": 2,
    "window": (1, 1),
    "caption_length": 3,
    "long_caption_ratio": 0.5,
    "process_index": 0,
    "process_count": 1,
    "num_threads": 0,
    "num_workers": 0,
    "damaged": "stop",
  }
  stream = pipeline.batches(mixture, **settings | changes)
  with contextlib.closing(stream):
    return list(itertools.islice(stream, count))


# Shares.


@pytest.mark.parametrize(
  ("weights", "expected"),
  [((), (0.15, 0.1, 0.75)), ((1, 1, 2), (0.25, 0.25, 0.5)), ((0.7, 5, 1.3), None)],
)
def test_every_block_of_the_stream_has_each_datasets_share(paths, weights, expected):
  mixture = read(paths, weights)
  expected = expected or np.array(weights) / sum(weights)
  block = mixtures._BLOCK
  _, numbers = mixture.examples_at(np.arange(2 * block), seed=1)
  which = np.searchsorted(np.cumsum(list(SIZES.values())), numbers, side="right")
  for part in which.reshape(2, block):
    counts = np.bincount(part, minlength=3)
    np.testing.assert_allclose(counts / block, expected, atol=1 / block)
  # Mixed throughout: any 1000 in a row come within four sigma.
  some = np.bincount(which[:1000], minlength=3) / 1000
  np.testing.assert_allclose(some, expected, atol=0.07)


def test_within_its_share_a_dataset_shows_each_record_once_an_epoch(paths):
  mixture = read(paths, (1, 1, 2))
  epochs, numbers = mixture.examples_at(np.arange(3 * mixtures._BLOCK), seed=2)
  shown = collections.Counter(zip(epochs.tolist(), numbers.tolist(), strict=True))
  assert set(shown.values()) == {1}
  # Of the first dataset 3 · 2¹⁴ examples: 819 whole epochs of 60 and 12 of the next. Of
  # the last 3 · 2¹⁵: 327 epochs of 300 and 204.
  keys = np.array(list(shown))
  first, last = keys[:, 1] < SIZES["a"], keys[:, 1] >= SIZES["a"] + SIZES["b"]
  assert np.bincount(keys[first, 0]).tolist() == [60] * 819 + [12]
  assert np.bincount(keys[last, 0]).tolist() == [300] * 327 + [204]


def test_a_mixture_of_one_is_the_dataset(paths):
  alone = read(paths[:1])
  assert alone.fingerprint == open_dataset(paths[0]).fingerprint
  assert sorted(ids(alone, 60)) == sorted(f"a/{i}" for i in range(60))


def test_datasets_of_a_mixture_are_not_in_step(paths):
  twins = read([paths[0], paths[0]])
  orders = [twins._in_dataset(i, np.arange(60), 0)[1] - 60 * i for i in range(2)]
  assert sorted(orders[0]) == sorted(orders[1]) == list(range(60))
  assert (orders[0] == orders[1]).mean() < 0.2


def test_the_stream_is_another_when_anything_that_decides_it_is(paths):
  prints = [
    read(paths).fingerprint,
    read(paths[::-1]).fingerprint,
    read(paths[:2]).fingerprint,
    read(paths, (1, 2, 3)).fingerprint,
    read(paths, holdout=0.2).fingerprint,
    read(paths, holdout=0.2, split="holdout").fingerprint,
    read(paths[:1]).fingerprint,
    read(paths[:1], holdout=0.2).fingerprint,
  ]
  assert len(set(prints)) == len(prints)
  stored = pipeline.position(read(paths), seed=5, examples=8)
  with pytest.raises(ValueError, match="weights and holdout decide the order"):
    pipeline.resume_from(stored, read(paths, (1, 2, 3)), seed=5)


# Holdouts.


def test_what_is_held_out_is_never_trained_on(paths):
  train, held_out = read(paths, holdout=0.2), read(paths, holdout=0.2, split="holdout")
  trained = set(ids(train, 4000))
  assert len(trained) == train.num_examples
  kept = set(ids(held_out, 4000))
  assert len(kept) == held_out.num_examples
  assert not trained & kept
  assert len(trained | kept) == len(train) == sum(SIZES.values())
  # 400 draws of one in five: the standard deviation is 8.
  assert abs(len(kept) - 80) < 32


def test_an_image_is_held_out_by_its_id_in_every_dataset(paths, tmp_path):
  again = write(tmp_path / "512px", ["c/7", "new", *(f"a/{i}" for i in range(60))])
  held_out = set(ids(read(paths, holdout=0.3, split="holdout"), 2000))
  shared = {name for name in held_out if name.startswith("a/") or name == "c/7"}
  there = set(ids(read([again], holdout=0.3, split="holdout"), 400)) - {"new"}
  assert there == shared


def test_a_larger_holdout_holds_out_more_and_lets_none_go(paths):
  small = set(ids(read(paths, holdout=0.1, split="holdout"), 2000))
  large = set(ids(read(paths, holdout=0.3, split="holdout"), 2000))
  assert small < large


# Threads, workers, hosts.


def test_workers_and_threads_change_no_byte(paths):
  mixture = read(paths, (1, 1, 2), holdout=0.1)
  expected = first_batches(mixture, 5)
  for threads, workers in [(2, 0), (1, 1), (0, 2)]:
    got = first_batches(mixture, 5, num_threads=threads, num_workers=workers)
    for batch, wanted in zip(got, expected, strict=True):
      assert batch.keys() == wanted.keys()
      for name, array in wanted.items():
        np.testing.assert_array_equal(batch[name], array, err_msg=name)


# Damage.


@pytest.fixture
def damaged(tmp_path):
  """Twelve records of which numbers 3 and 4, and the last, cannot be read."""
  path = write(tmp_path / "damaged", [f"d/{i}" for i in range(12)])
  dataset = open_dataset(path)
  for name in ("d/3", "d/4", "d/11"):
    latents = make_record(name).latents.tobytes()
    for shard in path.glob("*.array_record"):
      data = bytearray(shard.read_bytes())
      if latents in data:
        data[data.index(latents)] ^= 1
        shard.write_bytes(data)
  assert len(dataset.manifest.shards) > 1
  return path


def test_a_damaged_record_is_replaced_by_the_next_sound_one(damaged, caplog):
  caplog.set_level(logging.WARNING, logger="absl")
  mixture = read([damaged])
  records, numbers, replaced = mixture.read_or_replace(np.array([2, 3, 4, 11]))
  assert [record.id for record in records] == ["d/2", "d/5", "d/5", "d/0"]
  assert numbers.tolist() == [2, 5, 5, 0]
  assert replaced.tolist() == [False, True, True, True]
  assert "Record 3 of" in caplog.text
  assert "The next one takes its place" in caplog.text
  with pytest.raises(ValueError, match="Record 3 of"):
    mixture.read([2, 3])


def test_what_is_held_out_stands_in_for_nothing(damaged):
  train = read([damaged], holdout=0.5)
  own = set(train.numbers[0].tolist())
  assert 3 in own or 4 in own or 11 in own
  records, numbers, _ = train.read_or_replace(np.array(sorted(own)))
  assert set(numbers.tolist()) <= own - {3, 4, 11}
  assert [record.id for record in records] == [f"d/{n}" for n in numbers]


def test_batches_say_which_rows_stand_in_for_others(damaged):
  mixture = read([damaged])
  batches = first_batches(mixture, 3, damaged="replace")  # two epochs
  assert sum(int(batch["replaced"].sum()) for batch in batches) == 6
  for batch in batches:
    assert not set(batch["example"].tolist()) & {3, 4, 11}
  with pytest.raises(ValueError, match="damaged"):
    first_batches(mixture, 3)


def test_a_dataset_of_nothing_but_damage_ends_the_stream(tmp_path):
  path = write(tmp_path / "lost", ["d/0", "d/1"])
  [shard] = path.glob("*.array_record")
  data = bytearray(shard.read_bytes())
  for name in ("d/0", "d/1"):
    data[data.index(make_record(name).latents.tobytes())] ^= 1
  shard.write_bytes(data)
  with pytest.raises(ValueError, match="is damaged"):
    first_batches(read([path]), 1, damaged="replace")


# Captions as text.


def count_letters(texts, length):
  return {
    "caption_ids": np.array([[len(text)] * length for text in texts], np.int32),
    "caption_mask": np.ones((len(texts), length), bool),
  }


def test_captions_stored_as_text_are_read_by_whom_the_caller_says(tmp_path):
  features = dataclasses.replace(FEATURES, caption_storage="text")
  mixture = read([write(tmp_path / "t", ["x", "yy", "zzz"], features)])
  [batch] = first_batches(mixture, 1, read_captions=count_letters)
  expected = [[number + 1] * 3 for number in batch["example"]]
  assert batch["caption_ids"].tolist() == expected
  assert "caption_embeddings" not in batch
  with pytest.raises(ValueError, match="captions as text: text needs something"):
    first_batches(mixture, 1)


def test_stored_embeddings_need_nobody_to_read_them(paths):
  with pytest.raises(ValueError, match=r"captions as embeddings: .* embeddings do not"):
    first_batches(read(paths), 1, read_captions=count_letters)


# What is refused.


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"resolution": 16}, "resolution: 8 → 16"),
    ({"scaling_factor": 0.5}, "scaling_factor: 1.0 → 0.5"),
    ({"autoencoder": {"name": "sdxl"}}, "autoencoder.name: 'pixels' → 'sdxl'"),
    ({"hashes": {"autoencoder": "bb"}}, "hashes.autoencoder: 'aa' → 'bb'"),
  ],
)
def test_datasets_that_do_not_go_together_are_named(paths, tmp_path, changes, message):
  other = write(tmp_path / "other", ["x"], dataclasses.replace(FEATURES, **changes))
  with pytest.raises(ValueError, match=f"cannot be read as one.*{message}.*alike"):
    read([paths[0], other])


def test_another_crop_or_an_unknown_hash_is_no_obstacle(paths, tmp_path):
  changes = {"crop_rule": {"name": "other"}, "hashes": {"crop_rule": "cc"}}
  other = write(tmp_path / "other", ["x"], dataclasses.replace(FEATURES, **changes))
  assert len(read([paths[0], other])) == 61
  changes = {"hashes": {"crop_rule": "dd"}}
  third = write(tmp_path / "third", ["y"], dataclasses.replace(FEATURES, **changes))
  assert len(read([other, third])) == 2


def test_other_null_captions_are_of_another_text_encoder(paths, tmp_path):
  other = write(tmp_path / "other", ["x"], null=1.0)
  with pytest.raises(ValueError, match="different null captions"):
    read([paths[0], other])


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"weights": (1, 1)}, "2 weights are given for 3 datasets"),
    ({"weights": (1, 0, 1)}, r"weights \(1, 0, 1\) must be positive"),
    ({"weights": (1, float("nan"), 1)}, "must be positive"),
    ({"weights": (1, 1e-6, 1)}, "less than one example in 65536"),
    ({"holdout": 1.0}, "holdout=1.0 must be at least 0 and less than 1"),
    ({"split": "holdout"}, "holdout=0.0 must be .* more than 0 to read"),
    ({"holdout": 1e-9, "split": "holdout"}, "none of the 60 records of .*a is in the"),
  ],
)
def test_weights_and_holdouts_that_cannot_be_are_refused(paths, arguments, message):
  with pytest.raises(ValueError, match=message):
    read(paths, **arguments)
