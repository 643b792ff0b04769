"""Memory and time of drawing an image, by the compiler of the chips that draw it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pixsigma_jax import sharding
from pixsigma_jax.diffusion.solvers import SAMPLERS
from pixsigma_jax.mesh_axes import CONTEXT, GUIDANCE
from pixsigma_jax.models import splash
from pixsigma_jax.models.layers import Compute
from pixsigma_jax.models.pixart import PixArtConfig, abstract_params, inference_params
from pixsigma_jax.plan import memory, roofline
from pixsigma_jax.plan import topology as topologies
from pixsigma_jax.plan.compilation import compile_lowered
from pixsigma_jax.plan.drawing import STEPS, Drawn
from pixsigma_jax.plan.memory import DoesNotFitError
from pixsigma_jax.plan.topology import Topology
from pixsigma_jax.sample import devices, program
from pixsigma_jax.sample.settings import Settings

_DEFAULTS = Settings()
_SAMPLER = _DEFAULTS.sampler
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Plan of one square image, guided, from noise to latents.

  Attributes:
    mesh: sizes of its axes, of devices that draw together.
    tokens: of the image, at the resolution that the model is trained at.
    passes: in which the halves of guidance are taken.
    parameters: bytes, as `Pipeline` holds them: matrices in the dtype of products.
    total: bytes in use at once at most on a device, parameters among them.
    available: bytes that a program may have there.
    sent: bytes that collectives leave on a device, by kind.
    flops: that the network needs.
    seconds: by the cycles of the compiled program; None where some are not known.
    mfu: `flops` over what the devices could do meanwhile, or None.
    ceiling: the share of its peak that padding to the matrix unit leaves.
    compiled_in: seconds.
  """

  mesh: Mapping[str, int]
  tokens: int
  passes: int
  parameters: int
  total: int
  available: int
  sent: Mapping[str, float]
  flops: float
  seconds: float | None
  mfu: float | None
  ceiling: float
  compiled_in: float


def plan_sampling(
  model: PixArtConfig,
  machines: Topology,
  *,
  dtype: str,
  passes: int | None = None,
  guidance: int = 1,
  context: int = 1,
) -> Sampling:
  """Compiles the sampler's program for the first devices of `machines`.

  Args:
    dtype: of matrix products.
    passes: see `Sampling`; None as `Pipeline` chooses.
    guidance, context: sizes of the mesh's axes.

  Raises:
    ValueError: see `topology.devices`.
    DoesNotFitError: it does not fit into the device's memory.
  """
  count = guidance * context
  mesh = sharding.make_mesh(
    data=1,
    fsdp=1,
    context=context,
    guidance=guidance,
    devices=topologies.devices(machines)[:count],
  )
  tokens = devices.padded_length(model, (model.base_size, model.base_size), mesh.shape)
  passes = passes or program.passes_by_size(1, tokens, mesh)
  params = _params(model, dtype)
  lowered = _lower(model, params, mesh, dtype, passes, tokens)
  chip = machines.chip
  try:
    compiled, compilation = compile_lowered(lowered, machines)
    total = memory.in_use(compiled)
    if machines.platform == "gpu" and total > chip.usable:
      raise DoesNotFitError(f"{total / _GIB:.2f} GiB are in use at once")
  except DoesNotFitError as error:
    raise DoesNotFitError(
      f"Does not fit: a device has {chip.usable / _GIB:.2f} GiB, and an image of "
      f"{model.base_size} x {model.base_size} tokens takes more, with guidance in "
      f"{passes} pass(es): {error}"
    ) from error
  # Two passes a step: with the prompt, and without.
  flops = 2 * STEPS * sum(roofline.needed(model).values())
  seconds = compilation.static_seconds(machines)
  return Sampling(
    mesh=dict(mesh.shape),
    tokens=model.base_size**2,
    passes=passes,
    parameters=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)),
    total=total,
    available=chip.usable,
    sent=compilation.sent,
    flops=flops,
    seconds=seconds,
    mfu=seconds and flops / seconds / (count * chip.peak(dtype)),
    ceiling=roofline.ceiling(
      *(model, chip.matrix_unit),
      our_kernels=splash.has_room(
        model.base_size**2, model.width // model.num_heads, machines.kind
      ),
      training=False,
      itemsize=jnp.dtype(dtype).itemsize,
    ),
    compiled_in=compilation.seconds,
  )


def _params(model: PixArtConfig, dtype: str) -> Any:
  """Shapes and dtypes as `Pipeline.from_checkpoint` holds them on an accelerator."""
  compute = Compute(dtype=jnp.dtype(dtype))
  return jax.eval_shape(
    lambda params: inference_params(params, compute), abstract_params(model)
  )


