"""What an image becomes in its bucket: geometry of every table, pixels of a few."""

import json

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from pixsigma_jax.data.buckets import BUCKETS, Bucket
from pixsigma_jax.data.crops import CropRule, filter_at

SIDES = st.integers(1, 20000)
RESOLUTIONS = st.sampled_from(list(BUCKETS))


def rule_of(resolution):
  return CropRule(BUCKETS[resolution], filter_at(resolution))


def noise(height, width, seed=0):
  pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
  return Image.fromarray(pixels)


def reference_crop(image, size, filter_):
  """InternalData_ms.py without features, written out with torchvision's formulas."""
  h, w = image.height, image.width
  closest_h, closest_w = size
  if closest_h / h > closest_w / w:
    resize_size = closest_h, int(w * closest_h / h)
  else:
    resize_size = int(h * closest_w / w), closest_w
  resized = image.resize((resize_size[1], resize_size[0]), filter_)
  top = round((resize_size[0] - closest_h) / 2.0)
  left = round((resize_size[1] - closest_w) / 2.0)
  return resized.crop((left, top, left + closest_w, top + closest_h))


@given(RESOLUTIONS, SIDES, SIDES)
@example(512, 1, 20000)
@example(512, 20000, 1)
@example(4096, 4096, 4096)
def test_the_scaled_image_covers_its_bucket_and_touches_it(resolution, height, width):
  crop = rule_of(resolution).plan(height, width)
  assert crop.bucket in BUCKETS[resolution].values()
  assert crop.scaled_height >= crop.bucket.height
  assert crop.scaled_width >= crop.bucket.width
  assert (
    crop.scaled_height == crop.bucket.height or crop.scaled_width == crop.bucket.width
  )
  # And never squashed: one scale for both sides, but for less than a whole pixel.
  exact_width = width * crop.scaled_height / height
  exact_height = height * crop.scaled_width / width
  assert abs(crop.scaled_width - exact_width) < 1 or (
    abs(crop.scaled_height - exact_height) < 1
  )


@given(RESOLUTIONS, SIDES, SIDES)
def test_what_is_shown_lies_in_the_middle_of_the_original(resolution, height, width):
  crop = rule_of(resolution).plan(height, width)
  top, left, bottom, right = crop.box.astype(np.float64)
  # float32 keeps numbers up to 20000 to a thousandth.
  assert -1e-2 < top < bottom < height + 1e-2
  assert -1e-2 < left < right < width + 1e-2
  rows, columns = height / crop.scaled_height, width / crop.scaled_width
  # Half to even: the two borders differ by at most one pixel of the scaled image.
  assert abs(top - (height - bottom)) <= rows + 1e-2
  assert abs(left - (width - right)) <= columns + 1e-2
  # The shape of what is shown is the bucket's, to a pixel of the scaled image.
  bucket = crop.bucket
  assert abs((bottom - top) / rows - bucket.height) < 1e-2 * max(1, bucket.height / 100)
  assert abs((right - left) / columns - bucket.width) < 1e-2 * max(
    1, bucket.width / 100
  )


@given(RESOLUTIONS, SIDES, SIDES)
def test_an_image_is_enlarged_exactly_if_it_does_not_hold_its_bucket(
  resolution, height, width
):
  crop = rule_of(resolution).plan(height, width)
  fits = height >= crop.bucket.height and width >= crop.bucket.width
  assert crop.enlarges == (not fits)


@pytest.mark.parametrize("resolution", BUCKETS)
def test_every_bucket_keeps_an_image_of_its_own_size_whole(resolution):
  rule = rule_of(resolution)
  lost = [b for b in BUCKETS[resolution].values() if rule.plan(*b).bucket != b]
  # Published ratios at 2880 may be off by so much that others are nearer: 1408x5568 is
  # called 0.26 and is 0.253.
  expected = {(1408, 5568), (1408, 5376), (1408, 5184)}
  assert set(lost) == (expected if resolution == 2880 else set())
  for bucket in BUCKETS[resolution].values():
    if bucket in lost:
      continue
    crop = rule.plan(*bucket)
    assert crop[:5] == (bucket, *bucket, 0, 0)
    assert crop.box.tolist() == [0, 0, *bucket]
    assert not crop.enlarges
    double = rule.plan(2 * bucket.height, 2 * bucket.width)
    assert double[:5] == crop[:5]
    assert double.box.tolist() == [0, 0, 2 * bucket.height, 2 * bucket.width]
    assert rule.plan(bucket.height - 1, bucket.width).enlarges


