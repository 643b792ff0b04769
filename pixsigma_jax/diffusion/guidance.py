"""Classifier-free guidance (Ho & Salimans 2022): exaggerates what a caption changes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pixsigma_jax.diffusion.solvers import Denoiser


def guide(
  unconditional: Float[Array, "*shape"],
  conditional: Float[Array, "*shape"],
  scale: float | Float[Array, ""],
) -> Float32[Array, "*shape"]:
  """Moves a prediction `scale` times the way from unconditional to conditional.

  0 is unconditional, 1 conditional, more exaggerates. In float32 even where the
  network answers in bfloat16: the difference is small and is multiplied.
  """
  unconditional = unconditional.astype(jnp.float32)
  conditional = conditional.astype(jnp.float32)
  return unconditional + scale * (conditional - unconditional)


def classifier_free(
  denoise: Callable[[Array, Array, Any], Array],
  *,
  unconditional: Any,
  conditional: Any,
  scale: float,
) -> Denoiser:
  """Makes a guided `denoise(noisy_latents, timestep)` for `solvers.solve`.

  Args:
    denoise: the network's ε of (noisy_latents, timestep, condition).
    unconditional: condition of the null caption, a tree of arrays [b ...].
    conditional: condition of the captions, the same tree.
    scale: guidance scale. At 1 the network sees the captions alone; otherwise one
      call takes twice the batch, the unconditional half first.
  """
  if scale == 1:
    return lambda noisy_latents, timestep: denoise(noisy_latents, timestep, conditional)

  both = jax.tree.map(
    lambda *halves: jnp.concatenate(halves), unconditional, conditional
  )

  def guided(noisy_latents: Array, timestep: Array) -> Array:
    twice = jnp.concatenate([noisy_latents, noisy_latents])
    first, second = jnp.split(denoise(twice, timestep, both), 2)
    return guide(first, second, scale)

  return guided
