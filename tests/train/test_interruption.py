"""Ended from outside at any moment, a run goes on as if nothing had been."""

import itertools
import logging
import os
import random
import re
import shutil
import signal
import time

import pytest

from pixsigma_jax.train import loop
from tests.train import runs

STEPS_A_KILL = 6
SECONDS = 600  # of patience with one process: the last does what kills have undone

# When to kill: while the process starts, after a few steps, or when a checkpoint begins
# to be written. The last kill meets the final snapshot.
MOMENTS = ("step", "saving", "step", "start", "saving")


def _unfinished(directory):
  """What Orbax is writing, or left behind: by inode, for names come again."""
  return {
    (path.name, path.stat().st_ino)
    for path in directory.glob("*orbax-checkpoint-tmp*")
    if path.exists()
  }


def _kill(process, moment, draw, workdir, log):
  """Waits for the moment, kills, and says whether something was left half-written."""
  directory = workdir / ("snapshots" if moment == "snapshot" else "checkpoints")
  before = _unfinished(directory)
  steps, delay = draw.randint(2, 4), draw.uniform(0, 0.05)
  if moment == "start":
    delay = draw.uniform(1, 3)
  until = time.monotonic() + SECONDS
  while moment != "start":
    assert process.poll() is None, f"ended before it was killed:\n{log.read_text()}"
    assert time.monotonic() < until
    try:
      done = len(re.findall(r"\] step \d+/", log.read_text()))
      new = _unfinished(directory) - before
    except FileNotFoundError:  # renamed as we looked
      continue
    if done >= steps if moment == "step" else new:
      break
    time.sleep(0.002)
  time.sleep(delay)
  process.send_signal(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL
  return bool(_unfinished(directory) - before)


def test_killed_at_any_moment_a_run_ends_as_if_it_had_not_been(
  data, tmp_path, pytestconfig
):
  kills = pytestconfig.getoption("kills")
  total = STEPS_A_KILL * kills
  whole, torn = tmp_path / "whole", tmp_path / "torn"
  changes = {"total_steps": total, "checkpoint__keep_last": 2}

  def start(workdir, log):
    return runs.start(runs.flags(data, workdir, **changes), log)

  log = tmp_path / "whole.log"
  assert start(whole, log).wait(SECONDS) == 0, log.read_text()

  draw, halves = random.Random(0), 0
  moments = [*itertools.islice(itertools.cycle(MOMENTS), kills - 1), "snapshot"]
  for number, moment in enumerate(moments):
    log = tmp_path / f"{number}.log"
    halves += _kill(start(torn, log), moment, draw, torn, log)
  log = tmp_path / "last.log"
  assert start(torn, log).wait(SECONDS) == 0, log.read_text()
  assert halves > kills / 5  # so many kills fell into the writing of a checkpoint

  assert runs.steps(torn) == runs.steps(whole) == [total - 2, total]
  for step in (total - 2, total):
    runs.assert_same(runs.arrays(torn, step), runs.arrays(whole, step))
    assert runs.position(torn, step) == runs.position(whole, step)
  snapshots = [runs.arrays(workdir, total, "snapshots") for workdir in (torn, whole)]
  runs.assert_same(*snapshots)
  assert runs.measured(torn) == runs.measured(whole)
  assert not _unfinished(torn / "checkpoints")
  assert not _unfinished(torn / "snapshots")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_and_the_same_command_goes_on(
  data, done, tmp_path, monkeypatch, caplog, number
):
  caplog.set_level(logging.INFO, logger="absl")
  config = runs.low(data, checkpoint__every=0)

  class Signalling(loop.MetricWriter):
    def write(self, step, values):
      super().write(step, values)
      if step == 3:
        os.kill(os.getpid(), number)

  before = signal.getsignal(number)
  with monkeypatch.context() as patch:
    patch.setattr(loop, "MetricWriter", Signalling)
    with pytest.raises(SystemExit) as exit_:
      runs.train(config, tmp_path)
  assert exit_.value.code == 128 + number  # not that of a run that has ended
  assert caplog.messages[-1] == (
    f"Stopped by {number.name} at step 3, which is saved. The same command goes on."
  )
  assert runs.steps(tmp_path) == [3]
  assert not (tmp_path / "snapshots").exists()
  assert signal.getsignal(number) == before

  runs.train(config, tmp_path)
  runs.assert_same(runs.arrays(tmp_path, 6), runs.arrays(done, 6))
  assert runs.measured(tmp_path) == runs.measured(done)


def test_the_command_ends_with_the_code_of_the_signal(data, tmp_path):
  log = tmp_path / "log"
  process = runs.start(runs.flags(data, tmp_path / "run"), log)
  until = time.monotonic() + SECONDS
  while "] step 1/" not in log.read_text():
    assert process.poll() is None, log.read_text()
    assert time.monotonic() < until
    time.sleep(0.002)
  process.terminate()
  code, text = process.wait(SECONDS), log.read_text()
  # It may have come to its end before the signal came to it.
  if "has ended" not in text:
    assert code == 128 + signal.SIGTERM
    assert "Stopped by SIGTERM at step" in text
  assert "Traceback" not in text
  step = int(re.findall(r"\] step (\d+)/", text)[-1])
  assert runs.steps(tmp_path / "run")[-1] == step


def test_a_run_killed_before_its_first_checkpoint_starts_over(data, done, tmp_path):
  shutil.copytree(done, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints")
  shutil.rmtree(tmp_path / "run" / "snapshots")
  with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
    file.write('{"step": 7, "lo')  # half a line, as a kill leaves it
  runs.train(runs.low(data), tmp_path / "run")
  runs.assert_same(runs.arrays(tmp_path / "run", 6), runs.arrays(done, 6))
  assert runs.measured(tmp_path / "run") == runs.measured(done)
