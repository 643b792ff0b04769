"""XL/2 of the published size from .pth to a checkpoint of ours and back, measured.

  python -m benchmarks.convert_full_size --directory=DIR

Writes 10 GB of random weights and copies below DIR, each command in a process of its
own, and prints seconds and peak memory of each. The copy that comes back is compared
with the original bit by bit.
"""

import os
import pathlib
import subprocess
import sys
import time

import numpy as np
from absl import app, flags

from pixsigma_jax.convert import files, layouts, pixart
from pixsigma_jax.models.pixart import PixArtConfig, abstract_params
from pixsigma_jax.tree import named_leaves

_DIRECTORY = flags.DEFINE_string("directory", None, "Where to write.", required=True)

CONFIG = PixArtConfig.from_variant("XL/2", base_size=64, pe_interpolation=2.0)


def main(_: list[str]) -> None:
  """Entry point; flags are parsed."""
  directory = pathlib.Path(_DIRECTORY.value)
  directory.mkdir(parents=True)
  original, back = directory / "original.pth", directory / "back.pth"
  _write_random(original)
  print(f"{original.stat().st_size / 1e9:.2f} GB in the file")
  convert = [sys.executable, "-m", "pixsigma_jax.convert"]
  release = "--release=sigma-1024"
  _measure(
    "pixart → orbax",
    [*convert, "--from=pixart", "--to=orbax", original, directory / "run", release],
  )
  _measure(
    "orbax → pixart",
    [*convert, "--from=orbax", "--to=pixart", directory / "run", back],
  )
  one, other = files.open_weights(original), files.open_weights(back)
  # The table of positions is recomputed: in float32, as the file has it.
  equal = [np.array_equal(one[name], other[name]) for name in one]
  print(f"{sum(equal)} of {len(one)} tensors equal to the bit, {len(other)} written")


def _write_random(path: pathlib.Path) -> None:
  """A state dict with the official names, and numbers that all differ."""
  draw = np.random.default_rng(0)
  params = {
    name: draw.standard_normal(leaf.shape, np.float32)
    for name, leaf in named_leaves(abstract_params(CONFIG)).items()
  }
  weights = layouts.weights_from(_nested(params), CONFIG, layouts.OFFICIAL)
  del params
  shape = (CONFIG.caption_length, CONFIG.caption_width)
  weights[pixart.NULL_CAPTION] = draw.standard_normal(shape, np.float32)
  files.write_pickle(path, weights, None)


def _nested(leaves: dict[str, np.ndarray]) -> dict:
  nested: dict = {}
  for name, leaf in leaves.items():
    *parents, last = name.split("/")
    place = nested
    for parent in parents:
      place = place.setdefault(parent, {})
    place[last] = leaf
  return nested


def _measure(what: str, command: list) -> None:
  began = time.perf_counter()
  process = subprocess.Popen(list(map(str, command)))
  _, status, usage = os.wait4(process.pid, 0)
  if status:
    raise RuntimeError(f"{what} failed.")
  seconds = time.perf_counter() - began
  peak = usage.ru_maxrss * 1024
  print(f"{what}: {seconds:.0f} s, {peak / 1e9:.1f} GB of memory at its peak")


if __name__ == "__main__":
  app.run(main)
