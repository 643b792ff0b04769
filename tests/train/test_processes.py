"""Several real processes train stage_4k as one does, and come and go as one."""

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from configs import stage_2k, stage_4k
from pixsigma_jax import checkpoint
from pixsigma_jax.data.mixture import open_mixture
from pixsigma_jax.models.pixart import init_params
from pixsigma_jax.train import compatibility
from pixsigma_jax.train.config import model_config
from tests import compilation
from tests.train import runs

SILENCE = 30  # seconds of a machine; a process that is gone is noticed at once
SECONDS = 600  # of patience with one job, on a machine that does much else
FSDP = {"mesh.fsdp": 2}
BOTH = {"mesh.fsdp": 2, "mesh.context": 2}
LONG = 1000  # steps: until it is stopped, but not for ever if nobody does
# The stage at a nano model's size and on a few tokens, for as long as it is let.
STAGE = """
from configs import stage_4k
from tests.train import runs

CHANGES = {
  "total_steps": %d,
  # The order of sums is all that is to differ between one process and several.
  "compute.dtype": "float32",
  "compute.attention": "xla",  # compiled in half the time
  "compute.remat": "none",
  "checkpoint.every": 2,
  "checkpoint.keep_last": 2,
  "checkpoint.snapshot_every": 0,
}


def get_config():
  return runs.shrink(stage_4k.get_config(), %r, %r, CHANGES)
"""


def _records(directory, config):
  model = model_config(runs.shrink(config, "").model.to_dict())
  return runs.prepare_features(directory, model, ((16, 16), (8, 20)))


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
  """A config file, its parent a stage_2k of nothing but noise."""
  directory = tmp_path_factory.mktemp("stage")
  parent = stage_2k.get_config()
  config = runs.shrink(parent, _records(directory / "2k", parent)).to_dict()
  mixture = open_mixture(
    [config["data"]["path"]], weights=(), holdout=0.0, split="train"
  )
  model = model_config(config["model"])
  null_caption = mixture.null_caption[: model.caption_length]
  checkpoint.save_snapshot(
    directory / "parent",
    1,
    params=init_params(model, jax.random.key(0)),
    null_caption=null_caption.astype(np.float32),
    metadata=compatibility.metadata_of(config, model, mixture, None),
  )
  path = directory / "stage_4k.py"
  data = _records(directory / "4k", stage_4k.get_config())
  path.write_text(STAGE % (LONG, str(data), str(directory / "parent")))
  return path


def _flags(stage, workdir, **changes):
  fields = changes.pop("mesh") | changes
  return [
    f"--config={stage}",
    f"--workdir={workdir}",
    *(f"--config.{name}={value}" for name, value in fields.items()),
  ]


def _free_port():
  with socket.create_server(("localhost", 0)) as server:
    return server.getsockname()[1]


class Job:
  """Processes of one device each; none of them outlives the `with`."""

  def __init__(self, count, arguments, logs):
    self.count, self.arguments = count, arguments
    self.logs = [logs.with_suffix(f".{index}.log") for index in range(count)]
    self.processes = []

  def __enter__(self):
    address = f"localhost:{_free_port()}"
    for index, log in enumerate(self.logs):
      with log.open("w") as output:
        process = subprocess.Popen(
          [
            *(sys.executable, "-m", "pixsigma_jax.train", *self.arguments),
            f"--coordinator_address={address}",
            f"--num_processes={self.count}",
            f"--process_id={index}",
            f"--startup_timeout={SECONDS}",
            f"--silence_timeout={SILENCE}",
          ],
          cwd=runs.ROOT,
          env=os.environ
          | compilation.environment()
          | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
          },
          stdout=output,
          stderr=output,
        )
      self.processes.append(process)
    return self

  def __exit__(self, *_):
    for process in self.processes:
      with contextlib.suppress(ProcessLookupError):
        process.kill()
      process.wait()

  def text(self, index):
    return self.logs[index].read_text()

  def codes(self):
    """Exit codes, once all have ended."""
    until = time.monotonic() + SECONDS
    while any(p.poll() is None for p in self.processes):
      assert time.monotonic() < until, "\n".join(map(self.text, range(self.count)))
      time.sleep(0.05)
    return [p.returncode for p in self.processes]

  def wait_for_step(self, step):
    until = time.monotonic() + SECONDS
    while not any(int(s) >= step for s in re.findall(r"\] step (\d+)/", self.text(0))):
      assert all(p.poll() is None for p in self.processes), self.text(0)
      assert time.monotonic() < until, self.text(0)
      time.sleep(0.01)


@pytest.fixture(scope="module")
def stopped(stage, tmp_path_factory):
  """Two processes until one of them was told to stop; the step that they came to."""
  workdir = tmp_path_factory.mktemp("runs") / "stopped"
  with Job(2, _flags(stage, workdir, mesh=FSDP), workdir) as job:
    job.wait_for_step(6)
    job.processes[1].send_signal(signal.SIGTERM)
    codes = job.codes()
  assert codes == [128 + signal.SIGTERM] * 2, job.text(0) + job.text(1)
  return workdir, job, runs.steps(workdir)[-1]


@pytest.fixture(scope="module")
def alone(stage, stopped, tmp_path_factory):
  """One process with one device, for as many steps."""
  workdir = tmp_path_factory.mktemp("runs") / "alone"
  spec = importlib.util.spec_from_file_location("shrunk_stage_4k", stage)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
  config.total_steps = stopped[2]
  runs.train(config, workdir)
  return workdir


