"""What drawing one image takes of a TPU, without a TPU.

  python -m benchmarks.sample_plan --topologies=v5e:1x1,v6e:1x1

Compiles the sampler's real program ahead of time for each stage's model, guidance in
one batch and in two passes, as `python -m pixsigma_jax.plan --sample` does with the one
that the pipeline would choose. A minute a row.
"""

import jax
from absl import flags

from benchmarks.stages import CONFIGS, chosen
from pixsigma_jax import command
from pixsigma_jax.plan import kernels, topology
from pixsigma_jax.plan.memory import DoesNotFitError
from pixsigma_jax.plan.sampling import plan_sampling
from pixsigma_jax.train.config import model_config

_TOPOLOGIES = flags.DEFINE_list("topologies", ["v5e:1x1"], "Chips; one of them draws.")
_STAGES = flags.DEFINE_list("stages", ["1k", "2k", "4k"], f"Of {', '.join(CONFIGS)}.")

_GIB = 2**30


def main(_: list[str]) -> None:
  """Prints a row a program."""
  jax.config.update("jax_platforms", "cpu")
  configs = chosen(_STAGES.value)
  print("stage | on | passes | GiB | cycles, s | static MFU | ceiling | compiled in, s")
  for name in _TOPOLOGIES.value:
    machines = topology.parse(name, 1)
    for config in configs.values():
      model = model_config(config["model"])
      for passes in (1, 2):
        cells = [config["stage"], machines.kind, str(passes)]
        dtype = config["compute"]["dtype"]
        kernels.check_libtpu(machines.kind, dtype, refuse=False)
        try:
          found = plan_sampling(model, machines, dtype=dtype, passes=passes)
        except DoesNotFitError:
          print(" | ".join([*cells, "does not fit"]), flush=True)
          continue
        memory = f"{found.total / _GIB:.2f} of {found.available / _GIB:.2f}"
        known = found.seconds is not None
        time = [f"{found.seconds:.3g}", f"{found.mfu:.1%}"] if known else ["–", "–"]
        last = [f"{found.ceiling:.0%}", f"{found.compiled_in:.0f}"]
        print(" | ".join([*cells, memory, *time, *last]), flush=True)


if __name__ == "__main__":
  command.run(main)
