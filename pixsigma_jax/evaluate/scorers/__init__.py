"""Scorers: from images to rows of numbers, each with an identity.

A scorer is registered by its name, with its options and a function that loads it.
Numbers of two scorers may be compared only if their identities agree.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import pyarrow as pa
from jaxtyping import UInt8

from pixsigma_jax.evaluate.items import Item
from pixsigma_jax.evaluate.options import Option


@runtime_checkable
class Scorer(Protocol):
  """A loaded scorer."""

  @property
  def batch_size(self) -> int:
    """Images that it is given together; the last ones may be fewer."""
    ...

  def identity(self) -> dict[str, str]:
    """What decides its numbers: weights, their hash, resize, version."""
    ...

  def schema(self) -> pa.Schema:
    """Its columns, without `id` and `image`."""
    ...

  def __call__(
    self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], items: Sequence[Item]
  ) -> Mapping[str, Any]:
    """Scores images, each against its item: a column each, with a row an image.

    Features are arrays `[images, width]`.
    """
    ...


@runtime_checkable
class MadeScores(Protocol):
  """Scores that another program made, in place of a scorer: no image is read."""

  def identity(self) -> dict[str, str]:
    """Who made them, and their hash."""
    ...

  def schema(self) -> pa.Schema:
    """Their columns, without `id` and `image`."""
    ...

  def of_model(
    self, model: str, images: Sequence[tuple[str, int]]
  ) -> Mapping[str, Sequence[Any]]:
    """The columns of all of a model's images, given by item's id and number.

    Raises:
      ValueError: scores of an image are missing, or there are some of no image.
    """
    ...


@dataclasses.dataclass(frozen=True)
class ScorerType:
  """A scorer that is not loaded yet.

  Attributes:
    options: what it takes; flags of `evaluate score`.
    load: from resolved options (those of other scorers among them) to the scorer.
      Raises FileNotFoundError or ValueError where weights are missing or foreign.
  """

  options: tuple[Option, ...]
  load: Callable[[Mapping[str, Any]], Scorer | MadeScores]


# Scorer → module of this room that defines it, in its `SCORERS`.
_MODULES: dict[str, str] = {
  "aesthetic": "aesthetics",
  "clip": "clip",
  "clip-textatlas": "clip",
  "cmmd": "clip",
  "detections": "detectors",
  "digits": "digits",
  "fid": "inception",
  "fid-clean": "inception",
  "fid-patch": "inception",
  "fid-textatlas": "inception",
  "ocr": "ocr",
  "texture": "texture",
}


@functools.cache
def scorer_type(name: str) -> ScorerType:
  """The scorer of a name.

  Raises:
    ValueError: there is none.
  """
  if name not in _MODULES:
    raise ValueError(f"There is no scorer {name!r}: known are {', '.join(_MODULES)}.")
  module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
  return module.SCORERS[name]


_T = TypeVar("_T")
_SHARED: list[Any] = []


def shared(load: Callable[..., _T]) -> Callable[..., _T]:
  """Has a function load a network once for all scorers that take it."""
  kept = functools.lru_cache(maxsize=4)(load)
  _SHARED.append(kept)
  return kept


def forget_shared() -> None:
  """Lets go of the networks that `shared` keeps."""
  for kept in _SHARED:
    kept.cache_clear()


def features(width: int) -> pa.DataType:
  """Type of a column of feature vectors."""
  return pa.list_(pa.float32(), width)
