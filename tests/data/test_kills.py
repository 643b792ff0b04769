"""The stream of batches goes on to the bit, however often and whenever it is killed."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.train import runs

ROOT = pathlib.Path(__file__).parents[2]
BATCHES = 40

# Writes one line a batch, its hash, and starts where its file ends: as a checkpoint
# keeps no more of a position than how many examples were used.
READER = """
import hashlib, pathlib, sys
from absl import app
from pixsigma_jax.data import pipeline
from pixsigma_jax.data.mixture import open_mixture

def main(argv):
  directory, log, hosts, workers, threads = argv[1:]
  log = pathlib.Path(log)
  lines = log.read_text().splitlines() if log.exists() else []
  done = len([line for line in lines if len(line) == 64])
  log.write_text("".join(line + "\\n" for line in lines[:done]))
  mixture = open_mixture([directory], weights=(), holdout=0.1, split="train")
  streams = [
    pipeline.batches(
      mixture, batch_size=8, seed=3, start_example=8 * done, patch_size=2,
      window=(2, 2), caption_length=12, long_caption_ratio=0.6,
      process_index=host, process_count=int(hosts), num_threads=int(threads),
      num_workers=int(workers), damaged="stop",
    )
    for host in range(int(hosts))
  ]
  with log.open("a") as file:
    for _ in range(done, {batches}):
      parts = [next(stream) for stream in streams]
      digest = hashlib.sha256()
      for name in sorted(parts[0]):
        for part in parts:
          digest.update(part[name].tobytes())
      file.write(digest.hexdigest() + "\\n")
      file.flush()
  for stream in streams:
    stream.close()

if __name__ == "__main__":
  app.run(main)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return runs.prepare(tmp_path_factory.mktemp("data") / "8px")


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
  path = tmp_path_factory.mktemp("reader") / "reader.py"
  path.write_text(READER.replace("{batches}", str(BATCHES)))
  return path


def start(reader, data, log, hosts=1, workers=0, threads=0):
  arguments = [
    str(argument) for argument in (reader, data, log, hosts, workers, threads)
  ]
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  return subprocess.Popen(
    [sys.executable, *arguments],
    env=environment,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )


@pytest.fixture(scope="module")
def undisturbed(reader, data, tmp_path_factory):
  log = tmp_path_factory.mktemp("undisturbed") / "log"
  assert start(reader, data, log).wait(120) == 0
  lines = log.read_text().split()
  assert len(set(lines)) == BATCHES
  return lines


def test_ten_kills_and_changing_hosts_and_threads_change_no_batch(
  reader, data, undisturbed, tmp_path
):
  log = tmp_path / "log"
  draw = np.random.default_rng(0)
  for kill in range(10):
    hosts, threads = [1, 2, 4][kill % 3], kill % 2 * 2
    process = start(reader, data, log, hosts=hosts, threads=threads)
    wanted = min(3 * kill + 1 + draw.integers(3), BATCHES - 2)
    while process.poll() is None and _lines(log) < wanted:
      time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
  assert 0 < _lines(log) < BATCHES
  assert start(reader, data, log).wait(120) == 0
  assert log.read_text().split() == undisturbed


@pytest.mark.parametrize(("hosts", "workers"), [(1, 1), (1, 2), (2, 1)])
def test_workers_draw_the_same_batches(
  reader, data, undisturbed, tmp_path, hosts, workers
):
  log = tmp_path / "log"
  assert start(reader, data, log, hosts=hosts, workers=workers).wait(120) == 0
  assert log.read_text().split() == undisturbed


def test_workers_end_with_a_trainer_that_is_killed(reader, data, tmp_path):
  process = start(reader, data, tmp_path / "log", workers=2)
  while not _lines(tmp_path / "log"):
    assert process.poll() is None
    time.sleep(0.01)
  tasks = pathlib.Path(f"/proc/{process.pid}/task").iterdir()
  pids = [pid for task in tasks for pid in _children(task)]
  assert len(pids) >= 2
  process.send_signal(signal.SIGKILL)
  process.wait()
  until = time.monotonic() + 20
  while any(map(_runs, pids)):
    assert time.monotonic() < until
    time.sleep(0.05)


def _children(task):
  return (task / "children").read_text().split()


def _runs(pid):
  try:
    state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
  except FileNotFoundError:
    return False
  return state != "Z"  # nobody may be there to take note of its end


def _lines(log):
  return log.read_text().count("\n") if log.exists() else 0
