"""Figure 8b: twice the resolution, with and without PE interpolation."""

from pixsigma_jax.reproduce.full_size import FullSize
from pixsigma_jax.reproduce.miniature import Variant
from pixsigma_jax.reproduce.registry import Options
from pixsigma_jax.reproduce.result import Result, Table
from pixsigma_jax.reproduce.study import Claim, Row, Study

_INTERPOLATED = Variant(label="interpolated", positions="interpolate_pe")
_EXTENDED = Variant(label="extended", positions="extend_pe")

STUDY = Study(
  name="figure8b",
  title="Figure 8b: twice the resolution, with and without PE interpolation",
  setting="the model at 8 pixels a digit goes on at 16, its positions interpolated, or "
  "extended at their old spacing",
  paper=Table(
    "The paper's figure 8b, in words",
    ("512 → 1024", "Shown"),
    (
      ("without PE interpolation, 100 steps", "images fall apart"),
      ("with PE interpolation, 100 steps", "images are satisfying"),
    ),
  ),
  rows=[Row.of(variant, every_mark=True) for variant in (_INTERPOLATED, _EXTENDED)],
  claims=(
    Claim(
      says="PE interpolation makes a better initial state",
      of="interpolated",
      than="extended",
      measure="single",
      at=0,
    ),
    Claim(
      says="PE interpolation makes fine-tuning faster",
      of="interpolated",
      than="extended",
      measure="pairs",
    ),
    Claim(
      says="the same by distance",
      of="interpolated",
      than="extended",
      measure="distance",
    ),
    Claim(
      says="the same by held-out loss",
      of="interpolated",
      than="extended",
      measure="loss",
    ),
  ),
  full_size=FullSize(
    stages={16: "stage_1k:full"},
    continues=False,
    steps={"gpu": 100, "pod": 1000},
    marks=(0, 100, 1000),
  ),
  variants=(_INTERPOLATED, _EXTENDED),
  plotted=True,
)


def run(options: Options) -> Result:
  """Figure 8b; see `Study.run`."""
  return STUDY.run(options)
