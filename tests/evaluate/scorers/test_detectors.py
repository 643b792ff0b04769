"""Colors of objects, and the rows of detections that GenEval's rules read."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pixsigma_jax import sharding
from pixsigma_jax.evaluate import geneval
from pixsigma_jax.evaluate.items import Item
from pixsigma_jax.evaluate.scorers.detectors import (
  ColorClassifier,
  DetectionScorer,
  crop,
)
from pixsigma_jax.evaluate.scorers.mask2former import Found, Mask2Former
from pixsigma_jax.models.clip import Clip, ClipConfig, TowerConfig

RGB = {
  "red": (230, 20, 30),
  "orange": (250, 140, 0),
  "yellow": (250, 240, 10),
  "green": (20, 160, 40),
  "blue": (20, 40, 220),
  "purple": (130, 20, 160),
  "pink": (250, 170, 200),
  "brown": (110, 60, 20),
  "black": (0, 0, 0),
  "white": (255, 255, 255),
}
GREY = np.full(3, 0x99)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ColorSight(Clip):
  """A CLIP that sees the mean color but for GenEval's grey, and reads color words."""

  asked: list = dataclasses.field(default_factory=list)

  def embed_images(self, images):
    means = []
    for image in images:
      pixels = np.asarray(image, np.float64).reshape(-1, 3)
      means.append(pixels[(pixels != GREY).any(axis=1)].mean(axis=0) - GREY)
    return np.stack(means).astype(np.float32)

  def embed_texts(self, texts, *, truncate="end"):
    self.asked.extend(texts)
    words = [text.replace("-", " ").split() for text in texts]
    return np.array(
      [np.subtract(RGB[(set(RGB) & set(w)).pop()], GREY) for w in words], np.float32
    )


@pytest.fixture
def clip():
  tower = TowerConfig(width=8, num_layers=1, num_heads=1, hidden=8)
  return ColorSight(
    config=ClipConfig(
      image=tower,
      text=tower,
      projection=3,
      image_size=8,
      patch_size=4,
      vocabulary=9,
      max_length=9,
    ),
    params={},
    tokenizer=None,
    identity={"clip": "color sight", "hash": "0"},
    dtype=jnp.float32,
    mesh=sharding.single_device_mesh(),
  )


def found(name, box, confidence=0.9, shape=(40, 60)):
  mask = np.zeros(shape, bool)
  left, top, right, bottom = box
  mask[top:bottom, left:right] = True
  return Found(name, box, confidence, mask)


def test_a_crop_is_the_box_with_what_is_not_the_object_in_grey():
  image = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
  cat = found("cat", (10, 5, 30, 25))
  cat.mask[5:15, 10:20] = False
  pixels = np.asarray(crop(image, cat))
  assert pixels.shape == (20, 20, 3)
  assert (pixels[:10, :10] == 0x99).all()
  np.testing.assert_array_equal(pixels[10:], image[15:25, 10:30])


@pytest.mark.parametrize("color", RGB)
def test_every_color_is_told_by_the_object_alone(clip, color):
  image = np.zeros((40, 60, 3), np.uint8)
  image[:] = RGB["blue" if color != "blue" else "red"]  # all around
  image[10:20, 10:20] = RGB[color]
  classify = ColorClassifier(clip)
  assert classify(image, [found("cup", (10, 10, 20, 20))]) == [color]


def test_the_texts_are_the_published_ones_and_asked_once_a_class(clip):
  image, cup = np.zeros((40, 60, 3), np.uint8), found("cup", (10, 10, 20, 20))
  classify = ColorClassifier(clip)
  classify(image, [cup, cup])
  classify(image, [cup])
  assert len(clip.asked) == 30
  assert clip.asked[:4] == [
    "a photo of a red cup",
    "a photo of a red-colored cup",
    "a photo of a red object",
    "a photo of a orange cup",  # as published, without an article's grammar
  ]
  assert classify(image, []) == []


def test_a_class_is_the_mean_of_its_unit_texts(clip):
  """A long text vector weighs no more than a short one of another template."""

  def embed(texts):
    vectors = np.zeros((len(texts), 3), np.float32)
    vectors[:, 2] = -1
    vectors[0] = (0, 100, 0)  # "a photo of a red cup"
    vectors[1:3] = (1, 0, 0)
    return vectors

  object.__setattr__(clip, "embed_texts", embed)
  red = ColorClassifier(clip)._text_directions("cup")[0]
  np.testing.assert_allclose(red, np.array([2, 1, 0]) / np.sqrt(5), rtol=1e-6)


class Eyes(Mask2Former):
  """A detector that finds what it is told to."""

  def __init__(self, objects):
    self.objects = objects

  def detect(self, image):
    return self.objects

  def identity(self):
    return {"detector": "eyes"}


def item(*include):
  return Item("00000", "a prompt", data={"tag": "colors", "include": list(include)})


def test_rows_are_what_the_rules_read(clip):
  image = np.full((40, 60, 3), RGB["white"], np.uint8)
  image[10:20, 10:20] = RGB["red"]
  image[10:20, 30:40] = RGB["green"]
  objects = [
    found("cup", (10, 10, 20, 20), 0.9),
    found("cat", (30, 10, 40, 20), 0.8),
    found("cup", (30, 10, 40, 20), 0.7),
  ]
  scorer = DetectionScorer(Eyes(objects), ColorClassifier(clip))
  wanted = item(
    {"class": "cup", "count": 2, "color": "red"}, {"class": "cat", "count": 1}
  )
  [rows] = scorer([image], [wanted])["detections"]
  assert [(r["name"], r["color"]) for r in rows] == [
    ("cup", "red"),
    ("cat", None),  # no prompt asks for its color
    ("cup", "green"),
  ]
  assert rows[0]["box"] == [10, 10, 20, 20]
  verdict = geneval.score(rows, wanted.data)
  assert verdict == (False, "expected red cup>=2, found 1 red, 1 green")
  one = item({"class": "cup", "count": 1, "color": "red"})
  assert geneval.score(rows, one.data).correct


def test_of_a_class_the_sixteen_surest_are_kept(clip):
  cups = [found("cup", (i, 0, i + 5, 5), 0.9 - i / 100) for i in range(20)]
  objects = [*cups, found("cat", (0, 0, 5, 5), 0.4)]
  scorer = DetectionScorer(Eyes(objects), ColorClassifier(clip))
  wanted = item({"class": "cup", "count": 1})
  [rows] = scorer([np.zeros((40, 60, 3), np.uint8)], [wanted])["detections"]
  assert [row["name"] for row in rows] == ["cup"] * 16 + ["cat"]
