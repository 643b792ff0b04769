"""The page docs/from_diffusers.md: both columns run, and draw the same sizes."""

import functools
import re

import numpy as np
import peft
import pytest
import torch
from diffusers import (
  DPMSolverMultistepScheduler,
  PixArtSigmaPAGPipeline,
  PixArtSigmaPipeline,
)
from PIL import Image
from transformers import AutoTokenizer, T5EncoderModel

from pixsigma_jax.convert import files, from_diffusers, to_pixart
from pixsigma_jax.models.layers import Compute
from pixsigma_jax.sample import Pipeline, program
from tests.convert.published import write_t5, write_tokenizer
from tests.convert.published_vae import make_vae
from tests.convert.test_main import diffusers_transformer
from tests.test_own_images import ROOT

# The page's full size in small, for a CPU: 256 pixels, two layers, two steps.
SMALLER = {
  "torch.float16": "torch.float32",
  '.to("cuda")': "",
  "num_inference_steps=20": "num_inference_steps=2",
  "num_inference_steps=30": "num_inference_steps=2",
  'release="sigma-1024"': "num_heads=4, scaling_factor=0.13025",
  "832": "224",
  "1216": "288",
  "128, 128": "32, 32",
  "blocks.14": "blocks.1",
  "[14]": "[1]",
}


def sections():
  """Title → the snippet of diffusers, and ours."""
  text = (ROOT / "docs" / "from_diffusers.md").read_text()
  found = {}
  for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
    title = section.partition("\n")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    if blocks:
      found[title] = blocks
  return found


def few_steps(call):
  """A pipeline's call whose default are two steps, not twenty."""
  return functools.wraps(call)(
    lambda self, *prompt, **settings: call(
      self, *prompt, **{"num_inference_steps": 2, **settings}
    )
  )


def sizes_of(names):
  """Name of each image, or list of images → their sizes."""
  listed = {k: v if isinstance(v, list) else [v] for k, v in names.items()}
  return {
    name: [image.size for image in images]
    for name, images in listed.items()
    if images and all(isinstance(image, Image.Image) for image in images)
  }


def write_lora(transformer, folder, targets):
  settings = peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets)
  model = peft.get_peft_model(transformer, settings)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if "lora_" in name:
        parameter.copy_(0.1 * torch.randn_like(parameter))
  model.save_pretrained(folder)
  model.unload()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
  """A pipeline that diffusers saved, an official file of it, and two LoRAs."""
  root = tmp_path_factory.mktemp("from_diffusers")
  transformer = diffusers_transformer(sample_size=32, interpolation_scale=0.5)
  write_t5(root / "t5")
  write_tokenizer(root / "tokenizer")
  PixArtSigmaPipeline(
    tokenizer=AutoTokenizer.from_pretrained(root / "tokenizer"),
    text_encoder=T5EncoderModel.from_pretrained(root / "t5"),
    vae=make_vae(),
    transformer=transformer,
    scheduler=DPMSolverMultistepScheduler(
      beta_start=1e-4, beta_end=0.02, beta_schedule="linear"
    ),
  ).save_pretrained(root / "pipeline")
  folder = root / "pipeline" / "transformer"
  config, params = from_diffusers(
    files.open_weights(folder),
    caption_length=300,
    config_json=files.read_json(folder / "config.json"),
  )
  # Of the empty prompt, as the published file has it.
  tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer")
  empty = tokenizer("", padding="max_length", max_length=300, return_tensors="pt")
  with torch.no_grad():
    encoded = T5EncoderModel.from_pretrained(root / "t5")(**empty).last_hidden_state
  null_caption = encoded[0].numpy()
  weights = root / "weights" / "PixArt-Sigma-XL-2-1024-MS.pth"
  files.write_pickle(weights, to_pixart(config, params, null_caption), None)
  write_lora(transformer, root / "loras" / "style", ["to_q", "to_v"])
  write_lora(transformer, root / "loras" / "subject", ["to_k", "ff.net.2"])
  return root


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_both_columns_of_the_page_run_and_draw_images_of_one_size(
  published, monkeypatch
):
  monkeypatch.chdir(published)
  monkeypatch.setenv("PIXSIGMA_JAX_CACHE", str(published / "cache"))
  monkeypatch.setattr(program, "compute_here", lambda: Compute(dtype="float32"))
  for kind in (PixArtSigmaPipeline, PixArtSigmaPAGPipeline, Pipeline):
    monkeypatch.setattr(kind, "__call__", few_steps(kind.__call__))
  found = sections()
  assert len(found) == 10
  theirs, ours = {}, {}
  for title, (first, second) in found.items():
    for code, names in ((first, theirs), (second, ours)):
      code = re.sub(r'"PixArt-alpha/[^"]*"', repr(str(published / "pipeline")), code)
      for large, small in SMALLER.items():
        code = code.replace(large, small)
      exec(compile(code, f"docs/from_diffusers.md: {title}", "exec"), names)
    drawn = [sizes_of(names) for names in (theirs, ours)]
    assert drawn[0] == drawn[1], title
  assert len(drawn[0]) == 10
  one, other = (np.asarray(names["given"], int) for names in (theirs, ours))
  assert (np.abs(one - other) <= 1).mean() >= 0.999
  assert one.std() > 1
  # Captions that were encoded by themselves round differently, no more.
  known, again = (
    np.asarray(ours[name]("a red fox in the snow").images[0], int)
    for name in ("without_t5", "pipeline")
  )
  assert np.abs(known - again).max() <= 1
  assert ours["wide"].size == (288, 224)
  assert [len(names["images"]) for names in (theirs, ours)] == [2, 2]
