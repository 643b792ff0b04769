"""Keeps what the stages take, so that a change that takes more is noticed.

  python -m benchmarks.keep_plans

Writes tests/plan/kept.json, which `tests/plan/test_kept.py` compares with what the tree
says: of stage_1k and stage_4k at full size, FLOPs, a device's state, and the estimates
of its memory, its transfers and its step; of both as miniatures, what libtpu makes of
the train step for eight chips: temporary memory and bytes sent. Give the command after
a change that is meant to cost what it costs, and say so in the commit. It takes a
minute or two.
"""

import json
import pathlib
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax

from configs import stage_1k, stage_4k
from pixsigma_jax.plan import hlo, memory, roofline, topology
from pixsigma_jax.plan.compilation import compile_lowered, lower_train_step
from pixsigma_jax.plan.stage import stage_on

KEPT = pathlib.Path(__file__).parents[1] / "tests" / "plan" / "kept.json"
STAGES = {"stage_1k": stage_1k, "stage_4k": stage_4k}
FULL, SMALL = "v5e:8x8", "v5e:2x4"
_MESHES = {
  "stage_1k": {"data": 2, "fsdp": 4, "context": 1},
  "stage_4k": {"data": 1, "fsdp": 4, "context": 2},
}
# The longer to compile has layers of both kinds.
_COMPRESSED = {"stage_1k": (0, 1), "stage_4k": (1,)}


def analytic(name: str) -> dict[str, float]:
  """Of a stage at full size on 64 chips, without compiling anything."""
  stage = stage_on(STAGES[name].get_config().to_dict(), topology.parse(FULL))
  held, time = memory.estimate(stage), roofline.step_time(stage)
  return {
    "flops": time.needed,
    "state bytes": float(held.parameters + held.optimizer + held.averages),
    "temporary bytes, estimated": float(held.temporary),
    "bytes received, modelled": sum(t.bytes for t in time.transfers.values()),
    "step seconds, modelled": time.seconds,
  }


def miniature(name: str) -> Mapping[str, Any]:
  """A stage of two narrow layers, in everything else itself."""
  config = STAGES[name].get_config()
  config.model.variant = "Nano/2"
  config.model.kv_compression.layers = _COMPRESSED[name]
  config.model.base_size = 32
  config.model.caption_width = 64
  config.mesh.update(_MESHES[name])
  config.batch_size = 8
  return config.to_dict()


def compiled(name: str) -> dict[str, float]:
  """Of a stage's miniature, compiled for eight chips."""
  stage = stage_on(miniature(name), topology.parse(SMALL))
  program, _ = compile_lowered(lower_train_step(stage), stage.topology)
  held, static = memory.of_compiled(stage, program), hlo.read(program.as_text())
  return {
    "temporary bytes": float(held.temporary + held.gradients),
    "bytes sent": sum(static.sent.values()),
    "cycles": static.cycles,
  }


def main() -> None:
  """Measures and writes."""
  jax.config.update("jax_platforms", "cpu")
  stages = {
    name: {"full size": analytic(name), "miniature": compiled(name)} for name in STAGES
  }
  kept = {"libtpu": metadata.version("libtpu"), "stages": stages}
  KEPT.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
  print(KEPT.read_text(encoding="utf-8"))


if __name__ == "__main__":
  main()
