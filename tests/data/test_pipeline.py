"""The stream of batches: the same examples in the same order, whatever the machines."""

import contextlib
import hashlib
import itertools
import pickle

import numpy as np
import pytest

from pixsigma_jax.data import order, pipeline
from pixsigma_jax.data.mixture import open_mixture
from pixsigma_jax.data.records import Features, Record
from pixsigma_jax.data.writing import RecordWriter
from pixsigma_jax.models import tokens

WIDTH, LENGTH, CHANNELS = 4, 6, 2
PATCH, WINDOW = 2, (2, 2)
SIZES = [(4, 8), (8, 4), (6, 10)]  # in tokens (2, 4), (4, 2) and (3, 5)
COUNT = 23  # no multiple of any batch size: batches straddle epochs
SETTINGS = {
  "batch_size": 8,
  "seed": 3,
  "start_example": 0,
  "patch_size": PATCH,
  "window": WINDOW,
  "caption_length": LENGTH,
  "long_caption_ratio": 0.6,
  "process_index": 0,
  "process_count": 1,
  "num_threads": 0,
  "num_workers": 0,
  "damaged": "stop",
}


def make_record(number, kinds=None, size=None, kind="latents"):
  rng = np.random.default_rng(number)
  kinds = kinds or (("long", "short"), ("long", "short", "short"))[number % 2]
  lengths = rng.integers(1, LENGTH + 1, len(kinds)).astype(np.int32)
  h, w = size or SIZES[number % len(SIZES)]
  channels = CHANNELS * (2 if kind == "latent_moments" else 1)
  return Record(
    id=str(number),
    captions=tuple(f"caption {i}" for i in range(len(kinds))),
    caption_kinds=tuple(kinds),
    caption_lengths=lengths,
    # The last number says whose caption it is: record and caption.
    caption_embeddings=np.concatenate(
      [
        np.column_stack([rng.normal(size=(n, WIDTH - 1)), np.full(n, 10 * number + i)])
        for i, n in enumerate(lengths)
      ]
    ).astype(np.float16),
    original_size=np.array([100 + number, 200 + number], np.int32),
    crop=np.array([0, 50, 100, 150], np.float32),
    **{kind: rng.normal(size=(h, w, channels)).astype(np.float16)},
  )


def write(directory, made, kind="latents"):
  features = Features(
    kind=kind,
    channels=CHANNELS,
    resolution=8,
    autoencoder={"name": "pixels"},
    scaling_factor=1.0,
    text_encoder={"name": "words"},
    caption_storage="embeddings",
    caption_length=LENGTH,
    caption_width=WIDTH,
    crop_rule={"name": "none"},
    hashes={},
  )
  null_caption = np.zeros((LENGTH, WIDTH), np.float32)
  with RecordWriter(directory, features, null_caption, shard_bytes=1500) as writer:
    for record in made:
      writer.write(record)
  return read(directory)


def read(*directories, weights=(), holdout=0.0, split="train"):
  return open_mixture(directories, weights=weights, holdout=holdout, split=split)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
  return write(tmp_path_factory.mktemp("pipeline"), map(make_record, range(COUNT)))


def take(dataset, count, **changes):
  with contextlib.closing(pipeline.batches(dataset, **SETTINGS | changes)) as stream:
    return list(itertools.islice(stream, count))


def row_hashes(batch):
  """A hash of all there is in each row, by the row's place in the global batch."""
  return {
    int(row): hashlib.sha256(b"".join(x[i].tobytes() for x in batch.values())).digest()
    for i, row in enumerate(batch["row"])
  }


def assert_same(batches, expected):
  for batch, wanted in zip(batches, expected, strict=True):
    assert batch.keys() == wanted.keys()
    for name in wanted:
      np.testing.assert_array_equal(batch[name], wanted[name], err_msg=name)


def shown_captions(batches):
  """Which caption each row of the batches shows, as (record, caption)."""
  return [
    divmod(int(embeddings[0, -1]), 10)
    for batch in batches
    for embeddings in batch["caption_embeddings"]
  ]


# The order of examples.


