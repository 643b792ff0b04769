"""The launch scripts for pods: what they show is what they do, and it fits together."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
TRAIN = ["--config=configs/quickstart/low.py", "--workdir=/shared/a run"]
TRAINS = shlex.join(["-m", "pixsigma_jax.train", *TRAIN])

# Every option that has no default, and what the script must end up giving to whom.
SCRIPTS = {
  "one_box.sh": [],
  "slurm.sh": ["--nodes=2"],
  "tpu_vm.sh": ["--name=pod", "--zone=z", "--type=v5litepod-64", "--share=host:/data"],
  "gke_xpk.sh": [
    *("--cluster=c", "--project=p", "--zone=z", "--type=v5litepod-64"),
    "--storage=disk",
  ],
}
TOOLS = ("gcloud", "git", "python", "sbatch", "xpk")
# Writes down what it was asked, and ends as it is told, as often as it is told.
TOOL = """#!/bin/bash
printf '%s\\0' "$(basename "$0")" "$@" >> "$LOG"; printf '\\n' >> "$LOG"
case "$*" in
  *describe*) [[ ! -e $LOG.asked ]] || echo ACTIVE; touch "$LOG.asked" ;;
  *train*) place="$CUDA_VISIBLE_DEVICES|$JAX_PROCESS_ID/$JAX_NUM_PROCESSES"
    echo "$place" >> "$LOG.where"
    if [[ -e $LOG.waits ]]; then trap 'exit 143' TERM
      for ((i = 0; i < 200; i++)); do sleep 0.1; done; fi
    if [[ -s $LOG.codes ]]; then code=$(head -1 "$LOG.codes"); sed -i 1d "$LOG.codes"
      exit "$code"; fi ;;
