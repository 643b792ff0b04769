"""Several datasets read as one stream of examples, in fixed shares.

The stream has no end and no state: which record is example number g is a function of
(seed, g). Blocks of the stream hold each dataset's share to the example, in an order of
their own; within its share a dataset goes through its records epoch by epoch.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Sequence
from typing import Literal

import numpy as np
from absl import logging
from jaxtyping import Bool, Float, Int64

from pixsigma_jax import metadata
from pixsigma_jax.data import order
from pixsigma_jax.data.records import (
  DamageError,
  Dataset,
  Features,
  Record,
  open_dataset,
)

_BLOCK = 1 << 16  # examples; a share is a whole number of them
# What the datasets of a mixture must have in common.
_SHARED = (
  "kind",
  "channels",
  "resolution",
  "autoencoder",
  "scaling_factor",
  "text_encoder",
  "caption_storage",
  "caption_width",
)
_TRIES = 20  # records that may be damaged one after the other; as many as the reference


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
  """The records of some datasets, numbered through; `open_mixture` makes one.

  Holds no open file, so that it can be sent to another process; threads may share it.
  """

  datasets: tuple[Dataset, ...]
  shares: tuple[int, ...]  # of each, in every _BLOCK examples
  holdout: float
  numbers: tuple[np.ndarray | None, ...]  # of the split's records in each; None for all

  def __len__(self) -> int:
    """Records in all, those of the other split too."""
    return sum(map(len, self.datasets))

  def __str__(self) -> str:
    return ",".join(str(dataset.directory) for dataset in self.datasets)

  @functools.cached_property
  def features(self) -> Features:
    """The datasets' common features; the caption length is the least of theirs."""
    length = min(dataset.manifest.caption_length for dataset in self.datasets)
    features = self.datasets[0].manifest.features
    return dataclasses.replace(features, caption_length=length)

  @property
  def null_caption(self) -> Float[np.ndarray, "t e"] | None:
    """The embedding of the empty caption; None if captions are text."""
    captions = [dataset.null_caption for dataset in self.datasets]
    stored = [caption for caption in captions if caption is not None]
    return min(stored, key=len) if stored else None

  @property
  def num_examples(self) -> int:
    """Records of the split."""
    return sum(map(self._count, range(len(self.datasets))))

  @functools.cached_property
  def mean_bytes(self) -> int:
    """Mean record size in bytes."""
    return sum(d.manifest.num_bytes for d in self.datasets) // len(self)

  @property
  def latent_sizes(self) -> dict[tuple[int, int], int]:
    """Height and width of latents, and the number of records that have them."""
    sizes: dict[tuple[int, int], int] = {}
    for dataset in self.datasets:
      for h, w, count in dataset.manifest.latent_sizes:
        sizes[h, w] = sizes.get((h, w), 0) + count
    return sizes

  @property
  def fingerprint(self) -> str:
    """Fingerprint of everything that decides which record is example g."""
    prints = [dataset.fingerprint for dataset in self.datasets]
    if len(prints) == 1 and all(numbers is None for numbers in self.numbers):
      return prints[0]
    held_out = [numbers is None or _digest(numbers) for numbers in self.numbers]
    text = json.dumps([prints, self.shares, held_out])
    return hashlib.sha256(text.encode()).hexdigest()[:16]

  def longest_sequence(self, patch_size: int) -> int:
    """Tokens of the largest latents, cut into patches of `patch_size`."""
    return max(h * w for h, w in self.latent_sizes) // patch_size**2

  def caption_lengths(self) -> np.ndarray:
    """Tokens of every caption, of the other split's records too."""
    return np.concatenate([d.index["caption_lengths"] for d in self.datasets])

  def examples_at(
    self, positions: Int64[np.ndarray, " b"], *, seed: int
  ) -> tuple[Int64[np.ndarray, " b"], Int64[np.ndarray, " b"]]:
    """Epoch (of its dataset) and record number of the examples at these positions."""
    if len(self.datasets) == 1:
      return self._in_dataset(0, positions, seed)
    block, place = np.divmod(positions, _BLOCK)
    # Blocks of the stream are dealt out as an epoch's records are.
    _, place = order.permuted(positions, seed=(order.BLOCKS, seed), n=_BLOCK)
    ends = np.cumsum(self.shares)
    which = np.searchsorted(ends, place, side="right")
    epochs, records = np.empty_like(positions), np.empty_like(positions)
    for i, share in enumerate(self.shares):
      rows = which == i
      own = block[rows] * share + place[rows] - (ends[i] - share)
      epochs[rows], records[rows] = self._in_dataset(i, own, seed)
    return epochs, records

  def read(self, numbers: Sequence[int] | np.ndarray) -> list[Record]:
    """The records of these numbers, in this order.

    Raises:
      ValueError: a record is damaged; the message names file and record.
    """
    if len(self.datasets) == 1:
      return self.datasets[0].read(numbers)
    numbers = np.asarray(numbers, np.int64)
    which = np.searchsorted(self._starts, numbers, side="right") - 1
    records: dict[int, Record] = {}
    for i in np.unique(which).tolist():
      rows = np.flatnonzero(which == i)
      found = self.datasets[i].read(numbers[rows] - self._starts[i])
      records.update(zip(rows.tolist(), found, strict=True))
    return [records[row] for row in range(len(numbers))]

  def read_or_replace(
    self, numbers: Int64[np.ndarray, " b"]
  ) -> tuple[list[Record], Int64[np.ndarray, " b"], Bool[np.ndarray, " b"]]:
    """The records of these numbers, or in place of damaged ones their neighbors.

    A damaged record is replaced by the next sound one of its dataset and split in the
    order of storage, the first after the last; it is named in a warning.

    Returns:
      The records, their numbers, and which of them stand in for another.

    Raises:
      DamageError: 20 records one after the other are damaged.
    """
    try:
      return self.read(numbers), numbers, np.zeros(len(numbers), bool)
    except DamageError:
      read = [self._read_or_replace(number) for number in numbers.tolist()]
    found = np.array([number for _, number in read], np.int64)
    return [record for record, _ in read], found, found != numbers

  def _read_or_replace(self, number: int) -> tuple[Record, int]:
    for tried in range(_TRIES):
      try:
        return self.read([number])[0], number
      except DamageError as error:
        if tried == _TRIES - 1:
          raise
        logging.warning("%s The next one takes its place.", error)
        number = self._next(number)
    raise AssertionError

  def _next(self, number: int) -> int:
    i = int(np.searchsorted(self._starts, number, side="right")) - 1
    own, start, numbers = number - self._starts[i], self._starts[i], self.numbers[i]
    if numbers is None:
      return int(start + (own + 1) % len(self.datasets[i]))
    place = int(np.searchsorted(numbers, own)) + 1
    return int(start + numbers[place % len(numbers)])

  def _in_dataset(
    self, i: int, positions: Int64[np.ndarray, " b"], seed: int
  ) -> tuple[Int64[np.ndarray, " b"], Int64[np.ndarray, " b"]]:
    """Epoch and record number of the examples at these positions of one dataset."""
    stream = (order.OTHER_RECORDS, i, seed) if i else (order.RECORDS, seed)
    epochs, places = order.permuted(positions, seed=stream, n=self._count(i))
    numbers = self.numbers[i]
    own = places if numbers is None else numbers[places]
    return epochs, self._starts[i] + own

  def _count(self, i: int) -> int:
    numbers = self.numbers[i]
    return len(self.datasets[i]) if numbers is None else len(numbers)

  @functools.cached_property
  def _starts(self) -> np.ndarray:
    return np.cumsum([0, *map(len, self.datasets[:-1])])


