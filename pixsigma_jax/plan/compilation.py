"""The train step as `train` runs it, compiled for machines that are elsewhere."""

import time
from typing import Any

import jax
from absl import logging

from pixsigma_jax import sharding
from pixsigma_jax.plan import topology as topologies
from pixsigma_jax.plan.memory import DoesNotFitError, is_too_large
from pixsigma_jax.plan.stage import SCALING_FACTOR, Stage
from pixsigma_jax.train.program import lower_step, make_program


def compile_step(stage: Stage) -> tuple[Any, float]:
  """The compiled train step, and the seconds that it took.

  Raises:
    ValueError: libtpu is missing, or does not know the topology.
    DoesNotFitError: the compiler has found no way to fit it into a device's memory.
  """
  devices = topologies.devices(stage.topology)
  mesh = sharding.make_mesh_of_slices(
    slices=stage.topology.slices,
    **stage.sizes,
    devices=devices,
    batch_size=stage.config["batch_size"],
    width=stage.model.width,
  )
  program = make_program(stage.config, mesh=mesh, scaling_factor=SCALING_FACTOR)
  places = program.ema.places(sharding.shardings(stage.state, mesh))
  logging.info("Compiling the train step for %s: minutes.", stage.topology)
  began = time.perf_counter()
  try:
    lowered = lower_step(program, stage.state, stage.batch, places, mesh)
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    message = str(error)
    if not is_too_large(message):
      raise
    raise DoesNotFitError(message) from error
  seconds = time.perf_counter() - began
  logging.info("Compiled in %.0f s.", seconds)
  return compiled, seconds
