"""Classifier-free guidance."""

import jax.numpy as jnp
import numpy as np
import pytest

from pixsigma_jax.diffusion.guidance import classifier_free, guide


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


def spy(calls):
  """A network that writes down its batch and answers with its caption."""

  def denoise(noisy_latents, timestep, condition):
    calls.append((noisy_latents, timestep, condition))
    return noisy_latents + condition["caption"]

  return denoise


def test_one_call_takes_the_unconditional_half_first():
  calls, noisy_latents = [], normal(0)
  null, caption = {"caption": normal(1)}, {"caption": normal(2)}
  denoise = classifier_free(
    spy(calls), unconditional=null, conditional=caption, scale=4.5
  )

  guided = denoise(noisy_latents, jnp.float32(7))

  [(seen, timestep, condition)] = calls
  np.testing.assert_array_equal(seen, np.concatenate([noisy_latents] * 2))
  np.testing.assert_array_equal(condition["caption"][:2], null["caption"])
  np.testing.assert_array_equal(condition["caption"][2:], caption["caption"])
  assert timestep == 7
  expected = guide(
    noisy_latents + null["caption"], noisy_latents + caption["caption"], 4.5
  )
  np.testing.assert_array_equal(guided, expected)


def test_without_guidance_only_the_captions_are_run():
  calls, noisy_latents = [], normal(0)
  null, caption = {"caption": normal(1)}, {"caption": normal(2)}
  denoise = classifier_free(
    spy(calls), unconditional=null, conditional=caption, scale=1.0
  )

  answer = denoise(noisy_latents, jnp.float32(7))

  assert len(calls) == 1
  np.testing.assert_array_equal(answer, noisy_latents + caption["caption"])
