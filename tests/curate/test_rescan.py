"""What changed in a heap of images is said, and what has not is not asked again."""

import json
import pathlib

import pyarrow as pa
import pytest

from pixsigma_jax.curate import captions
from pixsigma_jax.curate import scan as scan_module
from pixsigma_jax.curate.filter import Rules, filter_images
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
    "05": ["caption 5"],  # of another image
    "06": [],
  }
  assert new.read(1, "scores")["aesthetic"].to_pylist() == [3, 4]
  # The same import reaches what was left.
  added = captions.import_captions(new, [str(tmp_path / "more.jsonl")])
  assert added is not None
  assert added["added"] == 1
  assert scanned(folder, "again", previous=index.directory) == new
  assert rows(index, "scan")["00"]["captions"][0]["text"] == "caption 0"  # as it was


def imported(folder, index, name, ids):
  path = folder.parent / f"{name}.jsonl"
  lines = [{"id": id, "caption": f"{name} {id}"} for id in ids]
  path.write_text("\n".join(map(json.dumps, lines)))
  return captions.import_captions(index, [str(path)])


def write_scores(index, part, *values):
  column = pa.array(values, pa.float32())
  index.write("scores", part, pa.table({"aesthetic": column}))


def texts(index, id):
  return [c["text"] for c in rows(index, "scan", "captions")[id]["captions"]]


def test_captions_survive_a_scan_after_which_nobody_was_asked(folder):
  first = scanned(folder)
  imported(folder, first, "a", ["00", "05"])
  world.photograph(40, 45, seed=99).save(folder / "06.png")
  second = scanned(folder, "second", previous=first.directory)
  assert captions.suppliers_of_all(second) == []  # 06 has not been asked about
  third = scanned(folder, "third", previous=second.directory)
  assert texts(third, "00") == ["caption 0", "a 00"]
  assert texts(third, "05") == ["caption 5", "a 05"]


def test_a_scan_that_is_called_again_forgets_no_captions(folder):
  first = scanned(folder)
  imported(folder, first, "a", ["00"])
  second = scanned(folder, "second", previous=first.directory)
  imported(folder, second, "b", ["01"])
  suppliers = captions.suppliers_of_all(second)
  assert len(suppliers) == 2
  scanned(folder, "second", previous=first.directory)
  assert captions.suppliers_of_all(second) == suppliers
  assert imported(folder, second, "b", ["01"]) is None


def test_an_image_that_can_be_read_now_is_scored_and_captioned(folder, monkeypatch):
  decode = scan_module.decode

  def not_tall(data, **options):  # as of HEIC before its extra is installed
    image = decode(data, **options)
    if image.image.width == 45:
      raise ValueError("cannot be read yet")
    return image

  monkeypatch.setattr(scan_module, "decode", not_tall)
  first = scanned(folder)
  assert rows(first)["05"]["error"] == "cannot be read yet"
  for part, values in enumerate([[1, 2], [3, 4], [5, None]]):
    write_scores(first, part, *values)
  first.note("scores", {"head": "h"})
  imported(folder, first, "a", ["00"])
  monkeypatch.setattr(scan_module, "decode", decode)
  second = scanned(folder, "second", previous=first.directory)
  assert rows(second)["05"]["error"] is None
  assert second.missing("scores") == [2]
  assert captions.suppliers_of(second, 1)
  assert not captions.suppliers_of(second, 2)


def test_a_part_of_captions_is_looked_up_without_listing_all(folder, monkeypatch):
  index = scanned(folder)
  imported(folder, index, "a", ["00"])
  monkeypatch.setattr(type(index), "missing", None)
  assert len(captions.suppliers_of(index, 0)) == 1
  captions.add_captions(index, 0, ["b"], [[("new", "short")], []])
  assert captions.suppliers_of(index, 0)[1:] == ["b"]
  assert not index.has_part("scores", 0)


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


def test_a_share_of_the_best_is_of_the_scores_of_now(folder):
  index, rules = scanned(folder), Rules(keep_quantile=0.5)
  for part in range(3):
    write_scores(index, part, 2 * part + 1, 2 * part + 2)
  assert filter_images(index, rules, beam_options=[])["threshold"] == 4
  world.photograph(40, 45, seed=99).save(folder / "05.png")
  pathlib.Path(index.directory, "scan/00002.parquet").unlink()
  index = scanned(folder)
  write_scores(index, 2, 0, 0)
  report = filter_images(index, rules, beam_options=[])
  assert (report["threshold"], report["kept"]) == (2, 3)


def test_progress_is_told_by_the_image_and_profiles_are_counted(folder, caplog):
  caplog.set_level("INFO", logger="absl")
  p3, nothing = icc.rgb_profile(icc.DISPLAY_P3), b"no profile"
  for name, profile in {"00": p3, "01": p3, "02": nothing}.items():
    world.photograph(50, 50).save(folder / f"{name}.png", icc_profile=profile)
  index = scanned(folder)
  assert "Scanned images: 6 of 6" in caplog.text
  assert report(index)["color_profiles"] == {"converted": 2, "ignored": 1}
  assert rows(index)["02"]["profile"] == "ignored"


def test_images_of_one_id_are_told_apart(tmp_path):
  images = world.make_folder(tmp_path / "images", [(40, 40 + i) for i in range(3)])
  lines = [
    {"path": f"{path.name}", "id": "twice" if i else "once", "caption": f"{i}"}
    for i, path in enumerate(sorted(images.glob("*.png")))
  ]
  manifest = images / "list.jsonl"
  manifest.write_text("\n".join(map(json.dumps, lines)))
  first = scan(
    *(str(tmp_path / "a"), str(manifest)), per_part=2, near_distance=0, beam_options=[]
  )
  nothing = {"images": 0, "first": []}
  again = scan(
    *(str(tmp_path / "b"), str(manifest)),
    **{"per_part": 2, "near_distance": 0, "beam_options": []},
    previous=first.directory,
  )
  assert set(map(str, report(again)["since_previous"].values())) == {str(nothing)}
  lines[2]["caption"] = "another"
  manifest.write_text("\n".join(map(json.dumps, lines)))
  third = scan(
    *(str(tmp_path / "c"), str(manifest)),
    **{"per_part": 2, "near_distance": 0, "beam_options": []},
    previous=first.directory,
  )
  changed = report(third)["since_previous"]
  assert changed["with_other_captions"] == {"images": 1, "first": ["twice"]}
  assert changed["with_other_pixels"] == changed["removed"] == nothing
