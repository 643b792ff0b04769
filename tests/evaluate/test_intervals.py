"""Bootstrap intervals: closed forms, coverage, and what is drawn together."""

import json

import numpy as np
import pyarrow as pa
import pytest

from pixsigma_jax.evaluate.intervals import distance_interval, interval, mean_interval
from pixsigma_jax.evaluate.items import Item
from pixsigma_jax.evaluate.scorers import features
from pixsigma_jax.evaluate.suites import ScoredModel, distance_figure, mean_figure


@pytest.fixture
def random():
  return np.random.default_rng(0)


def test_the_interval_of_a_share_is_that_of_a_binomial():
  values = np.repeat([1.0, 0.0], [120, 280])
  low, high = mean_interval(values, resamples=4000, seed=0)
  half = 1.96 * np.sqrt(0.3 * 0.7 / 400)
  assert low == pytest.approx(0.3 - half, abs=0.004)
  assert high == pytest.approx(0.3 + half, abs=0.004)


def test_ninety_five_of_a_hundred_intervals_hold_the_truth(random):
  held = 0
  for i in range(400):
    low, high = mean_interval(random.normal(3, 2, 50), resamples=200, seed=i)
    held += low <= 3 <= high
  # Of 400 at 95 %, 380 with a deviation of 4.4; percentiles of 50 values are narrow.
  assert 357 <= held <= 394


def test_a_seed_decides_the_interval(random):
  values = random.normal(size=30)
  one, again, other = (
    mean_interval(values, resamples=50, seed=seed) for seed in (1, 1, 2)
  )
  assert one == again != other


def test_the_interval_of_a_distance_is_about_its_value(random):
  values = random.normal(size=400)

  def shifted(rows):  # as repetition shifts a distance
    return float(values[rows].mean()) + 5

  low, high = distance_interval(shifted, 1.0, 400, resamples=2000, seed=0)
  half = 1.96 * values.std() / 20
  assert (low, high) == pytest.approx((1 - half, 1 + half), abs=0.05 * half)


@pytest.mark.parametrize(("resamples", "count"), [(0, 9), (9, 1)])
def test_without_resamples_or_with_one_item_there_is_none(resamples, count):
  drawing = {"resamples": resamples, "seed": 0}
  assert mean_interval(np.ones(count), **drawing) == (None, None)
  assert interval(lambda _: 1.0, count, **drawing) == (None, None)
  assert distance_interval(lambda _: 1.0, 1.0, count, **drawing) == (None, None)


def run(columns, references=None, *, items, copies=1):
  """A model whose only scorer is `s`."""
  metadata = {b"identity": json.dumps({"version": "1"}).encode()}
  own, theirs = (
    None if of is None else pa.table(of).replace_schema_metadata(metadata)
    for of in (columns, references)
  )
  return ScoredModel(
    name="ours",
    items=tuple(Item(str(i), "a") for i in range(items)),
    images_per_item=copies,
    options={},
    read=lambda _, of_references: theirs if of_references else own,
    resamples=200,
    distance_resamples=40,
  )


def test_images_of_one_prompt_are_drawn_together(random):
  values = random.normal(size=20)
  one = run({"x": pa.array(values)}, items=20)
  # Thrice the same image of each prompt says no more than one does.
  three = run({"x": pa.array(np.repeat(values, 3))}, items=20, copies=3)
  a = mean_figure(one, "x", "s", values)
  b = mean_figure(three, "x", "s", np.repeat(values, 3))
  assert (a.low, a.high) == pytest.approx((b.low, b.high), rel=1e-12)
  assert (a.basis["images"], b.basis["images"]) == ("20", "60")


def vectors(values):
  flat = pa.array(values.astype(np.float32).reshape(-1))
  return pa.FixedSizeListArray.from_arrays(flat, values.shape[1]).cast(
    features(values.shape[1])
  )


def test_a_distance_draws_an_images_patches_together_and_leaves_the_references(random):
  ours, theirs = random.normal(size=(6, 4)), random.normal(size=(5, 4))
  seen = []

  def distance(a, b):
    seen.append((a, b))
    return float(a.sum() - b.sum())

  scored = run({"features": vectors(ours)}, {"features": vectors(theirs)}, items=6)
  figure = distance_figure(scored, "d", "s", distance, rows=2)
  assert figure.value == pytest.approx(ours.sum() - theirs.sum(), rel=1e-5)
  pairs = {tuple(row.round(4)) for row in ours.astype(np.float32)}
  for a, b in seen:
    np.testing.assert_array_equal(b, theirs.astype(np.float32).reshape(10, 2))
    assert {tuple(row.round(4)) for row in a.reshape(6, 4)} <= pairs
  assert len(seen) == 1 + 40
  assert figure.low < figure.value < figure.high