def test_an_epoch_shows_each_example_once_and_never_in_the_same_order(dataset):
  seen = np.concatenate([batch["example"] for batch in take(dataset, 4 * COUNT)])
  epochs = seen.reshape(-1, COUNT)  # 8 * 4 epochs, not a row of them dropped
  np.testing.assert_array_equal(
    np.sort(epochs, axis=1), np.tile(np.arange(COUNT), (len(epochs), 1))
  )
  assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_another_seed_is_another_order(dataset):
  # Also not the first seed's next epoch, as adding seed and epoch would make it.
  first = np.concatenate([b["example"] for b in take(dataset, COUNT, seed=3)])
  second = np.concatenate([b["example"] for b in take(dataset, COUNT, seed=4)])
  orders = {tuple(x) for x in np.concatenate([first, second]).reshape(-1, COUNT)}
  assert len(orders) == 16


@pytest.mark.parametrize("num_records", [1, 2, 5, 64, 65, 1000])
def test_the_order_is_a_permutation_of_any_size(num_records):
  positions = np.arange(3 * num_records)
  epochs, examples = order.permuted(positions, seed=(0, 0), n=num_records)
  np.testing.assert_array_equal(epochs, positions // num_records)
  for epoch in examples.reshape(3, num_records):
    np.testing.assert_array_equal(np.sort(epoch), np.arange(num_records))


def test_every_place_of_the_order_is_as_likely_for_every_example():
  n, epochs = 7, 7000
  _, examples = order.permuted(np.arange(n * epochs), seed=(0, 0), n=n)
  counts = np.stack([np.bincount(place) for place in examples.reshape(epochs, n).T])
  # Chi-squared of 36 degrees of freedom: 68 is passed by chance once in a thousand.
  assert ((counts - epochs / n) ** 2 / (epochs / n)).sum() < 68


def test_the_order_does_not_change_from_release_to_release():
  # A run resumed after an upgrade must not see other examples: these stay for ever.
  positions = np.array([0, 1, 2, 99, 100, 10**12])
  epochs, examples = order.permuted(positions, seed=(order.RECORDS, 42), n=100)
  assert epochs.tolist() == [0, 0, 0, 0, 1, 10**10]
  assert examples.tolist() == [86, 98, 39, 10, 72, 32]


@pytest.mark.parametrize("num_records", [3 * 10**7, 2 * 10**9])
def test_a_large_dataset_costs_no_more_than_a_small_one(num_records):
  positions = np.int64(10) ** 12 + np.arange(1000)
  _, examples = order.permuted(positions, seed=(0, 0), n=num_records)
  assert len(np.unique(examples)) > 990
  assert num_records * 0.97 < examples.max() < num_records


# The same batches from any number of hosts, from any start, in any number of threads.


@pytest.mark.parametrize("process_count", [2, 4])
def test_hosts_together_have_the_batch_of_one_host(dataset, process_count):
  alone = take(dataset, 4)
  hosts = [
    take(dataset, 4, process_index=index, process_count=process_count)
    for index in range(process_count)
  ]
  for step, batch in enumerate(alone):
    parts = [host[step] for host in hosts]
    together = {k: v for part in parts for k, v in row_hashes(part).items()}
    assert together == row_hashes(batch)
    assert sorted(together) == list(range(8))
    # Blocks of rows, so that the global array has its rows in order on any mesh.
    rows = np.concatenate([part["row"] for part in parts])
    np.testing.assert_array_equal(rows, np.arange(8))


@pytest.mark.parametrize("start_example", [8, 40, 13])
def test_a_resumed_stream_is_the_rest_of_the_uninterrupted_one(dataset, start_example):
  def rows(batches):
    examples = np.concatenate([batch["example"] for batch in batches]).tolist()
    return list(zip(examples, shown_captions(batches), strict=True))

  straight = rows(take(dataset, 10))
  resumed = rows(take(dataset, 4, start_example=start_example))
  assert resumed == straight[start_example : start_example + 32]
  if start_example % 8 == 0:
    assert_same(
      take(dataset, 2, start_example=start_example),
      take(dataset, start_example // 8 + 2)[-2:],
    )


def test_threads_change_nothing(dataset):
  assert_same(take(dataset, 6, num_threads=3), take(dataset, 6))


def test_batches_can_be_drawn_in_another_process(dataset):
  [record] = pickle.loads(pickle.dumps(dataset)).read([5])
  np.testing.assert_array_equal(record.latents, make_record(5).latents)


def test_a_batch_may_be_larger_than_the_dataset(dataset):
  (batch,) = take(dataset, 1, batch_size=2 * COUNT)
  assert np.bincount(batch["example"]).tolist() == [2] * COUNT


# What is in a batch.


@pytest.mark.parametrize("kind", ["latents", "latent_moments"])
def test_a_row_is_its_record_put_through_to_tokens(tmp_path, kind):
  made = [make_record(number, kind=kind) for number in range(COUNT)]
  for batch in take(write(tmp_path, made, kind), 3, sequence_length=17):
    assert batch[kind].dtype == np.float16
    assert batch[kind].shape[:2] == (8, 17)
    for i, example in enumerate(batch["example"]):
      latents = getattr(made[example], kind)
      h, w = latents.shape[0] // PATCH, latents.shape[1] // PATCH
      expected = tokens.to_tokens(latents, PATCH, WINDOW)
      np.testing.assert_array_equal(batch[kind][i, : h * w], expected)
      assert not batch[kind][i, h * w :].any()
      np.testing.assert_array_equal(
        batch["coordinates"][i, : h * w], tokens.coordinates((h, w), WINDOW)
      )
      assert not batch["coordinates"][i, h * w :].any()
      assert batch["grid"][i].tolist() == [h, w]
      assert batch["aspect_ratio"][i] == np.float32(h / w)
      assert batch["original_size"][i].tolist() == [100 + example, 200 + example]


def test_a_caption_comes_back_exactly_and_only_it(dataset):
  batches = take(dataset, 6)
  shown = iter(shown_captions(batches))
  for batch in batches:
    for i, example in enumerate(batch["example"]):
      record = make_record(int(example))
      number, caption = next(shown)
      assert number == example
      ends = np.cumsum(record.caption_lengths)
      stored = np.split(record.caption_embeddings, ends[:-1])[caption]
      mask = batch["caption_mask"][i]
      np.testing.assert_array_equal(mask, np.arange(LENGTH) < len(stored))
      np.testing.assert_array_equal(batch["caption_embeddings"][i][mask], stored)
      assert not batch["caption_embeddings"][i][~mask].any()


def test_types_and_shapes_are_the_same_for_every_batch(dataset):
  shapes = {
    "latents": (np.float16, (4, 15, PATCH**2 * CHANNELS)),  # 15: the longest image
    "coordinates": (np.int32, (4, 15, 2)),
    "grid": (np.int32, (4, 2)),
    "caption_embeddings": (np.float16, (4, LENGTH, WIDTH)),
    "caption_mask": (np.bool_, (4, LENGTH)),
    "original_size": (np.float32, (4, 2)),
    "aspect_ratio": (np.float32, (4,)),
    "row": (np.int32, (4,)),
    "example": (np.int32, (4,)),
    "replaced": (np.bool_, (4,)),
  }
  for batch in take(dataset, 3, process_count=2):
    assert {name: (x.dtype, x.shape) for name, x in batch.items()} == shapes


# Which caption is shown.


@pytest.fixture(scope="module")
def captions_shown(dataset):
  """Caption number by (epoch, example), for 160 epochs."""
  batches = take(dataset, 20, batch_size=8 * COUNT)
  shown = np.array(shown_captions(batches)).reshape(-1, COUNT, 2)
  return np.stack([epoch[np.argsort(epoch[:, 0])][:, 1] for epoch in shown])


def test_long_captions_have_their_share(captions_shown):
  # 3680 draws: the standard deviation of the share is 0.008.
  assert abs((captions_shown == 0).mean() - 0.6) < 0.03  # caption 0 is the long one


def test_captions_of_a_kind_are_equally_likely(captions_shown):
  short = captions_shown[:, 1::2]  # of the records with two short captions
  short = short[short > 0]
  assert abs((short == 1).mean() - 0.5) < 0.07  # about 700 draws, four sigma


def test_the_caption_is_drawn_anew_every_epoch_and_for_every_example(captions_shown):
  long = captions_shown == 0
  # Two independent draws differ with probability 2 · 0.6 · 0.4 = 0.48.
  assert abs((long[1:] != long[:-1]).mean() - 0.48) < 0.04
  assert abs((long[:, 1:] != long[:, :-1]).mean() - 0.48) < 0.04


def test_ratios_of_zero_and_one_are_certain(dataset):
  for ratio, kind in [(0.0, "short"), (1.0, "long")]:
    for number, caption in shown_captions(take(dataset, 6, long_caption_ratio=ratio)):
      assert make_record(number).caption_kinds[caption] == kind


@pytest.mark.parametrize(("kind", "ratio"), [("long", 0.0), ("short", 1.0)])
def test_a_record_of_one_kind_shows_that_kind(tmp_path, kind, ratio):
  dataset = write(tmp_path, [make_record(0, kinds=[kind] * 3)])
  shown = shown_captions(take(dataset, 8, long_caption_ratio=ratio))
  assert {caption for _, caption in shown} == {0, 1, 2}


def test_draws_of_order_and_captions_are_independent(dataset):
  """Who comes early in an epoch is no more likely to show a long caption."""
  batches = take(dataset, 20, batch_size=8 * COUNT)
  long = np.array(shown_captions(batches))[:, 1].reshape(-1, COUNT) == 0
  # 1760 draws a half: the difference has a standard deviation of 0.016.
  assert abs(long[:, :11].mean() - long[:, 12:].mean()) < 0.06


# What is refused, before training starts.


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"process_count": 3},
      "batch of 8 cannot be split over 3 processes.*multiple of 3",
    ),
    ({"process_index": 1}, r"process_index=1 must lie in 0 … process_count=1"),
    ({"seed": -1}, "seed=-1 and start_example=0 must not be negative"),
    ({"start_example": -8}, "start_example=-8 must not be negative"),
    ({"long_caption_ratio": 60.0}, "long_caption_ratio=60.0 must lie between 0 and 1"),
    (
      {"sequence_length": 14},
      "images of 15 tokens, sequence_length=14: raise it to 15",
    ),
    ({"caption_length": 7}, "null caption .* has 6 tokens.*lower .* to 6"),
    ({"patch_size": 4}, "7 images with latents of 6x10, which cannot be cut .* 4x4"),
  ],
)
def test_what_does_not_fit_is_refused_with_both_numbers(dataset, changes, message):
  with pytest.raises(ValueError, match=message):
    pipeline.batches(dataset, **SETTINGS | changes)


