"""CLIP's files: what is read, that it is transformers' network, and what is refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from pixsigma_jax import sharding
from pixsigma_jax.convert.clip import (
  clip_config_from,
  clip_from_weights,
  clip_names,
  load_clip,
)
from pixsigma_jax.models.clip import _embed, abstract_clip_params, preprocess

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WORDS = ["a", "photo", "of", "cat", "red", "dog"]
# Published sizes: vision width, layers, heads, hidden, patch, image; text width,
# layers, heads, hidden; projection; parameters of both towers by transformers.
PUBLISHED = {
  "base-patch32": ((768, 12, 12, 3072, 32, 224), (512, 12, 8, 2048), 512, 151277313),
  "base-patch16": ((768, 12, 12, 3072, 16, 224), (512, 12, 8, 2048), 512, 149620737),
  "large-patch14": ((1024, 24, 16, 4096, 14, 224), (768, 12, 12, 3072), 768, 427616513),
  "large-patch14-336": (
    (1024, 24, 16, 4096, 14, 336),
    (768, 12, 12, 3072),
    768,
    427944193,
  ),
  "H-14": ((1280, 32, 16, 5120, 14, 224), (1024, 24, 16, 4096), 1024, 986109441),
}


def content(**fields):
  """A config.json of a tiny CLIP."""
  return {
    "model_type": "clip",
    "projection_dim": 16,
    "text_config": {
      "hidden_size": 32,
      "num_hidden_layers": 2,
      "num_attention_heads": 4,
      "intermediate_size": 64,
      "vocab_size": 600,
      "max_position_embeddings": 12,
      "eos_token_id": 2,
      "bos_token_id": 0,
      "pad_token_id": 1,
    },
    "vision_config": {
      "hidden_size": 48,
      "num_hidden_layers": 2,
      "num_attention_heads": 4,
      "intermediate_size": 96,
      "image_size": 28,
      "patch_size": 7,
    },
    **fields,
  }


def network(fields):
  """transformers' network of a config.json, with random weights."""
  config = transformers.CLIPConfig(**fields)
  torch.manual_seed(0)
  model = transformers.CLIPModel(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.normal_(0.1 if parameter.ndim == 1 else 0, 0.2)
  return model


def write_tokenizer(folder):
  """CLIP's own kind: letters, letters that end a word, and a few merges."""
  letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
  tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
  merges = []
  for word in WORDS:
    pieces = [*word[:-1], f"{word[-1]}</w>"]
    while len(pieces) > 1:
      merges.append(f"{pieces[0]} {pieces[1]}")
      pieces = ["".join(pieces[:2]), *pieces[2:]]
      tokens.append(pieces[0])
  tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
  vocabulary = {token: i for i, token in enumerate(tokens)}
  (folder / "vocab.json").write_text(json.dumps(vocabulary))
  lines = ["#version: 0.2", *dict.fromkeys(merges)]
  (folder / "merges.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def model():
  return network(content())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
  folder = tmp_path_factory.mktemp("clip")
  weights = {name: x.numpy() for name, x in model.state_dict().items()}
  save_file(weights, folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps(content()))
  write_tokenizer(folder)
  return folder


@pytest.fixture(scope="module")
def clip(folder):
  return load_clip(folder, batch_size=2)


@pytest.fixture(scope="module")
def images():
  random = np.random.default_rng(0)
  sizes = [(28, 28), (40, 61), (90, 33)]
  return [
    Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8))
    for size in sizes
  ]


def processor():
  from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

  return CLIPImageProcessorPil(
    size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
  )


def test_images_are_embedded_as_transformers_embeds_them(clip, model, images):
  pixels = processor()(images, return_tensors="pt")["pixel_values"]
  theirs = model.get_image_features(pixel_values=pixels).pooler_output
  ours = clip.embed_images(images)
  np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-5, rtol=1e-5)


def test_texts_are_embedded_as_transformers_embeds_them(clip, model, folder):
  texts = ["a photo of a cat", "red dog", "a", "", "a red cat " * 8]
  tokenizer = transformers.CLIPTokenizerFast.from_pretrained(folder)
  coded = tokenizer(
    texts, padding="max_length", max_length=12, truncation=True, return_tensors="pt"
  )
  theirs = model.get_text_features(**coded).pooler_output.detach().numpy()
  ours = clip.embed_texts(texts)
  np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_sliced_text_loses_its_end_and_is_embedded_at_its_start(clip, model, folder):
  tokenizer = transformers.CLIPTokenizerFast.from_pretrained(folder)
  ids = tokenizer("a red cat " * 8, return_tensors="pt")["input_ids"][:, :12]
  theirs = model.get_text_features(input_ids=ids).pooler_output.detach().numpy()
  ours = clip.embed_texts(["a red cat " * 8], truncate="slice")
  np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)
  assert not np.allclose(ours, clip.embed_texts(["a red cat " * 8]))


def test_a_named_end_token_is_where_a_text_is_embedded():
  fields = content()
  fields["text_config"]["eos_token_id"] = 7
  model = network(fields)
  config = clip_config_from(fields)
  weights = {name: x.numpy() for name, x in model.state_dict().items()}
  params = clip_from_weights(
    weights, config, "text", mesh=sharding.single_device_mesh()
  )
  ids = np.array([[9, 300, 7, 500, 7, 0]], np.int32)
  theirs = model.get_text_features(input_ids=torch.from_numpy(ids)).pooler_output
  ours = _embed(params, ids, which="text", config=config, dtype=jnp.dtype("float32"))
  np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-5, rtol=1e-5)


