"""Samplers as tables of coefficients, one row for each step.

That depends on the schedule and the number of steps alone, so it is worked out here in
float64 and rounded to float32 once; `solvers.solve` follows it.
"""

from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64

from pixsigma_jax.diffusion.schedule import Schedule

# Float64 tables [N], [N+1], [N+1] of a sampler's timesteps, and of the signal and
# noise scales at these and at the end.
_Walk: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]

# Timesteps that an LCM learns to start from (Luo et al. 2023, section 4.3).
LCM_TIMESTEPS = 50
# Where the one-step generator of PixArt-α-DMD is told that its noise lies.
DMD_TIMESTEP = 400


class SolverTable(NamedTuple):
  """One row a step, float32. The network is called once a step, at `timesteps`.

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
  if final not in _WALKS:
    raise ValueError(f'final="{final}" must be one of: {", ".join(_WALKS)}.')
  timesteps, signal_scale, noise_scale = _WALKS[final](schedule, num_steps)
  carry, weight = _first_order(signal_scale, noise_scale)
  # x_0 goes on along the line through its last two values: D = x_0 + slope · (x_0 -
  # previous x_0), slope = 1 / (2 r_0) (algorithm 2). The first step has no previous
  # x_0; the last stays flat, since it is the longest in λ.
  h = np.diff(np.log(signal_scale[:-1] / noise_scale[:-1]))
  slope = np.zeros(num_steps)
  slope[1:-1] = h[1:] / (2 * h[:-1])
  return _table(
    timesteps=timesteps,
    signal_scale=signal_scale[:-1],
    noise_scale=noise_scale[:-1],
    carry=carry,
    current=weight * (1 + slope),
    previous=-weight * slope,
  )


def ddim(schedule: Schedule, num_steps: int) -> SolverTable:
  """DDIM without noise (Song et al. 2021, equation 12, η = 0), down to no noise.

  At timesteps 999, 999 - 1000/N, … rounded, as diffusers' `DDIMScheduler` with
  `timestep_spacing="trailing"` has them: unlike its "leading", they begin where the
  latents are pure noise whatever N (Lin et al. 2023, section 3.3). With
  `steps_offset=1000/N - 1`, "leading" comes to the same where N divides 1000.

  Raises:
    ValueError: if `num_steps` is below 1 or above the number of timesteps.
  """
  total = schedule.num_timesteps
  _check_steps(num_steps, 1, total)
  ends = np.linspace(total, 0, num_steps, endpoint=False)
  timesteps = ends.round().astype(int) - 1
  signal_scale, noise_scale = _scales(schedule, timesteps)
  carry, current = _first_order(signal_scale, noise_scale)
  return _table(
    timesteps=timesteps,
    signal_scale=signal_scale[:-1],
    noise_scale=noise_scale[:-1],
    carry=carry,
    current=current,
  )


def iddpm(schedule: Schedule, num_steps: int) -> SolverTable:
  """DDPM's own chain with learned variances, over a part of its timesteps.

  Nichol & Dhariwal 2021, section 4 (reference: `SpacedDiffusion`). Needs a network that
  has learned a variance. Noise is added after every step but the last.

  Raises:
    ValueError: if `num_steps` is below 2 or above the number of timesteps.
  """
  last = schedule.num_timesteps - 1
  _check_steps(num_steps, 2, last + 1)
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
    "timesteps": timesteps,
    "signal_scale": spaced.signal_scale,
    "noise_scale": spaced.noise_scale,
    "carry": spaced.posterior_mean_noisy,
    "current": spaced.posterior_mean_clean,
    "fresh": fresh,
    "spread": spread,
  }
  return _table(**{name: column[::-1] for name, column in columns.items()})


def sa_solver(schedule: Schedule, num_steps: int, eta: float) -> SolverTable:
  """SA-Solver (Xue et al. 2023): predictor and corrector of second order, PEC.

  As PixArt-Σ's `SASolverSampler`: it walks as `dpm_solver_pp` does in "reference" and
  adds noise τ(t) = `eta` in steps that end at a time t between 0.2 and 0.8 of the
  schedule, none elsewhere. The predictor is of first order in the first step and the
  last, and after the last there is no correction.

  Raises:
    ValueError: if `num_steps` is below 1.
  """
  timesteps, signal_scale, noise_scale = _reference_walk(schedule, num_steps)
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
    timesteps=timesteps,
    signal_scale=signal_scale[:-1],
    noise_scale=noise_scale[:-1],
    carry=carry,
    current=weight + extrapolated + corrected,
    previous=-extrapolated - corrected - undone,
    earlier=undone,
    fresh=fresh,
  )


def lcm(schedule: Schedule, num_steps: int) -> SolverTable:
  """Multistep consistency sampling (Song et al. 2023, algorithm 1), for an LCM.

  Each step guesses clean latents and, but for the last, adds fresh noise up to the next
  timestep. Timesteps are every (50 // `num_steps`)-th of the 50 that an LCM is trained
  on, from the noisiest on, as in the reference's `LCMScheduler`; that of diffusers
  takes others where `num_steps` does not divide 50.

  Raises:
    ValueError: if `num_steps` is below 1 or above 50.
  """
  _check_steps(num_steps, 1, LCM_TIMESTEPS)
  learned = np.arange(1, LCM_TIMESTEPS + 1) * (schedule.num_timesteps // LCM_TIMESTEPS)
  timesteps = learned[:: -(LCM_TIMESTEPS // num_steps)][:num_steps] - 1
  signal_scale, noise_scale = _scales(schedule, timesteps)
  # Song et al. 2023, appendix C, with σ_data = 0.5 and time in tenths of a timestep.
  tenths = 10.0 * timesteps
  skip = 0.25 / (tenths**2 + 0.25)
  out = tenths / np.sqrt(tenths**2 + 0.25)
  return _table(
    timesteps=timesteps,
    signal_scale=signal_scale[:-1],
    noise_scale=noise_scale[:-1],
    carry=signal_scale[1:] * skip,
    current=signal_scale[1:] * out,
    fresh=noise_scale[1:],
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
  timesteps = np.array([DMD_TIMESTEP])
  return _table(
    timesteps=timesteps,
    signal_scale=schedule.signal_scale[timesteps],
    noise_scale=schedule.noise_scale[timesteps],
    carry=np.zeros(1),
    current=np.ones(1),
  )


def _first_order(
  signal_scale: Float64[np.ndarray, " times"],
  noise_scale: Float64[np.ndarray, " times"],
) -> tuple[Float64[np.ndarray, " steps"], Float64[np.ndarray, " steps"]]:
  """Weights of x_t and of x_0 in a step that keeps both ends of the line x_0 … ε.

  It integrates e^λ x_0 over λ = log(α/σ), which leaves the factor
  -α_t (e^-h - 1) = α_t - (σ_t / σ_s) α_s: finite also where σ_t is 0 and h infinite.
  """
  carry = noise_scale[1:] / noise_scale[:-1]
  return carry, signal_scale[1:] - carry * signal_scale[:-1]


def _reference_walk(schedule: Schedule, num_steps: int) -> _Walk:
  """Times from 1 to 1/T, log α linear between knots.

  Time (i + 1)/T belongs to timestep i; the network sees fractions of a timestep.
  """
  _check_steps(num_steps, 1, None)
  total = schedule.num_timesteps
  times = np.linspace(1, 1 / total, num_steps + 1)
  knots = np.arange(1, total + 1) / total
  log_signal = np.interp(times, knots, np.log(schedule.signal_scale))
  scales = np.exp(log_signal), np.sqrt(-np.expm1(2 * log_signal))
  return times[:-1] * total - 1, *scales


def _diffusers_walk(schedule: Schedule, num_steps: int) -> _Walk:
  """Timesteps rounded, without 0, and then no noise at all."""
  last = schedule.num_timesteps - 1
  _check_steps(num_steps, 1, last)
  timesteps = np.linspace(0, last, num_steps + 1).round()[:0:-1].astype(int)
  return timesteps, *_scales(schedule, timesteps)


_WALKS = {"diffusers": _diffusers_walk, "reference": _reference_walk}


def _scales(schedule: Schedule, timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Signal and noise scales at whole timesteps, and then of clean latents."""
  signal_scale = np.append(schedule.signal_scale[timesteps], 1.0)
  return signal_scale, np.append(schedule.noise_scale[timesteps], 0.0)


def _check_steps(num_steps: int, least: int, most: int | None) -> None:
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


def _table(**columns: np.ndarray) -> SolverTable:
  return SolverTable(
    **{name: jnp.asarray(column.astype(np.float32)) for name, column in columns.items()}
  )
