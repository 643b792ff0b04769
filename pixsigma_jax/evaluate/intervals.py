"""Bootstrap intervals of 95 %, with a seed of their own."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

_ENDS = (2.5, 97.5)  # per cent
_SPREAD = 1.96  # standard deviations of a normal distribution's 95 %


def mean_interval(
  values: Float[np.ndarray, " n"], *, resamples: int, seed: int
) -> tuple[float, float] | tuple[None, None]:
  """Interval of a mean over items, by percentiles of resampled means.

  Args:
    values: one an item: several images of a prompt are to be averaged before, since
      they are not independent.
    resamples: 0 for no interval.

  Returns:
    Its two ends; None of both without resamples or with fewer than two items.
  """
  return interval(
    lambda rows: float(values[rows].mean()), len(values), resamples=resamples, seed=seed
  )


def interval(
  statistic: Callable[[Int[np.ndarray, " n"]], float],
  count: int,
  *,
  resamples: int,
  seed: int,
) -> tuple[float, float] | tuple[None, None]:
  """Interval of any statistic of items, by percentiles.

  Args:
    statistic: from the numbers of the items drawn, with repetition, to its value.
    count: items in all.
    resamples, seed: see `mean_interval`.
  """
  if resamples < 1 or count < 2:
    return None, None
  random = np.random.default_rng(seed)
  drawn = [statistic(random.integers(0, count, count)) for _ in range(resamples)]
  low, high = np.percentile(drawn, _ENDS)
  return float(low), float(high)


def distance_interval(
  statistic: Callable[[Int[np.ndarray, " n"]], float],
  value: float,
  count: int,
  *,
  resamples: int,
  seed: int,
) -> tuple[float, float] | tuple[None, None]:
  """Interval of a distance between sets, about its value.

  Repeated items make a resampled set narrower, which moves a distance upwards: only the
  spread of the resampled distances is used, 1.96 standard deviations to each side.
  """
  if resamples < 2 or count < 2:
    return None, None
  random = np.random.default_rng(seed)
  drawn = [statistic(random.integers(0, count, count)) for _ in range(resamples)]
  spread = _SPREAD * float(np.std(drawn, ddof=1))
  return value - spread, value + spread
