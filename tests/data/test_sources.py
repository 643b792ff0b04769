"""Sources: the same images are found however they lie, and nothing outside of them."""

import collections
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

from pixsigma_jax.data import rows, sources
from pixsigma_jax.data.rows import Reading
from pixsigma_jax.data.sources import Unit, entries, list_units, read_bytes

NAMES = ["a/1", "a/2", "b/1"]


def encoded(number=0, size=(12, 8), format="PNG", **options):
  """An image's bytes; `size` is width and height, as Pillow has it."""
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


def found(source, per_unit=2, reading=Reading()):
  return found_and_passed_over(source, per_unit, reading)[0]


def found_and_passed_over(source, per_unit=2, reading=Reading()):
  """The entries of a source, and the counts of what is none."""
  source, counts = str(source), collections.Counter()
  options = {"reading": reading, "passed_over": counts}
  units = list_units(source, per_unit=per_unit, **options)
  return [e for unit in units for e in entries(source, unit, **options)], dict(counts)


def captions_by_id(source, **options):
  return {e.id: [text for text, _ in e.captions] for e in found(source, **options)}


@pytest.fixture
def folder(tmp_path):
  for number, name in enumerate(NAMES):
    write(tmp_path / "images" / f"{name}.png", encoded(number))
    write(tmp_path / "images" / f"{name}.txt", f"image {number}\n")
  return tmp_path / "images"


def in_a_folder(folder):
  return folder


def in_a_tar(folder):
  paths = sorted(folder.rglob("*.*"))
  members = [(str(p.relative_to(folder)), p.read_bytes()) for p in paths]
  return write_tar(folder.parent / "shard.tar", members)


def in_json_lines(folder):
  rows = [
    {"path": f"images/{name}.png", "id": name, "caption": f"image {number}"}
    for number, name in enumerate(NAMES)
  ]
  lines = "\n\n".join(map(json.dumps, rows))  # blank lines are no rows
  return write(folder.parent / "list.jsonl", lines)


def in_parquet(folder):
  captions = [[{"text": f"image {number}", "kind": "short"}] for number in range(3)]
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
    {"path": f"{name}.png", "prompt": f"image {number}", "sharegpt4v": "", "ratio": 1}
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
    assert entry.captions == ((f"image {number}", "short"),)
    assert read_bytes(str(source), entry.location) == encoded(number)


def test_a_source_may_lie_where_only_fsspec_reaches():
  fs = fsspec.filesystem("memory")
  for number, name in enumerate(NAMES):
    fs.pipe_file(f"/sources/images/{name}.png", encoded(number))
  fs.pipe_file("/sources/list.jsonl", b'{"path": "images/a/2.png", "caption": "two"}')
  try:
    assert [e.id for e in found("memory://sources/images")] == NAMES
    assert read_bytes("memory://sources/images", "a/2.png") == encoded(1)
    [entry] = found("memory://sources/list.jsonl")
    assert read_bytes("memory://sources/list.jsonl", entry.location) == encoded(1)
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
  write(folder / "a/1b.png", encoded(7))  # after the units were made
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
      ("dir/001.v2.jpg", encoded(2)),
      ("dir/002.jpg", encoded(0)),
      ("dir/002.json", b'{"caption_long": "a", "caption_short": "b"}'),
      ("dir/._002.jpg", b"what macOS leaves"),
      ("dir/003.JPG", encoded(1)),
    ],
  )
  assert [(e.id, e.captions) for e in found(tmp_path)] == [
    ("sub/x/dir/001.v2", ()),
    ("sub/x/dir/002", (("a", "long"), ("b", "short"))),
    ("sub/x/dir/003", ()),
  ]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_in_tars_are_read_whole(format, tmp_path):
  name = "a long name/" * 40 + "bär" * 30
  source = write_tar(tmp_path / "x.tar", [(f"{name}.png", encoded())], format=format)
  [entry] = found(source)
  assert entry.id == f"x/{name}"
  assert read_bytes(str(source), entry.location) == encoded()


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
      ("../up.png", encoded()),
      ("/etc/top.png", encoded()),
      link("soft.png", "/etc/passwd"),
      link("hard.png", "/etc/passwd", tarfile.LNKTYPE),
      ("twice.png", encoded()),
      ("twice.jpg", encoded()),
      ("other.png", encoded()),
      ("twice.webp", encoded()),
      ("mute.png", encoded()),
      ("mute.txt", b"\xff\xfe\xff"),
    ],
  )
  assert {(e.id, e.error) for e in found(source)} == {
    ("x/../up", "its path leads outside of the source's folder"),
    ("x//etc/top", "its path leads outside of the source's folder"),
    ("x/soft", "a link, a device or a sparse file in a tar"),
    ("x/hard", "a link, a device or a sparse file in a tar"),
    ("x/twice", None),
    ("x/twice.jpg", "has the id of another file: twice.png"),
    ("x/other", None),
    ("x/twice.webp", "has the id of another file: twice.png"),
    (
      "x/mute",
      "its captions cannot be read: not UTF-8, nor UTF-16 that begins with its mark",
    ),
  }


