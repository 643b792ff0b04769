"""Files on the disk: no name is taken twice, and what a kill left is taken away."""

import errno
import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest

from pixsigma_jax import disk


def no_links(*_):
  raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("links", [True, False])
def test_a_new_file_never_takes_anothers_place(tmp_path, monkeypatch, links):
  if not links:
    monkeypatch.setattr(os, "link", no_links)
  path, partial = tmp_path / "a", disk.partial_path(tmp_path / "a")
  partial.write_text("first")
  disk.publish_new(partial, path)
  assert os.listdir(tmp_path) == ["a"]
  partial.write_text("second")
  with pytest.raises(FileExistsError, match="a exists already and is left as it is"):
    disk.publish_new(partial, path)
  assert path.read_text() == "first"
  assert partial.read_text() == "second"


@pytest.mark.parametrize("links", [True, False])
def test_of_many_writers_one_gets_the_name(tmp_path, monkeypatch, links):
  if not links:
    monkeypatch.setattr(os, "link", no_links)
  path, won, lost = tmp_path / "a", [], []
  together = threading.Barrier(8)

  def write(i):
    partial = disk.partial_path(path)
    partial.write_text(str(i))
    together.wait()
    try:
      disk.publish_new(partial, path)
    except FileExistsError:
      lost.append(i)
    else:
      won.append(i)

  threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert [path.read_text()] == [str(i) for i in won]
  assert len(lost) == 7


def test_a_folder_that_takes_files_is_left_as_it_was(tmp_path):
  disk.check_writable(tmp_path)
  disk.check_writable(tmp_path / "not" / "there" / "yet")
  assert list(tmp_path.iterdir()) == []


def test_a_folder_that_takes_no_file_is_named(tmp_path, monkeypatch):
  with pytest.raises(OSError, match=r"Nothing can be written to /proc: .* directory"):
    disk.check_writable(disk.pathlib.Path("/proc/pictures"))
  (tmp_path / "file").write_text("kept")
  for below in ("file", "file/pictures"):
    with pytest.raises(NotADirectoryError, match="file is a file: give a directory"):
      disk.check_writable(tmp_path / below)
  (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
  with pytest.raises(NotADirectoryError, match="dangling is a file"):
    disk.check_writable(tmp_path / "dangling")

  def full(_):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(OSError, match=r"left on device\. Give another directory"):
    disk.check_writable(tmp_path)
  assert sorted(os.listdir(tmp_path)) == ["dangling", "file"]


WRITER = """
import pathlib, sys, time
from pixsigma_jax import disk
def write(partial):
  partial.write_text("half")
  print("begun", flush=True)
  time.sleep(600)
disk.write_whole(pathlib.Path(sys.argv[1]), write)
"""


@pytest.fixture
def writer(tmp_path):
  """A process that is writing tmp_path/x."""
  process = subprocess.Popen(
    [sys.executable, "-c", WRITER, str(tmp_path / "x")],
    stdout=subprocess.PIPE,
    env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1])},
  )
  assert process.stdout.readline() == b"begun\n"
  yield process
  process.kill()
  process.wait()
  process.stdout.close()


def partials(folder):
  return sorted(path.name for path in folder.glob("*.partial"))


@pytest.mark.parametrize("way", ["the same file again", "all of a folder"])
def test_what_a_killed_process_had_begun_goes_and_a_live_ones_stays(
  writer, tmp_path, way
):
  def again():
    if way == "all of a folder":
      disk.remove_abandoned(tmp_path)
    else:
      disk.write_whole(tmp_path / "x", lambda partial: partial.write_text("whole"))

  [half] = partials(tmp_path)
  again()
  assert partials(tmp_path) == [half]
  writer.kill()
  writer.wait()
  again()
  assert partials(tmp_path) == []


@pytest.mark.parametrize(
  "name", ["x.0a1b2c3d.partial", "x.00000000_1_0a1b2c3d.partial"]
)
def test_another_machines_goes_after_a_day_without_a_change(tmp_path, name):
  path = tmp_path / name
  path.write_text("half")
  disk.remove_abandoned(tmp_path)
  assert path.exists()
  before = time.time() - 25 * 3600
  os.utime(path, (before, before))
  disk.remove_abandoned(tmp_path)
  assert not path.exists()


def test_files_that_only_look_like_it_stay(tmp_path):
  names = ["thesis.partial", "x.partial", "x.tex.partial", "x.0a1b2c3d.partial.txt"]
  names += ["[x].0a1b2c3d.partial", "xy.0a1b2c3d.partial", "x.y.0a1b2c3d.partial"]
  for name in names:
    (tmp_path / name).write_text("years")
    os.utime(tmp_path / name, (0, 0))
  disk.partial_path(tmp_path / "x")
  assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_a_folder_that_was_half_written_goes_too(tmp_path):
  folder = tmp_path / "x.0a1b2c3d.partial"
  folder.mkdir()
  (folder / "inside").write_text("half")
  os.utime(folder, (0, 0))
  disk.remove_abandoned(tmp_path)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_there", [False, True])
def test_a_folder_is_whole_or_not_there(tmp_path, is_there):
  folder, written = tmp_path / "model", {"b": "last", "a": "first"}
  if is_there:
    folder.mkdir()

  def fill_a_full_disk():
    with disk.whole_folder(folder) as partial:
      (partial / "a").write_text("first")
      raise OSError("the disk is full")

  with pytest.raises(OSError, match="full"):
    fill_a_full_disk()
  assert folder.exists() == is_there
  assert [path for path in tmp_path.rglob("*") if path != folder] == []
  with disk.whole_folder(folder) as partial:
    for name in ("a", "b"):
      (partial / name).write_text(written[name])
    assert folder.exists() == is_there
    assert disk.whole_files(tmp_path) == ["model"] * is_there
  assert {path.name: path.read_text() for path in folder.iterdir()} == written
  assert os.listdir(tmp_path) == ["model"]
