"""Time grids: where a sampler calls the network, and how noisy latents are there.

All in float64. A grid of N steps has N timesteps, and N + 1 signal and noise scales: of
these and of the end.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pixsigma_jax.diffusion.schedule import Schedule

# Karras et al. 2022, section 3: how much more densely steps lie where noise is low.
_RHO = 7.0


class TimeGrid(NamedTuple):
  """Timesteps `[N]`, and signal and noise scales `[N+1]` at these and at the end."""

  timesteps: np.ndarray
  signal_scale: np.ndarray
  noise_scale: np.ndarray


def reference_grid(schedule: Schedule, num_steps: int) -> TimeGrid:
  """Even times from 1 to 1/T, log α linear between knots (PixArt-Σ's own sampler).

  Time (i + 1)/T belongs to timestep i; the network sees fractions of a timestep.

  Raises:
    ValueError: if `num_steps` is below 1.
  """
  check_steps(num_steps, 1, None)
  total = schedule.num_timesteps
  times = np.linspace(1, 1 / total, num_steps + 1)
  knots = np.arange(1, total + 1) / total
  log_signal = np.interp(times, knots, np.log(schedule.signal_scale))
  scales = np.exp(log_signal), np.sqrt(-np.expm1(2 * log_signal))
  return TimeGrid(times[:-1] * total - 1, *scales)


def whole_grid(
  schedule: Schedule,
  num_steps: int,
  timesteps: Sequence[int] | None = None,
  use_karras_sigmas: bool = False,
) -> TimeGrid:
  """Even whole timesteps without 0, and then no noise, as diffusers' DPM-Solvers have.

  Args:
    timesteps: the grid's own, in place of even ones.
    use_karras_sigmas: take `karras_grid`, with the nearest whole timesteps.

  Raises:
    ValueError: if there are too few or too many steps, or `timesteps` are not of the
      schedule, the noisiest first.
  """
  if timesteps is not None:
    return given_grid(schedule, timesteps)
  if use_karras_sigmas:
    grid = karras_grid(schedule, num_steps)
    return grid._replace(timesteps=grid.timesteps.round())
  last = schedule.num_timesteps - 1
  check_steps(num_steps, 1, last)
  return given_grid(
    schedule, np.linspace(0, last, num_steps + 1).round()[:0:-1].astype(int)
  )


def linspace_grid(
  schedule: Schedule,
  num_steps: int,
  timesteps: Sequence[int] | None = None,
  use_karras_sigmas: bool = False,
) -> TimeGrid:
  """Even timesteps from the last to 0, fractions and all, and then no noise.

  So has diffusers' `timestep_spacing="linspace"` of its Euler and Heun schedulers; σ/α
  is linear between whole timesteps. A single step is taken from the noisiest timestep,
  where diffusers' is from 0. Arguments and errors are those of `whole_grid`; timesteps
  of Karras' noise levels stay fractions.
  """
  if timesteps is not None:
    return given_grid(schedule, timesteps)
  if use_karras_sigmas:
    return karras_grid(schedule, num_steps)
  check_steps(num_steps, 1, None)
  last = schedule.num_timesteps - 1
  even = np.linspace(last, 0, num_steps)
  sigmas = np.interp(even, np.arange(last + 1), _sigmas(schedule))
  return _of_sigmas(even, sigmas)


def karras_grid(schedule: Schedule, num_steps: int) -> TimeGrid:
  """Noise levels σ/α even in their 7th root (Karras et al. 2022, equation 5).

  From the schedule's highest to its lowest, and then no noise.

  Raises:
    ValueError: if `num_steps` is below 1.
  """
  check_steps(num_steps, 1, None)
  known = _sigmas(schedule)
  roots = np.linspace(known[-1] ** (1 / _RHO), known[0] ** (1 / _RHO), num_steps)
  sigmas = roots**_RHO
  timesteps = np.interp(np.log(sigmas), np.log(known), np.arange(len(known)))
  return _of_sigmas(timesteps, sigmas)


def given_grid(schedule: Schedule, timesteps: Sequence[int] | np.ndarray) -> TimeGrid:
  """These whole timesteps, and then no noise.

  Raises:
    ValueError: if there are none, or they are not of the schedule, the noisiest first.
  """
  steps, last = np.asarray(timesteps, int), schedule.num_timesteps - 1
  falling = len(steps) > 0 and (np.diff(steps) < 0).all()
  if not falling or steps[0] > last or steps[-1] < 0:
    raise ValueError(
      f"timesteps={steps.tolist()} must fall from step to step and lie in 0 … {last}: "
      f"for example {last},{last * 3 // 4},{last // 2},{last // 4}."
    )
  signal_scale = np.append(schedule.signal_scale[steps], 1.0)
  noise_scale = np.append(schedule.noise_scale[steps], 0.0)
  return TimeGrid(steps, signal_scale, noise_scale)


def check_steps(num_steps: int, least: int, most: int | None) -> None:
  """Refuses more or fewer steps than a sampler can take.

  Raises:
    ValueError: if `num_steps` is none of `least` … `most`; None is no limit.
  """
  if num_steps < least:
    raise ValueError(
      f"This sampler needs at least {least} step{'s' if least > 1 else ''}, not "
      f"num_steps={num_steps}."
    )
  if most is not None and num_steps > most:
    raise ValueError(
      f"num_steps={num_steps} does not fit into this sampler's timesteps: take at most "
      f"{most}."
    )


def _sigmas(schedule: Schedule) -> np.ndarray:
  """σ/α of every timestep, which Karras et al. call σ."""
  return schedule.noise_scale / schedule.signal_scale


def _of_sigmas(timesteps: np.ndarray, sigmas: np.ndarray) -> TimeGrid:
  sigmas = np.append(sigmas, 0.0)
  signal_scale = 1 / np.sqrt(1 + sigmas**2)
  return TimeGrid(timesteps, signal_scale, sigmas * signal_scale)
