"""The model of a step: what must hold of it whatever the machine."""

import dataclasses
import math

import jax
import pytest

from pixsigma_jax.chips import CHIPS
from pixsigma_jax.models import products
from pixsigma_jax.models.attention import IMPLEMENTATIONS
from pixsigma_jax.models.flops import TRAINING
from pixsigma_jax.plan import hlo, roofline, topology
from tests.plan.stages import stage

PAPER = ("stage_256_vae", "stage_512", "stage_1k", "stage_2k", "stage_4k")


def mesh(data, fsdp, context):
  return {"mesh__data": data, "mesh__fsdp": fsdp, "mesh__context": context}


def test_a_matrix_unit_that_is_filled_wastes_nothing():
  assert roofline.padding(128, 1152, 4608, 256) == 1
  assert roofline.padding(128, 72) == 128 / 72
  assert roofline.padding(256, 1152) == 1280 / 1152


# Of attention with heads 72 wide: 128 / 72 of its arithmetic with a unit of 128, and up
# to 256 / 72 with one of 256; a caption's 300 keys are padded as well. By hand, of the
# shares that parts have at each size.
@pytest.mark.parametrize(
  ("name", "unit", "share"),
  [
    ("stage_256_vae", 128, 0.95),
    ("stage_1k", 128, 0.82),
    ("stage_2k", 128, 0.69),
    ("stage_4k", 128, 0.60),
    ("stage_1k", 256, 0.54),
    ("stage_4k", 256, 0.31),
  ],
)
def test_head_width_caps_what_a_tpu_reaches(name, unit, share):
  planned = stage(name, "v5e:8x8")
  assert roofline.ceiling(planned.model, unit) == pytest.approx(share, abs=0.01)


def test_our_kernels_lift_the_ceiling():
  planned = stage("stage_4k", "v5e:8x8")
  bare = roofline.ceiling(planned.model, 128)
  # Of attention's products in a step, two forward and four backward, one and three have
  # the head's width in rows and cost 80 in place of 128.
  lifted = roofline.step_time(planned).ceiling
  attention = roofline.needed(planned.model)["attention"] * 128 / 72
  cross = roofline.needed(planned.model)["cross-attention"] * 128 / 72 * 384 / 300
  total = sum(roofline.needed(planned.model).values())
  saved = (attention + cross) * 4 / 6 * (1 - 80 / 128)
  assert lifted == pytest.approx(total / (total / bare - saved))
  # Drawing an image needs the two of the forward pass.
  drawing = {"our_kernels": True, "training": False}
  saved = (attention + cross) * 1 / 2 * (1 - 80 / 128)
  assert roofline.ceiling(planned.model, 128, **drawing) == pytest.approx(
    total / (total / bare - saved)
  )
  # v4 runs JAX's kernels.
  assert roofline.step_time(stage("stage_4k", "v4:4x4x4")).ceiling == pytest.approx(
    roofline.ceiling(planned.model, 128)
  )


@pytest.mark.parametrize("name", PAPER)
def test_no_step_is_faster_than_its_ceiling(name):
  for machines in ("v5e:8x8", "v6e:8x8", "h200:8"):
    time = roofline.step_time(stage(name, machines))
    planned = stage(name, machines)
    ideal = time.needed / (planned.topology.count * planned.topology.chip.flops)
    assert ideal / time.seconds < time.ceiling <= 1
    forward = sum(roofline.needed(planned.model).values())
    assert time.needed == pytest.approx(
      TRAINING * forward * planned.config["batch_size"]
    )


def test_twice_the_devices_take_half_as_long_for_a_part():
  few = roofline.step_time(stage("stage_1k", "v5e:4x8", **mesh(4, 8, 1)))
  many = roofline.step_time(stage("stage_1k", "v5e:8x8", **mesh(8, 8, 1)))
  split = roofline.step_time(stage("stage_1k", "v5e:8x8", **mesh(4, 8, 2)))
  for name in ("attention", "cross-attention", "norms and residuals"):
    for other in (many, split):
      assert other.parts[name].seconds == pytest.approx(few.parts[name].seconds / 2)
      assert other.parts[name].flops == pytest.approx(few.parts[name].flops / 2)
  # The state divides over fsdp, which is the same.
  name = "optimizer and averages"
  assert many.parts[name] == few.parts[name]


def test_accumulation_changes_the_transfers_and_not_the_arithmetic():
  whole = roofline.step_time(stage("stage_1k", "v5e:4x4"))
  parts = roofline.step_time(stage("stage_1k", "v5e:4x4", accumulation=3))
  assert parts.parts["attention"] == whole.parts["attention"]
  gathered = "gather parameters"
  assert parts.transfers[gathered].bytes == 3 * whole.transfers[gathered].bytes
  assert parts.transfers["sum gradients"] == whole.transfers["sum gradients"]


def test_recomputation_costs_a_forward_pass():
  def flops(remat):
    time = roofline.step_time(stage("stage_1k", "v5e:8x8", compute__remat=remat))
    return {name: part.flops for name, part in time.parts.items()}

  none, block, attention = (flops(remat) for remat in ("none", "block", "attention"))
  products = "matrix products"
  assert block[products] == pytest.approx(4 / 3 * none[products])
  assert attention[products] == block[products]
  assert none["attention"] == attention["attention"] < block["attention"]


