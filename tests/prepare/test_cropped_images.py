"""Cropping an index's images into shards: what is in them, what is not, restarts."""

import json

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pixsigma_jax.data.crops import CropRule
from pixsigma_jax.prepare import cropped_images
from tests.prepare import world

ARGUMENTS = {
  "rule": world.RULE,
  "resolution": 32,
  "allow_upscaling": False,
  "images_per_shard": 3,
  "beam_options": [],
}


@pytest.fixture
def index(tmp_path):
  return world.make_index(tmp_path / "index", world.make_folder(tmp_path / "images"))


def prepare(index, directory, **changes):
  return cropped_images.prepare_images(
    index.directory, directory, **ARGUMENTS | changes
  )


def all_of(prepared):
  return [
    cropped
    for shard in range(prepared.num_shards)
    for cropped in prepared.read(shard, range(len(prepared.sizes(shard))))
  ]


def refusals_of(prepared):
  return {refusal.id: refusal for refusal in prepared.refusals()}


def test_images_are_the_cropped_images_to_the_bit(index, tmp_path):
  prepared = prepare(index, tmp_path / "pictures")
  found = all_of(prepared)
  assert [cropped.id for cropped in found] == [f"{i:02d}" for i in range(7)]
  for i, cropped in enumerate(found):
    height, width = world.SIZES[i]
    with Image.open(tmp_path / "images" / f"{i:02d}.png") as image:
      expected = world.RULE.apply(image)
    np.testing.assert_array_equal(cropped.image(), expected)
    assert cropped.original_size.tolist() == [height, width]
    np.testing.assert_array_equal(cropped.crop, world.RULE.plan(height, width).box)
    assert cropped.captions == tuple(world.CAPTIONS)
    assert np.isnan(cropped.aesthetic_score)


def test_shards_hold_so_many_images_in_the_order_of_the_index(index, tmp_path):
  prepared = prepare(index, tmp_path / "pictures")
  assert prepared.num_shards == 3
  assert [prepared.ids(i) for i in range(3)] == [
    ["00", "01", "02"],
    ["03", "04", "05"],
    ["06"],
  ]
  assert prepared.sizes(0) == [(32, 32), (32, 64), (32, 32)]


def test_what_a_file_holds_does_not_depend_on_the_index_parts(index, tmp_path):
  prepare(index, tmp_path / "first")
  folder = tmp_path / "images"
  for per_unit in (1, 100):
    other = world.make_index(tmp_path / f"i{per_unit}", folder, per_unit=per_unit)
    prepare(other, tmp_path / f"p{per_unit}")
    for name, content in world.files_of(tmp_path / "first").items():
      if name.endswith(".array_record"):
        assert (tmp_path / f"p{per_unit}" / name).read_bytes() == content


def test_an_image_smaller_than_its_size_is_left_out_unless_it_may_grow(index, tmp_path):
  prepared = prepare(index, tmp_path / "pictures")
  assert prepared.refused == {"smaller than its size": 1}
  (refusal,) = prepared.refusals()
  assert (refusal.id, refusal.detail) == ("07", "20x22, and its size is 32x32")
  grown = prepare(index, tmp_path / "grown", allow_upscaling=True)
  assert grown.refused == {}
  assert all_of(grown)[-1].image().size == (32, 32)


def test_filter_scores_and_captions_of_the_index_are_heeded(tmp_path):
  folder = world.make_folder(tmp_path / "images", world.SIZES[:4])
  index = world.make_index(tmp_path / "index", folder, per_unit=2)
  pairs = pa.list_(pa.struct([("text", pa.string()), ("kind", pa.string())]))
  for part in range(2):
    first = 2 * part
    kept = [i != 1 for i in (first, first + 1)]
    reason = [None if k else "aesthetic score" for k in kept]
    index.write("kept", part, pa.table({"kept": kept, "reason": reason}))
    scores = pa.array([5.5, None], pa.float32())
    index.write("scores", part, pa.table({"aesthetic": scores}))
    texts = [[{"text": "new", "kind": "long"}], [{"text": " \n", "kind": "long"}]]
    index.write("captions", part, pa.table({"captions": pa.array(texts, pairs)}))
  prepared = prepare(index, tmp_path / "pictures")
  found = all_of(prepared)
  assert [cropped.id for cropped in found] == ["00", "02"]
  assert {cropped.captions for cropped in found} == {(("new", "long"),)}
  assert {cropped.aesthetic_score for cropped in found} == {5.5}
  assert prepared.refused == {"has no caption": 1, "not kept by filter": 1}
  assert refusals_of(prepared)["01"].detail == "aesthetic score"


def test_images_that_went_bad_are_left_out_with_their_reason(index, tmp_path):
  folder = tmp_path / "images"
  (folder / "01.png").write_bytes(b"no image any more")
  (folder / "04.png").unlink()
  world.photograph(99, 98).save(folder / "05.png")
  prepared = prepare(index, tmp_path / "pictures")
  assert [prepared.ids(i) for i in range(3)] == [["00", "02"], ["03"], ["06"]]
  found = refusals_of(prepared)
  assert {i: refusal.reason for i, refusal in found.items()} == {
    "01": "cannot be decoded",
    "04": "is gone",
    "05": "has changed since the scan",
    "07": "smaller than its size",
  }
  assert found["05"].detail == "45x91 → 99x98"
  assert found["01"].detail


def test_unreadable_rows_of_the_index_are_counted(tmp_path):
  folder = world.make_folder(tmp_path / "images", world.SIZES[:2])
  broken = {"error": "truncated", "height": 0, "width": 0}
  index = world.make_index(tmp_path / "index", folder, id_01=broken)
  prepared = prepare(index, tmp_path / "pictures")
  assert prepared.refused == {"could not be read": 1}
  assert refusals_of(prepared)["01"].detail == "truncated"


