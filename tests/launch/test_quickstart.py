"""The quickstart and the README: every command they name is one that can be given."""

import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from configs.quickstart import compressed, high, low
from pixsigma_jax.data import digits
from pixsigma_jax.evaluate.digits import prompt_accuracy
from pixsigma_jax.sample import image_files
from pixsigma_jax.sample.pipeline import Pipeline
from pixsigma_jax.sample.program import compute_here

ROOT = pathlib.Path(__file__).parents[2]

# In the place of launch/venv.sh: no installation, and a Python that only writes down
# what it is asked to run.
VENV = """
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/python
make_venv() { :; }
die() { echo "$*" >&2; exit 1; }
"""


def commands(root, *arguments):
  """What the script runs, command by command."""
  (root / "launch").mkdir()
  shutil.copy(ROOT / "launch" / "quickstart.sh", root / "launch")
  (root / "launch" / "venv.sh").write_text(VENV)
  (root / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$*" >> log\n')
  (root / "python").chmod(0o755)
  script = ["bash", "launch/quickstart.sh", *arguments]
  done = subprocess.run(script, cwd=root, capture_output=True, text=True)
  if done.returncode:
    return done.stderr
  return [
    shlex.split(line.removeprefix("-m pixsigma_jax."))
    for line in (root / "log").read_text().splitlines()
  ]


@pytest.fixture(scope="module")
def script(tmp_path_factory):
  return commands(tmp_path_factory.mktemp("clone"))


def given(arguments, name):
  return [a.partition("=")[2] for a in arguments if a.startswith(f"--{name}=")]


def test_it_runs_the_chain_in_order(script):
  assert [command for command, *_ in script] == (
    ["prepare", "train", "prepare"] + ["train"] * 4 + ["evaluate", "sample"]
  )


def test_each_stage_finds_its_data_and_its_parent(script):
  configs = {
    "low.py": low.get_config(),
    "high.py": high.get_config(),
    "high.py:extended": high.get_config("extended"),
    "compressed.py": compressed.get_config(),
    "compressed.py:random": compressed.get_config("random"),
  }
  there, snapshots = set(), set()
  for command, *arguments in script:
    if command == "prepare":
      there.update(given(arguments, "output"))
    if command == "train":
      [file], [workdir] = given(arguments, "config"), given(arguments, "workdir")
      config = configs.pop(file.rpartition("/")[2])
      assert config.data.path in there
      assert config.init.parent in {*there, ""}
      there.add(workdir)
      every = config.checkpoint.snapshot_every or config.total_steps
      first = 0 if config.init.parent else every  # a parent after its transform
      steps = {*range(first, config.total_steps, every), config.total_steps}
      snapshots.update(f"{workdir}/snapshots/{step}" for step in steps)
    if command in ("evaluate", "sample"):
      paths = given(arguments, "checkpoints" if command == "evaluate" else "checkpoint")
      assert {*paths[0].split(",")} <= there | snapshots
  assert not configs


def test_an_image_takes_no_training(script, tmp_path):
  [[command, *arguments]] = commands(tmp_path, "--picture")
  assert command == "sample"
  assert given(arguments, "checkpoint") == ["weights/miniature"]
  [*_, [_, *whole]] = script
  own = {"checkpoint", "output"}
  assert {a for a in arguments if a.partition("=")[0].strip("-") not in own} == {
    a for a in whole if a.partition("=")[0].strip("-") not in own
  }


def test_what_the_script_does_not_know_is_refused_before_anything_is_installed(
  tmp_path,
):
  assert commands(tmp_path, "--pictures") == (
    "There is no --pictures: give nothing, or --picture to draw without training.\n"
  )


def test_the_miniature_that_ships_draws_what_it_is_asked_for():
  lines = (ROOT / "configs" / "quickstart" / "prompts.txt").read_text().splitlines()
  scenes = [digits.parse(line) for line in lines[:3]]
  pipeline = Pipeline.from_checkpoint(
    ROOT / "weights" / "miniature", compute=compute_here("float32"), batch_size=3
  )
  side = pipeline.resolution
  drawn = pipeline(lines[:3], height=side, width=side, seed=1).images
  images = [image_files.from_image(image) for image in drawn]
  # 98 per cent of single digits are right, by benchmark; these three always.
  assert prompt_accuracy(images, scenes).all()


def readme_commands():
  text = (ROOT / "README.md").read_text().replace("\\\n", "")
  for line in re.findall(r"^.*python -m pixsigma_jax\..*$", text, re.MULTILINE):
    if "`" not in line:  # the table names commands, it does not give them
      yield shlex.split(line.partition("pixsigma_jax.")[2])


def test_the_readme_gives_commands():
  assert [command for command, *_ in readme_commands()] == [
    "sample",
    "convert",
    "sample",
    "curate",
    "prepare",
    "train",
  ]


# Of train, the flags are the config files that test_configs.py runs.
def test_every_flag_is_one_that_its_command_knows(script):
  for command, *arguments in [*script, *readme_commands()]:
    if command != "train":
      module = f"pixsigma_jax.{command}"
      subprocess.run(
        [sys.executable, "-m", module, *arguments, "--only_check_args"],
        cwd=ROOT,
        check=True,
      )
