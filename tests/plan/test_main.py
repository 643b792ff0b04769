"""The command: a stage planned from a config file to exit code, and its mistakes."""

import json
import re

import pytest

from pixsigma_jax.plan import gpus, kernels, memory, report, topology
from pixsigma_jax.plan import plan as plans
from pixsigma_jax.plan.compilation import Compilation
from pixsigma_jax.plan.stage import stage_on
from tests import commands
from tests.plan.stages import config_of, stage

SMALL = (
  "--config=configs/quickstart/low.py",
  "--config.model.variant=Nano/2",
  "--config.batch_size=8",
  "--any_libtpu",  # what is installed is none of these tests' matter
)
KEYS = {
  *("stage", "topology", "slices", "chips", "devices", "device_kind", "mesh"),
  *("batch_size", "tokens", "dtype", "attention", "remat", "accumulation", "fits"),
  *("compiled", "memory"),
  *(
    "flops",
    "roofline",
    "calibration",
    "static_seconds",
    "static_mfu",
    "step_seconds",
    "mfu",
  ),
  *("images_a_second", "host", "total_steps", "days", "dollars_a_chip_hour", "dollars"),
  *("expected_seconds", "expected_dollars"),
}


@pytest.fixture
def plan(capsys, monkeypatch):
  return lambda *arguments: commands.run(capsys, monkeypatch, "plan", *arguments)


@pytest.fixture(scope="module")
def refused():
  """What libtpu 0.0.51 says of a step that is too large."""
  return (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total "
    "memory required for HLO temporaries (29.31G) exceeds available HBM (15.75G)."
  )


def test_a_miniature_is_compiled_and_planned_for_four_chips(plan, libtpu):
  done = plan(*SMALL, "--topology=v5e:2x2", "--json", "--config.compute.attention=auto")
  assert done.code == 0, done.err
  have = json.loads(done.out)
  assert set(have) == KEYS
  assert (have["devices"], have["device_kind"]) == (4, "TPU v5 lite")
  assert have["mesh"] == {"data": 4, "fsdp": 1, "context": 1}
  assert have["fits"] is True
  held = have["memory"]
  assert held.pop("compiled") is True
  assert held.pop("available") == int(15.75 * 2**30)
  assert held.pop("total") == sum(held.values())
  # What the compiler needs for a batch of two images beside them: some megabytes.
  assert 2**18 < held["temporary"] < 2**26
  # Every gradient is summed over the four chips, with a few numbers for the metrics.
  sent = sum(have["compiled"]["sent"].values())
  assert held["gradients"] <= sent < 1.2 * held["gradients"]
  assert have["step_seconds"] >= max(
    have["roofline"]["seconds"], have["static_seconds"], sent / 2 / 45e9
  )
  # Attention's kernels, forward and backward, among the cycles.
  kernels = have["compiled"]["kernels"]
  assert set(kernels) == {"forward", "backward"}
  assert 0 < sum(kernels.values()) < have["compiled"]["cycles"]
  seconds = have["compiled"]["cycles"] / 1.5e9
  assert have["static_seconds"] == pytest.approx(seconds)
  needed = have["flops"]["step"] / (4 * 197e12)
  assert have["static_mfu"] == pytest.approx(needed / seconds)
  steps = have["total_steps"] * have["step_seconds"]
  assert have["days"] == pytest.approx(steps / 86_400)
  assert have["dollars"] == pytest.approx(steps / 3600 * 4 * 1.2)


@pytest.mark.parametrize(
  ("dtype", "peak"), [("bfloat16", 989e12), ("float32", 494.5e12)]
)
def test_a_plan_says_its_dtype_and_takes_mfu_of_what_machines_do_in_it(dtype, peak):
  planned = stage("stage_1k", "h200:8", compute__dtype=dtype)
  plan = plans.make_plan(planned, compiles=False)
  have = plans.as_dict(plan)
  assert have["dtype"] == dtype
  assert f" tokens an image, {dtype}, attention " in report.text(plan)
  seconds = have["flops"]["step"] / (8 * peak)
  assert have["mfu"] == pytest.approx(seconds / have["step_seconds"])


