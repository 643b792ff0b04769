"""Captions by models of transformers, small and random, in their own formats."""

import pytest
import safetensors.torch
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
  CLIPTextConfig,
  CLIPVisionConfig,
  LlamaConfig,
  LlavaConfig,
  LlavaForConditionalGeneration,
  LlavaNextConfig,
  LlavaNextForConditionalGeneration,
  LlavaNextProcessor,
  LlavaProcessor,
  PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
  LlavaNextImageProcessorPil,
)

from pixsigma_jax.curate.captioner import caption_images

WORDS = [
  *("<pad>", "<s>", "</s>", "<unk>", "<image>", "USER", "ASSISTANT", ":", "describe"),
  *("a", "red", "cat", "dog", "on", "snow", "the", "sky", "blue", "tree", "in", "and"),
]
CHAT_TEMPLATE = (
  "{% for m in messages %}USER: {% for c in m['content'] %}"
  "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}"
  "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
SIZE = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
PINPOINTS = [[16, 32], [32, 16], [32, 32]]
PLAIN = [Image.new("RGB", (20, 30), color) for color in ("red", "blue", "white")]
SIDES = [(16, 16), (40, 16), (16, 64)]  # of as many tokens, in LLaVA-NeXT, as there are
NOISE = [Image.effect_noise(size, 90).convert("RGB") for size in SIDES]


def tokenizer():
  words = Tokenizer(
    models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
  )
  words.pre_tokenizer = pre_tokenizers.Whitespace()
  return PreTrainedTokenizerFast(
    tokenizer_object=words,
    bos_token="<s>",
    eos_token="</s>",
    pad_token="<pad>",
    unk_token="<unk>",
    additional_special_tokens=["<image>"],
    padding_side="right",  # as ShareGPT4V's and other published tokenizers have it
  )


def write_llava(folder, *, chat_template=CHAT_TEMPLATE, following=False):
  """A LLaVA, or a LLaVA-NeXT, whose images are more tokens the larger they are."""
  sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
  heads = {"num_attention_heads": 2}
  vision = CLIPVisionConfig(image_size=16, patch_size=8, **sizes, **heads)
  text = LlamaConfig(
    vocab_size=len(WORDS),
    num_key_value_heads=2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    **sizes,
    **heads,
  )
  config = {
    "vision_config": vision,
    "text_config": text,
    "image_token_id": WORDS.index("<image>"),
  }
  if following:
    network = LlavaNextForConditionalGeneration(
      LlavaNextConfig(image_grid_pinpoints=PINPOINTS, **config)
    )
    images = LlavaNextImageProcessorPil(image_grid_pinpoints=PINPOINTS, **SIZE)
    make_processor = LlavaNextProcessor
  else:
    network = LlavaForConditionalGeneration(LlavaConfig(**config))
    images = LlavaImageProcessorPil(**SIZE)
    make_processor = LlavaProcessor
  generator = torch.Generator().manual_seed(3)
  with torch.no_grad():  # large enough that what is seen decides what is said
    for name, weight in network.named_parameters():
      if "norm" not in name:
        weight.copy_(0.6 * torch.randn(weight.shape, generator=generator))
  # As LLaVA 1.5 and others are published.
  network.generation_config.do_sample, network.generation_config.temperature = True, 9.0
  network.save_pretrained(folder)
  make_processor(
    image_processor=images,
    tokenizer=tokenizer(),
    patch_size=8,
    vision_feature_select_strategy="default",
    num_additional_image_tokens=1,
    chat_template=chat_template,
  ).save_pretrained(folder)
  return str(folder)


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
  with pytest.raises(ValueError, match="cannot be used as a model that captions"):
    captions(PLAIN, str(tmp_path))


def test_a_model_that_is_not_there_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="nowhere is neither a folder"):
    captions(PLAIN, str(tmp_path / "nowhere"))
