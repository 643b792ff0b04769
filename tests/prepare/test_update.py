"""What changed in the images reaches the records, and nothing else is made again."""

import dataclasses
import hashlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pixsigma_jax.convert import files
from pixsigma_jax.curate.scan import scan
from pixsigma_jax.data.crops import CropRule
from pixsigma_jax.data.index import open_index
from pixsigma_jax.data.records import open_dataset
from pixsigma_jax.models.t5 import T5TextEncoder
from pixsigma_jax.models.vae import KLAutoencoder
from pixsigma_jax.prepare import compare, contents, cropped_images, features, write
from pixsigma_jax.prepare.encode import Encode
from pixsigma_jax.prepare.settings import Settings
from tests.data import icc
from tests.prepare import world

SIZES = [(40, 44), (51, 47), (64, 64), (47, 40), (45, 91)]


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
  root = tmp_path_factory.mktemp("frozen")
  world.write_frozen(root)
  return str(root)


@pytest.fixture
def folder(tmp_path):
  folder = world.make_folder(tmp_path / "images", SIZES)
  for i in range(len(SIZES)):
    (folder / f"{i:02d}.txt").write_text(f"a photo of the red house {'cat ' * i}")
  return folder


def crop(folder, update=False, **changes):
  """Scans the folder from nothing, and crops what it finds."""
  root = folder.parent
  shutil.rmtree(root / "index", ignore_errors=True)
  index = scan(
    *(str(root / "index"), str(folder)), per_part=2, near_distance=0, beam_options=[]
  )
  arguments = {
    "rule": world.RULE,
    "resolution": 32,
    "allow_upscaling": False,
    "images_per_shard": 2,
    "beam_options": [],
    "update": update,
  }
  return cropped_images.prepare_images(
    index.directory, root / "pictures", **arguments | changes
  )


def settings(frozen, **changes):
  return Settings(
    **{
      "frozen": frozen,
      "caption_length": 16,
      "text_dtype": jnp.float32,
      "batch_size": 2,
    }
    | changes
  )


def encode(cropped, directory, frozen, update=False, **changes):
  return features.prepare_features(
    *(cropped, directory, settings(frozen, **changes)),
    devices=jax.local_devices()[:1],
    update=update,
  )


@pytest.fixture
def work(monkeypatch):
  """What is done: images cropped, images and captions encoded."""
  done = {"cropped": 0, "images": 0, "captions": []}
  apply, moments = CropRule.apply, KLAutoencoder.moments
  embed = T5TextEncoder.encode

  def counted_apply(self, image):
    done["cropped"] += 1
    return apply(self, image)

  def counted_moments(self, images):
    done["images"] += len({image.tobytes() for image in images})  # the rest is filling
    return moments(self, images)

  def counted_embed(self, texts, length):
    done["captions"] += [text for text in texts if text]
    return embed(self, texts, length)

  monkeypatch.setattr(CropRule, "apply", counted_apply)
  monkeypatch.setattr(KLAutoencoder, "moments", counted_moments)
  monkeypatch.setattr(T5TextEncoder, "encode", counted_embed)

  def since():
    now = dict(done)
    done.update({"cropped": 0, "images": 0, "captions": []})
    return now

  return since


def by_id(directory):
  dataset = open_dataset(directory)
  return {record.id: record for record in dataset.read(range(len(dataset)))}


def new_caption(folder):
  (folder / "01.txt").write_text("a dog")


def repainted(folder):
  world.photograph(*SIZES[2], seed=77).save(folder / "02.png")


def added_first(folder):
  world.photograph(50, 52, seed=55).save(folder / "00-more.png")
  (folder / "00-more.txt").write_text("a bird")


def removed(folder):
  (folder / "03.png").unlink()


