"""Whatever bytes come in: no crash, no hang, nothing read outside, a reason for all."""

import contextlib
import functools
import hashlib
import io
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
from PIL import Image

from pixsigma_jax.curate import captions, scan
from pixsigma_jax.data import image_bytes, sources
from pixsigma_jax.data.index import SCHEMAS, create_index
from pixsigma_jax.data.sources import Unit

# Pillow warns of damage that it reads on through.
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")
SECRET = b"what no source may show"


@functools.cache
def encoded(format):
  pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)
  exif = Image.Exif()
  exif[0x0112] = 6
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, format, exif=exif)
  return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A source's folder, with a secret beside it."""
  root = tmp_path_factory.mktemp("fuzz")
  (root / "secret.png").write_bytes(SECRET)
  (root / "source").mkdir()
  (root / "source" / "fine.png").write_bytes(encoded("PNG"))
  return root / "source"


@pytest.fixture(autouse=True)
def nothing_outside_is_opened(folder, monkeypatch):
  """Fails a test that opens a file beside the source's folder."""
  opened = []
  real_open = io.open

  def noted(file, *args, **kwargs):
    if isinstance(file, str | os.PathLike):
      opened.append(os.path.realpath(file))
    return real_open(file, *args, **kwargs)

  monkeypatch.setattr("builtins.open", noted)
  yield
  beside = [path for path in opened if path.startswith(str(folder.parent))]
  assert [path for path in beside if not path.startswith(f"{folder}/")] == []


def mutated(data):
  """Bytes near `data`: some overwritten, a piece cut out or doubled, the end lost."""

  def change(edits):
    changed = bytearray(data)
    for kind, where, length, value in edits:
      start = where % max(1, len(changed))
      if kind == "set" and changed:
        changed[start] = value
      elif kind == "long":  # the largest and the most negative of lengths
        changed[start : start + 4] = [b"\xff" * 4, b"\x7f\xff\xff\xff"][value % 2]
      elif kind == "cut":
        del changed[start : start + length]
      elif kind == "double":
        changed[start:start] = changed[start : start + length]
      elif kind == "end":
        del changed[start:]
    return bytes(changed)

  # Headers are where lies matter: half of the edits are in the first hundred bytes.
  where = st.one_of(st.integers(0, 100), st.integers(0, len(data)))
  kinds = st.sampled_from(["set", "set", "set", "long", "cut", "double", "end"])
  edit = st.tuples(kinds, where, st.integers(1, 64), st.integers(0, 255))
  return st.lists(edit, min_size=1, max_size=6).map(change)


def assert_is_a_row(row):
  """It has a reason, or all that an image has; and an index can hold it."""
  pa.Table.from_pylist([row], schema=SCHEMAS["scan"])
  assert row.get("sha256") != hashlib.sha256(SECRET).hexdigest()
  if row["error"] is None:
    assert 0 < row["height"] * row["width"] <= image_bytes.MOST_PIXELS
    assert len(row["sha256"]) == 64
  else:
    assert row["error"]


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "AVIF"])
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=60)
def test_any_image_is_a_row(folder, format, data):
  content = data.draw(mutated(encoded(format)))
  (folder / "fuzz.png").write_bytes(content)
  assert_is_a_row(scan.scanned(str(folder), sources.Entry("fuzz", "fuzz.png")))


@hypothesis.given(st.binary(max_size=64))
@hypothesis.settings(max_examples=100)
def test_any_bytes_are_a_row(folder, content):
  (folder / "fuzz.png").write_bytes(content)
  assert_is_a_row(scan.scanned(str(folder), sources.Entry("fuzz", "fuzz.png")))


