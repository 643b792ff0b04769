"""A workdir is one run's at a time, and what in it still counts is that run's."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from pixsigma_jax import checkpoint, distributed
from pixsigma_jax.metadata import History, Metadata, software
from pixsigma_jax.train import run_directory
from pixsigma_jax.train.status import is_cleared, status
from tests.train import runs


def snapshot(workdir, step):
  return runs.part(runs.arrays(workdir, step, "snapshots"), "params")


def averages(workdir, step):
  return runs.part(runs.arrays(workdir, step), "ema_params/0")


def back_to(workdir, step):
  """Deletes the checkpoints after a step, as a user does."""
  for later in runs.steps(workdir):
    if later > step:
      shutil.rmtree(workdir / "checkpoints" / str(later))


# ------------------------------------------------------------------------------- locks


def test_a_run_is_not_told_that_it_stands_in_its_own_way(tmp_path):
  (tmp_path / "link").symlink_to(tmp_path / "run")
  for remote in ("run", "link", "run/../run"):
    message = f"checkpoint.remote=.*{remote} is the --workdir itself"
    with (
      pytest.raises(ValueError, match=message),
      run_directory.held(tmp_path / "run", str(tmp_path / remote)),
    ):
      pass


def test_a_second_run_in_a_workdir_is_told_who_is_there_and_touches_nothing(
  data, tmp_path
):
  workdir = tmp_path / "run"
  config = runs.low(data)
  with run_directory.held(workdir):
    # Asking where it stands is no second run.
    assert status(config.to_dict(), workdir).startswith("open: ")
    before = [(p, p.read_bytes()) for p in workdir.rglob("*") if p.is_file()]
    message = (
      rf"{workdir} is held by process {os.getpid()} on {socket.gethostname()} since "
      r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d: .* another --workdir"
    )
    with pytest.raises(run_directory.HeldError, match=message):
      runs.train(config, workdir)
    assert [(p, p.read_bytes()) for p in workdir.rglob("*") if p.is_file()] == before
  with run_directory.held(workdir):
    pass


def test_a_second_place_for_checkpoints_is_held_too(data, tmp_path):
  remote, first, second = (tmp_path / name for name in ("remote", "first", "second"))
  changes = {"checkpoint__remote": str(remote), "checkpoint__remote_every": 2}
  with (
    run_directory.held(first, str(remote)),
    pytest.raises(run_directory.HeldError, match=f"{remote} is held by process"),
  ):
    runs.train(runs.low(data, **changes), second)
  # What was held before the one that could not be is let go of.
  with run_directory.held(second, "gs://nobody/looks"):
    pass


_HOLD = """
import pathlib, sys, time
from pixsigma_jax.train import run_directory
with run_directory.held(pathlib.Path(sys.argv[1])):
  print("held", flush=True)
  time.sleep(600)
