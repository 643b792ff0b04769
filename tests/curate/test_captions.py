"""Captions: each finds its image, is added once, and what is dropped is counted."""

import json
import pathlib

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pixsigma_jax.curate import captioner, captions, score
from pixsigma_jax.data.index import SCHEMAS, create_index
from pixsigma_jax.data.sources import Unit

BEAR = "ba\u0308r/3"  # decomposed, as macOS has names
IDS = ["a/1", "a/2", BEAR]
LOCATIONS = ["a/1.jpg", "x.tar?offset=0&size=1", f"{BEAR}.PNG"]


@pytest.fixture
def index(tmp_path):
  """Two parts: three images, one of which has a caption, and one that is broken."""
  units = [Unit("folder", "", count=3), Unit("folder", "", count=1)]
  index = create_index(str(tmp_path / "index"), str(tmp_path / "images"), units)
  for part, (ids, locations, errors) in enumerate(
    [(IDS, LOCATIONS, [None] * 3), (["z"], ["z.png"], ["truncated"])]
  ):
    count = len(ids)
    nothing = {name: [None] * count for name in SCHEMAS["scan"].names}
    row = {"id": ids, "location": locations, "error": errors, "captions": [[]] * count}
    if not part:
      row["captions"] = [[{"text": "old", "kind": "short"}], [], []]
    index.write("scan", part, pa.table({**nothing, **row}, schema=SCHEMAS["scan"]))
  return index


def write_lines(path, *rows):
  text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
  path.write_text(text, encoding="utf-8")
  return str(path)


def captions_of(index):
  tables = [index.read(p, "scan", "captions").to_pylist() for p in range(2)]
  return {
    row["id"]: [(c["text"], c["kind"]) for c in row["captions"]]
    for rows in tables
    for row in rows
  }


def test_an_image_is_known_by_its_id_or_its_path(index, tmp_path):
  file = write_lines(
    tmp_path / "c.jsonl",
    {"id": "a/1", "caption": "by id"},
    {"id": "a/1.jpg", "caption": "by id with an extension"},
    {"path": "./a/1.jpg", "caption": "by path"},
    {"file_name": str(tmp_path / "images/a/1.jpg"), "caption": "by full path"},
    {"id": 17, "path": "a/1.jpg", "caption": "by path, beside an id of its own"},
    {"id": "a/2.webp", "caption": "in a tar"},
    {"id": BEAR, "caption": "decomposed"},
    {"path": "b\u00e4r/3.PNG", "caption": "composed"},
  )
  report = captions.import_captions(index, [file])
  found = captions_of(index)
  assert {text for text, _ in found["a/1"]} == {
    *("old", "by id", "by id with an extension", "by path", "by full path"),
    "by path, beside an id of its own",
  }
  assert found["a/2"] == [("in a tar", "short")]
  assert set(found[BEAR]) == {("decomposed", "short"), ("composed", "short")}
  assert (report["lines"], report["unknown"], report["added"]) == (8, 0, 8)


def test_several_files_and_forms_merge(index, tmp_path):
  files = [
    write_lines(
      tmp_path / "a.jsonl",
      {"id": "a/2", "caption_long": "L", "caption_short": "S"},
      {"id": "a/2", "prompt": "P", "sharegpt4v": "G"},
    ),
    write_lines(
      tmp_path / "b.jsonl",
      {"id": "a/2", "captions": [{"text": "X", "kind": "long"}, "Y"]},
      {"id": "a/2", "caption": "Z", "kind": "long"},
    ),
  ]
  captions.import_captions(index, files)
  assert set(captions_of(index)["a/2"]) == {
    *[(text, "long") for text in "LGXZ"],
    *[(text, "short") for text in "SPY"],
  }
  assert captions_of(index)["a/1"] == [("old", "short")]
  more = write_lines(tmp_path / "c.jsonl", {"id": "a/2", "caption": "later"})
  assert captions.import_captions(index, [more])["added"] == 1
  assert len(captions_of(index)["a/2"]) == 8  # what comes is added


def test_what_is_dropped_is_counted(index, tmp_path):
  file = write_lines(
    tmp_path / "c.jsonl",
    {"id": "a/1", "caption": "old"},
    {"id": "a/1", "caption_long": "Cafe\u0301", "caption_short": "Café "},
    {"id": "a/1", "captions": ["", "  \n", "\u0000"]},
    {"id": "nowhere", "caption": "x"},
    *[{"id": f"gone {i}", "caption": "x"} for i in range(9)],
    "{",
    "[]",
    {"caption": "of what?"},
    {"id": "a/1", "caption": 7},
    {"id": "a/1"},
    "",
  )
  report = captions.import_captions(index, [file])
  assert captions_of(index)["a/1"] == [("old", "short"), ("Café", "long")]
  assert (report["empty"], report["repeated"], report["added"]) == (3, 2, 1)
  assert report["unknown"] == 10
  assert report["first_unknown"] == ["nowhere", "gone 0", "gone 1", "gone 2", "gone 3"]
  assert report["lines_refused"] == {
    "caption has int where text belongs": 1,
    "no caption": 1,
    "no id or path or file_name": 1,
    "not JSON": 1,
    "not an object of fields": 1,
  }
  assert (report["images"], report["images_without_caption"]) == (3, 2)
  path = pathlib.Path(index.directory, "captions", "report.json")
  assert json.loads(path.read_text()) == report