def open_mixture(
  paths: Sequence[str | os.PathLike[str]],
  *,
  weights: Sequence[float | int],
  holdout: float,
  split: Literal["train", "holdout"],
) -> Mixture:
  """Opens datasets to be read as one.

  Args:
    paths: directories of finished datasets.
    weights: how often examples come from each; () for as often as it has records.
    holdout: share of the images that are never trained on. An image is one of them by
      its id alone: at every resolution, in every dataset, whatever else is there.
    split: whether the stream has the images to train on or those held out.

  Raises:
    FileNotFoundError, ValueError: of `open_dataset`; or the datasets do not go
      together, or weights and holdout do not fit them.
  """
  datasets = tuple(map(open_dataset, paths))
  for other in datasets[1:]:
    _check_alike(datasets[0], other)
  if not 0.0 <= holdout < 1.0 or (split == "holdout" and holdout == 0.0):
    raise ValueError(
      f"{holdout=} must be at least 0 and less than 1, and more than 0 to read what is "
      "held out."
    )
  numbers = tuple(_numbers(dataset, holdout, split) for dataset in datasets)
  counts = [
    len(dataset) if own is None else len(own)
    for dataset, own in zip(datasets, numbers, strict=True)
  ]
  for dataset, count in zip(datasets, counts, strict=True):
    if not count:
      raise ValueError(
        f"With {holdout=} none of the {len(dataset)} records of {dataset.directory} is "
        f"in the split {split!r}: choose another holdout."
      )
  shares = _shares(weights or counts, len(datasets))
  return Mixture(datasets, shares, holdout, numbers)


