"""Win rates, Bradley-Terry strengths and agreement of pairwise preferences.

People's rankings and a judge's votes come here alike, as comparisons of two models.
`docs/preferences.md` has each definition with its source.

Axis letters: d bootstrap draws, r raters, i items, p pairs of models, m models.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy import special

DRAWS = 1000
_LEVEL = (2.5, 97.5)  # percentiles: an interval of 95 %
_BLOCK = 50  # draws at once, for memory's sake
_NEWTON_STEPS = 100
# An interval that so many draws have no part in is not given.
_MOST_UNDEFINED = 0.05


class Comparison(NamedTuple):
  """What one rater thinks of two models' images for one prompt.

  Attributes:
    score: of the first model: 1 if its image is preferred, 0 if the other one is,
      1/2 if they are equal; between these if they were compared more than once.
  """

  rater: str
  item: str
  first: str
  second: str
  score: float


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A number and its 95 % interval; None is what the data do not say."""

  value: float | None
  low: float | None = None
  high: float | None = None


@dataclasses.dataclass(frozen=True)
class PairResult:
  """Two models side by side.

  Attributes:
    wins, ties, losses: comparisons of a score above, at and below 1/2.
    win_rate: mean score of the first model; a tie is half a win.
  """

  first: str
  second: str
  wins: int
  ties: int
  losses: int
  win_rate: Estimate


@dataclasses.dataclass(frozen=True)
class ModelResult:
  """A model among all.

  Attributes:
    win_rate: over all its comparisons.
    strength: Bradley-Terry's, a natural logarithm; the models' mean is 0.
  """

  name: str
  win_rate: Estimate
  strength: Estimate


@dataclasses.dataclass(frozen=True)
class Preferences:
  """What a set of comparisons says.

  Attributes:
    models: strongest first.
    resampled: what the intervals are drawn over: raters, items, both or nothing.
    alpha: Krippendorff's, with the interval metric on scores; None with one rater.
    agreement: share of pairs of raters, over what both compared, of one opinion.
    no_strengths: why there are no strengths; empty if there are.
  """

  models: list[ModelResult]
  pairs: list[PairResult]
  comparisons: int
  raters: int
  items: int
  resampled: tuple[str, ...]
  alpha: float | None
  agreement: float | None
  no_strengths: str


def comparisons_of(
  ranks: Mapping[str, int], rater: str, item: str
) -> Iterator[Comparison]:
  """All pairs of a ranking, 1 being the best rank and equal ranks a tie."""
  for first, second in itertools.combinations(sorted(ranks), 2):
    a, b = ranks[first], ranks[second]
    score = 0.5 if a == b else float(a < b)
    yield Comparison(rater, item, first, second, score)


def summarize(
  comparisons: Sequence[Comparison],
  models: Sequence[str],
  *,
  draws: int = DRAWS,
  seed: int = 0,
) -> Preferences:
  """Win rates, strengths and agreement, with intervals.

  Intervals are percentiles of a crossed bootstrap (Owen 2007, "The pigeonhole
  bootstrap"): raters and items are drawn with replacement, each on their own, and a
  comparison counts as often as its rater times its item was drawn. A single rater, or a
  single item, is not drawn: the interval then holds for that one alone.

  Args:
    comparisons: at most one of a rater, an item and a pair.
    models: those to report on, at least two.
    draws: of the bootstrap.
  """
  models = sorted(models)
  pairs = list(itertools.combinations(models, 2))
  raters = sorted({c.rater for c in comparisons})
  items = sorted({c.item for c in comparisons})
  scores = _table(comparisons, raters, items, pairs)  # [r i p], NaN where not compared
  there = np.isfinite(scores)
  won, games = np.where(there, scores, 0.0), there.astype(float)

  all_won, all_games = won.sum((0, 1)), games.sum((0, 1))
  drawn_won, drawn_games = _bootstrap(won, games, draws, seed)
  rates = _rates(all_won, all_games)
  drawn_rates = _rates(drawn_won, drawn_games)
  wins = _square(all_won, all_games, len(models))
  drawn_wins = _square(drawn_won, drawn_games, len(models))
  strengths = bradley_terry(wins)
  drawn_strengths = bradley_terry(drawn_wins)
  model_rates, drawn_model_rates = _of_models(wins), _of_models(drawn_wins)

  results = [
    ModelResult(
      name,
      _estimate(model_rates[i], drawn_model_rates[:, i]),
      _estimate(strengths[i], drawn_strengths[:, i]),
    )
    for i, name in enumerate(models)
  ]
  results.sort(key=lambda m: (-(m.strength.value or 0), -(m.win_rate.value or 0)))
  better, worse = (scores > 0.5).sum((0, 1)), (scores < 0.5).sum((0, 1))
  return Preferences(
    models=results,
    pairs=[
      PairResult(
        *pair,
        wins=int(better[p]),
        ties=int(all_games[p] - better[p] - worse[p]),
        losses=int(worse[p]),
        win_rate=_estimate(rates[p], drawn_rates[:, p]),
      )
      for p, pair in enumerate(pairs)
    ],
    comparisons=len(comparisons),
    raters=len(raters),
    items=len(items),
    resampled=tuple(
      name for name, group in (("raters", raters), ("items", items)) if len(group) > 1
    ),
    alpha=krippendorff_alpha(scores.reshape(len(raters), -1)),
    agreement=_agreement(scores.reshape(len(raters), -1)),
    no_strengths=_why_none(wins, models),
  )


