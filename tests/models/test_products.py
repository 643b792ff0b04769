"""Matrix products: their numbers, and the precision in which a device does them."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixsigma_jax.models import products
from pixsigma_jax.models.layers import Compute
from pixsigma_jax.models.pixart import PixArt, PixArtConfig, init_params

DOT = re.compile(r"dot_general .*: \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\)")


def draw(*shape, seed=0, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


@pytest.mark.parametrize("rows", [(5,), (2, 5), (2, 3, 5)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_is_the_product_and_its_gradients_are_products_of_what_was_rounded(
  rows, dtype
):
  x, y = draw(*rows, 7, dtype=dtype), draw(7, 3, seed=1, dtype=dtype)
  gradient = draw(*rows, 3, seed=2)
  out, backward = jax.vjp(products.matmul, x, y)
  assert out.dtype == jnp.float32
  of_x, of_y = backward(gradient)
  assert of_x.dtype == of_y.dtype == dtype
  exact = [np.asarray(a.astype(dtype), np.float64) for a in (x, y, gradient)]
  x, y, gradient = exact
  flat_x, flat_gradient = x.reshape(-1, 7), gradient.reshape(-1, 3)
  # Sums of few products in float32, once more rounded to the dtype.
  rounded = [
    np.asarray(jnp.asarray(a, jnp.float32).astype(dtype), np.float64)
    for a in (gradient @ y.T, flat_x.T @ flat_gradient)
  ]
  np.testing.assert_allclose(out, x @ y, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(np.float64(of_x), rounded[0], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(np.float64(of_y), rounded[1], rtol=1e-5, atol=1e-5)


def test_it_maps_over_a_stack_of_matrices():
  x, y = draw(4, 5, 7), draw(4, 7, 3, seed=1)

  def loss(matmul, x, y):
    return jnp.square(jax.vmap(matmul)(x, y)).sum()

  ours, theirs = (
    jax.grad(lambda x, y, f=f: loss(f, x, y), (0, 1))(x, y)
    for f in (products.matmul, jnp.matmul)
  )
  chex.assert_trees_all_close(ours, theirs, rtol=1e-5)


# A GPU is as fast as its data sheet in bfloat16 alone; JAX by itself multiplies a
# float32 gradient by a matrix in float32 there.
@pytest.mark.parametrize("platform", ["cuda", "tpu", "cpu"])
@pytest.mark.parametrize("attention", ["xla", "chunked"])
def test_every_product_of_a_training_step_is_in_the_compute_dtype(platform, attention):
  config = PixArtConfig.from_variant(
    "Nano/2", base_size=4, pe_interpolation=1.0, caption_width=8, caption_length=5
  )
  model = PixArt(config, Compute(attention=attention, remat="block"))
  params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))

  def loss(params, latents):
    out = model.apply(
      {"params": params},
      latents,
      jnp.ones(1),
      jnp.ones((1, 5, 8)),
      jnp.ones((1, 5), bool),
    )
    return jnp.square(out).mean()

  traced = jax.jit(jax.grad(loss)).trace(params, jnp.ones((1, 8, 8, 4)))
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  operands = DOT.findall(text)
  assert len(operands) == text.count("dot_general ")
  assert len(operands) > 3 * 8 * config.depth
  assert set(operands) == {("bf16", "bf16")}
