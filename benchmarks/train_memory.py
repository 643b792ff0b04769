"""What a training step of a stage takes of each chip's memory, without a chip.

  python -m benchmarks.train_memory --stages=stage_1k,stage_4k --remats=block,attention
  python -m benchmarks.train_memory --nocompile

Compiles the stages' real step ahead of time, as `python -m pixsigma_jax.plan` does, for
each policy of rematerialisation, and prints the compiler's own account of one chip's
memory, a row a stage and policy. Minutes each; or `plan`'s estimate of it, in seconds.
"""

import importlib

import jax
from absl import flags

from pixsigma_jax import command
from pixsigma_jax.plan import topology
from pixsigma_jax.plan.plan import make_plan
from pixsigma_jax.plan.stage import stage_on

GIB = 2**30

STAGES = ("stage_256_vae", "stage_512", "stage_1k", "stage_2k", "stage_4k")

_STAGES = flags.DEFINE_list("stages", list(STAGES), "Configs.")
_REMATS = flags.DEFINE_list("remats", ["none", "block", "attention"], "Policies.")
_COMPILE = flags.DEFINE_bool("compile", True, "Without, plan's estimate.")
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:8x8", "Chips of a TPU slice.")


def main(_: list[str]) -> None:
  """Prints a row a program."""
  jax.config.update("jax_platforms", "cpu")
  machines = topology.parse(_TOPOLOGY.value, 1)
  columns = ("stage", "batch", "mesh", "attention", "remat")
  print(" | ".join([*columns, "state, batch and program", "temporary", "sum"]))
  for name in _STAGES.value:
    state = None
    for remat in _REMATS.value:
      config = importlib.import_module(f"configs.{name}").get_config()
      config.compute.remat = remat
      stage = stage_on(config.to_dict(), machines, state)
      state = stage.state
      plan = make_plan(stage, compiles=_COMPILE.value)
      temporary = plan.memory.gradients + plan.memory.temporary
      cells = [
        name,
        str(config.batch_size),
        " x ".join(map(str, stage.sizes.values())),
        stage.attention,
        remat,
        f"{(plan.memory.total - temporary) / GIB:.2f}",
        f"{temporary / GIB:.2f}",
        f"{plan.memory.total / GIB:.2f}" + ("" if plan.fits else ", does not fit"),
      ]
      print(" | ".join(cells), flush=True)


if __name__ == "__main__":
  command.run(main)