def test_captions_that_are_too_long_are_counted_and_refused(dataset):
  lengths = np.concatenate([make_record(i).caption_lengths for i in range(COUNT)])
  for limit in (4, 5):
    long, total = (lengths > limit).sum(), len(lengths)
    message = f"{long} of {total} captions in .* than {limit} tokens, the longest has 6"
    with pytest.raises(ValueError, match=f"{message}: raise the caption length to 6"):
      pipeline.batches(dataset, **SETTINGS | {"caption_length": limit})


@pytest.mark.parametrize("size", [(4, 6), (6, 4)])
def test_both_sides_of_the_latents_must_fit_the_patch(tmp_path, size):
  dataset = write(tmp_path, [make_record(0, size=size)])
  with pytest.raises(ValueError, match=f"latents of {size[0]}x{size[1]}, which cannot"):
    pipeline.batches(dataset, **SETTINGS | {"patch_size": 4})


@pytest.mark.parametrize("num_threads", [0, 2])
def test_a_damaged_record_surfaces_where_batches_are_asked_for(tmp_path, num_threads):
  dataset = write(tmp_path, map(make_record, range(COUNT)))
  (shard,) = tmp_path.glob("*-00001.array_record")
  damaged = bytearray(shard.read_bytes())
  first = dataset.datasets[0].manifest.shards[0].records
  damaged[damaged.index(make_record(first).latents.tobytes())] ^= 1
  shard.write_bytes(damaged)
  with pytest.raises(ValueError, match=rf"Record {first} of .*00001\.array_record"):
    take(dataset, 3, num_threads=num_threads)


