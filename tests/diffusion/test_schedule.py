"""The noise schedule, against the reference's tables and against Bayes."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixsigma_jax.diffusion.schedule import Schedule, gather, linear_schedule

# Tables of the published PyTorch code: golden/README.md says which.
GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "losses.npz"


def test_tables_are_those_of_the_reference():
  golden, schedule = np.load(GOLDEN), linear_schedule()
  # Both sides are float64; only the order of a thousand products may differ.
  np.testing.assert_allclose(schedule.alpha_bar, golden["alphas_cumprod"], rtol=1e-12)
  np.testing.assert_allclose(
    schedule.posterior_log_variance, golden["plvc"], rtol=1e-12
  )


@pytest.mark.parametrize(
  ("timestep", "alpha_bar"),
  [
    (0, 0.9999),
    (1, 0.9997800920720721),
    (100, 0.8951415908975365),
    (249, 0.5240853738253606),
    (250, 0.5214230306185275),
    (400, 0.19357200966664662),
    (500, 0.07779665836502389),
    (999, 4.035829765375676e-05),
  ],
)
def test_alpha_bar_has_the_printed_values(timestep, alpha_bar):
  np.testing.assert_allclose(
    linear_schedule().alpha_bar[timestep], alpha_bar, rtol=1e-12
  )


def test_ends_of_the_schedule_have_the_printed_values():
  schedule = linear_schedule()
  # The tolerance is the number of digits that were printed.
  log_betas = np.log(schedule.betas)[[0, 1, 999]]
  np.testing.assert_allclose(log_betas, [-9.21034037, -9.02868637, -3.91202301], 2e-9)
  ends = schedule.posterior_log_variance[[0, 1, 2, 999]]
  printed = [-9.81672514, -9.81672514, -9.3671215, -3.91202383]
  np.testing.assert_allclose(ends, printed, rtol=2e-9)
  half_log_snr = np.log(schedule.snr[[0, 999]]) / 2
  np.testing.assert_allclose(half_log_snr, [4.60512, -5.05884], rtol=2e-6)
  ratio = (schedule.noise_scale / schedule.signal_scale)[[0, 999]]
  np.testing.assert_allclose(ratio, [0.0100005, 157.407], rtol=5e-6)


def test_noise_added_step_by_step_adds_up_to_the_closed_form():
  schedule = linear_schedule(50, 1e-3, 0.2)
  scale, variance = 1.0, 0.0
  for beta, signal, noise in zip(
    schedule.betas, schedule.signal_scale, schedule.noise_scale, strict=True
  ):
    scale, variance = np.sqrt(1 - beta) * scale, (1 - beta) * variance + beta
    np.testing.assert_allclose([signal, noise**2], [scale, variance], rtol=1e-12)


def test_posterior_follows_from_bayes_rule():
  schedule = linear_schedule()
  # q(x_{t-1} | x_t, x_0) ∝ q(x_t | x_{t-1}) q(x_{t-1} | x_0): precisions add up, and
  # means are weighed by precision. From timestep 1; before 0 there is no noise.
  beta, step = schedule.betas[1:], np.sqrt(1 - schedule.betas[1:])
  signal, variance = schedule.signal_scale[:-1], schedule.noise_scale[:-1] ** 2
  precision = step**2 / beta + 1 / variance

  # 1e-9: the tables take differences of 1 - alpha_bar near 1e-4.
  np.testing.assert_allclose(
    np.exp(schedule.posterior_log_variance[1:]), 1 / precision, rtol=1e-9
  )
  np.testing.assert_allclose(
    schedule.posterior_mean_noisy[1:], step / beta / precision, rtol=1e-9
  )
  np.testing.assert_allclose(
    schedule.posterior_mean_clean[1:], signal / variance / precision, rtol=1e-9
  )


def test_the_first_timestep_points_at_the_clean_image_alone():
  schedule = linear_schedule()
  np.testing.assert_allclose(schedule.posterior_mean_clean[0], 1, rtol=1e-12)
  assert schedule.posterior_mean_noisy[0] == 0


def test_a_traced_timestep_gets_the_table_rounded_once():
  schedule = linear_schedule()
  timesteps = jnp.array([0, 999, 3, 3])
  values = jax.jit(lambda t: gather(schedule.noise_scale, t, 3))(timesteps)
  expected = schedule.noise_scale[[0, 999, 3, 3]].astype(np.float32)
  assert values.shape == (4, 1, 1)
  np.testing.assert_array_equal(values[:, 0, 0], expected)


def test_a_schedule_can_be_a_static_argument():
  schedule = linear_schedule()
  first = jax.jit(lambda s: jnp.float32(s.alpha_bar[0]), static_argnums=0)
  assert first(schedule) == np.float32(0.9999)


def test_refuses_betas_that_are_no_variances():
  with pytest.raises(ValueError, match=r"between 0 and 1.*beta\[2\] is 1\.5"):
    Schedule(np.array([0.1, 0.2, 1.5]))
  with pytest.raises(ValueError, match=r"beta\[0\] is nan"):
    Schedule(np.array([np.nan, 0.2]))
  with pytest.raises(ValueError, match="at least 2 betas, not 1"):
    linear_schedule(num_timesteps=1)
