"""Classifier-free guidance (Ho & Salimans 2022): exaggerates what a caption changes."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


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
