r"""Makes feature records of images and captions, once, for training to read.

  python -m pixsigma_jax.prepare --dataset=digits --resolution=8 --count=20000 \
    --output=DIR

An interrupted run is started over by the same command; a finished one is left alone.
"""

import pathlib

from absl import flags

from pixsigma_jax import command
from pixsigma_jax.prepare.digits import prepare_digits

_DATASET = flags.DEFINE_enum(
  "dataset",
  None,
  ["digits"],
  "Where the images come from: digits, the handwriting in scikit-learn's wheel.",
  required=True,
)
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write to.", required=True)
_RESOLUTION = flags.DEFINE_integer(
  "resolution",
  None,
  "Side of a square image in pixels; of digits: of one.",
  required=True,
)
_COUNT = flags.DEFINE_integer("count", None, "Images to draw.", required=True)
_SEED = flags.DEFINE_integer("seed", 0, "Which images are drawn.")
_SCALING_FACTOR = flags.DEFINE_float(
  "scaling_factor", 1.0, "What training multiplies the latents with."
)


def main(_: list[str]) -> None:
  """Entry point; flags are parsed."""
  directory = pathlib.Path(_OUTPUT.value)
  written = prepare_digits(
    directory,
    resolution=_RESOLUTION.value,
    count=_COUNT.value,
    seed=_SEED.value,
    scaling_factor=_SCALING_FACTOR.value,
  )
  if written:
    print(f"{directory} holds {_COUNT.value} records.")
  else:
    print(f"{directory} already holds these {_COUNT.value} records.")


if __name__ == "__main__":
  command.run(main)
