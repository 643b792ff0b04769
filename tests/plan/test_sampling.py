"""`plan --sample`: the sampler's own program, compiled for a chip that is elsewhere."""

import dataclasses
import json

import jax
import pytest

from pixsigma_jax import tree
from pixsigma_jax.models.flops import forward_flops
from pixsigma_jax.models.kv_compression import KVCompression
from pixsigma_jax.models.pixart import abstract_params
from pixsigma_jax.plan import drawing, gpus, memory, roofline, sampling, topology
from pixsigma_jax.plan.memory import DoesNotFitError
from pixsigma_jax.sample import devices
from pixsigma_jax.train.config import model_config
from tests import commands
from tests.plan.stages import config_of

SMALL = (
  "--config=configs/quickstart/low.py",
  "--config.model.variant=Nano/2",
  "--any_libtpu",  # what is installed is none of these tests' matter
)
CHIP = "--topology=v5e:1x1"


@pytest.fixture
def plan(capsys, monkeypatch):
  return lambda *arguments: commands.run(
    capsys, monkeypatch, "plan", *SMALL, "--sample", *arguments
  )


@pytest.fixture(scope="module")
def larger():
  """Small, and large enough that a second half of guidance shows."""
  model = model_config(config_of("quickstart.low")["model"])
  return dataclasses.replace(model, base_size=64)


def test_an_image_of_a_miniature_is_planned(plan, libtpu):
  done = plan(CHIP, "--json")
  assert done.code == 0, done.err
  have = json.loads(done.out)
  assert have["tokens"] == 16
  assert have["passes"] == 1
  assert have["available"] == int(15.75 * 2**30)
  assert have["parameters"] < have["total"] < have["parameters"] + 2**26
  assert 0 < have["mfu"] < have["ceiling"] < 1


def test_two_passes_do_the_same_arithmetic_in_less_memory(larger, libtpu):
  chip = topology.parse("v5e:1x1", 1)
  one, two = (
    sampling.plan_sampling(larger, chip, dtype="float32", passes=passes)
    for passes in (1, 2)
  )
  assert one.parameters == two.parameters == 4 * tree.size(abstract_params(larger))
  forward = sum(forward_flops(larger, (64, 64), larger.caption_length).values())
  assert one.flops == two.flops == 20 * 2 * forward
  ours = {"our_kernels": True, "training": False, "itemsize": 4}
  assert one.ceiling == two.ceiling == roofline.ceiling(larger, 128, **ours)
  assert one.mfu == pytest.approx(one.flops / one.seconds / 197e12)
  rest = [found.total - found.parameters for found in (one, two)]
  assert rest[1] < 0.7 * rest[0]


def test_what_does_not_fit_says_so(larger, libtpu, monkeypatch):
  class Refused:
    def compile(self):
      raise jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM"
      )

  monkeypatch.setattr(sampling, "_lower", lambda *_: Refused())
  with pytest.raises(DoesNotFitError, match=r"15.75 GiB, .* 64 x 64 tokens .* 2 pass"):
    sampling.plan_sampling(
      larger, topology.parse("v5e:1x1", 1), dtype="bfloat16", passes=2
    )


@pytest.mark.parametrize("flag", ["--nocompile", "--search=3"])
def test_only_a_compiler_knows(plan, flag):
  done = plan(CHIP, flag)
  assert done.code == 1
  assert "--sample" in done.err
  assert flag.partition("=")[0] in done.err


def test_an_image_on_a_gpu_needs_its_compiler(plan, monkeypatch):
  monkeypatch.setattr(gpus, "can_compile", lambda: False)
  done = plan("--topology=h200:1")
  assert done.code == 1
  assert 'pip install -e ".[gpu]"' in done.err


def test_several_devices_have_a_row_for_each_number_and_size(plan, monkeypatch):
  monkeypatch.setattr(gpus, "can_compile", lambda: False)
  done = plan("--topology=h200:8")
  assert done.code == 0, done.err
  rows = [line.split() for line in done.out.splitlines()[3:19]]
  assert [row[0] for row in rows[::4]] == ["1K", "2K", "UHD", "4096²"]
  assert [int(row[1]) for row in rows] == [1, 2, 4, 8] * 4
  told = json.loads(plan("--topology=h200:8", "--json").out)
  assert told["compiled"] is None
  assert [one["context"] for one in told["images"]["2K"]] == [1, 1, 2, 4]


