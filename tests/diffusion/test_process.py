"""Noising, and changing between what a network can predict."""

import itertools
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from pixsigma_jax.diffusion.process import PREDICTIONS, add_noise, convert
from pixsigma_jax.diffusion.schedule import linear_schedule

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "losses.npz"
SCHEDULE = linear_schedule()
EVERY_TIMESTEP = jnp.arange(SCHEDULE.num_timesteps)
PAIRS = list(itertools.product(PREDICTIONS, repeat=2))


def normal(seed, shape=(1000, 3)):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def truth():
  """One image's x_0, ε and v at every timestep, in float64, and its x_t."""
  latents, noise = (np.asarray(normal(seed), np.float64) for seed in (0, 1))
  alpha = np.sqrt(np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000)))[:, None]
  sigma = np.sqrt(1 - alpha**2)
  true = {
    "noise": noise,
    "latents": latents,
    "velocity": alpha * noise - sigma * latents,
  }
  return true, alpha * latents + sigma * noise


def rounding():
  """What float32 can promise: x_0 and ε are divided by α and σ, as small as 0.006."""
  return 1e-6 * (1 / SCHEDULE.signal_scale + 1 / SCHEDULE.noise_scale)[:, None]


def test_noising_is_that_of_the_reference():
  golden = np.load(GOLDEN)
  noisy = add_noise(
    SCHEDULE,
    jnp.asarray(golden["x0"]),
    jnp.asarray(golden["noise"]),
    jnp.asarray(golden["t"].astype(np.int32)),
  )
  np.testing.assert_allclose(noisy, golden["x_t"], rtol=1e-6, atol=1e-6)


def test_noising_keeps_the_variance():
  # x_0 and ε of unit length at right angles: x_t has unit length at any timestep.
  latents = jnp.tile(jnp.array([[1.0, 0.0]]), (1000, 1))
  noise = jnp.tile(jnp.array([[0.0, 1.0]]), (1000, 1))
  noisy = add_noise(SCHEDULE, latents, noise, EVERY_TIMESTEP)
  np.testing.assert_allclose(jnp.linalg.norm(noisy, axis=1), 1, rtol=1e-6)


def test_noise_takes_over_as_time_goes_on():
  ones, zeros = jnp.ones((1000, 1)), jnp.zeros((1000, 1))
  signal = add_noise(SCHEDULE, ones, zeros, EVERY_TIMESTEP)[:, 0]
  noise = add_noise(SCHEDULE, zeros, ones, EVERY_TIMESTEP)[:, 0]
  assert (jnp.diff(signal) < 0).all()
  # σ is within 2e-5 of 1 at the end, where float32 has few numbers left.
  assert (jnp.diff(noise) >= 0).all()
  assert noise[0] < 0.011
  assert signal[-1] < 0.007


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_perfect_prediction_is_perfect_in_any_form(truth, source, target):
  true, noisy = truth
  converted = convert(
    SCHEDULE,
    jnp.asarray(true[source], jnp.float32),
    noisy_latents=jnp.asarray(noisy, jnp.float32),
    timesteps=EVERY_TIMESTEP,
    source=source,
    target=target,
  )
  assert (abs(converted - true[target]) < rounding()).all()


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_there_and_back_is_where_it_was(source, target):
  prediction, noisy = normal(2), normal(3)  # nothing that a network said is special
  where = {"noisy_latents": noisy, "timesteps": EVERY_TIMESTEP}
  there = convert(SCHEDULE, prediction, **where, source=source, target=target)
  back = convert(SCHEDULE, there, **where, source=target, target=source)
  assert (abs(back - prediction) < rounding()).all()


def test_velocity_gives_clean_latents_and_noise_without_loss(truth):
  true, noisy = truth
  for target in ("latents", "noise"):
    converted = convert(
      SCHEDULE,
      jnp.asarray(true["velocity"], jnp.float32),
      noisy_latents=jnp.asarray(noisy, jnp.float32),
      timesteps=EVERY_TIMESTEP,
      source="velocity",
      target=target,
    )
    # A rotation divides by nothing: 1e-6 at every timestep.
    np.testing.assert_allclose(converted, true[target], rtol=0, atol=1e-6)


def test_half_precision_is_left_at_the_door():
  latents, noise = (normal(seed, (2, 3, 4)).astype(jnp.bfloat16) for seed in (0, 1))
  timesteps = jnp.array([0, 999])
  noisy = add_noise(SCHEDULE, latents, noise, timesteps)
  expected = add_noise(
    SCHEDULE, latents.astype(jnp.float32), noise.astype(jnp.float32), timesteps
  )
  assert noisy.dtype == jnp.float32
  np.testing.assert_array_equal(noisy, expected)
  for source, target in PAIRS:
    converted = convert(
      SCHEDULE,
      noise,
      noisy_latents=latents,
      timesteps=timesteps,
      source=source,
      target=target,
    )
    assert converted.dtype == jnp.float32


@pytest.mark.parametrize("names", [("epsilon", "noise"), ("noise", "epsilon")])
def test_names_the_prediction_it_does_not_know(names):
  source, target = names
  with pytest.raises(ValueError, match='noise, latents, velocity; "epsilon" is none'):
    convert(
      SCHEDULE,
      normal(0, (1, 2)),
      noisy_latents=normal(1, (1, 2)),
      timesteps=jnp.array([5]),
      source=source,
      target=target,
    )