def test_cycles_of_another_libtpu_are_refused_unless_asked_for(
  plan, monkeypatch, caplog
):
  version = kernels.metadata.version
  monkeypatch.setattr(
    kernels.metadata,
    "version",
    lambda name: "0.0.1" if name == "libtpu" else version(name),
  )
  monkeypatch.setattr(plans, "lower_train_step", lambda stage: compiled.append(stage))
  monkeypatch.setattr(
    plans, "compile_lowered", lambda *_: (None, Compilation(refused="too large"))
  )
  monkeypatch.setattr(memory, "of_compiled", lambda stage, _: memory.estimate(stage))
  compiled, asked = [], [*SMALL, "--topology=v5e:2x2"]
  asked.remove("--any_libtpu")
  done = plan(*asked)
  assert (done.code, compiled) == (1, [])
  assert re.search(
    r"those of libtpu [\d.]+, and 0\.0\.1 is installed, .* give --any_libtpu", done.err
  )
  plan(*asked, "--any_libtpu")
  assert len(compiled) == 1
  assert "and 0.0.1 is installed" in caplog.text
  assert plan(*asked, "--nocompile").code == 0


def test_without_compiling_it_says_so(plan):
  done = plan(*SMALL, "--topology=v5e:2x2", "--nocompile")
  assert done.code == 0
  assert "(estimated, nothing was compiled)" in done.out
  assert "not calibrated: no step has been measured on TPU v5 lite" in done.out
  for line in ("Memory of a device", "Arithmetic of an image", "Time of a step", "MFU"):
    assert line in done.out


def test_a_miniature_is_compiled_for_gpus(plan, cuda_plugin):
  done = plan(
    *(*SMALL, "--topology=h200:4", "--json", "--config.compute.attention=auto"),
    "--config.compute.dtype=bfloat16",
  )
  assert done.code == 0, done.err
  have = json.loads(done.out)
  assert (have["devices"], have["attention"]) == (4, "cudnn")
  held = have["memory"]
  assert held["compiled"] is True
  assert 2**18 < held["temporary"] < 2**26
  sent = sum(have["compiled"]["sent"].values())
  assert held["gradients"] <= sent < 1.5 * held["gradients"]
  assert have["static_mfu"] is None  # no cycles of a GPU's


def test_what_is_compiled_for_gpus_and_too_large_does_not_fit(plan, cuda_plugin):
  done = plan(
    *("--config=configs/quickstart/low.py", "--topology=a100:1", "--json"),
    *("--config.batch_size=16384", "--config.model.variant=Mini/2"),
    "--config.model.base_size=32",
  )
  assert done.code == 1
  have = json.loads(done.out)
  assert have["memory"]["compiled"] is True
  assert have["memory"]["total"] > have["memory"]["available"]
  assert "Does not fit: a device has 72.00 GiB" in done.err


def test_gpus_have_the_analytic_model_and_are_told_what_it_is(
  plan, caplog, monkeypatch
):
  monkeypatch.setattr(gpus, "can_compile", lambda: False)
  boxes = ("--topology=h200:8", "--slices=2", "--config.batch_size=16")
  done = plan(*SMALL, *boxes, "--price=10")
  assert done.code == 0, done.err
  assert "Nothing is compiled: this is the analytic model" in caplog.text
  assert "on 2 slices of h200:8: 16 devices (NVIDIA H200)" in done.out
  assert "at $10.00 a chip-hour" in done.out


def test_a_search_ranks_meshes_by_their_steps(plan):
  done = plan(*SMALL, "--topology=v5e:2x2", "--nocompile", "--search=4", "--json")
  assert done.code == 0, done.err
  found = json.loads(done.out)
  assert len(found) == 4
  seconds = [each["step_seconds"] for each in found]
  assert seconds == sorted(seconds)
  tried = {
    (*each["mesh"].values(), each["remat"], each["accumulation"]) for each in found
  }
  assert len(tried) == 4
  done = plan(*SMALL, "--topology=v5e:2x2", "--nocompile", "--search=1")
  sizes = " x ".join(map(str, found[0]["mesh"].values()))
  best = rf"{sizes} +{found[0]['remat']} +{found[0]['accumulation']} "
  assert re.match(best, done.out.splitlines()[1])


