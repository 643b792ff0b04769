"""A second place for checkpoints: a run outlives the machine of its workdir."""

import shutil

import pytest

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


@pytest.mark.parametrize("changes", [{"remote": "there"}, {"remote_every": 2}])
def test_place_and_interval_go_together(data, tmp_path, changes):
  changes = {f"checkpoint__{name}": value for name, value in changes.items()}
  with pytest.raises(ValueError, match=r"config.checkpoint.remote=.* go together"):
    runs.train(runs.low(data, **changes), tmp_path / "run")
