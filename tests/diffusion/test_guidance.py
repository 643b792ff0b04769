"""Classifier-free guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixsigma_jax.diffusion.guidance import (
  guide,
  guide_first_three,
  rescale,
  scale_within,
)
from pixsigma_jax.models.layers import Compute
from pixsigma_jax.models.pixart import PixArt
from tests.models import reference


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
  in_full = [x.astype(jnp.float32) for x in (unconditional, conditional)]
  mask = jnp.ones((2, 3), bool)
  for function, more in [
    (guide, (4.5,)),
    (guide_first_three, (4.5, 4)),
    (rescale, (0.7, mask)),
  ]:
    guided = function(unconditional, conditional, *more)
    assert guided.dtype == jnp.float32
    np.testing.assert_array_equal(guided, function(*in_full, *more))


# ----------------------------------------------------------------- the first three only


def test_guiding_the_first_three_channels_gives_the_references_numbers():
  config, arrays = reference.load("ms_plain")
  params = reference.params_from(arrays, "w.", config)
  captions = jnp.asarray(arrays["in.y"][:, 0])
  null = jnp.asarray(arrays["w.y_embedder.y_embedding"])
  model = PixArt(config, Compute(dtype=jnp.float32))
  outputs = jax.jit(model.apply)(
    {"params": params},
    *(
      jnp.concatenate([half, half])
      for half in (
        jnp.asarray(reference.channels_last(arrays["in.x"])),
        jnp.asarray(arrays["in.t"]),
      )
    ),
    jnp.concatenate([captions, jnp.broadcast_to(null, captions.shape)]),
    jnp.concatenate([jnp.asarray(arrays["in.mask"] > 0)] * 2),
  )
  conditional, unconditional = jnp.split(outputs, 2)
  guided = guide_first_three(unconditional[..., :4], conditional[..., :4], 4.5, 4)

  theirs = reference.channels_last(arrays["out_cfg4.5"])[:3]
  # Two float32 programs of this depth agree to 2e-5; the difference counts 4.5 times.
  close = {"rtol": 1e-4, "atol": 1e-4 * np.abs(theirs).max()}
  np.testing.assert_allclose(guided, theirs[..., :4], **close)
  np.testing.assert_allclose(conditional[..., 4:], theirs[..., 4:], **close)
  assert np.abs(unconditional - conditional).max() > 100 * close["atol"]


def test_in_a_patch_every_latents_first_three_channels_are_guided():
  # Tokens of 2x2 patches hold `(p q c)`.
  unconditional, conditional = (normal(seed, (2, 3, 2, 2, 5)) for seed in (0, 1))
  tokens = [x.reshape(2, 3, 20) for x in (unconditional, conditional)]
  guided = guide_first_three(*tokens, 3.0, channels=5).reshape(conditional.shape)
  everywhere = guide(unconditional, conditional, 3.0)
  np.testing.assert_array_equal(guided[..., :3], everywhere[..., :3])
  np.testing.assert_array_equal(guided[..., 3:], conditional[..., 3:])


def test_channels_that_do_not_fill_the_last_axis_are_named():
  with pytest.raises(ValueError, match=r"16 long, .* 3 channels: .* multiple of 3"):
    guide_first_three(normal(0, (1, 2, 16)), normal(1, (1, 2, 16)), 4.5, 3)


# ---------------------------------------------------------------------------- rescaling


def deviations(tokens, mask):
  pairs = zip(np.asarray(tokens), np.asarray(mask), strict=True)
  return np.array([row[valid].std() for row, valid in pairs])


MASK = jnp.asarray(np.arange(6) < np.array([[6], [2], [1]]))


@pytest.mark.parametrize("factor", [0.0, 0.7, 1.0])
def test_each_image_loses_its_share_of_the_contrast_that_guidance_added(factor):
  guided, conditional = 3 * normal(0, (3, 6, 4)) + 1, normal(1, (3, 6, 4))
  rescaled = rescale(guided, conditional, factor, MASK)
  before, wanted = deviations(guided, MASK), deviations(conditional, MASK)
  expected = factor * wanted + (1 - factor) * before
  # Sums of 4 to 24 numbers, divided: some float32 roundings.
  np.testing.assert_allclose(deviations(rescaled, MASK), expected, rtol=2e-6)
  # It only scales: a prediction keeps its direction, mean included.
  ratio = np.asarray(rescaled / guided)
  np.testing.assert_allclose(ratio, ratio[:, :1, :1] + 0 * ratio, rtol=2e-6)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_padding_has_no_part_in_the_contrast(garbage):
  guided, conditional = 3 * normal(0, (3, 6, 4)), normal(1, (3, 6, 4))
  valid = MASK[..., None]
  soiled = [jnp.where(valid, x, jnp.float32(garbage)) for x in (guided, conditional)]
  expected = np.asarray(rescale(guided, conditional, 0.7, MASK))
  actual = np.asarray(rescale(*soiled, 0.7, MASK))
  np.testing.assert_array_equal(actual[np.asarray(MASK)], expected[np.asarray(MASK)])


def test_a_network_that_still_predicts_nothing_stays_finite():
  nothing = jnp.zeros((1, 2, 4))
  rescaled = rescale(nothing, nothing, 0.7, jnp.ones((1, 2), bool))
  np.testing.assert_array_equal(rescaled, nothing)


# -------------------------------------------------------------------------- an interval


@given(
  timestep=st.integers(0, 999),
  ends=st.lists(st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]), min_size=2, max_size=2),
)
def test_guidance_is_on_inside_its_interval_and_off_outside(timestep, ends):
  low, high = sorted(ends)
  # A traced timestep, as in the solver: one program for all.
  scale = SCALE_AT(jnp.float32(timestep), jnp.float32(low), jnp.float32(high))
  inside = low * 999 <= timestep <= high * 999
  assert scale == (4.5 if inside else 1.0)
  assert scale.dtype == jnp.float32


SCALE_AT = jax.jit(lambda t, low, high: scale_within(t, 4.5, low, high, 1000))


@pytest.mark.parametrize("timestep", [0.0, 49.95, 999.0])
def test_the_whole_schedule_is_an_interval_too(timestep):
  assert scale_within(jnp.float32(timestep), 4.5, 0.0, 1.0, 1000) == 4.5


def test_nothing_short_of_the_whole_schedule_holds_its_last_timestep():
  assert scale_within(jnp.float32(999), 4.5, 0.0, 0.9999, 1000) == 1.0
  assert scale_within(jnp.float32(999), 4.5, 1.0, 1.0, 1000) == 4.5
