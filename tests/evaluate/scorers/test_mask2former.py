"""Mask2Former as GenEval runs it: sizes, confidences, boxes, and what is refused."""

import json
import shutil
import types

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pixsigma_jax.evaluate.geneval import CLASSES
from pixsigma_jax.evaluate.scorers import mask2former
from pixsigma_jax.evaluate.scorers.mask2former import Mask2Former

torch = pytest.importorskip("torch")

QUERIES = 6


def write_mask2former(folder, **fields):
  """A tiny Mask2Former with random weights, sure of some classes, as on the hub."""
  from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
  )

  backbone = SwinConfig(
    image_size=32,
    embed_dim=8,
    depths=[1, 1, 1, 1],
    num_heads=[1, 1, 1, 1],
    window_size=4,
    out_features=["stage1", "stage2", "stage3", "stage4"],
  )
  config = Mask2FormerConfig(
    backbone_config=backbone,
    id2label=dict(enumerate(CLASSES)),
    feature_size=32,
    mask_feature_size=32,
    hidden_dim=32,
    encoder_feedforward_dim=16,
    dim_feedforward=16,
    num_attention_heads=2,
    encoder_layers=1,
    decoder_layers=2,
    num_queries=QUERIES,
  )
  torch.manual_seed(0)
  network = Mask2FormerForUniversalSegmentation(config).eval()
  with torch.no_grad():
    network.class_predictor.weight.normal_(0, 2)
  network.save_pretrained(folder)
  if fields:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
  return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write_mask2former(tmp_path_factory.mktemp("mask2former"))


@pytest.fixture(scope="module")
def detector(folder):
  return Mask2Former(folder)


@pytest.fixture
def small(monkeypatch):
  """Smaller images for the network, for speed."""
  monkeypatch.setattr(mask2former, "_SHORT", 96)
  monkeypatch.setattr(mask2former, "_LONG", 160)


def seen_by(detector, monkeypatch, logits, masks):
  """Lets the detector's network answer this; returns what it is shown."""
  seen = []

  class Answer(torch.nn.Module):
    device = torch.device("cpu")

    def forward(self, pixel_values):
      seen.append(pixel_values.numpy())
      return types.SimpleNamespace(
        class_queries_logits=logits[None], masks_queries_logits=masks[None]
      )

  monkeypatch.setattr(detector, "_network", Answer())
  return seen


@pytest.mark.parametrize(
  ("size", "inside", "padded"),
  [
    ((1024, 1024), (800, 800), (800, 800)),
    ((480, 640), (800, 1067), (800, 1088)),  # COCO's usual size, as mmdetection has it
    ((300, 900), (444, 1333), (448, 1344)),  # the longer side decides
  ],
)
def test_images_have_the_published_sizes(detector, monkeypatch, size, inside, padded):
  nothing = torch.zeros((1, 81)), torch.zeros((1, 4, 4))
  [logits, masks] = nothing
  seen = seen_by(detector, monkeypatch, logits, masks)
  image = np.full((*size, 3), (255, 0, 128), np.uint8)
  detector.detect(image)
  [shown] = seen
  assert shown.shape == (1, 3, *padded)
  # ImageNet's mean and deviation of the colors; nothing beyond the image.
  colors = (np.array([255, 0, 128]) - (123.675, 116.28, 103.53)) / (
    58.395,
    57.12,
    57.375,
  )
  np.testing.assert_allclose(
    shown[0, :, : inside[0], : inside[1]],
    np.broadcast_to(colors[:, None, None], (3, *inside)),
    rtol=1e-5,
  )
  assert not shown[..., inside[0] :, :].any()
  assert not shown[..., inside[1] :].any()


def test_confidence_is_of_class_times_mask_and_boxes_end_outside(detector, monkeypatch):
  """Hand-made logits for an image of which nothing is resized."""
  monkeypatch.setattr(mask2former, "_SHORT", 64)
  monkeypatch.setattr(mask2former, "_LONG", 64)
  masks = torch.full((4, 64, 64), -4.0)
  masks[0, 10:20, 5:40] = 2.0  # sigmoid .8808
  masks[1, 30:32, 30:31] = 0.5  # sigmoid .6225
  masks[2, 0:8, 0:8] = 5.0
  probabilities = torch.full((4, 81), 1e-6)
  probabilities[0, CLASSES.index("cat")] = 0.9
  probabilities[1, CLASSES.index("dog")] = 0.45  # times .6225: not sure enough
  probabilities[2, CLASSES.index("bus")] = 0.29  # nor is this
  probabilities[2, CLASSES.index("tv remote")] = 0.5
  probabilities[3, CLASSES.index("car")] = 0.99  # of nothing: its mask is empty
  probabilities[:, 80] = 1 - probabilities[:, :80].sum(dim=1)
  seen_by(detector, monkeypatch, probabilities.log(), masks)

  cat, remote = detector.detect(np.zeros((64, 64, 3), np.uint8))
  assert (cat.name, cat.box) == ("cat", (5, 10, 40, 20))
  assert cat.confidence == pytest.approx(0.9 * 0.8807971, rel=1e-5)
  assert cat.mask.sum() == 350
  assert (remote.name, remote.box) == ("tv remote", (0, 0, 8, 8))
  assert remote.confidence == pytest.approx(0.5 * 0.9933071, rel=1e-5)


