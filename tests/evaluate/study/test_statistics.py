"""Win rates, strengths and agreement: closed forms and published examples."""

import itertools
import math

import numpy as np
import pytest

from pixsigma_jax.evaluate.study import statistics
from pixsigma_jax.evaluate.study.statistics import Comparison, comparisons_of, summarize


def votes(first, second, wins, losses, ties=0, rater="ann"):
  scores = [1.0] * wins + [0.0] * losses + [0.5] * ties
  return [
    Comparison(rater, f"{i:03}", first, second, score) for i, score in enumerate(scores)
  ]


def test_two_models_differ_in_strength_by_the_log_odds_of_their_wins():
  wins = np.array([[0.0, 30.0], [12.0, 0.0]])
  first, second = statistics.bradley_terry(wins)
  assert first - second == pytest.approx(math.log(30 / 12), abs=1e-12)
  assert first + second == pytest.approx(0, abs=1e-12)


def test_strengths_come_back_from_the_win_rates_that_they_predict():
  strengths = np.array([1.3, 0.2, -0.4, -1.1])
  games = np.array([[0, 9, 400, 2], [9, 0, 31, 5], [400, 31, 0, 1], [2, 5, 1, 0.0]])
  wins = games / (1 + np.exp(strengths[None] - strengths[:, None]))
  found = statistics.bradley_terry(wins)
  np.testing.assert_allclose(found, strengths, atol=1e-9)


def test_strengths_far_apart_are_found_too():
  wins = np.array([[0.0, 1e6], [1.0, 0.0]])
  first, second = statistics.bradley_terry(wins)
  assert first - second == pytest.approx(math.log(1e6), abs=1e-9)


def test_at_the_strengths_every_model_wins_as_often_as_they_predict():
  random = np.random.default_rng(3)
  wins = random.integers(1, 20, size=(7, 5, 5)) * (1 - np.eye(5))
  found = statistics.bradley_terry(wins)
  odds = np.exp(found[:, :, None] - found[:, None])
  predicted = (wins + wins.swapaxes(1, 2)) * odds / (1 + odds)
  np.testing.assert_allclose(predicted.sum(-1), wins.sum(-1), atol=1e-8)


def test_a_model_that_always_wins_has_no_strength_and_it_is_said_why():
  wins = np.array([[[0, 3, 2], [0, 0, 1], [0, 1, 0.0]], np.ones((3, 3)) - np.eye(3)])
  found = statistics.bradley_terry(wins)
  assert np.isnan(found[0]).all()
  np.testing.assert_allclose(found[1], 0, atol=1e-12)
  result = summarize(votes("a", "b", wins=4, losses=0), ["a", "b"])
  assert result.no_strengths.startswith(
    "There are no Bradley-Terry strengths: nothing says how b would do against a"
  )
  assert {m.strength.value for m in result.models} == {None}
  assert result.models[0].name == "a"  # by its win rate
  assert result.pairs[0].win_rate.value == 1


def test_a_ranking_is_all_its_pairs_and_equal_ranks_are_ties():
  found = list(comparisons_of({"b": 1, "c": 2, "a": 1}, "ann", "x"))
  assert found == [
    Comparison("ann", "x", "a", "b", 0.5),
    Comparison("ann", "x", "a", "c", 1.0),
    Comparison("ann", "x", "b", "c", 1.0),
  ]


def test_a_tie_is_half_a_win_and_names_turn_the_score_round():
  comparisons = votes("b", "a", wins=5, losses=2, ties=1)
  result = summarize(comparisons, ["a", "b"])
  [pair] = result.pairs
  assert (pair.first, pair.second) == ("a", "b")
  assert (pair.wins, pair.ties, pair.losses) == (2, 1, 5)
  assert pair.win_rate.value == pytest.approx(2.5 / 8)
  assert [m.name for m in result.models] == ["b", "a"]
  strengths = [m.strength.value for m in result.models]
  assert strengths[0] - strengths[1] == pytest.approx(math.log(5.5 / 2.5))