@pytest.mark.parametrize("cut", ["within an image", "within a header", "no end mark"])
def test_a_truncated_tar_gives_what_is_whole_and_says_so(cut, tmp_path):
  members = [(f"{i}.png", b"x" * 600) for i in range(3)]
  source = write_tar(tmp_path / "x.tar", members)
  end = {"within an image": 4000, "within a header": 3072 + 100, "no end mark": 4608}
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
  write(tmp_path / "secret.png", encoded(9))
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
  assert read_bytes(str(folder), by_id["e"].location) == encoded(2)
  assert by_id["loop"].error == "a link to a folder, which is not followed"


@pytest.mark.parametrize(
  "location",
  ["../secret.png", "a/../../secret.png", "/etc/hostname", "..", ".", "", "a\0.png"],
)
def test_no_location_leads_out_of_the_source(location, folder, tmp_path):
  write(tmp_path / "secret.png", encoded(9))
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
  write(folder / "a" / "1.jpg", encoded(5, format="JPEG"))
  by_location = {e.location: e.error for e in found(folder, 1)}
  assert by_location["a/1.jpg"] is None
  assert by_location["a/1.png"] == "has the id of another file: 1.jpg"


def test_a_name_that_is_not_utf8_is_a_row(folder):
  (folder / "b" / os.fsdecode(b"\xff.png")).write_bytes(encoded())
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


def test_a_url_is_said_to_be_one(tmp_path):
  rows = b'{"path": "https://x.org/1.jpg"}\n{"image": "http://x.org/2.jpg"}\n'
  for entry in found(write(tmp_path / "list.jsonl", rows)):
    assert entry.error == (
      "a bad row: a URL, which is not followed: fetch the images first, as with "
      "img2dataset"
    )
  table = pa.table({"URL": ["https://x.org/1.jpg"], "TEXT": ["a"]})
  pq.write_table(table, tmp_path / "x.parquet")
  with pytest.raises(ValueError, match=r"URLs \(URL\) are not followed: fetch"):
    list_units(str(tmp_path / "x.parquet"), per_unit=2)


def test_a_line_without_an_end_is_one_bad_row(folder, monkeypatch):
  monkeypatch.setattr(rows, "MOST_LINE_BYTES", 64)
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
  with pytest.raises(ValueError, match=r"the columns url, and none of path, file_name"):
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


# ---- keys of tars ----


def test_a_dotted_key_keeps_its_image(tmp_path):
  members = [
    ("photo.v1.0.jpg", encoded(0)),
    ("photo.v1.0.txt", b"the first"),
    ("photo.v1.1.JPG", encoded(1)),
    ("photo.v1.1.JPG.txt", b"the second"),
  ]
  source = write_tar(tmp_path / "x.tar", members)
  assert captions_by_id(source) == {
    "x/photo.v1.0": ["the first"],
    "x/photo.v1.1": ["the second"],
  }
  assert [e.error for e in found(source)] == [None, None]
  second = found(source)[1]
  assert read_bytes(str(source), second.location) == encoded(1)


def test_what_a_key_says_is_said_of_each_of_its_images(tmp_path):
  members = [
    ("a/0.left.jpg", encoded(0)),
    ("a/0.right.jpg", encoded(1)),
    ("a/0.txt", b"a pair"),
    ("a/1.left.jpg", encoded(2)),
    ("a/1.left.txt", b"its own goes before the key's"),
    ("a/1.txt", b"a pair"),
    ("b/0.left.jpg", encoded(3)),
  ]
  source = write_tar(tmp_path / "x.tar", members)
  assert captions_by_id(source) == {
    "x/a/0.left": ["a pair"],
    "x/a/0.right": ["a pair"],
    "x/a/1.left": ["its own goes before the key's"],
    "x/b/0.left": [],
  }
  _, passed_over = found_and_passed_over(source)
  assert passed_over == {".txt beside no image": 1}


