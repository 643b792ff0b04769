"""Suites: prompts, the scorers that judge their images, and the figures of a report."""

import dataclasses
import functools
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from pixsigma_jax.evaluate.intervals import distance_interval, mean_interval
from pixsigma_jax.evaluate.items import Item, ItemSet
from pixsigma_jax.evaluate.options import Option


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
  """One number of a report.

  Attributes:
    name: the same for all models, such as "fid" or "accuracy/single".
    value: the number.
    low, high: ends of its 95 % bootstrap interval; None without one.
    unit: such as "%"; "" for a pure number.
    higher_is_better: None where neither is.
    note: what a reader must know about it, in a sentence.
    basis: what must agree for two such numbers to be compared, such as the scorer's
      identity, the number of images, the references.
  """

  name: str
  value: float
  low: float | None = None
  high: float | None = None
  unit: str = ""
  higher_is_better: bool | None = True
  note: str = ""
  basis: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
  """A number of a paper or of a leaderboard.

  Attributes:
    figure: name of the figure that it stands beside.
    model: whose it is.
    value: in the figure's unit.
    source: where it is published.
    basis: what of the figure's basis it was measured with, as far as that is known.
    note: why it may not be comparable in another respect; "" if there is none.
  """

  figure: str
  model: str
  value: float
  source: str
  basis: Mapping[str, str] = dataclasses.field(default_factory=dict)
  note: str = ""


class NotScoredError(ValueError):
  """A figure needs scores that are not there yet."""


@dataclasses.dataclass(frozen=True, eq=False)
class ScoredModel:
  """One model's scores, as a suite's figures are made of them.

  Attributes:
    name: of the model.
    items: of the suite, in order.
    images_per_item: images of each of them.
    options: of the suite, as suite.json has them.
    read: from a scorer's name, and whether the references are meant, to its rows; see
      `table` and `references`. None where it has not scored them.
    sizes: whether the images have the sizes "as asked" for, or "any".
    resamples, seed: of bootstrap intervals, see `intervals`.
    distance_resamples: of those of distances between sets, which take longer.
  """

  name: str
  items: tuple[Item, ...]
  images_per_item: int
  options: Mapping[str, Any]
  read: Callable[[str, bool], pa.Table | None]
  sizes: str = "as asked"
  resamples: int = 1000
  distance_resamples: int = 20
  seed: int = 0

  def has(self, scorer: str) -> bool:
    """Whether a scorer has scored all the model's images."""
    return self.read(scorer, False) is not None

  def table(self, scorer: str) -> pa.Table:
    """Rows of a scorer: `id`, `image` and its columns, in the items' order.

    Raises:
      NotScoredError: it has not scored the model.
    """
    return self._read(scorer, False)

  def references(self, scorer: str) -> pa.Table:
    """The same of the items' reference images, one an item that has one.

    Raises:
      NotScoredError: it has not scored them.
    """
    return self._read(scorer, True)

  def _read(self, scorer: str, references: bool) -> pa.Table:
    table = self.read(scorer, references)
    if table is None:
      whose = "the references" if references else self.name
      raise NotScoredError(
        f"{scorer} has not scored {whose} yet: run `evaluate score` to its end."
      )
    return table

  def basis(self, *scorers: str, references: bool = False) -> dict[str, str]:
    """Basis of figures from these scorers: identities, counts and references."""
    basis: dict[str, str] = {"sizes": self.sizes}
    for scorer in scorers:
      table = self.table(scorer)
      basis |= {
        f"{scorer} {key}": value for key, value in identity_of(table.schema).items()
      }
      basis["images"] = str(len(table))
      if references:
        basis["references"] = str(len(self.references(scorer)))
    return basis


def identity_of(schema: pa.Schema) -> dict[str, str]:
  """The scorer's identity that scores carry in their schema's metadata."""
  return json.loads((schema.metadata or {})[b"identity"])


def column(table: pa.Table, name: str) -> np.ndarray:
  """A column of scores as an array; of features, `[n, width]`."""
  chunked = table[name]
  if pa.types.is_fixed_size_list(chunked.type):
    width = chunked.type.list_size
    chunks = [np.asarray(chunk.flatten()) for chunk in chunked.chunks]
    flat = np.concatenate(chunks) if chunks else np.zeros(0, np.float32)
    return flat.reshape(-1, width)
  return chunked.to_numpy()


