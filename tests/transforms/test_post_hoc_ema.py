"""An average that was not kept, out of those that were: against what it would be."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pixsigma_jax.transforms import Model, apply_transforms, post_hoc_ema
from pixsigma_jax.transforms.post_hoc_ema import exponent, post_hoc_weights
from tests.sample import models

CONFIG = models.nano()
STEPS = 512
STORED = [(s, k * STEPS // 16) for s in (0.05, 0.1) for k in range(1, 17)]


def average_of(path, sigma_rel, step):
  """The average itself, update by update: β = (1 - 1/t)^(γ + 1), in float64."""
  gamma, average = exponent(sigma_rel), np.zeros(path.shape[1:])
  for t in range(1, step + 1):
    average += (1 - (1 - 1 / t) ** (gamma + 1)) * (path[t - 1] - average)
  return average


@pytest.fixture(scope="module")
def path():
  """Parameters that drift, swing and shake: what a run's do, at one length each."""
  t = np.arange(1, STEPS + 1) / STEPS
  noise = np.random.default_rng(0).normal(size=(STEPS, 2))
  return np.column_stack([t**2, np.sin(9 * t), noise[:, 0], np.cumsum(noise[:, 1])])


def test_the_exponents_are_those_of_the_paper():
  # Karras et al. 2024, section 3.1: γ 16.97 and 6.94 are σ_rel 0.05 and 0.10.
  found = [round(exponent(sigma_rel), 2) for sigma_rel in (0.05, 0.10)]
  assert found == [16.97, 6.94]
  gamma = exponent(0.2)
  variance = (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))
  np.testing.assert_allclose(variance**0.5, 0.2, rtol=1e-9)


@pytest.mark.parametrize("wanted", [(0.075, STEPS), (0.15, STEPS), (0.075, 384)])
def test_an_average_that_was_not_kept_is_what_it_would_have_been(path, wanted):
  weights = post_hoc_weights(STORED, wanted)
  stored = np.array([average_of(path, *profile) for profile in STORED])
  expected = average_of(path, *wanted)
  # The profile is met within 1 % of its norm; so is what it makes of a path, against
  # how much the parameters move.
  np.testing.assert_allclose(weights @ stored, expected, atol=0.01 * np.ptp(path))
  # Not for want of a difference: the nearest of those that were kept is farther off.
  nearest = np.abs(stored - expected).max(axis=1).min()
  assert np.abs(weights @ stored - expected).max() < nearest / 3
  np.testing.assert_allclose(weights.sum(), 1, atol=1e-9)


def test_what_was_kept_is_itself():
  weights = post_hoc_weights(STORED, (0.1, STEPS // 2))
  assert weights[STORED.index((0.1, STEPS // 2))] == 1
  assert np.count_nonzero(weights) == 1


def test_what_the_kept_do_not_reach_is_refused_with_how_far_off_it_is():
  message = r"do not reach σ_rel=0.25 at step 512: the nearest .* off by 104%"
  with pytest.raises(ValueError, match=message):
    post_hoc_weights([(0.05, STEPS), (0.1, STEPS)], (0.25, STEPS))


def params(number):
  return models.random_params(CONFIG, number)


def test_parameters_are_summed_with_the_weights_and_what_never_moved_is_shared():
  profiles = [(0.05, 32), (0.05, 64), (0.1, 32), (0.1, 64)]
  first, *others = [{**params(0), "out": params(n)["out"]} for n in range(4)]
  config, found = post_hoc_ema(
    CONFIG,
    first,
    others=[(CONFIG, other) for other in others],
    sigma_rel=0.08,
    stored=profiles,
  )
  weights = post_hoc_weights(profiles, (0.08, 64))
  kernels = [np.float64(tree["out"]["kernel"]) for tree in (first, *others)]
  expected = np.tensordot(weights, kernels, 1)
  assert config == CONFIG
  # float32 against float64, of numbers around 0.15.
  np.testing.assert_allclose(found["out"]["kernel"], expected, atol=1e-6)
  assert found["modulation"]["kernel"] is first["modulation"]["kernel"]


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"stored": [(0.05, 32)]}, "σ_rel and step of 1 models, and has 2"),
    ({"stored": [(0.05, 32), (0.05, 32)]}, "the same average twice"),
    ({"step": 65}, r"cannot end at step 65 .* \[32, 64\]"),
    ({"stored": [(0.05, 0), (0.1, 64)]}, "read at step 1 or later"),
    ({"sigma_rel": 0.5}, "σ_rel=0.5 is no length"),
  ],
)
def test_averages_that_do_not_fit_are_named(fields, message):
  arguments = {"sigma_rel": 0.08, "stored": [(0.05, 32), (0.1, 64)]} | fields
  with pytest.raises(ValueError, match=message):
    post_hoc_ema(CONFIG, params(0), others=[(CONFIG, params(1))], **arguments)


# ------------------------------------------------------------------- of snapshots


def snapshot(sigma_rel, step, seed=0, **fields):
  entry = {"stage": "one", "config": {"seed": seed}}
  ema = {"kind": "power", "value": sigma_rel, "unit": "updates", "step": step}
  provenance = ({**entry, "ema": {**ema, **fields}},)
  return models.metadata(CONFIG, provenance=provenance)


def applied(first, others):
  model = Model(config=CONFIG, params=params(0), null_caption=None, metadata=first)
  transform = {"name": "post_hoc_ema", "others": list(others), "sigma_rel": 0.08}
  return apply_transforms(
    model,
    [transform],
    read=lambda path: (others[path], lambda: params(int(path))),
    read_lora=lambda path: pytest.fail(f"asks for {path}"),
  )


def test_snapshots_say_themselves_which_averages_they_are():
  profiles = [(0.05, 32), (0.05, 64), (0.1, 32), (0.1, 64)]
  first, *others = [snapshot(*profile) for profile in profiles]
  model = applied(first, {str(n): other for n, other in enumerate(others, 1)})
  weights = post_hoc_weights(profiles, (0.08, 64))
  expected = sum(w * params(n)["out"]["bias"] for n, w in enumerate(weights.tolist()))
  assert isinstance(expected, jnp.ndarray)
  np.testing.assert_allclose(model.params["out"]["bias"], expected, atol=1e-6)


@pytest.mark.parametrize(
  ("other", "message"),
  [
    (snapshot(0.1, 64, kind="exponential"), "1 is no power-function average"),
    (models.metadata(CONFIG), "1 is no power-function average"),
    (snapshot(0.1, 64, seed=1), "1 is of another run than SRC"),
  ],
)
def test_snapshots_of_something_else_are_named(other, message):
  with pytest.raises(ValueError, match=message):
    applied(snapshot(0.05, 32), {"1": other})
  model = dataclasses.replace(snapshot(0.05, 32), provenance=())
  with pytest.raises(ValueError, match="SRC is no power-function average"):
    applied(model, {"1": snapshot(0.1, 64)})
