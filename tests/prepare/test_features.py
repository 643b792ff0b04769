"""Images through VAE and T5: equal to torch, whoever writes them, however often."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from pixsigma_jax.data import writing
from pixsigma_jax.data.records import open_dataset
from pixsigma_jax.models.t5 import T5TextEncoder
from pixsigma_jax.models.vae import KLAutoencoder
from pixsigma_jax.prepare import check, cropped_images, features, load, write
from pixsigma_jax.prepare.settings import Settings
from tests.prepare import world

LENGTH = 12
LONG = "a photo of the red house and a cat and a dog and a bird on the left of the car"


def captions(name):
  """One image has a caption too long beside others, one nothing else."""
  return {
    "03": [(f" {LONG} ", "long"), ("  a cat\n", "short")],
    "04": [(LONG, "long")],
    "06": [("  ", "short"), ("the tree", "long"), ("a dog", "short")],
  }.get(name, world.CAPTIONS)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module")
def theirs(root):
  return world.write_frozen(root / "frozen")


@pytest.fixture(scope="module")
def cropped(root):
  folder = world.make_folder(root / "images")
  index = world.make_index(root / "index", folder, captions=captions)
  return cropped_images.prepare_images(
    index.directory,
    root / "pictures",
    rule=world.RULE,
    resolution=32,
    allow_upscaling=False,
    images_per_shard=2,
    beam_options=[],
  )


@pytest.fixture(scope="module")
def settings(root, theirs):
  return Settings(
    frozen=str(root / "frozen"),
    caption_length=LENGTH,
    text_dtype=jnp.float32,
    batch_size=2,
  )


def prepare(cropped, directory, settings, **arguments):
  """On one device, whose programs compile fastest."""
  one = {"devices": jax.local_devices()[:1]}
  return features.prepare_features(cropped, directory, settings, **one | arguments)


@pytest.fixture(scope="module")
def finished(root, cropped, settings):
  assert prepare(cropped, root / "records", settings)
  return root / "records"


def reference_moments(their_vae, path, resample=Image.Resampling.BICUBIC):
  """What the reference computes online, by the formulas of InternalData_ms.py."""
  with Image.open(path) as image:
    image = image.convert("RGB")
  h, w = image.height, image.width
  ratios = {"0.5": (32, 64), "1.0": (32, 32)}
  closest = min(ratios, key=lambda ratio: abs(float(ratio) - h / w))
  closest_h, closest_w = ratios[closest]
  if closest_h / h > closest_w / w:
    resize_h, resize_w = closest_h, int(w * closest_h / h)
  else:
    resize_h, resize_w = int(h * closest_w / w), closest_w
  image = image.resize((resize_w, resize_h), resample)
  top, left = round((resize_h - closest_h) / 2.0), round((resize_w - closest_w) / 2.0)
  image = image.crop((left, top, left + closest_w, top + closest_h))
  pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255)
  pixels = (pixels - 0.5) / 0.5
  with torch.no_grad():
    posterior = their_vae.encode(pixels[None]).latent_dist
  moments = torch.cat([posterior.mean, posterior.logvar], dim=1)[0]
  return moments.permute(1, 2, 0).numpy()


def test_latents_are_those_of_the_references_online_path(root, finished, theirs):
  dataset = open_dataset(finished)
  assert dataset.manifest.latent_sizes == ((4, 4, 3), (4, 8, 3))
  for record in dataset.read(range(len(dataset))):
    expected = reference_moments(theirs[0], root / "images" / f"{record.id}.png")
    # float32 on both sides, then float16, which keeps eleven bits.
    np.testing.assert_allclose(record.latent_moments, expected, rtol=1e-3, atol=1e-3)
    assert record.latent_moments.dtype == np.float16
    assert expected.std() > 0.05  # there is something to compare


def test_embeddings_are_t5s_of_the_valid_tokens(root, finished, theirs):
  dataset = open_dataset(finished)
  tokenizer = AutoTokenizer.from_pretrained(root / "frozen" / "tokenizer")
  for record in dataset.read(range(len(dataset))):
    parts = np.split(record.caption_embeddings, np.cumsum(record.caption_lengths)[:-1])
    for caption, part in zip(record.captions, parts, strict=True):
      coded = tokenizer(
        caption, padding="max_length", max_length=LENGTH, return_tensors="pt"
      )
      with torch.no_grad():
        expected = theirs[1](coded.input_ids, coded.attention_mask)[0][0].numpy()
      assert len(part) == int(coded.attention_mask.sum())
      np.testing.assert_allclose(part, expected[: len(part)], rtol=1e-3, atol=1e-3)
  empty = tokenizer("", padding="max_length", max_length=LENGTH, return_tensors="pt")
  with torch.no_grad():
    expected = theirs[1](empty.input_ids, empty.attention_mask)[0][0].numpy()
  np.testing.assert_allclose(dataset.null_caption, expected, rtol=0, atol=1e-4)


def test_records_say_what_the_index_says(finished):
  dataset = open_dataset(finished)
  found = {record.id: record for record in dataset.read(range(len(dataset)))}
  assert set(found) == {"00", "01", "02", "03", "05", "06"}
  for name, record in found.items():
    height, width = world.SIZES[int(name)]
    assert record.original_size.tolist() == [height, width]
    np.testing.assert_array_equal(record.crop, world.RULE.plan(height, width).box)
    assert np.isnan(record.aesthetic_score)
  texts, kinds = zip(*world.CAPTIONS, strict=True)
  assert (found["00"].captions, found["00"].caption_kinds) == (texts, kinds)
  # Spaces around a caption go, as in the reference.
  assert found["03"].captions == ("a cat",)
  assert found["06"].captions == ("the tree", "a dog")
  assert found["06"].caption_kinds == ("long", "short")


def test_the_manifest_says_what_made_the_features(root, finished):
  manifest = open_dataset(finished).manifest
  assert (manifest.kind, manifest.channels) == ("latent_moments", 4)
  assert manifest.autoencoder["name"] == "sdxl-vae"
  assert manifest.scaling_factor == 0.13025
  assert manifest.text_encoder == {"name": "t5", "width": 32}
  assert (manifest.caption_length, manifest.caption_storage) == (LENGTH, "embeddings")
  assert manifest.crop_rule == world.RULE.identity
  assert manifest.hashes["crop_rule"] == world.RULE.hash
  folder = root / "frozen"
  for name, part in (("autoencoder", "vae"), ("text_encoder", "text_encoder")):
    assert manifest.hashes[name] == load.weights_hash(folder / part)
  assert len(manifest.shards) == 4


def test_every_caption_and_image_that_is_missing_is_in_the_report(finished):
  counts = write.read_report(finished)
  assert counts == {
    "caption": {f"has more than {LENGTH} tokens": 2, "is empty": 1},
    "image": {"has no caption that fits": 1, "smaller than its size": 1},
  }
  lines = (write.reports_of(finished) / "refused.jsonl").read_text().splitlines()
  refusals = [json.loads(line) for line in lines]
  assert {r["id"] for r in refusals if r["what"] == "image"} == {"04", "07"}
  (long,) = (r for r in refusals if r["id"] == "03")
  assert long["detail"] == f"22 tokens: {LONG}"


def test_captions_are_cut_only_if_that_is_asked_for(root, cropped, settings):
  cut = dataclasses.replace(settings, truncate_captions=True)
  prepare(cropped, root / "cut", cut)
  dataset = open_dataset(root / "cut")
  found = {record.id: record for record in dataset.read(range(len(dataset)))}
  assert found["04"].captions == ("a photo of the red house and a cat and a",)
  assert found["04"].caption_lengths.tolist() == [LENGTH]
  counts = write.read_report(root / "cut")
  assert counts["caption end"] == {f"was cut at {LENGTH} tokens": 2}
  assert "has no caption that fits" not in counts["image"]


class Killed(BaseException):
  """As little foreseen as a SIGKILL, as far as the program goes."""


@pytest.mark.parametrize(
  ("survived", "processes"), [(0, 3), (1, 2), (1, 3), (2, 2), (3, 1), (3, 3)]
)
def test_killed_after_any_shard_any_number_of_processes_go_on_to_the_same_bytes(
  root, cropped, settings, finished, monkeypatch, survived, processes
):
  directory = root / f"killed-{survived}-{processes}"
  close, closed = writing.ShardWriter.close, []

  def dies(self):
    if len(closed) == survived:
      raise Killed
    closed.append(self)
    close(self)

  monkeypatch.setattr(writing.ShardWriter, "close", dies)
  with pytest.raises(Killed):
    prepare(cropped, directory, settings)
  monkeypatch.setattr(writing.ShardWriter, "close", close)
  before, missing = world.files_of(directory), set(range(survived, 4))
  for index in range(processes):
    again = {"process_index": index, "process_count": processes}
    assert prepare(cropped, directory, settings, **again) == bool(missing)
    missing -= set(range(index, 4, processes))
    # Whoever writes the last one also finishes.
    assert (directory / "manifest.json").exists() == (not missing)
  assert world.files_of(directory) == world.files_of(finished)
  shards = {n: b for n, b in before.items() if n.endswith(".array_record")}
  assert len(shards) == survived
  assert shards.items() <= world.files_of(directory).items()
  for name in ("report.json", "refused.jsonl"):
    reports = (write.reports_of(d) / name for d in (directory, finished))
    assert len({report.read_bytes() for report in reports}) == 1


def test_a_process_takes_only_its_own_shards(root, cropped, settings):
  directory = root / "own"
  prepare(cropped, directory, settings, process_index=1, process_count=3)
  assert [path.name for path in sorted(directory.glob("*.array_record"))] == [
    "records-train-00001.array_record"
  ]


def test_the_same_again_does_nothing_and_another_is_refused(
  cropped, settings, finished, monkeypatch
):
  before = world.files_of(finished)
  monkeypatch.setattr(features, "begin_dataset", None)
  assert not prepare(cropped, finished, settings)
  for change, message in (
    ({"caption_length": 13}, "caption_length: 12 → 13"),
    ({"captions": "text"}, "caption_storage: 'embeddings' → 'text'"),
  ):
    with pytest.raises(FileExistsError, match=message):
      prepare(cropped, finished, dataclasses.replace(settings, **change))
  assert world.files_of(finished) == before


def test_others_may_finish_while_a_process_loads_its_networks(
  root, cropped, settings, finished, monkeypatch
):
  begin = features.begin_dataset

  def late(directory, *arguments):
    shutil.copytree(finished, directory)
    return begin(directory, *arguments)

  monkeypatch.setattr(features, "begin_dataset", late)
  assert not prepare(cropped, root / "late", settings)
  assert world.files_of(root / "late") == world.files_of(finished)


def test_other_weights_make_other_features(root, cropped, settings, finished):
  frozen = root / "other"
  shutil.copytree(root / "frozen", frozen)
  path = frozen / "vae" / "diffusion_pytorch_model.safetensors"
  content = bytearray(path.read_bytes())
  content[-1] ^= 1  # a bit of the last weight
  path.write_bytes(content)
  other = dataclasses.replace(settings, frozen=str(frozen))
  with pytest.raises(FileExistsError, match=r"hashes\.autoencoder: "):
    prepare(cropped, finished, other)
  (frozen / "vae" / "config.json").write_text("{}")
  with pytest.raises(ValueError, match="only AutoencoderKL can be read"):
    prepare(cropped, root / "none", other)
  assert not (root / "none").exists()


def test_captions_as_text_need_no_text_encoder(root, cropped, settings, finished):
  frozen = root / "without"
  shutil.copytree(root / "frozen", frozen)
  (frozen / "text_encoder" / "model.safetensors").unlink()
  text = dataclasses.replace(settings, frozen=str(frozen), captions="text")
  prepare(cropped, root / "text", text)
  dataset, full = open_dataset(root / "text"), open_dataset(finished)
  assert dataset.null_caption is None
  assert set(dataset.manifest.hashes) == {"autoencoder", "crop_rule"}
  for ours, other in zip(
    dataset.read(range(len(dataset))), full.read(range(len(full))), strict=True
  ):
    assert ours.caption_embeddings is None
    assert (ours.id, ours.captions) == (other.id, other.captions)
    np.testing.assert_array_equal(ours.caption_lengths, other.caption_lengths)
    np.testing.assert_array_equal(ours.latent_moments, other.latent_moments)
  assert write.read_report(root / "text") == write.read_report(finished)


def test_devices_share_the_work_and_make_the_same(root, cropped, settings, finished):
  two = {"devices": jax.local_devices()[:2]}
  prepare(cropped, root / "shared", settings, **two)
  shared, alone = open_dataset(root / "shared"), open_dataset(finished)
  assert len(shared) == len(alone)
  for ours, other in zip(
    shared.read(range(len(shared))), alone.read(range(len(alone))), strict=True
  ):
    assert ours.id == other.id
    # Programs of other shapes round differently: one place of float16 at most.
    for name in ("latent_moments", "caption_embeddings"):
      np.testing.assert_allclose(
        getattr(ours, name), getattr(other, name), rtol=2e-3, atol=1e-3
      )


def test_one_program_a_size_and_half(monkeypatch, cropped, settings, root):
  shapes = set()
  encode = KLAutoencoder.moments

  def spied(self, images):
    shapes.add(images.shape)
    return encode(self, images)

  monkeypatch.setattr(KLAutoencoder, "moments", spied)
  prepare(cropped, root / "programs", settings)
  assert shapes == {(2, 32, 32, 3), (2, 32, 64, 3)}


def test_what_overflows_float16_is_left_out_and_named(
  root, cropped, settings, monkeypatch
):
  encode = T5TextEncoder.encode

  def loud(self, prompts, length):
    embeddings, mask = encode(self, prompts, length)
    rows = np.array([prompt == "the tree" for prompt in prompts])
    return np.where(rows[:, None, None], np.float32(1e5), embeddings), mask

  monkeypatch.setattr(T5TextEncoder, "encode", loud)
  prepare(cropped, root / "loud", settings)
  assert write.read_report(root / "loud")["image"]["makes no valid record"] == 1
  assert len(open_dataset(root / "loud")) == 5
  lines = (write.reports_of(root / "loud") / "refused.jsonl").read_text()
  assert "caption_embeddings holds values that are not finite" in lines


def test_images_must_be_finished_first(root, cropped, settings):
  shutil.copytree(cropped.directory, root / "half")
  (root / "half" / "pictures-00002.json").unlink()
  half = cropped_images.open_images(root / "half")
  with pytest.raises(ValueError, match=r"1 of 4 shards of images are missing in .* 2"):
    prepare(half, root / "none", settings)


@pytest.mark.parametrize(
  ("index", "count"), [(-1, 2), (2, 2), (0, 0)], ids=["below", "above", "none"]
)
def test_a_process_has_one_of_the_numbers(cropped, settings, root, index, count):
  with pytest.raises(ValueError, match=f"Process {index} of {count}"):
    prepare(
      *(cropped, root / "none", settings), process_index=index, process_count=count
    )


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer"])
def test_a_missing_network_is_named(root, cropped, settings, part):
  frozen = root / f"lacks-{part}"
  for other in {"vae", "text_encoder", "tokenizer"} - {part}:
    shutil.copytree(root / "frozen" / other, frozen / other)
  with pytest.raises(FileNotFoundError, match=part):
    prepare(cropped, root / "none", dataclasses.replace(settings, frozen=str(frozen)))
  assert not (root / "none").exists()


def test_settings_out_of_range_are_refused():
  with pytest.raises(ValueError, match="caption_length 0 must be at least 1"):
    Settings(frozen="", caption_length=0)
  with pytest.raises(ValueError, match="batch_size 0 must be at least 1"):
    Settings(frozen="", batch_size=0)


def test_weights_are_known_by_their_files_alone(root, theirs, tmp_path):
  shutil.copytree(root / "frozen" / "vae", tmp_path / "vae")
  there = load.weights_hash(root / "frozen" / "vae")
  (tmp_path / "vae" / "config.json").write_text("{}")
  (tmp_path / "vae" / "model.fp16.safetensors").write_text("not the one that is read")
  assert load.weights_hash(tmp_path / "vae") == there
  with pytest.raises(FileNotFoundError, match="There are no weights in"):
    load.weights_hash(tmp_path / "none")


def test_the_round_trip_is_shown_beside_the_images(
  root, cropped, finished, settings, capsys, theirs
):
  sheet = root / "sheet.png"
  ratio = check.check(cropped, finished, settings.frozen, sheet)
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 7
  assert lines[-1] == f"{ratio:6.2f} dB  in all 6 records that were decoded"
  # The last record's, by hand and by torch.
  record = open_dataset(finished)[5]
  mean = torch.from_numpy(record.latent_moments[..., :4].astype(np.float32))
  with torch.no_grad():
    decoded = theirs[0].decode(mean.permute(2, 0, 1)[None]).sample[0].permute(1, 2, 0)
  with Image.open(root / "images" / f"{record.id}.png") as image:
    original = np.asarray(world.RULE.apply(image), np.float32) / 127.5 - 1
  error = np.square(np.clip(decoded.numpy(), -1, 1) - original).mean()
  value, name = lines[5].split(" dB  ")
  assert name == record.id
  assert abs(float(value) - 10 * np.log10(4 / error)) < 0.01
  with Image.open(sheet) as image:
    image.load()
    assert image.width >= 2 * 64
  other = dataclasses.replace(settings, frozen=str(root / "other"))
  with pytest.raises((ValueError, FileNotFoundError), match="vae"):
    check.check(cropped, finished, other.frozen, sheet)
