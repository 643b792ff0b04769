"""The index: parts are whole or absent, and all steps speak of the same images."""

import contextlib
import io
import json
import os
import pathlib
import pickle

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pixsigma_jax.data.index import SCHEMAS, create_index, open_index
from pixsigma_jax.data.sources import Unit

UNITS = [Unit("folder", "", count=3, first="a.png", last="c.png"), Unit("tar", "x.tar")]


def rows(count, **columns):
  """A part of scan, of `count` made-up images."""
  nothing = {name: [None] * count for name in SCHEMAS["scan"].names}
  made = {"id": [f"image {i}" for i in range(count)], "captions": [[]] * count}
  return pa.table(
    {**nothing, **made, **columns},
    schema=SCHEMAS["scan"],
  )


@pytest.fixture
def index(tmp_path):
  index = create_index(str(tmp_path / "index"), str(tmp_path), UNITS)
  index.write("scan", 0, rows(3))
  return index


def scores(*values):
  return pa.table({"aesthetic": pa.array(values, pa.float32())})


def test_what_was_written_comes_back(index):
  captions = [
    [{"text": "ein Bär", "kind": "long"}],
    [],
    [{"text": "七", "kind": "short"}],
  ]
  wanted = rows(3, phash=[0, 2**64 - 1, None], captions=captions)
  index.write("scan", 0, wanted)
  assert open_index(index.directory) == index
  assert index.read(0).equals(wanted)
  assert pickle.loads(pickle.dumps(index)).read(0).equals(wanted)


def test_of_two_steps_the_later_ones_columns_hold(index):
  new = [[{"text": "new", "kind": "short"}]] * 3
  index.write("captions", 0, pa.table({"captions": new}))
  index.write("scores", 0, scores(1, None, 3))
  table = index.read(0, "scan", "scores", "captions")
  assert table["captions"].to_pylist() == new
  assert table["aesthetic"].to_pylist() == [1, None, 3]
  some = index.read(0, "scan", "scores", columns=["id", "aesthetic"])
  assert some.column_names == ["id", "aesthetic"]


def test_a_step_that_was_not_there_names_its_command(index):
  with pytest.raises(
    ValueError, match=r"no part 0 of scores: run `curate score` first"
  ):
    index.read(0, "scan", "scores")


def test_a_step_is_there_when_all_of_its_parts_are(index):
  assert (index.missing("scan"), index.has("scan")) == ([1], False)
  assert index.captions_step == "scan"
  index.write("scan", 1, rows(1))
  assert (index.missing("scan"), index.has("scan")) == ([], True)
  for part, count in enumerate([3, 1]):
    assert index.captions_step == "scan"
    index.write("captions", part, pa.table({"captions": [[]] * count}))
  assert index.captions_step == "captions"


def test_a_part_has_a_row_for_every_image(index):
  with pytest.raises(ValueError, match=r"has 3 images, and scores has 2 rows"):
    index.write("scores", 0, scores(1, 2))
  with pytest.raises(ValueError, match=r"scores has the columns \['aesthetic'\]"):
    index.write("scores", 0, pa.table({"score": [1, 2, 3]}))
  with pytest.raises(ValueError, match=r"has 2 parts, no part 2"):
    index.write("scan", 2, rows(1))


def test_parts_of_different_scans_do_not_pass_for_one(index):
  index.write("scores", 0, scores(1, 2, 3))
  path = pathlib.Path(index.directory, "scores", "00000.parquet")
  copy = path.read_bytes()
  index.write("scan", 0, rows(4))
  path.write_bytes(copy)  # put back, or by an earlier version
  with pytest.raises(ValueError, match=r"has \[3, 4\] rows in its steps scan, scores"):
    index.read(0, "scan", "scores")


def test_a_write_that_is_cut_short_leaves_what_was_there(index, monkeypatch):
  index.write("scores", 0, scores(1, 2, 3))

  def power_fails(*_):
    raise OSError("the power failed")

  monkeypatch.setattr(os, "fsync", power_fails)
  with pytest.raises(OSError, match="the power failed"):
    index.write("scores", 0, scores(4, 5, 6))
  with pytest.raises(OSError, match="the power failed"):
    index.write("captions", 0, pa.table({"captions": [[]] * 3}))
  assert index.read(0, "scores")["aesthetic"].to_pylist() == [1, 2, 3]
  assert index.missing("captions") == [0, 1]


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_part_is_named(index, damage):
  index.write("scores", 0, scores(1, 2, 3))
  path = pathlib.Path(index.directory, "scores", "00000.parquet")
  data = bytearray(path.read_bytes())
  data = data[:-9] if damage == "cut" else data[:-4] + b"WRAP"
  path.write_bytes(data)
  with pytest.raises(ValueError, match=r"scores/00000.parquet is damaged: delete it"):
    index.read(0, "scores")


def test_other_settings_take_the_parts_of_the_old_ones_away(index):
  assert index.settings("scores") is None
  assert index.begin("scores", {"head": "a"}) == [0, 1]
  index.write("scores", 0, scores(1, 2, 3))
  assert index.begin("scores", {"head": "a"}) == [1]
  assert index.begin("scores", {"head": "b"}) == [0, 1]
  assert index.settings("scores") == {"head": "b"}


def test_parts_keep_what_was_noted_with_them(index):
  table = pa.table({"captions": [[]] * 3}).replace_schema_metadata({"from": "a.jsonl"})
  index.write("captions", 0, table)
  assert index.metadata(0, "captions") == {b"from": b"a.jsonl"}


