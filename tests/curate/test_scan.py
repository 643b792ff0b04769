"""Scanning: what is there is found, named and compared, whatever happens on the way."""

import functools
import hashlib
import io
import itertools
import json
import os
import pathlib
import tarfile

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import skimage.data
from PIL import Image

from pixsigma_jax.curate import scan as scan_module
from pixsigma_jax.curate.scan import Candidate, compare_group, perceptual_hash, scan
from pixsigma_jax.data import sources
from pixsigma_jax.data.image_bytes import open_image
from pixsigma_jax.data.rows import Reading

PROCESSES = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]


def photo(name, height=None):
  image = Image.fromarray(getattr(skimage.data, name)())
  if height is None:
    return image
  return image.resize((round(image.width * height / image.height), height))


def encoded(image, format="PNG", **options):
  file = io.BytesIO()
  image.save(file, format, **options)
  return file.getvalue()


def scanned(
  tmp_path, files, *, distance=4, per_part=2, options=(), name="index", **further
):
  for path, content in files.items():
    path = tmp_path / "images" / path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
  return scan(
    str(tmp_path / name),
    str(tmp_path / "images"),
    per_part=per_part,
    near_distance=distance,
    beam_options=list(options),
    **further,
  )


def rows(index, *steps):
  steps = steps or ("scan", "duplicates")
  parts = [index.read(part, *steps).to_pylist() for part in range(index.num_parts)]
  return {row["id"]: row for part in parts for row in part}


def duplicates(index):
  found = rows(index)
  return {id: row["duplicate_of"] for id, row in found.items() if row["duplicate_of"]}


def content(index):
  """Every file of an index."""
  folder = pathlib.Path(index.directory)
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob("*")
    if path.is_file()
  }


@functools.cache
def heap():
  """A heap of images as people have them."""
  astronaut, chelsea = photo("astronaut", 160), photo("chelsea", 120)
  turned = Image.Exif()
  turned[0x0112] = 6
  return {
    "a/astronaut.png": encoded(astronaut),
    "a/smaller.jpg": encoded(photo("astronaut", 96), "JPEG", quality=80),
    "a/the same.png": encoded(astronaut),
    "b/cat.webp": encoded(chelsea, "WEBP", quality=85),
    "b/lying.jpg": encoded(
      photo("coffee", 96).transpose(Image.Transpose.ROTATE_90), "JPEG", exif=turned
    ),
    "b/coffee.png": encoded(photo("coffee", 96)),
    "c/cut.png": encoded(astronaut)[:4000],
    "c/page.jpg": b"<html>404</html>",
    "c/phone.heic": b"\0\0\0 ftypheic",
    "c/black.png": encoded(Image.new("RGB", (64, 64))),
    "c/white.png": encoded(Image.new("RGB", (60, 64), "white")),
    "c/white.txt": b"all white",
  }


def stamps(index):
  folder = pathlib.Path(index.directory)
  files = [path for path in folder.rglob("*") if path.is_file()]
  return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


@pytest.fixture(scope="module")
def index(tmp_path_factory):
  return scanned(tmp_path_factory.mktemp("scan"), heap())


