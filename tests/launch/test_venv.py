"""The environment that the launch scripts make: once, whole, and again when broken."""

import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]

# Stands in for Python: makes an environment out of a copy of itself, and writes down
# what it was asked to do. Files beside the log make its pip fail or take its time, or
# its venv module missing.
PYTHON = """#!/bin/sh
log={log}
case "$*" in
  *"-m venv"*)
    echo venv >>"$log"
    mkdir -p .venv/bin; rm -f .venv/installed*; cp "$0" .venv/bin/python ;;
  *"-m pip"*)
    echo "pip ${{0##*/}} ${{*##* }}" >>"$log"
    case "$*" in *"--constraint constraints.txt"*) ;; *) exit 1 ;; esac
    if [ -e "$log.slow" ]; then sleep 0.5; fi
    if [ -e "$log.failing" ]; then echo half >.venv/half; exit 1; fi ;;
  *version_info\\[*) echo {version} ;;
  *version_info*) [ {version} != 3.10.1 ] ;;
  *ensurepip*) [ ! -e "$log.bare" ] ;;
esac
"""


class Clone:
  """A clean clone whose `python3` only writes down what it is asked to do."""

  def __init__(self, folder):
    self.root, self.log = folder / "a clone", folder / "log"
    (self.root / "launch").mkdir(parents=True)
    shutil.copy(ROOT / "launch" / "venv.sh", self.root / "launch")
    for name in ["requirements.txt", "pyproject.toml", "constraints.txt"]:
      shutil.copy(ROOT / name, self.root)
    (folder / "bin").mkdir()
    self.add_python("python3", "3.11.7")
    self.path = f"{folder / 'bin'}:/usr/bin:/bin"

  def add_python(self, name, version):
    python = self.log.parent / "bin" / name
    python.write_text(PYTHON.format(log=self.log, version=version))
    python.chmod(0o755)

  def flag(self, name):
    return self.log.with_name(f"log.{name}")

  def make(self, extra="", **environment):
    """Runs make_venv; returns its exit status, what it said, and what was done."""
    self.log.write_text("")
    process = self.start(extra, **environment)
    _, said = process.communicate()
    return process.returncode, said, self.log.read_text().splitlines()

  def start(self, extra="", **environment):
    return subprocess.Popen(
      ["bash", "-euc", f'source "{self.root}/launch/venv.sh"; make_venv {extra}'],
      cwd="/",  # any folder will do
      env={"PATH": self.path, **environment},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )


@pytest.fixture
def clone(tmp_path):
  return Clone(tmp_path)


def test_the_second_run_has_nothing_to_do(clone):
  assert clone.make("dev") == (0, "", ["venv", "pip python .[dev]"])
  assert clone.make("dev") == (0, "", [])
  assert clone.make() == (0, "", [])  # what runs is part of what is tested


def test_what_tests_need_is_added_to_what_runs(clone):
  assert clone.make() == (0, "", ["venv", "pip python ."])
  assert clone.make("dev") == (0, "", ["pip python .[dev]"])


def test_a_changed_requirement_is_installed_into_the_same_environment(clone):
  clone.make("dev")
  for changed in ("requirements.txt", "constraints.txt"):
    with open(clone.root / changed, "a") as file:
      file.write("six==1.17.0\n")
    assert clone.make("dev") == (0, "", ["pip python .[dev]"])
    assert clone.make("dev") == (0, "", [])


def test_an_interrupted_install_is_made_anew(clone):
  clone.flag("failing").touch()
  status, said, _ = clone.make("dev")
  assert status == 1
  assert "The same command tries again" in said

  clone.flag("failing").unlink()
  assert clone.make("dev") == (0, "", ["venv", "pip python .[dev]"])
  assert clone.make("dev") == (0, "", [])


@pytest.mark.skipif(shutil.which("flock") is None, reason="macOS has no flock")
def test_of_two_commands_at_once_one_makes_it_and_the_other_waits(clone):
  clone.flag("slow").touch()
  both = [clone.start("dev"), clone.start("dev")]
  assert [process.communicate()[1] for process in both] == ["", ""]
  assert [process.returncode for process in both] == [0, 0]
  assert clone.log.read_text().splitlines() == ["venv", "pip python .[dev]"]


def test_an_environment_whose_python_is_gone_is_made_anew(clone):
  clone.make()
  (clone.root / ".venv" / "bin" / "python").unlink()
  assert clone.make() == (0, "", ["venv", "pip python ."])


def test_another_python_can_be_named(clone):
  clone.make()
  clone.add_python("python3.12", "3.12.1")
  assert clone.make(PYTHON="python3.12") == (0, "", ["venv", "pip python ."])
  assert clone.make(PYTHON="python3.12") == (0, "", [])
  assert clone.make() == (0, "", [])  # and stays until another one is named


def test_an_old_python_is_refused_with_the_way_out(clone):
  clone.add_python("python3", "3.10.1")
  status, said, done = clone.make()
  assert (status, done) == (1, [])
  assert "python3 is Python 3.10.1, and 3.11 or newer is needed" in said
  assert "PYTHON=python3.12" in said


def test_a_python_without_venv_is_refused_with_the_way_out(clone):
  clone.flag("bare").touch()
  status, said, done = clone.make()
  assert (status, done) == (1, [])
  assert "apt install python3-venv" in said


def test_a_missing_python_is_named(clone):
  status, said, done = clone.make(PYTHON="python3.99")
  assert (status, done) == (1, [])
  assert "There is no python3.99 here" in said
