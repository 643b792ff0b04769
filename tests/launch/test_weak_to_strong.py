"""The chain of stages by one command: its order, what it skips, and how it stops."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from pixsigma_jax import checkpoint
from pixsigma_jax.metadata import Metadata
from pixsigma_jax.train.status import status
from tests.launch.test_quickstart import ROOT
from tests.train import runs

CHAIN = [
  *("stage_256_vae", "stage_256_align", "stage_512"),
  *("stage_1k", "stage_2k", "stage_4k"),
]

# In the place of Python: writes down what it is asked to train, and takes a file in
# `done/` for a stage that is done. A training ends at once, or in the way that a file
# `dies` or `hangs` says.
PYTHON = """#!/usr/bin/env bash
for word in "$@"; do
  case $word in --workdir=*) stage=$(basename "${word#*=}") ;; esac
done
case "$*" in
  *--dry_run*)
    if [[ -e refuses ]]; then echo "Error: config.optimiser is unknown" >&2; exit 1; fi
    if [[ -e done/$stage ]]; then echo "done: $stage has all its 7 steps"
    else echo "open: $stage starts from its parent"; fi
    ;;
  *)
    printf '%s\\n' "$*" >>log
    if [[ -e dies ]]; then exit 3; fi
    if [[ -e unfinished ]]; then exit 0; fi
    if [[ -e hangs ]]; then
      trap 'echo saved >>log; exit 143' TERM
      touch hanging
      while true; do sleep 0.05; done
    fi
    touch "done/$stage"
    ;;
esac
"""


@pytest.fixture
def clone(tmp_path):
  """A checkout whose Python is the one above."""
  for folder in ("launch", "configs", "done"):
    (tmp_path / folder).mkdir()
  for name in ("weak_to_strong.sh", "venv.sh"):
    shutil.copy(ROOT / "launch" / name, tmp_path / "launch")
  for file in (ROOT / "configs").glob("*.py"):
    (tmp_path / "configs" / file.name).touch()
  (tmp_path / "python").write_text(PYTHON)
  (tmp_path / "python").chmod(0o755)
  return tmp_path


def command(*arguments):
  return ["bash", "launch/weak_to_strong.sh", *arguments]


def environment(clone, **more):
  return os.environ | {"PIXSIGMA_PYTHON": str(clone / "python")} | more


def launch(clone, *arguments, **more):
  return subprocess.run(
    command(*arguments),
    cwd=clone,
    env=environment(clone, **more),
    capture_output=True,
    text=True,
    timeout=60,
  )


def trained(clone):
  log = clone / "log"
  return (
    [shlex.split(line) for line in log.read_text().splitlines()] if log.exists() else []
  )


def test_it_trains_all_stages_in_order_each_in_its_own_workdir(clone):
  done = launch(clone, "--config.mesh.fsdp=4", "--config.log.every=1")
  assert done.returncode == 0, done.stderr
  assert trained(clone) == [
    [
      *("-m", "pixsigma_jax.train"),
      f"--config=configs/{stage}.py",
      f"--workdir=runs/weak_to_strong/{stage}",
      *("--config.mesh.fsdp=4", "--config.log.every=1"),
    ]
    for stage in CHAIN
  ]
  assert done.stdout.endswith("── The chain has ended: runs/weak_to_strong\n")


def test_it_says_what_it_skips_because_it_is_done(clone):
  for stage in CHAIN[:4]:
    (clone / "done" / stage).touch()
  done = launch(clone)
  assert [arguments[3].rpartition("/")[2] for arguments in trained(clone)] == CHAIN[4:]
  for stage in CHAIN[:4]:
    assert f"── Skipping {stage}, done: {stage} has all its 7 steps.\n" in done.stdout
  assert "Skipping stage_2k" not in done.stdout


def test_a_dry_run_prints_what_it_would_run_and_runs_nothing(clone):
  (clone / "done" / "stage_256_vae").touch()
  done = launch(clone, "--dry_run", "--config.seed=3")
  assert done.returncode == 0, done.stderr
  assert trained(clone) == []
  lines = done.stdout.splitlines()
  assert lines[0].startswith("── Skipping stage_256_vae")
  assert len(lines) == 1 + 2 * 5
  assert lines[2].endswith(
    "python -m pixsigma_jax.train --config=configs/stage_256_align.py "
    "--workdir=runs/weak_to_strong/stage_256_align --config.seed=3"
  )


def test_stages_can_be_chosen_with_their_arguments(clone):
  launch(clone, "stage_1k:full", "stage_2k:full")
  assert [arguments[2:] for arguments in trained(clone)] == [
    [
      f"--config=configs/{stage}.py:full",
      f"--workdir=runs/weak_to_strong/{stage}_full",
    ]
    for stage in ("stage_1k", "stage_2k")
  ]


def test_another_script_may_do_the_training(clone):
  launch(clone, "stage_4k", TRAIN=f"{clone}/python launch/one_box.sh --processes=8 --")
  assert [arguments[:3] for arguments in trained(clone)] == [
    ["launch/one_box.sh", "--processes=8", "--"]
  ]


@pytest.mark.parametrize(
  ("file", "code", "message"),
  [
    ("dies", 3, ""),
    ("refuses", 1, "config.optimiser is unknown"),
    (
      "unfinished",
      1,
      "The training of stage_256_vae returned, and open: stage_256_vae",
    ),
  ],
)
def test_the_chain_ends_where_a_stage_does_not(clone, file, code, message):
  (clone / file).touch()
  done = launch(clone)
  assert done.returncode == code
  assert message in done.stderr
  assert len(trained(clone)) == (file != "refuses")


def test_a_stage_that_there_is_not_is_named_before_anything_runs(clone):
  done = launch(clone, "stage_256_vae", "stage_3k")
  assert done.returncode == 1
  assert "There is no stage stage_3k: configs/stage_3k.py does not" in done.stderr
  assert trained(clone) == []


@pytest.fixture
def interruptible():
  """Children take SIGINT, even of a suite that a shell has in the background."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
  ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_a_signal_reaches_the_training_and_ends_the_chain(
  interruptible, clone, number, code
):
  (clone / "hangs").touch()
  process = subprocess.Popen(
    command(), cwd=clone, env=environment(clone), start_new_session=True
  )
  try:
    deadline = time.monotonic() + 30
    while not (clone / "hanging").exists():
      assert time.monotonic() < deadline
      time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(timeout=30) == code
  finally:
    if process.poll() is None:
      os.killpg(process.pid, signal.SIGKILL)
      process.wait()
  lines = (clone / "log").read_text().splitlines()
  assert len(lines) == 2  # one stage, which had the time to save
  assert lines[1] == "saved"
  (clone / "hangs").unlink()
  assert launch(clone).returncode == 0  # and goes on where it was
  assert trained(clone)[2][2] == "--config=configs/stage_256_vae.py"
  assert len(trained(clone)) == 2 + 6


