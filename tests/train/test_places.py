"""Other places for checkpoints: a bucket, and the hosts' own disks."""

import json
import shutil

import pytest

from pixsigma_jax.train.status import status
from tests.train import runs


def config(data, remote, **changes):
  changes = {"checkpoint__every": 1, "checkpoint__remote_every": 3} | changes
  return runs.low(data, checkpoint__remote=str(remote), **changes)


def test_a_new_machine_goes_on_from_the_remote_checkpoint(data, done, tmp_path):
  remote, first, second = (tmp_path / name for name in ("remote", "first", "second"))
  runs.train(config(data, remote, total_steps=4), first)
  assert runs.steps(first) == [1, 2, 3, 4]
  assert runs.steps(remote) == [3, 4]  # each third, and the last
  shutil.rmtree(first)
  shutil.rmtree(remote / "checkpoints" / "4")
  stands = status(config(data, remote).to_dict(), second)
  assert stands == f"open: {second} goes on from step 3 of 6"
  runs.train(config(data, remote), second)
  assert runs.steps(second) == [4, 5, 6]
  assert runs.steps(remote) == [3, 6]
  runs.assert_same(runs.arrays(second, 6), runs.arrays(done, 6))
  runs.assert_same(runs.arrays(remote, 6), runs.arrays(done, 6))


def test_the_newest_of_both_places_counts(data, done, tmp_path):
  remote, workdir = tmp_path / "remote", tmp_path / "run"
  runs.train(config(data, remote, total_steps=4), workdir)
  for step in (2, 3, 4):
    shutil.rmtree(workdir / "checkpoints" / str(step))
  shutil.rmtree(remote / "checkpoints" / "4")
  runs.train(config(data, remote), workdir)
  assert runs.steps(workdir) == [1, 4, 5, 6]  # on from step 3
  runs.assert_same(runs.arrays(workdir, 6), runs.arrays(done, 6))


def test_shards_on_the_own_disk_are_nearer_than_the_workdir(
  data, done, tmp_path, caplog
):
  local, workdir = tmp_path / "local", tmp_path / "run"
  changes = {"checkpoint__local": str(local), "checkpoint__local_every": 1}
  changes |= {"checkpoint__every": 2, "mesh__fsdp": 2, "mesh__data": 2}
  caplog.set_level("INFO", logger="absl")

  def train(**more):
    caplog.clear()
    runs.train(runs.low(data, **changes, **more), workdir, devices=4)
    return [line for line in caplog.messages if line.startswith("Resuming")]

  train(total_steps=5)
  (own,) = local.glob("0_of_1_*")
  assert runs.steps(own) == [4, 5]
  shutil.rmtree(workdir / "checkpoints" / "5")
  stands = status(runs.low(data, **changes).to_dict(), workdir)
  assert stands.startswith(
    f"open: {workdir} goes on from step 4 of 6, or from step 5 if all hosts have it"
  )
  (line,) = train()
  assert line.endswith("from step 5.")
  assert runs.steps(own) == [5, 6]
  whole = tmp_path / "whole"
  runs.train(runs.low(data, mesh__fsdp=2, mesh__data=2), whole, devices=4)
  runs.assert_same(runs.arrays(workdir, 6), runs.arrays(whole, 6))

  # Another mesh has no use for those shards, and leaves them where they are.
  shutil.rmtree(workdir / "checkpoints" / "6")
  shutil.rmtree(workdir / "snapshots")
  changes["mesh__data"], changes["mesh__fsdp"] = 4, 1
  (line,) = train()
  assert line.endswith("from step 4.")
  assert runs.steps(own) == [5, 6]


def test_a_place_of_another_run_is_refused_and_both_are_named(data, tmp_path):
  local, remote, first, second = (tmp_path / n for n in ("l", "r", "first", "second"))
  at_local = {"checkpoint__local": str(local), "checkpoint__local_every": 1}
  at_remote = {"checkpoint__remote": str(remote), "checkpoint__remote_every": 1}
  runs.train(runs.low(data, total_steps=2, **at_local, **at_remote), first)
  runs.train(runs.low(data, total_steps=1, optimizer__warmup_steps=0), second)
  names = [json.loads((w / "run.json").read_text())["run"] for w in (first, second)]
  for changes, place in ((at_local, local), (at_remote, remote)):
    message = rf"{place} .*the run {names[0]}.* {second} is the run {names[1]}: give"
    with pytest.raises(ValueError, match=message):
      runs.train(runs.low(data, **changes), second)
  assert runs.steps(second) == [1]

  # Of a version that did not say whose they are: known by their provenance, or not.
  (local / "run.json").unlink()
  with pytest.raises(ValueError, match="do not say of which run they are"):
    runs.train(runs.low(data, **at_local), second)
  runs.train(runs.low(data, total_steps=3, **at_local, **at_remote), first)
  assert json.loads((local / "run.json").read_text())["run"] == names[0]


@pytest.mark.parametrize(
  "changes",
  [{"remote": "there"}, {"remote_every": 2}, {"local": "here"}, {"local_every": 1}],
)
def test_place_and_interval_go_together(data, tmp_path, changes):
  changes = {f"checkpoint__{name}": value for name, value in changes.items()}
  with pytest.raises(ValueError, match=r"config.checkpoint.\w+=.* go together"):
    runs.train(runs.low(data, **changes), tmp_path / "run")