def test_every_image_is_a_row_and_its_facts_are_right(index):
  found = rows(index)
  assert list(found) == [name.rsplit(".", 1)[0] for name in sorted(heap())][:-1]
  cat, data = found["b/cat"], heap()["b/cat.webp"]
  assert (cat["height"], cat["width"], cat["format"]) == (120, 180, "WEBP")
  assert (cat["bytes"], cat["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
  assert cat["error"] is None
  lying = found["b/lying"]  # stored 144 x 96, shown upright
  assert (lying["height"], lying["width"]) == (96, 144)
  assert found["c/white"]["captions"] == [{"text": "all white", "kind": "short"}]


def test_damaged_files_are_named_and_stop_nothing(index):
  found = rows(index)
  assert found["c/cut"]["error"].startswith("truncated")
  assert (found["c/cut"]["height"], found["c/cut"]["format"]) == (160, "PNG")
  assert found["c/page"]["error"] == "not an image"
  assert found["c/phone"]["error"].startswith("damaged: HEIC")
  report = json.loads(content(index)["scan/report.json"])
  assert (report["images"], report["duplicates"]) == (11, 3)
  assert report["errors"] == {"damaged": 1, "not an image": 1, "truncated": 1}
  assert [row["id"] for row in report["first_errors"]] == ["c/cut", "c/page", "c/phone"]


def test_duplicates_are_of_the_largest_then_of_the_smallest_id(index):
  assert duplicates(index) == {
    "a/smaller": "a/astronaut",  # near: half the size and JPEG
    "a/the same": "a/astronaut",  # exact
    "b/lying": "b/coffee",  # near: turned by EXIF, and JPEG
  }


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea", "rocket"])
def test_a_photograph_is_known_again(name):
  image = photo(name)
  whole = perceptual_hash(image)
  half = image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
  poor = open_image(encoded(image, "JPEG", quality=50))
  draft = open_image(encoded(image, "JPEG", quality=90), at_least=128)
  for other in (half, poor, draft):
    # The default distance.
    assert (whole ^ perceptual_hash(other)).bit_count() <= 4


def test_different_photographs_are_far_apart():
  names = [
    "astronaut",
    "coffee",
    "chelsea",
    "rocket",
    "moon",
    "camera",
    "coins",
    "page",
  ]
  hashes = [perceptual_hash(photo(name)) for name in names]
  distances = [(a ^ b).bit_count() for a, b in itertools.combinations(hashes, 2)]
  # Random bits would be 32 apart; 16 leaves four times the default.
  assert min(distances) >= 16


@pytest.mark.parametrize(
  "pixels",
  [
    np.full((64, 64), 0),
    np.full((64, 64), 200),
    np.add.outer(np.zeros(64), np.arange(64) * 4),
    np.add.outer(np.arange(64) * 4, np.zeros(64)),
    np.add.outer(np.arange(64) * 2, np.arange(64) * 2),
    np.kron([[0, 255]], np.ones((64, 32))),
    128 + np.random.default_rng(0).integers(-1, 2, (64, 64)),
  ],
  ids=["black", "gray", "across", "down", "diagonal", "two halves", "noise"],
)
def test_an_image_with_little_in_it_has_no_perceptual_hash(pixels):
  assert perceptual_hash(Image.fromarray(pixels.astype(np.uint8))) is None


def test_flat_images_are_not_duplicates_of_each_other(tmp_path):
  colors = ["black", "white", "red", "teal"]
  files = {f"{c}.png": encoded(Image.new("RGB", (40, 40), c)) for c in colors}
  files["again.png"] = files["teal.png"]
  assert duplicates(scanned(tmp_path, files)) == {"teal": "again"}  # equal bytes


def brute_force(members, distance):
  """`compare_group` by definition."""
  found = {}
  for candidate, phash in members:
    like = [c for c, other in members if (phash ^ other).bit_count() <= distance]
    if min(like) != candidate:
      found[candidate.part, candidate.row] = min(like)
  return found


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=60)
def test_bands_find_all_that_are_near(data):
  distance = data.draw(st.integers(0, 6))
  base = data.draw(st.integers(0, 2**64 - 1))
  members = []
  for row in range(data.draw(st.integers(1, 12))):
    flips = data.draw(st.sets(st.integers(0, 63), max_size=8))
    phash = base ^ sum(1 << bit for bit in flips)
    area = data.draw(st.integers(1, 3))
    members.append((Candidate(-area, str(row % 5), 0, row), phash))
  groups = {}
  for candidate, phash in members:
    for band in scan_module._bands(phash, distance):
      groups.setdefault(band, []).append((candidate, f"{phash:x}"))
  found = {}
  for group in groups.items():
    for place, best in compare_group(distance, group):
      found[place] = min(best, found.get(place, best))
  assert found == brute_force(members, distance)


def test_many_hashes_are_compared_in_pieces(monkeypatch):
  hashes = np.random.default_rng(0).integers(0, 2**64, 50, np.uint64)
  hashes[40] = hashes[3] ^ np.uint64(5)
  whole = scan_module.nearest_best(hashes, 2)
  assert whole.tolist() == [3 if i == 40 else i for i in range(50)]
  monkeypatch.setattr(scan_module, "_MOST_PAIRS", 120)
  np.testing.assert_array_equal(scan_module.nearest_best(hashes, 2), whole)


def test_a_scan_by_other_processes_is_the_same(index, tmp_path):
  there = scanned(tmp_path, heap(), options=PROCESSES)
  ours, theirs = content(index), content(there)
  del ours["index.json"], theirs["index.json"]  # they name their sources
  assert ours == theirs


def test_parts_may_be_of_any_size(index, tmp_path):
  assert rows(scanned(tmp_path, heap(), per_part=100)) == rows(index)


def test_a_scan_goes_on_after_its_finished_parts(tmp_path):
  index = scanned(tmp_path, heap())
  wanted = content(index)
  folder = pathlib.Path(index.directory)
  for path in ("scan/00001.parquet", "duplicates/00003.parquet"):
    (folder / path).unlink()
  before = stamps(index)
  scanned(tmp_path, {})
  assert content(index) == wanted
  changed = {path for path, stamp in stamps(index).items() if before.get(path) != stamp}
  assert changed == {
    *("scan/00001.parquet", "duplicates/00003.parquet", "scan/report.json")
  }
  before = stamps(index)
  scanned(tmp_path, {})  # and finished, the same command does nothing
  assert stamps(index) == before


def test_another_distance_compares_anew(tmp_path):
  coffee = photo("coffee", 96)
  stamped = coffee.copy()
  stamped.paste("gray", (0, 0, 15, 8))
  bits = (perceptual_hash(coffee) ^ perceptual_hash(stamped)).bit_count()
  assert 0 < bits <= 4
  files = {"coffee.png": encoded(coffee), "stamped.png": encoded(stamped)}
  index = scanned(tmp_path, files, distance=bits)
  assert duplicates(index) == {"stamped": "coffee"}
  assert duplicates(scanned(tmp_path, {}, distance=bits - 1)) == {}
  assert index.settings("duplicates") == {"near_distance": bits - 1}


@pytest.mark.parametrize("distance", [-1, 32])
def test_a_distance_is_one_of_hashes(tmp_path, distance):
  with pytest.raises(
    ValueError, match=f"--near_distance={distance} is not from 0 to 31"
  ):
    scanned(tmp_path, {}, distance=distance)


def test_an_image_listed_twice_is_its_own_duplicate(tmp_path):
  (tmp_path / "x.png").write_bytes(encoded(photo("chelsea", 64)))
  (tmp_path / "list.jsonl").write_text('{"path": "x.png"}\n' * 2)
  index = scan(
    str(tmp_path / "index"),
    str(tmp_path / "list.jsonl"),
    per_part=1,
    near_distance=4,
    beam_options=[],
  )
  found = [index.read(p, "duplicates")["duplicate_of"].to_pylist() for p in range(2)]
  assert found == [[None], ["x"]]


def test_tars_are_scanned_as_folders_are(index, tmp_path):
  with tarfile.open(tmp_path / "images.tar", "w") as tar:
    for name, data in sorted(heap().items()):
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
  there = scan(
    str(tmp_path / "index"),
    str(tmp_path / "images.tar"),
    per_part=9,
    near_distance=4,
    beam_options=[],
  )
  facts = ["sha256", "phash", "height", "width", "error", "captions"]
  ours = [[row[fact] for fact in facts] for row in rows(index).values()]
  assert [[row[fact] for fact in facts] for row in rows(there).values()] == ours


def test_an_image_that_vanished_is_a_row(tmp_path):
  entry = sources.Entry("gone", "gone.png")
  assert scan_module.scanned(str(tmp_path), entry)["error"] == "no such file"
  os.mkdir(tmp_path / "folder.png")
  entry = sources.Entry("folder", "folder.png")
  assert scan_module.scanned(str(tmp_path), entry)["error"] == "not an ordinary file"


# ---- what was read ----


def test_a_path_that_was_written_on_windows_is_said_to_be_one(tmp_path):
  (tmp_path / "a").mkdir()
  photo("rocket", 96).save(tmp_path / "a" / "1.png")
  entries = [sources.Entry("1", path) for path in ("a\\1.png", "a/2.png", "a/1.png")]
  errors = [scan_module.scanned(str(tmp_path), entry)["error"] for entry in entries]
  parted = "no such file: its path has \\, and folders are parted by /"
  assert errors == [parted, "no such file", None]


def test_the_report_says_what_has_no_caption_and_what_was_passed_over(tmp_path):
  files = {
    **{f"{n}.png": encoded(photo(n, 64)) for n in ("coffee", "rocket", "chelsea")},
    "coffee.caption": b"a cup",
    "rocket.json": b"[1]",
    "broken.png": b"x",
    "tea.txt": b"of no image",
    "x.jxl": b"x",
    "@eaDir/coffee.png/SYNOPHOTO_THUMB_M.jpg": encoded(photo("coffee", 32), "JPEG"),
  }
  index = scanned(tmp_path, files)
  report = scan_module.report(index)
  assert (report["images"], report["without_caption"]) == (4, 2)
  assert report["passed_over"] == {
    ".json without captions": 1,
    ".jxl": 1,
    ".txt beside no image": 1,
    "@eaDir (folder)": 1,
  }
  assert json.loads(content(index)["scan/report.json"]) == report
  before = stamps(index)
  assert scan_module.report(scanned(tmp_path, {})) == report
  assert stamps(index) == before


def test_what_was_passed_over_in_every_tar_is_added_up(tmp_path):
  (tmp_path / "images").mkdir()
  for shard in range(2):
    with tarfile.open(tmp_path / "images" / f"{shard}.tar", "w") as tar:
      for name, data in [("a.png", encoded(photo("coffee", 64))), ("a.cls", b"7")]:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
  report = scan_module.report(scanned(tmp_path, {"b.jxl": b"x"}))
  assert report["passed_over"] == {".cls": 2, ".jxl": 1}


@pytest.mark.parametrize("options", [[], PROCESSES], ids=["here", "processes"])
def test_every_worker_reads_the_fields_that_were_asked_for(options, tmp_path):
  row = {"image": {"bytes": encoded(photo("coffee", 64)), "path": None}, "alt": "a cup"}
  (tmp_path / "images").mkdir()
  pq.write_table(pa.Table.from_pylist([row] * 3), tmp_path / "images" / "x.parquet")
  reading = Reading(caption_fields=("alt:long",))
  index = scanned(tmp_path, {}, options=options, reading=reading)
  found = rows(index)
  assert list(found) == ["x/0", "x/1", "x/2"]
  for image in found.values():
    assert (image["error"], image["height"]) == (None, 64)
    assert image["captions"] == [{"text": "a cup", "kind": "long"}]
  before = stamps(index)
  with pytest.raises(
    FileExistsError,
    match="scanned with --caption_field=alt:long, not with no flag of fields: give",
  ):
    scanned(tmp_path, {})
  scanned(tmp_path, {}, options=options, reading=reading)
  assert stamps(index) == before


def test_an_index_of_before_fields_had_names_goes_on(tmp_path):
  index = scanned(tmp_path, {**heap(), "d/extra.jxl": b"x"})
  wanted, folder = rows(index), pathlib.Path(index.directory)
  for name in ("scan.json", "passed_over.json", "00001.parquet"):
    (folder / "scan" / name).unlink()
  for path in (folder / "scan").glob("*.parquet"):
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)
  again = scanned(tmp_path, {})
  assert rows(again) == wanted
  report = scan_module.report(again)
  assert (report["passed_over"], report["images"]) == ({}, 11)
  with pytest.raises(
    FileExistsError, match="not with --caption_per_line: give the sam"
  ):
    scanned(tmp_path, {}, reading=Reading(caption_per_line=True))
