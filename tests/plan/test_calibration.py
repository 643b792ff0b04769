"""The model of a step against steps that were measured, here made up."""

import dataclasses
import json

import pytest

from pixsigma_jax.plan import calibration, report, roofline
from pixsigma_jax.plan.plan import as_dict, make_plan
from tests.plan.stages import config_of, stage

MACHINES = "v5e:2x4"
BATCHES = (64, 128, 192)


def measured(seconds, machines=MACHINES, **changes):
  return calibration.Measurement(
    config=config_of("stage_1k", **changes),
    topology=machines,
    slices=1,
    seconds=seconds,
    date="2026-11-22",
    versions={"jax": "0.10.2"},
  )


def modelled(**changes):
  return roofline.step_time(stage("stage_1k", MACHINES, **changes)).seconds


@pytest.fixture
def path(tmp_path, monkeypatch):
  """An empty file in place of the package's."""
  path = tmp_path / "measured.jsonl"
  of_kind = calibration.of_kind
  monkeypatch.setattr(calibration, "of_kind", lambda kind: of_kind(kind, path))
  return path


def test_the_factor_is_what_steps_took_over_what_the_model_says(path):
  for batch_size, slower in zip(BATCHES, (1.2, 1.5, 1.8), strict=True):
    seconds = slower * modelled(batch_size=batch_size)
    calibration.add(measured(seconds, batch_size=batch_size), path)
  calibration.add(measured(1e3, "v6e:2x4"), path)  # another kind says nothing of it
  found = calibration.of_kind("TPU v5 lite")
  assert found.count == 3
  assert found.factor == pytest.approx((1.2 * 1.5 * 1.8) ** (1 / 3))
  # The first, by the other two; the last is nearer to what the first two make of it.
  assert found.error == pytest.approx(1.8 / (1.2 * 1.5) ** 0.5 - 1)


def test_a_plan_is_calibrated_by_its_kind_of_device_alone(path):
  calibration.add(measured(3 * modelled()), path)
  planned = stage("stage_1k", MACHINES, batch_size=64)
  plan = make_plan(planned, compiles=False)
  assert plan.calibration.factor == pytest.approx(3)
  assert plan.calibration.error is None
  assert plan.seconds == pytest.approx(3 * plan.floor)
  bare = dataclasses.replace(plan, calibration=None)
  assert plan.dollars == pytest.approx(3 * bare.dollars)
  assert plan.mfu == pytest.approx(bare.mfu / 3)
  assert as_dict(plan)["calibration"]["count"] == 1
  told = report.text(plan)
  assert "(1 measured on TPU v5 lite took 3.00 times as long)" in told
  assert "A step takes about " in told

  other = make_plan(stage("stage_1k", "v6e:2x4", batch_size=64), compiles=False)
  assert other.calibration is None
  told = report.text(other)
  assert "(not calibrated: no step has been measured on TPU v6 lite)" in told
  assert "A step takes at least " in told


def test_no_step_is_expected_below_its_floor(path):
  calibration.add(measured(0.5 * modelled()), path)  # a model that is too slow
  plan = make_plan(stage("stage_1k", MACHINES), compiles=False)
  assert plan.seconds == plan.floor


def test_several_say_how_far_they_agree(path):
  for slower in (1.0, 1.1):
    calibration.add(measured(slower * modelled()), path)
  plan = make_plan(stage("stage_1k", MACHINES), compiles=False)
  assert "2 measured on TPU v5 lite took 1.05 times as long, within 10%" in (
    report.text(plan)
  )


@pytest.mark.parametrize("line", ["{", "[]", '{"topology": "v5e:2x4"}'])
def test_a_damaged_line_is_named(path, line):
  calibration.add(measured(1.0), path)
  with path.open("a") as file:
    file.write(line + "\n")
  with pytest.raises(ValueError, match=r"measured\.jsonl, line 2 is no measurement"):
    calibration.of_kind("TPU v5 lite")


def test_a_config_that_is_none_any_more_is_named(path):
  old = json.loads(json.dumps(dataclasses.asdict(measured(1.0))))
  old["config"]["gone"] = 1
  path.write_text(json.dumps(old) + "\n")
  with pytest.raises(
    ValueError, match=r"2026-11-22 on v5e:2x4.*measure it again.*gone"
  ):
    calibration.of_kind("TPU v5 lite")
