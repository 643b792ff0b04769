"""Samplers as tables of coefficients, one row for each step.

That depends on the schedule and the number of steps alone, so it is worked out here in
float64 and rounded to float32 once; `solvers.solve` follows it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64

from pixsigma_jax.diffusion.schedule import Schedule
from pixsigma_jax.diffusion.time_grids import (
  TimeGrid,
  check_steps,
  given_grid,
  linspace_grid,
  reference_grid,
  whole_grid,
)

# Timesteps that an LCM learns to start from (Luo et al. 2023, section 4.3).
LCM_TIMESTEPS = 50
# Share of the noise that TCD draws anew (Zheng et al. 2024, γ), diffusers' default.
TCD_GAMMA = 0.3
# Where the one-step generator of PixArt-α-DMD is told that its noise lies.
DMD_TIMESTEP = 400


class SolverTable(NamedTuple):
  """One row a call of the network, float32, at `timesteps`.

  There x_t = signal_scale · x_0 + noise_scale · ε gives its x_0, and the step to the
  next time is
      carry · x_t + current · x_0
    + previous · (the x_0 of the step before) + earlier · (the x_0 before that)
    + fresh · exp(spread · (variance_logits + 1) / 2) · (new unit normal noise).
  A sampler that never uses a column has None there, and its scan no such term.
  A pytree: tables of equal length of one sampler share one compiled solver.
  """

  timesteps: Array
  signal_scale: Array
  noise_scale: Array
  carry: Array
  current: Array
  previous: Array | None = None
  earlier: Array | None = None
  fresh: Array | None = None
  spread: Array | None = None


def dpm_solver_pp(
  schedule: Schedule,
  num_steps: int,
  final: str = "reference",
  *,
  timesteps: Sequence[int] | None = None,
  use_karras_sigmas: bool = False,
) -> SolverTable:
  """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), first order at both ends.

  Args:
    schedule: the forward process to undo.
    num_steps: calls of the network.
    final: "reference" walks evenly through continuous time and stops at timestep 0,
      where 1 % of noise is left, as PixArt-Σ's own sampler does; "diffusers" calls
      the network at whole timesteps and goes on to no noise, as
      `DPMSolverMultistepScheduler` does in the published pipelines.
    timesteps, use_karras_sigmas: see `time_grids.whole_grid`; of "diffusers" alone.

  Raises:
    ValueError: if `num_steps` is below 1, or has no distinct timesteps left in
      "diffusers", or `final` is neither, or a grid of its own is asked of "reference".
  """
  if final not in ("diffusers", "reference"):
    raise ValueError(f'final="{final}" must be one of: diffusers, reference.')
  if final == "diffusers":
    grid = whole_grid(schedule, num_steps, timesteps, use_karras_sigmas)
  elif timesteps is None and not use_karras_sigmas:
    grid = reference_grid(schedule, num_steps)
  else:
    raise ValueError('Only final="diffusers" takes timesteps or use_karras_sigmas.')
  carry, weight = _first_order(grid)
  slope = _slope(grid)
  return _table(
    grid,
    carry=carry,
    current=weight * (1 + slope),
    previous=-weight * slope,
  )


def dpm_solver_sde(
  schedule: Schedule,
  num_steps: int,
  *,
  timesteps: Sequence[int] | None = None,
  use_karras_sigmas: bool = False,
) -> SolverTable:
  """SDE-DPM-Solver++(2M) (Lu et al. 2022, section 4.3): `dpm_solver_pp` with noise.

  As diffusers' `DPMSolverMultistepScheduler` with `algorithm_type="sde-dpmsolver++"`.
  Arguments and errors are those of `time_grids.whole_grid`.
  """
  grid = whole_grid(schedule, num_steps, timesteps, use_karras_sigmas)
  signal_scale, noise_scale = grid.signal_scale, grid.noise_scale
  # e^-h, which is 0 in the last step, whose h is infinite.
  shrink = noise_scale[1:] * signal_scale[:-1] / (noise_scale[:-1] * signal_scale[1:])
  weight = signal_scale[1:] * (1 - shrink**2)
  slope = _slope(grid)
  return _table(
    grid,
    carry=noise_scale[1:] / noise_scale[:-1] * shrink,
    current=weight * (1 + slope),
    previous=-weight * slope,
    fresh=noise_scale[1:] * np.sqrt(1 - shrink**2),
  )


def dpm_solver_2s(
  schedule: Schedule,
  num_steps: int,
  *,
  timesteps: Sequence[int] | None = None,
  use_karras_sigmas: bool = False,
) -> SolverTable:
  """DPM-Solver++(2S) (Lu et al. 2022, algorithm 1): steps of two calls each.

  As diffusers' `DPMSolverSinglestepScheduler`: the grid's steps in pairs, each pair
  from its first time to its end by the x_0 in its middle, the last step by itself,
  and of an even number the one before it too. Arguments and errors are those of
  `time_grids.whole_grid`; `num_steps` counts calls of the network.
  """
  grid = whole_grid(schedule, num_steps, timesteps, use_karras_sigmas)
  steps = len(grid.timesteps)
  carry, current = _first_order(grid)
  previous = np.zeros(steps)
  log_ratio = _log_ratio(grid)
  for second in range(1, steps - 1, 2):
    first, end = second - 1, second + 1
    half, whole = log_ratio[[second, end]] - log_ratio[first]
    slope = whole / (2 * half)
    # The pair's first latents are what its first step made, with x_0's share undone.
    undone = current[first]
    from_first = grid.noise_scale[end] / grid.noise_scale[first]
    weight = grid.signal_scale[end] - from_first * grid.signal_scale[first]
    current[second] = weight * slope
    previous[second] = weight * (1 - slope) - carry[second] * undone
  return _table(grid, carry=carry, current=current, previous=previous)


def unipc(
  schedule: Schedule,
  num_steps: int,
  *,
  timesteps: Sequence[int] | None = None,
  use_karras_sigmas: bool = False,
) -> SolverTable:
  """UniPC-2 (Zhao et al. 2023, algorithms 5 and 6) with B(h) = e^h - 1, on x_0.

  As diffusers' `UniPCMultistepScheduler`: a predictor of second order, of first in the
  first step and the last, and a corrector of one order more after each but the last.
  Arguments and errors are those of `time_grids.whole_grid`.
  """
  grid = whole_grid(schedule, num_steps, timesteps, use_karras_sigmas)
  steps = len(grid.timesteps)
  carry, weight = _first_order(grid)
  h = np.diff(_log_ratio(grid))
  slope = _slope(grid)
  current, previous, earlier = weight * (1 + slope), -weight * slope, np.zeros(steps)
  for i in range(1, steps):
    # The corrector of the step that led here: weights of D_1 = (m_{i-2} - m_{i-1}) / r
    # and of m_i - m_{i-1} (equation 5); the predictor had half of D_1, or nothing.
    last, second = weight[i - 1], slope[i - 1] != 0
    if second:
      r = -h[i - 2] / h[i - 1]
      phi_1 = np.expm1(-h[i - 1])
      phi_2 = phi_1 / -h[i - 1] - 1
      phi_3 = phi_2 / -h[i - 1] - 1 / 2
      of_history, of_new = np.linalg.solve(
        [[1.0, 1.0], [r, 1.0]], [phi_2 / phi_1, 2 * phi_3 / phi_1]
      )
      of_history = (of_history - 0.5) / r
    else:
      of_history, of_new = 0.0, 0.5
    # Correcting adds these to the latents, and the step carries them on.
    add = carry[i] * last * np.array([of_new, -of_new - of_history, of_history])
    current[i] += add[0]
    previous[i] += add[1]
    earlier[i] += add[2]
  return _table(grid, carry=carry, current=current, previous=previous, earlier=earlier)


def euler(
  schedule: Schedule,
  num_steps: int,
  *,
  timesteps: Sequence[int] | None = None,
  use_karras_sigmas: bool = False,
) -> SolverTable:
  """Euler's method on the flow in σ/α (Karras et al. 2022, algorithm 1, first order).

  As diffusers' `EulerDiscreteScheduler`, but for its initial noise, which is a
  50000th smaller. The step is DDIM's; the grid is not. Arguments and errors are those
  of `time_grids.linspace_grid`.
  """
  grid = linspace_grid(schedule, num_steps, timesteps, use_karras_sigmas)
  carry, current = _first_order(grid)
  return _table(grid, carry=carry, current=current)


def euler_ancestral(
  schedule: Schedule,
  num_steps: int,
  *,
  timesteps: Sequence[int] | None = None,
  use_karras_sigmas: bool = False,
) -> SolverTable:
  """Euler's method that goes below each noise level and adds noise up to it.

  As k-diffusion's `sample_euler_ancestral` and diffusers'
  `EulerAncestralDiscreteScheduler`: the noise added has DDPM's posterior variance.
  Arguments and errors are those of `time_grids.linspace_grid`.
  """
  grid = linspace_grid(schedule, num_steps, timesteps, use_karras_sigmas)
  sigma = grid.noise_scale / grid.signal_scale
  before, after = sigma[:-1], sigma[1:]
  up = np.sqrt(after**2 * (before**2 - after**2)) / before
  down = after**2 / before
  signal_scale = grid.signal_scale[1:]
  return _table(
    grid,
    carry=signal_scale / grid.signal_scale[:-1] * down / before,
    current=signal_scale * (1 - down / before),
    fresh=signal_scale * up,
  )


def heun(
  schedule: Schedule,
  num_steps: int,
  *,
  timesteps: Sequence[int] | None = None,
  use_karras_sigmas: bool = False,
) -> SolverTable:
  """Heun's method on the flow in σ/α (Karras et al. 2022, algorithm 1).

  As diffusers' `HeunDiscreteScheduler`: the network is called twice a step, at both its
  ends, and once in the last, 2 · `num_steps` - 1 times in all. Arguments and errors
  are those of `time_grids.linspace_grid`.
  """
  grid = linspace_grid(schedule, num_steps, timesteps, use_karras_sigmas)
  steps = len(grid.timesteps)
  calls = np.arange(1, 2 * steps) // 2
  signal_scale, noise_scale = grid.signal_scale, grid.noise_scale
  carry, current = np.ones(len(calls)), np.zeros(len(calls))
  carry[::2], current[::2] = _first_order(grid)
  # The second call of a step is where Euler's step has come to, and turns half of that
  # step by the difference of both x_0.
  ratio = noise_scale[:-2] / signal_scale[:-2] * signal_scale[1:-1] / noise_scale[1:-1]
  current[1::2] = signal_scale[1:-1] * (ratio - 1) / 2
  previous = np.where(np.arange(len(calls)) % 2, -current, 0.0)
  ends = np.append(calls, steps)
  doubled = TimeGrid(grid.timesteps[calls], signal_scale[ends], noise_scale[ends])
  return _table(doubled, carry=carry, current=current, previous=previous)


def ddim(
  schedule: Schedule, num_steps: int, *, timesteps: Sequence[int] | None = None
) -> SolverTable:
  """DDIM without noise (Song et al. 2021, equation 12, η = 0), down to no noise.

  At timesteps 999, 999 - 1000/N, … rounded, as diffusers' `DDIMScheduler` with
  `timestep_spacing="trailing"` has them: unlike its "leading", they begin where the
  latents are pure noise whatever N (Lin et al. 2023, section 3.3). With
  `steps_offset=1000/N - 1`, "leading" comes to the same where N divides 1000.
  `timesteps` stand in their place, if given.

  Raises:
    ValueError: if `num_steps` is below 1 or above the number of timesteps, or see
      `time_grids.given_grid`.
  """
  if timesteps is None:
    total = schedule.num_timesteps
    check_steps(num_steps, 1, total)
    ends = np.linspace(total, 0, num_steps, endpoint=False)
    grid = given_grid(schedule, ends.round().astype(int) - 1)
  else:
    grid = given_grid(schedule, timesteps)
  carry, current = _first_order(grid)
  return _table(grid, carry=carry, current=current)


def iddpm(schedule: Schedule, num_steps: int) -> SolverTable:
  """DDPM's own chain with learned variances, over a part of its timesteps.

  Nichol & Dhariwal 2021, section 4 (reference: `SpacedDiffusion`). Needs a network that
  has learned a variance. Noise is added after every step but the last.

  Raises:
    ValueError: if `num_steps` is below 2 or above the number of timesteps.
  """
  last = schedule.num_timesteps - 1
  check_steps(num_steps, 2, last + 1)
  # Added up and not multiplied, as the reference does: it decides which way a half is
  # rounded.
  strides = np.full(num_steps - 1, last / (num_steps - 1))
  timesteps = np.append(0, np.cumsum(strides).round().astype(int))
  # A process seen at some of its timesteps is one again, with betas of its own.
  alpha_bar = schedule.alpha_bar[timesteps]
  spaced = Schedule(1 - alpha_bar / np.append(1.0, alpha_bar[:-1]))
  # IDDPM, equation 15, for the deviation: half of the log-variance.
  fresh = np.exp(spaced.posterior_log_variance / 2)
  spread = (np.log(spaced.betas) - spaced.posterior_log_variance) / 2
  fresh[0] = spread[0] = 0.0
  columns = {
    "carry": spaced.posterior_mean_noisy,
    "current": spaced.posterior_mean_clean,
    "fresh": fresh,
    "spread": spread,
  }
  scales = spaced.signal_scale[::-1], spaced.noise_scale[::-1]
  grid = TimeGrid(timesteps[::-1], np.append(scales[0], 1.0), np.append(scales[1], 0.0))
  return _table(
    grid,
    **{name: column[::-1] for name, column in columns.items()},
  )


def sa_solver(schedule: Schedule, num_steps: int, eta: float) -> SolverTable:
  """SA-Solver (Xue et al. 2023): predictor and corrector of second order, PEC.

  As PixArt-Σ's `SASolverSampler`: it walks as `dpm_solver_pp` does in "reference" and
  adds noise τ(t) = `eta` in steps that end at a time t between 0.2 and 0.8 of the
  schedule, none elsewhere. The predictor is of first order in the first step and the
  last, and after the last there is no correction.

  Raises:
    ValueError: if `num_steps` is below 1.
  """
  grid = reference_grid(schedule, num_steps)
  timesteps, signal_scale, noise_scale = grid
  times = (np.append(timesteps[1:], 0.0) + 1) / schedule.num_timesteps
  tau = np.where((times >= 0.2) & (times <= 0.8), eta, 0.0)
  c, h = 1 + tau**2, np.diff(np.log(signal_scale / noise_scale))
  # The exact step (section 4) while x_0 stays …
  carry = np.exp(-(tau**2) * h) * noise_scale[1:] / noise_scale[:-1]
  weight = -signal_scale[1:] * np.expm1(-c * h)
  fresh = noise_scale[1:] * np.sqrt(-np.expm1(-2 * tau**2 * h))
  # … and what its rising by 1 for each unit of λ adds. The reference integrates λ - λ_s
  # alone here, to h²/2, and leaves the exponential outside.
  rise = c * signal_scale[1:] * h**2 / 2
  # The predictor has the slope of x_0 from the step before; the corrector, whose turn
  # comes after the next call of the network, from the two ends of its own step. Both
  # start from the same latents and add the same noise, so that correcting is to undo
  # one slope and to add the other: neither latents nor noise have to be kept for it.
  extrapolated = np.zeros(num_steps)
  extrapolated[1:-1] = rise[1:-1] / h[:-2]
  interpolated = rise / h
  undone, corrected = (
    carry * np.append(0.0, weights[:-1]) for weights in (extrapolated, interpolated)
  )
  return _table(
    grid,
    carry=carry,
    current=weight + extrapolated + corrected,
    previous=-extrapolated - corrected - undone,
    earlier=undone,
    fresh=fresh,
  )


def lcm(
  schedule: Schedule, num_steps: int, *, timesteps: Sequence[int] | None = None
) -> SolverTable:
  """Multistep consistency sampling (Song et al. 2023, algorithm 1), for an LCM.

  Each step guesses clean latents and, but for the last, adds fresh noise up to the next
  timestep. Timesteps are every (50 // `num_steps`)-th of the 50 that an LCM is trained
  on, from the noisiest on, as in the reference's `LCMScheduler`; that of diffusers
  takes others where `num_steps` does not divide 50. `timesteps` stand in their place,
  if given.

  Raises:
    ValueError: if `num_steps` is below 1 or above 50, or see `time_grids.given_grid`.
  """
  if timesteps is None:
    check_steps(num_steps, 1, LCM_TIMESTEPS)
    learned = _learned(schedule)[:: LCM_TIMESTEPS // num_steps][:num_steps]
    grid = given_grid(schedule, learned)
  else:
    grid = given_grid(schedule, timesteps)
  # Song et al. 2023, appendix C, with σ_data = 0.5 and time in tenths of a timestep.
  tenths = 10.0 * grid.timesteps
  skip = 0.25 / (tenths**2 + 0.25)
  out = tenths / np.sqrt(tenths**2 + 0.25)
  return _table(
    grid,
    carry=grid.signal_scale[1:] * skip,
    current=grid.signal_scale[1:] * out,
    fresh=grid.noise_scale[1:],
  )


def tcd(
  schedule: Schedule,
  num_steps: int,
  *,
  timesteps: Sequence[int] | None = None,
  gamma: float = TCD_GAMMA,
) -> SolverTable:
  """Strategic stochastic sampling (Zheng et al. 2024, algorithm 2), for a TCD model.

  As diffusers' `TCDScheduler`: each step goes down to timestep (1 - γ) s without noise
  and, but for the last, adds noise up to s, the next one. It stops at timestep 0, where
  1 % of noise is left. Timesteps are spread over the 50 of an LCM, or given.

  Raises:
    ValueError: if `num_steps` is below 1 or above 50, or see `time_grids.given_grid`.
  """
  if timesteps is None:
    check_steps(num_steps, 1, LCM_TIMESTEPS)
    chosen = np.linspace(0, LCM_TIMESTEPS, num_steps, endpoint=False)
    grid = given_grid(schedule, _learned(schedule)[chosen.astype(int)])
  else:
    grid = given_grid(schedule, timesteps)
  following = np.append(grid.timesteps[1:], 0)
  below = np.floor((1 - gamma) * following).astype(int)
  signal_scale, noise_scale = schedule.signal_scale, schedule.noise_scale
  kept = signal_scale[following] / signal_scale[below]
  carry = noise_scale[below] / grid.noise_scale[:-1]
  return _table(
    grid,
    carry=kept * carry,
    current=kept * (signal_scale[below] - carry * grid.signal_scale[:-1]),
    fresh=np.sqrt(1 - kept**2),
  )


def dmd(schedule: Schedule, num_steps: int) -> SolverTable:
  """The only step of a distribution-matching student (PixArt-α-DMD).

  The student was trained to take unit normal noise, unscaled, for the noisy latents of
  timestep 400.

  Raises:
    ValueError: if `num_steps` is not 1.
  """
  if num_steps != 1:
    raise ValueError(f"A DMD student takes 1 step, not num_steps={num_steps}.")
  grid = given_grid(schedule, [DMD_TIMESTEP])
  return _table(grid, carry=np.zeros(1), current=np.ones(1))


def _first_order(
  grid: TimeGrid,
) -> tuple[Float64[np.ndarray, " steps"], Float64[np.ndarray, " steps"]]:
  """Weights of x_t and of x_0 in a step that keeps both ends of the line x_0 … ε.

  It integrates e^λ x_0 over λ = log(α/σ), which leaves the factor
  -α_t (e^-h - 1) = α_t - (σ_t / σ_s) α_s: finite also where σ_t is 0 and h infinite.
  """
  carry = grid.noise_scale[1:] / grid.noise_scale[:-1]
  return carry, grid.signal_scale[1:] - carry * grid.signal_scale[:-1]


def _log_ratio(grid: TimeGrid) -> Float64[np.ndarray, " steps"]:
  """λ = log(α/σ) at each timestep."""
  return np.log(grid.signal_scale[:-1] / grid.noise_scale[:-1])


def _slope(grid: TimeGrid) -> Float64[np.ndarray, " steps"]:
  """Weight of x_0's last change in a multistep solver of second order.

  x_0 goes on along the line through its last two values: D = x_0 + slope · (x_0 -
  previous x_0), slope = 1 / (2 r_0) (Lu et al. 2022, algorithm 2). The first step has
  no previous x_0; the last stays flat, since it is the longest in λ.
  """
  h = np.diff(_log_ratio(grid))
  slope = np.zeros(len(grid.timesteps))
  slope[1:-1] = h[1:] / (2 * h[:-1])
  return slope


def _learned(schedule: Schedule) -> np.ndarray:
  """Timesteps that an LCM has learned to start from, the noisiest first."""
  stride = schedule.num_timesteps // LCM_TIMESTEPS
  return np.arange(LCM_TIMESTEPS, 0, -1) * stride - 1


def _table(grid: TimeGrid, **columns: np.ndarray) -> SolverTable:
  columns |= {
    "timesteps": grid.timesteps,
    "signal_scale": grid.signal_scale[:-1],
    "noise_scale": grid.noise_scale[:-1],
  }
  return SolverTable(
    **{name: jnp.asarray(column.astype(np.float32)) for name, column in columns.items()}
  )