def test_gelu_is_exact_where_the_config_says_gelu(images):
  fields = content()
  fields["vision_config"]["hidden_act"] = "gelu"
  model = network(fields)
  weights = {name: x.numpy() for name, x in model.state_dict().items()}
  config = clip_config_from(fields)
  mesh = sharding.single_device_mesh()
  params = clip_from_weights(weights, config, "image", mesh=mesh)
  pixels = np.stack([preprocess(image, 28) for image in images])
  ours = _embed(
    params, pixels, which="image", config=config, dtype=jnp.dtype("float32")
  )
  theirs = model.get_image_features(
    pixel_values=processor()(images, return_tensors="pt")["pixel_values"]
  ).pooler_output
  np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-5, rtol=1e-5)


def test_pixels_are_transformers_to_a_grey_level(images):
  theirs = processor()(images, do_normalize=False, return_tensors="np")
  for image, pixels in zip(images, theirs["pixel_values"], strict=True):
    ours = preprocess(image, 28)
    assert np.abs(ours - 255 * pixels.transpose(1, 2, 0)).max() <= 1


def test_an_image_is_embedded_the_same_whatever_stands_beside_it(clip, images):
  alone = clip.embed_images(images[2:])
  np.testing.assert_array_equal(clip.embed_images(images)[2:], alone)
  assert clip.embed_images([]).shape == (0, 16)


def test_devices_that_share_a_batch_change_nothing(folder, clip, images):
  mesh = sharding.make_mesh(data=4, fsdp=2, context=1)
  shared = load_clip(folder, towers=["image"], mesh=mesh, batch_size=1)
  np.testing.assert_allclose(
    shared.embed_images(images), clip.embed_images(images), atol=1e-6
  )


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_published_number_of_parameters(name):
  (width, layers, heads, hidden, patch, size), text, projection, count = PUBLISHED[name]
  fields = {
    "model_type": "clip",
    "projection_dim": projection,
    "vision_config": {
      "hidden_size": width,
      "num_hidden_layers": layers,
      "num_attention_heads": heads,
      "intermediate_size": hidden,
      "patch_size": patch,
      "image_size": size,
    },
    "text_config": dict(
      zip(
        (
          "hidden_size",
          "num_hidden_layers",
          "num_attention_heads",
          "intermediate_size",
        ),
        text,
        strict=True,
      )
    ),
  }
  config = clip_config_from(fields)
  from pixsigma_jax import tree

  ours = sum(
    tree.size(abstract_clip_params(config, which)) for which in ("image", "text")
  )
  assert ours + 1 == count  # and the scale of training


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"model_type": "siglip"}, "of a 'siglip'"),
    ({"vision_config": {"hidden_act": "relu"}}, "hidden_act='relu'"),
    ({"quantization_config": {"bits": 8}}, "quantised"),
  ],
)
def test_configs_of_other_networks_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    clip_config_from(content(**fields))


@pytest.fixture
def copied(folder, tmp_path):
  import shutil

  return shutil.copytree(folder, tmp_path / "clip")


def test_every_tensor_is_accounted_for(copied):
  path = copied / "model.safetensors"
  weights = load_file(path)
  last = clip_names(clip_config_from(content()), "image")["projection/kernel"]
  save_file(
    {k: v for k, v in weights.items() if k != last} | {"x": weights[last]}, path
  )
  with pytest.raises(ValueError, match=f"{last} is missing; x is not used"):
    load_clip(copied)


def test_weights_of_other_sizes_are_refused(copied):
  fields = content()
  fields["vision_config"]["hidden_size"] = 32
  (copied / "config.json").write_text(json.dumps(fields))
  with pytest.raises(ValueError, match="weights and config are of different models"):
    load_clip(copied)


def test_other_preprocessing_is_refused(copied):
  (copied / "preprocessor_config.json").write_text(json.dumps({"size": 224}))
  with pytest.raises(ValueError, match="size=224, where CLIP has 28"):
    load_clip(copied)


def test_a_tokenizer_of_another_model_is_refused(copied):
  vocabulary = json.loads((copied / "vocab.json").read_text())
  vocabulary["<|endoftext|>"] = 6000
  (copied / "vocab.json").write_text(json.dumps(vocabulary))
  with pytest.raises(ValueError, match="ids up to 6000"):
    load_clip(copied)


def test_a_folder_without_a_tokenizer_serves_images_alone(copied, images):
  (copied / "vocab.json").unlink()
  with pytest.raises(FileNotFoundError, match="no tokenizer"):
    load_clip(copied)
  clip = load_clip(copied, towers=["image"])
  assert clip.embed_images(images).shape == (3, 16)
  with pytest.raises(ValueError, match="text tower was not loaded"):
    clip.embed_texts(["a"])


def test_what_is_neither_a_folder_nor_on_the_hub_is_named(monkeypatch):
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  with pytest.raises(FileNotFoundError, match="openai/no-such is neither a folder"):
    load_clip("openai/no-such")


def test_the_hash_follows_the_weights(folder, copied, clip):
  weights = load_file(copied / "model.safetensors")
  weights["visual_projection.weight"][0, 0] += 1
  save_file(weights, copied / "model.safetensors")
  assert load_clip(copied).identity["hash"] != clip.identity["hash"]
  assert load_clip(folder).identity == clip.identity
