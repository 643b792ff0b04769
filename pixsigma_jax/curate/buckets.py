"""Writes a table of sizes, or checks the one that is there."""

import os
import pathlib

from pixsigma_jax import disk
from pixsigma_jax.data import buckets
from pixsigma_jax.wording import listed

# What every published PixArt has.
_PATCH_SIZE, _DOWNSAMPLING = 2, 8


def run(path: str | os.PathLike[str], *, resolution: int, step: int | None) -> None:
  """Writes the table at `path`, or checks the one that is there; prints what it finds.

  Args:
    path: of a JSON file, `{"RATIO": [HEIGHT, WIDTH], ...}`.
    resolution: side in pixels of the square whose area the sizes have.
    step: of the sides, for a new table; None for about a sixteenth of the resolution,
      so that all sizes can be cut into tokens.

  Raises:
    ValueError: a size cannot be used, the file is no table, or the step does not suit
      the resolution.
    OSError: the file cannot be read or written.
  """
  path = pathlib.Path(path)
  if path.exists():
    if step is not None:
      raise ValueError(
        f"{path} exists and is only checked: leave out --step={step}, or name a new "
        "file for a table with this step."
      )
    table = buckets.read_table(path)
  else:
    table = buckets.generate(resolution, step or _usable_step(resolution))
  found = buckets.check(table, resolution, _PATCH_SIZE, _DOWNSAMPLING)
  if found.unusable:
    raise ValueError(
      f"{path}: {len(found.unusable)} of {len(table)} sizes cannot be used. "
      f"{listed(found.unusable, 4, ' ')}"
    )
  if not path.exists():
    text = buckets.table_text(table)
    disk.write_text(path, text)
    print(f"Wrote {path}.")
  for line in found.doubtful:
    print(f"Doubtful: {line}")
  print(
    f"{len(table)} sizes for {resolution} pixels, ratios {min(table):g} to "
    f"{max(table):g} (height over width). The longest sequence is "
    f"{found.longest_sequence} tokens; padded to it, {found.padding_share:.1%} of a "
    "batch is padding if all sizes are as frequent."
  )


def _usable_step(resolution: int) -> int:
  unit = _PATCH_SIZE * _DOWNSAMPLING
  step = max(unit, resolution // 16 // unit * unit)
  return unit if resolution % step else step