def test_the_same_file_is_imported_once(index, tmp_path):
  file = write_lines(tmp_path / "c.jsonl", {"id": "a/1", "caption": "new"})
  captions.import_captions(index, [file])
  copy = write_lines(tmp_path / "copy.jsonl", {"id": "a/1", "caption": "new"})
  assert captions.import_captions(index, [copy]) is None


def test_an_import_goes_on_after_its_finished_parts(index, tmp_path, monkeypatch):
  file = write_lines(tmp_path / "c.jsonl", {"id": "a/1", "caption": "new"})
  captions.import_captions(index, [file])
  wanted = captions_of(index)
  pathlib.Path(index.directory, "captions", "00001.parquet").unlink()
  written = []
  add = captions.add_captions

  def noted(index, part, *rest):
    written.append(part)
    return add(index, part, *rest)

  monkeypatch.setattr(captions, "add_captions", noted)
  assert captions.import_captions(index, [file])["unknown"] == 0
  assert (written, captions_of(index)) == ([1], wanted)


def test_a_file_without_captions_is_refused(index, tmp_path):
  file = write_lines(tmp_path / "c.jsonl", "hello", "world")
  with pytest.raises(ValueError, match=r"c.jsonl has no captions: none of its .*2"):
    captions.import_captions(index, [file])
  with pytest.raises(FileNotFoundError, match=r"There are no captions at .*gone.jsonl"):
    captions.import_captions(index, [str(tmp_path / "gone.jsonl")])
  assert index.missing("captions") == [0, 1]


def test_a_captioner_is_asked_once_of_every_image(index, tmp_path, monkeypatch):
  for name, side in [("a/1.jpg", 8), (f"{BEAR}.PNG", 9)]:
    path = tmp_path / "images" / name
    path.parent.mkdir(parents=True)
    Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(path)
  (tmp_path / "images" / "x.tar").write_bytes(b"no image")
  asked = []

  def caption_images(images, **options):
    asked.append((len(images), options))
    return [f"a square of {image.width}" for image in images]

  monkeypatch.setattr(captioner, "caption_images", caption_images)

  def ask(**changes):
    options = {
      "model": "some/model",
      "instruction": "Look.",
      "kind": "long",
      "max_new_tokens": 9,
    }
    return captioner.write_captions(index, **options | changes, beam_options=[])

  report = ask()
  assert asked == [
    (2, {"model": "some/model", "instruction": "Look.", "max_new_tokens": 9})
  ]
  assert captions_of(index) == {
    "a/1": [("old", "short"), ("a square of 8", "long")],
    "a/2": [],  # no longer an image
    BEAR: [("a square of 9", "long")],
    "z": [],
  }
  assert (report["images"], report["images_without_caption"]) == (3, 1)
  assert ask() is None
  monkeypatch.setattr(captioner, "caption_images", lambda *_, **__: ["", ""])
  ask(instruction="Say nothing.")
  assert len(captions_of(index)["a/1"]) == 2  # an empty answer is no caption


def test_captions_of_a_part_that_was_made_again_are_imported_again(index, tmp_path):
  file = write_lines(tmp_path / "c.jsonl", {"id": "a/1", "caption": "one"})
  other = write_lines(tmp_path / "d.jsonl", {"id": "z", "caption": "other"})
  assert captions.import_captions(index, [file])["added"] == 1
  pathlib.Path(index.directory, "captions", "00000.parquet").unlink()
  assert captions.import_captions(index, [other])["added"] == 1
  assert ("one", "short") not in captions_of(index)["a/1"]
  assert captions.import_captions(index, [file])["added"] == 1
  assert ("one", "short") in captions_of(index)["a/1"]


def test_duplicates_are_not_looked_at_again(index, tmp_path):
  path = tmp_path / "images" / "a" / "1.jpg"
  path.parent.mkdir(parents=True)
  Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
  assert [rows for rows, _ in score.decoded(index, 0, 2)] == [[0]]
  marks = pa.table({"duplicate_of": pa.array(["a/2", None, None], pa.string())})
  index.write("duplicates", 0, marks)
  assert list(score.decoded(index, 0, 2)) == []


def test_captions_are_imported_from_the_fields_that_are_asked_for(index, tmp_path):
  lines = [
    {"id": "a/1", "alt": ["one", "uno"], "story": "once upon a time", "caption": "c"},
    {"id": "a/2", "text": "two", "caption": "c"},
  ]
  file = write_lines(tmp_path / "c.jsonl", *lines)
  report = captions.import_captions(index, [file], caption_fields=["story:long", "alt"])
  assert (report["added"], report["lines_refused"]) == (3, {"no caption": 1})
  assert captions_of(index)["a/1"] == [
    *[("old", "short"), ("once upon a time", "long"), ("one", "short")],
    ("uno", "short"),
  ]
  assert captions.import_captions(
    index, [file], caption_fields=["story:long", "alt"]
  ) is (None)
  # The same file by other fields is another supplier.
  assert captions.import_captions(index, [file], caption_fields=["text"])["added"] == 1
  assert captions_of(index)["a/2"] == [("two", "short")]
