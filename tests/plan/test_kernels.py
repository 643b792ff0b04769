"""Cycles of attention's kernels, counted by hand from blocks, heads and turns."""

import json

import jax
import jax.numpy as jnp
import pytest

from pixsigma_jax.chips import CHIPS
from pixsigma_jax.models import splash
from pixsigma_jax.plan import hlo, kernels, topology
from pixsigma_jax.plan.kernels import Call, Step

V5E = "TPU v5 lite"


def of_jax(kernel, queries, keys, values, dtype="bf16", **sizes):
  """How a compiled program calls a kernel of JAX's."""
  told = json.dumps({"xprof_metadata": json.dumps(sizes)})
  sides = [",".join(map(str, x)) for x in (queries, keys, values)]
  shapes = [f"{dtype}[{each}]{{2,1,0}}" for each in sides]
  tables = "s8[1,4,2]{2,1,0}, s8[1,4,2]{2,1,0}"
  return (
    f"%splash_mha_{kernel}_no_residuals.3 = (f32[8]{{0}}) custom-call(%a, %b), "
    'custom_call_target="tpu_custom_call", operand_layout_constraints={'
    f"{tables}, {', '.join(shapes)}}}, frontend_attributes={{kernel_metadata={told}}}"
  )


def of_ours(kernel, blocks, queries, keys, values, dtype="bf16"):
  """The same of one of ours, as XLA names it in a program that is mapped."""
  sides = [",".join(map(str, x)) for x in (queries, keys, values)]
  shapes = [f"{dtype}[{each}]{{2,1,0}}" for each in sides]
  return (
    f"%closed_call_attention_{kernel}_{blocks}.3 = (bf16[8]{{0}}) custom-call(%a), "
    'custom_call_target="tpu_custom_call", operand_layout_constraints={'
    f"{', '.join(shapes)}, f32[2,1,8192]{{2,1,0}}}}"
  )


def test_a_call_says_what_it_computes():
  shapes = (32, 72, 4096), (32, 72, 8192), (32, 72, 8192)
  line = of_ours("forward", "2048_1024", *shapes)
  about = 32, (2, 8), (2048, 1024), 72
  assert kernels.call_of(line) == Call("forward", "bfloat16", *about)
  line = of_ours("backward", "1024_1024", *shapes, dtype="f32")
  about = 32, (4, 8), (1024, 1024), 72
  assert kernels.call_of(line) == Call("backward", "float32", *about)
  # The matrix units have no such products.
  assert kernels.call_of(of_ours("backward", "1024_1024", *shapes, dtype="f16")) is None
  assert kernels.call_of(line.replace("attention_back", "mine_back")) is None


def test_a_call_of_jax_says_what_it_computes():
  arguments = "fwd", (32, 4096, 73), (32, 8192, 73), (32, 8192, 72)
  sizes = {"block_q": 1024, "block_kv": 2048, "block_q_dq": 512, "block_kv_dq": 256}
  line = of_jax(*arguments, **sizes)
  about = 32, (4, 4), (1024, 2048), 72
  assert kernels.call_of(line) == Call("fwd", "bfloat16", *about)
  single = of_jax(*arguments, dtype="f32", **sizes)
  assert kernels.call_of(single) == Call("fwd", "float32", *about)
  line = line.replace("mha_fwd", "mha_dq")
  assert kernels.call_of(line) == Call("dq", "bfloat16", 32, (8, 32), (512, 256), 72)
  assert kernels.call_of(line.replace("mha_dq", "mqa_dq")) is None


@pytest.mark.parametrize(
  ("kind", "dtype", "kernel"),
  [
    (kind, dtype, kernel)
    for kind, dtypes in kernels.STEPS.items()
    for dtype, known in dtypes.items()
    for kernel in known
    if kernel in ("fwd", "forward", "backward")
  ],
)
def test_no_step_is_faster_than_the_matrix_units(kind, dtype, kernel):
  chip = CHIPS[kind]
  call = Call(kernel, dtype, 16, (8, 8), (1024, 1024), 72)
  have = kernels.cycles(call, kind, chip)
  # Of the unit's width a head's 72 take all; in rows of 16 they take 80, of 8 no more.
  unit, rows = chip.matrix_unit, {"bfloat16": 80, "float32": 72}[dtype]
  widths = {"fwd": 2 * unit, "forward": unit + 80, "backward": 2 * unit + 3 * rows}
  peak = 2 * widths[kernel] * 16 * (8 * 1024) ** 2 / chip.flops
  assert have / kernels.CLOCKS[kind] >= peak * (1 - 1e-9)
  # Nor so slow that the table must be another chip's.
  assert have / kernels.CLOCKS[kind] < 2.2 * peak


@pytest.mark.parametrize(
  ("kernel", "dtype", "width"),  # of a step's products, as wide as the unit or in rows
  [
    ("fwd", "bfloat16", 2 * 128),
    ("dq", "bfloat16", 3 * 128),
    ("dkv", "float32", 4 * 128),
    ("forward", "bfloat16", 128 + 80),
    ("forward", "float32", 128 + 80),
    ("backward", "bfloat16", 2 * 128 + 3 * 80),
    ("backward", "float32", 2 * 128 + 3 * 72),
  ],
)
def test_a_step_without_instructions_takes_what_its_products_take(
  kernel, dtype, width, monkeypatch
):
  monkeypatch.setitem(kernels.STEPS[V5E][dtype], kernel, {(1024, 1024): Step(0, 0)})
  call = Call(kernel, dtype, 16, (8, 8), (1024, 1024), 72)
  cycles = 2 * width * 16 * (8 * 1024) ** 2 / 197e12 * 1.5e9
  assert kernels.cycles(call, V5E, CHIPS[V5E]) == pytest.approx(cycles)