def mean_figure(
  run: ScoredModel,
  name: str,
  scorer: str,
  values: Float[np.ndarray, " n"],
  **fields: Any,
) -> Figure:
  """Mean of a score over images, with the interval over items.

  Args:
    values: one an image, in the table's order, as many for each item.
    fields: further ones of `Figure`.
  """
  by_item = values.astype(np.float64).reshape(-1, run.images_per_item).mean(axis=1)
  low, high = mean_interval(by_item, resamples=run.resamples, seed=run.seed)
  return Figure(
    name=name,
    value=float(by_item.mean()),
    low=low,
    high=high,
    **{"basis": run.basis(scorer), **fields},
  )


def distance_figure(
  run: ScoredModel,
  name: str,
  scorer: str,
  distance: Callable[[np.ndarray, np.ndarray], float],
  *,
  rows: int = 1,
) -> Figure:
  """Distance of a model's features to the references', with its interval.

  The model's items are resampled; the references stay.

  Args:
    rows: feature vectors of each image, as of its patches.
  """
  tables = (run.table(scorer), run.references(scorer))
  ours, theirs = (column(table, "features") for table in tables)
  # Axes: item, vector of the item, number.
  ours = ours.reshape(len(run.items), run.images_per_item * rows, -1)
  theirs = theirs.reshape(len(theirs) * rows, -1)

  def of(chosen: np.ndarray) -> float:
    return distance(ours[chosen].reshape(-1, ours.shape[-1]), theirs)

  value = of(np.arange(len(ours)))
  low, high = distance_interval(
    of, value, len(ours), resamples=run.distance_resamples, seed=run.seed
  )
  return Figure(
    name=name,
    value=value,
    low=low,
    high=high,
    higher_is_better=False,
    basis=run.basis(scorer, references=True),
  )


def score_means(run: ScoredModel) -> list[Figure]:
  """Mean CLIP score and aesthetic score, of those that the images have."""
  return [
    mean_figure(run, scorer, scorer, column(run.table(scorer), name))
    for scorer, name in (("clip", "cosine"), ("aesthetic", "aesthetic"))
    if run.has(scorer)
  ]


def scorers_option(default: Sequence[str], known: Sequence[str]) -> Option:
  """The option `scorers` of a suite that has a choice of them."""
  about = f"Scorers to run, of {', '.join(known)}."
  return Option("scorers", list(default), about, list)


def chosen_scorers(asked: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
  """The scorers of a flag, in the order in which they are known.

  Raises:
    ValueError: one is unknown, or there is none.
  """
  if unknown := [name for name in asked if name not in known]:
    raise ValueError(
      f"--scorers={','.join(asked)}: there is no {unknown[0]!r} here, only "
      f"{', '.join(known)}."
    )
  if not asked:
    raise ValueError(f"--scorers is empty: give some of {', '.join(known)}.")
  return tuple(name for name in known if name in asked)


@runtime_checkable
class Suite(Protocol):
  """A suite of the command `evaluate`.

  Attributes:
    name: its word on the command line.
    version: changed with whatever changes its numbers.
    options: of its prompts, which suite.json keeps.
    score_options: of the step `score`, beside those of its scorers.
    all_scorers: names of all the scorers that its options can ask for.
    published: numbers of others.
  """

  name: str
  version: str
  options: tuple[Option, ...]
  score_options: tuple[Option, ...]
  all_scorers: tuple[str, ...]
  published: tuple[Published, ...]

  def items(self, options: Mapping[str, Any]) -> ItemSet:
    """Its prompts.

    Raises:
      FileNotFoundError, ValueError: an option is wrong or a file is not there, before
        any long work.
    """
    ...

  def scorers(self, options: Mapping[str, Any]) -> tuple[str, ...]:
    """The scorers of its images, of `all_scorers`, by both kinds of options."""
    ...

  def reference_scorers(self, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of them that score the references too."""
    ...

  def figures(self, run: ScoredModel) -> Sequence[Figure]:
    """The numbers of one model."""
    ...


# Suite → module of this room that defines it, as its `SUITE`.
_MODULES: dict[str, str] = {
  "paper": "paper",
  "geneval": "geneval",
  "textatlas": "textatlas",
  "4k": "ultra",
  "digits": "digits",
}
SUITES = tuple(_MODULES)


@functools.cache
def suite(name: str) -> Suite:
  """The suite of a name.

  Raises:
    ValueError: there is none.
  """
  if name not in _MODULES:
    raise ValueError(f"There is no suite {name!r}: known are {', '.join(SUITES)}.")
  return importlib.import_module(f"{__name__}.{_MODULES[name]}").SUITE
