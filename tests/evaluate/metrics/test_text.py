"""Text read in images: TextAtlasEval's counting, worked by hand, and its libraries."""

import random

import Levenshtein
import pytest

from pixsigma_jax.evaluate.metrics import text_accuracy


def test_a_text_that_is_read_whole_is_right():
  assert text_accuracy([("A Blue Door", "A Blue Door")]) == (100, 100, 100, 0, 1)


def test_nothing_read_is_nothing_right_and_every_character_wrong():
  assert text_accuracy([("blue door", "")]) == (0, 0, 0, 1, 1)


def test_counts_are_summed_over_images_before_they_are_divided():
  # 1 of 1 words, and 0 of 3: a mean over images would say 50 per cent.
  scores = text_accuracy([("open", "open"), ("one two three", "xyzzy")])
  assert scores.accuracy == 25
  assert scores.precision == 50
  assert scores.f1 == pytest.approx(100 / 3)


def test_a_word_of_the_truth_is_taken_once():
  scores = text_accuracy([("red", "red red red")])
  assert scores.accuracy == 100
  assert scores.precision == pytest.approx(100 / 3)


def test_order_and_case_of_words_do_not_matter_to_accuracy_but_to_the_cer():
  scores = text_accuracy([("red door", "DOOR RED")])
  assert scores.accuracy == 100
  assert scores.cer == 1  # no letter in common: case counts there


def test_words_count_from_four_fifths_alike():
  # 2·4/10 of "abcde" and "abcdx" is 80 per cent; 2·3/8 is 75.
  assert text_accuracy([("abcde", "abcdx")]).accuracy == 100
  assert text_accuracy([("abcd", "abcx")]).accuracy == 0


def test_likeness_is_rounded_to_a_whole_per_cent():
  # 66 of 83 letters are 79.518 per cent, which fuzzywuzzy calls 80.
  truth, read = "a" * 33 + "b" * 8, "a" * 33 + "c" * 9
  assert text_accuracy([(truth, read)]).accuracy == 100
  # 58 of 73 are 79.45.
  truth, read = "a" * 29 + "b" * 7, "a" * 29 + "c" * 8
  assert text_accuracy([(truth, read)]).accuracy == 0


def test_each_word_takes_the_first_of_the_truth_that_is_left():
  # Greedy: "abcdef" takes "abcdeg", and "abcdeg" then takes what is left, "abcdef".
  assert text_accuracy([("abcdeg abcdef", "abcdef abcdeg")]).accuracy == 100
  # "aaaab" takes "aaaaa", its only partner being "aaabb": too unlike for "aaaaa".
  scores = text_accuracy([("aaaaa aaabb", "aaaab aaaaa")])
  assert scores.accuracy == 50


def test_the_cer_divides_by_the_longer_text_and_leaves_out_empty_truths():
  scores = text_accuracy([("ab", "abcdefgh"), ("", "noise")])
  assert scores.cer == pytest.approx(6 / 8)
  assert scores.images == 2
  assert scores.precision == 0


def test_the_edit_distance_is_levenshteins():
  draw = random.Random(0)
  for _ in range(50):
    truth, read = ("".join(draw.choices("ab c", k=draw.randint(1, 12))) for _ in "12")
    expected = Levenshtein.distance(truth, read) / max(len(truth), len(read))
    assert text_accuracy([(truth, read)]).cer == pytest.approx(expected)


def test_texts_of_white_space_divide_nothing_by_nothing():
  assert text_accuracy([(" ", " ")]) == (0, 0, 0, 0, 1)


def test_no_image_is_refused():
  with pytest.raises(ValueError, match="at least one pair"):
    text_accuracy([])
