"""What lies in a device's memory, against arrays that lie there."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Var

from pixsigma_jax import sharding
from pixsigma_jax.models import attention
from pixsigma_jax.models.block import BlockInputs, LayerInputs
from pixsigma_jax.models.pixart import PixArt, segment_name
from pixsigma_jax.plan import memory
from tests.plan.stages import stage

SMALL = {
  "model__variant": "Nano/2",
  "model__kv_compression__layers": (1,),
  "model__caption_width": 64,
  "model__caption_length": 12,
  "model__base_size": 16,
  "batch_size": 8,
  "mesh__data": -1,
  "mesh__fsdp": 2,
  "mesh__context": 2,
}
PAPER = ("stage_1k", "stage_2k", "stage_4k")


def test_a_devices_part_of_the_state_is_what_its_arrays_take():
  planned = stage("stage_1k", "v5e:2x4", **SMALL)
  mesh = sharding.make_mesh(**planned.sizes, devices=jax.devices())
  trees = (planned.state, planned.batch)
  places = (
    planned.state.shardings(mesh),
    sharding.batch_shardings(planned.batch, mesh),
  )
  state, batch = jax.tree.map(
    lambda leaf, place: jax.device_put(
      jax.random.key(0)
      if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
      else jnp.zeros(leaf.shape, leaf.dtype),
      place,
    ),
    trees,
    places,
  )

  def held(arrays):
    first = jax.devices()[0]
    return sum(
      shard.data.nbytes
      for array in jax.tree.leaves(arrays)
      for shard in array.addressable_shards
      if shard.device == first
    )

  have = memory.fixed(planned)
  assert have == {
    "parameters": held(state.params),
    "optimizer": held(state.opt_state),
    "averages": held(state.ema_params),
    "frozen": 0,
    "batch": held(batch),
  }
  assert memory.gradients(planned) == have["parameters"]  # float32, both


def test_parameters_divide_over_fsdp_and_over_nothing_else():
  def parameters(**sizes):
    mesh = {f"mesh__{axis}": size for axis, size in sizes.items()}
    planned = stage("stage_1k", "v5e:8x8", **mesh)
    return memory.fixed(planned)["parameters"]

  whole = parameters(data=64, fsdp=1, context=1)
  assert whole == 4 * 610_968_992  # XL/2 with compressors, docs/network.md
  assert parameters(data=32, fsdp=1, context=2) == whole
  # All but vectors are matrices.
  assert parameters(data=8, fsdp=8, context=1) == pytest.approx(whole / 8, rel=0.01)


def test_averages_that_lie_in_the_hosts_memory_take_none():
  assert memory.fixed(stage("stage_1k", "v5e:8x8"))["averages"] > 0
  kept = stage("stage_1k", "v5e:8x8", ema__offload=True)
  assert memory.fixed(kept)["averages"] == 0


def test_the_model_whose_adapter_is_trained_lies_beside_it():
  config = {"adapter__rank": 4, "init__parent": "somewhere"}
  planned = stage("stage_1k", "v5e:8x8", **config)
  have = memory.fixed(planned)
  assert have["frozen"] == memory.fixed(stage("stage_1k", "v5e:8x8"))["parameters"]
  assert have["parameters"] < have["frozen"] / 10


@pytest.mark.parametrize("name", PAPER)
def test_the_estimate_grows_with_images_and_falls_with_recomputation(name):
  def temporary(**changes):
    return memory.estimate(stage(name, "v5p:2x4x4", **changes)).temporary

  block, attention, none = (
    temporary(compute__remat=remat) for remat in ("block", "attention", "none")
  )
  assert block < attention < none
  assert temporary(batch_size=64 * 3) < temporary(batch_size=64 * 6)
  assert temporary(batch_size=192, accumulation=6) < temporary(batch_size=192)
  assert temporary(compute__attention="xla") > block


def _merged(jaxpr):
  """What a program returns, each once, equal steps of equal operands merged."""
  same, seen = {}, {}
  for step in jaxpr.eqns:
    operands = tuple(_of(same, operand) for operand in step.invars)
    first = seen.setdefault((step.primitive, operands, str(step.params)), step.outvars)
    same |= dict(zip(step.outvars, first, strict=True))
  return {same.get(var, var) for var in jaxpr.outvars if isinstance(var, Var)}


def _of(same, operand):
  return same.get(operand, operand) if isinstance(operand, Var) else str(operand)


# A TPU rounds to bfloat16 what products in float32 take, of which JAX knows nothing.
@pytest.mark.parametrize(
  ("remat", "dtype"),
  [
    ("none", "bfloat16"),
    ("block", "bfloat16"),
    ("attention", "bfloat16"),
    ("attention", "float32"),
  ],
)
@pytest.mark.parametrize("layer", [0, 27])
def test_a_layer_keeps_what_jax_makes_it_return(layer, remat, dtype, monkeypatch):
  kept = {"compute__remat": remat, "compute__dtype": dtype}
  planned = stage("stage_1k", "v5e:1x1", batch_size=2, **kept)
  tpu = types.SimpleNamespace(platform="tpu", device_kind=planned.topology.kind)
  monkeypatch.setattr(attention, "_device", lambda mesh: tpu)
  [compression] = [c for r, c in planned.model.segments() if layer in r]
  compute = dataclasses.replace(planned.program.model.compute, attention="splash")
  module = PixArt(planned.model, compute)
  block, arguments = module._block(compression)
  n, d, t = planned.tokens, planned.model.width, planned.model.caption_length
  x = jax.ShapeDtypeStruct((2, n, d), jnp.float32)
  captions = jax.ShapeDtypeStruct((2, t, d), dtype)

  def residuals(params, x, captions):
    def forward(params, x, captions):
      inputs = BlockInputs(
        modulation=jnp.zeros((2, 6, d)),
        grid=jnp.full((2, 2), 64),
        captions=captions,
        caption_mask=jnp.ones((2, t), bool),
      )
      return block(*arguments, parent=None).apply(params, x, inputs, LayerInputs())[0]

    return jax.vjp(forward, params, x, captions)[1]

  name = segment_name(range(14 * (layer // 14), 14 * (layer // 14) + 14))
  params = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype),
    planned.state.params[name],
  )
  jaxpr = jax.make_jaxpr(residuals)({"params": params}, x, captions).jaxpr
  # Parameters lie in the state, and captions are the same for all layers.
  *of_params, _, of_captions = jaxpr.invars
  returned = sum(
    var.aval.size * var.aval.dtype.itemsize
    for var in _merged(jaxpr) - {*of_params, of_captions}
    if var.aval.shape != (2 * t, d)
  )
  assert memory._kept(planned, compression) == pytest.approx(returned, rel=0.02)


def test_the_total_is_the_sum_of_its_parts():
  have = memory.estimate(stage("stage_4k", "v5e:8x8"))
  parts = dataclasses.asdict(have)
  assert parts.pop("compiled") is False
  assert have.total == sum(parts.values())


# libtpu 0.0.51, and 0.0.42.
@pytest.mark.parametrize("code", ["E1000: CompileTimeHbmOom: ", ""])
def test_the_compilers_message_tells_how_much_it_wanted(code):
  message = (
    f"RESOURCE_EXHAUSTED: {code}Ran out of memory on HBM, the total memory required "
    "for HLO temporaries (29.31G) exceeds available HBM (15.75G)."
  )
  assert memory.is_too_large(message)
  assert memory.wanted(message) == round(29.31 * 2**30)


def test_other_messages_of_the_compiler_are_no_matter_of_a_devices_memory():
  for message in (
    "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom: %splash_mha_dkv",
    "INTERNAL: no HBM of that name",
  ):
    assert not memory.is_too_large(message)
  assert memory.wanted("RESOURCE_EXHAUSTED: Ran out of memory in hbm") is None
