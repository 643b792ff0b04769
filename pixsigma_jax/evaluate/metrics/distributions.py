"""Distances between sets of images by their features: FID, KID, CMMD; Inception score.

All sums are in float64: each distance is a small difference of large numbers.
"""

import os
import pathlib
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike

from pixsigma_jax import disk

# [n d]: a row an image. Shapes are checked here, with a message.
Features: TypeAlias = ArrayLike

# Rows of one set that are compared with another set together: 64 MB of float64 for a
# set of 8,000.
_CHUNK = 1024


class Statistics:
  """Mean and covariance of features, updated as they come and merged over hosts.

  Sums of squares are taken about the running mean (Chan, Golub, LeVeque 1979), so that
  neither order nor the number of parts matters beyond float64's rounding.

  Attributes:
    count: number of images so far; None where a file does not say it.
  """

  def __init__(self, features: Features | None = None):
    """Starts from nothing, or from a first batch of features [n d]."""
    self.count: int | None = 0
    self._mean: Float64[np.ndarray, " d"] = np.zeros(0)
    self._scatter: Float64[np.ndarray, "d d"] = np.zeros((0, 0))  # covariance · (n - 1)
    if features is not None:
      self.update(features)

  def update(self, features: Features) -> None:
    """Adds a batch of features [n d].

    Raises:
      ValueError: they are not a matrix, not finite, or of another width than those
        before.
    """
    features = _checked(features)
    if not len(features):
      return
    mean = features.mean(axis=0)
    centred = features - mean
    self._add(len(features), mean, centred.T @ centred)

  def merge(self, other: "Statistics") -> None:
    """Adds another's statistics, as if its features had been added here.

    Raises:
      ValueError: its features are of another width, or one of both does not know its
        count.
    """
    if other.count is None:
      raise ValueError(_UNCOUNTED)
    if other.count:
      self._add(other.count, other._mean, other._scatter)

  def _add(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
    if self.count is None:
      raise ValueError(_UNCOUNTED)
    if not self.count:
      self.count, self._mean, self._scatter = count, mean.copy(), scatter.copy()
      return
    if len(mean) != len(self._mean):
      raise ValueError(
        f"Features of width {len(mean)} cannot join statistics of width "
        f"{len(self._mean)}: they are another network's."
      )
    total = self.count + count
    difference = mean - self._mean
    self._mean = self._mean + difference * (count / total)
    weight = self.count * count / total
    self._scatter = self._scatter + scatter + weight * np.outer(difference, difference)
    self.count = total

  @property
  def mean(self) -> Float64[np.ndarray, " d"]:
    """Mean of the features.

    Raises:
      ValueError: there are none yet.
    """
    self._check_count(1)
    return self._mean

  @property
  def covariance(self) -> Float64[np.ndarray, "d d"]:
    """Covariance of the features, over n - 1.

    Raises:
      ValueError: there are fewer than two.
    """
    self._check_count(2)
    return self._scatter / (1 if self.count is None else self.count - 1)

  def _check_count(self, least: int) -> None:
    if self.count is not None and self.count < least:
      raise ValueError(
        f"Statistics of {self.count} images: at least {least} are needed for this."
      )

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes an .npz with `mu` and `sigma`, as pytorch-fid reads it, and `count`."""

    def write(partial: pathlib.Path) -> None:
      with partial.open("wb") as file:
        arrays = {"mu": self.mean, "sigma": self.covariance}
        if self.count is not None:
          arrays["count"] = np.asarray(self.count)
        np.savez(file, allow_pickle=False, **arrays)

    disk.write_whole(pathlib.Path(path), write)

  @classmethod
  def load(cls, path: str | os.PathLike[str]) -> "Statistics":
    """Reads an .npz of `save`, or one of pytorch-fid, which lacks the count.

    Statistics without a count can be compared, and nothing can be added to them.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it has no `mu` and `sigma` that fit each other.
    """
    with np.load(path) as arrays:
      if not {"mu", "sigma"} <= set(arrays.files):
        raise ValueError(
          f"{path} holds {', '.join(arrays.files) or 'nothing'}: statistics for FID "
          "are an .npz with mu and sigma."
        )
      mean, covariance = (arrays[name].astype(np.float64) for name in ("mu", "sigma"))
      count = int(arrays["count"]) if "count" in arrays.files else None
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
      raise ValueError(
        f"{path}: mu {list(mean.shape)} and sigma {list(covariance.shape)} do not fit."
      )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
      raise ValueError(f"{path} holds numbers that are not finite.")
    statistics = cls()
    statistics.count, statistics._mean = count, mean
    statistics._scatter = covariance * (1 if count is None else count - 1)
    return statistics


_UNCOUNTED = (
  "These statistics do not say of how many images they are, as pytorch-fid keeps them: "
  "they can be compared, and nothing can be added to them."
)


def fid(a: Features | Statistics, b: Features | Statistics) -> float:
  """Fréchet distance of two Gaussians (Heusel et al. 2017, equation 6).

  ‖μa - μb‖² + tr(Σa + Σb - 2·√(Σa·Σb)). Which network's features and which resize they
  come from is part of the metric's name in a report, see `docs/evaluation.md`. With
  fewer images than the features are wide the covariances are singular; the distance
  is then defined still, and its bias is large.

  Args:
    a, b: features [n d] or statistics of them.

  Raises:
    ValueError: fewer than two images, or features of two widths.
  """
  if not isinstance(a, Statistics) and not isinstance(b, Statistics):
    x, y = _pair(a, b, least=2)
    if len(x) + len(y) <= 2 * x.shape[1]:
      return _fid_of_few(x, y)
  a, b = (x if isinstance(x, Statistics) else Statistics(x) for x in (a, b))
  if a.mean.shape != b.mean.shape:
    raise ValueError(
      f"Features of widths {len(a.mean)} and {len(b.mean)} cannot be compared: they "
      "are of two networks."
    )
  difference = a.mean - b.mean
  roots = [_root(x.covariance) for x in (a, b)]
  # tr √(Σa·Σb) is the sum of the singular values of √Σa·√Σb, which are never complex
  # and lose no digits where a covariance is singular.
  cross = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
  spread = np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
  # Rounding may leave a set's distance to itself a little below zero.
  return max(float(difference @ difference + spread), 0.0)


def _fid_of_few(a: np.ndarray, b: np.ndarray) -> float:
  """`fid` of fewer images than features, without their covariances."""
  difference = a.mean(axis=0) - b.mean(axis=0)
  a, b = ((x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in (a, b))
  # With Σa = aᵀ·a and Σb = bᵀ·b, the singular values of a·bᵀ are the roots of Σa·Σb's
  # eigenvalues, where those are not 0.
  cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
  spread = np.sum(a * a) + np.sum(b * b) - 2 * cross
  return max(float(difference @ difference + spread), 0.0)


def _root(covariance: Float64[np.ndarray, "d d"]) -> Float64[np.ndarray, "d d"]:
  """The symmetric square root of a covariance."""
  values, vectors = np.linalg.eigh(covariance)
  # Below this an eigenvalue is rounding, and its root would not be.
  noise = values.max(initial=0) * len(values) * np.finfo(np.float64).eps
  values = np.where(values > noise, values, 0)
  return (vectors * np.sqrt(values)) @ vectors.T


def kid(
  a: Features,
  b: Features,
  *,
  subsets: int | None = None,
  subset_size: int = 1000,
  seed: int = 0,
) -> float:
  """Kernel Inception distance (Bińkowski et al. 2018): unbiased squared MMD.

  With the kernel (x·y/d + 1)³. May be negative, as it is unbiased.

  Args:
    a, b: features [n d].
    subsets: number of random subsets whose mean is published by torch-fidelity and
      torchmetrics (100); None compares the whole sets, which has the same expectation
      and no randomness.
    subset_size: images of each subset, without replacement.
    seed: of the subsets.

  Raises:
    ValueError: features of two widths, fewer than two images, or fewer than
      `subset_size` where there are subsets.
  """
  a, b = _pair(a, b, least=2)
  if subsets is None:
    return _unbiased_mmd(a, b)
  if subsets < 1 or not 2 <= subset_size <= min(len(a), len(b)):
    raise ValueError(
      f"{subsets} subsets of {subset_size} images of sets of {len(a)} and {len(b)}: "
      "give subsets=None to compare the whole sets, or a smaller subset_size."
    )
  random = np.random.default_rng(seed)
  draws = [
    _unbiased_mmd(
      *(x[random.choice(len(x), subset_size, replace=False)] for x in (a, b))
    )
    for _ in range(subsets)
  ]
  return float(np.mean(draws))


def _unbiased_mmd(a: np.ndarray, b: np.ndarray) -> float:
  width = a.shape[1]

  def kernel(products: np.ndarray) -> np.ndarray:
    return (products / width + 1) ** 3

  def within(x: np.ndarray) -> float:
    total = sum(kernel(rows @ x.T).sum() for rows in _chunks(x))
    return (total - kernel((x * x).sum(axis=1)).sum()) / (len(x) * (len(x) - 1))

  across = sum(kernel(rows @ b.T).sum() for rows in _chunks(a)) / (len(a) * len(b))
  return float(within(a) + within(b) - 2 * across)


def cmmd(a: Features, b: Features) -> float:
  """CLIP maximum mean discrepancy (Jayasumana et al. 2024), times 1000.

  Squared MMD with the Gaussian kernel exp(-‖x - y‖²/(2·10²)), biased: pairs of an
  image with itself count, as in the published code.

  Args:
    a, b: embeddings [n d], made unit vectors here. The metric of the paper takes them
      of openai/clip-vit-large-patch14-336.

  Raises:
    ValueError: embeddings of two widths, an empty set, or one of length zero.
  """
  a, b = _pair(a, b, least=1)
  a, b = _unit(a), _unit(b)

  # Every kernel is 1 less something small, and those ones cancel: only what is small
  # is summed.
  def mean(x: np.ndarray, y: np.ndarray) -> float:
    total = 0.0
    for rows in _chunks(x):
      squares = np.maximum(2 - 2 * (rows @ y.T), 0)
      total += np.expm1(-squares / (2 * _SIGMA**2)).sum()
    return total / (len(x) * len(y))

  return float(1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b)))


_SIGMA = 10.0


def inception_score(
  probabilities: Features, *, splits: int = 10
) -> tuple[float, float]:
  """Mean and standard deviation over splits of exp E KL(p(y|x) ‖ p(y)).

  Salimans et al. 2016; splits are neighbouring images, as in the published code.

  Args:
    probabilities: of k classes for each image, [n k]; rows sum to 1.
    splits: parts whose scores are averaged.

  Raises:
    ValueError: rows are no probabilities, or there are fewer images than splits.
  """
  p = _checked(probabilities)
  if not 1 <= splits <= len(p):
    raise ValueError(f"{len(p)} images cannot be scored in {splits} splits.")
  if (p < 0).any() or not np.allclose(p.sum(axis=1), 1, atol=1e-3):
    raise ValueError("Rows for an Inception score must be probabilities that sum to 1.")
  scores = []
  for part in np.array_split(p, splits):
    marginal = part.mean(axis=0)
    ratio = np.log(np.maximum(part, 1e-300)) - np.log(np.maximum(marginal, 1e-300))
    divergence = np.where(part > 0, part * ratio, 0).sum(axis=1)
    scores.append(np.exp(divergence.mean()))
  return float(np.mean(scores)), float(np.std(scores))


def _checked(features: Features) -> Float64[np.ndarray, "n d"]:
  features = np.asarray(features)
  if features.ndim != 2:
    raise ValueError(
      f"Features have shape {list(features.shape)}: give a row an image, [n d]."
    )
  features = features.astype(np.float64)
  if not np.isfinite(features).all():
    rows = np.flatnonzero(~np.isfinite(features).all(axis=1))
    raise ValueError(
      f"Features of {len(rows)} of {len(features)} images are not finite, image "
      f"{rows[0]} first: these images or the network's weights are damaged."
    )
  return features


def _pair(a: Features, b: Features, least: int) -> tuple[np.ndarray, np.ndarray]:
  a, b = _checked(a), _checked(b)
  if a.shape[1] != b.shape[1]:
    raise ValueError(
      f"Features of widths {a.shape[1]} and {b.shape[1]} cannot be compared: they are "
      "of two networks."
    )
  if min(len(a), len(b)) < least:
    raise ValueError(
      f"Sets of {len(a)} and {len(b)} images: at least {least} are needed in each."
    )
  return a, b


def _unit(x: np.ndarray) -> np.ndarray:
  norms = np.linalg.norm(x, axis=1, keepdims=True)
  if not norms.all():
    raise ValueError(
      f"The embedding of image {int(np.flatnonzero(norms[:, 0] == 0)[0])} has length 0."
    )
  return x / norms


def _chunks(x: np.ndarray) -> Iterator[np.ndarray]:
  for start in range(0, len(x), _CHUNK):
    yield x[start : start + _CHUNK]
