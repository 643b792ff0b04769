"""What key/value compression saves at each resolution, beside PixArt-Σ's Table 3.

  python -m benchmarks.compression_saving --topology=a100:8

Of a train step: arithmetic, and time by plan's model, which knows the limits of a
machine and no accelerator has calibrated. The paper's own seconds have an attention in
them that took several times its arithmetic, so the model has two baselines: the
machine's kernel, and attention written out, whose scores go through memory.
"""

import jax
from absl import flags

from benchmarks.stages import CONFIGS, compressed
from pixsigma_jax import command
from pixsigma_jax.plan import roofline, topology
from pixsigma_jax.plan.topology import Topology

_TOPOLOGY = flags.DEFINE_string("topology", "a100:8", "As of `plan`.")

STAGES = ("512", "1k", "2k", "uhd", "4k")
# Percent of the time of a training step, Tables 3c and 3d. Its "4K" was uhd: with
# 4096² the seconds of 3d would need more than the machines could do.
PAPER = {
  ("512", 2): 4,
  ("512", 4): 9,
  ("1k", 2): 18,
  ("1k", 4): 27,
  ("1k", 9): 35,
  ("2k", 4): 34,
  ("uhd", 4): 35,
}
RATIOS = (2, 4, 9)
BASELINES = ("auto", "xla")  # the machine's kernel; attention written out


def savings(machines: Topology) -> dict[tuple[str, int], list[float]]:
  """(stage, ratio) → percent of arithmetic, and of time by each baseline."""
  found = {}
  for name in STAGES:
    stages = {
      (ratio, attention): compressed(CONFIGS[name](), ratio, attention, machines)
      for ratio in (1, *RATIOS)
      for attention in BASELINES
    }
    flops = {
      ratio: sum(roofline.needed(stages[ratio, "auto"].model).values())
      for ratio in (1, *RATIOS)
    }
    times = {key: roofline.step_time(stage).seconds for key, stage in stages.items()}
    for ratio in RATIOS:
      left = [flops[ratio] / flops[1]]
      left += [times[ratio, kind] / times[1, kind] for kind in BASELINES]
      found[name, ratio] = [100 * (1 - share) for share in left]
  return found


def main(_: list[str]) -> None:
  """Prints a row a stage and ratio."""
  jax.config.update("jax_platforms", "cpu")
  machines = topology.parse(_TOPOLOGY.value, 1)
  print(f"Saved of a train step, {machines}; percent")
  print("stage | ratio | arithmetic | time, kernel | time, written out | paper")
  for (name, ratio), saved in savings(machines).items():
    cells = [f"{percent:.0f}" for percent in saved]
    paper = PAPER.get((name, ratio), "–")
    print(" | ".join([name, str(ratio), *cells, str(paper)]))


if __name__ == "__main__":
  command.run(main)
