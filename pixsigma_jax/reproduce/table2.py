"""Table 2: from low to high resolution, after few steps and after many."""

from pixsigma_jax.reproduce.full_size import FullSize
from pixsigma_jax.reproduce.miniature import Variant
from pixsigma_jax.reproduce.registry import Options
from pixsigma_jax.reproduce.result import Result, Table
from pixsigma_jax.reproduce.study import Claim, Row, Study

_FEW = Variant(label="8 → 16, few steps", positions="interpolate_pe")

STUDY = Study(
  name="table2",
  title="Table 2: from low to high resolution",
  setting="the model at 8 pixels a digit goes on at 16 with PE interpolation; "
  "distances of 8 and of 16 pixels are of two classifiers, and do not compare",
  paper=Table(
    "The paper's table 2",
    ("Resolution", "Steps", "FID", "CLIP score"),
    (
      ("256", "20K", "16.56", "0.270"),
      ("256 → 512", "1K", "9.75", "0.272"),
      ("256 → 512", "100K", "8.91", "0.276"),
    ),
  ),
  rows=(
    Row(label="8", run=lambda miniature, seed: miniature.low(seed)),
    Row.of(_FEW),
    Row(label="8 → 16, many steps", run=lambda miniature, seed: miniature.high(seed)),
  ),
  claims=(
    Claim(
      says="after few steps the text is followed as before (CLIP 0.270, 0.272)",
      of="8 → 16, few steps",
      than="8",
      measure="pairs",
      expected="none",
    ),
    Claim(
      says="further training slightly improves the text (CLIP 0.272, 0.276)",
      of="8 → 16, many steps",
      than="8 → 16, few steps",
      measure="pairs",
    ),
    Claim(
      says="further training slightly improves the image (FID 9.75, 8.91)",
      of="8 → 16, many steps",
      than="8 → 16, few steps",
      measure="distance",
    ),
  ),
  full_size=FullSize(
    stages={16: "stage_512"},
    continues=False,
    steps={"gpu": 1000, "pod": 100_000},
    marks=(0, 1000, 100_000),
  ),
  variants=(_FEW,),
)


def run(options: Options) -> Result:
  """Table 2; see `Study.run`."""
  return STUDY.run(options)
