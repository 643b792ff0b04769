"""From clean to noisy latents, and between the three things a network can predict.

With α = √alpha_bar and σ = √(1 - alpha_bar) of the timestep:
  noisy latents  x_t = α x_0 + σ ε    (DDPM, equation 4)
  velocity       v   = α ε - σ x_0    (progressive distillation, appendix D)
so (x_t, v) is (x_0, ε) turned by an angle.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Int

from pixsigma_jax.diffusion.schedule import Schedule, gather

PREDICTIONS = ("noise", "latents", "velocity")


def add_noise(
  schedule: Schedule,
  latents: Float[Array, "b *shape"],
  noise: Float[Array, "b *shape"],
  timesteps: Int[Array, " b"],
) -> Float32[Array, "b *shape"]:
  """A draw x_t of q(x_t | x_0), given the unit normal noise ε that decides it."""
  signal_scale = gather(schedule.signal_scale, timesteps, latents.ndim)
  noise_scale = gather(schedule.noise_scale, timesteps, latents.ndim)
  latents, noise = latents.astype(jnp.float32), noise.astype(jnp.float32)
  return signal_scale * latents + noise_scale * noise


def convert(
  schedule: Schedule,
  prediction: Float[Array, "b *shape"],
  *,
  noisy_latents: Float[Array, "b *shape"],
  timesteps: Int[Array, " b"],
  source: str,
  target: str,
) -> Float32[Array, "b *shape"]:
  """Re-expresses a prediction made from `noisy_latents`.

  `source` says what `prediction` is and `target` what is wanted: "noise" (ε),
  "latents" (x_0) or "velocity" (v).

  Raises:
    ValueError: if `source` or `target` is none of these.
  """
  for name in (source, target):
    if name not in PREDICTIONS:
      raise ValueError(
        f'A network predicts {", ".join(PREDICTIONS)}; "{name}" is none of them.'
      )
  prediction = prediction.astype(jnp.float32)
  if source == target:
    return prediction
  noisy_latents = noisy_latents.astype(jnp.float32)

  def at(table: Float64[np.ndarray, " timesteps"]) -> Float32[Array, "b ..."]:
    return gather(table, timesteps, prediction.ndim)

  alpha, sigma = schedule.signal_scale, schedule.noise_scale
  # Each source gives both x_0 and ε by its best-conditioned formula: α is 0.006 at
  # the last timestep and σ 0.01 at the first, and a detour would divide by them.
  if source == "noise":
    noise = prediction
    latents = at(1 / alpha) * noisy_latents - at(sigma / alpha) * noise
  elif source == "latents":
    latents = prediction
    noise = at(1 / sigma) * noisy_latents - at(alpha / sigma) * latents
  else:
    latents = at(alpha) * noisy_latents - at(sigma) * prediction
    noise = at(sigma) * noisy_latents + at(alpha) * prediction

  if target == "noise":
    return noise
  if target == "latents":
    return latents
  return at(alpha) * noise - at(sigma) * latents