def test_blocks_that_were_not_measured_cost_as_their_area():
  chip = CHIPS[V5E]
  square, flat = (
    kernels.cycles(Call("backward", "bfloat16", 16, (4, 4), block, 72), V5E, chip)
    for block in ((1024, 1024), (1024, 896))
  )
  assert flat == pytest.approx(square * 7 / 8, rel=1e-6)


def test_cores_share_heads_only_where_the_kernel_lets_them(monkeypatch):
  steps = {name: {(1024, 1024): Step(10**6, 0)} for name in ("fwd", "dq", "dkv")}
  monkeypatch.setitem(kernels.STEPS, "TPU v4", {"bfloat16": steps})
  have = {
    name: kernels.cycles(
      Call(name, "bfloat16", 16, (2, 3), (1024, 1024), 72), "TPU v4", CHIPS["TPU v4"]
    )
    for name in steps
  }
  assert have == {"fwd": 48e6, "dq": 96e6, "dkv": 96e6}


def test_an_unknown_chip_or_kernel_has_no_figure():
  call = Call("fwd", "bfloat16", 16, (4, 4), (1024, 1024), 72)
  assert kernels.cycles(call, "TPU v3", CHIPS["TPU v3"]) is None
  line = "%mine = f32[8] custom-call(%a), operand_layout_constraints={f32[8]{0}}"
  assert kernels.total([(line, 1.0)], V5E, CHIPS[V5E]) is None
  assert kernels.total([], V5E, CHIPS[V5E]) == {}


def looped(dtype):
  """Attention and its gradient three times over, compiled for a v5e."""
  device = topology.devices(topology.parse("v5e:1x1"))[0]
  place = jax.sharding.SingleDeviceSharding(device)

  def loss(query, key, mask):
    options = {"residual_name": "kept", "device_kind": device.device_kind}
    return splash.attend(query, key, key, mask, **options).astype(jnp.float32).sum()

  def several(query, key, mask):
    def turn(_, query):
      gradient, _ = jax.grad(loss, (0, 1))(query, key, mask)
      return gradient

    return jax.lax.fori_loop(0, 3, turn, query)

  def array(*shape, dtype=dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

  arrays = array(1, 3000, 2, 72), array(1, 2048, 2, 72), array(1, 2048, dtype=bool)
  with jax.default_matmul_precision(None):
    return jax.jit(several).lower(*arrays).compile().as_text()


@pytest.mark.parametrize(("dtype", "rows"), [("bfloat16", 80), ("float32", 72)])
def test_a_compiled_program_counts_steps_heads_and_turns(dtype, rows, libtpu):
  static = hlo.read(looped(dtype))
  have = kernels.total(static.kernels, V5E, CHIPS[V5E])
  assert set(have) == {"forward", "backward"}
  known = kernels.STEPS[V5E][dtype]
  # Three blocks of queries, so one at a time; two of keys.
  forward = known["forward"][1024, 1024]
  assert have["forward"] == 3 * 2 * (6 * forward.each + 3 * forward.row)
  # Its five products take longer than its instructions.
  backward = known["backward"][1024, 1024]
  products = 1024 * 1024 * (2 * 128 + 3 * rows) / (197e12 / 2 / 1.5e9)
  assert backward.each < products
  assert have["backward"] == pytest.approx(3 * 2 * (6 * products + 3 * backward.row))


def test_what_only_some_steps_do_is_told_apart():
  text = """
   0x1   :  { loop }
   0x2 LB: > { %9 = sbr.rel (%p1_p0) target = $region8 } /* Start region 7 */
   0x3   : > { zero }
   0x4   : > { zero } /* End region 7 */
   0x5 PF: > { work } /* Start/End empty region 8 */
   0x6   : > { work }
   0x7   : > { work }
   0x8   : > { work }
"""
  assert kernels.scheduled(text) == Step(6, 2)


def counted(kind, dtype, each):
  return kernels.Counted(
    libtpu="0.0.1",
    kind=kind,
    dtype=dtype,
    kernel="forward",
    queries=2048,
    keys=1024,
    each=each,
    row=3,
  )


def test_counting_again_replaces_all_steps_of_the_device_and_dtype(tmp_path):
  path = tmp_path / "cycles.jsonl"
  before = kernels.read()
  path.write_text(kernels.CYCLES.read_text(encoding="utf-8"), encoding="utf-8")
  kernels.keep([counted(V5E, "float32", 7), counted("TPU v9", "bfloat16", 8)], path)
  now = kernels.steps_of(kernels.read(path))
  assert now[V5E]["float32"] == {"forward": {(2048, 1024): Step(7, 3)}}
  assert now["TPU v9"] == {"bfloat16": {"forward": {(2048, 1024): Step(8, 3)}}}
  others = [step for step in before if (step.kind, step.dtype) != (V5E, "float32")]
  kept = [step for step in kernels.read(path) if step.libtpu != "0.0.1"]
  assert kept == others


def test_a_line_that_is_no_step_is_named(tmp_path):
  path = tmp_path / "cycles.jsonl"
  path.write_text(kernels.CYCLES.read_text(encoding="utf-8").replace("each", "eech", 1))
  with pytest.raises(ValueError, match=r"cycles\.jsonl, line 1 is no counted step: "):
    kernels.read(path)


def test_only_steps_that_are_counted_can_be_of_another_libtpu(monkeypatch):
  monkeypatch.setattr(kernels.metadata, "version", lambda _: "0.0.1")
  kernels.check_libtpu("TPU v3", "bfloat16", refuse=True)
  with pytest.raises(ValueError, match=r"on TPU v4 in float32 are those of libtpu "):
    kernels.check_libtpu("TPU v4", "float32", refuse=True)
