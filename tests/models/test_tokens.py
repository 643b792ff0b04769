"""Token order: a permutation that keeps windows together, and its inverse."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixsigma_jax.models import tokens

SIDES = st.integers(1, 9)
WINDOWS = st.sampled_from([(1, 1), (1, 2), (2, 2), (3, 3), (4, 4)])


@given(h=SIDES, w=SIDES, window=WINDOWS)
def test_the_order_is_a_permutation_of_windows_then_the_rest(h, w, window):
  order = tokens.window_order((h, w), window)
  assert sorted(order.tolist()) == list(range(h * w))
  size = window[0] * window[1]
  whole = (h // window[0]) * (w // window[1])
  for i in range(whole):
    rows, columns = np.divmod(order[i * size : (i + 1) * size], w)
    assert len(set(zip(rows // window[0], columns // window[1], strict=True))) == 1
    # Inside a window, row by row: the order of a convolution's kernel.
    assert order[i * size : (i + 1) * size].tolist() == sorted(
      order[i * size : (i + 1) * size].tolist()
    )
  assert order[whole * size :].tolist() == sorted(order[whole * size :].tolist())


@given(h=SIDES, w=SIDES, window=WINDOWS, patch=st.integers(1, 2))
def test_tokens_and_latents_are_inverses(h, w, window, patch):
  latents = np.arange(2 * h * w * patch**2 * 3).reshape(2, h * patch, w * patch, 3)
  sequence = tokens.to_tokens(latents, patch, window)
  assert sequence.shape == (2, h * w, patch**2 * 3)
  padded = np.concatenate([sequence, -np.ones_like(sequence)], axis=1)
  np.testing.assert_array_equal(
    tokens.from_tokens(padded, (h, w), patch, window), latents
  )


@given(h=SIDES, w=SIDES, window=WINDOWS)
def test_coordinates_say_where_a_token_came_from(h, w, window):
  latents = np.stack(np.meshgrid(np.arange(h), np.arange(w), indexing="ij"), axis=-1)
  np.testing.assert_array_equal(
    tokens.to_tokens(latents, 1, window), tokens.coordinates((h, w), window)
  )


def test_a_token_is_its_patch_with_channels_fastest():
  latents = np.arange(2 * 4 * 3).reshape(2, 4, 3)
  first, second = tokens.to_tokens(latents, 2, (1, 1))
  assert first.tolist() == latents[:, :2].reshape(-1).tolist()
  assert second.tolist() == latents[:, 2:].reshape(-1).tolist()


def test_numpy_stays_numpy_and_jax_stays_jax():
  latents = np.zeros((4, 4, 1))
  assert isinstance(tokens.to_tokens(latents, 2, (2, 2)), np.ndarray)
  assert isinstance(tokens.to_tokens(jnp.asarray(latents), 2, (2, 2)), jnp.ndarray)


def test_the_mask_counts_the_tokens_of_each_grid():
  mask = tokens.token_mask(jnp.array([[2, 3], [1, 1]]), 7)
  assert mask.sum(axis=1).tolist() == [6, 1]
  assert mask[0].tolist() == [True] * 6 + [False]


def test_sides_that_a_patch_does_not_divide_are_named():
  with pytest.raises(
    ValueError, match="Latents of 5x4 cannot be cut into patches of 2"
  ):
    tokens.to_tokens(np.zeros((5, 4, 1)), 2, (1, 1))


def test_empty_grids_are_named():
  with pytest.raises(ValueError, match=r"Grid \(0, 3\) and window \(1, 1\)"):
    tokens.window_order((0, 3), (1, 1))
