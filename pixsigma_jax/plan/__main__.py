"""Memory, time and price of a stage on machines that nobody needs to have.

python -m pixsigma_jax.plan --config=FILE --topology=v5e:8x8 [--config.field=value]

Compiles the train step ahead of time, which takes minutes; exit code 1 if it does not
fit. With --nocompile, and for GPUs where JAX's CUDA plugin is not installed, the
analytic model alone: docs/plan.md. With --sample an image drawn by the stage's model,
in place of a step; on several devices by their number too: docs/several_devices.md.
"""

import dataclasses
import json
from typing import Any

import jax
from absl import flags, logging
from ml_collections import config_flags

from pixsigma_jax.mesh_axes import CONTEXT, GUIDANCE
from pixsigma_jax.plan import (
  drawing,
  gpus,
  kernels,
  report,
  sampling,
  search,
  topology,
)
from pixsigma_jax.plan.memory import DoesNotFitError
from pixsigma_jax.plan.plan import as_dict, make_plan
from pixsigma_jax.plan.stage import stage_on
from pixsigma_jax.train import compatibility
from pixsigma_jax.train.config import model_config
from pixsigma_jax.train.config_flag import run_with_config
from pixsigma_jax.wording import install

config_flags.DEFINE_config_file("config", help_string="A config file; FILE:ARGUMENT.")
_TOPOLOGY = flags.DEFINE_string(
  "topology", None, "Machines: v5e:8x8 (chips), h200:8 (GPUs of a box).", required=True
)
_SLICES = flags.DEFINE_integer(
  "slices", 1, "Slices, or boxes, of that topology.", lower_bound=1
)
_COMPILE = flags.DEFINE_bool(
  "compile", True, "Compile the step; without, the analytic model in seconds."
)
_SEARCH = flags.DEFINE_integer(
  *("search", 0, "Rank meshes, remat and accumulation, show so many of the best."),
  lower_bound=0,
)
_PRICE = flags.DEFINE_float(
  "price", None, "Dollars an hour of a chip, in place of the list's.", lower_bound=0.0
)
_SAMPLE = flags.DEFINE_bool(
  "sample", False, "Plan an image, on one device or on several together, no step."
)
_ANY_LIBTPU = flags.DEFINE_bool(
  "any_libtpu", False, "Take cycles of kernels from another libtpu than the one here."
)
_JSON = flags.DEFINE_bool("json", False, "Print JSON, sizes in bytes.")


def main(config: dict[str, Any]) -> None:
  """Entry point; flags are parsed."""
  logging.set_verbosity(logging.INFO)
  # Whatever accelerator is here is not asked: all is for machines that are elsewhere.
  jax.config.update("jax_platforms", "cpu")
  machines = topology.parse(_TOPOLOGY.value, _SLICES.value, _PRICE.value)
  if _SAMPLE.value:
    _plan_sampling(config, machines)
    return
  compiles = _COMPILE.value
  if compiles and machines.platform == "gpu" and not gpus.can_compile():
    logging.info(
      "Nothing is compiled: this is the analytic model, and memory is an estimate. To "
      "compile for GPUs, which needs none: %s.",
      install("gpu"),
    )
    compiles = False
  if compiles:
    _check_libtpu(config, machines)
  if _SEARCH.value:
    plans = search.search(config, machines, compiles=compiles, count=_SEARCH.value)
  else:
    plans = [make_plan(stage_on(config, machines), compiles=compiles)]
  if _JSON.value:
    found = [as_dict(plan) for plan in plans]
    print(json.dumps(found if _SEARCH.value else found[0], indent=2))
  elif _SEARCH.value:
    print(search.table(plans))
  else:
    print(report.text(plans[0]))
  if not any(plan.fits for plan in plans):
    raise DoesNotFitError(report.does_not_fit(plans[0]))


def _check_libtpu(config: dict[str, Any], machines: topology.Topology) -> None:
  if machines.platform == "tpu":
    dtype = config["compute"]["dtype"]
    kernels.check_libtpu(machines.kind, dtype, refuse=not _ANY_LIBTPU.value)


def _plan_sampling(config: dict[str, Any], machines: topology.Topology) -> None:
  if _SEARCH.value:
    raise ValueError("--sample finds the best split by itself: leave out --search.")
  compatibility.check_config(config)
  if machines.count == 1:
    _plan_on_one(config, machines)
  else:
    _plan_on_several(config, machines)


def _plan_on_one(config: dict[str, Any], machine: topology.Topology) -> None:
  if not _COMPILE.value:
    raise ValueError(
      "--sample on one device says what a compiler makes of the sampler: leave out "
      "--nocompile, or name several devices, as v5e:2x4."
    )
  _check_libtpu(config, machine)
  model, dtype = model_config(config["model"]), config["compute"]["dtype"]
  found = sampling.plan_sampling(model, machine, dtype=dtype)
  if _JSON.value:
    print(json.dumps(dataclasses.asdict(found), indent=2))
  else:
    print(sampling.text(found, machine, config["stage"]))


def _plan_on_several(config: dict[str, Any], machines: topology.Topology) -> None:
  model, dtype = model_config(config["model"]), config["compute"]["dtype"]
  by_size = {
    name: drawing.by_count(model, grid, machines, dtype)
    for name, grid in drawing.SIZES.items()
  }
  compiled = None
  if _COMPILE.value and (machines.platform == "tpu" or gpus.can_compile()):
    _check_libtpu(config, machines)
    square = (model.base_size, model.base_size)
    own = drawing.by_count(model, square, machines, dtype)[-1]
    split = {GUIDANCE: own.guidance, CONTEXT: own.context}
    compiled = sampling.plan_sampling(model, machines, dtype=dtype, **split)
  if _JSON.value:
    about = {
      "images": {
        name: [dataclasses.asdict(one) for one in drawn]
        for name, drawn in by_size.items()
      },
      "compiled": compiled and dataclasses.asdict(compiled),
    }
    print(json.dumps(about, indent=2))
    return
  print(sampling.drawn_text(by_size, machines))
  if compiled is not None:
    print(f"\n{sampling.text(compiled, machines, config['stage'])}")


if __name__ == "__main__":
  run_with_config(main)