"""


def test_a_killed_run_holds_nothing(tmp_path):
  process = subprocess.Popen(
    [sys.executable, "-c", _HOLD, str(tmp_path)],
    cwd=runs.ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    assert process.stdout.readline() == "held\n"
    message = f"held by process {process.pid} on"
    with (
      pytest.raises(run_directory.HeldError, match=message),
      run_directory.held(tmp_path),
    ):
      pass
  finally:
    process.send_signal(signal.SIGKILL)
    process.communicate()
  with run_directory.held(tmp_path):
    pass


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
  def flock(*_):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(fcntl, "flock", flock)
  with run_directory.held(tmp_path):
    assert "knows no locks (No locks available): nothing keeps" in caplog.text


def test_all_processes_of_a_job_learn_that_the_first_was_refused(tmp_path, monkeypatch):
  """The others do not look themselves, and wait for nobody."""
  with run_directory.held(tmp_path):
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    told = [True, "/there is held by process 3"]
    monkeypatch.setattr(distributed, "of_first", lambda value: told)
    with (
      pytest.raises(run_directory.HeldError, match="/there is held by process 3"),
      run_directory.held(tmp_path),
    ):
      pass


# ----------------------------------------------------------------------------- history


@pytest.fixture(scope="module")
def watched(data, tmp_path_factory):
  """A run that has left models and samples of each second step."""
  workdir = tmp_path_factory.mktemp("runs") / "watched"
  runs.train(runs.low(data, **WATCHED), workdir)
  return workdir


WATCHED = {
  "checkpoint__snapshot_every": 2,
  "ema__values": (0.998, 0.5),
  "log__sample_set__every": 2,
  "log__sample_set__count": 1,
}


def test_after_going_back_every_model_is_of_the_run_as_it_went_on(
  data, watched, tmp_path, caplog
):
  caplog.set_level("INFO", logger="absl")
  workdir = tmp_path / "run"
  shutil.copytree(watched, workdir)
  back_to(workdir, 2)
  # Other captions from there on.
  config = runs.low(data, data__long_caption_ratio=0.0, **WATCHED)
  assert status(config.to_dict(), workdir) == (
    f"open: {workdir} goes on from step 2 of 6; snapshots/4, snapshots/6, "
    "ema/0.5/snapshots/4, ema/0.5/snapshots/6, of another history, move to abandoned/"
  )
  runs.train(config, workdir)
  for step in (4, 6):
    runs.assert_same(snapshot(workdir, step), averages(workdir, step))
    for average in ("", "ema/0.5"):
      have, old = (snapshot(w / average, step) for w in (workdir, watched))
      assert any((have[name] != old[name]).any() for name in have)
    assert f"sample_sets/{step:08d} is of a step to be made again" in caplog.text
    name = f"sample_sets/{step:08d}/captions.jsonl"
    times = [(w / name).stat().st_mtime_ns for w in (workdir, watched)]
    assert times[0] > times[1]  # which a copy has, too
  assert "goes on from step 2: models of later steps are of another hist" in caplog.text

  # What was there is still to be had, by its own path.
  (aside,) = (workdir / "abandoned").iterdir()
  assert runs.steps(aside, "snapshots") == [4, 6]
  runs.assert_same(snapshot(aside, 6), snapshot(watched, 6))
  runs.assert_same(snapshot(aside / "ema/0.5", 6), snapshot(watched / "ema/0.5", 6))
  runs.assert_same(snapshot(workdir, 2), snapshot(watched, 2))

  before, after = (
    checkpoint.read_metadata(w / "snapshots" / "6").history for w in (watched, workdir)
  )
  assert before.run == after.run
  assert before.branches == ()
  assert [step for _, step in after.branches] == [2]
  assert checkpoint.read_metadata(workdir / "snapshots" / "2").history == before

  # The same command again has nothing to do, and changes nothing.
  assert status(config.to_dict(), workdir).startswith("done: ")
  runs.train(config, workdir)
  assert [p.name for p in (workdir / "abandoned").iterdir()] == [aside.name]
  assert "Replacing" not in caplog.text


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_kill_while_models_are_set_aside_does_not_hide_that_the_run_went_back(
  tmp_path, monkeypatch, moved
):
  for step in (2, 4, 6):
    (tmp_path / "snapshots" / str(step)).mkdir(parents=True)
  history = run_directory.identify(tmp_path)
  done, rename = [], pathlib.Path.rename

  def killed(self, target):
    if self.parent.name == "snapshots":
      if len(done) == moved:
        raise KeyboardInterrupt
      done.append(self)
    return rename(self, target)

  with monkeypatch.context() as patch:
    patch.setattr(pathlib.Path, "rename", killed)
    with contextlib.suppress(KeyboardInterrupt):
      run_directory.go_on_from(tmp_path, history, 2)
  again = run_directory.identify(tmp_path)
  again = run_directory.go_on_from(tmp_path, again, 2)
  assert again.has_made(history, 2)
  assert not again.has_made(history, 4)
  assert [path.name for path in (tmp_path / "snapshots").iterdir()] == ["2"]
  assert len(list((tmp_path / "abandoned").glob("*/snapshots/*"))) == 2


def test_a_run_that_is_only_resumed_goes_back_from_nothing(data, done, tmp_path):
  workdir = tmp_path / "run"
  runs.train(runs.low(data, total_steps=4), workdir)
  runs.train(runs.low(data), workdir)
  assert not (workdir / "abandoned").exists()
  assert runs.steps(workdir, "snapshots") == [4, 6]
  history = checkpoint.read_metadata(workdir).history
  assert history == History(json.loads((workdir / "run.json").read_text())["run"])
  runs.assert_same(snapshot(workdir, 6), snapshot(done, 6))


def test_a_stage_whose_checkpoints_were_cleared_away_is_done(data, done, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(done, workdir)
  shutil.rmtree(workdir / "checkpoints")
  assert status(runs.low(data).to_dict(), workdir).startswith("done: ")
  runs.train(runs.low(data), workdir)
  assert runs.steps(workdir) == []
  runs.assert_same(snapshot(workdir, 6), snapshot(done, 6))


def test_another_stages_models_do_not_make_a_stage_done(data, tmp_path):
  config = runs.low(data).to_dict()
  metadata = Metadata(
    stage="another",
    model={},
    autoencoder={},
    scaling_factor=1.0,
    text_encoder={},
    resolution=8,
    provenance=(),
  )
  checkpoint.save_snapshot(
    tmp_path,
    config["total_steps"],
    params={"x": np.zeros(1)},
    null_caption=None,
    metadata=metadata,
  )
  with pytest.raises(ValueError, match="is a run of the stage 'another'"):
    is_cleared(config, tmp_path)
  assert is_cleared(config | {"stage": "another"}, tmp_path)


def test_where_it_would_start_says_through_which_transforms(data, done, tmp_path):
  config = runs.low(data, init__parent=str(done)).to_dict()
  config["init"]["transforms"] = ({"name": "interpolate_pe", "base_size": 4},)
  assert status(config, tmp_path / "run") == (
    f"open: {tmp_path}/run starts from {done}/snapshots/6 through interpolate_pe"
  )


def test_where_a_run_stands_is_not_said_of_a_config_without_sense(data, tmp_path):
  with pytest.raises(ValueError, match="keep_last=0"):
    status(runs.low(data, checkpoint__keep_last=0).to_dict(), tmp_path)


def test_a_run_of_an_earlier_version_goes_on_to_the_same_bits(data, done, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(done, workdir)
  shutil.rmtree(workdir / "checkpoints" / "6")
  shutil.rmtree(workdir / "snapshots")
  for name in ("run.json", "lock"):
    (workdir / name).unlink()
  for path in workdir.glob("checkpoints/*/metadata/metadata"):
    fields = json.loads(path.read_text())
    fields["format"] = 1
    del fields["history"], fields["software"]
    path.write_text(json.dumps(fields))
  runs.train(runs.low(data), workdir)
  for what in ("checkpoints", "snapshots"):
    runs.assert_same(runs.arrays(workdir, 6, what), runs.arrays(done, 6, what))
  assert runs.measured(workdir) == runs.measured(done)
  about = checkpoint.read_metadata(workdir)
  assert about.history.run == json.loads((workdir / "run.json").read_text())["run"]
  assert about.software == software()


def test_a_new_machine_goes_on_as_the_run_that_the_bucket_holds(tmp_path):
  history = History.new().branch_after(2)
  path = tmp_path / "remote" / "checkpoints" / "4" / "metadata" / "metadata"
  path.parent.mkdir(parents=True)
  path.write_text(json.dumps({"history": {"run": history.run, "branches": [["b", 2]]}}))
  found = run_directory.identify(tmp_path / "new", str(tmp_path / "remote"))
  assert found == History(history.run, (("b", 2),))
  assert run_directory.identify(tmp_path / "new") == found  # it says so itself now


def test_a_copy_of_a_workdir_is_told_that_it_counts_as_the_same_run(tmp_path, caplog):
  history = run_directory.identify(tmp_path / "a")
  shutil.copytree(tmp_path / "a", tmp_path / "b")
  (tmp_path / "link").symlink_to(tmp_path / "a")
  for _ in range(2):
    caplog.clear()
    assert run_directory.identify(tmp_path / "a") == history
    assert run_directory.identify(tmp_path / "link") == history
    assert "is a copy of" not in caplog.text
    assert run_directory.identify(tmp_path / "b") == history
    assert f"b is a copy of {tmp_path}/a, and both count as the run" in caplog.text
  caplog.clear()
  (tmp_path / "link").unlink()
  (tmp_path / "a").rename(tmp_path / "c")  # moved, not copied
  run_directory.identify(tmp_path / "c")
  run_directory.identify(tmp_path / "b")  # of what is no longer there
  assert "is a copy of" not in caplog.text


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"run": "a", "branches": 3}'])
def test_a_damaged_identity_is_named(tmp_path, text):
  (tmp_path / "run.json").write_text(text)
  with pytest.raises(ValueError, match=f"{tmp_path}/run.json does not say .* Delete"):
    run_directory.identify(tmp_path)


def test_processes_of_different_code_do_not_go_on_together(data, tmp_path, monkeypatch):
  compared = {}

  def check_same(what, value):
    compared[what] = value
    if what == "code":
      raise distributed.DistributedError("The processes do not have the same code")

  monkeypatch.setattr(distributed, "check_same", check_same)
  with pytest.raises(distributed.DistributedError):
    runs.train(runs.low(data), tmp_path / "run")
  assert compared == {"code": software()}
  assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_snapshot_of_another_history_is_replaced_and_the_log_says_so(
  done, tmp_path, caplog
):
  caplog.set_level("INFO", logger="absl")
  old = checkpoint.read_snapshot(done)

  def save(history, value):
    checkpoint.save_snapshot(
      tmp_path,
      6,
      params={"w": np.full(3, value, np.float32)},
      null_caption=None,
      metadata=checkpoint.dataclasses.replace(old.metadata, history=history),
    )
    arrays = runs.arrays(tmp_path, 6, "snapshots")
    return float(arrays["params/w"][0]), "Replacing" in caplog.text

  first = History.new()
  assert save(first, 1.0) == (1.0, False)
  assert save(first, 2.0) == (1.0, False)
  later = first.branch_after(6)
  assert save(later, 3.0) == (1.0, False)  # what it branched off from is its own
  assert save(None, 4.0) == (1.0, False)  # a version that did not say
  assert save(first.branch_after(5), 5.0) == (5.0, True)
  caplog.clear()
  assert save(History.new(), 6.0) == (6.0, True)
