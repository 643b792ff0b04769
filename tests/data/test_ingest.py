"""Beam does every part once, wherever; what goes wrong there arrives here as itself."""

import functools
import os
import pathlib
import sys

import pytest

from pixsigma_jax.data import ingest

HERE = []  # the default: one worker, in this process


def touch(folder, part):
  with open(pathlib.Path(folder, str(part)), "a") as file:
    file.write(f"{os.getpid()}\n")


def refuse(folder, error, part):
  touch(folder, part)
  if part == 1:
    raise error


def test_every_part_is_done_once(tmp_path):
  parts = [0, 2, 3, 7]
  function = functools.partial(touch, str(tmp_path))
  ingest.run_parts(function, parts, what="Touching", beam_options=HERE)
  written = {path.name: path.read_text() for path in tmp_path.iterdir()}
  assert written == {str(part): f"{os.getpid()}\n" for part in parts}


def test_nothing_to_do_is_done_at_once(tmp_path):
  ingest.run_parts(lambda _: 1 / 0, [], what="Nothing", beam_options=["--runner=none"])


@pytest.mark.parametrize(
  "error",
  [
    ValueError("part 1 is bad"),
    FileNotFoundError("there is no part 1"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
  ],
  ids=lambda error: type(error).__name__,
)
def test_a_workers_error_arrives_as_itself(tmp_path, error):
  function = functools.partial(refuse, str(tmp_path), error)
  with pytest.raises(type(error)) as caught:
    ingest.run_parts(function, [1, 1, 1], what="Refusing", beam_options=HERE)
  assert str(caught.value) == str(error)
  assert "in refuse" in caught.value.__notes__[0]  # where, for --traceback
  assert (tmp_path / "1").read_text().count("\n") == 1  # and no further part was begun


def test_a_mistake_of_ours_is_not_swallowed(tmp_path):
  function = functools.partial(refuse, str(tmp_path), ZeroDivisionError("ours"))
  with pytest.raises(Exception, match="ours"):
    ingest.run_parts(function, [1], what="Failing", beam_options=HERE)


def test_progress_is_what_has_finished(tmp_path, caplog):
  caplog.set_level("INFO", logger="absl")
  function = functools.partial(touch, str(tmp_path))
  ingest.run_parts(function, [0, 1, 2], what="Touching", beam_options=HERE)
  assert "Touching: 3 of 3" in caplog.text


def count(folder, part):
  for _ in range(part):
    ingest.count()
  ingest.count(2)
  touch(folder, part)


@pytest.mark.parametrize("known", [True, False], ids=["so many", "nobody knows"])
@pytest.mark.parametrize("several", [False, True], ids=["here", "in processes"])
def test_progress_may_be_by_the_image(tmp_path, caplog, known, several):
  caplog.set_level("INFO", logger="absl")
  options = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]
  ingest.run_parts(
    functools.partial(count, str(tmp_path)),
    [3, 4],
    what="Images",
    beam_options=options if several else HERE,
    by_image=True,
    images=11 if known else None,
  )
  assert f"Images: 11{' of 11' if known else ''}\n" in caplog.text
  ingest.count()  # nobody looks


def test_without_beam_the_extra_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "apache_beam", None)
  with pytest.raises(ValueError, match=r'pip install -e "\.\[curate\]"'):
    ingest.run_parts(print, [0], what="Nothing", beam_options=HERE)


def test_a_cluster_may_have_options_that_beam_does_not_know():
  ingest.check(["--runner=FlinkRunner", "--parallelism_of_ours=3"])
  ingest.check(["--direct_num_workers=2"])
