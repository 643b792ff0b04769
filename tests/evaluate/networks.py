"""Tiny networks with random weights, in the files that the published ones come in."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from pixsigma_jax import tree
from pixsigma_jax.evaluate.scorers import forget_shared
from pixsigma_jax.evaluate.scorers import inception as scorers
from pixsigma_jax.models import inception
from pixsigma_jax.models.inception import Conv, abstract_inception_params
from tests.convert.test_clip import content, network, write_tokenizer


def shrink_inception(setattr):
  """Leaves a first convolution and the last block of Inception: 2048 features still."""
  stem = (
    ("Conv2d_1a_3x3", Conv(4, (3, 3), 2, valid=True)),
    *((f"maxpool{i}", None) for i in range(4)),
  )
  setattr(inception, "STEM", stem)
  last = {"Mixed_7c": inception.BLOCKS["Mixed_7c"]}
  setattr(inception, "BLOCKS", last)
  setattr(scorers, "_PER_DEVICE", 1)
  forget_shared()


@pytest.fixture
def small_inception(monkeypatch):
  """The scorers' Inception is a tiny one."""
  shrink_inception(monkeypatch.setattr)


def write_inception(path, variant="fid", seed=0):
  """Weights under torch's names, of Inception as it is defined now."""
  random = np.random.default_rng(seed)
  weights = {"fc.bias": np.zeros(inception.CLASSES[variant], np.float32)}
  for name, leaf in tree.named_leaves(abstract_inception_params(variant)).items():
    module, _, kind = name.rpartition("/")
    module = module.replace("/", ".")
    if name == "fc_kernel":
      weights["fc.weight"] = random.normal(0, 0.02, leaf.shape[::-1])
    elif kind == "kernel":
      height, width, inputs, outputs = leaf.shape
      shape = (outputs, inputs, height, width)
      scale = (height * width * inputs) ** -0.5
      weights[f"{module}.conv.weight"] = random.normal(0, scale, shape)
      weights[f"{module}.bn.weight"] = np.ones(outputs)
      weights[f"{module}.bn.bias"] = random.normal(0.3, 0.1, outputs)
      weights[f"{module}.bn.running_mean"] = np.zeros(outputs)
      weights[f"{module}.bn.running_var"] = np.ones(outputs)
  save_file({name: x.astype(np.float32) for name, x in weights.items()}, path)
  return path


def write_clip(folder, **fields):
  """A CLIP of transformers with both towers and a tokenizer."""
  folder.mkdir()
  fields = content(**fields)
  weights = {name: x.numpy() for name, x in network(fields).state_dict().items()}
  save_file(weights, folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps(fields))
  write_tokenizer(folder)
  return folder
