"""A stage's plan: whether it fits, how long it takes, what it costs."""

import dataclasses
from typing import Any

from pixsigma_jax.chips import UTILIZATION
from pixsigma_jax.models.flops import TRAINING
from pixsigma_jax.plan import calibration, memory, roofline
from pixsigma_jax.plan.calibration import Calibration
from pixsigma_jax.plan.compilation import (
  Compilation,
  compile_lowered,
  lower_train_step,
)
from pixsigma_jax.plan.host import Host, host_input
from pixsigma_jax.plan.memory import DoesNotFitError, Memory
from pixsigma_jax.plan.stage import Stage


@dataclasses.dataclass(frozen=True)
class Plan:
  """The plan of a stage: memory, time and price.

  Attributes:
    compilation: None if nothing was compiled.
    calibration: None if no step has been measured on such devices.
  """

  stage: Stage
  memory: Memory
  time: roofline.Time
  compilation: Compilation | None
  calibration: Calibration | None

  @property
  def fits(self) -> bool:
    """Whether a device's memory is large enough."""
    if self.compilation is not None and self.stage.topology.platform == "tpu":
      return self.compilation.refused is None
    return self.memory.total <= self.stage.topology.chip.usable  # nobody else refuses

  @property
  def static_seconds(self) -> float | None:
    """Seconds of a step by its cycles, without waiting for memory or other devices."""
    if self.compilation is None:
      return None
    return self.compilation.static_seconds(self.stage.topology)

  @property
  def seconds(self) -> float:
    """Seconds of a step by the calibrated roofline, at least `floor`."""
    if self.calibration is None:
      return self.floor
    return max(self.floor, self.calibration.factor * self.time.seconds)

  @property
  def floor(self) -> float:
    """Lower bound of a step's time in seconds.

    The longest of three, each of which is a limit of the machine by itself: the
    roofline; the compiled program's arithmetic; what it receives, over one link. Of
    what devices gather or sum, at least half comes from others.
    """
    floors = [self.time.seconds]
    if self.compilation is not None:
      sent = sum(self.compilation.sent.values())
      floors += [self.static_seconds or 0.0, sent / 2 / self.stage.topology.chip.link]
    return max(floors)

  @property
  def expected_seconds(self) -> float:
    """Seconds of a step to plan with.

    The calibrated model's; until a step has been measured on such devices, those at
    `chips.UTILIZATION` of their peak, and at least `floor`.
    """
    if self.calibration is not None:
      return self.seconds
    topology = self.stage.topology
    peak = topology.count * topology.chip.peak(self.stage.dtype)
    return max(self.floor, self.time.needed / (UTILIZATION * peak))

  @property
  def mfu(self) -> float:
    """Model FLOPs utilization: needed operations over what all devices could do."""
    return self._mfu(self.seconds)

  @property
  def static_mfu(self) -> float | None:
    """Needed operations over what all devices could do in `static_seconds`."""
    return self._mfu(self.static_seconds) if self.static_seconds else None

  def _mfu(self, seconds: float) -> float:
    topology = self.stage.topology
    peak = topology.count * topology.chip.peak(self.stage.dtype)
    return self.time.needed / (seconds * peak)

  @property
  def host(self) -> Host:
    """Input that each host must read."""
    return host_input(self.stage, self.seconds)

  @property
  def images_a_second(self) -> float:
    """Images a second of all devices together."""
    return self.stage.config["batch_size"] / self.seconds

  @property
  def days(self) -> float:
    """Days of the whole stage."""
    return self.stage.config["total_steps"] * self.seconds / 86_400

  @property
  def dollars(self) -> float:
    """Price of the whole stage in dollars, by `seconds`."""
    return self._dollars(self.seconds)

  @property
  def expected_dollars(self) -> float:
    """Price of the whole stage in dollars, by `expected_seconds`."""
    return self._dollars(self.expected_seconds)

  def _dollars(self, seconds: float) -> float:
    topology, steps = self.stage.topology, self.stage.config["total_steps"]
    return steps * seconds / 3600 * topology.chips * topology.price


def make_plan(stage: Stage, *, compiles: bool) -> Plan:
  """Plans a stage, with the compiler's help or by the analytic model alone.

  Raises:
    ValueError: it is to be compiled, and there is no compiler for the machines.
  """
  step, compilation = roofline.step_time(stage), None
  needs = memory.estimate(stage)
  if compiles:
    try:
      lowered = lower_train_step(stage)
      compiled, compilation = compile_lowered(lowered, stage.topology)
    except DoesNotFitError as error:
      compilation = Compilation(refused=str(error))
      if (wanted := memory.wanted(str(error))) is not None:
        temporary = max(wanted - needs.gradients, 0)
        needs = dataclasses.replace(needs, temporary=temporary)
    else:
      needs = memory.of_compiled(stage, compiled)
  measured = calibration.of_kind(stage.topology.kind)
  return Plan(stage, needs, step, compilation, measured)


def as_dict(plan: Plan) -> dict[str, Any]:
  """The plan as a dict: sizes in bytes, times in seconds, operations as a number."""
  stage, compilation = plan.stage, plan.compilation
  topology = stage.topology
  held = dataclasses.asdict(plan.memory)
  return {
    "stage": stage.config["stage"],
    "topology": topology.name,
    "slices": topology.slices,
    "chips": topology.chips,
    "devices": topology.count,
    "device_kind": topology.kind,
    "mesh": dict(stage.sizes),
    "batch_size": stage.config["batch_size"],
    "tokens": stage.tokens,
    "dtype": stage.dtype.name,
    "attention": stage.attention,
    "remat": stage.program.model.compute.remat,
    "accumulation": stage.config["accumulation"],
    "fits": plan.fits,
    "compiled": compilation and dataclasses.asdict(compilation),
    "memory": {
      **held,
      "total": plan.memory.total,
      "available": topology.chip.usable,
    },
    "flops": {
      "forward_by_part": roofline.needed(stage.model),
      "step": plan.time.needed,
      "training_over_forward": TRAINING,
    },
    "roofline": dataclasses.asdict(plan.time),
    "calibration": plan.calibration and dataclasses.asdict(plan.calibration),
    "static_seconds": plan.static_seconds,
    "static_mfu": plan.static_mfu,
    "step_seconds": plan.seconds,
    "mfu": plan.mfu,
    "images_a_second": plan.images_a_second,
    "host": dataclasses.asdict(plan.host),
    "total_steps": stage.config["total_steps"],
    "days": plan.days,
    "dollars_a_chip_hour": topology.price,
    "dollars": plan.dollars,
    "expected_seconds": plan.expected_seconds,
    "expected_dollars": plan.expected_dollars,
  }
