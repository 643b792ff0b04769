"""Replicas under Ray Serve: they answer, and one that dies is replaced."""

import concurrent.futures
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import openai
import pytest

from tests import compilation

pytest.importorskip("ray.serve", reason="Ray Serve is not installed")

ROOT = pathlib.Path(__file__).parents[2]
PATIENCE = 120.0  # seconds; Ray itself takes many to start
REPLICAS = 2
# Another number of steps is another program, which takes long enough to be killed in.
SLOW, QUICK = {"num_inference_steps": 90}, {"num_inference_steps": 2}


def replicas(parent):
  """Processes of replicas that descend from another."""
  parents, names = {}, {}
  for folder in pathlib.Path("/proc").glob("[0-9]*"):
    try:
      stat = (folder / "stat").read_text()
      names[int(folder.name)] = (folder / "cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
      continue  # it has ended meanwhile
    parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])

  def descends(process):
    while process in parents and process != parent:
      process = parents[process]
    return process == parent

  return {
    process
    for process, name in names.items()
    if b"ray::ServeReplica" in name and descends(process)
  }


def until(condition):
  end = time.monotonic() + PATIENCE
  while not (found := condition()):
    assert time.monotonic() < end
    time.sleep(0.2)
  return found


def test_a_replica_that_is_killed_is_replaced_and_its_clients_may_ask_again(tmp_path):
  port = free_port()
  log = (tmp_path / "log").open("w+")
  process = subprocess.Popen(
    [
      *(sys.executable, "launch/serve_ray.py", f"--port={port}", "--cpus=0.1"),
      *("--checkpoint=weights/miniature", "--dtype=float32", "--warm_up=none"),
      *(f"--min_replicas={REPLICAS}", f"--max_replicas={REPLICAS}"),
    ],
    cwd=ROOT,
    env={**os.environ, **compilation.environment(), "PYTHONPATH": str(ROOT)},
    stdout=subprocess.PIPE,
    stderr=log,
    text=True,
  )
  try:
    line = process.stdout.readline()
    assert line == f"Serving pixart-sigma at http://127.0.0.1:{port}/\n", log_of(log)
    client = openai.OpenAI(
      base_url=f"http://127.0.0.1:{port}/v1",
      api_key="none",
      max_retries=0,
      timeout=PATIENCE,
    )

    def ask(seed, settings, client=client):
      asked = {"seed": seed, **settings}
      [item] = client.images.generate(prompt="a red three", extra_body=asked).data
      return item.seed

    assert ask(5, QUICK) == 5
    before = until(lambda: len(found := replicas(process.pid)) == REPLICAS and found)
    with concurrent.futures.ThreadPoolExecutor() as pool:
      asked = [pool.submit(ask, seed, SLOW) for seed in range(8)]
      time.sleep(1)
      victim = min(before)
      os.kill(victim, signal.SIGKILL)
      lost = [future.exception(PATIENCE) for future in asked]
    # What the other replica drew is there; what was lost is worth another try.
    assert 0 < sum(error is not None for error in lost) < len(lost)
    for error in lost:
      assert error is None or isinstance(error, openai.InternalServerError)
    until(
      lambda: len(found := replicas(process.pid)) == REPLICAS and victim not in found
    )
    patient = client.with_options(max_retries=10)
    assert [ask(seed, QUICK, patient) for seed in range(4)] == [0, 1, 2, 3]
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0, log_of(log)
    until(lambda: not replicas(process.pid))
  finally:
    process.kill()
    process.wait()
    process.stdout.close()
    log.close()


def log_of(log):
  log.seek(0)
  return log.read()


def free_port():

  with socket.socket() as at:
    at.bind(("127.0.0.1", 0))
    return at.getsockname()[1]
