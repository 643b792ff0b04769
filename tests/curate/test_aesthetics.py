"""Aesthetic scores: the head against torch's, CLIP's pixels and embeddings."""

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from skimage import data
from transformers import (
  CLIPConfig,
  CLIPModel,
  CLIPTextConfig,
  CLIPVisionModelWithProjection,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from pixsigma_jax.curate import aesthetics

SIDE = 32  # of the images of the small CLIP
MEAN = [0.48145466, 0.4578275, 0.40821073]  # openai/CLIP, clip.py
STD = [0.26862954, 0.26130258, 0.27577711]


def torch_head(seed=0):
  """The published architecture, in the reference's own words."""
  torch.manual_seed(seed)
  linear, dropout = torch.nn.Linear, torch.nn.Dropout
  layers = [linear(768, 1024), dropout(0.2), linear(1024, 128), dropout(0.2)]
  layers += [linear(128, 64), dropout(0.1), linear(64, 16), linear(16, 1)]
  return torch.nn.Sequential(*layers).eval()


def published(head):
  return {f"layers.{name}": value for name, value in head.state_dict().items()}


@pytest.fixture(scope="module")
def head_file(tmp_path_factory):
  path = tmp_path_factory.mktemp("head") / "sac+logos+ava1-l14-linearMSE.pth"
  torch.save(published(torch_head()), path)
  return path


def small_clip(projection=768):
  torch.manual_seed(1)
  sizes = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
  }
  config = CLIPConfig(
    text_config={"vocab_size": 20, "max_position_embeddings": 8, **sizes},
    vision_config={"image_size": SIDE, "patch_size": 8, **sizes},
    projection_dim=projection,
  )
  model = CLIPModel(config).eval()
  with torch.no_grad():  # embeddings that differ from image to image
    for weight in model.vision_model.parameters():
      weight.add_(0.3 * torch.randn(weight.shape))
  return model


def save_clip(folder, model):
  model.save_pretrained(folder)
  CLIPImageProcessorPil(
    size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
  ).save_pretrained(folder)
  return str(folder)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
  return save_clip(tmp_path_factory.mktemp("clip"), small_clip())


@pytest.fixture(scope="module")
def scorer(clip_folder, head_file):
  return aesthetics.Scorer(clip_folder, str(head_file))


def photographs():
  arrays = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket()[:350]]
  return [Image.fromarray(array) for array in arrays]


def test_the_head_is_the_published_one_in_jax(head_file):
  embeddings = np.random.default_rng(0).normal(size=(5, 768)).astype(np.float32)
  unit = torch.nn.functional.normalize(torch.from_numpy(embeddings), dim=-1)
  expected = torch_head()(unit)[:, 0].detach().numpy()
  got = aesthetics.scores(aesthetics.load_head(head_file), 7 * embeddings)
  assert np.ptp(expected) > 1e-3  # else the images would not be told apart
  # Sums of 1024 numbers in float32, in another order.
  np.testing.assert_allclose(got, expected, atol=2e-6)


def test_an_embedding_of_zeros_has_a_score(head_file):
  got = aesthetics.scores(aesthetics.load_head(head_file), np.zeros((1, 768), "f4"))
  expected = torch_head()(torch.zeros(1, 768))[0, 0].item()
  np.testing.assert_allclose(got, [expected], atol=2e-6)


def test_a_head_in_safetensors_is_the_same_head(head_file, tmp_path):
  safetensors.torch.save_file(published(torch_head()), tmp_path / "head.safetensors")
  for a, b in zip(
    aesthetics.load_head(head_file),
    aesthetics.load_head(tmp_path / "head.safetensors"),
    strict=True,
  ):
    np.testing.assert_array_equal(a[0], b[0])
    np.testing.assert_array_equal(a[1], b[1])


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda w: w.pop("layers.6.bias"), r"lacks layers\.6\.bias and holds layers\.0"),
    (lambda w: w.update(extra=torch.zeros(1)), "also holds extra, which nothing"),
    (
      lambda w: w.update({"layers.2.weight": torch.zeros(128, 1000)}),
      r"layers\.2 is \[128, 1000\] with a bias of \[128\], not \[128, 1024\]",
    ),
    (
      lambda w: w.update({"layers.7.bias": torch.zeros(2)}),
      r"layers\.7 is \[1, 16\] with a bias of \[2\], not \[1, 16\] with \[1\]",
    ),
  ],
)
def test_every_tensor_of_the_file_is_accounted_for(tmp_path, change, message):
  weights = published(torch_head())
  change(weights)
  torch.save(weights, tmp_path / "head.pth")
  with pytest.raises(ValueError, match=message):
    aesthetics.load_head(tmp_path / "head.pth")


