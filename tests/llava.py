"""LLaVAs of transformers, small and random, in their own formats."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
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


def tokenizer(words=WORDS):
  ids = {word: i for i, word in enumerate(words)}
  words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
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


def write_llava(folder, *, chat_template=CHAT_TEMPLATE, following=False, words=WORDS):
  """A LLaVA, or a LLaVA-NeXT, whose images are more tokens the larger they are."""
  sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
  heads = {"num_attention_heads": 2}
  vision = CLIPVisionConfig(image_size=16, patch_size=8, **sizes, **heads)
  text = LlamaConfig(
    vocab_size=len(words),
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
    tokenizer=tokenizer(words),
    patch_size=8,
    vision_feature_select_strategy="default",
    num_additional_image_tokens=1,
    chat_template=chat_template,
  ).save_pretrained(folder)
  return str(folder)
