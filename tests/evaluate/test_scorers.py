"""Scorers: what they measure, and that an image's neighbours change nothing."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from skimage import data

from pixsigma_jax.evaluate.items import Item
from pixsigma_jax.evaluate.metrics import glcm_score
from pixsigma_jax.evaluate.scorers import scorer_type
from pixsigma_jax.evaluate.scorers.clip import middle_square
from pixsigma_jax.models.clip import preprocess
from pixsigma_jax.models.inception import (
  resize_clean,
  resize_tensorflow,
  resize_textatlas,
)
from tests.evaluate import networks

small_inception = networks.small_inception


def photographs():
  return [
    data.astronaut()[:96, :140],
    data.coffee()[:90, :80],
    data.chelsea()[:70, :70],
  ]


def items(count):
  prompts = ["a photo of a cat", "a red dog", "photo of red"]
  return [Item(id=str(i), prompt=prompts[i % 3]) for i in range(count)]


def load(name, **options):
  kind = scorer_type(name)
  return kind.load({option.name: option.default for option in kind.options} | options)


def check_rows(scorer, images):
  """Rows of the schema, the same alone and together."""
  together = scorer(images, items(len(images)))
  assert list(together) == scorer.schema().names
  for i, image in enumerate(images):
    alone = scorer([image], [items(len(images))[i]])
    for name, values in together.items():
      np.testing.assert_allclose(alone[name][0], values[i], rtol=1e-5, atol=1e-6)
  return together


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
  return networks.write_clip(tmp_path_factory.mktemp("clip") / "small")


def test_clip_scores_are_transformers_cosines(clip_folder):
  from transformers import CLIPModel, CLIPTokenizer
  from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

  scorer = load("clip", clip=str(clip_folder))
  ours = check_rows(scorer, photographs())["cosine"]
  model = CLIPModel.from_pretrained(clip_folder).eval()
  processor = CLIPImageProcessorPil(
    size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
  )
  pixels = processor([Image.fromarray(i) for i in photographs()], return_tensors="pt")
  tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
  tokens = tokenizer([i.prompt for i in items(3)], padding=True, return_tensors="pt")
  with torch.inference_mode():
    images = model.get_image_features(**pixels).pooler_output
    texts = model.get_text_features(**tokens).pooler_output
  theirs = torch.nn.functional.cosine_similarity(images, texts)
  np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_scorers_of_one_clip_share_its_towers(clip_folder):
  score = load("clip", clip=str(clip_folder))
  features = load("cmmd", clip_cmmd=str(clip_folder))
  assert features.clip.params["image"] is score.clip.params["image"]
  assert set(features.clip.params) == {"image"}
  # A score's hash names both towers, features' theirs alone.
  both, image = (each.identity()["hash"].split() for each in (score, features))
  assert both[:1] == image
  assert len(both) == 2


def test_cmmd_cuts_the_square_before_it_resizes():
  image = Image.fromarray(data.astronaut()[:64, :128])
  ours = middle_square(image, 32)
  expected = image.crop((32, 0, 96, 64)).resize((32, 32), Image.Resampling.BICUBIC)
  assert (ours == np.asarray(expected)).all()
  # An odd width tells the orders apart: CLIP's rounds the side that it crops.
  odd = Image.fromarray(data.astronaut()[:61, :117])
  assert (middle_square(odd, 32) != preprocess(odd, 32)).any()


def test_cmmd_embeds_that_square(clip_folder):
  scorer = load("cmmd", clip_cmmd=str(clip_folder))
  odd = data.astronaut()[:61, :117]
  ours = check_rows(scorer, [odd])["features"]
  square = middle_square(Image.fromarray(odd), scorer.clip.config.image_size)
  np.testing.assert_allclose(ours, scorer.clip.embed_pixels([square]), rtol=1e-6)
  other = preprocess(Image.fromarray(odd), scorer.clip.config.image_size)
  assert not np.allclose(ours, scorer.clip.embed_pixels([other]))


RESIZES = {
  "fid": resize_tensorflow,
  "fid-clean": resize_clean,
  "fid-textatlas": lambda image: resize_textatlas(Image.fromarray(image)),
}


@pytest.mark.parametrize("name", RESIZES)
def test_each_fid_has_its_own_resize(name, tmp_path, small_inception):
  variant = "torchvision" if name == "fid-textatlas" else "fid"
  path = networks.write_inception(tmp_path / "inception.safetensors", variant)
  option = "inception" if variant == "fid" else "inception_torchvision"
  scorer = load(name, **{option: str(path)})
  [image, *_] = photographs()
  ours = scorer([image], items(1))["features"]
  pixels = {of: resize(image)[None] for of, resize in RESIZES.items()}
  found = {of: scorer.network(x.astype(np.float32))[0] for of, x in pixels.items()}
  for of, features in found.items():
    assert np.allclose(ours, features, rtol=1e-5, atol=1e-6) == (of == name)


def test_identities_follow_weights_and_settings(clip_folder, tmp_path, small_inception):
  other = networks.write_clip(tmp_path / "other", projection_dim=8)
  one, two = (load("clip", clip=str(f)).identity() for f in (clip_folder, other))
  assert one["hash"] != two["hash"]
  textatlas = load("clip-textatlas", clip_textatlas=str(clip_folder)).identity()
  assert {k for k in one if one[k] != textatlas[k]} == {"truncate"}

  files = [
    networks.write_inception(tmp_path / f"{seed}.safetensors", seed=seed)
    for seed in range(2)
  ]
  fid, again = (load("fid", inception=str(file)).identity() for file in files)
  assert {k for k in fid if fid[k] != again[k]} == {"sha256"}
  clean = load("fid-clean", inception=str(files[0])).identity()
  assert {k for k in fid if fid[k] != clean[k]} == {"resize"}


def test_every_scorer_names_weights_hash_resize_and_version(
  clip_folder, tmp_path, small_inception
):
  inception = str(networks.write_inception(tmp_path / "fid.safetensors"))
  theirs = tmp_path / "torchvision.safetensors"
  networks.write_inception(theirs, "torchvision")
  clip = {f"clip{which}": str(clip_folder) for which in ("", "_cmmd", "_textatlas")}
  options = {"inception": inception, "inception_torchvision": str(theirs), **clip}
  for name in ("fid", "fid-clean", "fid-patch", "fid-textatlas", *CLIPS, "ocr"):
    identity = scorer_type(name).load({"ocr_engine": "rapidocr"} | options).identity()
    assert {"weights", "resize", "version"} <= set(identity), name
    # A hash stands for itself, or behind the name of each file.
    hashes = [identity.get("hash"), identity.get("sha256"), identity["weights"]]
    assert re.search(r"\b[0-9a-f]{8,64}\b", " ".join(filter(None, hashes))), name


CLIPS = ("clip", "clip-textatlas", "cmmd")


def test_inception_features_are_an_images_own(tmp_path, small_inception):
  path = str(networks.write_inception(tmp_path / "inception.safetensors"))
  rows = check_rows(load("fid", inception=path), photographs())
  assert rows["features"].shape == (3, 2048)
  np.testing.assert_allclose(rows["probabilities"].sum(axis=1), 1, rtol=1e-4)
  patches = load("fid-patch", inception=path)
  image = np.tile(data.astronaut(), (1, 2, 1))
  whole = patches([image], items(1))["features"].reshape(20, 2048)
  # A patch of an image that repeats is the same wherever it is cut; here it moves.
  assert len(np.unique(whole.round(3), axis=0)) == 20
  # Places are the size's, whatever the image: a pixel outside of them moves nothing.
  other = image.copy()
  other[0, 0] = 255 - other[0, 0]
  again = patches([other], items(1))["features"].reshape(20, 2048)
  np.testing.assert_array_equal(again, whole)
  flat = np.full((400, 500, 3), 77, np.uint8)
  same = patches([flat], items(1))["features"].reshape(20, 2048)
  np.testing.assert_allclose(same, same[:1].repeat(20, axis=0), rtol=1e-5)


def test_the_aesthetic_head_rates_clips_embeddings(tmp_path):
  clip = networks.write_clip(tmp_path / "clip", projection_dim=768)
  random = np.random.default_rng(0)
  widths = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
  weights = {}
  for i, shape in widths.items():
    weights[f"layers.{i}.weight"] = random.normal(0, 0.05, shape).astype(np.float32)
    weights[f"layers.{i}.bias"] = np.zeros(shape[0], np.float32)
  # The bias of the last layer moves all scores alike.
  for name, bias in (("low", 1.0), ("high", 3.5)):
    weights["layers.7.bias"] = np.full(1, bias, np.float32)
    save_file(weights, tmp_path / f"{name}.safetensors")
  low, high = (
    load(
      "aesthetic",
      aesthetic_clip=str(clip),
      aesthetic_head=str(tmp_path / f"{name}.safetensors"),
    )
    for name in ("low", "high")
  )
  scores = check_rows(low, photographs())["aesthetic"]
  assert len(set(scores.round(4))) == 3
  np.testing.assert_allclose(
    high(photographs(), items(3))["aesthetic"] - scores, 2.5, rtol=1e-4
  )
  assert low.identity()["head"] != high.identity()["head"]


def test_texture_is_that_of_the_metrics_and_knows_when_there_is_no_seam():
  random = np.random.default_rng(0)
  noise = random.integers(0, 256, (128, 192, 3), dtype=np.uint8)
  scorer = load("texture", seam_period=64)
  [flat, rough] = ([np.full_like(noise, 9)], [noise])
  rows = scorer(rough, items(1))
  assert rows["glcm_score"] == [glcm_score(noise)]
  assert rows["pixel_bytes"][0] / rows["jpeg_bytes"][0] < 3
  smooth = scorer(flat, items(1))
  assert smooth["jpeg_bytes"][0] < rows["jpeg_bytes"][0] / 10
  assert abs(rows["seam_score"][0] - 1) < 0.05
  seams = noise // 64
  seams[:, 64:128] += 100
  assert scorer([seams], items(1))["seam_score"][0] > 5
  assert load("texture", seam_period=128)(rough, items(1))["seam_score"] == [None]


@pytest.mark.parametrize(
  ("name", "options", "message"),
  [
    ("fid", {}, "Give --inception=FILE: weights of FID's"),
    ("fid-textatlas", {}, "Give --inception_torchvision=FILE"),
    ("aesthetic", {}, "Give --aesthetic_head=FILE"),
    ("texture", {"seam_period": 1}, "--seam_period=1 must be at least 2"),
    ("nothing", {}, "There is no scorer 'nothing': known are"),
  ],
)
def test_missing_weights_and_settings_are_named(name, options, message):
  with pytest.raises(ValueError, match=message):
    load(name, **options)


def test_foreign_weights_are_refused(tmp_path):
  path = tmp_path / "other.safetensors"
  save_file({"weight": np.zeros(3, np.float32)}, path)
  with pytest.raises(ValueError, match="not the weights of Inception-v3"):
    load("fid", inception=str(path))
