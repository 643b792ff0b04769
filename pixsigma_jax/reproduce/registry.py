"""Names of the reproductions: what each shows, what it needs, how long it takes."""

import dataclasses
import importlib
from collections.abc import Sequence

from pixsigma_jax.reproduce.result import Result


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What a command line says.

  Attributes:
    index: of `curate`, for statistics of captions.
    tagger: what finds nouns.
    beam: options of Apache Beam.
    budget: how much is trained: `laptop`, `gpu`, `pod` or `smoke`.
    output: folder of what is trained, for going on.
  """

  index: str | None = None
  tagger: str = "rules"
  beam: Sequence[str] = ()
  budget: str = "laptop"
  output: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reproduction:
  """A table or figure of the paper.

  Attributes:
    module: of this package; its `run` takes `Options` and returns a `Result`.
    shows: what, in a line.
    takes: how long, on two cores.
    needs: names of options that must be given.
    trains: whether models are, so that the budget counts.
  """

  module: str
  shows: str
  takes: str
  needs: tuple[str, ...] = ()
  trains: bool = False

  def run(self, options: Options) -> Result:
    """Makes the result.

    Raises:
      ValueError: an option is missing, or not what the reproduction takes.
    """
    for name in self.needs:
      if getattr(options, name) is None:
        raise ValueError(f"This needs --{name}: {self.shows}.")
    found = importlib.import_module(f"pixsigma_jax.reproduce.{self.module}")
    return found.run(options)


REPRODUCTIONS: dict[str, Reproduction] = {
  "table1": Reproduction(
    module="table1",
    shows="nouns and lengths of captions, of an index of `curate`",
    takes="a minute for 3 million captions a core",
    needs=("index",),
  ),
  "figure6": Reproduction(
    module="figure6",
    shows="histogram of caption lengths, of an index of `curate`",
    takes="as table1",
    needs=("index",),
  ),
  "table2": Reproduction(
    module="table2",
    shows="quality at twice the resolution, after few steps and after many",
    takes="what its budget says",
    trains=True,
  ),
  "table3a": Reproduction(
    module="table3a",
    shows="compression in shallow, middle or deep layers, or in none",
    takes="what its budget says",
    trains=True,
  ),
  "table3b": Reproduction(
    module="table3b",
    shows="compression by discarding, average pooling or convolution",
    takes="what its budget says",
    trains=True,
  ),
  "table3c": Reproduction(
    module="table3c",
    shows="compression ratios 1, 2, 4 and 9 at two resolutions, with step time",
    takes="what its budget says",
    trains=True,
  ),
  "table3d": Reproduction(
    module="table3d",
    shows="seconds of training and sampling with and without compression",
    takes="a minute",
  ),
  "table4": Reproduction(
    module="table4",
    shows="operations, days and price of every stage",
    takes="two minutes",
  ),
  "figure8a": Reproduction(
    module="figure8a",
    shows="from one small autoencoder's latents to another's",
    takes="what its budget says",
    trains=True,
  ),
  "figure8b": Reproduction(
    module="figure8b",
    shows="twice the resolution, with and without PE interpolation",
    takes="what its budget says",
    trains=True,
  ),
  "figure8c": Reproduction(
    module="figure8c",
    shows="starts of KV compression, with and without a norm",
    takes="what its budget says",
    trains=True,
  ),
}


def find(name: str) -> Reproduction:
  """The reproduction of that name.

  Raises:
    ValueError: there is none.
  """
  if name not in REPRODUCTIONS:
    raise ValueError(
      f"There is no reproduction {name!r}, only {', '.join(REPRODUCTIONS)}."
    )
  return REPRODUCTIONS[name]