def test_an_index_is_of_one_source(index, tmp_path):
  assert create_index(index.directory, str(tmp_path), []) == index  # units stay
  with pytest.raises(FileExistsError, match=r"is the index of .*, not of /elsewhere"):
    create_index(index.directory, "/elsewhere", UNITS)


def test_a_source_is_found_from_any_working_directory(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  made = create_index("index", "images", UNITS)
  assert made.source == str(tmp_path / "images")
  assert made.directory == str(tmp_path / "index")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": 1, "units": 3}'])
def test_a_damaged_index_says_so(index, text):
  pathlib.Path(index.directory, "index.json").write_text(text)
  with pytest.raises(ValueError, match=r"index.json is damaged"):
    open_index(index.directory)


def test_an_index_of_another_version_is_refused(index):
  path = pathlib.Path(index.directory, "index.json")
  path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
  with pytest.raises(ValueError, match="of format 2, and this program reads 1"):
    open_index(index.directory)


def test_a_folder_without_an_index_is_none(tmp_path):
  with pytest.raises(
    FileNotFoundError, match=r"has no index.json. `curate scan` makes"
  ):
    open_index(str(tmp_path))


def test_an_index_may_lie_where_only_fsspec_reaches():
  try:
    index = create_index("memory://indices/one", "memory://images", UNITS)
    index.write("scan", 0, rows(2))
    assert index.missing("scan") == [1]
    assert open_index("memory://indices/one").read(0).equals(rows(2))
  finally:
    fsspec.filesystem("memory").rm("/indices", recursive=True)


def test_parts_are_parquet_that_anyone_reads(index):
  data = pathlib.Path(index.directory, "scan", "00000.parquet").read_bytes()
  assert pq.read_table(io.BytesIO(data)).schema.equals(SCHEMAS["scan"])


def filled(index):
  """Every step of two parts, of three images and one."""
  for part, count in enumerate([3, 1]):
    index.write("scan", part, rows(count))
    index.write("duplicates", part, pa.table({"duplicate_of": pa.nulls(count)}))
    index.write("scores", part, scores(*range(count)))
    index.write("captions", part, pa.table({"captions": [[]] * count}))
    kept = {"kept": [True] * count, "reason": pa.nulls(count)}
    index.write("kept", part, pa.table(kept))
  return index


def test_a_part_that_is_scanned_anew_and_the_same_keeps_its_steps(index):
  filled(index).write("scan", 1, rows(1))
  steps = ("duplicates", "scores", "captions", "kept")
  assert [index.missing(step) for step in steps] == [[]] * 4


@pytest.mark.parametrize("count", [1, 2])
def test_steps_of_a_part_that_has_changed_are_to_be_done_again(index, caplog, count):
  filled(index).write("scan", 1, rows(count, sha256=["other"] * count))
  # What hangs together over all parts is done again for all.
  assert [index.missing(step) for step in ("duplicates", "kept")] == [[0, 1]] * 2
  assert [index.missing(step) for step in ("scores", "captions")] == [[1]] * 2
  assert "`curate score` is to be run again, for this part" in caplog.text
  index.write("scores", 1, scores(*range(count)))
  assert len(index.read(1, "scan", "scores")) == count


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("removed", range(8))
def test_a_kill_while_a_scan_changes_leaves_no_step_half_of_it(
  tmp_path, monkeypatch, part, removed
):
  index = create_index(
    str(tmp_path / "index"), str(tmp_path), [*UNITS, Unit("tar", "y.tar")]
  )
  index.write("scan", 2, rows(2))
  filled(index)
  for step, name in (("duplicates", "duplicate_of"), ("kept", "reason")):
    other = {"kept": [True] * 2} if step == "kept" else {}
    index.write(step, 2, pa.table({**other, name: pa.nulls(2)}))
  (tmp_path / "index" / "scan" / f"{part:05d}.parquet").unlink()
  done, remove = [], type(index).remove

  def killed(self, path):
    if len(done) == removed:
      raise KeyboardInterrupt
    done.append(path)
    remove(self, path)

  changed = rows(3, sha256=["other"] * 3)
  with monkeypatch.context() as patch:
    patch.setattr(type(index), "remove", killed)
    with contextlib.suppress(KeyboardInterrupt):
      index.write("scan", part, changed)
  index.write("scan", part, changed)  # the same command again
  assert [index.missing(step) for step in ("duplicates", "kept")] == [[0, 1, 2]] * 2


def test_an_index_of_an_earlier_version_is_read(index):
  """Without a column for color profiles, and without a word on which scan it is of."""
  filled(index)
  for step in ("scan", "scores"):
    path = pathlib.Path(index.directory, step, "00000.parquet")
    columns = [name for name in SCHEMAS[step].names if name != "profile"]
    old = pq.read_table(io.BytesIO(path.read_bytes()), columns=columns)
    pq.write_table(old.replace_schema_metadata(None), path)
  table = index.read(0, "scan", "scores")
  assert table["profile"].to_pylist() == [None] * 3
  assert table.column_names == [*SCHEMAS["scan"].names, "aesthetic"]
  assert index.read(0, columns=["profile"])["profile"].to_pylist() == [None] * 3
  index.write("scan", 0, rows(3, sha256=["other"] * 3))
  assert index.missing("scores") == []  # of which scan it was nobody knows
  index.write("scan", 0, rows(2))
  assert index.missing("scores") == [0]
