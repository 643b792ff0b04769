"""Table 3c: ratios of compression at two resolutions, with the time of a step."""

from pixsigma_jax.reproduce.full_size import FullSize
from pixsigma_jax.reproduce.miniature import Compression, Variant
from pixsigma_jax.reproduce.registry import Options
from pixsigma_jax.reproduce.result import Result, Table
from pixsigma_jax.reproduce.study import Claim, Row, Study

# Pixels of a cell → ratios.
_RATIOS = {16: (1, 2, 4), 24: (1, 2, 4, 9)}


def _label(pixels: int, ratio: int) -> str:
  return f"{pixels} pixels, ratio {ratio}"


_VARIANTS = tuple(
  Variant(
    label=_label(pixels, ratio),
    pixels=pixels,
    compression=None if ratio == 1 else Compression(ratio=ratio),
  )
  for pixels, ratios in _RATIOS.items()
  for ratio in ratios
)


def _claims(pixels: int, ratio: int) -> tuple[Claim, ...]:
  compressed, full = _label(pixels, ratio), _label(pixels, 1)
  where = f"at {pixels} pixels ratio {ratio}"
  return (
    Claim(
      says=f"{where} leaves the text alone",
      of=compressed,
      than=full,
      measure="pairs",
      expected="none",
    ),
    Claim(
      says=f"{where} loses a little of the image",
      of=full,
      than=compressed,
      measure="distance",
    ),
  )


STUDY = Study(
  name="table3c",
  title="Table 3c: ratios of compression",
  setting="models at 16 and at 24 pixels a digit go on with keys and values compressed "
  "in the deeper half of their layers, by a convolution from the average without norm; "
  "milliseconds are of a step in its run's fastest stretch",
  paper=Table(
    "The paper's table 3c",
    ("Resolution", "Ratio", "FID", "CLIP score", "Step of 384, s"),
    (
      ("512", "1", "8.244", "0.276", "2.3"),
      ("512", "2", "9.063", "0.276", "2.2 (-4%)"),
      ("512", "4", "9.606", "0.276", "2.1 (-9%)"),
      ("1024", "1", "5.685", "0.277", "27.5"),
      ("1024", "2", "5.512", "0.273", "22.5 (-18%)"),
      ("1024", "4", "5.644", "0.276", "20.0 (-27%)"),
      ("1024", "9", "5.712", "0.275", "17.8 (-35%)"),
    ),
  ),
  rows=[Row.of(variant) for variant in _VARIANTS],
  claims=(*_claims(16, 4), *_claims(24, 4), *_claims(24, 9)),
  full_size=FullSize(
    stages={16: "stage_512", 24: "stage_1k:full"},
    continues=True,
    steps={"gpu": 1000, "pod": 10_000},
    marks=(0, 1000, 10_000),
  ),
  variants=_VARIANTS,
  remarks=(
    "Compression shortens attention alone. At these sizes, of 64 to 288 tokens, that "
    "is a small part of a step; table 3d has the times of full size.",
  ),
  timed=True,
)


def run(options: Options) -> Result:
  """Table 3c; see `Study.run`."""
  return STUDY.run(options)
