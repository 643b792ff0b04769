"""Matrix products in the precision of their operands, in the backward pass too."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


@jax.custom_vjp
def matmul(x: Float[Array, "*b i"], y: Float[Array, "i o"]) -> Float32[Array, "*b o"]:
  """x · y, both of one dtype, accumulated in float32.

  The gradient of what comes out is rounded to that dtype before it multiplies, as mixed
  precision has it elsewhere. JAX by itself multiplies it as it comes, in float32: on a
  GPU and on a CPU at half the speed or less.
  """
  return jnp.matmul(x, y, preferred_element_type=jnp.float32)


def _forward(x, y):
  return matmul(x, y), (x, y)


def _backward(operands, gradient):
  x, y = operands
  gradient = gradient.astype(x.dtype)
  last, rows = gradient.ndim - 1, tuple(range(gradient.ndim - 1))
  of_x = jax.lax.dot_general(
    gradient, y, (((last,), (1,)), ((), ())), preferred_element_type=jnp.float32
  )
  of_y = jax.lax.dot_general(
    x, gradient, ((rows, rows), ((), ())), preferred_element_type=jnp.float32
  )
  return of_x.astype(x.dtype), of_y.astype(y.dtype)


matmul.defvjp(_forward, _backward)
