"""Captions by models of transformers, small and random, in their own formats."""

import pytest
import safetensors.torch
from PIL import Image
from transformers import CLIPTextConfig

from pixsigma_jax.curate.captioner import caption_images
from tests.llava import tokenizer, write_llava

PLAIN = [Image.new("RGB", (20, 30), color) for color in ("red", "blue", "white")]
SIDES = [(16, 16), (40, 16), (16, 64)]  # of as many tokens, in LLaVA-NeXT, as there are
NOISE = [Image.effect_noise(size, 90).convert("RGB") for size in SIDES]


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
  return write_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def llava_next(tmp_path_factory):
  return write_llava(tmp_path_factory.mktemp("next"), following=True)


def captions(images, model, instruction="describe", max_new_tokens=6):
  return caption_images(
    images, model=model, instruction=instruction, max_new_tokens=max_new_tokens
  )


def test_captions_follow_the_image_and_the_instruction(llava):
  first = captions(PLAIN, llava)
  assert len(set(first)) == len(PLAIN)
  assert captions(PLAIN, llava, instruction="the tree in snow") != first
  assert captions(PLAIN[::-1], llava) == first[::-1]


def test_a_caption_is_only_the_answer_in_words(llava):
  for caption in captions(PLAIN, llava, max_new_tokens=5):
    assert caption
    assert not {"USER", "<image>", "<s>", "</s>", "<pad>"} & set(caption.split())
    assert len(caption.split()) <= 5


def test_captions_are_the_best_of_three_beams_as_transformers_finds_them(llava):
  from transformers import AutoModelForImageTextToText, AutoProcessor

  processor = AutoProcessor.from_pretrained(llava)
  network = AutoModelForImageTextToText.from_pretrained(llava)
  prompt = "USER: <image> describe ASSISTANT:"
  for image in PLAIN:
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    found = network.generate(
      **inputs,
      num_beams=3,
      repetition_penalty=1.5,
      do_sample=False,
      max_new_tokens=6,
    )
    new = found[0, inputs["input_ids"].shape[1] :]
    expected = processor.decode(new, skip_special_tokens=True)
    assert captions([image], llava) == [expected]


def test_a_model_that_would_sample_does_not(llava_next):
  assert captions(NOISE, llava_next) == captions(NOISE, llava_next)


def test_a_caption_does_not_depend_on_what_is_captioned_with_it(llava_next):
  """Though questions with larger images are longer, and the others are padded."""
  together = captions(NOISE, llava_next)
  assert together == [captions([image], llava_next)[0] for image in NOISE]
  assert len(set(together)) > 1


def test_no_images_have_no_captions(tmp_path):
  assert captions([], str(tmp_path)) == []


def test_a_model_without_a_chat_template_is_refused(tmp_path):
  model = write_llava(tmp_path, chat_template=None)
  with pytest.raises(ValueError, match=r"needs a chat template \(chat_template\.jinja"):
    captions(PLAIN, model)


def test_weights_that_are_not_there_are_never_made_up(tmp_path):
  model = write_llava(tmp_path)
  path = tmp_path / "model.safetensors"
  weights = safetensors.torch.load_file(path)
  name = next(name for name in weights if name.endswith("mlp.up_proj.weight"))
  del weights[name]
  safetensors.torch.save_file(weights, path, {"format": "pt"})
  with pytest.raises(ValueError, match=r"weights lack .*mlp\.up_proj\.weight"):
    captions(PLAIN, model)


def test_a_model_that_does_not_write_is_refused(tmp_path):
  CLIPTextConfig().save_pretrained(tmp_path)
  tokenizer().save_pretrained(tmp_path)
  with pytest.raises(ValueError, match="cannot be used as a model that writes about"):
    captions(PLAIN, str(tmp_path))


def test_a_model_that_is_not_there_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="nowhere is neither a folder"):
    captions(PLAIN, str(tmp_path / "nowhere"))