def test_a_network_is_run_as_mmdetection_runs_it(detector, small):
  """All pairs of queries and classes, whole, where ours looks at the sure ones."""
  image = np.random.default_rng(0).integers(0, 256, (70, 101, 3)).astype(np.uint8)
  found = detector.detect(image)
  assert len(found) >= 2

  outputs = []
  hook = detector._network.register_forward_hook(
    lambda _m, _a, kwargs, out: outputs.append((kwargs, out)), with_kwargs=True
  )
  detector.detect(image)
  hook.remove()
  [(kwargs, output)] = outputs
  scores = output.class_queries_logits[0].softmax(-1)[:, :-1]
  up = torch.nn.functional.interpolate
  masks = up(
    output.masks_queries_logits, kwargs["pixel_values"].shape[2:], mode="bilinear"
  )
  masks = up(masks[..., :96, :139], (70, 101), mode="bilinear")[0]
  means = (masks.sigmoid() * (masks > 0)).sum((1, 2)) / ((masks > 0).sum((1, 2)) + 1e-6)
  confidences = (scores * means[:, None]).flatten()
  order = confidences.argsort(descending=True)
  expected = [
    (CLASSES[i % 80], float(confidences[i])) for i in order if confidences[i] > 0.3
  ]
  assert [each.name for each in found] == [name for name, _ in expected]
  np.testing.assert_allclose(
    [each.confidence for each in found], [c for _, c in expected], rtol=1e-4
  )
  assert all(each.mask.shape == (70, 101) for each in found)


def test_the_names_are_those_that_prompts_use():
  assert len(set(CLASSES)) == 80
  # Of GenEval's 80 names these are not COCO's own.
  assert {CLASSES[64], CLASSES[65], CLASSES[66]} == {
    *("computer mouse", "tv remote", "computer keyboard")
  }


def test_another_network_is_refused(tmp_path, folder):
  other = shutil.copytree(folder, tmp_path / "other")
  content = json.loads((folder / "config.json").read_text())
  path = other / "config.json"

  path.write_text(json.dumps(content | {"model_type": "detr"}))
  with pytest.raises(ValueError, match=r"is a 'detr', and .* Mask2Former: take face"):
    Mask2Former(other)

  labels = {str(i): f"LABEL_{i}" for i in range(80)}
  path.write_text(json.dumps(content | {"id2label": labels}))
  with pytest.raises(
    ValueError, match=r"tells 80 classes apart \(LABEL_0, .*COCO's 80"
  ):
    Mask2Former(other)

  swapped = dict(content["id2label"]) | {"15": "dog", "16": "cat"}
  path.write_text(json.dumps(content | {"id2label": swapped}))
  with pytest.raises(ValueError, match=r"where dog, cat stand elsewhere: take an inst"):
    Mask2Former(other)


def test_names_as_the_hub_has_them_are_fine(tmp_path, folder):
  other = shutil.copytree(folder, tmp_path / "other")
  path = other / "config.json"
  content = json.loads(path.read_text())
  content["id2label"] |= {"3": "motorbike", "57": "sofa", "62": "tvmonitor"}
  content["label2id"] = {name: int(i) for i, name in content["id2label"].items()}
  path.write_text(json.dumps(content))
  Mask2Former(other)


def test_says_what_is_missing(tmp_path, folder):
  with pytest.raises(FileNotFoundError, match=r"no/such is neither .*--detections=FIL"):
    Mask2Former("no/such")
  other = shutil.copytree(folder, tmp_path / "other")
  weights = load_file(other / "model.safetensors")
  save_file(
    {name: x for name, x in weights.items() if name != "class_predictor.weight"},
    other / "model.safetensors",
    metadata={"format": "pt"},
  )
  with pytest.raises(ValueError, match=r"lack class_predictor\.weight: fetch them"):
    Mask2Former(other)
  (other / "model.safetensors").write_bytes(b"nothing")
  with pytest.raises(ValueError, match=r"Could not load Mask2Former of "):
    Mask2Former(other)
  (other / "model.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match=r"has no weights: no \*\.safetensors"):
    Mask2Former(other)


def test_its_identity_follows_the_weights(tmp_path, folder, detector):
  other = shutil.copytree(folder, tmp_path / "other")
  weights = load_file(other / "model.safetensors")
  weights["class_predictor.bias"][0] += 1
  save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
  mine, changed = detector.identity(), Mask2Former(other).identity()
  assert mine["detector hash"] != changed["detector hash"]
  assert mine["detector resize"] == changed["detector resize"]
