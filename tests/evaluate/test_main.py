"""The command: several checkpoints, one process, one table, one file."""

import json

import pytest

from pixsigma_jax.evaluate import accuracy
from pixsigma_jax.sample.pipeline import Pipeline
from tests import commands
from tests.sample import models

PER_TASK = 2


@pytest.fixture(scope="module")
def config():
  # Its captions must hold the longest prompts: nine words and an end. No other test's
  # are as long: programs that it has compiled would be none of a test's of here.
  return models.nano(caption_length=11)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, config):
  """Two runs of one architecture."""
  directory = tmp_path_factory.mktemp("runs")
  for step, name in enumerate(("low", "high"), 10):
    models.save_snapshot(
      directory / name, config, step, seed=step, stage=f"stage/{name}"
    )
  return directory


@pytest.fixture
def evaluate(capsys, monkeypatch):
  def evaluate(paths, output, *arguments):
    return commands.run(
      capsys,
      monkeypatch,
      "evaluate",
      f"--checkpoints={','.join(map(str, paths))}",
      "--task=digits",
      f"--per_task={PER_TASK}",
      "--num_inference_steps=2",
      "--dtype=float32",
      "--batch_size=4",
      f"--output={output}",
      *arguments,
    )

  return evaluate


def test_checkpoints_of_one_architecture_share_their_programs_and_a_table(
  evaluate, runs, tmp_path, caplog
):
  caplog.set_level("INFO", logger="absl")
  output = tmp_path / "new" / "accuracy.json"
  done = evaluate([runs / "low", runs / "high"], output)
  assert done.code == 0, done.err
  # One program for single digits, one for pairs of either shape: none for a checkpoint.
  compiled = [m for m in caplog.messages if "Compiling the sampler" in m]
  assert len(compiled) == 2

  header, low, high, path = done.out.splitlines()
  assert header.split()[:2] == ["single", "seen"]
  assert (low.split()[0], high.split()[0]) == ("low", "high")
  assert path == str(output)
  assert [p.name for p in output.parent.iterdir()] == ["accuracy.json"]

  report = json.loads(output.read_text())
  assert report["settings"]["num_inference_steps"] == 2
  assert report["settings"]["guidance_scale"] == 4.5
  assert report["settings"]["per_task"] == PER_TASK
  first, second = report["checkpoints"]
  assert (first["name"], first["stage"], first["step"]) == ("low", "stage/low", 10)
  assert first["checkpoint"] == str(runs / "low" / "snapshots" / "10")
  assert second["step"] == 11
  for task in ("single", "left_of", "above"):
    for novelty in ("seen", "unseen"):
      assert first["counts"][task][novelty]["asked"] == PER_TASK
  shares = [float(cell) for cell in low.split()[1:]]
  assert shares[-2:] == [
    round(100 * first["accuracy"][name], 1) for name in ("single", "pairs")
  ]


def test_a_missing_checkpoint_is_named_before_the_first_is_drawn(
  evaluate, runs, tmp_path, caplog
):
  caplog.set_level("INFO", logger="absl")
  output = tmp_path / "accuracy.json"
  done = evaluate([runs / "low", runs / "nowhere"], output)
  assert (done.code, done.out) == (1, "")
  assert f"There is no checkpoint at {runs / 'nowhere'}" in done.err
  assert "Drawing" not in caplog.text
  assert not output.exists()


@pytest.mark.parametrize(
  ("paths", "arguments", "message"),
  [
    (["low", "low"], [], "twice"),
    (["low"], ["--per_task=0"], "--per_task=0 must be at least 1"),
    (["low"], ["--output=."], "is a directory: give a file"),
    (["low"], ["--output=/proc/a.json"], "Nothing can be written to /proc"),
    (["low"], ["--guidance_scale=-1"], "guidance_scale=-1.0 must be 0 or more"),
    (["low"], ["--num_inference_steps=0"], "num_inference_steps=0 must be at least 1"),
    (["low"], ["--seed=-1"], "Picture 0 has seed -1"),
  ],
)
def test_what_cannot_be_measured_is_refused_before_weights_are_read(
  evaluate, runs, tmp_path, monkeypatch, paths, arguments, message
):
  monkeypatch.setattr(Pipeline, "from_checkpoint", None)
  done = evaluate([runs / path for path in paths], tmp_path / "a.json", *arguments)
  assert (done.code, done.out) == (1, "")
  assert done.err.count("\n") == 1
  assert message in done.err


def test_ctrl_c_says_how_far_it_came_and_shows_it(
  evaluate, runs, tmp_path, monkeypatch
):
  count, measured = accuracy.count_right, []

  def interrupt(*arguments, **more):
    if measured:
      raise KeyboardInterrupt
    measured.append(True)
    return count(*arguments, **more)

  monkeypatch.setattr(accuracy, "count_right", interrupt)
  output = tmp_path / "accuracy.json"
  output.write_text("of an earlier time")
  done = evaluate([runs / "low", runs / "high"], output)
  assert done.code == 130
  assert [line.split()[0] for line in done.out.splitlines()] == ["single", "low"]
  assert "Interrupted: 1 of 2 checkpoints are measured, and " in done.err
  assert done.err.endswith("or --checkpoints without those above.\n")
  assert output.read_text() == "of an earlier time"
  assert list(tmp_path.iterdir()) == [output]
