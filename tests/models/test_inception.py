"""Inception-v3 beside the original classes, on weights drawn from a seed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from pixsigma_jax import tree
from pixsigma_jax.convert.inception import inception_from_weights, load_inception
from pixsigma_jax.models.inception import (
  Inception,
  abstract_inception_params,
  normalized,
  resize_clean,
  resize_tensorflow,
  resize_textatlas,
)
from tests.golden.make_inception import draw, images
from tests.models.reference import GOLDEN

VARIANTS = ["fid", "torchvision"]


@pytest.fixture(autouse=True)
def strict_dtypes():
  """Not here: the network multiplies by integers of pixels."""


@pytest.fixture(scope="module")
def golden():
  with np.load(GOLDEN / "inception.npz") as arrays:
    return dict(arrays)


@functools.cache
def state_dict(variant):
  """What torch's file would hold, under torch's names."""
  weights = {"fc.bias": draw("fc.bias", (3,))}
  for name, leaf in tree.named_leaves(abstract_inception_params(variant)).items():
    module, _, leaf_name = name.rpartition("/")
    module = module.replace("/", ".")
    if name == "fc_kernel":
      weights["fc.weight"] = draw("fc.weight", leaf.shape[::-1])
    elif leaf_name == "kernel":
      height, width, inputs, outputs = leaf.shape
      theirs = f"{module}.conv.weight"
      weights[theirs] = draw(theirs, (outputs, inputs, height, width))
      for part in ("weight", "bias", "running_mean", "running_var"):
        theirs = f"{module}.bn.{part}"
        weights[theirs] = draw(theirs, (outputs,))
      weights[f"{module}.bn.num_batches_tracked"] = np.zeros((), np.int64)
  return weights


RESIZES = {
  "fid": resize_tensorflow,
  "torchvision": lambda image: resize_textatlas(Image.fromarray(image)),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_are_those_of_the_original_class(golden, variant):
  params = inception_from_weights(state_dict(variant), variant)
  pixels = np.stack([RESIZES[variant](image) for image in images()])
  features, logits = jax.jit(Inception(variant).apply)(
    {"params": params}, normalized(jnp.asarray(pixels), variant)
  )
  scale = np.abs(golden[f"{variant}_features"]).max()
  # 94 convolutions in float32, added up in another order.
  np.testing.assert_allclose(
    features, golden[f"{variant}_features"], atol=1e-5 * scale, rtol=0
  )
  if variant == "fid":
    theirs = golden["fid_logits"]
    np.testing.assert_allclose(logits, theirs, atol=1e-5 * np.abs(theirs).max(), rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_pixels_are_those_of_the_original(golden, variant):
  ours = np.stack([RESIZES[variant](image)[::23, ::23] for image in images()])
  np.testing.assert_allclose(ours, golden[f"{variant}_pixels"], atol=1e-3, rtol=0)


def test_clean_resize_is_pillows_on_each_channel_and_stays_within_range():
  [image, _] = images()
  ours = resize_clean(image)
  assert ours.shape == (299, 299, 3)
  assert ours.min() >= 0
  assert ours.max() <= 255
  whole = Image.fromarray(image).resize((299, 299), Image.Resampling.BICUBIC)
  # In eight bits Pillow rounds and cuts after each of its two passes.
  assert np.mean(np.abs(ours - np.asarray(whole, np.float32)) <= 1) > 0.999


def bicubic(inputs, outputs=299):
  """Weights [outputs inputs] of Pillow's bicubic filter, a = -1/2, with smoothing."""
  scale = inputs / outputs
  stretch = max(scale, 1)
  centres = (np.arange(outputs) + 0.5) * scale
  x = np.abs(np.arange(inputs) + 0.5 - centres[:, None]) / stretch
  near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
  weights = np.where(x < 1, near, np.where(x < 2, far, 0))
  return weights / weights.sum(axis=1, keepdims=True)


def test_clean_resize_rounds_nothing():
  for image in images():
    height, width = image.shape[:2]
    expected = np.einsum(
      "yh,xw,hwc->yxc", bicubic(height), bicubic(width), image, optimize=True
    )
    np.testing.assert_allclose(resize_clean(image), expected.clip(0, 255), atol=1e-2)


def test_an_image_of_the_networks_size_is_not_resized():
  image = np.random.default_rng(0).integers(0, 256, (299, 299, 3), dtype=np.uint8)
  assert (resize_tensorflow(image) == image).all()
  assert (resize_clean(image) == image).all()
  assert (resize_textatlas(Image.fromarray(image)) == image).all()


def test_it_has_the_published_number_of_parameters():
  # torchvision's 27,161,264 without its auxiliary head of 3,326,696; but a batch norm
  # has two parameters here as there, and the classes' bias is not read.
  assert (
    tree.size(abstract_inception_params("torchvision")) == 27161264 - 3326696 - 1000
  )


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda w: w.pop("Mixed_6b.branch1x1.bn.running_var"), "running_var is missing"),
    (lambda w: w.update(extra=np.zeros(1)), "extra is not used"),
    (lambda w: w.update({"fc.weight": np.zeros((1000, 2048))}), "1000 classes apart"),
    (
      lambda w: w.update({"Conv2d_1a_3x3.conv.weight": np.zeros((32, 1, 3, 3))}),
      r"becomes \[3, 3, 1, 32\]",
    ),
  ],
)
def test_other_weights_are_refused(change, message):
  weights = dict(state_dict("fid"))
  change(weights)
  with pytest.raises(ValueError, match=message):
    inception_from_weights(weights, "fid")


def test_a_file_that_is_not_there_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="no such file"):
    load_inception(tmp_path / "pt_inception.pth", "fid")
