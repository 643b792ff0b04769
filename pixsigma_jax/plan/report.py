"""A plan in words and columns."""

from collections.abc import Iterator

from pixsigma_jax.chips import UTILIZATION
from pixsigma_jax.mesh_axes import CONTEXT, FSDP
from pixsigma_jax.plan import roofline
from pixsigma_jax.plan.calibration import Calibration
from pixsigma_jax.plan.plan import Plan

_GIB = 2**30
_NAMES = ("parameters", "optimizer", "averages", "frozen", "batch", "gradients")


def text(plan: Plan) -> str:
  """Text of a plan."""
  parts = (_head, _memory, _arithmetic, _time, _cost)
  return "\n".join(line for part in parts for line in part(plan))


def _head(plan: Plan) -> Iterator[str]:
  stage, compute = plan.stage, plan.stage.program.model.compute
  sizes = " x ".join(f"{axis} {size}" for axis, size in stage.sizes.items())
  yield (
    f"{stage.config['stage']} on {stage.topology}: {stage.topology.count} devices "
    f"({stage.topology.kind}), mesh {sizes}, batch {stage.config['batch_size']}, "
    f"{stage.tokens:,} tokens an image, {stage.dtype.name}, attention "
    f"{stage.attention}, remat {compute.remat}"
  )
  yield ""


def _memory(plan: Plan) -> Iterator[str]:
  chip, held = plan.stage.topology.chip, plan.memory
  compiler = "by the compiler" if held.compiled else "estimated, nothing was compiled"
  if plan.compilation and plan.compilation.refused:
    compiler = "the compiler found none that fits; temporary is what it asked for"
  yield f"Memory of a device, GiB ({compiler})"
  for name in _NAMES:
    if size := getattr(held, name):
      yield f"  {name:<24}{size / _GIB:9.3f}"
  yield f"  {'activations, temporary':<24}{held.temporary / _GIB:9.3f}"
  if held.code:
    yield f"  {'program':<24}{held.code / _GIB:9.3f}"
  free = (chip.usable - held.total) / _GIB
  rest = f"{free:.2f} free" if free >= 0 else f"{-free:.2f} too much"
  yield f"  {'total':<24}{held.total / _GIB:9.3f} of {chip.usable / _GIB:.2f}: {rest}"
  yield ""


def does_not_fit(plan: Plan) -> str:
  """Message for a plan that does not fit: excess, largest parts and remedies."""
  chip, held = plan.stage.topology.chip, plan.memory
  parts = {name: getattr(held, name) for name in (*_NAMES, "temporary")}
  largest = sorted(parts, key=lambda name: -parts[name])[:2]
  names = [
    f"{'activations' if name == 'temporary' else name} {parts[name] / _GIB:.1f} GiB"
    for name in largest
  ]
  over = (held.total - chip.usable) / _GIB
  much = f"{over:.1f} GiB too much" if over > 0 else "more than there is"
  return (
    f"Does not fit: a device has {chip.usable / _GIB:.2f} GiB, the step takes {much}. "
    f"Largest: {', '.join(names)}. What would help: {'; '.join(_ways_out(plan))}."
  )


def _ways_out(plan: Plan) -> Iterator[str]:
  stage = plan.stage
  compute, rows = stage.program.model.compute, stage.rows
  if stage.attention == "xla":
    yield "--config.compute.attention=auto, which keeps no scores of all pairs"
  if compute.remat != "block":
    yield "--config.compute.remat=block"
  if rows > 1:
    factor = stage.config["accumulation"] * _parts_that_fit(plan)
    yield f"--config.accumulation={factor} for fewer than {rows} images at a time"
  if stage.sizes[FSDP] < 8 <= stage.topology.per_slice:
    yield "--config.mesh.fsdp=8"
  if rows == 1 and stage.topology.per_slice > stage.sizes[CONTEXT]:
    yield f"--config.mesh.context={2 * stage.sizes[CONTEXT]}"
  yield "a larger topology"
  yield "a smaller batch"


