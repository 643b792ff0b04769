"""Published files in small: T5 and its tokenizer as transformers saves them.

Weights are random, and large where a fault must show: norms are not all one, biases of
positions are as large as scores.
"""

import io
import json
import random
import string

import sentencepiece
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import T5Config, T5EncoderModel

VOCABULARY = 192

_WORDS = [
  *("a", "the", "and", "of", "in", "on", "with", "left", "right", "above", "below"),
  *("red", "green", "blue", "yellow", "black", "white", "small", "large"),
  *("photo", "picture", "cat", "dog", "fox", "bird", "house", "tree", "car", "snow"),
  *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
]


def write_t5(folder, *, width=32, shards=1):
  """A T5 v1.1 encoder of two layers and 8 heads in `folder`.

  Returns:
    the same model, transformers' own, in float32 and ready to run.
  """
  config = T5Config(
    vocab_size=VOCABULARY,
    d_model=width,
    d_kv=6,  # 8 · 6 is not the width, as in the small and base sizes
    d_ff=2 * width,
    num_layers=2,
    num_heads=8,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
  )
  model = T5EncoderModel(config).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, value in model.named_parameters():
      noise = torch.randn(value.shape, generator=generator)
      if "layer_norm" in name:
        value.copy_(1 + 0.2 * noise)
      elif value is model.shared.weight or "relative" in name:
        value.copy_(noise)
      else:
        value.copy_(noise * value.shape[1] ** -0.5)
  folder.mkdir(parents=True, exist_ok=True)
  if shards == 1:
    model.save_pretrained(folder)
    return model
  model.config.architectures = ["T5EncoderModel"]
  model.config.save_pretrained(folder)
  tensors = dict(model.named_parameters())  # a tied tensor once
  names = list(tensors)
  weight_map = {}
  for shard in range(shards):
    file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
    part = {name: tensors[name].detach() for name in names[shard::shards]}
    save_file(part, folder / file, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(part, file)
  size = sum(4 * value.numel() for value in tensors.values())
  index = {"metadata": {"total_size": size}, "weight_map": weight_map}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  return model


def write_tokenizer(folder):
  """A tokenizer in `folder`: whole words of a few, and every character of ASCII.

  pad, end and unknown are 0, 1 and 2, as T5's are, and no id reaches `VOCABULARY`.
  """
  pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
  pieces += [(f"▁{word}", -4.0) for word in _WORDS]
  symbols = string.ascii_letters + string.digits + string.punctuation
  pieces += [(character, -8.0) for character in symbols]
  tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
  )
  tokenizer.post_processor = processors.TemplateProcessing(
    single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
  )
  folder.mkdir(parents=True, exist_ok=True)
  tokenizer.save(str(folder / "tokenizer.json"))
  settings = {
    "tokenizer_class": "T5Tokenizer",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "extra_ids": 0,
    "model_max_length": 512,
  }
  (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_spiece(folder, *, extra_ids=4, settings=True, **training):
  """A vocabulary in `folder` as T5's is published: spiece.model and its settings.

  Trained by sentencepiece, whose own processor of it is returned.
  """
  chosen = random.Random(0)
  symbols = string.ascii_letters + string.digits + string.punctuation
  lines = [" ".join(chosen.choices(_WORDS, k=8)) for _ in range(500)] + list(symbols)
  written = io.BytesIO()
  options = {
    "vocab_size": 150,
    "pad_id": 0,
    "eos_id": 1,
    "unk_id": 2,
    "bos_id": -1,
    "minloglevel": 2,
    "character_coverage": 1.0,
  }
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines), model_writer=written, **(options | training)
  )
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "spiece.model").write_bytes(written.getvalue())
  if settings:
    sentinels = [f"<extra_id_{i}>" for i in range(extra_ids)]
    fields = {
      "tokenizer_class": "T5Tokenizer",
      "pad_token": "<pad>",
      "eos_token": "</s>",
      "unk_token": "<unk>",
      "extra_ids": extra_ids,
      "additional_special_tokens": sentinels,
      "legacy": True,
      "sp_model_kwargs": {},
      "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
  return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