def bradley_terry(wins: Float[np.ndarray, "*b m m"]) -> Float[np.ndarray, "*b m"]:
  """Log-strengths that make the wins most likely, their mean 0.

  P(i is preferred to j) = 1 / (1 + exp(s_j - s_i)) (Bradley and Terry 1952), by
  Newton's method; a tie is half a win of each. There is such a maximum if and only if,
  however the models are split in two, each part has won against the other (Ford 1957);
  where there is none, all are NaN.

  Args:
    wins: of the row's model against the column's.
  """
  exists = _connected(wins)
  wins = np.where(exists[..., None, None], wins, 1.0)
  games = wins + wins.swapaxes(-1, -2)
  scale = games.max((-1, -2), keepdims=True)
  wins, games = wins / scale, games / scale
  count = wins.shape[-1]
  off = ~np.eye(count, dtype=bool)
  strengths = np.zeros(wins.shape[:-1])
  for _ in range(_NEWTON_STEPS):
    p = special.expit(strengths[..., :, None] - strengths[..., None, :])
    gradient = np.where(off, wins - games * p, 0).sum(-1)
    weights = np.where(off, games * p * (1 - p), 0)
    # The likelihood leaves the sum open: ones hold it at 0.
    curvature = np.eye(count) * weights.sum(-1)[..., None] - weights + 1 / count
    step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
    # Far from the maximum a whole step may overshoot.
    longest = np.abs(step).max(-1, keepdims=True)
    strengths = strengths + step / np.maximum(longest, 1)
    if longest.max(initial=0) < 1e-12:
      break
  return np.where(exists[..., None], strengths, np.nan)


def krippendorff_alpha(values: Float[np.ndarray, "r units"]) -> float | None:
  """Krippendorff's alpha with the interval metric, (v - v')², NaN being no answer.

  1 - observed / expected disagreement (Krippendorff 2011, "Computing Krippendorff's
  Alpha-Reliability"). None if no unit has two values, or all values are the same.
  """
  there = np.isfinite(values)
  paired = there.sum(0) >= 2
  there = there[:, paired]
  known = np.where(there, values[:, paired], 0.0)
  if not paired.any():
    return None
  count = there.sum(0)
  within = 2 * (count * (known**2).sum(0) - known.sum(0) ** 2)
  total = count.sum()
  everything = 2 * (total * (known**2).sum() - known.sum() ** 2)
  if everything <= 0:
    return None
  observed = (within / (count - 1)).sum() / total
  return float(1 - observed / (everything / (total * (total - 1))))


def _table(comparisons, raters, items, pairs) -> Float[np.ndarray, "r i p"]:
  """Scores by rater, item and pair."""
  at_rater = {name: r for r, name in enumerate(raters)}
  at_item = {name: i for i, name in enumerate(items)}
  at_pair = {pair: p for p, pair in enumerate(pairs)}
  table = np.full((len(raters), len(items), len(pairs)), np.nan)
  for c in comparisons:
    pair, score = (c.first, c.second), c.score
    if pair not in at_pair:
      pair, score = (c.second, c.first), 1 - c.score
    table[at_rater[c.rater], at_item[c.item], at_pair[pair]] = score
  return table


