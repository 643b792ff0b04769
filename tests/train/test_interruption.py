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

from pixsigma_jax.data import pipeline
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


class Slow(pipeline._LocalBatches):
  """Reads slower than a step is made; at one batch something else happens first."""

  at = 6  # the trainer has made six steps by then, and waits

  def __getitem__(self, index):
    if index >= self.at - 2:
      time.sleep(0.7)
    if index == self.at:
      self.happen()
    return super().__getitem__(index)


class Terminated(Slow):
  """The worker's whole process group is told to stop, as schedulers do."""

  def happen(self):
    for process in (os.getpid(), os.getppid()):
      os.kill(process, signal.SIGTERM)
    time.sleep(2)


class Killed(Slow):
  """The worker is killed, as when memory is out."""

  def happen(self):
    os.kill(os.getpid(), signal.SIGKILL)


def _low_with_a_worker(data):
  return runs.low(
    data,
    total_steps=12,
    checkpoint__every=0,
    data__num_workers=1,
    data__num_threads=0,
  )


def test_told_to_stop_with_its_workers_a_run_saves_the_step_that_it_made(
  data, done, tmp_path, monkeypatch, caplog
):
  caplog.set_level(logging.INFO, logger="absl")
  monkeypatch.setattr(pipeline, "_LocalBatches", Terminated)
  with pytest.raises(SystemExit) as exit_:
    runs.train(_low_with_a_worker(data), tmp_path)
  assert exit_.value.code == 128 + signal.SIGTERM
  assert runs.steps(tmp_path) == [6]
  assert "SIGTERM: finishing step 6, then saving; Ctrl-C to end now." in caplog.messages
  runs.assert_same(runs.arrays(tmp_path, 6), runs.arrays(done, 6))


def test_a_worker_that_is_killed_is_named_and_the_step_that_was_made_is_saved(
  data, done, tmp_path, monkeypatch
):
  monkeypatch.setattr(pipeline, "_LocalBatches", Killed)
  message = r"A worker that reads data \(process \d+\), of 1, was killed by SIGKILL, as"
  with pytest.raises(pipeline.WorkerError, match=message):
    runs.train(_low_with_a_worker(data), tmp_path)
  assert runs.steps(tmp_path) == [6]
  runs.assert_same(runs.arrays(tmp_path, 6), runs.arrays(done, 6))


def test_ctrl_c_in_a_run_with_workers_is_answered_and_ends_it_quietly(data, tmp_path):
  log = tmp_path / "log"
  changes = {"total_steps": 10_000, "log__every": 1, "data__num_workers": 1}
  process = runs.start(
    runs.flags(data, tmp_path / "run", **changes), log, own_group=True
  )
  until = time.monotonic() + SECONDS
  while "] step 2/" not in log.read_text():
    assert process.poll() is None, log.read_text()
    assert time.monotonic() < until
    time.sleep(0.01)
  os.killpg(process.pid, signal.SIGINT)
  code, text = process.wait(SECONDS), log.read_text()
  assert code == 128 + signal.SIGINT, text
  assert re.search(r"SIGINT: finishing step \d+, then saving; once more to end", text)
  for noise in ("Traceback", "KeyboardInterrupt", "shared_memory", "leaked"):
    assert noise not in text
  step = int(re.findall(r"Stopped by SIGINT at step (\d+)", text)[-1])
  assert runs.steps(tmp_path / "run")[-1] == step


def test_a_line_covers_the_steps_since_the_last_one_or_since_the_checkpoint(
  data, done, tmp_path, monkeypatch
):
  """As docs/training.md has it: the run stops at step 3, between two lines."""
  config = runs.low(data, log__every=2, checkpoint__every=0)

  def stopped(self, step):
    if step == 3:
      os.kill(os.getpid(), signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(loop.Progress, "advance", stopped)
    with pytest.raises(SystemExit):
      runs.train(config, tmp_path)
  runs.train(config, tmp_path)
  losses = [line["loss"] for line in runs.metrics(done)]
  means = {2: losses[:2], 3: losses[2:3], 4: losses[3:4], 6: losses[4:]}
  for line in runs.metrics(tmp_path):
    assert line["loss"] == pytest.approx(
      sum(mean := means.pop(line["step"])) / len(mean)
    )
  assert not means