def test_changes_are_refused_by_name_or_made_and_nothing_else_is(
  folder, frozen, work, tmp_path
):
  output = tmp_path / "records"
  encode(crop(folder), output, frozen)
  before = world.files_of(output)
  for change in (new_caption, repainted, added_first, removed):
    change(folder)
  named = (
    r"1 image added \(00-more\); 1 image removed \(03\); 1 image with other pixels "
    r"\(02\); 1 image with other captions \(01\)\. Give --update"
  )
  with pytest.raises(FileExistsError, match=named):
    crop(folder)
  work()
  cropped = crop(folder, update=True)
  with pytest.raises(FileExistsError, match=named):
    encode(cropped, output, frozen)
  assert world.files_of(output) == before
  assert encode(cropped, output, frozen, update=True)
  done = work()
  assert (done["cropped"], done["images"]) == (2, 2)
  assert sorted(done["captions"]) == ["a bird", "a dog"]
  # As if it had been made of the new images from the start.
  shutil.rmtree(tmp_path / "pictures")
  encode(crop(folder), tmp_path / "fresh", frozen)
  updated, fresh = (open_dataset(path) for path in (output, tmp_path / "fresh"))
  assert updated.manifest.features == fresh.manifest.features
  assert len(updated) == len(fresh) == len(SIZES)
  for ours, theirs in zip(
    *(d.read(range(len(d))) for d in (updated, fresh)), strict=True
  ):
    assert (ours.id, ours.captions) == (theirs.id, theirs.captions)
    assert ours.original_size.tolist() == theirs.original_size.tolist()
    # In another place of a batch an image rounds differently: one place of float16.
    for name in ("latent_moments", "caption_embeddings"):
      np.testing.assert_allclose(
        getattr(ours, name), getattr(theirs, name), rtol=2e-3, atol=1e-3
      )
  assert not contents.previous_of(output).exists()
  assert not contents.previous_of(tmp_path / "pictures").exists()
  assert write.read_report(output) == write.read_report(tmp_path / "fresh")
  work()
  assert not encode(crop(folder, update=True), output, frozen, update=True)
  assert tuple(work().values()) == (0, 0, [])


def test_an_interrupted_first_attempt_does_not_mix_old_and_new(
  folder, frozen, monkeypatch, tmp_path
):
  monkeypatch.setattr(cropped_images, "write_shard", world.write_shard_or_die)
  with pytest.raises(OSError, match="killed"):
    crop(folder)
  monkeypatch.setattr(cropped_images, "write_shard", world.write_shard)
  new_caption(folder)
  with pytest.raises(FileExistsError, match=r"other captions \(01\)"):
    crop(folder)
  encode(crop(folder, update=True), tmp_path / "records", frozen)
  assert by_id(tmp_path / "records")["01"].captions == ("a dog",)


def test_an_interrupted_encoding_does_not_mix_old_and_new(
  folder, frozen, monkeypatch, tmp_path, work
):
  make = Encode.__call__

  def dies(self, shard):
    if shard == 1:
      raise OSError("killed")
    return make(self, shard)

  output = tmp_path / "records"
  monkeypatch.setattr(Encode, "__call__", dies)
  with pytest.raises(OSError, match="killed"):
    encode(crop(folder), output, frozen)
  new_caption(folder)
  cropped = crop(folder, update=True)
  with pytest.raises(FileExistsError, match=r"unfinished dataset .* captions \(01\)"):
    encode(cropped, output, frozen)
  monkeypatch.setattr(Encode, "__call__", make)
  encode(cropped, output, frozen, update=True)
  assert by_id(output)["01"].captions == ("a dog",)
  # And an update that is killed goes on from the dataset that was finished.
  (folder / "00.txt").write_text("a tree")
  cropped = crop(folder, update=True)
  monkeypatch.setattr(Encode, "__call__", dies)
  with pytest.raises(OSError, match="killed"):
    encode(cropped, output, frozen, update=True)
  assert len(open_dataset(contents.previous_of(output))) == len(SIZES)
  monkeypatch.setattr(Encode, "__call__", make)
  work()
  encode(cropped, output, frozen)  # it is an update already
  assert work()["images"] == 0
  assert by_id(output)["00"].captions == ("a tree",)