def _bootstrap(
  won: Float[np.ndarray, "r i p"],
  games: Float[np.ndarray, "r i p"],
  draws: int,
  seed: int,
) -> tuple[Float[np.ndarray, "d p"], Float[np.ndarray, "d p"]]:
  """Wins and games of each pair in each draw; no draws where nothing can be drawn."""
  raters, items, pairs = won.shape
  if max(raters, items) < 2:
    return np.zeros((0, pairs)), np.zeros((0, pairs))
  random = np.random.default_rng(seed)
  drawn = []
  for start in range(0, draws, _BLOCK):
    block = min(_BLOCK, draws - start)
    of_raters = _times_drawn(random, block, raters)
    of_items = _times_drawn(random, block, items)
    drawn.append(
      [
        np.einsum("di,dip->dp", of_items, np.tensordot(of_raters, table, 1))
        for table in (won, games)
      ]
    )
  return (
    np.concatenate([w for w, _ in drawn]),
    np.concatenate([g for _, g in drawn]),
  )


def _times_drawn(
  random: np.random.Generator, draws: int, count: int
) -> Float[np.ndarray, "d n"]:
  times = random.multinomial(count, np.full(count, 1 / count), size=draws)
  return times.astype(float)


def _rates(
  won: Float[np.ndarray, "*b p"], games: Float[np.ndarray, "*b p"]
) -> Float[np.ndarray, "*b p"]:
  return np.divide(won, games, out=np.full_like(won, np.nan), where=games > 0)


def _square(
  won: Float[np.ndarray, "*b p"], games: Float[np.ndarray, "*b p"], models: int
) -> Float[np.ndarray, "*b m m"]:
  """Wins of each model (row) against each (column), pairs being in order."""
  rows, columns = np.triu_indices(models, 1)
  wins = np.zeros((*won.shape[:-1], models, models))
  wins[..., rows, columns] = won
  wins[..., columns, rows] = games - won
  return wins


def _of_models(wins: Float[np.ndarray, "*b m m"]) -> Float[np.ndarray, "*b m"]:
  won, lost = wins.sum(-1), wins.sum(-2)
  return _rates(won, won + lost)


def _estimate(value: float, drawn: Float[np.ndarray, " d"]) -> Estimate:
  if not np.isfinite(value):
    return Estimate(None)
  known = drawn[np.isfinite(drawn)]
  if len(drawn) == 0 or len(known) < (1 - _MOST_UNDEFINED) * len(drawn):
    return Estimate(float(value))
  low, high = np.percentile(known, _LEVEL)
  return Estimate(float(value), float(low), float(high))


def _reaches(wins: Float[np.ndarray, "*b m m"]) -> Bool[np.ndarray, "*b m m"]:
  """Whether a chain of wins leads from the row's model to the column's."""
  count = wins.shape[-1]
  reach = (wins > 0) | np.eye(count, dtype=bool)
  for _ in range(count.bit_length()):
    reach = (reach.astype(int) @ reach.astype(int)) > 0
  return reach


def _connected(wins: Float[np.ndarray, "*b m m"]) -> Bool[np.ndarray, "*b"]:
  return np.asarray(_reaches(wins).all((-1, -2)))


def _why_none(wins: Float[np.ndarray, "m m"], models: Sequence[str]) -> str:
  reach = _reaches(wins)
  if reach.all():
    return ""
  loser, winner = (int(i) for i in np.argwhere(~reach)[0])
  return (
    f"There are no Bradley-Terry strengths: nothing says how {models[loser]} would do "
    f"against {models[winner]}, since no chain of wins leads from it there. More "
    "answers are needed, or fewer models."
  )


def _agreement(values: Float[np.ndarray, "r units"]) -> float | None:
  same = both = 0
  for a, b in itertools.combinations(values, 2):
    known = np.isfinite(a) & np.isfinite(b)
    both += int(known.sum())
    same += int((a[known] == b[known]).sum())
  return same / both if both else None
