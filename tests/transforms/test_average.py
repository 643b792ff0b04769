"""Averages of models: between their parameters, and exactly theirs where they agree."""

import dataclasses

import jax
import numpy as np
import pytest

from pixsigma_jax import tree
from pixsigma_jax.transforms import average
from tests.sample import models

CONFIG = models.nano()
MODELS = [models.random_params(CONFIG, seed) for seed in range(3)]
OTHERS = [(CONFIG, params) for params in MODELS[1:]]


def mean(weights):
  return jax.tree.map(
    lambda *leaves: sum(
      w * np.float64(leaf) for w, leaf in zip(weights, leaves, strict=True)
    ),
    *MODELS,
  )


@pytest.mark.parametrize(
  "weights", [(0.5, 0.3, 0.2), (1.5, -1.0, 0.5), (0.0, 1.0, 0.0)]
)
def test_every_leaf_is_the_weighted_mean(weights):
  config, params = average(CONFIG, MODELS[0], others=OTHERS, weights=weights)
  assert config == CONFIG
  # float32 against float64, of numbers around 1.
  close = {"rtol": 0, "atol": 1e-6}
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, **close), params, mean(weights)
  )
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}


def test_without_weights_all_weigh_the_same():
  _, params = average(CONFIG, MODELS[0], others=OTHERS)
  expected = mean((1 / 3, 1 / 3, 1 / 3))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), params, expected
  )


def test_what_is_the_same_in_all_is_shared_and_nothing_else_is():
  copy = jax.tree.map(lambda leaf: leaf + 0, MODELS[0])
  other = {**copy, "out": MODELS[1]["out"]}
  third = {**copy, "modulation": MODELS[2]["modulation"]}
  _, params = average(
    CONFIG,
    MODELS[0],
    others=[(CONFIG, other), (CONFIG, third)],
    weights=(0.2, 0.7, 0.1),
  )
  before, after = tree.named_leaves(MODELS[0]), tree.named_leaves(params)
  changed = {name.split("/")[0] for name in before if after[name] is not before[name]}
  assert changed == {"out", "modulation"}


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"others": []}, "nothing to average with"),
    ({"weights": (0.5, 0.5)}, "2 weights for 3 models"),
    ({"weights": (0.5, 0.5, 0.5)}, "0.5, 0.5, 0.5 sum to 1.5: they must sum to 1"),
    ({"weights": (0.5, 0.5, float("nan"))}, "sum to nan"),
    (
      {"others": [OTHERS[0], (dataclasses.replace(CONFIG, qk_norm=True), MODELS[2])]},
      "Model 2 of the others .*qk_norm: False → True",
    ),
  ],
)
def test_models_and_weights_that_do_not_fit_are_named(fields, message):
  with pytest.raises(ValueError, match=message):
    average(CONFIG, MODELS[0], **{"others": OTHERS, **fields})