def _losses(workdir):
  return [line["loss"] for line in runs.metrics(workdir)]


def test_told_to_stop_in_one_process_all_stop_after_the_same_step(stopped):
  workdir, job, step = stopped
  assert re.findall(r"Stopped by SIGTERM at step (\d+), which", job.text(0)) == [
    str(step)
  ]
  assert len(runs.metrics(workdir)) == step


def test_two_processes_train_as_one_does(stopped, alone):
  # The order of sums differs, and 1e-5 is what the issue of several machines allows.
  np.testing.assert_allclose(_losses(stopped[0]), _losses(alone), rtol=0, atol=1e-5)


def test_only_the_first_process_speaks_and_writes_metrics(stopped):
  workdir, job, step = stopped
  assert "Together: processes 0 (" in job.text(0)
  # Gloo and the notice of a signal are not ours to silence.
  said = [
    line
    for line in job.text(1).splitlines()
    if not re.match(r"\[Gloo\]|W.* preemption_notifier", line)
  ]
  assert said == []
  assert [line["step"] for line in runs.metrics(workdir)] == list(range(1, step + 1))


def test_one_is_killed_the_other_ends_and_the_restarted_job_is_the_same_job(
  stage, stopped, tmp_path
):
  whole, _, step = stopped
  torn = tmp_path / "torn"

  with Job(2, _flags(stage, torn, mesh=FSDP), tmp_path / "killed") as job:
    job.wait_for_step(3)
    while not runs.steps(torn):  # it is written in the background
      assert job.processes[0].poll() is None
      time.sleep(0.1)
    job.processes[1].kill()
    killed = time.monotonic()
    assert job.processes[0].wait(SECONDS) == 1
    assert time.monotonic() - killed < SILENCE
  last = job.text(0).splitlines()[-1]
  assert re.match(r"Error: Process 1 on .* is gone without a word: killed", last)
  assert "The same command in all 2 processes goes on from the newest" in last
  assert "Traceback" not in job.text(0)
  saved = runs.steps(torn)[-1]
  assert saved < step

  flags = _flags(stage, torn, mesh=FSDP, total_steps=step)
  with Job(2, flags, tmp_path / "again") as job:
    assert job.codes() == [0, 0], job.text(0) + job.text(1)
  assert f"Resuming {torn} from step {saved}" in job.text(0)
  runs.assert_same(runs.arrays(torn, step), runs.arrays(whole, step))
  assert runs.measured(torn) == runs.measured(whole)
  assert runs.steps(torn, "snapshots") == [0, step]


def test_four_processes_of_which_two_share_each_image_train_as_one_does(
  stage, alone, tmp_path
):
  flags = _flags(stage, tmp_path / "run", mesh=BOTH, total_steps=4)
  with Job(4, flags, tmp_path / "run") as job:
    assert job.codes() == [0] * 4, "\n".join(map(job.text, range(4)))
  np.testing.assert_allclose(
    _losses(tmp_path / "run"), _losses(alone)[:4], rtol=0, atol=1e-5
  )


def test_two_processes_look_at_their_run_as_one_does_and_keep_their_own_shards(
  data, tmp_path
):
  local, pair, one = (tmp_path / name for name in ("local", "pair", "one"))
  changes = {
    "total_steps": 3,
    "checkpoint__every": 0,
    "data__holdout": 0.2,
    "validation__every": 3,
    "validation__examples": 8,
    "log__sample_every": 3,
    "log__prompts": ("a red seven",),
    "log__sample_set__every": 3,
    "log__sample_set__count": 2,
  }
  runs.train(runs.low(data, **changes), one)
  changes |= {
    "mesh__fsdp": 2,
    "checkpoint__local": str(local),
    "checkpoint__local_every": 1,
  }
  flags = runs.flags(data, pair, **changes)
  with Job(2, flags, pair) as job:
    assert job.codes() == [0, 0], job.text(0) + job.text(1)
  have, want = (runs.metrics(workdir)[-1] for workdir in (pair, one))
  for name in ("loss", "validation/loss"):
    assert have[name] == pytest.approx(want[name], rel=1e-5)
  for name in ("samples/00000003.png", "sample_sets/00000003/000000.png"):
    images = [np.asarray(Image.open(w / name), np.int32) for w in (pair, one)]
    # Sums in another order move a number at most over the border to the next level.
    assert np.abs(images[0] - images[1]).max() <= 1
  assert {p.name for p in (pair / "sample_sets" / "00000003").iterdir()} == {
    p.name for p in (one / "sample_sets" / "00000003").iterdir()
  }

  disks = [next(local.glob(f"{index}_of_2_*")) for index in range(2)]
  assert [runs.steps(disk) for disk in disks] == [[2, 3], [2, 3]]
  shards, whole = (
    sum(f.stat().st_size for f in (d / "checkpoints" / "3" / "state").rglob("*"))
    for d in (disks[1], pair)
  )
  assert shards < 0.75 * whole  # kernels in halves, the rest whole

  # Ended as process 1 was saving step 3: it is no step that both have.
  end = runs.arrays(pair, 3)
  shutil.rmtree(disks[1] / "checkpoints" / "3")
  shutil.rmtree(pair / "checkpoints" / "3")
  with Job(2, flags, tmp_path / "again") as job:
    assert job.codes() == [0, 0], job.text(0) + job.text(1)
  assert f"Resuming {pair} from step 2." in job.text(0)
  runs.assert_same(runs.arrays(pair, 3), end)
  assert [runs.steps(disk) for disk in disks] == [[2, 3], [2, 3]]
