"""From noise to latents: a table of coefficients, and one scan that follows it.

What a solver does depends on the schedule and the number of steps alone, so it is
worked out beforehand in float64; the scan only multiplies and adds, in float32.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from pixsigma_jax.diffusion.schedule import Schedule

# (noisy latents, timestep: a float32 scalar) → the noise ε in them
Denoiser: TypeAlias = Callable[[Array, Array], Array]


class SolverTable(NamedTuple):
  """One row a step, float32. The network is called once a step, at `timesteps`.

  There x_t = signal_scale · x_0 + noise_scale · ε gives its x_0, and the step to the
  next time is carry · x_t + current · x_0 + previous · (the x_0 of the step before).
  A pytree: tables of equal length share one compiled solver.
  """

  timesteps: Array
  signal_scale: Array
  noise_scale: Array
  carry: Array
  current: Array
  previous: Array


def solve(
  denoise: Denoiser, noisy_latents: Float[Array, "*shape"], table: SolverTable
) -> Float32[Array, "*shape"]:
  """Takes unit normal `noisy_latents` through every step of `table`.

  `denoise` is traced once, whatever the number of steps.
  """

  def step(state: tuple[Array, Array], row: SolverTable):
    noisy_latents, previous_latents = state
    noise = denoise(noisy_latents, row.timesteps).astype(jnp.float32)
    latents = (noisy_latents - row.noise_scale * noise) / row.signal_scale
    noisy_latents = (
      row.carry * noisy_latents
      + row.current * latents
      + row.previous * previous_latents
    )
    return (noisy_latents, latents), None

  start = noisy_latents.astype(jnp.float32)
  (latents, _), _ = jax.lax.scan(step, (start, jnp.zeros_like(start)), table)
  return latents


def dpm_solver_pp(
  schedule: Schedule, num_steps: int, final: str = "reference"
) -> SolverTable:
  """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), first order at both ends.

  Args:
    schedule: the forward process to undo.
    num_steps: calls of the network.
    final: "reference" walks evenly through continuous time and stops at timestep 0,
      where 1 % of noise is left, as PixArt-Σ's own sampler does; "diffusers" calls
      the network at whole timesteps and goes on to no noise, as
      `DPMSolverMultistepScheduler` does in the published pipelines.

  Raises:
    ValueError: if `num_steps` is below 1, or has no distinct timesteps left in
      "diffusers", or `final` is neither.
  """
  if num_steps < 1:
    raise ValueError(f"A solver needs at least 1 step, not num_steps={num_steps}.")
  if final not in _GRIDS:
    raise ValueError(f'final="{final}" must be one of: {", ".join(_GRIDS)}.')
  timesteps, signal_scale, noise_scale = _GRIDS[final](schedule, num_steps)

  # One step integrates e^λ x_0(λ) over λ = log(α/σ), which leaves the factor
  # -α_t (e^-h - 1) = α_t - (σ_t / σ_s) α_s: finite also where σ_t is 0 and h infinite.
  carry = noise_scale[1:] / noise_scale[:-1]
  weight = signal_scale[1:] - carry * signal_scale[:-1]
  # x_0 goes on along the line through its last two values: D = x_0 + slope · (x_0 -
  # previous x_0), slope = 1 / (2 r_0) (algorithm 2). The first step has no previous
  # x_0; the last stays flat, since it is the longest in λ.
  h = np.diff(np.log(signal_scale[:-1] / noise_scale[:-1]))
  slope = np.zeros(num_steps)
  slope[1:-1] = h[1:] / (2 * h[:-1])

  columns = {
    "timesteps": timesteps,
    "signal_scale": signal_scale[:-1],
    "noise_scale": noise_scale[:-1],
    "carry": carry,
    "current": weight * (1 + slope),
    "previous": -weight * slope,
  }
  return SolverTable(
    **{name: jnp.asarray(column.astype(np.float32)) for name, column in columns.items()}
  )


def _reference_grid(
  schedule: Schedule, num_steps: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Timesteps [N] and scales [N+1]: times from 1 to 1/T, log α linear between knots.

  Time (i + 1)/T belongs to timestep i; the network sees fractions of a timestep.
  """
  total = schedule.num_timesteps
  times = np.linspace(1, 1 / total, num_steps + 1)
  knots = np.arange(1, total + 1) / total
  log_signal = np.interp(times, knots, np.log(schedule.signal_scale))
  scales = np.exp(log_signal), np.sqrt(-np.expm1(2 * log_signal))
  return times[:-1] * total - 1, *scales


def _diffusers_grid(
  schedule: Schedule, num_steps: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Timesteps [N] and scales [N+1]: rounded, without 0, and then no noise at all."""
  last = schedule.num_timesteps - 1
  if num_steps > last:
    raise ValueError(
      f"num_steps={num_steps} does not fit between whole timesteps 0 and {last}: "
      f'take at most {last}, or final="reference".'
    )
  timesteps = np.linspace(0, last, num_steps + 1).round()[:0:-1]
  indices = timesteps.astype(int)
  signal_scale = np.append(schedule.signal_scale[indices], 1.0)
  noise_scale = np.append(schedule.noise_scale[indices], 0.0)
  return timesteps, signal_scale, noise_scale


_GRIDS = {"reference": _reference_grid, "diffusers": _diffusers_grid}