def _lower(
  model: PixArtConfig, params: Any, mesh: Mesh, dtype: str, passes: int, n: int
) -> Any:
  def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)

  t, e = model.caption_length, model.caption_width
  batch = {
    "noise": array(1, n, model.patch_size**2 * model.in_channels),
    "seed": array(1, dtype=jnp.uint32),
    "coordinates": array(1, n, 2, dtype=jnp.int32),
    "grid": array(1, 2, dtype=jnp.int32),
    "image_size": array(1, 2),
    "aspect_ratio": array(1),
  }
  for half in ("caption", "negative"):
    batch[f"{half}_embeddings"] = array(1, t, e)
    batch[f"{half}_mask"] = array(1, t, dtype=jnp.bool_)
  everywhere = jax.tree.map(lambda _: NamedSharding(mesh, P()), params)
  return program.sample.lower(
    sharding.placed(params, everywhere),
    sharding.placed(batch, sharding.batch_shardings(batch, mesh)),
    SAMPLERS[_SAMPLER](program.SCHEDULE, STEPS),
    program.Guidance(*map(jnp.float32, (_DEFAULTS.guidance_scale, 0.0, 1.0, 0.0))),
    config=model,
    compute=Compute(dtype=jnp.dtype(dtype), attention="auto", mesh=mesh),
    passes=passes,
  )


def text(sampling: Sampling, machines: Topology, name: str) -> str:
  """Text of the plan.

  Args:
    name: of the stage.
  """
  free = (sampling.available - sampling.total) / _GIB
  passes = ("one batch", "two passes")[sampling.passes - 1]
  axes = sampling.mesh
  count = axes[GUIDANCE] * axes[CONTEXT]
  drawn_on = f"one {machines.kind}"
  if count > 1:
    if axes[GUIDANCE] > 1:
      passes = "groups of devices"
    drawn_on = (
      f"{count} {machines.kind}, guidance {axes[GUIDANCE]} x context {axes[CONTEXT]}"
    )
  lines = [
    f"An image by {name} on {drawn_on}: {sampling.tokens:,} tokens, {STEPS} "
    f"steps of {_SAMPLER}, guidance in {passes}",
    "",
    "Memory of a device, GiB (by the compiler, at most at once)",
    f"  {'parameters':<24}{sampling.parameters / _GIB:9.3f}",
    f"  {'everything else':<24}{(sampling.total - sampling.parameters) / _GIB:9.3f}",
    f"  {'total':<24}{sampling.total / _GIB:9.3f} of "
    f"{sampling.available / _GIB:.2f}: {free:.2f} free",
    "",
    f"Arithmetic: {sampling.flops / 1e12:,.1f} TFLOP",
  ]
  if count > 1:
    sent = sum(sampling.sent.values()) / 1e9
    lines += [f"Gathered, traded or joined: {sent:.3g} GB a device"]
  if sampling.seconds is None:
    lines += ["Time: not known, some kernels' cycles are in no table"]
  else:
    lines += [
      f"Time by cycles: {sampling.seconds:.3g} s, static MFU {sampling.mfu:.1%} of "
      f"{sampling.ceiling:.0%} that padding to the matrix unit leaves"
    ]
  lines += ["Text encoder and autoencoder are not in it (docs/autoencoder.md)."]
  return "\n".join(lines)


def drawn_text(by_size: Mapping[str, Sequence[Drawn]], machines: Topology) -> str:
  """Table of images by the number of devices that draw them together."""
  lines = [
    f"An image on devices of {machines} ({machines.kind}) by the roofline, a lower "
    f"bound: {STEPS} steps of {_SAMPLER}, guided",
    "",
    f"{'image':<8}{'devices':>8}{'guidance x context':>20}{'seconds':>10}"
    f"{'exchange':>10}{'faster':>8}{'GB sent':>9}",
  ]
  for name, drawn in by_size.items():
    for one in drawn:
      split = f"{one.guidance} x {one.context}"
      lines.append(
        f"{name:<8}{one.count:>8}{split:>20}{one.seconds:>10.3g}"
        f"{one.exchange:>10.3g}{drawn[0].seconds / one.seconds:>8.2f}"
        f"{one.sent / 1e9:>9.3g}"
      )
  lines += [
    "",
    "Exchange is the part of the seconds in which keys, values, heads or predictions "
    "arrive. Latency is not in it, nor are text encoder and autoencoder.",
  ]
  return "\n".join(lines)