# Text of any script, halves of surrogate pairs and control characters among it.
texts = st.one_of(
  st.text(st.characters(exclude_categories=()), max_size=30),
  st.sampled_from(
    [
      "../secret.png",
      "fine.png/../../secret.png",
      "/etc/passwd",
      "fine.png\0.jpg",
      "a/" * 3000 + "x.png",
      "x.tar?offset=0&size=99999999999",
      "../x.tar?offset=0&size=9",
      "file:///etc/passwd",
      "https://example.com/x.png",
      "fine.png::simplecache",
      "\ud800",
      "\u202egnp.enif",
      "ﷺ" * 9,
      ".",
      "",
    ]
  ),
)
values = st.recursive(
  st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts),
  lambda inner: st.one_of(
    st.lists(inner, max_size=3),
    st.dictionaries(st.sampled_from(["text", "kind", "x"]), inner, max_size=3),
  ),
  max_leaves=6,
)
fields = st.sampled_from(
  [
    *("path", "file_name", "image", "id", "caption", "kind", "captions"),
    *("caption_long", "prompt", "text"),
  ]
)
manifest_rows = st.one_of(
  st.dictionaries(fields, st.one_of(texts, values), max_size=5), values
)


def scan_all(source, limit=1000):
  """All rows of a source, as scan makes them."""
  rows = []
  try:
    units = sources.list_units(str(source), per_unit=3)
  except ValueError:
    return None
  for unit in units:
    for entry in sources.entries(str(source), unit):
      row = scan.scanned(str(source), entry)
      assert_is_a_row(row)
      for caption in row["captions"]:
        assert caption["text"].strip() == caption["text"] != ""
      rows.append(row)
      assert len(rows) < limit, "does not end"
  return rows


@hypothesis.given(st.lists(manifest_rows, max_size=6))
@hypothesis.settings(max_examples=120)
def test_any_manifest_is_rows(folder, rows):
  path = folder / "fuzz.jsonl"
  path.write_text("\n".join(map(json.dumps, rows)))
  found = scan_all(path)
  assert len(found or []) == len(rows)


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=60)
def test_any_bytes_are_a_manifest_of_bad_rows(folder, data):
  lines = b'{"path": "fine.png", "caption": "a"}\n' * 3
  path = folder / "fuzz.jsonl"
  path.write_bytes(data.draw(mutated(lines)))
  scan_all(path)


@functools.cache
def parquet():
  file = io.BytesIO()
  table = pa.table(
    {
      "path": ["fine.png", "../secret.png", "gone.png"],
      "captions": [[{"text": "a", "kind": "long"}], [], None],
      "caption_short": ["b", None, "c"],
    }
  )
  pq.write_table(table, file, row_group_size=2)
  return file.getvalue()


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=120)
def test_any_parquet_is_refused_or_rows(folder, data):
  path = folder / "fuzz.parquet"
  path.write_bytes(data.draw(mutated(parquet())))
  scan_all(path)


@functools.cache
def parquet_of_images():
  file = io.BytesIO()
  images = [
    {"bytes": encoded("PNG"), "path": "a.png"},
    {"bytes": None, "path": "../secret.png"},
    {"bytes": None, "path": "fine.png"},
    None,
  ]
  table = pa.table({"image": images, "text": ["a", None, "c", "d"]})
  pq.write_table(table, file, row_group_size=2)
  return file.getvalue()


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=120)
def test_any_parquet_of_images_is_refused_or_rows(folder, data):
  path = folder / "fuzz.parquet"
  path.write_bytes(data.draw(mutated(parquet_of_images())))
  scan_all(path)


@pytest.mark.parametrize(
  ("name", "content"),
  [
    ("metadata.csv", b'file_name,text\r\nfine.png,"a ""b"", c\r\nd"\r\nno.png,e\r\n'),
    ("metadata.jsonl", b'{"file_name": "fine.png", "text": "a"}\n' * 3),
  ],
)
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=60)
def test_any_table_leaves_its_folders_images(folder, name, content, data):
  tables = folder / name.replace(".", "-")
  tables.mkdir(exist_ok=True)
  (tables / "fine.png").write_bytes(encoded("PNG"))
  (tables / name).write_bytes(data.draw(mutated(content)))
  [row] = scan_all(tables)
  assert row["error"] is None


