"""Weights of detail: Parseval, closed forms, and cases worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixsigma_jax.diffusion import detail
from pixsigma_jax.models import tokens

WINDOW = (2, 2)


def batch_of(*images, length=None):
  """Images [h w c] → tokens of patches of 2x2, their coordinates and grids."""
  grids = [(image.shape[0] // 2, image.shape[1] // 2) for image in images]
  length = length or max(h * w for h, w in grids)
  error = np.zeros((len(images), length, 4 * images[0].shape[-1]), np.float32)
  coordinates = np.zeros((len(images), length, 2), np.int32)
  for i, (image, grid) in enumerate(zip(images, grids, strict=True)):
    n = grid[0] * grid[1]
    error[i, :n] = tokens.to_tokens(image, 2, WINDOW)
    coordinates[i, :n] = tokens.coordinates(grid, WINDOW)
  return {
    "error": jnp.asarray(error),
    "coordinates": jnp.asarray(coordinates),
    "grid": jnp.asarray(grids, jnp.int32),
  }


def excess(*images, gamma=1.0, length=None):
  batch = batch_of(*images, length=length)
  error = batch.pop("error")
  return np.asarray(detail.spectral_excess(error, **batch, patch_size=2, gamma=gamma))


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_by_parseval_weights_of_one_are_the_mean_squared_error(monkeypatch):
  monkeypatch.setattr(detail, "frequency_weights", lambda shape, _: np.ones(shape))
  images = [normal(8, 12, 3), normal(16, 4, 3, seed=1), normal(6, 6, 3, seed=2)]
  expected = [np.square(image).mean() for image in images]
  np.testing.assert_allclose(excess(*images), expected, rtol=1e-5)


def test_the_spectrum_is_numpys_of_the_zero_padded_image():
  image = normal(8, 12, 3)
  canvas = [2 * side for side in detail.canvas_of(24)]
  power = np.abs(np.fft.fft2(image.astype(np.float64), canvas, axes=(0, 1))) ** 2
  rows, columns = (np.fft.fftfreq(side) for side in canvas)
  radius = np.sqrt(rows[:, None] ** 2 + columns**2) / np.sqrt(0.5)
  weights = (np.exp(2 * radius) - 1) / (np.exp(2) - 1)
  expected = (power * weights[..., None]).sum() / np.prod(canvas) / image.size
  np.testing.assert_allclose(excess(image, gamma=2.0), [expected], rtol=1e-5)


def test_turning_or_mirroring_an_image_changes_nothing():
  image = normal(8, 16, 3)
  turned = [image.swapaxes(0, 1), image[::-1], image[:, ::-1]]
  np.testing.assert_allclose(
    excess(*turned, length=40), excess(image, length=40).repeat(3), rtol=1e-5
  )


def test_weights_rise_from_0_at_the_mean_to_1_at_the_corner():
  weights = detail.frequency_weights((8, 8), 1.5)
  assert weights[0, 0] == 0
  assert weights[4, 4] == pytest.approx(1)
  assert (np.diff(weights[0, :5]) > 0).all()
  # Half a cycle along one side is at a radius of 1/√2.
  expected = np.expm1(1.5 / np.sqrt(2)) / np.expm1(1.5)
  assert weights[0, 4] == pytest.approx(expected, rel=1e-6)


def test_a_checkerboard_costs_nearly_all_of_its_error_more_and_a_flat_error_little():
  side = np.arange(32)
  board = (-1.0) ** (side[:, None] + side)[..., None].astype(np.float32)
  # An image's edge spreads its line over frequencies, by about a cycle an image.
  assert excess(board)[0] > 0.85
  assert excess(np.ones_like(board))[0] < 0.1


@pytest.mark.parametrize("length", [1, 5, 100, 65_536])
def test_a_canvas_holds_every_image_of_up_to_4_to_1(length):
  rows, columns = detail.canvas_of(length)
  for short in range(1, int(np.sqrt(length)) + 1):
    long = min(length // short, 4 * short)
    assert short <= rows
    assert long <= columns


def test_haar_bands_hold_the_blocks_energy_and_invert_by_hand():
  block = np.array([[1.0, 2.0], [3.0, 8.0]], np.float32).reshape(1, 2, 1, 2, 1)
  bands = [float(band.squeeze()) for band in detail.haar(jnp.asarray(block))]
  assert bands == [7.0, -3.0, -4.0, 2.0]
  assert np.square(bands).sum() == np.square(block).sum()


def mask_of(images, timesteps, offset=0.3, valid=None):
  error = batch_of(*images)["error"]
  valid = np.ones(error.shape[:2], bool) if valid is None else valid
  return np.asarray(
    detail.wavelet_mask(
      error,
      mask=jnp.asarray(valid),
      timesteps=jnp.asarray(timesteps),
      num_timesteps=1000,
      patch_size=2,
      offset=offset,
    )
  )


def test_a_mask_keeps_all_at_little_noise_and_the_detailed_at_much():
  # Three 2x2 blocks of energies 0, 1 and 4: A = 0, 1/4 and 1.
  image = np.zeros((2, 6, 1), np.float32)
  image[:, 2:4] = np.array([[1, 0], [1, 0]])[..., None]
  image[:, 4:6] = np.array([[2, 0], [2, 0]])[..., None]
  order = tokens.window_order((1, 3), WINDOW)
  for timestep, kept in ((300, [1, 1, 1]), (301, [0, 1, 1]), (551, [0, 0, 1])):
    mask = mask_of([image], [timestep])
    assert (mask == mask[..., :1]).all()  # a block is kept as a whole
    assert mask[0, :, 0].tolist() == np.array(kept, bool)[order].tolist()
  assert mask_of([image], [999], offset=1.0).all()


def test_padding_scales_no_images_detail():
  image = normal(4, 4, 2)
  loud = np.concatenate([image, 100 * normal(2, 4, 2, seed=1)])
  valid = np.ones((1, 6), bool)
  valid[:, 4:] = False
  alone = mask_of([image], [600])
  np.testing.assert_array_equal(mask_of([loud], [600], valid=valid)[:, :4], alone)


def test_a_flat_image_is_masked_like_one_without_detail():
  assert mask_of([np.ones((4, 4, 1), np.float32)], [300]).all()
  assert not mask_of([np.ones((4, 4, 1), np.float32)], [301]).any()


def test_tokens_without_whole_blocks_have_no_wavelets():
  with pytest.raises(ValueError, match="a token here is 1x1"):
    detail.wavelet_mask(
      jnp.zeros((1, 4, 3)),
      mask=jnp.ones((1, 4), bool),
      timesteps=jnp.zeros(1, jnp.int32),
      num_timesteps=1000,
      patch_size=1,
      offset=0.3,
    )


def test_the_gradient_of_the_excess_is_that_of_a_difference():
  batch = batch_of(normal(4, 8, 1))
  error = batch.pop("error")

  def total(scale):
    return detail.spectral_excess(scale * error, **batch, patch_size=2, gamma=1.0).sum()

  # Quadratic: the derivative at 1 is twice the value.
  np.testing.assert_allclose(jax.grad(total)(1.0), 2 * total(1.0), rtol=1e-5)
