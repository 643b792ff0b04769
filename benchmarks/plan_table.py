"""The paper's stages on TPUs and GPUs from one box to two pods: docs/plan.md's tables.

  python -m benchmarks.plan_table                      # the analytic model, a minute
  python -m benchmarks.plan_table --compile=v5e:8x8    # by the compiler, an hour

Each stage as its config has it; what does not divide over the machines says so.
"""

import time

import jax
from absl import flags

from benchmarks.stages import CONFIGS, chosen
from pixsigma_jax import command
from pixsigma_jax.plan import kernels, topology
from pixsigma_jax.plan.plan import Plan, make_plan
from pixsigma_jax.plan.stage import stage_on

_COMPILE = flags.DEFINE_list("compile", [], "Topologies to compile for, and no others.")
_SLICES = flags.DEFINE_integer("slices", 1, "Of each topology to compile for.")
_STAGES = flags.DEFINE_list("stages", ["1k", "2k", "4k"], f"Of {', '.join(CONFIGS)}.")

MACHINES = (
  *(("v4:2x2x1", 1), ("v4:2x4x4", 1), ("v4:4x8x8", 1)),
  *(("v5e:2x2", 1), ("v5e:8x8", 1), ("v5e:16x16", 1), ("v5e:16x16", 2)),
  *(("v5p:2x2x1", 1), ("v5p:2x4x4", 1), ("v5p:4x8x8", 1)),
  *(("v6e:2x2", 1), ("v6e:8x8", 1), ("v6e:16x16", 1)),
  *(("a100:8", 1), ("h100:8", 1), ("h200:8", 1)),
)
_GIB = 2**30


def row(plan: Plan, seconds: float) -> str:
  """A plan in a line of a table."""
  stage, held = plan.stage, plan.memory
  sizes = " × ".join(map(str, stage.sizes.values()))
  fits = "" if plan.fits else ", does not fit"
  cells = [
    f"{held.total / _GIB:.2f} of {stage.topology.chip.usable / _GIB:.2f}{fits}",
    f"{plan.time.seconds:.3g}",
    f"{plan.time.ceiling:.0%}",
  ]
  if plan.compilation is None:
    cells += [f"{plan.mfu:.1%}", f"{plan.images_a_second:.3g}", f"${plan.dollars:,.0f}"]
  elif plan.compilation.refused:
    cells += ["", "", "", ""]
  else:
    sent = sum(plan.compilation.sent.values())
    static = plan.static_seconds, plan.static_mfu
    cells += [f"{static[0]:.3g}", f"{static[1]:.1%}"] if all(static) else ["", ""]
    cells += [f"{sent / 1e9:.4g}", f"{seconds:.0f}"]
  cells = [stage.config["stage"], str(stage.topology), sizes, *cells]
  return f"| {' | '.join(cells)} |"


def main(_: list[str]) -> None:
  """Prints a row a stage and topology."""
  jax.config.update("jax_platforms", "cpu")
  configs = chosen(_STAGES.value)
  machines = [(name, _SLICES.value) for name in _COMPILE.value] or MACHINES
  columns = ["stage", "on", "mesh", "GiB a device", "roofline, s", "ceiling"]
  if _COMPILE.value:
    columns += ["cycles, s", "static MFU", "GB gathered or summed", "compiled in, s"]
  else:
    columns += ["MFU", "images a second", "stage, at least"]
  print(f"| {' | '.join(columns)} |")
  print("|---" * len(columns) + "|")
  for config in configs.values():
    state = None
    for machine, slices in machines:
      try:
        stage = stage_on(config.to_dict(), topology.parse(machine, slices), state)
      except ValueError as error:
        print(f"| {config.stage} | {slices} × {machine} | {error} | | | | | | |")
        continue
      state, began = stage.state, time.perf_counter()
      if _COMPILE.value:
        kernels.check_libtpu(stage.topology.kind, stage.dtype.name, refuse=False)
      plan = make_plan(stage, compiles=bool(_COMPILE.value))
      print(row(plan, time.perf_counter() - began), flush=True)


if __name__ == "__main__":
  command.run(main)
