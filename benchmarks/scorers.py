"""Inception-v3 and CLIP, which scores are made of: images a second, and what TPUs need.

  python -m benchmarks.scorers                       # beside torch on this CPU
  python -m benchmarks.scorers --compile=v5e:1x1     # by TPU's compiler, without a TPU

On a CPU both sides have random weights in float32 and the same batch, and take turns in
one process after a warm-up that compiles: images a second at the median, and behind ±
half of the distance between the quartiles. torch's CLIP is transformers'; its Inception
is torchvision's class, where `pip install --no-deps --target DIR torchvision` has been
done and DIR is in PYTHONPATH. Under it stands what a core does before: PNGs of 1024²
decoded and resized.

Compiled is the scorers' own program with its batch for one chip, in float32 by six
passes in bfloat16 (`highest`): bytes at once, time at the chip's peaks, time by the
compiler's cycles, and chip-minutes for 30,000 images of any size by the latter.
"""

import statistics
from collections.abc import Mapping

import jax
from absl import flags

from benchmarks.scorer_networks import (
  NETWORKS,
  Network,
  compiled_for,
  host_rates,
  rates,
)
from pixsigma_jax import command
from pixsigma_jax.plan import topology

SET = 30_000  # images of the paper's evaluation
_GIB = 2**30

_COMPILE = flags.DEFINE_string("compile", None, "A topology of one chip.")
_ONLY = flags.DEFINE_list("only", [], "Names of some of the networks.")
_BATCH = flags.DEFINE_integer("batch_size", 16, "Images together; the scorers take 16.")
_ROUNDS = flags.DEFINE_integer("rounds", 2, "Turns of each side.")
_RUNS = flags.DEFINE_integer("runs", 3, "Timed runs in a turn.")


def _print_beside_torch(networks: Mapping[str, Network]) -> None:
  print("network | ours, images/s | torch, images/s | ours / torch")
  for name, network in networks.items():
    found = rates(network, _BATCH.value, rounds=_ROUNDS.value, runs=_RUNS.value)
    cells = [_cell(side) for side in found]
    medians = [statistics.median(side) for side in found if side]
    ratio = f"{medians[0] / medians[1]:.2f}" if len(medians) == 2 else "–"
    print(" | ".join([name, *cells, ratio]), flush=True)
  for name, rate in host_rates().items():
    print(f"one core, PNG of 1024²: {name} | {rate:.3g} | |")


def _cell(found: list[float]) -> str:
  if not found:
    return "not run: no torchvision"
  spread = 0.0
  if len(found) > 1:
    low, _, high = statistics.quantiles(found, n=4)
    spread = (high - low) / 2
  return f"{statistics.median(found):.3g} ± {spread:.2g}"


def _print_compiled(networks: Mapping[str, Network], machines: str) -> None:
  where = topology.parse(machines)
  columns = ["network", "GFLOP an image", "GiB of weights", "GiB at once"]
  columns += ["roofline, ms a batch", "cycles, ms a batch", "chip-minutes"]
  print(" | ".join(columns))
  for name, network in networks.items():
    made = compiled_for(network, _BATCH.value, where)
    batches = SET / _BATCH.value / 60
    cells = [
      f"{made.flops / 1e9:.3g}",
      f"{made.parameters / _GIB:.3f}",
      f"{made.total / _GIB:.3f}",
      f"{1e3 * made.roofline:.3g}",
      f"{1e3 * made.cycles:.3g}" if made.cycles else "–",
      f"{batches * max(made.roofline, made.cycles or 0):.3g}",
    ]
    print(" | ".join([name, *cells]), flush=True)


def main(_: list[str]) -> None:
  """Prints one of the two tables."""
  jax.config.update("jax_platforms", "cpu")
  if unknown := [name for name in _ONLY.value if name not in NETWORKS]:
    raise ValueError(f"--only: no {unknown[0]} in {'; '.join(NETWORKS)}.")
  chosen = {n: v for n, v in NETWORKS.items() if n in (_ONLY.value or NETWORKS)}
  if _COMPILE.value:
    _print_compiled(chosen, _COMPILE.value)
  else:
    _print_beside_torch(chosen)


if __name__ == "__main__":
  command.run(main)