@pytest.mark.parametrize("order", ["by name", "by kind", "captions first", "backwards"])
def test_captions_join_their_images_wherever_they_are_in_a_tar(order, tmp_path):
  members = [
    member
    for number in range(3)
    for member in [
      (f"{number}.jpg", encoded(number)),
      (f"{number}.json", b'{"caption": "json %d"}' % number),
      (f"{number}.txt", b"text %d" % number),
    ]
  ]
  kinds = {"by kind": 1, "captions first": -1}
  if order in kinds:
    members.sort(key=lambda member: kinds[order] * "jo t".find(member[0][2]))
  if order == "backwards":
    members.reverse()
  source = write_tar(tmp_path / "x.tar", members)
  by_id = {e.id: e for e in found(source)}
  assert sorted(by_id) == ["x/0", "x/1", "x/2"]
  for number in range(3):
    entry = by_id[f"x/{number}"]
    assert entry.error is None
    texts = {text for text, _ in entry.captions}
    assert texts == {f"json {number}", f"text {number}"}
    assert read_bytes(str(source), entry.location) == encoded(number)


def test_a_name_that_is_in_a_tar_twice_is_called_that(tmp_path):
  names = ["1.jpg", "2.jpg", "1.jpg"]  # as `tar -r` adds to a tar
  source = write_tar(tmp_path / "x.tar", [(name, encoded()) for name in names])
  assert [(e.id, e.error) for e in found(source)] == [
    ("x/1", None),
    ("x/2", None),
    ("x/1.jpg", "its name is in the tar twice"),
  ]


def test_of_captions_that_are_in_a_tar_twice_the_first_stay_with_the_first_image(
  tmp_path,
):
  members = [
    *(("1.jpg", encoded(1)), ("1.txt", b"one")),
    *(("1.jpg", encoded(2)), ("1.txt", b"two")),
  ]
  source = write_tar(tmp_path / "x.tar", members)
  (first, second), passed_over = found_and_passed_over(source)
  assert (first.captions, first.error) == ((("one", "short"),), None)
  assert second.error == "its name is in the tar twice"
  assert passed_over == {".txt whose name is in the tar twice": 1}


@pytest.mark.parametrize(
  ("kind", "start"),
  [("gzip", b"\x1f\x8b\x08"), ("zip", b"PK\x03\x04"), ("zstd", b"\x28\xb5\x2f\xfd")],
)
def test_a_compressed_file_that_is_named_tar_is_called_what_it_is(
  kind, start, tmp_path
):
  write(tmp_path / "x.tar", start + b"x" * 2000)
  [entry] = found(tmp_path)
  assert entry.error == (
    f"a tar that cannot be read: it is a {kind}, not a tar: unpack it first"
  )


@pytest.mark.parametrize("name", ["X.TAR", "x.Tar"])
def test_the_case_of_a_tars_extension_is_nothing(name, folder):
  tar = in_a_tar(folder).rename(folder.parent / name)
  [entry, *_] = found(tar)
  assert (entry.id, read_bytes(str(tar), entry.location)) == (
    f"{name[0]}/a/1",
    encoded(0),
  )


# ---- captions beside images ----

FILES = {
  "a.txt": "t",
  "a.text": "text",
  "a.caption": "caption",
  "a.json": '{"caption": "json"}',
  "a.jpg.txt": "jpg.txt",
  "a.jpg.json": '{"text": "jpg.json"}',
  "b.TXT": "B",
  "b.JPEG.Caption": "B caption",
  "c.txt": "none of b's",
}
IMAGES = ["a.jpg", "b.JPEG", "d.jpe"]


def beside_images(layout, tmp_path, files, images=IMAGES):
  """A folder or a tar with images and what lies beside them."""
  everything = {**dict.fromkeys(images, encoded()), **files}
  if layout == "tar":
    members = [
      (name, data if isinstance(data, bytes) else data.encode())
      for name, data in everything.items()
    ]
    return write_tar(tmp_path / "x.tar", members)
  for name, data in everything.items():
    write(tmp_path / "x" / name, data)
  return tmp_path / "x"


def short_ids(entries):
  return {e.id.removeprefix("x/"): {text for text, _ in e.captions} for e in entries}


