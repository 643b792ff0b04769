"""Tables of the samplers: where they call the network, and what a step may not lose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixsigma_jax.diffusion.solver_tables import (
  SolverTable,
  ddim,
  dmd,
  dpm_solver_2s,
  dpm_solver_pp,
  euler,
  heun,
  iddpm,
  lcm,
  sa_solver,
  tcd,
)
from pixsigma_jax.diffusion.solvers import (
  KARRAS_SAMPLERS,
  SAMPLERS,
  TIMESTEPS_SAMPLERS,
)
from tests.diffusion.denoisers import SCHEDULE, scales

# Signal and noise scales that a sampler ends with: no noise, or that of timestep 0.
CLEAN, FIRST = (1.0, 0.0), (0.9999**0.5, 1e-4**0.5)
ENDS = dict.fromkeys(SAMPLERS, CLEAN) | {"dpm++-reference": FIRST}
ENDS |= {"sa-solver": FIRST, "tcd": FIRST}
# The fewest steps that a sampler takes, and the most (of those that are tried).
COUNTS = dict.fromkeys(SAMPLERS, (1, 300))
COUNTS |= {"iddpm": (2, 300), "lcm": (1, 50), "tcd": (1, 50), "dmd": (1, 1)}
# Samplers that let the network see times between two timesteps of the schedule.
BETWEEN = ("euler", "euler-ancestral", "heun")

calls = st.sampled_from(list(SAMPLERS)).flatmap(
  lambda name: st.tuples(st.just(name), st.integers(*COUNTS[name]))
)


def columns(name, num_steps, **times):
  """A table as numpy, where a test may compute in float64; zeros for what it lacks."""
  table = SAMPLERS[name](SCHEDULE, num_steps, **times)
  zeros = np.zeros(len(table.timesteps))
  return SolverTable(*(zeros if x is None else np.asarray(x) for x in table))


def a_few(name):
  return columns(name, min(7, COUNTS[name][1]))


# ------------------------------------------------------------------- what holds for all


@settings(max_examples=150)
@given(calls)
def test_every_step_leaves_as_much_signal_and_noise_as_the_next_time_has(call):
  assert_consistent(call[0], columns(*call))


@settings(max_examples=60)
@given(st.sampled_from(KARRAS_SAMPLERS), st.integers(1, 60))
def test_so_does_every_step_between_noise_levels_of_karras(name, num_steps):
  assert_consistent(name, columns(name, num_steps, use_karras_sigmas=True))


@settings(max_examples=60)
@given(
  st.sampled_from(TIMESTEPS_SAMPLERS),
  # An LCM's consistency function is another below the timesteps it has learned.
  st.lists(st.integers(19, 999), min_size=1, max_size=12, unique=True),
)
def test_so_does_every_step_between_timesteps_of_ones_own(name, timesteps):
  falling = sorted(timesteps, reverse=True)
  table = columns(name, 20, timesteps=falling)
  # Heun's method calls the network twice at each but the first.
  np.testing.assert_array_equal(list(dict.fromkeys(table.timesteps)), falling)
  assert_consistent(name, table)


def assert_consistent(name, table):
  # If x_0 is known and stays, α x_0 + σ ε must become α' x_0 + σ' ε at each step for
  # any x_0 and ε: two equations that hold row by row. New noise is independent of ε,
  # so variances add up; a learned variance may lie at the posterior's.
  end = ENDS[name]
  next_signal = np.append(table.signal_scale[1:], end[0])
  next_noise = np.append(table.noise_scale[1:], end[1])

  # LCM keeps up to 7e-6 of x_t, at timestep 19, on top of what it should.
  kept = 7e-6 if name == "lcm" else 0

  from_clean = table.current + table.previous + table.earlier
  signal = table.carry * table.signal_scale + from_clean
  # 1e-6 relative to the numbers added, which may be of opposite sign.
  scale = 1 + abs(table.current) + abs(table.previous) + abs(table.earlier)
  np.testing.assert_array_less(abs(signal - next_signal) / scale, 1e-6 + kept)
  noise = np.hypot(table.carry * table.noise_scale, table.fresh)
  np.testing.assert_allclose(noise, next_noise, rtol=1e-6, atol=kept)


@settings(max_examples=100)
@given(calls)
def test_tables_walk_from_the_noisiest_time_down_in_float32(call):
  name, num_steps = call
  table = SAMPLERS[name](SCHEDULE, num_steps)
  table = jax.tree.map(np.asarray, table)
  for column in jax.tree.leaves(table):
    assert column.shape == (2 * num_steps - 1 if name == "heun" else num_steps,)
    assert column.dtype == np.float32
    assert np.isfinite(column).all()
  assert table.timesteps[0] == (400 if name == "dmd" else 999)
  timesteps, signal_scale = table.timesteps, table.signal_scale
  if name == "heun":  # twice at each but the first
    np.testing.assert_array_equal(timesteps[1::2], timesteps[2::2])
    timesteps, signal_scale = timesteps[::2], signal_scale[::2]
  assert (np.diff(timesteps) < 0).all()
  assert (np.diff(signal_scale) > 0).all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_network_is_told_the_time_its_latents_have(name):
  table = a_few(name)
  signal_scale, noise_scale = scales(SCHEDULE, jnp.asarray(table.timesteps))
  # Between timesteps these have σ/α linear, and `scales` log α.
  rtol = 1e-4 if name in BETWEEN else 2e-6
  np.testing.assert_allclose(table.signal_scale, signal_scale, rtol=rtol)
  np.testing.assert_allclose(table.noise_scale, noise_scale, rtol=rtol)


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_step_uses_clean_latents_that_are_not_there_yet(name):
  table = a_few(name)
  assert table.previous[0] == 0
  assert (table.earlier[:2] == 0).all()


def test_a_sampler_has_no_more_columns_than_it_needs():
  extra = {
    name: [
      column
      for column, values in SAMPLERS[name](SCHEDULE, COUNTS[name][0])._asdict().items()
      if values is not None
    ][5:]
    for name in SAMPLERS
  }
  assert extra == {
    "dpm++": ["previous"],
    "dpm++-reference": ["previous"],
    "dpm++-2s": ["previous"],
    "dpm++-sde": ["previous", "fresh"],
    "unipc": ["previous", "earlier"],
    "euler": [],
    "euler-ancestral": ["fresh"],
    "heun": ["previous"],
    "ddim": [],
    "iddpm": ["fresh", "spread"],
    "sa-solver": ["previous", "earlier", "fresh"],
    "lcm": ["fresh"],
    "tcd": ["fresh"],
    "dmd": [],
  }


# ---------------------------------------------------------- where the network is called


def timesteps(table):
  return table.timesteps.tolist()


def test_diffusers_mode_calls_the_network_at_the_published_timesteps():
  twenty = [999, 949, 899, 849, 799, 749, 699, 649, 599, 549]
  twenty += [500, 450, 400, 350, 300, 250, 200, 150, 100, 50]
  assert timesteps(dpm_solver_pp(SCHEDULE, 20, "diffusers")) == twenty
  assert timesteps(dpm_solver_pp(SCHEDULE, 4, "diffusers")) == [999, 749, 500, 250]
  # Every timestep but 0, once: there is no finer grid of whole timesteps.
  finest = dpm_solver_pp(SCHEDULE, 999, "diffusers").timesteps
  np.testing.assert_array_equal(finest, np.arange(999, 0, -1))


def test_sa_solver_calls_the_network_where_the_reference_dpm_solver_does():
  ours = sa_solver(SCHEDULE, 20, 1.0).timesteps
  np.testing.assert_array_equal(ours, dpm_solver_pp(SCHEDULE, 20).timesteps)
  np.testing.assert_allclose(ours[:3], [999, 949.05, 899.1], rtol=1e-7)


def test_sa_solver_adds_noise_between_two_and_eight_tenths_of_the_time():
  table = columns("sa-solver", 100)
  # The time that a step ends at; its timestep is 1 less than its thousandths.
  ends = (np.append(table.timesteps[1:], 0) + 1) / 1000
  np.testing.assert_array_equal(table.fresh > 0, (ends >= 0.2) & (ends <= 0.8))
  assert 50 < (table.fresh > 0).sum() < 70
  assert (np.asarray(sa_solver(SCHEDULE, 100, 0.0).fresh) == 0).all()


def test_ddim_ends_a_stride_before_the_clean_image():
  assert timesteps(ddim(SCHEDULE, 20)) == list(range(999, 0, -50))
  assert timesteps(ddim(SCHEDULE, 3)) == [999, 666, 332]
  assert timesteps(ddim(SCHEDULE, 1000)) == list(range(999, -1, -1))


def test_samplers_in_noise_levels_call_the_network_down_to_timestep_0():
  for name in ("euler", "euler-ancestral"):
    np.testing.assert_allclose(
      timesteps(SAMPLERS[name](SCHEDULE, 4)), [999, 666, 333, 0]
    )
  assert timesteps(heun(SCHEDULE, 3)) == [999, 499.5, 499.5, 0, 0]
  assert timesteps(euler(SCHEDULE, 1)) == [999]  # not 0, where diffusers begins


def test_noise_levels_of_karras_are_even_in_their_seventh_root():
  table = columns("euler", 9, use_karras_sigmas=True)
  roots = (table.noise_scale / table.signal_scale) ** (1 / 7)
  # 1e-5: the seventh root of float32, of a ratio of 157 at most.
  np.testing.assert_allclose(np.diff(roots), np.diff(roots).mean(), rtol=1e-5)
  assert abs(table.timesteps[-1]) < 1e-9
  rounded = timesteps(dpm_solver_2s(SCHEDULE, 9, use_karras_sigmas=True))
  assert rounded == np.round(table.timesteps).tolist()


def test_tcd_spreads_its_steps_over_the_fifty_timesteps_of_an_lcm():
  assert timesteps(tcd(SCHEDULE, 4)) == [999, 759, 499, 259]
  assert timesteps(tcd(SCHEDULE, 50)) == list(range(999, 0, -20))
  fresh = np.asarray(tcd(SCHEDULE, 4, gamma=0.0).fresh)
  np.testing.assert_array_equal(fresh, 0)


def test_iddpm_takes_both_ends_and_even_strides_rounded_as_python_rounds():
  assert timesteps(iddpm(SCHEDULE, 10)) == list(range(999, -1, -111))
  start = timesteps(iddpm(SCHEDULE, 100))[:-9:-1]
  assert start == [0, 10, 20, 30, 40, 50, 61, 71]
  # In the first three a sum ends beside 499.5, which the product hits.
  for num_steps in (21, 23, 31, 1000):
    position, expected = 0.0, []
    for _ in range(num_steps):
      expected.append(round(position))
      position += 999 / (num_steps - 1)
    assert timesteps(iddpm(SCHEDULE, num_steps))[::-1] == expected


def test_iddpm_over_all_timesteps_is_the_training_process_backwards():
  table = columns("iddpm", 1000)
  backwards = slice(None, None, -1)
  expected = {
    "carry": SCHEDULE.posterior_mean_noisy,
    "current": SCHEDULE.posterior_mean_clean,
  }
  for name, column in expected.items():
    np.testing.assert_allclose(getattr(table, name)[backwards], column, rtol=1e-6)
  # From the posterior's deviation to beta's, but for timestep 0, which adds no noise.
  fresh, spread = table.fresh[backwards], table.spread[backwards]
  assert fresh[0] == spread[0] == 0
  deviation = np.exp(SCHEDULE.posterior_log_variance / 2)[1:]
  np.testing.assert_allclose(fresh[1:], deviation, rtol=1e-6)
  largest = fresh[1:] * np.exp(spread[1:])
  np.testing.assert_allclose(largest, np.sqrt(SCHEDULE.betas[1:]), rtol=1e-6)


def test_lcm_takes_every_so_many_of_the_fifty_timesteps_it_has_learned():
  assert timesteps(lcm(SCHEDULE, 4)) == [999, 759, 519, 279]
  assert timesteps(lcm(SCHEDULE, 1)) == [999]
  assert timesteps(lcm(SCHEDULE, 50)) == list(range(999, 0, -20))


def test_dmd_calls_the_network_once():
  assert timesteps(dmd(SCHEDULE, 1)) == [400]


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
  ("name", "num_steps", "message"),
  [
    ("dpm++", 0, "at least 1 step, not num_steps=0"),
    ("dpm++", 1000, "num_steps=1000 does not fit .* at most 999"),
    ("dpm++-reference", 0, "at least 1 step, not num_steps=0"),
    ("ddim", 0, "at least 1 step, not num_steps=0"),
    ("ddim", 1001, "num_steps=1001 does not fit .* at most 1000"),
    ("iddpm", 1, "at least 2 steps, not num_steps=1"),
    ("iddpm", 1001, "num_steps=1001 does not fit .* at most 1000"),
    ("sa-solver", 0, "at least 1 step, not num_steps=0"),
    ("dpm++-2s", 1000, "num_steps=1000 does not fit .* at most 999"),
    ("euler", 0, "at least 1 step, not num_steps=0"),
    ("heun", 0, "at least 1 step, not num_steps=0"),
    ("tcd", 51, "num_steps=51 does not fit .* at most 50"),
    ("lcm", -1, "at least 1 step, not num_steps=-1"),
    ("lcm", 51, "num_steps=51 does not fit .* at most 50"),
    ("dmd", 2, "DMD student takes 1 step, not num_steps=2"),
    ("dmd", 0, "DMD student takes 1 step, not num_steps=0"),
  ],
)
def test_says_how_many_steps_there_can_be(name, num_steps, message):
  with pytest.raises(ValueError, match=message):
    SAMPLERS[name](SCHEDULE, num_steps)


def test_says_where_dpm_solver_can_end():
  with pytest.raises(ValueError, match='final="karras" must be one of: diffusers, ref'):
    dpm_solver_pp(SCHEDULE, 20, "karras")
  with pytest.raises(ValueError, match='Only final="diffusers" takes timesteps or use'):
    dpm_solver_pp(SCHEDULE, 20, use_karras_sigmas=True)


@pytest.mark.parametrize(
  "timesteps", [[], [999, 999], [10, 20], [1000, 500], [500, -1]]
)
@pytest.mark.parametrize("name", TIMESTEPS_SAMPLERS)
def test_timesteps_that_do_not_fall_or_are_not_the_schedules_are_refused(
  name, timesteps
):
  with pytest.raises(
    ValueError, match="must fall from step to step and lie in 0 … 999"
  ):
    SAMPLERS[name](SCHEDULE, 20, timesteps=timesteps)
