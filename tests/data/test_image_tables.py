"""Image folders of Hugging Face: their metadata captions the images that it names."""

import csv
import json
import os

import fsspec
import numpy as np
import pytest

from pixsigma_jax.data import image_tables, sources
from pixsigma_jax.data.rows import Reading
from tests.data.test_sources import (
  captions_by_id,
  encoded,
  found,
  found_and_passed_over,
  write,
)

ROWS = [
  {"file_name": "1.png", "text": 'one, "quoted"\nand over two lines'},
  {"file_name": "sub/2.png", "text": "zwei Bären"},
  {"file_name": "sub/2.png", "text": "two again"},
  {"file_name": "gone.png", "text": "of no image"},
]


def write_table(path, rows, format, encoding="utf-8"):
  path.mkdir(parents=True, exist_ok=True)
  name = path / f"metadata.{format}"
  if format == "jsonl":
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    name.write_text("\r\n".join(lines), encoding)
  else:
    with open(name, "w", encoding=encoding, newline="") as file:
      writer = csv.DictWriter(file, list(rows[0]))
      writer.writeheader()
      writer.writerows(rows)


@pytest.fixture
def images(tmp_path):
  for number, name in enumerate(["1", "sub/2", "sub/3"]):
    write(tmp_path / "images" / "train" / f"{name}.png", encoded(number))
  return tmp_path / "images"


@pytest.mark.parametrize("format", ["jsonl", "csv"])
@pytest.mark.parametrize("per_unit", [1, 100])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_rows_caption_the_images_that_they_name(format, per_unit, encoding, images):
  write_table(images / "train", ROWS, format, encoding)
  assert captions_by_id(images, per_unit=per_unit) == {
    "train/1": ['one, "quoted" and over two lines'],
    "train/sub/2": ["zwei Bären", "two again"],
    "train/sub/3": [],
  }
  _, passed_over = found_and_passed_over(images, per_unit)
  assert passed_over == {f"row of metadata.{format} that names no image": 1}


def test_what_lies_beside_an_image_joins_its_row(images):
  write_table(images / "train", ROWS, "jsonl")
  write_table(images, [{"file_name": "./train/1.png", "caption": "from above"}], "csv")
  write(images / "train" / "1.txt", "beside")
  assert captions_by_id(images)["train/1"] == [
    "beside",
    "from above",
    'one, "quoted" and over two lines',
  ]


def test_a_table_above_many_folders_is_read_once_for_all_of_them(images, monkeypatch):
  read = []

  class Counted(image_tables.ImageTable):
    def __init__(self, fs, path, reading):
      read.append(path)
      super().__init__(fs, path, reading)

  for number in range(8):
    folder = images / "train" / f"sub{number}" / "deep" / "deeper"
    write(folder / "1.png", encoded(number))
    write(folder / "2.png", encoded(number + 50))
    for parent in (folder, folder.parent, folder.parent.parent):
      write_table(parent, [{"file_name": "1.png", "text": "x"}], "csv")
  write_table(images, [{"file_name": "train/1.png", "text": "top"}], "csv")
  write_table(images / "train", ROWS, "csv")
  monkeypatch.setattr(image_tables, "ImageTable", Counted)
  monkeypatch.setattr(sources, "_TABLES", {})
  units = sources.list_units(str(images), per_unit=3)
  assert sorted(read) == sorted(set(read))
  assert len(read) == 26
  read.clear()
  for unit in units:
    for _ in sources.entries(str(images), unit):
      pass
  again = [path for path in read if path.count("/train/sub") == 0]
  assert again == []  # those two are still at hand, from the listing
  assert len(read) <= 24 + 3 * len(units)  # a folder that two units share


def test_rows_that_are_none_are_counted_once(images):
  lines = [
    '{"file_name": "1.png", "text": "good"}',
    "{",
    '{"text": "of nothing"}',
    '{"file_name": "1.png", "caption": 7}',
  ]
  write(images / "train" / "metadata.jsonl", "\n".join(lines))
  all_found, passed_over = found_and_passed_over(images, 1)
  assert [e.captions for e in all_found] == [(("good", "short"),), (), ()]
  assert passed_over == {
    "row of metadata.jsonl: not a row of fields": 1,
    "row of metadata.jsonl: no file_name or path": 1,
    "row of metadata.jsonl: caption has int where text belongs": 1,
  }


def test_a_table_of_no_images_is_counted(images):
  write_table(images / "train", ROWS[:1], "csv")
  write_table(images / "test", ROWS, "csv")  # whose images are not here
  _, passed_over = found_and_passed_over(images)
  assert passed_over == {"metadata.csv beside no image": 1}


def test_a_csv_of_something_else_takes_nothing_away(images):
  write(images / "train" / "metadata.csv", "when,where\n1999,here\n2001,there,twice\n")
  all_found, passed_over = found_and_passed_over(images)
  assert [e.error for e in all_found] == [None] * 3
  assert passed_over == {
    "row of metadata.csv: no file_name or path": 1,
    "row of metadata.csv: not a row of fields": 1,
  }


def test_its_fields_may_have_any_name(images):
  write_table(images / "train", [{"img": "1.png", "alt": "one", "text": "no"}], "csv")
  reading = Reading(("alt",), "img")
  assert captions_by_id(images, reading=reading)["train/1"] == ["one"]


def test_a_name_may_be_composed_in_one_place_and_not_in_the_other(tmp_path):
  write(tmp_path / "ba\u0308r.png", encoded())
  write_table(tmp_path, [{"file_name": "b\u00e4r.png", "text": "a bear"}], "jsonl")
  assert captions_by_id(tmp_path) == {"ba\u0308r": ["a bear"]}


def test_a_table_alone_asks_for_its_folder(images):
  write_table(images / "train", ROWS, "csv")
  with pytest.raises(ValueError, match=r"give its folder, .*/images/train/\."):
    found(images / "train" / "metadata.csv")


def test_a_table_that_cannot_be_read_is_named_before_any_work(images, tmp_path):
  (tmp_path / "secret.csv").write_text("file_name,text\n1.png,a secret\n")
  os.symlink(tmp_path / "secret.csv", images / "train" / "metadata.csv")
  with pytest.raises(
    ValueError, match=r"train/metadata.csv of .* cannot be read: its path leads outside"
  ):
    found(images)


def test_two_names_of_one_hash_are_told_apart(images, monkeypatch):
  write_table(images / "train", ROWS, "jsonl")
  monkeypatch.setattr(image_tables, "_HASH_MASK", 0)
  assert captions_by_id(images)["train/sub/2"] == ["zwei Bären", "two again"]


def test_a_table_may_lie_where_only_fsspec_reaches():
  fs = fsspec.filesystem("memory")
  fs.pipe_file("/tables/1.png", encoded())
  fs.pipe_file("/tables/metadata.csv", b"file_name,text\n1.png,one\n")
  try:
    assert captions_by_id("memory://tables") == {"1": ["one"]}
  finally:
    fs.rm("/tables", recursive=True)


def test_a_row_costs_sixteen_bytes(images):
  rows = [{"file_name": f"{n}.png", "text": "x" * 50} for n in range(5000)]
  write_table(images, rows, "jsonl")
  table = sources._table(str(images), "metadata.jsonl", Reading())
  arrays = [value for value in vars(table).values() if isinstance(value, np.ndarray)]
  assert len(table) == 5000
  assert sum(array.nbytes for array in arrays) == 16 * 5000
