"""What a run does after some of its steps, also when it goes back to one of them."""

import logging
import re

import jax
import pytest

from pixsigma_jax.train import guards
from pixsigma_jax.train.actions import Action, Closing
from tests.train import runs


def test_an_action_is_due_every_so_many_steps_and_knows_the_next():
  action = Action(4)
  assert [step for step in range(1, 10) if action.due(step)] == [4, 8]
  assert [action.next_due(step, 9) for step in (0, 3, 4, 8)] == [4, 4, 8, None]
  never = Action(0)
  assert not any(never.due(step) for step in range(1, 10))
  assert never.next_due(1, 9) is None


# ----------------------------------------------------------------- rolled back, resumed


@pytest.fixture(scope="module")
def rolled_back(data, tmp_path_factory):
  """A run whose sixth step is bad once; it goes back to step 3 and on from there."""
  workdir = tmp_path_factory.mktemp("rolled_back")
  calls = []

  def is_bad(metrics):
    calls.append(metrics)
    return len(calls) == 6

  changes = {
    "data__holdout": 0.25,
    "checkpoint__every": 3,
    "validation__every": 5,
    "validation__examples": 8,
    "log__every": 4,
    "log__profile": (5, 6),
    "guards__bad_step": "rollback",
  }
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(guards, "is_bad", is_bad)
    patch.setattr(guards, "describe", lambda step, *_: f"Step {step} is bad.")
    runs.train(runs.low(data, **changes), workdir)
  return workdir


def test_after_a_rollback_metrics_are_of_what_was_done_since(rolled_back):
  fourth, sixth = runs.metrics(rolled_back)
  assert (fourth["step"], fourth["rollbacks"]) == (4, 1)
  # Step 5 was validated before, and is no more.
  assert "validation/loss" not in fourth
  assert sixth["validation/step"] == 5
  # Arithmetic of a step: of one in the first window, of two in the second.
  each = [line["tflops_per_device"] * line["step_time"] for line in (fourth, sixth)]
  assert each[0] == pytest.approx(each[1], rel=0.5)


def test_images_seen_are_those_of_the_stream_with_abandoned_steps(rolled_back):
  lines = runs.metrics(rolled_back)
  assert [line["images_seen"] for line in lines] == [7 * runs.BATCH, 9 * runs.BATCH]
  assert runs.position(rolled_back, 6)["examples"] == lines[-1]["images_seen"]


def _profiles(workdir):
  return len(list((workdir / "profile").rglob("*.xplane.pb")))


def test_a_profile_that_a_rollback_broke_off_is_made_anew(rolled_back):
  assert _profiles(rolled_back) == 2


def test_a_run_that_goes_on_among_profiled_steps_profiles_the_rest(
  data, done, tmp_path, caplog
):
  caplog.set_level(logging.INFO, logger="absl")
  for total in (3, 6):
    config = runs.low(data, log__profile=(2, 5), total_steps=total)
    runs.train(config, tmp_path)
  assert _profiles(tmp_path) == 2
  assert f"Steps 4 to 5 are profiled in {tmp_path}." in caplog.messages
  runs.assert_same(runs.arrays(tmp_path, 6), runs.arrays(done, 6))
  with jax.profiler.trace(str(tmp_path / "another")):
    pass  # none is under way


# ----------------------------------------------------------------------------- saving


def test_the_log_says_what_was_saved_where_and_when_the_next_is_due(
  data, tmp_path, caplog
):
  caplog.set_level(logging.INFO, logger="absl")
  remote = tmp_path / "remote"
  config = runs.low(
    data,
    total_steps=5,
    checkpoint__every=2,
    checkpoint__remote=str(remote),
    checkpoint__remote_every=4,
  )
  runs.train(config, tmp_path / "run")
  here, there = tmp_path / "run" / "checkpoints", remote / "checkpoints"
  said = [line for line in caplog.messages if line.startswith("Step ")]
  assert set(said) == {
    f"Step 2 is saved: {here}/2; the next is due at step 4.",
    f"Step 4 is saved: {here}/4; the next is due at the end.",
    f"Step 4 is saved: {there}/4; the next is due at the end.",
    f"Step 5 is saved: {here}/5; it is the last.",
    f"Step 5 is saved: {there}/5; it is the last.",
  }
  assert len(said) == 5
  snapshot = tmp_path / "run" / "snapshots" / "5"
  assert f"The model of step 5 is saved: {snapshot}." in caplog.messages


def test_what_cannot_be_written_ends_the_run_once_its_step_is_saved(
  data, done, tmp_path, monkeypatch
):
  write = runs.loop.MetricWriter.write

  def full(self, step, values):
    if step == 3:
      raise OSError(28, "No space left on device", str(self.path))
    write(self, step, values)

  with monkeypatch.context() as patch:
    patch.setattr(runs.loop.MetricWriter, "write", full)
    with pytest.raises(OSError, match=r"No space left on device: .*metrics\.jsonl"):
      runs.train(runs.low(data, checkpoint__every=0), tmp_path)
  assert runs.steps(tmp_path) == [3]
  runs.train(runs.low(data, checkpoint__every=0), tmp_path)
  runs.assert_same(runs.arrays(tmp_path, 6), runs.arrays(done, 6))


def test_an_error_after_a_bad_step_saves_nothing_of_it(data, tmp_path, monkeypatch):
  def unreadable(*_):
    raise OSError("The record cannot be read")

  calls = []

  def is_bad(metrics):
    calls.append(metrics)
    return len(calls) >= 3

  monkeypatch.setattr(guards, "is_bad", is_bad)
  monkeypatch.setattr(guards, "describe", unreadable)
  with pytest.raises(OSError, match="The record cannot be read"):
    runs.train(runs.low(data), tmp_path)
  assert runs.steps(tmp_path) == [2]


# ---------------------------------------------------------------------------- closing


def _fail(text):
  raise OSError(text)


def test_all_is_closed_and_the_first_error_is_the_one_that_is_raised(caplog):
  closed = []
  with pytest.raises(ValueError, match="first"), Closing() as closing:  # noqa: PT012
    closing.add("a", lambda: closed.append("a"))
    closing.add("b", lambda: _fail("second"))
    closing.add("c", lambda: closed.append("c"))
    closing.add("d", lambda: closed.append("d"), last=True)
    raise ValueError("first")
  assert closed == ["c", "a", "d"]
  assert "Closing b failed too: OSError: second" in caplog.messages

  with pytest.raises(OSError, match="b fails"), Closing() as closing:  # noqa: PT012
    closing.add("a", lambda: _fail("a fails"))
    closing.add("b", lambda: _fail("b fails"))
  assert re.search("Closing a failed too: OSError: a fails", caplog.text)