def test_over_one_rater_the_interval_is_that_of_a_binomial_share():
  result = summarize(votes("a", "b", wins=60, losses=40), ["a", "b"], draws=4000)
  assert result.resampled == ("items",)
  rate = result.pairs[0].win_rate
  spread = 1.96 * math.sqrt(0.6 * 0.4 / 100)
  # The percentiles of 4,000 draws have an error of their own, about 0.003.
  assert rate.low == pytest.approx(0.6 - spread, abs=0.012)
  assert rate.high == pytest.approx(0.6 + spread, abs=0.012)


def test_raters_of_different_taste_widen_the_interval():
  ann = votes("a", "b", wins=90, losses=10, rater="ann")
  bob = votes("a", "b", wins=10, losses=90, rater="bob")
  apart = summarize(ann + bob, ["a", "b"]).pairs[0].win_rate
  one = summarize(votes("a", "b", wins=100, losses=100), ["a", "b"]).pairs[0].win_rate
  assert apart.value == one.value == 0.5
  assert apart.high - apart.low > 4 * (one.high - one.low)
  assert summarize(ann + bob, ["a", "b"]).resampled == ("raters", "items")


def test_one_comparison_has_no_interval():
  result = summarize(votes("a", "b", wins=1, losses=0), ["a", "b"])
  rate = result.pairs[0].win_rate
  assert (rate.value, rate.low, rate.high) == (1.0, None, None)
  assert result.resampled == ()


def test_intervals_are_the_same_each_time():
  comparisons = votes("a", "b", 7, 5) + votes("b", "c", 4, 9) + votes("a", "c", 6, 6)
  assert summarize(comparisons, "abc") == summarize(comparisons[::-1], "cba")


def test_pairs_that_nobody_compared_say_nothing():
  result = summarize(votes("a", "b", 3, 3), ["a", "b", "c"])
  rates = {(p.first, p.second): p.win_rate.value for p in result.pairs}
  assert rates == {("a", "b"): 0.5, ("a", "c"): None, ("b", "c"): None}
  assert "more answers" in result.no_strengths.lower()


# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section E: four
# observers, twelve units, values missing; 0.849 by the interval metric.
NONE = math.nan
OBSERVERS = np.array(
  [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, NONE, NONE, NONE],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NONE, 3],
    [NONE, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NONE],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NONE],
  ]
)


def test_krippendorffs_alpha_is_that_of_his_example():
  assert statistics.krippendorff_alpha(OBSERVERS) == pytest.approx(0.849, abs=5e-4)


def test_alpha_is_one_for_equal_observers_and_none_without_two_or_without_variation():
  same = np.array([[0.0, 1.0, 0.5], [0.0, 1.0, 0.5]])
  assert statistics.krippendorff_alpha(same) == 1
  assert statistics.krippendorff_alpha(same[:1]) is None
  assert statistics.krippendorff_alpha(np.ones((3, 4))) is None


def test_alpha_of_observers_who_toss_coins_is_about_zero():
  random = np.random.default_rng(0)
  values = random.integers(0, 2, size=(4, 5000)).astype(float)
  assert abs(statistics.krippendorff_alpha(values)) < 0.02


def test_agreement_is_the_share_of_pairs_of_raters_of_one_opinion():
  scores = {"ann": [1, 1, 0, 0.5], "bob": [1, 0, 0, 0.5], "eve": [1, 1, 1]}
  comparisons = [
    Comparison(rater, str(i), "a", "b", float(score))
    for rater, given in scores.items()
    for i, score in enumerate(given)
  ]
  pairs = [
    (x, y)
    for one, other in itertools.combinations(scores.values(), 2)
    for x, y in zip(one, other, strict=False)
  ]
  same = sum(x == y for x, y in pairs)
  assert summarize(comparisons, ["a", "b"]).agreement == pytest.approx(
    same / len(pairs)
  )
