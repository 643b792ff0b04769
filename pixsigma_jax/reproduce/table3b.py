"""Table 3b: what makes one key and value of several."""

from pixsigma_jax.reproduce.full_size import FullSize
from pixsigma_jax.reproduce.miniature import Compression, Variant
from pixsigma_jax.reproduce.registry import Options
from pixsigma_jax.reproduce.result import Result, Table
from pixsigma_jax.reproduce.study import Claim, Row, Study

_OPERATORS = {
  "discarding, fixed": Compression(operator="discard"),
  "discarding, random": Compression(operator="random_discard"),
  "average pooling": Compression(operator="average"),
  "convolution": Compression(),
}
_VARIANTS = (
  Variant(label="none"),
  *(
    Variant(label=label, compression=compression)
    for label, compression in _OPERATORS.items()
  ),
)


def _best(measure: str, says: str) -> tuple[Claim, ...]:
  return tuple(
    Claim(says=f"{says} {other}", of="convolution", than=other, measure=measure)
    for other in ("discarding, random", "discarding, fixed", "average pooling")
  )


STUDY = Study(
  name="table3b",
  title="Table 3b: operators of compression",
  setting="the model at 16 pixels a digit goes on with keys and values compressed 2x2 "
  "in the deeper half of its layers; the convolution starts at the average, no norm",
  paper=Table(
    "The paper's table 3b",
    ("Operator", "FID", "CLIP score"),
    (
      ("N/A", "8.244", "0.276"),
      ("Token Discarding", "8.918", "0.275"),
      ("Token Pooling", "9.415", "0.275"),
      ("Conv2×2", "8.505", "0.274"),
    ),
  ),
  rows=[Row.of(variant) for variant in _VARIANTS],
  claims=(
    *_best("distance", "a convolution loses less of the image than"),
    *_best("loss", "the same by held-out loss, convolution and"),
    Claim(
      says="it leaves the text alone (CLIP 0.276, 0.274)",
      of="convolution",
      than="none",
      measure="pairs",
      expected="none",
    ),
  ),
  full_size=FullSize(
    stages={16: "stage_512"},
    continues=True,
    steps={"gpu": 1000, "pod": 10_000},
    marks=(0, 1000, 10_000),
  ),
  variants=_VARIANTS,
  remarks=(
    "The paper says that it discards at random, while its code discards by a fixed "
    "place in the window; both are here. Its code's `ave` takes the nearest token, "
    "which is discarding too: here average pooling is the mean of the window.",
  ),
)


def run(options: Options) -> Result:
  """Table 3b; see `Study.run`."""
  return STUDY.run(options)
