"""The loss of a batch: draws, noises, predicts, compares."""

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Int32, Key
from scipy import special

from pixsigma_jax.diffusion import detail, process
from pixsigma_jax.diffusion.loss import iddpm_loss
from pixsigma_jax.diffusion.schedule import Schedule
from pixsigma_jax.models import tokens
from pixsigma_jax.models.conditions import Conditions
from pixsigma_jax.models.pixart import PixArt, laid_out, split_prediction

Batch: TypeAlias = dict[str, Array]
PerExample: TypeAlias = dict[str, Array]
LossFn: TypeAlias = Callable[
  [Any, Array, Batch, Array], tuple[Float32[Array, ""], PerExample]
]


def make_loss(
  model: PixArt,
  schedule: Schedule,
  *,
  scaling_factor: float,
  caption_dropout: float,
  snr_switch: bool,
  min_snr_gamma: float | None,
  snr_shift: float,
  timestep_beta: tuple[float, float] | None,
  timestep_range: tuple[int, int],
  frequency_weight: float,
  frequency_gamma: float,
  wavelet_offset: float | None,
) -> LossFn:
  """Builds `loss(params, null_caption, batch, key) → (mean, per example)`.

  Every draw of an example comes from `key` and its `row` in the global batch, so it
  does not depend on hosts, mesh or padding.

  Args:
    scaling_factor: multiplies the autoencoder's latents.
    caption_dropout: probability that an example's caption becomes the null caption,
      under the caption's own mask, as the reference trains.
    snr_switch, min_snr_gamma: see `iddpm_loss`.
    snr_shift: see `timestep_probabilities`; 1.0 draws all timesteps alike.
    timestep_beta: see `beta_probabilities`; None leaves it out.
    timestep_range: lowest and highest timestep that are drawn, both included; among
      them, the shares of the two above stay.
    frequency_weight: λ, by which errors of the highest frequency count more than those
      of the lowest; 0 leaves it out.
    frequency_gamma: see `detail.frequency_weights`.
    wavelet_offset: see `detail.wavelet_mask`; None leaves it out.

  Raises:
    ValueError: a shift that is not positive, or leaves no timestep; two ways to draw
      timesteps, or to weigh detail; a range of timesteps that the schedule does not
      have; wavelets of a token that has none.
  """
  config = model.config
  draw_timestep = _timestep_draw(schedule, snr_shift, timestep_beta, timestep_range)
  if frequency_weight and wavelet_offset is not None:
    raise ValueError(
      f"loss.frequency_weight={frequency_weight} and loss.wavelet_offset="
      f"{wavelet_offset} both weigh detail: set one of them."
    )
  if wavelet_offset is not None and config.patch_size % 2:
    raise ValueError(
      f"loss.wavelet_offset={wavelet_offset} needs tokens of whole 2x2 latents, and "
      f"the model's patch size is {config.patch_size}: leave it out (None)."
    )

  def loss(
    params: Any,
    null_caption: Float[Array, "t e"],
    batch: Batch,
    key: Key[Array, ""],
  ) -> tuple[Float32[Array, ""], PerExample]:
    mask = tokens.token_mask(batch["grid"], batch["coordinates"].shape[1])
    key, discard_key = jax.random.split(key)
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["row"])
    posterior_key, drop_key, time_key, noise_key = jnp.unstack(
      jax.vmap(lambda row_key: jax.random.split(row_key, 4))(row_keys), axis=1
    )
    latents = scaling_factor * _sample_latents(batch, config.in_channels, posterior_key)
    timesteps = jax.vmap(draw_timestep)(time_key)
    noise = _normal(noise_key, latents)
    noisy_latents = process.add_noise(schedule, latents, noise, timesteps)
    dropped = jax.vmap(lambda k: jax.random.bernoulli(k, caption_dropout))(drop_key)
    captions = jnp.where(
      dropped[:, None, None],
      null_caption[None],
      batch["caption_embeddings"].astype(jnp.float32),
    )
    conditions = Conditions(
      coordinates=batch["coordinates"],
      grid=batch["grid"],
      timesteps=timesteps,
      caption_mask=batch["caption_mask"],
      caption_embeddings=captions,
    )
    if config.size_conditions:
      conditions = conditions.replace(
        image_size=batch["original_size"], aspect_ratio=batch["aspect_ratio"]
      )

    output: Any = model.apply(
      {"params": laid_out(params, model.compute)},
      noisy_latents,
      conditions,
      method="on_tokens",
      rngs={"kv_discard": discard_key},
    )
    prediction, variance_logits = split_prediction(output, config)
    keep = None
    if wavelet_offset is not None:
      keep = detail.wavelet_mask(
        latents,
        mask=mask,
        timesteps=timesteps,
        num_timesteps=schedule.num_timesteps,
        patch_size=config.patch_size,
        offset=wavelet_offset,
      )

    def excess(error: Float32[Array, "b n c"]) -> Float32[Array, " b"]:
      return frequency_weight * detail.spectral_excess(
        error,
        coordinates=batch["coordinates"],
        grid=batch["grid"],
        patch_size=config.patch_size,
        gamma=frequency_gamma,
      )

    per_example = iddpm_loss(
      schedule,
      latents=latents,
      noise=noise,
      noisy_latents=noisy_latents,
      timesteps=timesteps,
      prediction=prediction,
      variance_logits=variance_logits,
      mask=mask,
      snr_switch=snr_switch,
      min_snr_gamma=min_snr_gamma,
      keep=keep,
      excess=excess if frequency_weight else None,
    )
    return per_example["loss"].mean(), {**per_example, "timesteps": timesteps}

  return loss