def _shares(weights: Sequence[float | int], count: int) -> tuple[int, ...]:
  """Whole numbers that add up to _BLOCK, by the largest remainder."""
  if len(weights) != count:
    raise ValueError(
      f"{len(weights)} weights are given for {count} datasets: give one each, or none "
      "for as many examples of each as it has records."
    )
  if not all(math.isfinite(weight) and weight > 0 for weight in weights):
    raise ValueError(f"weights {tuple(weights)} must be positive.")
  exact = np.array(weights, np.float64) * (_BLOCK / math.fsum(weights))
  shares = np.floor(exact).astype(int)
  for i in np.argsort(shares - exact, kind="stable")[: _BLOCK - shares.sum()]:
    shares[i] += 1
  if not shares.all():
    raise ValueError(
      f"weights {tuple(weights)}: the least of them is less than one example in "
      f"{_BLOCK}. Raise it, or leave the dataset out."
    )
  return tuple(shares.tolist())


def _numbers(
  dataset: Dataset, holdout: float, split: Literal["train", "holdout"]
) -> np.ndarray | None:
  if holdout == 0.0:
    return None
  held_out = dataset.index["id_hash"] < np.uint64(holdout * 2.0**64)
  return np.flatnonzero(held_out == (split == "holdout"))


def _check_alike(one: Dataset, other: Dataset) -> None:
  have, want = (
    {name: getattr(dataset.manifest, name) for name in _SHARED}
    for dataset in (one, other)
  )
  hashes = (one.manifest.hashes, other.manifest.hashes)
  known = hashes[0].keys() & hashes[1].keys() - {"crop_rule"}
  for side, found in zip((have, want), hashes, strict=True):
    side["hashes"] = {name: found[name] for name in sorted(known)}
  if lines := metadata.disagreements(have, want):
    raise ValueError(
      f"{one.directory} and {other.directory} cannot be read as one (the one → the "
      f"other): {'; '.join(lines)}. Prepare them alike."
    )
  if one.null_caption is not None and other.null_caption is not None:
    length = min(len(one.null_caption), len(other.null_caption))
    if not np.array_equal(one.null_caption[:length], other.null_caption[:length]):
      raise ValueError(
        f"{one.directory} and {other.directory} have different null captions: they "
        "were embedded by different text encoders. Prepare them alike."
      )


def _digest(numbers: np.ndarray) -> str:
  return hashlib.sha256(numbers.astype(np.int64).tobytes()).hexdigest()[:16]