def test_other_networks_and_arguments_are_encoded_again_as_far_as_they_reach(
  folder, frozen, work, tmp_path
):
  output, cropped = tmp_path / "records", crop(folder)
  encode(cropped, output, frozen)
  work()
  with pytest.raises(FileExistsError, match="text_dtype: 'float32' → 'bfloat16'"):
    encode(cropped, output, frozen, text_dtype=jnp.bfloat16)
  encode(cropped, output, frozen, update=True, text_dtype=jnp.bfloat16)
  done = work()
  assert (done["images"], len(done["captions"])) == (0, len(SIZES))
  with pytest.raises(FileExistsError, match="truncate_captions: False → True"):
    encode(cropped, output, frozen, text_dtype=jnp.bfloat16, truncate_captions=True)
  other = tmp_path / "frozen"
  shutil.copytree(frozen, other)
  path = other / "vae" / "diffusion_pytorch_model.safetensors"
  content = bytearray(path.read_bytes())
  content[-1] ^= 1  # a bit of the last weight
  path.write_bytes(content)
  encode(cropped, output, str(other), update=True, text_dtype=jnp.bfloat16)
  done = work()
  assert (done["images"], done["captions"]) == (len(SIZES), [])


def test_scores_that_go_into_records_are_part_of_them(folder, tmp_path, frozen):
  crop(folder)
  index = open_index(str(tmp_path / "index"))
  for part in range(index.num_parts):
    count = index.rows(part)
    scores = pa.array([5.0 + part] * count, pa.float32())
    index.write("scores", part, pa.table({"aesthetic": scores}))
  again = {
    "rule": world.RULE,
    "resolution": 32,
    "allow_upscaling": False,
    "images_per_shard": 2,
    "beam_options": [],
  }
  directory = tmp_path / "pictures"
  with pytest.raises(FileExistsError, match=r"5 images with another score \(00, 01"):
    cropped_images.prepare_images(index.directory, directory, **again)
  made = cropped_images.prepare_images(index.directory, directory, **again, update=True)
  assert [p.aesthetic_score for p in made.read(2, [0])] == [7.0]


def test_directories_of_earlier_versions_hold_and_say_what_is_not_known(
  folder, frozen, caplog, tmp_path
):
  cropped, output = crop(folder), tmp_path / "records"
  encode(cropped, output, frozen)
  (output / "contents.parquet").unlink()
  assert not encode(cropped, output, frozen)
  assert "an earlier version, which did not note what records were made" in caplog.text
  assert len(open_dataset(output)) == len(SIZES)
  # An earlier version's plan, as it was.
  plan = files.read_json(tmp_path / "pictures" / "plan.json")
  (tmp_path / "pictures" / "contents.parquet").unlink()
  del plan["arguments"]["colors"]
  rows = np.load(tmp_path / "pictures" / "plan.npy")
  plan["arguments"] |= {
    "steps": ["scan"],
    "rows": hashlib.sha256(rows.tobytes()).hexdigest(),
  }
  files.write_json(tmp_path / "pictures" / "plan.json", plan)
  old = crop(folder)
  assert "heeded no color profiles" in caplog.text
  assert not encode(old, output, frozen)
  (tmp_path / "pictures" / "pictures-00001.json").unlink()
  with pytest.raises(FileExistsError, match="colors: None, by an earlier version"):
    crop(folder)
  assert len(crop(folder, update=True).ids(1)) == 2


def test_an_image_painted_over_at_its_size_is_not_taken_for_the_scanned_one(folder):
  cropped = crop(folder)
  shutil.rmtree(cropped.directory)
  index = str(folder.parent / "index")
  repainted(folder)
  made = cropped_images.prepare_images(
    index,
    cropped.directory,
    rule=world.RULE,
    resolution=32,
    allow_upscaling=False,
    images_per_shard=2,
    beam_options=[],
  )
  [refusal] = made.refusals()
  assert (refusal.id, refusal.reason) == ("02", "has changed since the scan")
  assert refusal.detail.endswith("bytes, of other content")