def test_devices_exchange_over_an_axis_only_what_it_splits():
  def transfers(*sizes, machines="v5e:2x4", slices=1):
    planned = stage("stage_4k", machines, slices, **mesh(*sizes))
    return roofline.step_time(planned).transfers

  of_axis = {
    (8, 1, 1): {"sum gradients"},
    (1, 8, 1): {"gather parameters", "scatter gradients"},
    (1, 1, 2): {"gather keys and values", "sum gradients"},
    (1, 1, 8): {"gather keys and values", "trade tokens for heads", "sum gradients"},
  }
  for sizes, names in of_axis.items():
    machines = "v5e:1x2" if math.prod(sizes) == 2 else "v5e:2x4"
    assert set(transfers(*sizes, machines=machines)) == names
  assert transfers(1, 1, 1, machines="v5e:1x1") == {}
  over = transfers(2, 8, 1, slices=2)
  assert set(over) == {
    "gather parameters",
    "scatter gradients",
    "sum gradients over slices",
  }
  assert over["sum gradients over slices"].network == "network"


def test_bytes_between_devices_are_those_of_the_shapes():
  planned = stage("stage_4k", "v5e:2x4", **mesh(1, 4, 2))
  transfers = roofline.step_time(planned).transfers
  # Keys and values of 14 full and 14 compressed layers, in bfloat16, of 32 / 4 images,
  # three times; a device has half of them already.
  kv = 2 * 2 * (32 // 4) * 1152 * 14 * (65_536 + 65_536 // 4)
  assert transfers["gather keys and values"].bytes == 3 * kv / 2
  assert transfers["gather parameters"].bytes == 3 * 2 * 610_968_992 * 3 / 4


@pytest.mark.parametrize(
  ("machines", "remat", "sequences"),
  # Queries, keys, values and output, forward, again and backward.
  [("v5e:2x4", "attention", 12), ("v5e:2x4", "block", 12), ("h200:8", "none", 8)],
)
def test_traded_bytes_are_those_of_the_shapes(machines, remat, sequences):
  planned = stage("stage_4k", machines, compute__remat=remat, **mesh(1, 1, 8))
  transfers = roofline.step_time(planned).transfers
  # The 14 layers that compress nothing, of 32 images in bfloat16; a device has an
  # eighth of each and keeps an eighth of that.
  all_of_it = sequences * 14 * 2 * 32 * 1152 * 65_536
  traded = transfers["trade tokens for heads"]
  assert traded.bytes == all_of_it / 8 * 7 / 8
  passed = all_of_it / 4 if machines == "v5e:2x4" else traded.bytes
  assert traded.seconds == passed / planned.topology.chip.link
  passes = 2 if remat == "none" else 3
  kv = passes * 2 * 14 * 2 * 32 * 1152 * 65_536 / 4
  assert transfers["gather keys and values"].bytes == kv * 7 / 8


def test_a_chip_twice_as_large_in_everything_takes_half_the_time():
  planned = stage("stage_1k", "v5e:8x8")
  chip = planned.topology.chip
  numbers = ("flops", "bandwidth", "link", "network")
  twice = {name: 2 * getattr(chip, name) for name in numbers}
  machines = dataclasses.replace(
    planned.topology, chip=dataclasses.replace(chip, **twice)
  )
  slow = roofline.step_time(planned)
  fast = roofline.step_time(dataclasses.replace(planned, topology=machines))
  assert fast.seconds == pytest.approx(slow.seconds / 2)


def test_every_implementation_of_attention_has_a_cost():
  assert set(IMPLEMENTATIONS) <= set(roofline.ATTENTIONS)


def test_every_tpu_has_links_slower_than_its_memory():
  for chip in CHIPS.values():
    assert chip.network <= chip.link < chip.bandwidth
    assert chip.usable < chip.memory


# ------------------------------------------------------------------------------- dtypes


def test_attention_is_what_suits_the_dtype_there():
  def of(name, machines, dtype):
    return stage(name, machines, compute__dtype=dtype).attention

  assert of("stage_1k", "h200:8", "bfloat16") == "cudnn"
  assert of("stage_1k", "h200:8", "float32") == "chunked"  # cuDNN has no such kernel
  assert of("stage_256_vae", "a100:8", "float32") == "xla"  # few scores
  assert of("stage_1k", "v5e:8x8", "float32") == "splash"


def test_an_implementation_that_knows_no_float32_is_refused_before_it_is_planned():
  with pytest.raises(ValueError, match=r"'cudnn' computes in .* not in float32"):
    stage("stage_1k", "h200:8", compute__dtype="float32", compute__attention="cudnn")


def in_both(name, machines, **changes):
  dtypes = ("bfloat16", "float32")
  return [stage(name, machines, compute__dtype=dtype, **changes) for dtype in dtypes]


def test_float32_sends_twice_the_bytes_but_of_gradients():
  half, whole = (
    roofline.step_time(planned).transfers
    for planned in in_both("stage_4k", "v5e:2x4", **mesh(1, 1, 8))
  )
  for name in ("gather keys and values", "trade tokens for heads"):
    assert whole[name].bytes == 2 * half[name].bytes
    assert whole[name].seconds == 2 * half[name].seconds
  assert whole["sum gradients"] == half["sum gradients"]  # float32 in any case
  half, whole = (
    roofline.step_time(planned).transfers
    for planned in in_both("stage_4k", "v5e:2x4", **mesh(1, 8, 1))
  )
  assert whole["gather parameters"].bytes == 2 * half["gather parameters"].bytes
  assert whole["gather parameters"].bytes == 3 * 4 * 610_968_992 * 7 / 8
  assert whole["scatter gradients"] == half["scatter gradients"]


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float32", 4)])
def test_bytes_in_memory_are_those_of_the_dtype(dtype, size):
  planned = stage("stage_1k", "v5e:8x8", compute__dtype=dtype)
  parts = roofline.step_time(planned).parts
  assert planned.rows == 3
  tokens, blocks = 3 * planned.length * 1152, 4 * 28  # forward twice, backward twice
  # Eight products take and give 17 widths of their own and 3 of the stream; twelve of
  # a block's matrices are in 16 squares of the width.
  moved = tokens * (17 * size + 3 * 4) + 16 * 1152**2 * size
  assert parts["matrix products"].bytes == blocks * moved
  # Three norms, three sums.
  moved = tokens * (3 * (4 + size) + 3 * 3 * 4)
  assert parts["norms and residuals"].bytes == blocks * moved
  # Queries, keys, values and output, forward and twice backward; no scores.
  assert parts["attention"].bytes == 4 * size * tokens * 28 * 3
  state = "optimizer and averages"
  assert parts[state] == roofline.step_time(stage("stage_1k", "v5e:8x8")).parts[state]


def test_scores_in_memory_are_partly_of_the_dtype():
  def touched(dtype):
    changes = {"compute__dtype": dtype, "compute__attention": "chunked"}
    planned = stage("stage_1k", "h200:8", **changes)
    part = roofline.step_time(planned).parts["cross-attention"]
    tokens, size = planned.rows * planned.length, {"bfloat16": 2, "float32": 4}[dtype]
    operands = 4 * size * tokens * 1152 * 28 * 3
    return (part.bytes - operands) / (tokens * 300 * 28 * 16)

  # Three times in float32 and twice as products take them; backward eight and five.
  assert touched("bfloat16") == pytest.approx(11 * 4 + 7 * 2)
  assert touched("float32") == pytest.approx(11 * 4 + 7 * 4)


@pytest.mark.parametrize(
  ("machines", "share"),
  # A GPU rounds float32 to TF32, at half the rate, a TPU to bfloat16.
  [("h200:8", 1 / 2), ("a100:8", 1 / 2), ("v5e:8x8", 1), ("v5p:2x4x4", 1)],
)
def test_float32_multiplies_at_the_rate_of_what_it_is_rounded_to(machines, share):
  half, whole = in_both("stage_1k", machines, compute__attention="chunked")
  chip = whole.topology.chip
  assert chip.peak(whole.dtype) == share * chip.peak(half.dtype) == share * chip.flops
  name = "matrix products"
  fast, slow = (roofline.step_time(planned).parts[name] for planned in (half, whole))
  assert slow.flops == fast.flops
  assert fast.bound == slow.bound == "compute"
  assert slow.seconds == pytest.approx(fast.seconds / share)


def test_the_ceiling_of_our_kernels_knows_that_float32_fills_rows_by_eight():
  half, whole = in_both("stage_4k", "v5e:8x8")
  bare = roofline.ceiling(whole.model, 128)
  parts = roofline.needed(whole.model)
  multiplied = parts["attention"] * 128 / 72
  multiplied += parts["cross-attention"] * 128 / 72 * 384 / 300
  total = sum(parts.values())
  # Of six products one is 80 wide, beside which values have ones, and three are 72.
  saved = multiplied * ((1 - 80 / 128) + 3 * (1 - 72 / 128)) / 6
  lifted = roofline.step_time(whole).ceiling
  assert lifted == pytest.approx(total / (total / bare - saved))
  assert roofline.step_time(half).ceiling < lifted


def test_a_compiled_product_in_float32_takes_the_cycles_of_one_in_bfloat16(libtpu):
  machines = topology.parse("v5e:1x1")
  place = jax.sharding.SingleDeviceSharding(topology.devices(machines)[0])

  def cycles(dtype):
    side = jax.ShapeDtypeStruct((2048, 2048), dtype, sharding=place)
    with jax.default_matmul_precision(None):  # as it is outside the suite
      compiled = jax.jit(products.matmul).lower(side, side).compile()
    return hlo.read(compiled.as_text()).cycles

  peak = machines.chip.peak("bfloat16") / machines.chip.peak("float32")
  assert cycles("float32") / cycles("bfloat16") == pytest.approx(peak, rel=0.1)
