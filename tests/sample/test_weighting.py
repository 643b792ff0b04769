"""Weights of words: what is read, and what becomes of the words' tokens."""

import numpy as np
import pytest

from pixsigma_jax.sample.encoders import RememberedCaptions
from pixsigma_jax.sample.weighting import WeightedEncoder, parse, texts_of
from tests.sample import models
from tests.sample.models import ENCODER

LENGTH = 8


@pytest.mark.parametrize(
  ("prompt", "parts"),
  [
    ("a red seven", [("a red seven", 1)]),
    ("(a red seven:1.3)", [("a red seven", 1.3)]),
    ("(a red seven : 1.3 )", [("a red seven ", 1.3)]),
    ("a (red) seven", [("a ", 1), ("red", 1.1), (" seven", 1)]),
    ("((a:2) b:0.5) c", [("a", 1.0), (" b", 0.5), (" c", 1)]),
    (r"a \(red\) seven", [("a (red) seven", 1)]),
    ("at 9:30 (b:0)", [("at 9:30 ", 1), ("b", 0)]),
    ("(a: b)", [("a: b", 1.1)]),
    ("", []),
  ],
)
def test_parts_of_a_prompt_and_their_weights(prompt, parts):
  weighed = parse(prompt)
  found = [(weighed.text[start:end], w) for start, end, w in weighed.parts]
  assert [text for text, _ in found] == [text for text, _ in parts]
  np.testing.assert_allclose([w for _, w in found], [w for _, w in parts])


@pytest.mark.parametrize(
  ("prompt", "message"),
  [
    ("a (b", r"has a '\(' too many: write \\\( for"),
    ("a) b", r"has a '\)' too many"),
    ("(a:1.2.3)", "has the weight '1.2.3': it must be a number"),
    ("(a:-1)", "has the weight '-1'"),
  ],
)
def test_what_cannot_be_read_is_refused(prompt, message):
  with pytest.raises(ValueError, match=message):
    parse(prompt)


def test_only_weighed_words_move_along_the_line_from_the_empty_prompt():
  subject = WeightedEncoder(ENCODER)
  plain, mask = ENCODER.encode(["a red seven"], LENGTH)
  (empty,), _ = ENCODER.encode([""], LENGTH)
  ours, its_mask = subject.encode(["a (red:1.5) seven"], LENGTH)
  np.testing.assert_array_equal(its_mask, mask)
  moved = empty[1] + 1.5 * (plain[0, 1] - empty[1])
  np.testing.assert_allclose(ours[0, 1], moved, rtol=0, atol=1e-6)
  np.testing.assert_array_equal(np.delete(ours, 1, 1), np.delete(plain, 1, 1))
  nothing, _ = subject.encode(["(a red seven:0)"], LENGTH)
  np.testing.assert_array_equal(nothing[0, :3], empty[:3])


def latents_of(subject, prompt, **arguments):
  arguments = {"num_inference_steps": 2, "output_type": "latent", **arguments}
  return subject(prompt, **arguments).images[0]


def test_weights_of_1_change_nothing_and_others_do():
  subject = models.pipeline()
  plain = latents_of(subject, "a red seven")
  on = {"prompt_weighting": True}
  np.testing.assert_array_equal(latents_of(subject, "a red seven", **on), plain)
  np.testing.assert_array_equal(latents_of(subject, "a (red:1) seven", **on), plain)
  moved = latents_of(subject, "a (red:1.3) seven", **on)
  assert np.abs(moved - plain).max() > 1e-3
  with pytest.raises(ValueError, match="caption_cleaning=clean takes out the parenth"):
    subject.stream("a", caption_cleaning="clean", **on)


def test_parentheses_are_characters_unless_weights_are_asked_for():
  subject = models.pipeline()
  off = latents_of(subject, "a (red:1.3) seven")
  on = latents_of(subject, "a (red:1.3) seven", prompt_weighting=True)
  assert np.abs(off - on).max() > 1e-3


def test_remembered_captions_have_weights_too():
  prompt = "a (red:1.3) seven"
  subject = models.pipeline()
  known = RememberedCaptions.of(ENCODER, texts_of(prompt), LENGTH)
  ours, theirs = (
    latents_of(one, prompt, prompt_weighting=True)
    for one in (subject.replace(text_encoder=known), subject)
  )
  np.testing.assert_array_equal(ours, theirs)
