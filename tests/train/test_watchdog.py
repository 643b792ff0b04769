"""A step that hangs is told of once, with what every thread was doing."""

import time

import pytest

from pixsigma_jax.train import watchdog as module
from pixsigma_jax.train.watchdog import Watchdog


@pytest.fixture
def watched(tmp_path):
  """A watchdog that knows steps of a hundredth of a second, and looks as often."""
  watchdog = Watchdog(tmp_path / "hangs", hang_factor=5.0, min_seconds=0.2)
  for step in range(6):
    watchdog.beat(step)
    time.sleep(0.01)
  watchdog.beat(6)
  yield watchdog
  watchdog.close()


def files(directory):
  return sorted((directory / "hangs").glob("*.txt"))


def wait_for(condition):
  until = time.monotonic() + 20
  while not condition() and time.monotonic() < until:
    time.sleep(0.02)


def hang_here(condition):
  wait_for(condition)


def test_a_hang_leaves_the_stacks_of_all_threads_once(watched, tmp_path, caplog):
  hang_here(lambda: "it hangs" in caplog.text)
  time.sleep(0.5)
  (path,) = files(tmp_path)
  assert path.name.startswith("00000006_")
  text = path.read_text()
  assert text.startswith("After step 6: ")
  assert "hang_here" in text
  assert "step after step 6 has taken" in caplog.text
  assert str(path) in caplog.text
  # The next one is told of again.
  watched.beat(7)
  wait_for(lambda: len(files(tmp_path)) == 2)
  assert len(files(tmp_path)) == 2


def test_what_is_known_to_take_long_is_no_hang(watched, tmp_path):
  with watched.paused():
    time.sleep(0.6)
  watched.beat(7)
  assert not files(tmp_path)


def test_a_hang_after_a_pause_is_one(watched, tmp_path):
  with watched.paused():
    pass
  wait_for(lambda: files(tmp_path))
  assert files(tmp_path)


def test_many_times_the_median_is_no_hang_while_it_is_short(tmp_path, monkeypatch):
  monkeypatch.setattr(module, "_LOOKS", 0.02)
  watchdog = Watchdog(tmp_path / "hangs", hang_factor=5.0, min_seconds=600.0)
  for step in range(6):
    watchdog.beat(step)
    time.sleep(0.01)
  time.sleep(0.4)
  watchdog.close()
  assert not files(tmp_path)


def test_the_first_steps_and_a_factor_of_0_are_not_watched(tmp_path):
  for factor, beats in ((5.0, 2), (0.0, 6)):
    watchdog = Watchdog(tmp_path / "hangs", hang_factor=factor, min_seconds=0.1)
    for step in range(beats):
      watchdog.beat(step)
    time.sleep(0.4)
    watchdog.close()
  assert not files(tmp_path)