def test_scores_are_of_clips_own_embeddings(scorer, clip_folder):
  model = CLIPModel.from_pretrained(clip_folder).eval()
  processor = CLIPImageProcessorPil.from_pretrained(clip_folder)
  with torch.inference_mode():
    inputs = processor(photographs(), return_tensors="pt")
    embeddings = model.get_image_features(**inputs).pooler_output
    unit = torch.nn.functional.normalize(embeddings, dim=-1)
    expected = torch_head()(unit)[:, 0].numpy()
  got = scorer.score(photographs())
  assert got.dtype == np.float32
  assert np.ptp(expected) > 1e-3
  np.testing.assert_allclose(got, expected, atol=2e-6)


def test_pixels_are_those_of_openais_clip(clip_folder):
  """Shorter side to 224 in bicubic steps of Pillow, center crop, mean and deviation."""
  got = CLIPImageProcessorPil()(photographs(), return_tensors="np")["pixel_values"]
  for image, pixels in zip(photographs(), got, strict=True):
    shorter = min(image.size)
    size = [
      224 if side == shorter else int(224 * side / shorter) for side in image.size
    ]
    resized = image.resize(size, Image.Resampling.BICUBIC)
    left, top = ((side - 224) // 2 for side in size)
    cropped = resized.crop((left, top, left + 224, top + 224))
    expected = (np.asarray(cropped) / 255 - MEAN) / STD
    # float32 of numbers up to 2.6
    np.testing.assert_allclose(pixels.transpose(1, 2, 0), expected, atol=1e-6)


def test_a_score_does_not_depend_on_what_is_scored_with_it(scorer):
  together = scorer.score(photographs())
  alone = [scorer.score([image])[0] for image in photographs()]
  # torch may sum a batch of another size in another order.
  np.testing.assert_allclose(together, alone, atol=2e-6)


def test_no_images_have_no_scores(scorer):
  assert scorer.score([]).shape == (0,)


def test_gray_and_transparent_images_are_scored_as_colored_ones(scorer):
  gray = Image.fromarray(data.camera())
  np.testing.assert_array_equal(
    scorer.score([gray]), scorer.score([gray.convert("RGB")])
  )


def test_the_image_side_alone_is_enough(tmp_path, clip_folder, scorer, head_file):
  model = small_clip()
  vision_config = model.config.vision_config
  vision_config.projection_dim = 768
  alone = CLIPVisionModelWithProjection(vision_config)
  alone.vision_model.load_state_dict(model.vision_model.state_dict())
  alone.visual_projection.load_state_dict(model.visual_projection.state_dict())
  folder = save_clip(tmp_path, alone)
  got = aesthetics.Scorer(folder, str(head_file)).score(photographs())
  np.testing.assert_array_equal(got, scorer.score(photographs()))


def test_a_clip_of_another_width_is_refused(tmp_path, head_file):
  folder = save_clip(tmp_path, small_clip(projection=512))
  with pytest.raises(ValueError, match="have 512 numbers and the head rates 768"):
    aesthetics.Scorer(folder, str(head_file))


def test_a_model_that_is_no_clip_is_refused(tmp_path, head_file):
  CLIPTextConfig().save_pretrained(tmp_path)
  with pytest.raises(ValueError, match="it is a clip_text_model, not a CLIP"):
    aesthetics.Scorer(str(tmp_path), str(head_file))


def test_weights_that_are_not_there_are_never_made_up(tmp_path, head_file):
  folder = save_clip(tmp_path, small_clip())
  weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
  del weights["visual_projection.weight"]
  safetensors.torch.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
  with pytest.raises(ValueError, match=r"weights lack visual_projection\.weight"):
    aesthetics.Scorer(folder, str(head_file))


def test_what_is_not_there_is_named(tmp_path, clip_folder, head_file):
  with pytest.raises(FileNotFoundError, match=r"no weights at .*nothing\.pth"):
    aesthetics.Scorer(clip_folder, str(tmp_path / "nothing.pth"))
  with pytest.raises(FileNotFoundError, match=r"--clip=.*nowhere is neither a folder"):
    aesthetics.Scorer(str(tmp_path / "nowhere"), str(head_file))
