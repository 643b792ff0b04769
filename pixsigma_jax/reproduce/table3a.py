"""Table 3a: which layers compress keys and values."""

from pixsigma_jax.reproduce.full_size import FullSize
from pixsigma_jax.reproduce.miniature import Compression, Variant, Where
from pixsigma_jax.reproduce.registry import Options
from pixsigma_jax.reproduce.result import Result, Table
from pixsigma_jax.reproduce.study import Claim, Row, Study

_LAYERS: tuple[Where, ...] = ("shallow", "middle", "deep")
_VARIANTS = (
  Variant(label="none"),
  *(Variant(label=where, compression=Compression(where=where)) for where in _LAYERS),
)


def _closest(measure: str, says: str) -> tuple[Claim, ...]:
  return tuple(
    Claim(says=f"{says} {other} ones", of="deep", than=other, measure=measure)
    for other in ("shallow", "middle")
  )


STUDY = Study(
  name="table3a",
  title="Table 3a: layers that compress",
  setting="the model at 16 pixels a digit goes on with keys and values compressed 2x2 "
  "in half of its layers, by a convolution from the average without norm",
  paper=Table(
    "The paper's table 3a",
    ("Layers", "FID", "CLIP score"),
    (
      ("N/A", "8.244", "0.276"),
      ("Shallow (1-14)", "9.278", "0.275"),
      ("Middle (7-20)", "9.063", "0.276"),
      ("Deep (14-27)", "8.532", "0.275"),
    ),
  ),
  rows=[Row.of(variant) for variant in _VARIANTS],
  claims=(
    *_closest("distance", "deep layers lose less of the image than"),
    *_closest("loss", "the same by held-out loss, deep and"),
    Claim(
      says="compression of deep layers leaves the text alone (CLIP 0.276, 0.275)",
      of="deep",
      than="none",
      measure="pairs",
      expected="none",
    ),
    Claim(
      says="it loses a little of the image (FID 8.244, 8.532)",
      of="none",
      than="deep",
      measure="distance",
    ),
  ),
  full_size=FullSize(
    stages={16: "stage_512"},
    continues=True,
    steps={"gpu": 1000, "pod": 10_000},
    marks=(0, 1000, 10_000),
  ),
  variants=_VARIANTS,
)


def run(options: Options) -> Result:
  """Table 3a; see `Study.run`."""
  return STUDY.run(options)
