"""Files on the disk: names that are never taken twice, and folders that take none."""

import errno
import os
import threading

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
