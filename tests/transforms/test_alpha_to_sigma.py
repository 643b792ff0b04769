"""From α to Σ: what can stay as it was does, to rounding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixsigma_jax import tree
from pixsigma_jax.models.kv_compression import KVCompression
from pixsigma_jax.models.pixart import PixArt, abstract_params
from pixsigma_jax.transforms import alpha_to_sigma
from tests.sample import models

# base_size / 32 is Σ's scale of the positions already: what is left are conditions.
ALPHA = models.nano(
  pe_interpolation=0.125, size_conditions=True, kv_compression=KVCompression()
)
PARAMS = models.random_params(ALPHA)
PLAIN = dataclasses.replace(ALPHA, size_conditions=False)
PLAIN_PARAMS = {k: v for k, v in PARAMS.items() if k != "size_conditions"}


def run(config, params, caption_length, *conditions):
  latents = np.random.default_rng(0).normal(size=(1, 8, 4, 3)).astype(np.float32)
  captions = np.random.default_rng(1).normal(size=(1, caption_length, 16))
  mask = np.arange(caption_length)[None] < 5
  apply = jax.jit(
    PixArt(config, models.FLOAT32).apply,
    compiler_options={"xla_backend_optimization_level": 0},
  )
  caption = (captions.astype(np.float32), mask)
  return apply({"params": params}, latents, jnp.array([300]), *caption, *conditions)


def test_with_its_size_folded_in_it_says_of_a_caption_that_fitted_what_it_said():
  sigma, params = alpha_to_sigma(ALPHA, PARAMS, caption_length=12, fold_size=(16, 8))
  wanted = {"size_conditions": False, "caption_length": 12}
  assert sigma == dataclasses.replace(ALPHA, **wanted)
  assert tree.differences(params, abstract_params(sigma)) == []
  expected = run(ALPHA, PARAMS, 8, jnp.array([[16.0, 8.0]]), jnp.array([2.0]))
  found = run(sigma, params, 12)
  # Two layers in float32; the conditions are added in another place.
  tolerance = 1e-5 * np.abs(expected).max()
  np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
  # And it is not because conditions do nothing.
  _, dropped = alpha_to_sigma(ALPHA, PARAMS, caption_length=12)
  assert np.abs(run(sigma, dropped, 12) - expected).max() > 100 * tolerance


def test_folding_touches_one_bias_and_dropping_touches_nothing():
  _, folded = alpha_to_sigma(ALPHA, PARAMS, fold_size=(16, 16))
  _, dropped = alpha_to_sigma(ALPHA, PARAMS)
  before = tree.named_leaves(PLAIN_PARAMS)
  bias = "timestep_embedding/out/bias"
  for params, touched in ((folded, [bias]), (dropped, [])):
    after = tree.named_leaves(params)
    assert list(after) == list(before)
    assert [name for name in before if after[name] is not before[name]] == touched
  assert "size_conditions" in PARAMS
  assert PARAMS["timestep_embedding"]["out"]["bias"] is before[bias]


def test_without_conditions_every_parameter_is_handed_on_as_it_is():
  config, params = alpha_to_sigma(PLAIN, PLAIN_PARAMS)
  assert params is PLAIN_PARAMS
  assert config == dataclasses.replace(PLAIN, caption_length=300)


@pytest.mark.parametrize(
  ("base_size", "alpha", "sigma"), [(16, 1.0, 0.5), (32, 1.0, 1.0), (64, 2.0, 2.0)]
)
def test_positions_become_those_of_sigmas_release_of_that_resolution(
  base_size, alpha, sigma
):
  old = dataclasses.replace(PLAIN, base_size=base_size, pe_interpolation=alpha)
  config, _ = alpha_to_sigma(old, PLAIN_PARAMS)
  assert config.pe_interpolation == sigma
  kept, _ = alpha_to_sigma(old, PLAIN_PARAMS, pe_interpolation=alpha)
  assert kept.pe_interpolation == alpha


@pytest.mark.parametrize(
  ("config", "fields", "message"),
  [
    (ALPHA, {"caption_length": 7}, r"caption_length=7 is below the 8 tokens"),
    (ALPHA, {"pe_interpolation": 0.0}, r"pe_interpolation=0.0 must be above 0"),
    (PLAIN, {"fold_size": (8, 8)}, r"fold_size=\(8, 8\) .*no size_conditions"),
    (ALPHA, {"fold_size": (8, 0)}, r"fold_size=\(8, 0\) must be the height and width"),
  ],
)
def test_arguments_that_fit_nothing_are_named(config, fields, message):
  with pytest.raises(ValueError, match=message):
    alpha_to_sigma(config, PARAMS, **fields)