def test_a_step_that_is_half_done_is_not_left_out_in_silence(folder, tmp_path):
  crop(folder)
  index = open_index(str(tmp_path / "index"))
  index.write("scores", 0, pa.table({"aesthetic": pa.array([1.0, 2.0], pa.float32())}))
  with pytest.raises(ValueError, match=r"`curate score` is unfinished: 2 of 3 parts"):
    cropped_images._steps(index)


def test_a_filter_whose_parts_a_scan_took_away_is_not_left_out_in_silence(
  folder, tmp_path
):
  crop(folder)
  index = open_index(str(tmp_path / "index"))
  index.note("kept", {"rules": {}})
  with pytest.raises(ValueError, match=r"`curate filter` is unfinished: 3 of 3 parts"):
    cropped_images._steps(index)


def test_processes_of_an_update_wait_for_the_first(
  folder, frozen, monkeypatch, tmp_path
):
  output = tmp_path / "records"
  encode(crop(folder), output, frozen)
  new_caption(folder)
  cropped = crop(folder, update=True)
  monkeypatch.setattr(compare, "_SECONDS_FOR_THE_FIRST", -1)
  before = world.files_of(output)
  with pytest.raises(ValueError, match="process 0 has not begun"):
    features.prepare_features(
      *(cropped, output, settings(frozen)),
      process_index=1,
      process_count=2,
      devices=jax.local_devices()[:1],
      update=True,
    )
  assert world.files_of(output) == before


def test_images_of_a_wide_gamut_are_srgb_and_say_so(folder):
  Image.open(folder / "00.png").save(
    folder / "00.png", icc_profile=icc.rgb_profile(icc.DISPLAY_P3)
  )
  cropped = crop(folder)
  [cropped] = cropped.read(0, [0])
  stored = np.asarray(Image.open(folder / "00.png"), float)
  expected = icc.as_srgb(icc.DISPLAY_P3, stored).round().astype(np.uint8)
  shown = np.asarray(world.RULE.apply(Image.fromarray(expected)), int)
  assert np.abs(np.asarray(cropped.image(), int) - shown).max() <= 3
  assert "icc_profile" not in cropped.image().info
  assert np.abs(np.asarray(cropped.image(), int) - stored[:32, :32]).mean() > 2


def test_settings_are_compared_only_where_they_count(folder, frozen, tmp_path):
  cropped = crop(folder)
  text = settings(frozen, captions="text")
  assert features._made_of(cropped, text) == features._made_of(
    cropped, dataclasses.replace(text, text_dtype=jnp.bfloat16)
  )


def test_nothing_is_deleted_that_an_update_has_not_set_aside(tmp_path):
  records, previous = tmp_path / "records", tmp_path / "records-previous"
  for path in (records, previous):
    path.mkdir()
    (path / "manifest.json").write_text(path.name)
  contents.drop_previous(records)
  assert (previous / "manifest.json").read_text() == "records-previous"
  for is_complete in (True, False):
    with pytest.raises(FileExistsError, match="no update has put it there"):
      contents.set_aside(records, is_complete=is_complete)
  assert (records / "manifest.json").read_text() == "records"
  previous.rename(tmp_path / "mine")
  contents.set_aside(records, is_complete=True)
  assert (previous / "manifest.json").read_text() == "records"
  contents.drop_previous(records)
  assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_images_of_one_id_are_never_taken_over_for_one_another():
  def made_of(*images):
    rows = [
      {"id": id, "image": image, "captions": [], "score": 1} for id, image in images
    ]
    return contents.Contents(contents.images(rows))

  before = made_of(("a", "x"), ("b", "y"), ("b", "z"), ("c", "u"))
  now = made_of(("a", "x"), ("b", "y"), ("b", "z"), ("c", "u"), ("c", "v"))
  assert before.unchanged_images(now) == {"a"}