# The position that a checkpoint keeps.


def test_a_run_goes_on_where_it_stopped(dataset):
  stored = pipeline.position(dataset, seed=3, examples=24)
  assert stored == {
    "examples": 24,
    "seed": 3,
    "num_records": COUNT,
    "fingerprint": dataset.fingerprint,
  }
  assert pipeline.resume_from(stored, dataset, seed=3) == 24


def test_a_position_of_another_stream_is_explained(dataset, tmp_path):
  stored = pipeline.position(dataset, seed=3, examples=24)
  with pytest.raises(
    ValueError, match=r"of seed 3, this run has seed 4.*new directory"
  ):
    pipeline.resume_from(stored, dataset, seed=4)
  other = write(tmp_path / "fewer", map(make_record, range(COUNT - 1)))
  with pytest.raises(ValueError, match=r"of 23 records .*fewer has 22 records"):
    pipeline.resume_from(stored, other, seed=3)
  same_count = write(tmp_path / "other", map(make_record, range(1, COUNT + 1)))
  with pytest.raises(ValueError, match=f"and fingerprint {same_count.fingerprint}"):
    pipeline.resume_from(stored, same_count, seed=3)
  del stored["fingerprint"]
  with pytest.raises(ValueError, match="position in the data lacks fingerprint"):
    pipeline.resume_from(stored, dataset, seed=3)