@pytest.mark.parametrize("layout", ["folder", "tar"])
def test_every_file_of_captions_is_read_or_counted(layout, tmp_path):
  source = beside_images(layout, tmp_path, FILES)
  all_found, passed_over = found_and_passed_over(source)
  assert short_ids(all_found) == {
    "a": {"t", "text", "caption", "json", "jpg.txt", "jpg.json"},
    "b": {"B", "B caption"},
    "d": set(),
  }
  assert passed_over == {".txt beside no image": 1}


OTHERS = {
  "exiftool": '[{"SourceFile": "a.jpg", "Caption": "x"}]',
  "comfy": '{"prompt": {"3": {"class_type": "KSampler"}}, "nodes": []}',
  "takeout": '{"title": "a.jpg", "description": "x"}',
  "numbers": '{"caption": 5}',
  "masks": json.dumps({"annotations": ["x" * 100] * 20_000}),
}


@pytest.mark.parametrize("layout", ["folder", "tar"])
@pytest.mark.parametrize("program", OTHERS)
@pytest.mark.parametrize("has_text", [True, False])
def test_json_of_another_program_takes_no_image_away(
  layout, program, has_text, tmp_path
):
  files = {"a.json": OTHERS[program]} | ({"a.txt": "good"} if has_text else {})
  source = beside_images(layout, tmp_path, files, ["a.jpg"])
  [entry], passed_over = found_and_passed_over(source)
  assert entry.error is None
  assert [text for text, _ in entry.captions] == (["good"] if has_text else [])
  assert passed_over == {".json without captions": 1}


@pytest.mark.parametrize("layout", ["folder", "tar"])
@pytest.mark.parametrize("name", ["a.txt", "a.json"])
def test_captions_that_cannot_be_read_refuse_an_image_only_without_others(
  layout, name, tmp_path
):
  bad = {name: b'\xff{"caption": '}
  source = beside_images(layout, tmp_path / "1", bad, ["a.jpg"])
  [entry], passed_over = found_and_passed_over(source)
  assert entry.error.startswith("its captions cannot be read: not UTF-8")
  assert passed_over == {}
  source = beside_images(layout, tmp_path / "2", {**bad, "a.caption": "x"}, ["a.jpg"])
  [entry], passed_over = found_and_passed_over(source)
  assert (entry.error, entry.captions) == (None, (("x", "short"),))
  assert passed_over == {f".{name[2:]} that cannot be read, beside others": 1}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_captions_may_be_in_any_encoding_that_says_so(encoding, tmp_path):
  marks = {"utf-16-be": b"\xfe\xff"}
  text = marks.get(encoding, b"") + "ein Bär\r\n".encode(encoding)
  write(tmp_path / "a.jpg", encoded())
  write(tmp_path / "a.txt", text)
  assert captions_by_id(tmp_path) == {"a": ["ein Bär"]}


def test_utf_16_without_its_mark_is_not_taken_for_words_apart(tmp_path):
  write(tmp_path / "a.jpg", encoded())
  write(tmp_path / "a.txt", "red".encode("utf-16-le"))
  [entry] = found(tmp_path)
  assert entry.error == (
    "its captions cannot be read: text with zero bytes, such as UTF-16 that lacks its "
    "mark"
  )


def test_a_manifest_in_utf_16_says_how_to_write_it(tmp_path):
  source = write(tmp_path / "x.jsonl", '{"path": "a.jpg"}'.encode("utf-16"))
  with pytest.raises(ValueError, match=r"x.jsonl is UTF-16: write it as UTF-8"):
    found(source)


@pytest.mark.parametrize("layout", ["folder", "tar"])
def test_lines_are_captions_of_their_own_if_that_is_asked(layout, tmp_path):
  files = {"a.txt": "one\r\n\r\ntwo\nthree", "a.json": '{"caption": "four\\nfive"}'}
  source = beside_images(layout, tmp_path, files, ["a.jpg"])
  assert short_ids(found(source)) == {"a": {"one two three", "four five"}}
  per_line = found(source, reading=Reading(caption_per_line=True))
  assert short_ids(per_line) == {"a": {"one", "two", "three", "four five"}}


# ---- what is passed over ----