# What the trainer says, by what lies in the workdir.


@pytest.fixture(scope="module")
def config():
  return runs.low("no data is looked at", total_steps=6).to_dict()


def _snapshot(workdir, step, stage="quickstart/low"):
  about = Metadata(
    stage=stage,
    model={},
    autoencoder={},
    scaling_factor=1.0,
    text_encoder={},
    resolution=8,
  )
  checkpoint.save_snapshot(
    workdir, step, params={"w": np.ones(2)}, null_caption=None, metadata=about
  )


def test_a_stage_is_done_when_its_last_snapshot_is_there(config, tmp_path):
  run = tmp_path / "run"
  fresh = f"open: {run} starts from fresh parameters"
  assert status(config, run) == fresh
  assert not run.exists()  # asking leaves nothing behind
  (run / "checkpoints" / "4").mkdir(parents=True)
  (run / "checkpoints" / "6.orbax-checkpoint-tmp-1").mkdir()
  assert status(config, run) == f"open: {run} goes on from step 4 of 6"
  (run / "checkpoints" / "6").mkdir()
  _snapshot(run, 3)
  assert status(config, run) == f"open: {run} goes on from step 6 of 6"
  _snapshot(run, 6)
  assert status(config, run) == f"done: {run} has all its 6 steps"
  longer = config | {"total_steps": 8}
  assert status(longer, run) == f"open: {run} goes on from step 6 of 8"
  other = config | {"stage": "another"}
  with pytest.raises(ValueError, match="is a run of the stage 'quickstart/low', and"):
    status(other, run)


def test_a_stage_that_has_not_begun_names_its_parent(config, tmp_path):
  run, parent = tmp_path / "run", tmp_path / "parent"
  child = config | {"init": {"parent": str(parent), "transforms": ()}}
  line = f"open: {run} starts from {parent}, which is not there yet"
  assert status(child, run) == line
  _snapshot(parent, 6)
  assert status(child, run) == f"open: {run} starts from {parent}/snapshots/6"
  # Its own beginning is no progress.
  _snapshot(run, 0)
  assert status(child, run) == f"open: {run} starts from {parent}/snapshots/6"


def test_the_trainer_says_it_with_dry_run(tmp_path):
  done = subprocess.run(
    [
      *(sys.executable, "-m", "pixsigma_jax.train", "--dry_run"),
      *("--config=configs/stage_4k.py:uhd", f"--workdir={tmp_path}"),
      f"--config.init.parent={tmp_path}/2k",
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  parent = f"{tmp_path}/2k, which is not there yet, through interpolate_pe"
  assert done.stdout == f"open: {tmp_path} starts from {parent}\n"
