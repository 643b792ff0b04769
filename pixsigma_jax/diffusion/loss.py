"""The training loss: the noise error plus the bound that trains the variance.

This is IDDPM's hybrid objective (Nichol & Dhariwal 2021, section 3.1) with the bound
at weight 1, as PixArt-Σ trains: no factor 1/1000, no importance sampling.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from pixsigma_jax.diffusion import process
from pixsigma_jax.diffusion.schedule import Schedule, gather

# The reference's `snr_loss` compares x_0 up to this timestep and ε above it.
LAST_CLEAN_TIMESTEP = 249


def iddpm_loss(
  schedule: Schedule,
  *,
  latents: Float[Array, "b n c"],
  noise: Float[Array, "b n c"],
  noisy_latents: Float[Array, "b n c"],
  timesteps: Int[Array, " b"],
  prediction: Float[Array, "b n c"],
  variance_logits: Float[Array, "b n c"] | None,
  mask: Bool[Array, "b n"],
  snr_switch: bool = False,
  min_snr_gamma: float | None = None,
  keep: Bool[Array, "b n c"] | None = None,
  excess: Callable[[Float32[Array, "b n c"]], Float32[Array, " b"]] | None = None,
) -> dict[str, Float32[Array, " b"]]:
  """Loss of each example, a mean over its valid tokens and their channels.

  Args:
    schedule: the forward process that made `noisy_latents`.
    latents: clean latents x_0, as tokens.
    noise: the unit normal noise ε.
    noisy_latents: x_t, see `process.add_noise`.
    timesteps: 0 … schedule.num_timesteps - 1; not checked, see `schedule.gather`.
    prediction: the network's estimate of `noise`.
    variance_logits: where the network puts its log-variance between the posterior's
      (-1) and beta's (1), without bounds. None for a network that learns no variance.
    mask: True for a token of the image. What the others hold, be it NaN, changes
      neither the loss nor a gradient. An example without valid tokens gives NaN.
    snr_switch: the reference's `snr_loss`: compare clean latents instead of noise up
      to timestep 249. It is not min-SNR.
    min_snr_gamma: weigh "mse" by min(snr, gamma)/snr (Hang et al. 2023, section 3.4);
      "vb" keeps its weight.
    keep: False where "mse" takes no error, though it divides by all values; see
      `detail.wavelet_mask`.
    excess: what comes to "mse" of the errors, which are zero where there is no token;
      see `detail.spectral_excess`.

  Returns:
    "mse", the weighted squared error; "vb", the variational bound in bits, which
    moves `variance_logits` alone; "loss", their sum.

  Raises:
    ValueError: if both re-weightings are asked for, or gamma is not positive.
  """
  if min_snr_gamma is not None and snr_switch:
    raise ValueError(
      f"snr_switch=True and min_snr_gamma={min_snr_gamma} both re-weigh the noise "
      f"error: set one of them."
    )
  if min_snr_gamma is not None and not min_snr_gamma > 0:
    raise ValueError(
      f"min_snr_gamma={min_snr_gamma} must be positive; None leaves it out."
    )

  valid = mask[..., None]
  # Padding is emptied on the way in as well as left out of the mean: the gradient of
  # a discarded NaN is 0 · NaN, not 0.
  latents, noise, noisy_latents, prediction = (
    jnp.where(valid, tokens.astype(jnp.float32), 0)
    for tokens in (latents, noise, noisy_latents, prediction)
  )
  values = mask.sum(axis=1).astype(jnp.float32) * latents.shape[-1]

  def mean(errors: Float32[Array, "b n c"]) -> Float32[Array, " b"]:
    return jnp.where(valid, errors, 0).sum(axis=(1, 2)) / values

  error = noise - prediction
  squares = jnp.square(error)
  mse = mean(squares if keep is None else jnp.where(keep, squares, 0))
  if excess is not None:
    mse = mse + excess(error)
  if snr_switch:
    # The error of x_0 is that of ε times σ/α; subtracting x_0 itself would cancel.
    clean = np.arange(schedule.num_timesteps) <= LAST_CLEAN_TIMESTEP
    mse = gather(np.where(clean, 1 / schedule.snr, 1.0), timesteps, 1) * mse
  if min_snr_gamma is not None:
    weights = np.minimum(schedule.snr, min_snr_gamma) / schedule.snr
    mse = gather(weights, timesteps, 1) * mse

  if variance_logits is None:
    vb = jnp.zeros_like(mse)
  else:
    bits = _variational_bound(
      schedule,
      latents=latents,
      noisy_latents=noisy_latents,
      timesteps=timesteps,
      # The bound must not teach ε (IDDPM, section 3.1): only the variance learns.
      prediction=jax.lax.stop_gradient(prediction),
      variance_logits=jnp.where(valid, variance_logits.astype(jnp.float32), 0),
    )
    vb = mean(bits)
  return {"loss": mse + vb, "mse": mse, "vb": vb}


def _variational_bound(
  schedule: Schedule,
  *,
  latents: Float32[Array, "b n c"],
  noisy_latents: Float32[Array, "b n c"],
  timesteps: Int[Array, " b"],
  prediction: Float32[Array, "b n c"],
  variance_logits: Float32[Array, "b n c"],
) -> Float32[Array, "b n c"]:
  """Cost in bits of one reverse step: L_{t-1} of DDPM's equation 5, and its L_0."""

  def at(table: np.ndarray) -> Float32[Array, "b 1 1"]:
    return gather(table, timesteps, 3)

  predicted_latents = process.convert(
    schedule,
    prediction,
    noisy_latents=noisy_latents,
    timesteps=timesteps,
    source="noise",
    target="latents",
  )
  # Both means (DDPM, equation 7) weigh x_t alike, so x_0's error alone parts them.
  error = latents - predicted_latents

  # IDDPM, equation 15, written as an excess over the posterior's log-variance: the
  # two bounds differ by 8e-7 at the last timestep, which float32 logs cannot show.
  true_log_variance = at(schedule.posterior_log_variance)
  width = at(np.log(schedule.betas) - schedule.posterior_log_variance)
  excess = width * (variance_logits + 1) / 2

  divergence = _divergence(
    at(schedule.posterior_mean_clean) * error, true_log_variance, excess
  )
  # At timestep 0 the mean is the predicted x_0 itself.
  likelihood = _discretised_log_likelihood(latents, error, true_log_variance + excess)
  first = (timesteps == 0)[:, None, None]
  return jnp.where(first, -likelihood, divergence) / math.log(2)