def timestep_probabilities(
  schedule: Schedule, snr_shift: float
) -> Float64[np.ndarray, " timesteps"]:
  """Probability of each timestep, shifted for images that need more noise.

  At s times the side, the same noise hides s times less of what an image shows: the
  mean over s² pixels has s times less noise. Simple diffusion (Hoogeboom et al. 2023,
  section 3.1) and SD3 (Esser et al. 2024, section 5.3.2) shift log-SNR by -2 log s.
  Here the schedule and what the network is told stay; timesteps are drawn so that the
  density of log-SNR is that of evenly drawn ones, moved by -2 log s. What is moved
  beyond the schedule's ends is left out, not heaped up there.

  Args:
    snr_shift: s; above 1 for more noise.
  """
  if not 0 < snr_shift < np.inf:
    raise ValueError(f"loss.snr_shift={snr_shift} must be above 0.")
  log_snr = np.log(schedule.snr)
  # Timestep t is drawn where a number in [0, T) falls between t and t + 1; its log-SNR
  # stands in the middle. Those of the edges lie between, or go on in a line.
  steps = np.diff(log_snr)
  edges = np.concatenate(
    [
      log_snr[:1] - steps[0] / 2,
      (log_snr[1:] + log_snr[:-1]) / 2,
      log_snr[-1:] + steps[-1] / 2,
    ]
  )
  # Where the even draws fall whose log-SNR, moved, is that of each edge.
  moved = edges + 2 * np.log(snr_shift)
  origins = np.interp(-moved, -edges, np.arange(len(edges), dtype=np.float64))
  shares = np.diff(origins)
  if not shares.sum() > 0:
    raise ValueError(
      f"loss.snr_shift={snr_shift} moves every timestep out of the schedule, whose SNR "
      f"goes from {schedule.snr[0]:.3g} to {schedule.snr[-1]:.3g}."
    )
  return shares / shares.sum()


def beta_probabilities(
  schedule: Schedule, beta: tuple[float, float]
) -> Float64[np.ndarray, " timesteps"]:
  """Probability of each timestep if t / T has a beta distribution.

  FAPT (UltraHR-100K, arXiv 2510.20661) trains at 4K with Beta(2, 4): a third of T on
  average, towards little noise, where detail is decided.

  Args:
    beta: the distribution's two parameters; (1, 1) draws all timesteps alike.
  """
  edges = np.arange(schedule.num_timesteps + 1) / schedule.num_timesteps
  return np.diff(special.betainc(*beta, edges))


def check_aspect(
  frequency_weight: float, latent_sizes: Iterable[tuple[int, int]]
) -> None:
  """Refuses images that a frequency-weighted loss has no canvas for.

  Args:
    latent_sizes: heights and widths.

  Raises:
    ValueError: a side is more than four times the other.
  """
  if not frequency_weight:
    return
  for height, width in latent_sizes:
    ratio = max(height, width) / min(height, width)
    if ratio > detail.LONGEST_RATIO:
      raise ValueError(
        f"loss.frequency_weight={frequency_weight} is for images of up to "
        f"{detail.LONGEST_RATIO:g}:1, and the data have latents of {height}x{width}: "
        "leave it at 0, or crop such images to another size."
      )


def _timestep_draw(
  schedule: Schedule,
  snr_shift: float,
  beta: tuple[float, float] | None,
  timestep_range: tuple[int, int],
) -> Callable[[Array], Int32[Array, ""]]:
  low, high = timestep_range
  if not 0 <= low <= high < schedule.num_timesteps:
    raise ValueError(
      f"loss.timestep_range={low, high} must lie in 0 … {schedule.num_timesteps - 1}, "
      "the lower end first."
    )
  if beta is not None and snr_shift != 1:
    raise ValueError(
      f"loss.snr_shift={snr_shift} and loss.timestep_beta={beta} both say how "
      "timesteps are drawn: set one of them."
    )
  if beta is not None:
    probabilities = beta_probabilities(schedule, beta)
  elif snr_shift == 1:
    return lambda key: jax.random.randint(key, (), low, high + 1)
  else:
    probabilities = timestep_probabilities(schedule, snr_shift)
  if (low, high) != (0, schedule.num_timesteps - 1):
    timesteps = np.arange(schedule.num_timesteps)
    inside = np.where((low <= timesteps) & (timesteps <= high), probabilities, 0)
    if not inside.sum() > 0:
      raise ValueError(
        f"loss.timestep_range={low, high} has no timestep that loss.snr_shift="
        f"{snr_shift} draws: widen it, or leave the shift at 1.0."
      )
    probabilities = inside / inside.sum()
  upper = np.cumsum(probabilities).astype(np.float32)
  last = np.flatnonzero(probabilities)[-1]  # the sum may be rounded below 1

  def draw(key: Array) -> Int32[Array, ""]:
    at = jnp.searchsorted(upper, jax.random.uniform(key), side="right")
    return jnp.minimum(at, last).astype(jnp.int32)

  return draw


def _sample_latents(
  batch: Batch, channels: int, keys: Key[Array, " b"]
) -> Float32[Array, "b n c"]:
  """Latents as stored, or drawn anew from the stored posterior `(p q 2c)`."""
  if "latents" in batch:
    return batch["latents"].astype(jnp.float32)
  moments = batch["latent_moments"].astype(jnp.float32)
  b, n, _ = moments.shape
  moments = moments.reshape(b, n, -1, 2, channels)
  mean, log_variance = (moments[..., i, :].reshape(b, n, -1) for i in range(2))
  # The bounds of the published autoencoders' posterior.
  deviation = jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0))
  return mean + deviation * _normal(keys, mean)


def _normal(keys: Key[Array, " b"], like: Array) -> Float32[Array, "b n c"]:
  return jax.vmap(lambda key: jax.random.normal(key, like.shape[1:]))(keys)
