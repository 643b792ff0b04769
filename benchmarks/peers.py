"""This package beside diffusers and transformers in torch, at full size.

  python -m benchmarks.peers --set=cpu     # 2 threads; an hour
  python -m benchmarks.peers --set=gpu     # needs nothing but the machine

Each side runs in a process of its own with random weights, after a warm-up that
compiles, and the sides take turns, so that a machine whose speed drifts is as slow for
each. Prints median seconds and, behind ±, half of the distance between the quartiles;
gigabytes of the accelerator at most; MFU of this package, in which recomputation does
not count; "ours / best", this package against the faster of torch's two.

XL/2 is whole, but for train steps on a CPU: they stand at 14 of the 28 layers, since
the state of all leaves 24 GB no room. T5 has XXL's width and 2 of its 24 layers. A
train step is what both libraries do alike: noise error, gradient, AdamW in float32. On
a GPU both recompute the blocks; compressed layers 14 to 27 merge 2×2 (PixArt-Σ, Tables
3c and 3d). A sample is 20 steps of DPM-Solver++ at guidance 4.5 from a caption's
embedding to an image, the autoencoder among them.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys

from absl import flags

from benchmarks.peer_cases import SETS, SIDES, Case, Turn, take_turn
from pixsigma_jax import command
from pixsigma_jax.chips import find_chip

DTYPES = ("float32", "bfloat16")

_SET = flags.DEFINE_enum("set", "cpu", list(SETS), "Which cases.")
_ONLY = flags.DEFINE_list("only", [], "Names of some of them, such as 'train 512'.")
_DTYPES = flags.DEFINE_list("dtypes", [], "All on a CPU, bfloat16 on a GPU.")
_ROUNDS = flags.DEFINE_integer("rounds", 2, "Turns of each side.")
_RUNS = flags.DEFINE_integer("runs", 4, "Timed runs in a turn.")
_THREADS = flags.DEFINE_integer("threads", 2, "Of torch on a CPU.")
_TURN = flags.DEFINE_string("turn", None, "Run a turn in this process: a JSON object.")


def main(_: list[str]) -> None:
  """A table, or one turn as JSON."""
  if _TURN.value:
    turn = json.loads(_TURN.value)
    measured = take_turn(
      turn["side"],
      Case(**turn["case"]),
      turn["dtype"],
      machine=_SET.value,
      runs=_RUNS.value,
      threads=_THREADS.value,
    )
    print(json.dumps(dataclasses.asdict(measured)))
    return
  cases = {case.name: case for case in SETS[_SET.value]}
  chosen = _ONLY.value or list(cases)
  dtypes = _DTYPES.value or (DTYPES if _SET.value == "cpu" else DTYPES[1:])
  for flag, given, known in (("only", chosen, cases), ("dtypes", dtypes, DTYPES)):
    if unknown := [name for name in given if name not in known]:
      raise ValueError(f"--{flag}: no {', '.join(unknown)} in {', '.join(known)}.")
  print("case | dtype | " + " | ".join(SIDES) + " | ours / best | MFU | GB")
  for case in (cases[name] for name in chosen):
    for dtype in dtypes:
      turns: dict[str, list[Turn]] = {side: [] for side in SIDES}
      for side in SIDES * _ROUNDS.value:
        turns[side].extend(_turn_elsewhere(side, case, dtype))
      print(_row(case, dtype, turns), flush=True)


def _turn_elsewhere(side: str, case: Case, dtype: str) -> list[Turn]:
  """A turn in a process of its own; none, with a line why, where it cannot run."""
  what = f"{side}, {case.name}, {dtype}"
  print(f"{what}: compiling and running …", file=sys.stderr, flush=True)
  turn = {"side": side, "case": dataclasses.asdict(case), "dtype": dtype}
  done = subprocess.run(
    [
      *(sys.executable, "-m", "benchmarks.peers", f"--turn={json.dumps(turn)}"),
      *(f"--set={_SET.value}", f"--runs={_RUNS.value}", f"--threads={_THREADS.value}"),
    ],
    env={**os.environ, "OMP_NUM_THREADS": str(_THREADS.value)},
    capture_output=True,
    text=True,
  )
  if done.returncode:
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    print(f"{what}: {last}", file=sys.stderr, flush=True)
    return []
  return [Turn(**json.loads(done.stdout.splitlines()[-1]))]


def _row(case: Case, dtype: str, turns: dict[str, list[Turn]]) -> str:
  times = {
    side: [t for turn in each for t in turn.seconds] for side, each in turns.items()
  }
  medians = {side: statistics.median(each) for side, each in times.items() if each}
  cells = [case.name, dtype]
  for side in SIDES:
    ran = side in medians
    cells += [f"{medians[side]:.3f} ± {_spread(times[side]):.3f}" if ran else "not run"]
  peers = [seconds for side, seconds in medians.items() if side != "ours"]
  if "ours" not in medians or not peers:
    return " | ".join([*cells, "–", "–", "–"])
  cells += [f"{medians['ours'] / min(peers):.2f}"]
  chip = find_chip(turns["ours"][0].device)
  peak = chip and chip.peak(dtype)
  mfu = case.flops / medians["ours"] / peak if peak and case.flops else None
  memory = " / ".join(
    f"{max(turn.memory for turn in turns[side]) / 1e9:.1f}" for side in medians
  )
  return " | ".join([*cells, f"{mfu:.0%}" if mfu else "–", memory if chip else "–"])


def _spread(times: list[float]) -> float:
  low, _, high = statistics.quantiles(times, n=4)
  return (high - low) / 2


if __name__ == "__main__":
  command.run(main)