def test_a_folder_that_is_gone_stops_the_run_instead_of_emptying_it(index, tmp_path):
  (tmp_path / "images").rename(tmp_path / "elsewhere")
  with pytest.raises(FileNotFoundError, match="None of the 3 images of shard 0"):
    prepare(index, tmp_path / "pictures")
  (tmp_path / "elsewhere").rename(tmp_path / "images")
  assert len(all_of(prepare(index, tmp_path / "pictures"))) == 7


@pytest.mark.parametrize("done", range(4))
def test_an_interrupted_run_goes_on_to_the_same_bytes(
  index, tmp_path, monkeypatch, done
):
  prepare(index, tmp_path / "whole")
  apply, calls = CropRule.apply, []

  def dies(self, image):
    calls.append(image)
    if len(calls) > 2 * done:
      raise OSError("somebody pulled the plug")
    return apply(self, image)

  monkeypatch.setattr(CropRule, "apply", dies)
  with pytest.raises(OSError, match="pulled the plug"):
    prepare(index, tmp_path / "pictures")
  monkeypatch.setattr(CropRule, "apply", apply)
  assert list((tmp_path / "pictures").glob("*.partial")) == []
  there = world.files_of(tmp_path / "pictures")
  prepared = prepare(index, tmp_path / "pictures")
  assert prepared.missing() == []
  assert world.files_of(tmp_path / "pictures") == world.files_of(tmp_path / "whole")
  assert there.items() <= world.files_of(tmp_path / "pictures").items()


def test_a_finished_run_is_left_alone(index, tmp_path, monkeypatch):
  prepare(index, tmp_path / "pictures")
  monkeypatch.setattr(CropRule, "apply", None)
  assert prepare(index, tmp_path / "pictures").missing() == []


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"images_per_shard": 4}, "images_per_shard: 3 → 4"),
    ({"rule": CropRule(world.TABLE, "lanczos")}, "filter: 'bicubic' → 'lanczos'"),
    ({"allow_upscaling": True}, "allow_upscaling: False → True"),
    ({"resolution": 64}, "resolution: 32 → 64"),
  ],
)
def test_other_arguments_are_refused(index, tmp_path, changes, message):
  prepare(index, tmp_path / "pictures")
  before = world.files_of(tmp_path / "pictures")
  with pytest.raises(FileExistsError, match=message):
    prepare(index, tmp_path / "pictures", **changes)
  assert world.files_of(tmp_path / "pictures") == before


def test_an_index_that_has_changed_is_refused(index, tmp_path):
  prepare(index, tmp_path / "pictures")
  for part in range(index.num_parts):
    count = index.read(part, "scan").num_rows
    table = {"kept": [True] * (count - 1) + [False], "reason": [None] * count}
    index.write("kept", part, pa.table(table))
  with pytest.raises(FileExistsError, match="or the index has changed"):
    prepare(index, tmp_path / "pictures")


def test_somebody_elses_directory_is_left_alone(index, tmp_path):
  (tmp_path / "pictures").mkdir()
  (tmp_path / "pictures" / "thesis.tex").write_text("years")
  with pytest.raises(FileExistsError, match=r"thesis\.tex, which is no part of a plan"):
    prepare(index, tmp_path / "pictures")
  assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["thesis.tex"]


def test_an_index_of_which_nothing_is_left_is_an_error(tmp_path):
  folder = world.make_folder(tmp_path / "images", [(20, 20), (40, 40)])
  index = world.make_index(
    *(tmp_path / "index", folder),
    captions=lambda name: world.CAPTIONS if name == "00" else [],
  )
  with pytest.raises(
    ValueError, match="can be used: 1 has no caption, 1 smaller than its size"
  ):
    prepare(index, tmp_path / "pictures")
  with pytest.raises(ValueError, match="images_per_shard 0 must be at least 1"):
    prepare(index, tmp_path / "pictures", images_per_shard=0)


def test_damage_and_absence_are_named(index, tmp_path):
  with pytest.raises(FileNotFoundError, match="holds no images: prepare them first"):
    cropped_images.open_images(tmp_path / "pictures")
  prepared = prepare(index, tmp_path / "pictures")
  (tmp_path / "pictures" / "pictures-00001.array_record").write_bytes(b"damaged")
  with pytest.raises(ValueError, match=r"00001\.array_record is missing or damaged"):
    prepared.read(1, [0])
  (tmp_path / "pictures" / "plan.json").write_text(json.dumps({"format": 0}))
  with pytest.raises(ValueError, match="no plan of images that this version"):
    cropped_images.open_images(tmp_path / "pictures")


def test_workers_of_their_own_processes_write_the_same(index, tmp_path):
  prepare(index, tmp_path / "one")
  several = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]
  prepare(index, tmp_path / "two", beam_options=several)
  assert world.files_of(tmp_path / "one") == world.files_of(tmp_path / "two")


def test_a_plan_that_was_half_written_is_made_again(index, tmp_path):
  prepare(index, tmp_path / "whole")
  (tmp_path / "pictures").mkdir()
  for name in ("plan.npy.0a1b2c3d.partial", "plan.json.0a1b2c3d.partial"):
    (tmp_path / "pictures" / name).write_text("{")
  prepared = prepare(index, tmp_path / "pictures")
  assert prepared.missing() == []
  made = world.files_of(tmp_path / "pictures")
  assert world.files_of(tmp_path / "whole").items() <= made.items()
