"""What changed in a heap of images is said, and what has not is not asked again."""

import json
import pathlib

import pyarrow as pa
import pytest

from pixsigma_jax.curate import captions
from pixsigma_jax.curate.scan import scan
from tests.data import icc
from tests.prepare import world


@pytest.fixture
def folder(tmp_path):
  folder = world.make_folder(tmp_path / "images", [(40, 40 + i) for i in range(6)])
  for i in range(6):
    (folder / f"{i:02d}.txt").write_text(f"caption {i}")
  return folder


def scanned(folder, name="index", **changes):
  return scan(
    *(str(folder.parent / name), str(folder)),
    **{"per_part": 2, "near_distance": 0, "beam_options": []} | changes,
  )


def rows(index, *steps):
  parts = [index.read(part, *steps).to_pylist() for part in range(index.num_parts)]
  return {row["id"]: row for part in parts for row in part}


def report(index):
  return json.loads(pathlib.Path(index.directory, "scan/report.json").read_text())


def test_a_second_scan_says_what_has_changed_and_takes_over_the_rest(folder, tmp_path):
  index = scanned(folder)
  for part in range(3):
    values = pa.array([2.0 * part, 2.0 * part + 1], pa.float32())
    index.write("scores", part, pa.table({"aesthetic": values}))
  index.note("scores", {"head": "h"})
  lines = [{"id": f"{i:02d}", "caption_long": f"imported {i}"} for i in range(6)]
  (tmp_path / "more.jsonl").write_text("\n".join(map(json.dumps, lines)))
  captions.import_captions(index, [str(tmp_path / "more.jsonl")])
  (folder / "00.txt").write_text("corrected")
  world.photograph(40, 45, seed=99).save(folder / "05.png")  # painted over
  world.photograph(44, 44, seed=98).save(folder / "06.png")
  (folder / "02.png").unlink()
  new = scanned(folder, "again", previous=index.directory)
  assert report(new)["since_previous"] == {
    "added": {"images": 1, "first": ["06"]},
    "with_other_pixels": {"images": 1, "first": ["05"]},
    "with_other_captions": {"images": 1, "first": ["00"]},
    "removed": {"images": 1, "first": ["02"]},
  }
  # Parts are now 00 01 | 03 04 | 05 06.
  assert new.missing("scores") == [2]
  assert rows(new, "scan")["00"]["captions"][0]["text"] == "corrected"
  found = {
    id: [c["text"] for c in row["captions"]]
    for id, row in rows(new, "scan", "captions").items()
  }
  assert found == {
    "00": ["corrected", "imported 0"],
    "01": ["caption 1", "imported 1"],
    "03": ["caption 3", "imported 3"],
    "04": ["caption 4", "imported 4"],
    "05": ["caption 5"],  # of another picture
    "06": [],
  }
  assert new.read(1, "scores")["aesthetic"].to_pylist() == [3, 4]
  # The same import reaches what was left.
  assert captions.import_captions(new, [str(tmp_path / "more.jsonl")])["added"] == 1
  assert scanned(folder, "again", previous=index.directory) == new
  assert rows(index, "scan")["00"]["captions"][0]["text"] == "caption 0"  # as it was


def test_the_earlier_index_is_another(folder):
  index = scanned(folder)
  with pytest.raises(ValueError, match="is the index that is to be written"):
    scanned(folder, previous=index.directory)
  with pytest.raises(FileNotFoundError, match="nowhere is not an index"):
    scanned(folder, "again", previous="nowhere")


def test_a_part_whose_files_have_changed_is_scanned_again_without_a_circle(folder):
  index = scanned(folder)
  for part in range(3):
    index.write("scores", part, pa.table({"aesthetic": pa.nulls(2, pa.float32())}))
  (folder / "02.png").unlink()
  world.photograph(40, 43, seed=1).save(folder / "05.png")  # a copy of 01, but smaller
  for part in (1, 2):
    pathlib.Path(index.directory, f"scan/{part:05d}.parquet").unlink()
  index = scanned(folder)
  assert index.missing("scan") == index.missing("duplicates") == []
  assert index.missing("scores") == [1, 2]
  assert list(rows(index, "scan", "duplicates")) == ["00", "01", "03", "04", "05"]


def test_progress_is_told_by_the_image_and_profiles_are_counted(folder, caplog):
  caplog.set_level("INFO", logger="absl")
  p3, nothing = icc.rgb_profile(icc.DISPLAY_P3), b"no profile"
  for name, profile in {"00": p3, "01": p3, "02": nothing}.items():
    world.photograph(50, 50).save(folder / f"{name}.png", icc_profile=profile)
  index = scanned(folder)
  assert "Scanned images: 6 of 6" in caplog.text
  assert report(index)["color_profiles"] == {"converted": 2, "ignored": 1}
  assert rows(index)["02"]["profile"] == "ignored"
