"""DPM-Solver++, against the reference, exact flows and exact denoisers."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixsigma_jax.diffusion.guidance import guide
from pixsigma_jax.diffusion.schedule import linear_schedule
from pixsigma_jax.diffusion.solvers import SolverTable, dpm_solver_pp, solve

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "samplers.npz"
SCHEDULE = linear_schedule()
FINALS = ("reference", "diffusers")


def scales(schedule, timestep):
  """α and σ at a fraction of a timestep: log α is linear between timesteps."""
  knots = np.arange(schedule.num_timesteps, dtype=np.float32)
  log_alpha_bar = np.log(schedule.alpha_bar).astype(np.float32)
  now = jnp.interp(timestep, knots, log_alpha_bar)
  return jnp.exp(now / 2), jnp.sqrt(-jnp.expm1(now))


@pytest.mark.parametrize("num_steps", [5, 14, 20])
def test_reference_mode_makes_the_references_samples(num_steps):
  golden = np.load(GOLDEN)
  mixing = jnp.asarray(golden["A"])

  def denoise(latents, timestep, caption):
    # The closed-form toy network that the reference's sampler was run on.
    wave = jnp.sin(timestep / 170)
    mixed = jnp.einsum("oc,bchw->bohw", mixing, latents)
    level = caption.mean(axis=(1, 2, 3), keepdims=True)
    return mixed + 0.9 * latents * (0.6 + 0.1 * wave) + 0.3 * level + 0.05 * wave

  conditions = [jnp.asarray(golden[name]) for name in ("uncond", "cond")]

  def guided(latents, timestep):
    halves = (denoise(latents, timestep, c) for c in conditions)
    return guide(*halves, 4.5)

  table = dpm_solver_pp(SCHEDULE, num_steps)
  latents = solve(guided, jnp.asarray(golden["z"]), table)

  # 1e-6 of the length of the batch as a vector. The reference rounds its schedule to
  # float32, which alone moves its samples by 7e-7 of that from the float64 schedule.
  expected = golden[f"dpm{num_steps}"]
  error = np.linalg.norm(latents - expected) / np.linalg.norm(expected)
  assert error < 1e-6
  # Of the range 0 … 999, the reference's times are rounded to one part in 1e7.
  np.testing.assert_allclose(
    table.timesteps, golden[f"dpm{num_steps}.t_in"], rtol=0, atol=1e-4
  )


def test_diffusers_mode_calls_the_network_at_the_published_timesteps():
  twenty = [999, 949, 899, 849, 799, 749, 699, 649, 599, 549]
  twenty += [500, 450, 400, 350, 300, 250, 200, 150, 100, 50]
  assert dpm_solver_pp(SCHEDULE, 20, "diffusers").timesteps.tolist() == twenty
  assert dpm_solver_pp(SCHEDULE, 4, "diffusers").timesteps.tolist() == [
    999,
    749,
    500,
    250,
  ]
  # Every timestep but 0, once: there is no finer grid of whole timesteps.
  finest = dpm_solver_pp(SCHEDULE, 999, "diffusers").timesteps
  np.testing.assert_array_equal(finest, np.arange(999, 0, -1))


def columns(*args):
  """A table as numpy, where a test may compute in float64."""
  return SolverTable(*map(np.asarray, dpm_solver_pp(*args)))


@settings(max_examples=50)
@given(num_steps=st.integers(1, 300), final=st.sampled_from(FINALS))
def test_every_step_carries_clean_latents_and_noise_to_the_next_time(num_steps, final):
  # If x_0 is known and stays, α x_0 + σ ε must become α' x_0 + σ' ε at each step,
  # for any x_0 and ε: two equations that hold row by row.
  table = columns(SCHEDULE, num_steps, final)
  ends = {"reference": (np.sqrt(0.9999), np.sqrt(1e-4)), "diffusers": (1.0, 0.0)}
  next_signal = np.append(table.signal_scale[1:], ends[final][0])
  next_noise = np.append(table.noise_scale[1:], ends[final][1])

  clean = table.carry * table.signal_scale + table.current + table.previous
  # 1e-6 relative to the numbers added: current and previous are of opposite sign.
  scale = 1 + abs(table.current)
  np.testing.assert_array_less(abs(clean - next_signal) / scale, 1e-6)
  np.testing.assert_allclose(table.carry * table.noise_scale, next_noise, rtol=1e-6)


@settings(max_examples=50)
@given(num_steps=st.integers(1, 300), final=st.sampled_from(FINALS))
def test_tables_walk_from_the_noisiest_time_down_in_float32(num_steps, final):
  table = columns(SCHEDULE, num_steps, final)
  for column in table:
    assert column.shape == (num_steps,)
    assert column.dtype == np.float32
    assert np.isfinite(column).all()
  assert table.timesteps[0] == 999
  assert (np.diff(table.timesteps) < 0).all()
  assert (np.diff(table.signal_scale) > 0).all()
  assert table.previous[0] == 0  # there is no x_0 before the first


@pytest.mark.parametrize("final", FINALS)
def test_the_network_is_told_the_time_its_latents_have(final):
  table = columns(SCHEDULE, 7, final)
  signal_scale, noise_scale = scales(SCHEDULE, jnp.asarray(table.timesteps))
  np.testing.assert_allclose(table.signal_scale, signal_scale, rtol=2e-6)
  np.testing.assert_allclose(table.noise_scale, noise_scale, rtol=2e-6)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 20])
@pytest.mark.parametrize("final", FINALS)
def test_an_exact_denoiser_arrives_whatever_the_number_of_steps(num_steps, final):
  rng = np.random.default_rng(0)
  clean, start = (
    jnp.asarray(rng.normal(size=(2, 5, 4)), jnp.float32) for _ in range(2)
  )

  def denoise(noisy_latents, timestep):
    signal_scale, noise_scale = scales(SCHEDULE, timestep)
    return (noisy_latents - signal_scale * clean) / noise_scale

  latents = solve(denoise, start, dpm_solver_pp(SCHEDULE, num_steps, final))

  if final == "diffusers":
    expected = clean
  else:  # timestep 0, where alpha_bar is 0.9999, with the noise that was there
    alpha_bar = SCHEDULE.alpha_bar[-1]
    noise = (start - np.sqrt(alpha_bar) * clean) / np.sqrt(1 - alpha_bar)
    expected = np.sqrt(0.9999) * clean + np.sqrt(1e-4) * noise
  # At the first step x_0 is a difference divided by α = 1/157: 157 float32 roundings.
  np.testing.assert_allclose(latents, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("final", FINALS)
def test_a_single_step_is_first_order(final):
  start = jnp.array([[0.3, -1.2]])
  noise = jnp.array([[0.1, -0.9]])
  latents = solve(lambda *_: noise, start, dpm_solver_pp(SCHEDULE, 1, final))

  alpha_bar, end = SCHEDULE.alpha_bar[-1], {"reference": 0.9999, "diffusers": 1.0}
  clean = (start - np.sqrt(1 - alpha_bar) * noise) / np.sqrt(alpha_bar)
  # DDIM's step, which is what first order means here.
  expected = np.sqrt(end[final]) * clean + np.sqrt(1 - end[final]) * noise
  # x_0 is of size 50 here.
  np.testing.assert_allclose(latents, expected, rtol=1e-5, atol=1e-4)


def gaussian_error(schedule, num_steps):
  """Distance from the exact end of the flow, for images drawn from N(0.4, 0.7²)."""
  mean, spread = 0.4, 0.7
  start = jnp.linspace(-2, 2, 5)

  def deviation(signal_scale, noise_scale):
    return (signal_scale**2 * spread**2 + noise_scale**2) ** 0.5

  def denoise(noisy_latents, timestep):
    # The best estimate of ε when x_0 is Gaussian: linear in x_t.
    signal_scale, noise_scale = scales(schedule, timestep)
    centred = noisy_latents - signal_scale * mean
    return noise_scale * centred / deviation(signal_scale, noise_scale) ** 2

  # The flow keeps how many deviations a point lies from the mean.
  first, last = ((schedule.signal_scale[t], schedule.noise_scale[t]) for t in (-1, 0))
  quantile = (start - first[0] * mean) / deviation(*first)
  exact = last[0] * mean + deviation(*last) * quantile

  latents = solve(denoise, start, dpm_solver_pp(schedule, num_steps))
  return float(abs(latents - exact).max())


def test_the_error_on_a_gaussian_falls_with_the_square_of_the_step():
  # A schedule that ends with a third of noise: its steps in λ are of like length, so
  # 8 steps are many. One first-order step at each end adds one error of order h²,
  # which leaves the order of the whole at 2.
  schedule = linear_schedule(10, 0.1, 0.5)
  steps = np.array([8, 16, 32, 64])
  errors = [gaussian_error(schedule, int(n)) for n in steps]

  assert min(errors) > 1e-5  # far above float32's rounding, or the slope means nothing
  slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
  assert 1.8 < slope < 2.2


def test_published_step_counts_are_close_on_the_published_schedule():
  # No slope here: the time grid's last step spans a λ of 3 whatever the usual count.
  errors = [gaussian_error(SCHEDULE, n) for n in (5, 10, 20, 40)]
  assert errors == sorted(errors, reverse=True)
  assert errors[2] < 0.02


def test_one_compilation_serves_every_step_and_every_table_of_a_length():
  traces = []

  def denoise(noisy_latents, timestep):
    assert timestep.shape == ()
    assert timestep.dtype == jnp.float32
    traces.append(timestep)
    return (noisy_latents * 0.5).astype(jnp.bfloat16)

  run = jax.jit(lambda start, table: solve(denoise, start, table))
  start = jnp.ones((1, 3, 4), jnp.bfloat16)
  results = [run(start, dpm_solver_pp(SCHEDULE, 6, final)) for final in FINALS]

  assert len(traces) == 1
  assert all(latents.dtype == jnp.float32 for latents in results)
  assert not jnp.array_equal(*results)


def test_says_what_it_cannot_tabulate():
  with pytest.raises(ValueError, match="at least 1 step, not num_steps=0"):
    dpm_solver_pp(SCHEDULE, 0)
  with pytest.raises(ValueError, match=r"num_steps=1000 does not fit .* at most 999"):
    dpm_solver_pp(SCHEDULE, 1000, "diffusers")
  with pytest.raises(ValueError, match='final="karras" must be one of: reference, dif'):
    dpm_solver_pp(SCHEDULE, 20, "karras")
