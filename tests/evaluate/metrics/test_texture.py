"""Texture, held against scikit-image, Pillow and images made for it."""

import io

import numpy as np
import pytest
from PIL import Image
from skimage.feature import graycomatrix
from skimage.measure import shannon_entropy

from pixsigma_jax.evaluate.metrics import (
  compression_ratio,
  glcm_entropy,
  glcm_score,
  high_frequency_share,
  patch_positions,
  patches,
  seam_score,
)


@pytest.fixture
def random():
  return np.random.default_rng(0)


def noise(random, height, width):
  return random.integers(0, 256, (height, width, 3), dtype=np.uint8)


def cooccurrence(levels):
  angles = [0, np.pi / 4, np.pi / 2, 3 * np.pi / 4]
  return graycomatrix(levels, [1, 2, 3, 4], angles, levels=64, normed=True)


@pytest.mark.parametrize("kind", ["noise", "smooth", "flat"])
def test_glcm_is_scikit_images_on_every_whole_patch(random, kind):
  image = {
    "noise": random.integers(0, 256, (130, 70), dtype=np.uint8),
    "smooth": np.add.outer(np.arange(130), np.arange(70)).astype(np.uint8),
    "flat": np.full((130, 70), 77, np.uint8),
  }[kind]
  matrices = [cooccurrence(image[i : i + 64, :64] // 4) for i in (0, 64)]
  assert glcm_score(image) == pytest.approx(np.mean([*map(shannon_entropy, matrices)]))
  slices = np.concatenate([m.reshape(64 * 64, -1).T for m in matrices])
  true = [-(p[p > 0] * np.log2(p[p > 0])).sum() for p in slices]
  assert glcm_entropy(image) == pytest.approx(np.mean(true))


def test_glcm_of_color_is_of_its_luma(random):
  image = noise(random, 64, 64)
  luma = np.rint(image @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)
  assert glcm_score(image) == pytest.approx(glcm_score(luma), rel=0.02)
  green = np.zeros((64, 64, 3), np.uint8)
  green[::2, :, 1] = 255
  grey_lines = np.zeros((64, 64), np.uint8)
  grey_lines[::2] = 150  # .587 of 255
  assert glcm_score(green) == glcm_score(grey_lines)


def test_the_published_score_and_the_entropy_are_two_things(random):
  image = noise(random, 64, 64)
  # Figures of scikit-image for uniform noise: facts of Diffusion-4K's definition.
  grey = image[..., 0]
  assert glcm_score(grey) == pytest.approx(3.53, abs=0.05)
  assert glcm_entropy(grey) == pytest.approx(11.16, abs=0.05)


def test_compression_ratio_is_bytes_over_bytes_of_the_set(random):
  images = [noise(random, 40, 60), np.full((80, 50, 3), 9, np.uint8)]
  sizes = []
  for image in images:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95)
    sizes.append(len(file.getvalue()))
  expected = (40 * 60 * 3 + 80 * 50 * 3) / sum(sizes)
  assert compression_ratio(iter(images)) == expected
  assert compression_ratio(images[:1]) < compression_ratio(images[1:])


def test_an_image_without_seams_scores_one(random):
  assert seam_score(noise(random, 256, 256), 64) == pytest.approx(1, abs=0.1)
  assert seam_score(np.zeros((32, 32), np.uint8), 8) == 1


def test_seams_raise_the_score_at_their_period_alone(random):
  image = noise(random, 256, 256)[..., 0] // 8 + 100
  tiles = np.add.outer(np.arange(256) // 64 % 2, np.arange(256) // 64 % 2) * 40
  seamed = (image + tiles).astype(np.uint8)
  assert seam_score(seamed, 64) > 2.5
  assert seam_score(seamed, 50) < 1.5
  # One direction is enough, either.
  rows = (image + np.repeat(tiles[:, :1], 256, axis=1)).astype(np.uint8)
  assert seam_score(rows, 64) == pytest.approx(seam_score(rows.T, 64))
  assert seam_score(rows, 64) > 1.5


@pytest.mark.parametrize("cycles", [5, 40, 60])
def test_a_wave_has_all_its_power_at_its_own_frequency(cycles):
  wave = 127 + 100 * np.sin(2 * np.pi * cycles * np.arange(128) / 128)
  image = np.tile(np.rint(wave).astype(np.uint8), (128, 1))
  share = high_frequency_share(image, above=0.25)
  assert share == pytest.approx(float(cycles / 128 > 0.25), abs=0.01)


def test_a_flat_image_has_no_high_frequencies():
  assert high_frequency_share(np.full((16, 16, 3), 3, np.uint8)) == 0
  assert high_frequency_share(np.eye(16, dtype=np.uint8), above=0.0) == pytest.approx(1)


def test_patches_lie_at_equal_places_in_images_of_one_size(random):
  a = patch_positions(500, 700, size=64, count=50)
  assert (a == patch_positions(500, 700, size=64, count=50)).all()
  assert (a != patch_positions(500, 700, size=64, count=50, seed=1)).any()
  assert a.min() >= 0
  assert (a.max(axis=0) <= [500 - 64, 700 - 64]).all()
  image = noise(random, 500, 700)
  [first, *_] = patches(image, a, 64)
  assert (first == image[a[0, 0] : a[0, 0] + 64, a[0, 1] : a[0, 1] + 64]).all()


def test_patches_are_the_published_ones_and_reach_every_place():
  ours = patch_positions(500, 700)
  assert (ours == patch_positions(500, 700, size=299, count=20, seed=42)).all()
  corners = {tuple(place) for place in patch_positions(33, 33, size=32, count=99)}
  assert corners == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_the_only_patch_of_an_image_of_its_size_is_the_image(random):
  image = noise(random, 32, 32)
  positions = patch_positions(32, 32, size=32, count=2)
  assert (patches(image, positions, 32) == image).all()


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda i: glcm_score(i), "40x60 pixels has no patch"),
    (lambda i: compression_ratio([]), "at least one"),
    (lambda i: seam_score(i, 100), "no border"),
    (lambda i: seam_score(i, 1), "no border"),
    (lambda i: high_frequency_share(i, above=0.8), "between 0 and 0.5"),
    (lambda i: patch_positions(40, 60), "299x299 pixels do not fit"),
  ],
)
def test_images_that_cannot_be_measured_are_refused(random, call, message):
  with pytest.raises(ValueError, match=message):
    call(noise(random, 40, 60))
