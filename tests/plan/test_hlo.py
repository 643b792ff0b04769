"""What is read out of a compiled program, against programs whose numbers are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pixsigma_jax.plan import hlo, topology

TURNS, SIDE = 7, 256


@pytest.fixture(scope="module")
def mesh(libtpu):
  devices = topology.devices(topology.parse("v5e:2x2"))
  return Mesh(np.array(devices), ("x",))


def compiled(mesh, function, *shapes):
  """The text of a program whose arguments have their first axis sharded."""
  places = [
    jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P("x")))
    for shape in shapes
  ]
  return jax.jit(function).lower(*places).compile().as_text()


def square(x):
  return jnp.tanh(x @ x.T @ x)


def test_a_loop_counts_as_often_as_it_turns(mesh):
  def loop(x, turns):
    return jax.lax.fori_loop(0, turns, lambda _, x: square(x), x)

  few, many = (
    hlo.read(compiled(mesh, lambda x, turns=turns: loop(x, turns), (4 * SIDE, SIDE)))
    for turns in (TURNS, 3 * TURNS)
  )
  # Beside the loop there are a few instructions.
  assert many.cycles == pytest.approx(3 * few.cycles, rel=0.1)
  assert few.sent
  assert many.sent == {kind: 3 * size for kind, size in few.sent.items()}


def test_a_loop_of_a_gpu_counts_as_often_as_it_turns(cuda_plugin):
  devices = topology.devices(topology.parse("h200:4"))

  def gathered(x, rows):  # a layer of `rows` at a time, on all devices
    return jax.lax.scan(lambda x, row: (jnp.tanh(x @ row), None), x, rows)[0]

  mesh = Mesh(np.array(devices), ("x",))
  x, rows = (
    jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, place))
    for shape, place in (
      ((64 * SIDE, SIDE), P("x")),
      ((TURNS, SIDE, SIDE), P(None, "x")),
    )
  )
  static = hlo.read(jax.jit(gathered).lower(x, rows).compile().as_text())
  assert static.sent == {"all-gather": TURNS * SIDE * SIDE * 4}


def test_what_is_gathered_counts_with_its_size(mesh):
  def whole(x):
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P()))

  static = hlo.read(compiled(mesh, whole, (4 * SIDE, SIDE)))
  assert static.sent == {"all-gather": 4 * SIDE * SIDE * 4}
  assert static.kernels == ()


def test_a_gradient_is_summed_once(mesh):
  def gradient(x):
    weight = jnp.ones((SIDE, SIDE))
    return jax.grad(lambda weight: jnp.square(x @ weight).sum())(weight)

  static = hlo.read(compiled(mesh, gradient, (4 * SIDE, SIDE)))
  assert static.sent == {"all-reduce": SIDE * SIDE * 4}


@pytest.mark.parametrize(
  ("shapes", "size"),
  [
    ("(f32[4]{0}, f32[16]{0})", 64),  # an operand and what it becomes
    ("(bf16[8,4]{1,0:T(8,128)}, bf16[8,2]{1,0:T(8,128)}, u32[], u32[])", 64),
    ("((f32[4]{0}, s8[2,3]{1,0}), (f32[16]{0}, s8[8,3]{1,0}))", 64 + 24),
    ("((f32[48,48]{1,0}, f32[16]{0}), (f32[12,48]{1,0}, f32[4]{0}))", 48 * 48 * 4 + 64),
    ("((f32[48]{0}), f32[12]{0})", 4 * 48),
    ("((bf16[8,4]{1,0:T(8,128)(2,1)}), bf16[32,4]{1,0:T(8,128)(2,1)})", 256),
  ],
)
def test_several_collectives_that_start_at_once_count_each(shapes, size):
  text = f"""
ENTRY %main (p: f32[4]) -> f32[4] {{
  %p = f32[4] parameter(0)
  %start = {shapes} all-gather-start(%p), channel_id=1
  ROOT %done = f32[4] all-gather-done(%start)
}}
"""
  assert hlo.read(text).sent == {"all-gather": size}


def test_a_loop_without_a_constant_is_refused():
  text = """
