"""The autoencoder of the miniature: nothing lost, nothing foreign let in."""

import numpy as np
import pytest

from pixsigma_jax.models.pixels import PixelAutoencoder


def test_decoding_undoes_encoding_whatever_the_scaling_factor():
  images = np.linspace(-1, 1, 2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
  autoencoder = PixelAutoencoder(scaling_factor=2.0)
  latents = autoencoder.encode(images)
  # As many latents as the interface says: one for each `downsampling` pixels.
  expected = (2, 4 // autoencoder.downsampling, 6, autoencoder.channels)
  assert latents.shape == expected
  np.testing.assert_array_equal(autoencoder.decode(latents), images)


def test_the_scaling_factor_is_announced_and_not_applied():
  images = np.ones((1, 2, 2, 3), np.float32)
  autoencoder = PixelAutoencoder(scaling_factor=0.5)
  assert autoencoder.scaling_factor == 0.5
  np.testing.assert_array_equal(autoencoder.encode(images), images)


def test_latents_of_another_autoencoder_are_refused():
  with pytest.raises(
    ValueError, match=r"latents of shape \[b H W 3\], not \(1, 2, 2, 4"
  ):
    PixelAutoencoder().decode(np.zeros((1, 2, 2, 4)))
  with pytest.raises(ValueError, match=r"images of shape .* not \(8, 8, 3\)"):
    PixelAutoencoder().encode(np.zeros((8, 8, 3)))
