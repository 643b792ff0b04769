"""Hashed words: what a network may rely on in vectors that nobody trained."""

import itertools
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixsigma_jax.models.hashed_words import HashedWordEncoder, split_words

ENCODER = HashedWordEncoder()
LENGTH = 14


def embed(prompt, encoder=ENCODER):
  embeddings, _ = encoder.encode([prompt], LENGTH)
  return embeddings[0]


def similarity(first, second):
  """Cosine of two words, up to chance: 1/64 per standard deviation at this width.

  They are read off neighbouring positions, whose own vectors are unrelated.
  """
  encoder = HashedWordEncoder(width=4096)
  a, b, *_ = embed(f"{first} {second}", encoder)
  return a @ b / encoder.width


def test_a_word_has_one_vector_wherever_it_stands():
  from_first_to_third = embed("red and seven")[0] - embed("seven and red")[2]
  same_for_another = embed("two above blue")[0] - embed("blue above two")[2]
  # What is left is the difference of the two positions. Rounding to float32 only.
  np.testing.assert_allclose(from_first_to_third, same_for_another, rtol=0, atol=1e-6)


def test_the_order_of_words_shows_even_to_who_ignores_the_order_of_tokens():
  prompts = ["red seven left of blue two", "blue two left of red seven"]
  one, other = (np.tanh(embed(prompt)).sum(axis=0) for prompt in prompts)
  assert np.abs(one - other).max() > 0.1


def test_prompts_of_different_words_differ_where_the_words_do():
  one, other = embed("a red seven"), embed("a blue seven")
  assert (one != other).any(axis=-1).tolist() == [False, True] + [False] * 12


def test_words_have_unit_rms_and_positions_half_of_it():
  tokens = embed("a red seven above a blue two", HashedWordEncoder(width=4096))
  rms = np.sqrt(np.mean(tokens**2, axis=-1))
  # sqrt(1 + 1/4), as word and position are unrelated: chance is 1/128 at this width.
  np.testing.assert_allclose(rms, np.sqrt(1.25), atol=0.03)
  # Two paddings share all but their positions.
  apart = np.sqrt(np.mean((tokens[-1] - tokens[-2]) ** 2))
  np.testing.assert_allclose(apart, np.sqrt(0.5), atol=0.03)


def test_the_numbers_are_bell_shaped_around_zero():
  numbers = embed("seven", HashedWordEncoder(width=65536))[1] / np.sqrt(1.25)
  assert abs(numbers.mean()) < 0.02  # five standard errors
  # The sum of eight bytes has kurtosis 2.85, the Gaussian 3, a flat one 1.8.
  assert 2.7 < np.mean(numbers**4) < 3.1


def test_unrelated_words_are_nearly_orthogonal_and_a_typo_is_not():
  words = ["red", "blue", "green", "seven", "three", "left", "above", "hund", "七"]
  for first, second in itertools.combinations(words, 2):
    assert abs(similarity(first, second)) < 0.08  # five standard deviations
  assert similarity("magenta", "magentas") > 0.15
  assert similarity("yellow", "yelow") > 0.1
  assert similarity("seven", "seven") == pytest.approx(1, abs=0.06)


def test_the_mask_covers_the_words_and_an_end_token():
  _, mask = ENCODER.encode(["", "a red seven", "Red!"], 5)
  assert mask.sum(axis=-1).tolist() == [1, 4, 2]
  assert (np.sort(mask, axis=-1)[:, ::-1] == mask).all()  # the end of it, no holes
  assert [ENCODER.count(prompt) for prompt in ("", "a red seven", "Red!")] == [1, 4, 2]


def test_padding_is_masked_yet_not_zero_and_says_nothing_of_the_caption():
  short, long = embed("seven"), embed("a red seven above a blue two")
  np.testing.assert_array_equal(short[8:], long[8:])
  assert (np.abs(short).max(axis=-1) > 0.5).all()
  # End token and padding are two things: not the same vector at the same position.
  assert np.abs(embed("seven")[1] - embed("")[1]).max() > 0.5


def test_a_prompt_reads_alone_as_in_a_batch_and_at_any_length():
  prompts = ["a red seven", "", "a green three above a white eight"]
  batch, mask = ENCODER.encode(prompts, LENGTH)
  for i, prompt in enumerate(prompts):
    alone, alone_mask = ENCODER.encode([prompt], LENGTH + 3)
    np.testing.assert_array_equal(batch[i], alone[0, :LENGTH])
    np.testing.assert_array_equal(mask[i], alone_mask[0, :LENGTH])


def test_the_limit_counts_the_end_token_and_names_the_caption_it_refuses():
  prompt = "a red seven left of a blue two"
  ENCODER.encode([prompt], 9)
  with pytest.raises(ValueError, match=rf"'{prompt}' has 9 tokens .* limit is 8"):
    ENCODER.encode(["fine", prompt], 8)


def test_a_width_of_zero_is_refused():
  with pytest.raises(ValueError, match="width of at least 1, not 0"):
    HashedWordEncoder(width=0)


def test_the_same_bits_on_every_machine():
  embeddings, _ = ENCODER.encode(["a red seven left of a blue two", "七 é 🐶"], LENGTH)
  assert embeddings.dtype == np.float32
  assert zlib.crc32(embeddings.astype("<f4").tobytes()) == 2195487516


def test_identity_tells_widths_apart():
  expected = {"name": "hashed-words", "width": 8, "version": 1}
  assert HashedWordEncoder(width=8).identity == expected


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("A red seven, left-of: (BLUE) two.", "a red seven left of blue two"),
    ("  tabs\tand\nlines  ", "tabs and lines"),
    ("Ärger ΣΊΓΜΑ Ёж", "ärger σίγμα ёж"),
    ("हिन्दी العربية ไทย 红色的七", "हिन्दी العربية ไทย 红色的七"),
    ("7 and 3.5", "7 and 3 5"),
    ("a 🐶🐶+🐱", "a 🐶 🐶 + 🐱"),
    ("…!? —", ""),
  ],
)
def test_words_lose_capitals_and_punctuation_in_any_script(text, words):
  assert split_words(text) == tuple(words.split())


def test_composed_and_decomposed_accents_are_one_word():
  composed, decomposed = "\u00c5s", "a\u030as"
  np.testing.assert_array_equal(embed(composed), embed(decomposed))


@given(st.text(max_size=12))
def test_any_text_is_encoded(text):
  embeddings, mask = ENCODER.encode([text], LENGTH)
  assert np.isfinite(embeddings).all()
  assert mask.sum() == ENCODER.count(text)
