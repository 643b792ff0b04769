"""Branches of guidance in the pipeline, beside and without one another."""

import numpy as np
import pytest

from tests.sample import models

PROMPTS = ("a one", "two threes")


def drawn(**settings):
  passes = settings.pop("guidance_passes", 1)
  subject = models.pipeline(batch_size=2, guidance_passes=passes)
  subject(list(PROMPTS), **{"num_inference_steps": 3, **settings})
  return np.stack(subject.autoencoder.decoded)


@pytest.fixture(scope="module")
def plain():
  return drawn()


def test_a_scale_of_0_is_no_guidance_to_the_bit(plain):
  off = {"pag_scale": 0, "skip_layer_guidance_scale": 0}
  layers = {"pag_applied_layers": [0], "skip_guidance_layers": [1]}
  np.testing.assert_array_equal(drawn(**off, **layers), plain)


EVERYTHING = {
  "pag_scale": 2.0,
  "pag_applied_layers": [0, 1],
  "skip_layer_guidance_scale": 1.0,
  "skip_guidance_layers": [0],
  "guidance_method": "apg",
}


def test_branches_one_after_the_other_draw_as_one_batch(plain):
  together, apart = (drawn(**EVERYTHING, guidance_passes=n) for n in (1, 2))
  # Programs of other shapes: float32 over three guided steps.
  scale = np.abs(together).max()
  np.testing.assert_allclose(apart, together, rtol=0, atol=1e-4 * scale)
  assert np.abs(together - plain).max() > 0.01 * scale


def test_an_image_is_the_same_alone_and_in_a_batch_with_all_guidance_and_caching():
  settings = {**EVERYTHING, "step_caching": 0.1, "num_inference_steps": 3}
  together = drawn(**settings, seed=4)
  subject = models.pipeline(batch_size=2, guidance_passes=1)
  subject(PROMPTS[1], **settings, seed=5)
  np.testing.assert_array_equal(subject.autoencoder.decoded[0], together[1])


def test_outside_the_interval_no_guidance_acts():
  # No timestep of three lies in the last thousandth.
  never = drawn(**EVERYTHING, guidance_interval=(0, 0.001))
  without = drawn(guidance_scale=1)
  scale = np.abs(without).max()
  np.testing.assert_allclose(never, without, rtol=0, atol=1e-4 * scale)


def test_apg_without_limit_and_momentum_that_keeps_everything_is_plain_guidance(plain):
  same = drawn(guidance_method="apg", apg_eta=1, apg_momentum=0, apg_threshold=1e9)
  # Through clean estimates and back, which at the first step are 157 times as large.
  scale = np.abs(plain).max()
  np.testing.assert_allclose(same, plain, rtol=0, atol=1e-3 * scale)


def test_each_method_draws_other_images(plain):
  for method in ("apg", "cfg-zero"):
    assert np.abs(drawn(guidance_method=method) - plain).max() > 1e-3


def test_a_layer_that_the_model_has_not_is_named():
  subject = models.pipeline()
  with pytest.raises(
    ValueError, match=r"pag_applied_layers=0,14 names layer 14, and .* layers 0 … 1"
  ):
    subject.stream("a", pag_scale=3, pag_applied_layers=[0, 14])


def test_the_middle_layer_is_the_default():
  by_default, middle = (
    drawn(pag_scale=2.0, pag_applied_layers=layers) for layers in (None, [1])
  )
  np.testing.assert_array_equal(by_default, middle)