def _divergence(
  difference: Float32[Array, "b n c"],
  log_variance: Float32[Array, "b 1 1"],
  excess: Float32[Array, "b n c"],
) -> Float32[Array, "b n c"]:
  """KL(N(m, e^log_variance) ‖ N(m + difference, e^(log_variance + excess)))."""
  spread = excess + jnp.expm1(-excess)
  return (spread + jnp.square(difference) * jnp.exp(-log_variance - excess)) / 2


def _discretised_log_likelihood(
  latents: Float32[Array, "b n c"],
  error: Float32[Array, "b n c"],
  log_variance: Float32[Array, "b n c"],
) -> Float32[Array, "b n c"]:
  """Log-probability of the bin of width 2/255 around each latent (DDPM, eq. 13).

  The Gaussian's mean is `latents - error`.
  Bins are made for 8-bit pixels in [-1, 1]; the outermost two reach to infinity.
  Latents are no pixels, but the reference counts so, and so did its training.
  """
  inverse_scale = jnp.exp(-log_variance / 2)
  below = _normal_cdf(inverse_scale * (error - 1 / 255))
  up_to = _normal_cdf(inverse_scale * (error + 1 / 255))
  probability = jnp.where(
    latents < -0.999, up_to, jnp.where(latents > 0.999, 1 - below, up_to - below)
  )
  return jnp.log(jnp.maximum(probability, 1e-12))


def _normal_cdf(x: Float32[Array, "..."]) -> Float32[Array, "..."]:
  """The reference's approximation of the normal distribution function (tanh)."""
  return (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
