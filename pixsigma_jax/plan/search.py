"""Meshes, rematerialisations and parts of a batch, ranked by their modelled step."""

import copy
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from absl import logging

from pixsigma_jax import sharding
from pixsigma_jax.mesh_axes import CONTEXT, DATA, FSDP
from pixsigma_jax.models.layers import REMATS
from pixsigma_jax.plan.plan import Plan, make_plan
from pixsigma_jax.plan.stage import stage_on
from pixsigma_jax.plan.topology import Topology
from pixsigma_jax.train.config import model_config


def candidates(
  config: Mapping[str, Any], topology: Topology
) -> Iterator[Mapping[str, Any]]:
  """The config on every mesh of the topology, with every rematerialisation.

  And with every number of parts in which the batch, the same in all, may come.
  """
  within, width = topology.per_slice, model_config(config["model"]).width
  for fsdp in _divisors(within):
    if not sharding.has_whole_tiles(width, fsdp):
      continue
    for context in _divisors(within // fsdp):
      data = topology.count // (fsdp * context)
      rows = config["batch_size"] // (data * fsdp)
      # How long the host's memory is waited for is not modelled.
      remats = (remat for remat in REMATS if remat != "offload")
      for remat, accumulation in itertools.product(remats, _divisors(max(rows, 1))):
        changed = copy.deepcopy(dict(config))
        changed["mesh"] |= {DATA: data, FSDP: fsdp, CONTEXT: context}
        changed["compute"] |= {"remat": remat}
        changed["accumulation"] = accumulation
        yield changed


def _divisors(number: int) -> list[int]:
  return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def search(
  config: Mapping[str, Any], topology: Topology, *, compiles: bool, count: int
) -> list[Plan]:
  """The best few by the analytic model, the first of them compiled if wished.

  Those that do not fit by the estimate are left out. If the compiler refuses the first,
  the next is tried, among the `count`.

  Raises:
    ValueError: none fits, or the config does not fit any mesh.
  """
  plans, problem, state = [], None, None
  for changed in candidates(config, topology):
    try:
      stage = stage_on(changed, topology, state)
      state = stage.state
      plans.append(make_plan(stage, compiles=False))
    except ValueError as error:
      problem = error  # a batch that has too few rows, a matrix that cannot be split
  if not plans and problem is not None:
    raise problem
  fitting = sorted((plan for plan in plans if plan.fits), key=_rank)[:count]
  if not fitting:
    least = min(plans, key=lambda plan: plan.memory.total)
    remat = least.stage.program.model.compute.remat
    raise ValueError(
      f"No mesh of {topology} fits {config['stage']}: the least, "
      f"{dict(least.stage.sizes)} with remat {remat} and accumulation "
      f"{least.stage.config['accumulation']}, takes "
      f"{least.memory.total / 2**30:.1f} GiB of {topology.chip.usable / 2**30:.2f} by "
      "the estimate. Take a larger topology or a smaller batch."
    )
  if compiles:
    for number, plan in enumerate(fitting):
      logging.info("Compiling number %d of the best %d.", number + 1, len(fitting))
      fitting[number] = make_plan(plan.stage, compiles=True)
      if fitting[number].fits:
        break
  return fitting


def _rank(plan: Plan) -> tuple[float, int, int]:
  # As many images at a time as there is room for.
  return plan.seconds, plan.stage.config["accumulation"], plan.memory.total


def table(plans: list[Plan]) -> str:
  """A line a plan, best first."""
  lines = [
    "data x fsdp x context  remat      accumulation  GiB a device      s a step    MFU"
  ]
  for plan in plans:
    sizes = " x ".join(map(str, plan.stage.sizes.values()))
    how = "compiled" if plan.memory.compiled else "estimate"
    if not plan.fits:
      how = "refused"
    lines.append(
      f"{sizes:<23}{plan.stage.program.model.compute.remat:<11}"
      f"{plan.stage.config['accumulation']:<14}"
      f"{plan.memory.total / 2**30:6.2f} {how:<9}{plan.seconds:10.4f}"
      f"{plan.mfu:7.1%}"
    )
  return "\n".join(lines)
