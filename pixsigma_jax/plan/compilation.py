"""Programs compiled for machines that are elsewhere, and counts from their text."""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging

from pixsigma_jax import sharding
from pixsigma_jax.plan import hlo, kernels
from pixsigma_jax.plan import topology as topologies
from pixsigma_jax.plan.memory import DoesNotFitError, is_too_large
from pixsigma_jax.plan.stage import SCALING_FACTOR, Stage
from pixsigma_jax.plan.topology import Topology
from pixsigma_jax.train.program import lower_step, make_program


@dataclasses.dataclass(frozen=True)
class Compilation:
  """A compiled program: its memory and static counts.

  Attributes:
    seconds: that it took.
    cycles: of one run on one device: those that it estimates, and its kernels'; None
      where one of these is not known, as of a GPU's.
    kernels: those of Pallas kernels, by name.
    sent: bytes of what collectives leave on a device in a run, by kind.
    refused: its message if the program does not fit into memory; None if it does.
  """

  seconds: float = 0.0
  cycles: float | None = None
  kernels: Mapping[str, float] = dataclasses.field(default_factory=dict)
  sent: Mapping[str, float] = dataclasses.field(default_factory=dict)
  refused: str | None = None

  def static_seconds(self, machines: Topology) -> float | None:
    """Seconds of a run by its cycles, without waiting for memory or other devices."""
    clock = kernels.CLOCKS.get(machines.kind)
    return self.cycles / clock if self.cycles and clock else None


def lower_train_step(stage: Stage) -> Any:
  """The train step as `train` runs it, lowered for the stage's machines.

  Raises:
    ValueError: see `topology.devices`.
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
  places = program.ema.places(stage.state.shardings(mesh))
  return lower_step(program, stage.state, stage.batch, places, mesh)


def compile_lowered(lowered: Any, machines: Topology) -> tuple[Any, Compilation]:
  """Compiles a lowered program and counts what it does.

  Raises:
    DoesNotFitError: the compiler has found no way to fit it into a device's memory.
  """
  logging.info("Compiling for %s: minutes.", machines)
  began = time.perf_counter()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    message = str(error)
    if not is_too_large(message):
      raise
    raise DoesNotFitError(message) from error
  seconds = time.perf_counter() - began
  logging.info("Compiled in %.0f s.", seconds)
  return compiled, _read(compiled, machines, seconds)


def _read(compiled: Any, machines: Topology, seconds: float) -> Compilation:
  try:
    static = hlo.read(compiled.as_text())
  except (jax.errors.JaxRuntimeError, ValueError):
    # libtpu cannot always write what it has compiled.
    return Compilation(seconds)
  taken = kernels.total(static.kernels, machines.kind, machines.chip)
  if taken is None:  # a sum without them says nothing
    return Compilation(seconds, sent=static.sent)
  cycles = static.cycles + sum(taken.values())
  return Compilation(seconds, cycles or None, taken, static.sent)
