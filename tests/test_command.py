"""Commands: one line for a mistake of the user's, a traceback for one of ours."""

import logging
import os
import pathlib
import signal
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from absl import flags
from absl import logging as absl_logging

from pixsigma_jax import command
from pixsigma_jax.data.records import open_dataset
from pixsigma_jax.models.pixels import PixelAutoencoder


@pytest.fixture
def run(monkeypatch, capsys):
  """Runs a main function as a command does, with arguments."""

  def run(main, *arguments):
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    command.run(main)

  yield run
  flags.FLAGS.unparse_flags()


def wrong_data(_):
  open_dataset("nowhere/at all")


def wrong_value(_):
  PixelAutoencoder().encode(np.zeros((1, 8, 8, 4)))


def full_disk(_):
  raise OSError(28, "No space left on device")


class OwnError(ArithmeticError):
  """Stands for an exception type of the package."""


OwnError.__module__ = "pixsigma_jax.train.loop"


def own_type(_):
  raise OwnError("the loss is\nnot finite")


@pytest.mark.parametrize(
  ("main", "message"),
  [
    (wrong_data, "There is no dataset at"),
    (wrong_value, "The pixel autoencoder takes images of shape"),
    (full_disk, "No space left on device"),
    (own_type, "the loss is not finite"),
  ],
)
def test_a_mistake_of_the_users_ends_in_one_line_and_exit_code_1(
  run, capsys, main, message
):
  with pytest.raises(SystemExit) as exit_:
    run(main)
  out, err = capsys.readouterr()
  assert exit_.value.code == 1
  assert out == ""
  assert err.startswith("Error: ")
  assert message in err
  assert err.count("\n") == 1


def test_where_it_arose_is_shown_to_those_who_ask(run):
  with pytest.raises(OSError, match="No space left"):
    run(full_disk, "--traceback")


@pytest.mark.parametrize(
  ("main", "kind"),
  [
    (lambda _: np.zeros(3).reshape(2, 2), ValueError),
    (lambda _: np.zeros(2**55), MemoryError),
    (lambda _: {}["prompt"], KeyError),
    (lambda _: len(3), TypeError),
  ],
)
def test_a_mistake_of_ours_keeps_its_traceback(run, main, kind):
  with pytest.raises(kind):
    run(main)


def interrupted(_):
  raise KeyboardInterrupt


def interrupted_on_the_way(_):
  try:
    raise KeyboardInterrupt
  except KeyboardInterrupt:
    raise command.Interrupted("2 of 3 are done.\nGo on by …") from None


@pytest.mark.parametrize(
  ("main", "message"),
  [
    (interrupted, "Interrupted: by Ctrl-C.\n"),
    (interrupted_on_the_way, "Interrupted: 2 of 3 are done. Go on by …\n"),
  ],
)
def test_ctrl_c_ends_in_one_line_and_exit_code_130(run, capsys, main, message):
  with pytest.raises(SystemExit) as exit_:
    run(main)
  assert exit_.value.code == 130
  assert capsys.readouterr() == ("", message)


def test_a_handler_of_a_commands_own_decides_what_ctrl_c_is(run, capsys):
  def main(_):
    heard = []
    before = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)
    sys.exit(128 + heard[0] + 1)

  with pytest.raises(SystemExit) as exit_:
    run(main)
  assert exit_.value.code == 131
  assert capsys.readouterr() == ("", "")


def test_where_ctrl_c_came_is_shown_to_those_who_ask(run):
  with pytest.raises(KeyboardInterrupt):
    run(interrupted, "--traceback")


def test_what_is_not_a_flag_is_refused(run, capsys):
  with pytest.raises(SystemExit) as exit_:
    run(lambda _: None, "a prompt without its flag")
  assert exit_.value.code == 1
  assert "Not a flag: a prompt without its flag" in "".join(capsys.readouterr())


def test_a_finished_command_exits_with_0(run):
  with pytest.raises(SystemExit) as exit_:
    run(lambda _: None)
  assert not exit_.value.code


def test_other_packages_are_heard_only_when_they_warn(run):
  with pytest.raises(SystemExit):
    run(lambda _: None)
  handler = absl_logging.get_absl_handler()

  def heard(level, path):
    record = logging.LogRecord("absl", level, path, 1, "text", None, None)
    return bool(handler.filter(record))

  ours, theirs = command.__file__, logging.__file__
  assert heard(logging.INFO, ours)
  assert not heard(logging.INFO, theirs)
  assert heard(logging.WARNING, theirs)


def test_progress_hands_on_every_item_and_counts_them_in_lines(caplog, monkeypatch):
  caplog.set_level(logging.INFO, logger="absl")
  assert list(command.progress(iter("abc"), 3, "Letters")) == ["a", "b", "c"]
  assert [r.message for r in caplog.records] == ["Letters: 3 of 3"]

  clock = iter(range(0, 1000, 6))  # seconds
  monkeypatch.setattr(command.time, "monotonic", lambda: next(clock))
  caplog.clear()
  list(command.progress(range(5), 5, "Numbers"))
  assert caplog.messages[-1] == "Numbers: 5 of 5"
  assert 1 < len(caplog.messages) < 5


def test_progress_on_a_terminal_is_a_bar(monkeypatch, capsys):
  monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
  assert list(command.progress(range(3), 3, "Numbers")) == [0, 1, 2]
  assert "Numbers: 100%" in capsys.readouterr().err


def test_a_notebook_that_runs_has_bars_and_one_that_is_looked_at_has_none(monkeypatch):
  class Kernel:
    runs = False

    @classmethod
    def initialized(cls):
      return cls.runs

  monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
  assert not command.draws_bars()
  loaded = types.SimpleNamespace(IPKernelApp=Kernel)
  monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
  monkeypatch.setitem(sys.modules, "ipykernel.kernelapp", loaded)
  assert not command.draws_bars()
  Kernel.runs = True
  assert command.draws_bars()


def test_compiled_programs_are_kept_with_the_users_caches(tmp_path, monkeypatch):
  name = "jax_compilation_cache_dir"
  before = jax.config.values[name]
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  try:
    jax.config.update(name, None)
    command.keep_compiled()
    assert jax.config.values[name] == str(tmp_path / "pixsigma_jax" / "xla")
    # What JAX_COMPILATION_CACHE_DIR or the user's program has set stays.
    jax.config.update(name, str(tmp_path / "mine"))
    command.keep_compiled()
    assert jax.config.values[name] == str(tmp_path / "mine")
  finally:
    jax.config.update(name, before)


def test_ctrl_c_while_a_command_still_imports_ends_in_one_line(tmp_path):
  # Stands for the seconds that imports take.
  (tmp_path / "jax.py").write_text("raise KeyboardInterrupt\n")
  root = pathlib.Path(command.__file__).parents[1]
  path = os.pathsep.join([str(tmp_path), str(root)])

  def run(*arguments):
    return subprocess.run(
      [sys.executable, *arguments],
      env={**os.environ, "PYTHONPATH": path},
      capture_output=True,
      text=True,
      check=False,
    )

  done = run("-m", "pixsigma_jax.train")
  assert (done.returncode, done.stdout) == (-signal.SIGINT, "")
  assert done.stderr == "Interrupted: by Ctrl-C.\n"
  # Of whoever imports the package, nothing is changed, nor is any other error.
  assert "Traceback" in run("-c", "import pixsigma_jax.tree").stderr
  (tmp_path / "jax.py").write_text("raise ImportError('no jax')\n")
  assert "ImportError: no jax" in run("-m", "pixsigma_jax.train").stderr
