"""Stand-ins for a network of which the right samples are known."""

import pathlib

import jax.numpy as jnp
import numpy as np

from pixsigma_jax.diffusion.guidance import guide
from pixsigma_jax.diffusion.schedule import linear_schedule
from pixsigma_jax.diffusion.solvers import Prediction

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "samplers.npz"
SCHEDULE = linear_schedule()


def scales(schedule, timestep):
  """α and σ at a fraction of a timestep: log α is linear between timesteps."""
  knots = np.arange(schedule.num_timesteps, dtype=np.float32)
  log_alpha_bar = np.log(schedule.alpha_bar).astype(np.float32)
  now = jnp.interp(timestep, knots, log_alpha_bar)
  return jnp.exp(now / 2), jnp.sqrt(-jnp.expm1(now))


def closed_form(golden, guidance_scale):
  """The toy network of the golden file; guided if there is a scale.

  Without one it also has a fifth of its noise for variance logits.
  """
  mixing = jnp.asarray(golden["A"])
  unconditional, conditional = (
    jnp.asarray(golden[name]) for name in ("uncond", "cond")
  )

  def noise_in(latents, timestep, caption):
    wave = jnp.sin(timestep / 170)
    mixed = jnp.einsum("oc,bchw->bohw", mixing, latents)
    level = caption.mean(axis=(1, 2, 3), keepdims=True)
    return mixed + 0.9 * latents * (0.6 + 0.1 * wave) + 0.3 * level + 0.05 * wave

  def denoise(latents, timestep):
    noise = noise_in(latents, timestep, conditional)
    if guidance_scale is None:
      return Prediction(noise, 0.2 * noise)
    return Prediction(
      guide(noise_in(latents, timestep, unconditional), noise, guidance_scale)
    )

  return denoise


def exact(schedule, clean):
  """Knows the image; thinks of a variance that it lies at the posterior's."""

  def denoise(noisy_latents, timestep):
    signal_scale, noise_scale = scales(schedule, timestep)
    noise = (noisy_latents - signal_scale * clean) / noise_scale
    return Prediction(noise, jnp.full_like(noise, -1))

  return denoise


def gaussian(schedule, mean, spread):
  """The best estimate where images are drawn from N(mean, spread²): linear in x_t."""

  def denoise(noisy_latents, timestep):
    signal_scale, noise_scale = scales(schedule, timestep)
    centred = noisy_latents - signal_scale * mean
    variance = signal_scale**2 * spread**2 + noise_scale**2
    return Prediction(noise_scale * centred / variance)

  return denoise
