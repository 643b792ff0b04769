"""Classifier-free guidance."""

import jax.numpy as jnp
import numpy as np
import pytest

from pixsigma_jax.diffusion.guidance import guide


def normal(seed, shape=(2, 3, 4), dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0, 4.5])
def test_guidance_walks_on_the_line_through_both_predictions(scale):
  unconditional, conditional = normal(0), normal(1)
  guided = guide(unconditional, conditional, scale)
  expected = (1 - scale) * np.asarray(unconditional) + scale * np.asarray(conditional)
  np.testing.assert_allclose(guided, expected, rtol=1e-6, atol=2e-6)


def test_the_difference_is_not_rounded_to_half_precision():
  unconditional, conditional = (normal(seed, dtype=jnp.bfloat16) for seed in (0, 1))
  guided = guide(unconditional, conditional, 4.5)
  expected = guide(
    unconditional.astype(jnp.float32), conditional.astype(jnp.float32), 4.5
  )
  assert guided.dtype == jnp.float32
  np.testing.assert_array_equal(guided, expected)
