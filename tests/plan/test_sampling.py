"""`plan --sample`: the sampler's own program, compiled for a chip that is elsewhere."""

import dataclasses
import json

import jax
import pytest

from pixsigma_jax import tree
from pixsigma_jax.models.flops import forward_flops
from pixsigma_jax.models.pixart import abstract_params
from pixsigma_jax.plan import gpus, memory, roofline, sampling, topology
from pixsigma_jax.plan.memory import DoesNotFitError
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


def test_a_picture_of_a_miniature_is_planned(plan, libtpu):
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


def test_a_picture_on_a_gpu_needs_its_compiler(plan, monkeypatch):
  monkeypatch.setattr(gpus, "can_compile", lambda: False)
  done = plan("--topology=h200:8")
  assert done.code == 1
  assert 'pip install -e ".[gpu]"' in done.err


def test_a_picture_is_planned_for_a_gpu(plan, cuda_plugin):
  done = plan("--topology=h200:1", "--json")
  assert done.code == 0, done.err
  have = json.loads(done.out)
  assert have["parameters"] < have["total"] < have["parameters"] + 2**28
  assert have["seconds"] is None


def test_a_picture_too_large_for_a_gpu_is_refused(larger, cuda_plugin, monkeypatch):
  monkeypatch.setattr(memory, "in_use", lambda compiled: 80 * 2**30)
  with pytest.raises(DoesNotFitError, match=r"72.00 GiB, .* 80.00 GiB are in use"):
    sampling.plan_sampling(larger, topology.parse("a100:1", 1), dtype="float32")