esac
"""


class Machine:
  """A clone, and the tools of a cluster that does not exist."""

  def __init__(self, tmp_path):
    self.log = tmp_path / "log"
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in TOOLS:
      (tools / name).write_text(TOOL)
      (tools / name).chmod(0o755)
    shutil.copytree(ROOT / "launch", tmp_path / "clone" / "launch")
    self.root = tmp_path / "clone"
    self.environment = {
      "PATH": f"{tools}:{os.environ['PATH']}",
      "LOG": str(self.log),
      "TMPDIR": str(tmp_path),
      "PIXSIGMA_PYTHON": "python",
    }

  def start(self, script, *arguments, train=TRAIN):
    return subprocess.Popen(
      ["bash", f"launch/{script}", *arguments, *(["--", *train] if train else [])],
      cwd=self.root,
      env=self.environment,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )

  def run(self, script, *arguments, train=TRAIN):
    process = self.start(script, *arguments, train=train)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err

  def asked(self):
    """Commands that were really given, word by word."""
    if not self.log.exists():
      return []
    commands = self.log.read_text().removesuffix("\0\n").split("\0\n")
    return [command.split("\0") for command in commands]


@pytest.fixture
def machine(tmp_path):
  return Machine(tmp_path)


def shown(out):
  """Commands that a script printed, as a shell reads them; each begins a step."""
  steps = re.split(r"^── .*\n", out, flags=re.MULTILINE)[1:]
  return [shlex.split(step) for step in steps if step.startswith("   ")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_shows_the_training_and_does_nothing(machine, script):
  code, out, err = machine.run(script, *SCRIPTS[script], "--dry_run")
  assert (code, err) == (0, "")
  assert machine.asked() == []
  assert not (machine.root / "logs").exists()
  said = [word for command in shown(out) for word in [*command, shlex.join(command)]]
  assert any(TRAINS in word for word in said)


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_shown_is_what_is_done(machine, script):
  code, out, err = machine.run(script, *SCRIPTS[script])
  assert (code, err) == (0, "")
  done = [c for c in machine.asked() if "describe" not in c]
  commands = [c for c in shown(out) if c[0] != "mkdir"]
  assert done == [c[1:] if c[0] == "env" else c for c in commands]
  assert any(TRAINS in shlex.join(c) or TRAINS in c[-1] for c in done)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_mistake_is_named_before_anything_is_done(machine, script):
  given = SCRIPTS[script]
  code, _, err = machine.run(script, *given, "--workdir=x")
  assert code == 1
  assert err.startswith("Error: There is no --workdir; the options are dry_run ")
  code, _, err = machine.run(script, *given, train=[])
  assert (code, err[:31]) == (1, "Error: What to train is missing")
  code, _, err = machine.run(script, *given, "x")
  assert (code, err[:35]) == (1, "Error: x is no --NAME=VALUE. What i")
  if script in ("tpu_vm.sh", "gke_xpk.sh"):
    code, _, err = machine.run(script, *given[:-1])
    missing = given[-1].partition("=")[0]
    assert (code, err) == (1, f"Error: {missing}=… is missing (--help tells more).\n")
  assert machine.asked() == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_tells_every_option(machine, script):
  code, out, _ = machine.run(script, "--help", train=[])
  text = (ROOT / "launch" / script).read_text()
  [names] = re.findall(r"^options ((?:.|\\\n)*?)-- ", text, re.MULTILINE)
  assert code == 0
  for name in [*names.replace("\\\n", "").split(), "dry_run"]:
    assert f"--{name}" in out


def test_a_box_starts_again_what_ended_in_an_error_and_not_what_was_stopped(machine):
  (machine.root / "../log.codes").write_text("1\n137\n143\n")
  code, out, _ = machine.run("one_box.sh", "--pause=0")
  assert code == 143
  assert len(machine.asked()) == 3
  assert "Ended with code 137; goes on from its newest checkpoint in 0 s" in out

  machine.log.unlink()
  (machine.root / "../log.codes").write_text("1\n1\n1\n")
  assert machine.run("one_box.sh", "--pause=0", "--restarts=1")[0] == 1
  assert len(machine.asked()) == 2


def test_a_box_gives_each_process_its_own_gpu(machine):
  assert machine.run("one_box.sh", "--processes=3")[0] == 0
  where = (machine.root / "../log.where").read_text().splitlines()
  assert sorted(where) == ["0|0/3", "1|1/3", "2|2/3"]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_box_that_is_told_to_stop_tells_its_processes(machine, processes):
  (machine.root / "../log.waits").touch()
  box = machine.start("one_box.sh", f"--processes={processes}")
  try:
    until = time.monotonic() + 30
    where = machine.root / "../log.where"
    while not where.exists() or len(where.read_text().splitlines()) < processes:
      assert time.monotonic() < until
      time.sleep(0.02)
    time.sleep(0.3)  # until the trap is set
    box.send_signal(signal.SIGTERM)
    assert box.wait(30) == 143
  finally:
    box.kill()
    box.communicate()


def test_a_pod_is_asked_for_once_and_trains_on_every_slice(machine):
  given = [*SCRIPTS["tpu_vm.sh"], "--slices=2", "--pause=0"]
  assert machine.run("tpu_vm.sh", *given)[0] == 0
  created = [c for c in machine.asked() if "create" in c]
  assert len(created) == 1
  assert {"--node-prefix=pod", "--node-count=2"} <= set(created[0])
  trained = [c[5] for c in machine.asked() if "pixsigma_jax.train" in c[-1]]
  assert sorted(trained) == ["pod-0", "pod-1"]

  machine.log.unlink()
  assert machine.run("tpu_vm.sh", *given)[0] == 0
  assert not [c for c in machine.asked() if "create" in c]


def test_a_slurm_job_of_some_error_is_queued_again_a_number_of_times(machine, tmp_path):
  assert machine.run("slurm.sh", "--nodes=2", "--restarts=3")[0] == 0
  [submitted] = machine.asked()
  assert {"--requeue", "--signal=TERM@300", "--ntasks-per-node=8"} <= set(submitted)
  [job] = [word.partition("=")[2] for word in submitted if word.startswith("--wrap=")]
  tools = tmp_path / "bin"
  (tools / "srun").write_text('#!/bin/sh\necho "$PIXSIGMA_HOSTS"\nexit $CODE\n')
  (tools / "scontrol").write_text(
    '#!/bin/sh\n[ "$1" = show ] && printf "a\\nb\\n" || echo "$@"\n'
  )
  for tool in ("srun", "scontrol"):
    (tools / tool).chmod(0o755)

  def run(code, restarts):
    variables = {"CODE": code, "SLURM_RESTART_COUNT": restarts, "SLURM_JOB_ID": "7"}
    done = subprocess.run(
      ["sh", "-c", job],
      env=machine.environment | variables,
      capture_output=True,
      text=True,
    )
    return done.returncode, done.stdout.split("\n")[:-1]

  assert run("0", "0") == (0, ["a,b"])
  assert run("143", "2") == (143, ["a,b", "requeue 7"])
  assert run("1", "3") == (1, ["a,b"])
