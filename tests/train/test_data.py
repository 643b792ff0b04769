"""What a run can be fed with: mixtures, captions as text, records that are damaged."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest

from pixsigma_jax import sharding
from pixsigma_jax.convert.t5 import load_text_encoder
from pixsigma_jax.data.records import open_dataset
from pixsigma_jax.data.writing import RecordWriter
from tests.convert import published
from tests.train import runs

LENGTH, WIDTH = 12, 32  # tokens of a caption, numbers of an embedding of the tiny T5


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
  """A tiny T5 and its tokenizer in the published format."""
  folder = tmp_path_factory.mktemp("frozen")
  published.write_t5(folder / "text_encoder")
  published.write_tokenizer(folder / "tokenizer")
  return folder


@pytest.fixture(scope="module")
def encoder(frozen):
  return load_text_encoder(
    frozen / "text_encoder",
    frozen / "tokenizer",
    dtype=jnp.float32,
    mesh=sharding.single_device_mesh(),
  )


def rewrite(data, directory, encoder, storage):
  """The same images with captions of T5, stored as embeddings or as text."""
  dataset = open_dataset(data)
  features = dataclasses.replace(
    dataset.manifest.features,
    text_encoder=encoder.identity,
    caption_width=WIDTH,
    caption_length=LENGTH,
    caption_storage=storage,
  )
  null_captions, _ = encoder.encode([""], LENGTH)
  null_caption = null_captions[0] if storage == "embeddings" else None
  with RecordWriter(directory, features, null_caption) as writer:
    for number in range(len(dataset)):
      record = dataset[number]
      # Of T5's few words in small: short ones, so that each stays within the limit.
      captions = tuple(f"a red {['one', 'two', 'three'][number % 3]}" for _ in range(2))
      embeddings, mask = encoder.encode(captions, LENGTH)
      stored = embeddings[mask].astype(np.float16) if storage == "embeddings" else None
      writer.write(
        dataclasses.replace(
          record,
          captions=captions,
          caption_kinds=("long", "short"),
          caption_lengths=mask.sum(axis=-1, dtype=np.int32),
          caption_embeddings=stored,
        )
      )
  return directory


def low(data, **changes):
  return runs.low(data, model__caption_width=WIDTH, total_steps=4, **changes)


def losses(workdir):
  return np.array([line["loss"] for line in runs.metrics(workdir)])


def test_captions_embedded_while_training_train_as_those_stored(
  data, encoder, frozen, tmp_path
):
  stored = rewrite(data, tmp_path / "stored", encoder, "embeddings")
  as_text = rewrite(data, tmp_path / "text", encoder, "text")
  runs.train(low(stored), tmp_path / "a")
  runs.train(low(as_text, frozen=str(frozen)), tmp_path / "b")
  # T5 runs in batches of other sizes: its sums are rounded differently, and float16
  # after them may fall to the other side.
  np.testing.assert_allclose(losses(tmp_path / "b"), losses(tmp_path / "a"), rtol=1e-4)
  null = runs.arrays(tmp_path / "b", 4)["null_caption"]
  np.testing.assert_allclose(null, encoder.encode([""], LENGTH)[0][0], atol=1e-5)
  # Sharded over a mesh, T5 too.
  mesh = {"mesh__data": 2, "mesh__fsdp": 2, "frozen": str(frozen)}
  runs.train(low(as_text, **mesh), tmp_path / "c", devices=4)
  np.testing.assert_allclose(losses(tmp_path / "c"), losses(tmp_path / "a"), rtol=1e-4)


def test_captions_as_text_need_a_text_encoder_that_is_there(
  data, encoder, tmp_path, monkeypatch
):
  as_text = rewrite(data, tmp_path / "text", encoder, "text")
  config = low(as_text, frozen=str(tmp_path / "nowhere"))
  with pytest.raises(FileNotFoundError, match="nowhere is neither a folder nor could"):
    runs.train(config, tmp_path / "run")
  assert runs.steps(tmp_path / "run") == []


def test_hashed_words_may_be_stored_as_text_too(data, done, tmp_path):
  dataset = open_dataset(data)
  features = dataclasses.replace(dataset.manifest.features, caption_storage="text")
  with RecordWriter(tmp_path / "text", features, None) as writer:
    for number in range(len(dataset)):
      record = dataset[number]
      writer.write(dataclasses.replace(record, caption_embeddings=None))
  runs.train(runs.low(tmp_path / "text"), tmp_path / "run")
  runs.assert_same(runs.arrays(tmp_path / "run", 6), runs.arrays(done, 6))


def test_workers_and_threads_train_the_same_parameters(data, done, tmp_path):
  config = runs.low(data, data__num_workers=1, data__num_threads=2)
  runs.train(config, tmp_path)
  runs.assert_same(runs.arrays(tmp_path, 6), runs.arrays(done, 6))


@pytest.fixture
def damaged(data, tmp_path):
  """The images with one record that cannot be read."""
  dataset = open_dataset(data)
  path = tmp_path / "damaged"
  with RecordWriter(path, dataset.manifest.features, dataset.null_caption) as writer:
    for number in range(len(dataset)):
      writer.write(dataset[number])
  [shard] = path.glob("*.array_record")
  content = bytearray(shard.read_bytes())
  content[content.index(dataset[7].latents.tobytes())] ^= 1
  shard.write_bytes(content)
  return path


def test_a_damaged_record_stops_the_run_or_is_replaced_and_counted(
  damaged, tmp_path, caplog
):
  with pytest.raises(ValueError, match=r"Record 7 of .*records-train-00000"):
    runs.train(runs.low(damaged), tmp_path / "stopped")
  runs.train(runs.low(damaged, data__damaged="replace"), tmp_path / "replaced")
  lines = runs.metrics(tmp_path / "replaced")
  assert sum(line["replaced_examples"] for line in lines) == 1  # an epoch of one
  assert re.search(r"Record 7 of .* The next one takes its place", caplog.text)


def test_two_datasets_and_a_holdout_are_one_stream(data, tmp_path):
  other = runs.prepare(tmp_path / "again")
  config = runs.low(
    data, data__path=f"{data},{other}", data__weights=(3, 1), data__holdout=0.25
  )
  runs.train(config, tmp_path / "run")
  stored = runs.position(tmp_path / "run", 6)
  assert stored["num_records"] == 2 * runs.RECORDS
  alone = runs.low(data, data__holdout=0.25, total_steps=8)
  with pytest.raises(ValueError, match="Datasets, weights and holdout decide"):
    runs.train(alone, tmp_path / "run")


def test_a_hash_that_the_config_names_must_be_the_datasets(data, tmp_path):
  config = runs.low(data, data__hashes__autoencoder="00ff")
  message = r"not prepared with what config.data.hashes .*autoencoder: None → '00ff'"
  with pytest.raises(ValueError, match=message):
    runs.train(config, tmp_path)