def test_a_search_takes_the_batch_in_parts_where_the_whole_does_not_fit(plan):
  stage_2k = "--config=configs/stage_2k.py", "--topology=v6e:2x2", "--nocompile"
  assert plan(*stage_2k).code == 1
  done = plan(*stage_2k, "--search=1", "--json")
  assert done.code == 0, done.err
  (found,) = json.loads(done.out)
  assert found["fits"]
  assert found["batch_size"] == 32
  assert found["accumulation"] > 1
  # Where the whole fits and parts bring nothing, it stays whole.
  done = plan(*SMALL, "--topology=v5e:1x1", "--nocompile", "--search=1", "--json")
  assert json.loads(done.out)[0]["accumulation"] == 1


def test_what_does_not_fit_ends_with_one_error_that_says_why(plan):
  # 64 images of 4096 tokens a device, their scores of all pairs kept.
  done = plan(
    *("--config=configs/stage_1k.py", "--topology=v5e:2x2", "--nocompile", "--json"),
    *("--config.batch_size=256", "--config.compute.attention=xla"),
    "--config.compute.remat=none",
  )
  assert done.code == 1
  assert json.loads(done.out)["fits"] is False
  message = done.err.strip().splitlines()[-1]
  assert message.startswith("Error: Does not fit: a device has 15.75 GiB, the step")
  for part in ("GiB too much", "Largest: activations", "compute.remat=block"):
    assert part in message
  for part in ("compute.attention=auto", "accumulation=", "a larger topology"):
    assert part in message


def test_a_refusal_of_the_compiler_is_a_plan_that_does_not_fit(monkeypatch, refused):
  def compile_lowered(lowered, machines):
    raise memory.DoesNotFitError(refused)

  monkeypatch.setattr(plans, "lower_train_step", lambda stage: None)
  monkeypatch.setattr(plans, "compile_lowered", compile_lowered)
  planned = plans.make_plan(stage("stage_1k", "v5e:2x4"), compiles=True)
  assert not planned.fits
  assert planned.compilation.refused == refused
  wanted = round(29.31 * 2**30)
  assert planned.memory.gradients + planned.memory.temporary == wanted
  # 29.0 GiB for 24 images, and 14.2 free beside the gradients' sum: thirds do.
  assert "accumulation=3 for fewer than 24 images" in report.does_not_fit(planned)
  assert "the compiler found none that fits" in report.text(planned)
  assert json.dumps(plans.as_dict(planned))


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("--topology=v9:2x2",), "Unknown topology 'v9:2x2'. Known are v3:"),
    (("--topology=h200:16",), "a box has up to 8 GPUs"),
    (
      ("--topology=v5e:2x2", "--nocompile", "--config.batch_size=6"),
      "config.batch_size=6 must be a multiple of",
    ),
    (
      ("--topology=v5e:2x2", "--nocompile", "--config.mesh.fsdp=3"),
      "does not cover 4 devices",
    ),
    (
      ("--topology=v5e:2x2", "--nocompile", "--config.mesh.slices=2"),
      "config.mesh.slices=2, and these are v5e:2x2: set it to 0, or give --slices=2",
    ),
    (
      ("--topology=v5e:2x2", "--config.batchsize=6"),
      "unknown config.batchsize (did you mean config.batch_size?)",
    ),
  ],
)
def test_a_mistake_ends_in_one_line(plan, arguments, message):
  done = plan(*SMALL, *arguments)
  assert done.code == 1
  assert message in done.err.strip().splitlines()[-1]


def test_a_search_in_which_nothing_fits_names_the_least(plan):
  done = plan(
    *("--config=configs/stage_4k.py", "--topology=v5e:1x1", "--nocompile"),
    *("--search=2", "--config.mesh.slices=0"),
  )
  assert done.code == 1
  assert "No mesh of v5e:1x1 fits stage_4k" in done.err


def test_a_config_that_is_none_is_refused_before_anything_else():
  config = config_of("stage_1k")
  config["guard"] = config.pop("guards")
  with pytest.raises(ValueError, match=r"unknown config\.guard \(did you mean"):
    stage_on(config, topology.parse("v5e:8x8"))
