"""What key/value compression saves at each resolution, beside PixArt-Σ's Table 3.

  python -m benchmarks.compression_saving --topology=a100:8

Of a train step: arithmetic, and time by plan's model, which knows the limits of a
machine and no accelerator has calibrated. The paper's own seconds have an attention in
them that took several times its arithmetic, so the model has two baselines: the
machine's kernel, and attention written out, whose scores go through memory.
"""

from typing import Any

import jax
from absl import flags

from configs import stage_1k, stage_2k, stage_4k, stage_512
from pixsigma_jax import command
from pixsigma_jax.plan import roofline, topology
from pixsigma_jax.plan.stage import Stage, stage_on
from pixsigma_jax.plan.topology import Topology

_TOPOLOGY = flags.DEFINE_string("topology", "a100:8", "As of `plan`.")

CONFIGS = {
  "512": stage_512.get_config,
  "1K": stage_1k.get_config,
  "2K": stage_2k.get_config,
  "UHD, 2880²": lambda: stage_4k.get_config("uhd"),
  "4096²": stage_4k.get_config,
}
# Percent of the time of a training step, Tables 3c and 3d. Its "4K" was 2880²: with
# 4096² the seconds of 3d would need more than the machines could do.
PAPER = {
  ("512", 2): 4,
  ("512", 4): 9,
  ("1K", 2): 18,
  ("1K", 4): 27,
  ("1K", 9): 35,
  ("2K", 4): 34,
  ("UHD, 2880²", 4): 35,
}
RATIOS = (2, 4, 9)
BASELINES = ("auto", "xla")  # the machine's kernel; attention written out
_LAYERS = tuple(range(14, 28))


def compressed(config: Any, ratio: int, attention: str, machines: Any) -> Stage:
  """The stage on one device's share of memory, with that compression in half of it."""
  config.model.kv_compression.ratio = ratio
  config.model.kv_compression.layers = _LAYERS if ratio > 1 else ()
  config.compute.attention = attention
  config.init.transforms = ()
  return stage_on(config.to_dict(), machines)


def savings(machines: Topology) -> dict[tuple[str, int], list[float]]:
  """(resolution, ratio) → percent of arithmetic, and of time by each baseline."""
  found = {}
  for name, get_config in CONFIGS.items():
    stages = {
      (ratio, attention): compressed(get_config(), ratio, attention, machines)
      for ratio in (1, *RATIOS)
      for attention in BASELINES
    }
    flops = {r: sum(roofline.needed(stages[r, "auto"]).values()) for r in (1, *RATIOS)}
    times = {key: roofline.step_time(stage).seconds for key, stage in stages.items()}
    for ratio in RATIOS:
      left = [flops[ratio] / flops[1]]
      left += [times[ratio, kind] / times[1, kind] for kind in BASELINES]
      found[name, ratio] = [100 * (1 - share) for share in left]
  return found


def main(_: list[str]) -> None:
  """Prints a row a resolution and ratio."""
  jax.config.update("jax_platforms", "cpu")
  machines = topology.parse(_TOPOLOGY.value, 1)
  print(f"Saved of a train step, {machines}; percent")
  print("resolution | ratio | arithmetic | time, kernel | time, written out | paper")
  for (name, ratio), saved in savings(machines).items():
    cells = [f"{percent:.0f}" for percent in saved]
    paper = PAPER.get((name, ratio), "–")
    print(" | ".join([name, str(ratio), *cells, str(paper)]))


if __name__ == "__main__":
  command.run(main)