def full_size(name):
  return model_config(config_of(name)["model"])


@pytest.mark.parametrize("machines", ["v5e:2x4", "v6e:2x4", "h100:8", "h200:8"])
@pytest.mark.parametrize(
  ("stage", "image"),
  [("stage_1k", "1K"), ("stage_2k", "2K"), ("stage_4k", "UHD"), ("stage_4k", "4096²")],
)
def test_auto_takes_the_best_split(machines, stage, image):
  model, grid = full_size(stage), drawing.SIZES[image]
  found = drawing.by_count(model, grid, topology.parse(machines), "bfloat16")
  for one in found:
    assert devices.best_sizes(
      one.count, batch_size=1, tokens=grid[0] * grid[1], branches=2
    ) == {"data": 1, "guidance": one.guidance, "context": one.context}
  seconds = [one.seconds for one in found]
  assert seconds == sorted(seconds, reverse=True)
  # As many devices are as many times faster, but for what they exchange.
  for one in found:
    computing = one.seconds - one.exchange
    assert 0.9 * seconds[0] < one.count * computing < 1.25 * seconds[0]


def test_halves_of_guidance_exchange_their_predictions_alone():
  model, machines = full_size("stage_2k"), topology.parse("v5e:2x4")
  one = drawing.drawn(model, (128, 128), machines, "bfloat16", 2, 1)
  # Both halves of four latents' channels in float32, of 128 x 128 patches of 2 x 2.
  assert one.sent == 20 * 2 * 256 * 256 * 4 * 4
  assert one.exchange == pytest.approx(one.sent / 2 / 45e9)


def test_compression_gathers_a_quarter():
  model, machines = full_size("stage_2k"), topology.parse("v5e:2x4")
  n, each = 128 * 128, 2 * 1152  # bytes of a token's keys, or its values
  one = drawing.drawn(model, (128, 128), machines, "bfloat16", 1, 2)
  assert one.sent == 20 * 2 * 2 * each * (14 * n + 14 * n // 4)  # two passes
  four = drawing.drawn(model, (128, 128), machines, "bfloat16", 1, 4)
  traded = 4 * n // 4  # queries, keys, values, and what comes back
  assert four.sent == 20 * 2 * each * (14 * traded + 14 * 2 * n // 4)


# Gathers and joins; trades heads, gathers compressed keys and joins.
@pytest.mark.parametrize(("guidance", "context"), [(2, 2), (2, 4)])
def test_what_is_sent_is_what_a_compiler_sends(larger, libtpu, guidance, context):
  compression = KVCompression(ratio=4, layers=(1,))
  model = dataclasses.replace(larger, base_size=32, depth=2, kv_compression=compression)
  machines = topology.parse("v5e:2x4")
  split = {"guidance": guidance, "context": context}
  with jax.default_matmul_precision(None):  # as it is outside the suite
    found = sampling.plan_sampling(model, machines, dtype="bfloat16", **split)
  by_model = drawing.drawn(model, (32, 32), machines, "bfloat16", **split)
  assert found.mesh == {"data": 1, "fsdp": 1} | split
  # A step's sums of a few numbers are not counted.
  assert sum(found.sent.values()) == pytest.approx(by_model.sent, rel=1e-3)


def test_an_image_is_planned_for_a_gpu(plan, cuda_plugin):
  done = plan("--topology=h200:1", "--json")
  assert done.code == 0, done.err
  have = json.loads(done.out)
  assert have["parameters"] < have["total"] < have["parameters"] + 2**28
  assert have["seconds"] is None


def test_an_image_too_large_for_a_gpu_is_refused(larger, cuda_plugin, monkeypatch):
  monkeypatch.setattr(memory, "in_use", lambda compiled: 80 * 2**30)
  with pytest.raises(DoesNotFitError, match=r"72.00 GiB, .* 80.00 GiB are in use"):
    sampling.plan_sampling(larger, topology.parse("a100:1", 1), dtype="float32")
