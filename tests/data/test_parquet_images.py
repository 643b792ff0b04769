"""Images inside of Parquet, as the hub ships them, are images like any other."""

import random

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pixsigma_jax.data import parquet_images
from pixsigma_jax.data.rows import Reading
from pixsigma_jax.data.sources import list_units, read_bytes
from tests.data.test_sources import (
  encoded,
  found,
  found_and_passed_over,
  in_a_tar,
  write,
)

COUNT = 7


def rows(start=0):
  return [
    {
      "image": {"bytes": encoded(n), "path": f"{n % 2}.png"},
      "text": f"image {n}",
      "label": n,
    }
    for n in range(start, start + COUNT)
  ]


def write_parquet(path, rows, **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3, **options)
  return path


@pytest.mark.parametrize("per_unit", [1, 4, 100])
def test_a_row_is_an_image_with_its_caption(per_unit, tmp_path):
  source = write_parquet(tmp_path / "train.parquet", rows())
  all_found = found(source, per_unit)
  assert [e.id for e in all_found] == [f"train/{n}" for n in range(COUNT)]
  for number, entry in enumerate(all_found):
    assert entry.captions == ((f"image {number}", "short"),)
    assert read_bytes(str(source), entry.location) == encoded(number)


def test_a_folder_of_parquet_is_a_source(tmp_path):
  for number in range(2):
    path = tmp_path / "repo" / "data" / f"train-{number:05d}-of-00002.parquet"
    write_parquet(path, rows(number * COUNT))
  write(tmp_path / "repo" / "README.md", "a card")
  all_found, passed_over = found_and_passed_over(tmp_path / "repo")
  assert passed_over == {".md": 1}
  assert len({e.id for e in all_found}) == 2 * COUNT
  assert all_found[-1].id == f"data/train-00001-of-00002/{COUNT - 1}"
  for number, entry in enumerate(all_found):
    assert read_bytes(str(tmp_path / "repo"), entry.location) == encoded(number)


def test_parquet_may_lie_where_only_fsspec_reaches(tmp_path):
  fs = fsspec.filesystem("memory")
  path = write_parquet(tmp_path / "a.parquet", rows())
  fs.pipe_file("/hub/data/a.parquet", path.read_bytes())
  try:
    all_found = found("memory://hub")
    assert [e.id for e in all_found] == [f"data/a/{n}" for n in range(COUNT)]
    assert read_bytes("memory://hub", all_found[4].location) == encoded(4)
  finally:
    fs.rm("/hub", recursive=True)


def test_rows_may_be_read_in_any_order(tmp_path):
  source = write_parquet(tmp_path / "a.parquet", rows())
  write_parquet(tmp_path / "b.parquet", rows(COUNT))
  order = [(file, row) for file in range(2) for row in range(COUNT)]
  random.Random(0).shuffle(order)
  for file, row in order:
    location = f"{'ab'[file]}.parquet?row={row}&column=image"
    assert read_bytes(str(source.parent), location) == encoded(file * COUNT + row)


def test_reading_in_order_opens_each_group_once(tmp_path, monkeypatch):
  source = write_parquet(tmp_path / "a.parquet", rows())
  opened = []
  real = pq.ParquetFile.iter_batches

  def noted(self, *arguments, **options):
    opened.append(options["row_groups"])
    return real(self, *arguments, **options)

  all_found = found(source)
  monkeypatch.setattr(parquet_images.pq.ParquetFile, "iter_batches", noted)
  for entry in all_found:
    read_bytes(str(source), entry.location)
  assert opened == [[0], [1], [2]]


def test_a_file_written_anew_is_read_anew(tmp_path):
  source = write_parquet(tmp_path / "a.parquet", rows())
  location = "a.parquet?row=0&column=image"
  assert read_bytes(str(source), location) == encoded(0)
  write_parquet(source, [*rows(3), *rows(0)])
  assert read_bytes(str(source), location) == encoded(3)


def test_bytes_without_a_path_are_images_too(tmp_path):
  table = [{"id": f"n{n}", "jpg": encoded(n), "caption": "c"} for n in range(3)]
  source = write_parquet(tmp_path / "a.parquet", table)
  with pytest.raises(
    ValueError, match=r"holds paths or images. Give --image_field=jpg"
  ):
    list_units(str(source), per_unit=2)
  all_found = found(source, reading=Reading(image_field="jpg"))
  assert [e.id for e in all_found] == ["n0", "n1", "n2"]
  assert read_bytes(str(source), all_found[2].location) == encoded(2)


def test_bytes_may_be_dictionary_encoded(tmp_path):
  images = pa.array([encoded(n % 2) for n in range(5)], pa.binary())
  table = pa.table({"image": images.dictionary_encode()})
  pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
  all_found = found(tmp_path / "a.parquet")
  for number, entry in enumerate(all_found):
    data = read_bytes(str(tmp_path / "a.parquet"), entry.location)
    assert data == encoded(number % 2)
  assert len(all_found) == 5


def test_the_hubs_path_is_followed_where_there_are_no_bytes(tmp_path):
  write(tmp_path / "repo" / "data" / "0.png", encoded(5))
  write(tmp_path / "secret.png", encoded(9))
  paths = ["0.png", "../../secret.png", None]
  table = [
    {"image": {"bytes": None, "path": path}, "text": str(path)} for path in paths
  ] + rows()
  write_parquet(tmp_path / "repo" / "data" / "a.parquet", table)
  source = str(tmp_path / "repo")
  inside = "data/a.parquet?row=%d&column=image"
  # Beside one loose image the table is passed over: it may list the same.
  _, passed_over = found_and_passed_over(source)
  assert passed_over == {".parquet": 1}
  assert read_bytes(source, inside % 0) == encoded(5)
  with pytest.raises(ValueError, match="outside"):
    read_bytes(source, inside % 1)
  with pytest.raises(ValueError, match="no image in the column image"):
    read_bytes(source, inside % 2)


def test_a_manifest_in_a_folder_below_names_images_beside_it(tmp_path):
  # The image's extension is in no list: it is the row that finds it.
  write(tmp_path / "repo" / "data" / "0.pic", encoded(5))
  write_parquet(tmp_path / "repo" / "data" / "a.parquet", [{"image": "0.pic"}])
  [entry] = found(tmp_path / "repo")
  assert (entry.id, entry.location) == ("data/0", "data/0.pic")


def test_parquet_beside_tars_is_what_made_them(tmp_path):
  write(tmp_path / "images" / "a.png", encoded())
  (tmp_path / "shards").mkdir()
  in_a_tar(tmp_path / "images").rename(tmp_path / "shards" / "0.tar")
  write_parquet(tmp_path / "shards" / "0.parquet", [{"url": "x", "key": "a"}])
  all_found, passed_over = found_and_passed_over(tmp_path / "shards")
  assert [e.id for e in all_found] == ["0/a"]
  assert passed_over == {".parquet": 1}


@pytest.mark.parametrize(
  ("location", "message"),
  [
    ("a.parquet?row=99&column=image", "no row 99"),
    ("a.parquet?row=0&column=img", "no column img"),
    ("a.parquet?row=0&column=label", "no image in the column label"),
    ("broken.parquet?row=0&column=image", "damaged Parquet"),
  ],
)
def test_what_is_not_there_is_said(location, message, tmp_path):
  source = write_parquet(tmp_path / "a.parquet", rows())
  write(tmp_path / "broken.parquet", b"PAR1" + b"x" * 100)
  with pytest.raises(ValueError, match=message):
    read_bytes(str(source), location)
