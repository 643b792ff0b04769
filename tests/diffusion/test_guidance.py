"""Classifier-free guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import (
  MomentumBuffer,
  normalized_guidance,
)
from hypothesis import given
from hypothesis import strategies as st

from pixsigma_jax.diffusion.guidance import (
  guide,
  guide_away,
  guide_first_three,
  guide_from_optimal,
  guide_projected,
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


# -------------------------------------------------- other ways to guide, to the side


def _predictions(seed=0, shape=(2, 5, 4)):
  draw = np.random.default_rng(seed)
  unconditional, conditional = (
    jnp.asarray(draw.normal(size=shape), jnp.float32) for _ in range(2)
  )
  return unconditional, conditional, jnp.ones(shape[:2], bool)


@pytest.mark.parametrize("threshold", [1.5, 1e9])
def test_projected_guidance_is_diffusers_over_two_steps(threshold):
  buffer = MomentumBuffer(-0.5)
  average = jnp.zeros((2, 5, 4), jnp.float32)
  for seed in (0, 1):
    unconditional, conditional, mask = _predictions(seed)
    ours, average = guide_projected(
      unconditional,
      conditional,
      4.5,
      mask,
      average,
      momentum=-0.5,
      threshold=threshold,
      eta=0.25,
    )
    theirs = normalized_guidance(
      torch.tensor(np.asarray(conditional)),
      torch.tensor(np.asarray(unconditional)),
      guidance_scale=3.5,  # counted from the conditional prediction, as in the paper
      momentum_buffer=buffer,
      eta=0.25,
      norm_threshold=threshold,
      use_original_formulation=True,
    )
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-5)


def test_projected_guidance_adds_nothing_along_the_conditional_estimate():
  unconditional, conditional, mask = _predictions()
  zeros = jnp.zeros_like(conditional)
  ours, _ = guide_projected(
    unconditional, conditional, 7.0, mask, zeros, momentum=0.0, threshold=15.0, eta=0.0
  )
  along = ((ours - conditional) * conditional).sum(axis=(1, 2))
  np.testing.assert_allclose(along, 0, atol=1e-4)


def test_the_optimal_multiple_leaves_a_difference_at_a_right_angle():
  unconditional, conditional, mask = _predictions()
  zero = guide_from_optimal(unconditional, conditional, 0.0, mask)
  angle = ((conditional - zero) * unconditional).sum(axis=(1, 2))
  np.testing.assert_allclose(angle, 0, atol=1e-4)
  one = guide_from_optimal(unconditional, conditional, 1.0, mask)
  np.testing.assert_allclose(one, conditional, rtol=0, atol=1e-6)
  doubled = guide_from_optimal(2 * unconditional, conditional, 3.0, mask)
  same = guide_from_optimal(unconditional, conditional, 3.0, mask)
  np.testing.assert_allclose(doubled, same, rtol=0, atol=1e-5)


def test_padding_turns_neither():
  unconditional, conditional, mask = _predictions()
  mask = mask.at[:, 3:].set(False)
  zeros = jnp.zeros_like(conditional)
  dirty = conditional.at[:, 3:].add(1e3)
  for clean, other in zip(
    *(
      (
        guide_from_optimal(unconditional, c, 3.0, mask),
        guide_projected(
          unconditional, c, 3.0, mask, zeros, momentum=0.0, threshold=1.0, eta=0.0
        )[0],
      )
      for c in (conditional, dirty)
    ),
    strict=True,
  ):
    np.testing.assert_array_equal(clean[:, :3], other[:, :3])


def test_guiding_away_goes_from_the_weakened_network_to_the_whole_one():
  guided, conditional, _ = _predictions()
  weakened = 0.5 * conditional
  found = guide_away(guided, conditional, weakened, 3.0)
  np.testing.assert_allclose(found, guided + 1.5 * conditional, rtol=1e-6, atol=1e-6)
  np.testing.assert_array_equal(guide_away(guided, conditional, weakened, 0.0), guided)
