"""The model of a step: what must hold of it whatever the machine."""

import dataclasses
import math

import pytest

from pixsigma_jax.chips import CHIPS
from pixsigma_jax.models.attention import IMPLEMENTATIONS
from pixsigma_jax.models.flops import TRAINING
from pixsigma_jax.plan import roofline
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
  # Drawing a picture needs the two of the forward pass.
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
  topology = dataclasses.replace(
    planned.topology, chip=dataclasses.replace(chip, **twice)
  )
  slow = roofline.step_time(planned)
  fast = roofline.step_time(dataclasses.replace(planned, topology=topology))
  assert fast.seconds == pytest.approx(slow.seconds / 2)


def test_every_implementation_of_attention_has_a_cost():
  assert set(IMPLEMENTATIONS) <= set(roofline.ATTENTIONS)


def test_every_tpu_has_links_slower_than_its_memory():
  for chip in CHIPS.values():
    assert chip.network <= chip.link < chip.bandwidth
    assert chip.usable < chip.memory
