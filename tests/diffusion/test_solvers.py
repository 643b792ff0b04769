"""Samplers at work, against the reference, exact flows and exact denoisers."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixsigma_jax.diffusion.schedule import linear_schedule
from pixsigma_jax.diffusion.solver_tables import (
  ddim,
  dpm_solver_pp,
  iddpm,
  lcm,
  sa_solver,
)
from pixsigma_jax.diffusion.solvers import SAMPLERS, Prediction, solve
from tests.diffusion import denoisers
from tests.diffusion.denoisers import SCHEDULE, scales

FINALS = ("reference", "diffusers")
# A schedule that ends with a third of noise: its steps in λ are of like length, so
# that 8 steps are many.
SHORT = linear_schedule(10, 0.1, 0.5)
# A schedule of many whole timesteps that ends with a twelfth of signal.
MILD = linear_schedule(1000, 1e-4, 5e-3)


# ------------------------------------------------------------------------ the reference


@pytest.mark.parametrize(
  ("name", "table", "guidance_scale", "tolerance"),
  [
    ("dpm5", dpm_solver_pp(SCHEDULE, 5), 4.5, 1e-6),
    ("dpm14", dpm_solver_pp(SCHEDULE, 14), 4.5, 1e-6),
    ("dpm20", dpm_solver_pp(SCHEDULE, 20), 4.5, 1e-6),
    ("sa25_eta0", sa_solver(SCHEDULE, 25, 0.0), 4.5, 3e-6),
    ("sa25_eta1", sa_solver(SCHEDULE, 25, 1.0), 4.5, 3e-6),
    ("iddpm10", iddpm(SCHEDULE, 10), None, 3e-6),
  ],
)
def test_samples_are_those_of_the_reference(name, table, guidance_scale, tolerance):
  golden = np.load(denoisers.GOLDEN)
  denoise = denoisers.closed_form(golden, guidance_scale)
  # The reference's SA-Solver draws noise once before its first step, for nothing.
  first = 1 if name.startswith("sa") else 0
  sequence = jnp.asarray(golden["noise_seq"])[first:]
  latents = solve(denoise, jnp.asarray(golden["z"]), table, lambda i: sequence[i])

  # Of the length of the batch as a vector. The reference rounds its schedule to
  # float32, which alone moves the samples of its DPM-Solver by 7e-7 of that from the
  # float64 schedule; the others take more roundings a step, and were 1.2e-6 away.
  error = np.linalg.norm(latents - golden[name]) / np.linalg.norm(golden[name])
  assert error < tolerance
  if f"{name}.t_in" in golden:
    # Of the range 0 … 999, the reference's times are rounded to one part in 1e7.
    called = golden[f"{name}.t_in"]
    np.testing.assert_allclose(table.timesteps, called, rtol=0, atol=1e-4)


# -------------------------------------------------------------------- an exact denoiser

CASES = [
  *itertools.product(["dpm++", "dpm++-reference", "ddim", "lcm"], [1, 2, 20]),
  *itertools.product(["sa-solver without noise"], [1, 2, 20]),
  ("iddpm", 2),
  ("iddpm", 20),
  ("dmd", 1),
]


@pytest.mark.parametrize(("name", "num_steps"), CASES)
def test_an_exact_denoiser_arrives_whatever_the_number_of_steps(name, num_steps):
  rng = np.random.default_rng(0)
  clean, start = (
    jnp.asarray(rng.normal(size=(2, 5, 4)), jnp.float32) for _ in range(2)
  )
  noise = jnp.asarray(rng.normal(size=(20, 2, 5, 4)), jnp.float32)
  if name == "sa-solver without noise":
    table = sa_solver(SCHEDULE, num_steps, 0.0)
  else:
    table = SAMPLERS[name](SCHEDULE, num_steps)

  latents = solve(
    denoisers.exact(SCHEDULE, clean),
    start,
    table,
    lambda number: noise[number],
  )

  if name in ("dpm++-reference", "sa-solver without noise"):
    # Timestep 0, where alpha_bar is 0.9999, with the noise that was there.
    alpha_bar = SCHEDULE.alpha_bar[-1]
    noise = (start - np.sqrt(alpha_bar) * clean) / np.sqrt(1 - alpha_bar)
    expected = np.sqrt(0.9999) * clean + np.sqrt(1e-4) * noise
  else:
    expected = clean
  # At the first step x_0 is a difference divided by α = 1/157: 157 float32 roundings.
  np.testing.assert_allclose(latents, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("final", FINALS)
def test_a_single_step_is_first_order(final):
  start = jnp.array([[0.3, -1.2]])
  noise = jnp.array([[0.1, -0.9]])
  table = dpm_solver_pp(SCHEDULE, 1, final)
  latents = solve(lambda *_: Prediction(noise), start, table)

  alpha_bar, end = SCHEDULE.alpha_bar[-1], {"reference": 0.9999, "diffusers": 1.0}
  clean = (start - np.sqrt(1 - alpha_bar) * noise) / np.sqrt(alpha_bar)
  # DDIM's step, which is what first order means here.
  expected = np.sqrt(end[final]) * clean + np.sqrt(1 - end[final]) * noise
  # x_0 is of size 50 here.
  np.testing.assert_allclose(latents, expected, rtol=1e-5, atol=1e-4)


# ---------------------------------------------------------------- orders of convergence


def gaussian_error(schedule, table, end=(1.0, 0.0), from_lowest=False):
  """Distance from the exact end of the flow, for images drawn from N(0.4, 0.7²).

  `end` has the signal and noise scales where the sampler stops; with `from_lowest` the
  flow ends at timestep 0, and what the network sees there follows.
  """
  mean, spread = 0.4, 0.7
  start = jnp.linspace(-2, 2, 5)

  def deviation(signal_scale, noise_scale):
    return (signal_scale**2 * spread**2 + noise_scale**2) ** 0.5

  # The flow keeps how many deviations a point lies from the mean.
  first = schedule.signal_scale[-1], schedule.noise_scale[-1]
  quantile = (start - first[0] * mean) / deviation(*first)
  exact = end[0] * mean + deviation(*end) * quantile
  if from_lowest:
    lowest = schedule.signal_scale[0], schedule.noise_scale[0]
    exact = mean + spread**2 * lowest[0] / deviation(*lowest) * quantile

  denoise = denoisers.gaussian(schedule, mean, spread)
  latents = solve(denoise, start, table, lambda _: jnp.zeros_like(start))
  return float(abs(latents - exact).max())


def first_timestep(schedule):
  return schedule.signal_scale[0], schedule.noise_scale[0]


@pytest.mark.parametrize(
  ("sampler", "schedule", "end", "steps", "order"),
  [
    # One first-order step at each end adds one error of order h², which leaves the
    # order of the whole at 2.
    (dpm_solver_pp, SHORT, first_timestep(SHORT), [8, 16, 32, 64], 2),
    # Its order shows later: from 8 steps on, doubling them lowers the error by 2 to the
    # 1.65, 1.68, 1.81, 1.89.
    (
      functools.partial(sa_solver, eta=0.0),
      SHORT,
      first_timestep(SHORT),
      [32, 64, 128],
      2,
    ),
    (ddim, MILD, (1.0, 0.0), [10, 20, 40, 100], 1),
  ],
  ids=["dpm++", "sa-solver", "ddim"],
)
def test_the_error_on_a_gaussian_falls_with_the_step_to_the_order(
  sampler, schedule, end, steps, order
):
  errors = [gaussian_error(schedule, sampler(schedule, n), end) for n in steps]

  assert min(errors) > 1e-5  # far above float32's rounding, or the slope means nothing
  slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
  assert order - 0.2 < slope < order + 0.2


# UniPC's corrector has one order more than its predictor (Zhao et al. 2023).
@pytest.mark.parametrize(
  ("name", "order"),
  [("dpm++", 2), ("dpm++-2s", 2), ("unipc", 3), ("euler", 1), ("heun", 2)],
)
def test_between_noise_levels_of_karras_every_solver_has_its_order(name, order):
  # Their steps shrink together, where those even in time leave the last ones long in λ.
  # The last, from timestep 0 to no noise, is one call of the network for all.
  steps = [11, 21, 41]
  errors = [
    gaussian_error(
      MILD, SAMPLERS[name](MILD, n, use_karras_sigmas=True), from_lowest=True
    )
    for n in steps
  ]
  assert min(errors) > 1e-5
  slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
  assert order - 0.3 < slope < order + 0.5


def test_published_step_counts_are_close_on_the_published_schedule():
  # No slope here: the time grid's last step spans a λ of 3 whatever the usual count.
  end = first_timestep(SCHEDULE)
  errors = [
    gaussian_error(SCHEDULE, dpm_solver_pp(SCHEDULE, n), end) for n in (5, 10, 20, 40)
  ]
  assert errors == sorted(errors, reverse=True)
  assert errors[2] < 0.02


# ------------------------------------------------------ what fresh noise must amount to


def variance_of_samples(denoise, table, start):
  """Of a sampler whose network is linear, exactly: the sum of its squared answers to
  the start alone and to the fresh noise of each step alone.
  """
  impulses = jnp.eye(len(table.timesteps) + 1)
  latents = solve(denoise, start * impulses[0], table, lambda i: impulses[i + 1])
  return float((np.asarray(latents, np.float64) ** 2).sum())


SPREAD = 0.7


def noisy_variance(alpha_bar):
  return alpha_bar * SPREAD**2 + 1 - alpha_bar


@pytest.mark.parametrize("num_steps", [2, 10, 100])
def test_iddpm_with_the_true_variance_of_a_step_draws_a_gaussian_exactly(num_steps):
  table = iddpm(SCHEDULE, num_steps)
  timesteps = np.asarray(table.timesteps).astype(int)
  alpha_bar = SCHEDULE.alpha_bar[timesteps]
  # For Gaussian images p(x_s | x_t) is Gaussian too: DDPM's posterior (equation 7),
  # made wider by what x_t leaves open of x_0.
  before = np.append(alpha_bar[1:], 1.0)
  beta = 1 - alpha_bar / before
  posterior = beta * (1 - before) / (1 - alpha_bar)
  weight = np.sqrt(before) * beta / (1 - alpha_bar)
  open_variance = SPREAD**2 * (1 - alpha_bar) / noisy_variance(alpha_bar)
  ratio = np.log1p(weight[:-1] ** 2 * open_variance[:-1] / posterior[:-1])
  logits = 2 * ratio / np.log(beta[:-1] / posterior[:-1]) - 1
  logits = jnp.asarray(np.append(logits, 30.0), jnp.float32)  # timestep 0 adds no noise

  linear = denoisers.gaussian(SCHEDULE, 0.0, SPREAD)

  def denoise(noisy_latents, timestep):
    step = jnp.argmin(abs(table.timesteps - timestep))
    noise, _ = linear(noisy_latents, timestep)
    return Prediction(noise, jnp.full_like(noise, logits[step]))

  start = np.sqrt(noisy_variance(alpha_bar[0]))
  variance = variance_of_samples(denoise, table, start)
  # The last step gives the mean of x_0, which lacks what timestep 0 leaves open of it.
  # 1e-4: float32 of x_0 = (x_t - σ ε) / α, a small difference where α is small.
  expected = SPREAD**2 - open_variance[-1]
  np.testing.assert_allclose(variance, expected, rtol=1e-4)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 10])
def test_lcm_with_a_perfect_consistency_function_draws_a_gaussian_exactly(num_steps):
  def denoise(noisy_latents, timestep):
    # The end of the flow from a point: as many deviations from the mean.
    signal_scale, noise_scale = scales(SCHEDULE, timestep)
    deviation = jnp.sqrt(noisy_variance(signal_scale**2))
    clean = SPREAD / deviation * noisy_latents
    return Prediction((noisy_latents - signal_scale * clean) / noise_scale)

  start = np.sqrt(noisy_variance(SCHEDULE.alpha_bar[-1]))
  variance = variance_of_samples(denoise, lcm(SCHEDULE, num_steps), start)
  # 1e-4: as above.
  np.testing.assert_allclose(variance, SPREAD**2, rtol=1e-4)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_the_noise_that_sa_solver_adds_makes_up_for_the_noise_it_removes(eta):
  def error(num_steps):
    denoise = denoisers.gaussian(SHORT, 0.0, SPREAD)
    start = np.sqrt(noisy_variance(SHORT.alpha_bar[-1]))
    variance = variance_of_samples(denoise, sa_solver(SHORT, num_steps, eta), start)
    return variance / noisy_variance(SHORT.alpha_bar[0]) - 1

  # Steps are not exact, but of second order in the end: doubling them from 20 to 80
  # lowers the error by 2 to the 1.76 (η = 0.5) and 1.55 (η = 1).
  errors = [abs(error(n)) for n in (20, 80)]
  assert errors[0] < 0.01
  assert errors[1] < errors[0] / 4**1.5


# ---------------------------------------------------------------------- one compilation


PAIRS = {
  "dpm++": [dpm_solver_pp(SCHEDULE, 6, final) for final in FINALS],
  "ddim": [ddim(SCHEDULE, 6), ddim(MILD, 6)],
  "iddpm": [iddpm(SCHEDULE, 6), iddpm(MILD, 6)],
  "sa-solver": [sa_solver(SCHEDULE, 6, eta) for eta in (0.5, 1.0)],
  "lcm": [lcm(SCHEDULE, 6), lcm(MILD, 6)],
}


@pytest.mark.parametrize("name", PAIRS)
def test_one_compilation_serves_every_step_and_every_table_of_a_length(name):
  traces, asked = [], []

  def denoise(noisy_latents, timestep):
    assert timestep.shape == ()
    assert timestep.dtype == jnp.float32
    traces.append(timestep)
    noise = (noisy_latents * 0.5).astype(jnp.bfloat16)
    return Prediction(noise, noise)

  def fresh_noise(number):
    assert number.shape == ()
    assert number.dtype == jnp.int32
    asked.append(number)
    return jnp.ones((1, 3, 4), jnp.bfloat16)

  run = jax.jit(lambda start, table: solve(denoise, start, table, fresh_noise))
  start = jnp.ones((1, 3, 4), jnp.bfloat16)
  results = [run(start, table) for table in PAIRS[name]]

  assert len(traces) == 1
  assert len(asked) == (0 if PAIRS[name][0].fresh is None else 1)
  assert all(latents.dtype == jnp.float32 for latents in results)
  assert not jnp.array_equal(*results)


# ---------------------------------------------------------------------- what is refused


def test_says_what_a_sampler_lacks():
  start = jnp.ones((1, 3, 4))
  with pytest.raises(ValueError, match="adds noise on its way: give solve"):
    solve(lambda x, _: Prediction(x, x), start, lcm(SCHEDULE, 4))
  with pytest.raises(ValueError, match="variance from the network, and this one has l"):
    solve(lambda x, _: Prediction(x), start, iddpm(SCHEDULE, 4), lambda _: start)
