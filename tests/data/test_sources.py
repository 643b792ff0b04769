"""Sources: the same images are found however they lie, and nothing outside of them."""

import io
import json
import os
import tarfile

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pixsigma_jax.data import sources
from pixsigma_jax.data.sources import Unit, entries, list_units, read_bytes

NAMES = ["a/1", "a/2", "b/1"]


def picture(number=0, size=(12, 8), format="PNG", **options):
  """A picture's bytes; `size` is width and height, as Pillow has it."""
  pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, format, **options)
  return file.getvalue()


def write(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return path


def write_tar(path, members, **options):
  """A tar of names and contents, or of names and headers without content."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, "w", **options) as tar:
    for name, content in members:
      if isinstance(content, tarfile.TarInfo):
        tar.addfile(content)
      else:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
  return path


def link(name, target, type=tarfile.SYMTYPE, size=0):
  info = tarfile.TarInfo(name)
  info.type, info.linkname, info.size = type, target, size
  return name, info


def found(source, per_unit=2):
  source = str(source)
  return [
    e for unit in list_units(source, per_unit=per_unit) for e in entries(source, unit)
  ]


@pytest.fixture
def folder(tmp_path):
  for number, name in enumerate(NAMES):
    write(tmp_path / "images" / f"{name}.png", picture(number))
    write(tmp_path / "images" / f"{name}.txt", f"picture {number}\n")
  return tmp_path / "images"


def in_a_folder(folder):
  return folder


def in_a_tar(folder):
  paths = sorted(folder.rglob("*.*"))
  members = [(str(p.relative_to(folder)), p.read_bytes()) for p in paths]
  return write_tar(folder.parent / "shard.tar", members)


def in_json_lines(folder):
  rows = [
    {"path": f"images/{name}.png", "id": name, "caption": f"picture {number}"}
    for number, name in enumerate(NAMES)
  ]
  lines = "\n\n".join(map(json.dumps, rows))  # blank lines are no rows
  return write(folder.parent / "list.jsonl", lines)


def in_parquet(folder):
  captions = [[{"text": f"picture {number}", "kind": "short"}] for number in range(3)]
  table = pa.table(
    {
      "path": [f"images/{name}.png" for name in NAMES],
      "id": NAMES,
      "captions": captions,
      "irrelevant": [1.5, 2.5, 3.5],
    }
  )
  pq.write_table(table, folder.parent / "list.parquet", row_group_size=2)
  return folder.parent / "list.parquet"


def in_the_official_layout(folder):
  root = folder.parent / "official"
  (root / "InternImgs").parent.mkdir()
  folder.rename(root / "InternImgs")
  rows = [
    {"path": f"{name}.png", "prompt": f"picture {number}", "sharegpt4v": "", "ratio": 1}
    for number, name in enumerate(NAMES)
  ]
  write(root / "InternData" / "data_info.json", json.dumps(rows))
  return root


LAYOUTS = [in_a_folder, in_a_tar, in_json_lines, in_parquet, in_the_official_layout]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("per_unit", [1, 2, 100])
def test_the_same_images_are_found(layout, per_unit, folder):
  source = layout(folder)
  all_found = found(source, per_unit)
  ids = [f"shard/{name}" for name in NAMES] if layout is in_a_tar else NAMES
  assert [entry.id for entry in all_found] == ids
  for number, entry in enumerate(all_found):
    assert entry.error is None
    assert entry.captions == ((f"picture {number}", "short"),)
    assert read_bytes(str(source), entry.location) == picture(number)


def test_a_source_may_lie_where_only_fsspec_reaches():
  fs = fsspec.filesystem("memory")
  for number, name in enumerate(NAMES):
    fs.pipe_file(f"/sources/images/{name}.png", picture(number))
  fs.pipe_file("/sources/list.jsonl", b'{"path": "images/a/2.png", "caption": "two"}')
  try:
    assert [e.id for e in found("memory://sources/images")] == NAMES
    assert read_bytes("memory://sources/images", "a/2.png") == picture(1)
    [entry] = found("memory://sources/list.jsonl")
    assert read_bytes("memory://sources/list.jsonl", entry.location) == picture(1)
    with pytest.raises(ValueError, match="outside"):
      read_bytes("memory://sources/images/a", "../b/1.png")
  finally:
    fs.rm("/sources", recursive=True)


def test_units_are_json_and_list_nothing_twice(folder):
  units = list_units(str(folder), per_unit=2)
  assert [(unit.first, unit.last, unit.count) for unit in units] == [
    ("a/1.png", "a/2.png", 2),
    ("b/1.png", "b/1.png", 1),
  ]
  write(folder / "a/1b.png", picture(7))  # after the units were made
  again = [Unit(**json.loads(json.dumps(vars(unit)))) for unit in units]
  listed = [e.id for unit in again for e in entries(str(folder), unit)]
  assert listed == ["a/1", "a/1b", "a/2", "b/1"]


def test_folders_that_hold_nothing_of_a_unit_are_not_listed(folder, monkeypatch):
  listed = []
  ls = fsspec.implementations.local.LocalFileSystem.ls

  def noted(self, path, **options):
    listed.append(os.path.relpath(path, folder))
    return ls(self, path, **options)

  monkeypatch.setattr(fsspec.implementations.local.LocalFileSystem, "ls", noted)
  list(entries(str(folder), Unit("folder", "", first="b/1.png", last="b/1.png")))
  assert listed == [".", "b"]


def test_a_shard_has_the_keys_of_webdataset(tmp_path):
  write_tar(
    tmp_path / "sub" / "x.tar",
    [
      ("dir/001.v2.jpg", b"no image by WebDataset's rule: its extension is v2.jpg"),
      ("dir/002.jpg", picture(0)),
      ("dir/002.json", b'{"caption_long": "a", "caption_short": "b"}'),
      ("dir/._002.jpg", b"what macOS leaves"),
      ("dir/003.JPG", picture(1)),
    ],
  )
  assert [(e.id, e.captions) for e in found(tmp_path)] == [
    ("sub/x/dir/002", (("a", "long"), ("b", "short"))),
    ("sub/x/dir/003", ()),
  ]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_in_tars_are_read_whole(format, tmp_path):
  name = "a long name/" * 40 + "bär" * 30
  source = write_tar(tmp_path / "x.tar", [(f"{name}.png", picture())], format=format)
  [entry] = found(source)
  assert entry.id == f"x/{name}"
  assert read_bytes(str(source), entry.location) == picture()


def test_a_tar_of_python_and_ours_have_the_same_members(tmp_path):
  rng = np.random.default_rng(0)
  members = [(f"k{i}/n{'n' * (17 * i)}.png", rng.bytes(i * 97)) for i in range(20)]
  # Some writers give a hard link the size of what it links to, and no content.
  members.insert(5, link("hard.txt", "k4/n.png", tarfile.LNKTYPE, size=2000))
  source = write_tar(tmp_path / "x.tar", members, format=tarfile.PAX_FORMAT)
  with tarfile.open(source) as tar:
    regular = [member for member in tar if member.isreg()]
  places = [f"x.tar?offset={m.offset_data}&size={m.size}" for m in regular]
  assert [e.location for e in found(source)] == places


def test_what_is_wrong_in_a_tar_is_said(tmp_path):
  source = write_tar(
    tmp_path / "x.tar",
    [
      ("../up.png", picture()),
      ("/etc/top.png", picture()),
      link("soft.png", "/etc/passwd"),
      link("hard.png", "/etc/passwd", tarfile.LNKTYPE),
      ("twice.png", picture()),
      ("twice.jpg", picture()),
      ("other.png", picture()),
      ("twice.webp", picture()),
      ("mute.png", picture()),
      ("mute.txt", b"\xff\xfe\xff"),
    ],
  )
  assert {(e.id, e.error) for e in found(source)} == {
    ("x/../up", "its path leads outside of the source's folder"),
    ("x//etc/top", "its path leads outside of the source's folder"),
    ("x/soft", "a link, a device or a sparse file in a tar"),
    ("x/hard", "a link, a device or a sparse file in a tar"),
    ("x/twice", None),
    ("x/twice.jpg", "has the id of another file"),
    ("x/other", None),
    ("x/twice", "has the id of another file"),
    ("x/mute", "its captions cannot be read: not UTF-8"),
  }


@pytest.mark.parametrize("cut", ["within a picture", "within a header", "no end mark"])
def test_a_truncated_tar_gives_what_is_whole_and_says_so(cut, tmp_path):
  members = [(f"{i}.png", b"x" * 600) for i in range(3)]
  source = write_tar(tmp_path / "x.tar", members)
  end = {"within a picture": 4000, "within a header": 3072 + 100, "no end mark": 4608}
  with open(source, "r+b") as file:
    file.truncate(end[cut])
  *whole, last = found(source)
  assert [e.id for e in whole] == [f"x/{i}" for i in range(3 if cut[:2] == "no" else 2)]
  assert all(e.error is None for e in whole)
  assert (last.id, last.location) == ("x", "x.tar")
  assert "cannot be read: the tar is truncated at byte" in last.error


def test_a_tar_whose_sizes_lie_ends_in_a_row(tmp_path):
  source = write_tar(tmp_path / "x.tar", [("1.png", b"x"), ("2.png", b"x")])
  data = bytearray(source.read_bytes())
  data[1024 + 124 : 1024 + 136] = b"\xff" * 12  # a negative size, base 256
  data[1024 + 148 : 1024 + 156] = b" " * 8
  data[1024 + 148 : 1024 + 156] = b"%06o\0 " % sum(data[1024:1536])
  source.write_bytes(data)
  first, second = found(source)
  assert (first.id, first.error) == ("x/1", None)
  assert "damaged at byte 1024" in second.error


def test_loose_images_beside_tars_are_refused(folder):
  in_a_tar(folder).rename(folder / "shard.tar")
  with pytest.raises(ValueError, match=r"holds 1 tars and 3 images beside them"):
    list_units(str(folder), per_unit=2)


def test_links_are_followed_inside_the_folder_and_not_out_of_it(folder, tmp_path):
  write(tmp_path / "secret.png", picture(9))
  write(tmp_path / "secret.txt", "a secret")
  os.symlink(tmp_path / "secret.png", folder / "c.png")
  os.symlink("a/1.png", folder / "d.png")
  os.symlink(tmp_path / "secret.txt", folder / "d.txt")
  os.symlink("b/1.png", folder / "e.png")
  os.symlink(folder, folder / "loop")
  by_id = {e.id: e for e in found(folder)}
  outside = "its path leads outside of the source's folder"
  with pytest.raises(ValueError, match=outside):
    read_bytes(str(folder), by_id["c"].location)
  assert by_id["d"].error == f"its captions cannot be read: {outside}"
  assert read_bytes(str(folder), by_id["e"].location) == picture(2)
  assert by_id["loop"].error == "a link to a folder, which is not followed"


@pytest.mark.parametrize(
  "location",
  ["../secret.png", "a/../../secret.png", "/etc/hostname", "..", ".", "", "a\0.png"],
)
def test_no_location_leads_out_of_the_source(location, folder, tmp_path):
  write(tmp_path / "secret.png", picture(9))
  with pytest.raises(ValueError, match=r"outside|zero byte"):
    read_bytes(str(folder), location)
  in_tar = f"{location}/x.tar?offset=0&size=1"
  with pytest.raises((ValueError, OSError)):
    read_bytes(str(folder), in_tar)


def test_a_full_path_into_the_source_is_one_of_it(folder):
  row = json.dumps({"path": str(folder / "a" / ".." / "b" / "1.png")})
  [entry] = found(write(folder.parent / "list.jsonl", row))
  assert (entry.id, entry.location) == ("images/b/1", "images/b/1.png")


def test_a_pipe_is_not_waited_for(folder):
  os.mkfifo(folder / "pipe.png")
  entry = next(e for e in found(folder) if e.id == "pipe")
  with pytest.raises(ValueError, match="not an ordinary file"):
    read_bytes(str(folder), entry.location)


def test_a_file_too_large_is_not_read(folder, monkeypatch):
  monkeypatch.setattr(sources, "MOST_BYTES", 50)
  with pytest.raises(ValueError, match="too large"):
    read_bytes(str(folder), "a/1.png")


def test_a_part_of_a_tar_beyond_its_end_is_not_read(folder):
  source = in_a_tar(folder)
  with pytest.raises(ValueError, match=r"truncated: shard\.tar ends at byte"):
    read_bytes(str(source), "shard.tar?offset=512&size=99999999")


def test_files_of_one_id_are_told_apart(folder):
  write(folder / "a" / "1.jpg", picture(5, format="JPEG"))
  by_location = {e.location: e.error for e in found(folder, 1)}
  assert by_location["a/1.jpg"] is None
  assert by_location["a/1.png"] == "has the id of another file: 1.jpg"


def test_a_name_that_is_not_utf8_is_a_row(folder):
  (folder / "b" / os.fsdecode(b"\xff.png")).write_bytes(picture())
  entry = found(folder)[-1]
  assert entry == sources.Entry(
    "b/\\udcff", "b/\\udcff.png", (), "its name is not UTF-8"
  )


def test_bad_rows_of_a_manifest_are_rows_and_stop_nothing(folder):
  lines = [
    b'{"path": "images/a/1.png"}',
    b"{",
    b"[1]",
    b'{"path": 7}',
    b'{"path": "../../etc/passwd"}',
    b'{"path": "images/a/2.png", "caption": 5}',
    b'{"path": "images/a/2.png", "caption": "x", "kind": "middling"}',
    b'{"path": "\\ud800.png"}',
    b"[" * 100_000,
    b"\xff\xfe",
    b'{"file_name": "images/b/1.png", "caption_long": NaN, "id": 7}',
  ]
  source = write(folder.parent / "list.jsonl", b"\r\n".join(lines))
  for per_unit in (1, 3, 100):
    all_found = found(source, per_unit)
    assert len(all_found) == len(lines)
    fine = [(e.id, e.location) for e in all_found if e.error is None]
    assert fine == [("images/a/1", "images/a/1.png"), ("7", "images/b/1.png")]
    assert len({e.id for e in all_found}) == len(
      lines
    )  # byte positions tell them apart


def test_a_line_without_an_end_is_one_bad_row(folder, monkeypatch):
  monkeypatch.setattr(sources, "_MOST_LINE_BYTES", 64)
  long = b'{"path": "' + b"x" * 1000 + b'"}\n'
  source = write(folder.parent / "list.jsonl", long + b'{"path": "images/a/1.png"}')
  first, second = found(source, 1)
  assert "many megabytes" in first.error
  assert second.id == "images/a/1"


def test_parquet_that_lies_about_its_rows_is_refused(folder):
  source = in_parquet(folder)
  source.write_bytes(source.read_bytes()[:-20])
  with pytest.raises(ValueError, match=r"list.parquet is damaged, or not Parquet"):
    list_units(str(source), per_unit=2)


def test_parquet_without_paths_names_its_columns(tmp_path):
  pq.write_table(pa.table({"url": ["x"]}), tmp_path / "x.parquet")
  with pytest.raises(ValueError, match=r"\['url'\], and none of path, file_name"):
    list_units(str(tmp_path / "x.parquet"), per_unit=2)


@pytest.mark.parametrize(
  ("name", "message"),
  [("missing", "There is no"), ("x.tar.gz", "unpacked"), ("empty", "holds no images")],
)
def test_what_is_no_source_says_what_would_be(name, message, tmp_path):
  write(tmp_path / "x.tar.gz", b"")
  (tmp_path / "empty").mkdir()
  with pytest.raises((FileNotFoundError, ValueError), match=message):
    list_units(str(tmp_path / name), per_unit=2)


# ---- captions ----


def test_captions_are_of_one_form():
  raw = [
    ("Cafe\u0301\n\tau\x00 lait ", "long"),
    ("Café au lait", "short"),  # composed, and the same
    ("  ", "short"),
    ("\u200fشكرا\u202b", "short"),  # marks of direction stay
    ("half \ud83d a pair", "long"),
  ]
  assert sources.clean_captions(raw) == (
    ("Café au lait", "long"),
    ("\u200fشكرا\u202b", "short"),
    ("half \ufffd a pair", "long"),
  )


def test_all_forms_of_captions_are_understood():
  row = {
    "captions": ["a", {"text": "b", "kind": "long"}, {"text": None}],
    "caption": "c",
    "kind": "long",
    "caption_short": "d",
    "caption_long": "e",
    "prompt": "f",
    "sharegpt4v": "g",
  }
  assert set(sources.captions_of(row)) == {
    *(("a", "short"), ("b", "long"), ("c", "long"), ("d", "short")),
    *(("e", "long"), ("f", "short"), ("g", "long")),
  }
