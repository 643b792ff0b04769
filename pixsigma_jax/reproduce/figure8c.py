"""Figure 8c: how compression of keys and values starts.

The paper shows its average start beside a random one, both with the norm that the
official code has after the convolution. Beside them: both without that norm, and a norm
that is calibrated to leave alone what the model knows (`transforms/kv_compression.py`).
"""

from pixsigma_jax.reproduce.full_size import FullSize
from pixsigma_jax.reproduce.miniature import Compression, Variant
from pixsigma_jax.reproduce.registry import Options
from pixsigma_jax.reproduce.result import Result, Table
from pixsigma_jax.reproduce.study import Claim, Row, Study

_STARTS = {
  "average, norm": Compression(norm=True),
  "random, norm": Compression(norm=True, initialization="random"),
  "calibrated, norm": Compression(norm=True, initialization="calibrated"),
  "average, no norm": Compression(),
  "random, no norm": Compression(initialization="random"),
}
_VARIANTS = tuple(
  Variant(label=label, compression=compression)
  for label, compression in _STARTS.items()
)

STUDY = Study(
  name="figure8c",
  title="Figure 8c: starts of KV compression",
  setting="the model at 16 pixels a digit goes on with keys and values compressed 2x2 "
  "in the deeper half of its layers",
  paper=Table(
    "The paper's figure 8c, in words",
    ("KV compression, 100 steps", "Shown"),
    (
      ("without its start", "images are blurred"),
      ("Conv Avg Init.", "images are satisfying"),
    ),
  ),
  rows=[Row.of(variant, every_mark=True) for variant in _VARIANTS],
  claims=(
    Claim(
      says="Conv Avg Init. makes a better initial state",
      of="average, norm",
      than="random, norm",
      measure="pairs",
      at=0,
    ),
    Claim(
      says="Conv Avg Init. makes convergence faster",
      of="average, norm",
      than="random, norm",
      measure="pairs",
    ),
    Claim(
      says="(ours) without the norm the average is a better initial state",
      of="average, no norm",
      than="average, norm",
      measure="pairs",
      at=0,
    ),
    Claim(
      says="Conv Avg Init. makes a better initial state, without the norm",
      of="average, no norm",
      than="random, no norm",
      measure="pairs",
      at=0,
    ),
    Claim(
      says="Conv Avg Init. makes convergence faster, without the norm",
      of="average, no norm",
      than="random, no norm",
      measure="pairs",
    ),
    Claim(
      says="(ours) a calibrated norm is a better initial state than the paper's",
      of="calibrated, norm",
      than="average, norm",
      measure="pairs",
      at=0,
    ),
    Claim(
      says="(ours) a calibrated norm makes convergence faster than the paper's",
      of="calibrated, norm",
      than="average, norm",
      measure="pairs",
    ),
    Claim(
      says="(ours) a calibrated norm starts as well as none",
      of="calibrated, norm",
      than="average, no norm",
      measure="pairs",
      expected="none",
      at=0,
    ),
  ),
  full_size=FullSize(
    stages={16: "stage_1k:full"},
    continues=False,
    steps={"gpu": 100, "pod": 1000},
    marks=(0, 100, 1000),
  ),
  variants=_VARIANTS,
  plotted=True,
)


def run(options: Options) -> Result:
  """Figure 8c; see `Study.run`."""
  return STUDY.run(options)