%condition (p: (s32[], s32[])) -> pred[] {
  %p = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body (p: (s32[], s32[])) -> (s32[], s32[]) {
  ROOT %p = (s32[], s32[]) parameter(0)
}

ENTRY %main (a: (s32[], s32[])) -> (s32[], s32[]) {
  %a = (s32[], s32[]) parameter(0)
  ROOT %w = (s32[], s32[]) while(%a), condition=%condition, body=%body
}
"""
  with pytest.raises(ValueError, match="loop of condition has no constant number"):
    hlo.read(text)


def test_one_collective_in_several_fusions_counts_once():
  cycles = 'backend_config={"estimated_cycles":"12"}'
  line = (
    "%g = bf16[64,32]{1,0} all-gather(%x), channel_id=5, dimensions={0}, "
    'frontend_attributes={chain_id="7"}'
  )
  text = f"""
%one (x: bf16[8,32]) -> bf16[64,32] {{
  {line}
}}

%two (x: bf16[8,32]) -> bf16[64,32] {{
  {line}
}}

ENTRY %main (x: bf16[8,32]) -> bf16[64,32] {{
  %a = bf16[64,32] fusion(%x), kind=kCustom, calls=%one
  %k = bf16[64,32] custom-call(%a), custom_call_target="tpu_custom_call"
  ROOT %b = bf16[64,32] fusion(%x), calls=%two, {cycles}
}}
"""
  static = hlo.read(text)
  assert (static.cycles, static.sent) == (12.0, {"all-gather": 64 * 32 * 2.0})
  ((kernel, times),) = static.kernels
  assert kernel.startswith("%k = bf16[64,32] custom-call(%a)")
  assert times == 1


def test_collectives_of_one_channel_count_each():
  attributes = 'channel_id=1, dimensions={0}, frontend_attributes={chain_id="%d"}'
  text = f"""
%one (x: bf16[8,32]) -> bf16[64,32] {{
  ROOT %g = bf16[64,32]{{1,0}} all-gather(%x), {attributes % 3}
}}

%two (x: bf16[8,32]) -> bf16[64,32] {{
  ROOT %g = bf16[64,32]{{1,0}} all-gather(%x), {attributes % 4}
}}

ENTRY %main (x: bf16[8,32]) -> bf16[64,32] {{
  %a = bf16[64,32] fusion(%x), kind=kCustom, calls=%one
  %b = bf16[64,32] fusion(%x), kind=kCustom, calls=%two
  %c = bf16[64,32]{{1,0}} all-gather(%x), channel_id=1, dimensions={{0}}
  ROOT %d = bf16[64,32]{{1,0}} all-gather(%x), channel_id=1, dimensions={{0}}
}}
"""
  assert hlo.read(text).sent == {"all-gather": 4 * 64 * 32 * 2.0}


def test_keys_and_values_that_one_shard_map_gathers_count_each(mesh):
  def gathered(key, value):
    return jax.shard_map(
      lambda *both: tuple(jax.lax.all_gather(x, "x", tiled=True) for x in both),
      mesh=mesh,
      in_specs=(P("x"), P("x")),
      out_specs=P(),
      check_vma=False,
    )(key, value)

  static = hlo.read(compiled(mesh, gathered, (4 * SIDE, SIDE), (8 * SIDE, SIDE)))
  assert static.sent == {"all-gather": (4 + 8) * SIDE * SIDE * 4}


def test_what_follows_a_kernel_counts_though_its_words_go_over_lines():
  text = """
ENTRY %main (x: bf16[8,32]) -> bf16[8,32] {
  %k = bf16[8,32] custom-call(%x), custom_call_target="tpu_custom_call", told={{
"words":"of the kernel"
}}, backend_config={"estimated_cycles":"1000"}
  ROOT %b = bf16[8,32] fusion(%k), backend_config={"estimated_cycles":"12"}
}
"""
  static = hlo.read(text)
  assert static.cycles == 12  # what the compiler says of a kernel it does not know
  assert static.kernels[0][0].endswith('"1000"}')


def test_what_the_compiler_has_no_estimate_of_costs_nothing():
  text = """
ENTRY %main (x: f32[10]) -> f32[10] {
  %s = f32[10] fusion(%x), backend_config={"estimated_cycles":"9223372036854775807"}
  ROOT %b = f32[10] fusion(%s), backend_config={"estimated_cycles":"12"}
}
"""
  assert hlo.read(text).cycles == 12