def _parts_that_fit(plan: Plan) -> int:
  """Number of parts into which a device's images must be split to fit."""
  held, rows = plan.memory, plan.stage.rows
  # The sum of earlier parts' gradients comes to what there is.
  taken = held.total - held.temporary + held.gradients
  rest = plan.stage.topology.chip.usable - taken
  divisors = (parts for parts in range(2, rows) if rows % parts == 0)
  return next((parts for parts in divisors if held.temporary / parts <= rest), rows)


def _arithmetic(plan: Plan) -> Iterator[str]:
  parts = roofline.needed(plan.stage.model)
  total = sum(parts.values())
  yield "Arithmetic of an image, forward, TFLOP"
  for name, flops in parts.items():
    yield f"  {name:<32}{flops / 1e12:10.3f}{flops / total:8.1%}"
  yield f"  {'total':<32}{total / 1e12:10.3f}"
  yield f"  {'a step, forward and backward':<32}{plan.time.needed / 1e12:10.0f}"
  yield ""


def _time(plan: Plan) -> Iterator[str]:
  time, compilation = plan.time, plan.compilation
  device, measured = plan.stage.topology.kind, plan.calibration
  yield f"Time of a step by the roofline, s ({_calibrated(device, measured)})"
  for name, part in time.parts.items():
    yield f"  {name:<32}{part.seconds:10.4f}  bound by {part.bound}"
  for name, transfer in time.transfers.items():
    fate = "while others compute" if transfer.overlaps else "waited for"
    yield (
      f"  {name:<32}{transfer.seconds:10.4f}  {transfer.bytes / 1e9:.2f} GB over "
      f"{transfer.axis}, {transfer.network}, {fate}"
    )
  yield f"  {'step':<32}{time.seconds:10.4f}"
  if compilation and compilation.refused is None:
    yield f"By the compiler ({compilation.seconds:.0f} s of compiling):"
    if compilation.cycles:
      yield f"  {'cycles, by its estimate':<32}{compilation.cycles:10.3g}"
      for name, cycles in compilation.kernels.items():
        yield f"  {f'of them attention, {name}':<32}{cycles:10.3g}"
    if plan.static_seconds and plan.static_mfu:
      yield (
        f"  {'which take':<32}{plan.static_seconds:10.4f} s: static MFU "
        f"{plan.static_mfu:.1%}, of at most {time.ceiling:.0%}"
      )
    for kind, size in compilation.sent.items():
      yield f"  {kind:<32}{size / 1e9:10.2f} GB a device, half or more of it received"
  yield ""


def _calibrated(kind: str, measured: Calibration | None) -> str:
  if measured is None:
    return f"not calibrated: no step has been measured on {kind}"
  error = "" if measured.error is None else f", within {measured.error:.0%}"
  return (
    f"{measured.count} measured on {kind} took {measured.factor:.2f} times as "
    f"long{error}"
  )


def _cost(plan: Plan) -> Iterator[str]:
  stage, host = plan.stage, plan.host
  steps, price = stage.config["total_steps"], stage.topology.price
  chip, about = stage.topology.chip, "about" if plan.calibration else "at least"
  yield (
    f"A step takes {about} {plan.seconds:.4g} s: MFU {plan.mfu:.1%}, of at most "
    f"{plan.time.ceiling:.0%} that padding to the matrix unit of {chip.matrix_unit} "
    "leaves"
  )
  yield (
    f"{plan.images_a_second:.4g} images a second; {steps:,} steps take "
    f"{plan.days:.3g} days, ${plan.dollars:,.0f} at ${price:.2f} a chip-hour"
  )
  if plan.calibration is None:
    days = plan.expected_seconds * steps / 86_400
    yield (
      f"To plan with: {days:.3g} days, ${plan.expected_dollars:,.0f}, at "
      f"{UTILIZATION:.0%} of the peak or the bound above, until a step is measured"
    )
  yield (
    f"Each of {host.hosts} hosts reads {host.images_a_second:.3g} images a second: "
    f"{host.bytes_a_second / 1e6:.3g} MB with captions as embeddings, "
    f"{host.bytes_a_second_text / 1e6:.3g} as text"
  )