@pytest.mark.parametrize(
  ("resolution", "height", "width"),
  [
    (256, 427, 640),  # wide
    (256, 640, 427),  # high
    (256, 300, 1400),  # beyond the widest
    (256, 331, 333),  # an odd number of columns to cut off
    (512, 600, 400),  # enlarged
  ],
)
def test_images_are_those_of_the_reference(resolution, height, width):
  rule, image = rule_of(resolution), noise(height, width)
  size = rule.plan(height, width).bucket
  expected = reference_crop(image, size, Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(rule.apply(image), expected)
  assert rule.apply(image).size == (size.width, size.height)


@pytest.mark.parametrize("resolution", [256, 1024, 2048, 2880, 4096])
def test_lanczos_begins_at_2048(resolution):
  assert filter_at(resolution) == ("lanczos" if resolution >= 2048 else "bicubic")
  small = CropRule({1.0: Bucket(32, 32)}, filter_at(resolution))
  image = noise(80, 81)
  resampling = Image.Resampling[filter_at(resolution).upper()]
  expected = reference_crop(image, (32, 32), resampling)
  np.testing.assert_array_equal(small.apply(image), expected)


def test_half_a_pixel_goes_to_the_even_side():
  rule = CropRule({1.0: Bucket(8, 8)}, "bicubic")
  # One and three columns too many: 0.5 becomes 0, and 1.5 becomes 2.
  assert rule.plan(8, 9).left == 0
  assert rule.plan(8, 11).left == 2
  assert rule.plan(11, 8).top == 2


def test_what_the_box_says_is_what_the_image_shows():
  # One bright spot: where the box puts it, there it is.
  pixels = np.zeros((200, 320, 3), np.uint8)
  pixels[60:70, 200:210] = 255
  rule = CropRule({1.0: Bucket(64, 64)}, "bicubic")
  crop = rule.plan(200, 320)
  image = np.asarray(rule.apply(Image.fromarray(pixels)), float)[..., 0]
  rows, columns = np.indices(image.shape) + 0.5
  seen = [(image * axis).sum() / image.sum() for axis in (rows, columns)]
  top, left, bottom, right = crop.box
  expected = [64 * (65 - top) / (bottom - top), 64 * (205 - left) / (right - left)]
  np.testing.assert_allclose(seen, expected, rtol=0, atol=0.1)


def test_of_two_ratios_as_near_the_first_is_taken():
  wide, high = Bucket(48, 96), Bucket(96, 64)
  assert CropRule({0.5: wide, 1.5: high}, "bicubic").plan(100, 100).bucket == wide
  assert CropRule({1.5: high, 0.5: wide}, "bicubic").plan(100, 100).bucket == high


def test_the_identity_tells_rules_apart_and_survives_json():
  table = {0.5: Bucket(48, 96), 1.5: Bucket(96, 64)}
  rule = CropRule(table, "bicubic")
  assert json.loads(json.dumps(rule.identity)) == rule.identity
  turned = dict(reversed(list(table.items())))
  others = [
    CropRule(table, "lanczos"),
    CropRule(turned, "bicubic"),
    CropRule({**table, 1.5: Bucket(96, 48)}, "bicubic"),
  ]
  assert len({rule.hash, *(other.hash for other in others)}) == 4
  assert CropRule(dict(table), "bicubic").hash == rule.hash


def test_what_is_no_rule_or_no_image_is_refused():
  with pytest.raises(ValueError, match="at least one size"):
    CropRule({}, "bicubic")
  with pytest.raises(ValueError, match="An image of 0x7 pixels"):
    rule_of(256).plan(0, 7)
