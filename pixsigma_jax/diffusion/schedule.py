"""Noise schedules: signal and noise at each timestep.

Everything follows from the variances beta_t that the forward process adds. Tables
are float64, as in the reference, and are rounded to float32 once, when a timestep
is looked up.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Float64, Int


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
  """A forward process q(x_t | x_{t-1}) = N(√(1 - beta_t) x_{t-1}, beta_t).

  Entry t of a table belongs to timestep t, counted from 0: x_0 in a formula is the
  clean image, which comes before timestep 0. Compared by identity, so that a
  schedule can be a static argument of `jax.jit`.

  Raises:
    ValueError: if there are fewer than two betas, or one is not between 0 and 1.
  """

  betas: Float64[np.ndarray, " timesteps"]

  def __post_init__(self):
    if len(self.betas) < 2:
      raise ValueError(f"A schedule needs at least 2 betas, not {len(self.betas)}.")
    outside = ~((self.betas > 0) & (self.betas < 1))
    if outside.any():
      first = int(np.argmax(outside))
      raise ValueError(
        f"Every beta must lie between 0 and 1, exclusive: "
        f"beta[{first}] is {self.betas[first]}."
      )

  @property
  def num_timesteps(self) -> int:
    """Length of every table."""
    return len(self.betas)

  @functools.cached_property
  def alpha_bar(self) -> Float64[np.ndarray, " timesteps"]:
    """Share of the variance that is still signal (DDPM, section 2)."""
    return np.cumprod(1 - self.betas)

  @functools.cached_property
  def signal_scale(self) -> Float64[np.ndarray, " timesteps"]:
    """√alpha_bar, written α where a formula needs a letter."""
    return np.sqrt(self.alpha_bar)

  @functools.cached_property
  def noise_scale(self) -> Float64[np.ndarray, " timesteps"]:
    """√(1 - alpha_bar), written σ where a formula needs a letter."""
    return np.sqrt(1 - self.alpha_bar)

  @functools.cached_property
  def snr(self) -> Float64[np.ndarray, " timesteps"]:
    """Signal-to-noise ratio α²/σ²."""
    return self.alpha_bar / (1 - self.alpha_bar)

  @functools.cached_property
  def _previous_alpha_bar(self) -> Float64[np.ndarray, " timesteps"]:
    return np.append(1.0, self.alpha_bar[:-1])

  @functools.cached_property
  def posterior_mean_clean(self) -> Float64[np.ndarray, " timesteps"]:
    """Weight of x_0 in the mean of q(x_{t-1} | x_t, x_0) (DDPM, equation 7)."""
    return np.sqrt(self._previous_alpha_bar) * self.betas / (1 - self.alpha_bar)

  @functools.cached_property
  def posterior_mean_noisy(self) -> Float64[np.ndarray, " timesteps"]:
    """Weight of x_t in the mean of q(x_{t-1} | x_t, x_0) (DDPM, equation 7)."""
    remaining = (1 - self._previous_alpha_bar) / (1 - self.alpha_bar)
    return np.sqrt(1 - self.betas) * remaining

  @functools.cached_property
  def posterior_log_variance(self) -> Float64[np.ndarray, " timesteps"]:
    """Log-variance of q(x_{t-1} | x_t, x_0) (DDPM, equation 7), clipped.

    At timestep 0 the variance is zero, so timestep 1 lends its own.
    """
    remaining = (1 - self._previous_alpha_bar) / (1 - self.alpha_bar)
    variance = self.betas * remaining
    return np.log(np.append(variance[1], variance[1:]))


def linear_schedule(
  num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 2e-2
) -> Schedule:
  """Betas on a straight line; the defaults are PixArt-Σ's (and DDPM's)."""
  return Schedule(np.linspace(beta_start, beta_end, num_timesteps, dtype=np.float64))


def gather(
  table: Float64[np.ndarray, " timesteps"], timesteps: Int[Array, " b"], ndim: int
) -> Float32[Array, "b ..."]:
  """Looks timesteps up in a table, as float32 shaped [b 1 … 1] with `ndim` axes.

  Timesteps may be traced, so they cannot be checked: keep them in 0 … length - 1.
  JAX clamps a larger one to the last entry and counts a negative one from the end.
  """
  values = jnp.asarray(table.astype(np.float32))[timesteps]
  return values.reshape(timesteps.shape + (1,) * (ndim - 1))