@functools.cache
def tar(format):
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode="w", format=format) as archive:
    for name, content in {
      "1.png": encoded("PNG"),
      "1.txt": b"one",
      "n" * 150 + "/2.jpg": encoded("JPEG"),
      "ü/3.png": b"",
      "../secret.png": encoded("PNG"),
      "1.json": b'{"caption": "again"}',
    }.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      archive.addfile(info, io.BytesIO(content))
    link = tarfile.TarInfo("4.png")
    link.type, link.linkname = tarfile.SYMTYPE, "../secret.png"
    archive.addfile(link)
  return file.getvalue()


def with_true_checksums(data):
  """A tar's headers as a liar would write them: their checksums agree."""
  data = bytearray(data)
  for start in range(0, len(data) - 511, 512):
    block = data[start : start + 512]
    if block[257:262] == b"ustar":
      block[148:156] = b" " * 8
      data[start + 148 : start + 156] = b"%06o\0 " % sum(block)
  return bytes(data)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=100)
def test_any_tar_is_rows(folder, format, data):
  content = data.draw(mutated(tar(format)))
  if data.draw(st.booleans()):
    content = with_true_checksums(content)
  path = folder / "fuzz.tar"
  path.write_bytes(content)
  scan_all(path)


@hypothesis.given(st.integers(-(2**62), 2**62), st.integers(0, 7))
@hypothesis.settings(max_examples=60)
def test_a_tar_may_claim_any_size(folder, size, member):
  content = bytearray(tar(tarfile.GNU_FORMAT))
  starts = [
    start
    for start in range(0, len(content) - 511, 512)
    if content[start + 257 : start + 262] == b"ustar"
  ]
  field = starts[member] + 124
  content[field : field + 12] = (
    b"%011o\0" % size
    if 0 <= size < 8**11
    else (size % 2**95 | 2**95 | (2**96 - 2**95) * (size < 0)).to_bytes(12)
  )
  path = folder / "fuzz.tar"
  path.write_bytes(with_true_checksums(content))
  scan_all(path)


@hypothesis.given(texts)
@hypothesis.settings(max_examples=200)
def test_no_location_is_outside(folder, location):
  with contextlib.suppress(ValueError, OSError):
    assert SECRET not in sources.read_bytes(str(folder), location)


@hypothesis.given(st.lists(texts, max_size=5), st.sampled_from(["long", "short"]))
@hypothesis.settings(max_examples=200)
def test_any_caption_can_be_kept(raw, kind):
  cleaned = sources.clean_captions([(text, kind) for text in raw])
  assert sources.clean_captions(cleaned) == cleaned  # once is enough
  for text, _ in cleaned:
    assert text.encode().decode() == text
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in text)
  found = [[{"text": text, "kind": kind} for text, kind in cleaned]]
  table = pa.table({"captions": found}, schema=SCHEMAS["captions"])
  assert table["captions"].to_pylist() == found


@hypothesis.given(rows=st.lists(manifest_rows, max_size=5))
@hypothesis.settings(
  max_examples=60,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_any_captions_are_imported_or_counted(folder, rows):
  directory = folder / "index"
  index = create_index(str(directory), str(folder), [Unit("folder", "", count=1)])
  if not index.has("scan"):
    row = {"id": "fine", "location": "fine.png", "captions": []}
    index.write("scan", 0, pa.Table.from_pylist([row], schema=SCHEMAS["scan"]))
  path = folder / "captions.jsonl"
  lines = [json.dumps(row) for row in rows]
  path.write_text("\n".join([*lines, '{"id": "fine", "caption": "good"}']))
  report = captions.import_captions(index, [str(path)])
  if report is None:  # these very lines were there before
    return
  refused = sum(report["lines_refused"].values())
  assert report["lines"] == len(rows) + 1
  assert refused + report["unknown"] <= len(rows)
  pathlib.Path(directory, "captions", "00000.parquet").unlink()