def test_what_is_no_image_is_counted_by_extension(folder):
  for name in ("1.jxl", "2.dng", "3.DNG", "4", "Thumbs.db", "README.md", "x.tar.gz"):
    write(folder / "c" / name, "x")
  write(folder / "a" / "._1.png", "what macOS leaves")
  write(folder / "a" / "@eaDir" / "1.png" / "SYNOPHOTO_THUMB_M.jpg", encoded(8))
  write(folder / "__MACOSX" / "a" / "._1.png", "x")
  write(folder / "d.jpe", encoded(7))
  all_found, passed_over = found_and_passed_over(folder)
  assert [e.id for e in all_found] == [*NAMES, "d"]
  assert passed_over == {
    **{".jxl": 1, ".dng": 2, "no extension": 1, ".db": 1, ".md": 1, ".tar.gz": 1},
    "hidden (the name begins with a dot)": 1,
    "@eaDir (folder)": 1,
    "__MACOSX (folder)": 1,
  }


def test_what_is_in_a_tar_and_no_image_is_counted(tmp_path):
  members = [
    ("0.jpg", encoded()),
    ("0.cls", b"7"),
    ("0.seg.npy", b"x"),
    ("._0.jpg", b"x"),
    ("@eaDir/0.jpg", encoded()),
    ("README", b"x"),
    ("1.txt", b"of no image"),
  ]
  all_found, passed_over = found_and_passed_over(write_tar(tmp_path / "x.tar", members))
  assert [e.id for e in all_found] == ["x/0"]
  assert passed_over == {
    **{".cls": 1, ".npy": 1, "no extension": 1, ".txt beside no image": 1},
    "hidden (the name begins with a dot)": 1,
    "@eaDir (folder)": 1,
  }


def test_a_folder_without_images_says_what_it_has(tmp_path):
  for name in ("1.dng", "2.dng", "x.tgz"):
    write(tmp_path / "images" / name, "x")
  with pytest.raises(ValueError, match=r"passed over: 2 of \.dng, 1 of \.tgz\."):
    found(tmp_path / "images")


def test_a_link_to_itself_is_a_row(folder):
  os.symlink("a.png", folder / "a.png")
  by_id = {e.id: e for e in found(folder)}
  with pytest.raises((OSError, ValueError)):
    read_bytes(str(folder), by_id["a"].location)
  assert len(by_id) == 4


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
    "text": "read where there is nothing else",
  }
  assert set(sources.captions_of(row)) == {
    *(("a", "short"), ("b", "long"), ("c", "long"), ("d", "short")),
    *(("e", "long"), ("f", "short"), ("g", "long")),
  }


@pytest.mark.parametrize(
  ("row", "fields", "wanted"),
  [
    ({"caption": ["a", "b"], "kind": "long"}, [], [("a", "long"), ("b", "long")]),
    ({"caption_short": ["a", None]}, [], [("a", "short")]),
    ({"text": "a"}, [], [("a", "short")]),
    ({"text": ["a", "b"], "caption": None}, [], [("a", "short"), ("b", "short")]),
    ({"text": [1, 2]}, [], []),  # tokens
    ({"alt": "a", "caption": "b"}, ["alt"], [("a", "short")]),
    ({"x": "a", "y": ["b"]}, ["y:long", "x"], [("b", "long"), ("a", "short")]),
    ({"a:b": "c"}, ["a:b"], [("c", "short")]),
    ({"text": "a"}, ["alt"], []),
  ],
)
def test_captions_are_in_the_fields_that_are_asked_for(row, fields, wanted):
  assert sources.captions_of(row, fields) == wanted


@pytest.mark.parametrize("layout", ["jsonl", "parquet"])
def test_fields_may_have_any_name(layout, folder):
  rows = [
    {"id": name, "img": f"images/{name}.png", "alt": f"alt {name}", "caption": "none"}
    for name in NAMES
  ]
  source = folder.parent / f"list.{layout}"
  if layout == "jsonl":
    write(source, "\n".join(map(json.dumps, rows)))
  else:
    pq.write_table(pa.Table.from_pylist(rows), source)
  reading = Reading(("alt:long",), "img")
  for entry in found(source, reading=reading):
    assert entry.captions == ((f"alt {entry.id}", "long"),)
    assert read_bytes(str(source), entry.location) == encoded(NAMES.index(entry.id))
  with pytest.raises(ValueError, match=r"none of the fields of --caption_field=al, on"):
    found(source, reading=Reading(("al",), "img"))
  with pytest.raises(ValueError, match=r"no field of --image_field=im, only id, img"):
    found(source, reading=Reading((), "im"))


@pytest.mark.parametrize("layout", [in_a_folder, in_a_tar])
def test_a_field_of_rows_is_refused_where_there_are_none(layout, folder):
  with pytest.raises(ValueError, match="--image_field=img is a field of a manifest's"):
    found(layout(folder), reading=Reading(image_field="img"))
