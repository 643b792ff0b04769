"""Key/value compression: a convolution by another name, and its other operators."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixsigma_jax.models import tokens
from pixsigma_jax.models.kv_compression import (
  WINDOWS,
  KVCompression,
  KVCompressor,
  compressed_mask,
)
from pixsigma_jax.models.layers import Compute, layer_norm

WIDTH = 8
FLOAT32 = Compute(dtype=jnp.float32)
GRIDS = [(8, 12), (7, 9)]


def compressor(ratio, operator="conv", norm=False):
  compression = KVCompression(ratio=ratio, layers=(0,), operator=operator, norm=norm)
  return KVCompressor(compression, FLOAT32)


def images(key, grid):
  """Keys and values as images and as sequences."""
  pair = jax.random.normal(key, (2, 3, *grid, WIDTH))
  return pair, lambda window: tokens.to_tokens(pair, 1, window)


@pytest.mark.parametrize("ratio", [2, 4, 9, 16])
@pytest.mark.parametrize("grid", GRIDS, ids=["even", "odd"])
def test_the_reshape_is_the_strided_grouped_convolution(key, ratio, grid):
  window, module = WINDOWS[ratio], compressor(ratio)
  pair, sequences = images(key, grid)
  kernel = jax.random.normal(key, (*window, WIDTH))
  bias = jnp.arange(WIDTH, dtype=jnp.float32)

  merged = module.apply(
    {"params": {"kernel": kernel, "bias": bias}}, *sequences(window), None
  )

  h, w = grid[0] // window[0], grid[1] // window[1]
  valid = compressed_mask(jnp.array([grid]), window, merged[0].shape[1])[0]
  assert valid.tolist() == [True] * (h * w) + [False] * (len(valid) - h * w)
  for ours, image in zip(merged, pair, strict=True):
    convolved = jax.lax.conv_general_dilated(
      image,
      kernel[:, :, None, :],
      window_strides=window,
      padding="VALID",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=WIDTH,
    )
    expected = (convolved + bias.reshape(1, 1, 1, -1)).reshape(3, h * w, WIDTH)
    # Sixteen float32 products of size 1, summed in another order.
    np.testing.assert_allclose(ours[:, : h * w], expected, rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize("ratio", [2, 4, 9, 16])
def test_at_birth_the_convolution_is_the_average(key, ratio):
  _, sequences = images(key, (12, 12))
  pair = sequences(WINDOWS[ratio])
  learned, _ = compressor(ratio).init_with_output(key, *pair, None)
  average = compressor(ratio, "average").apply({}, *pair, None)
  np.testing.assert_allclose(learned, average, rtol=1e-6, atol=1e-6)


def test_the_references_norm_follows_the_convolution(key):
  pair = images(key, (4, 4))[1]((2, 2))
  plain, _ = compressor(4).init_with_output(key, *pair, None)
  normed, _ = compressor(4, norm=True).init_with_output(key, *pair, None)
  for ours, before in zip(normed, plain, strict=True):
    np.testing.assert_allclose(ours, layer_norm(before, 1e-5), rtol=1e-6, atol=1e-6)


def test_average_undoes_nearest_neighbour_enlargement(key):
  small = jax.random.normal(key, (3, 4, 6, WIDTH))
  large = jnp.repeat(jnp.repeat(small, 2, axis=1), 2, axis=2)
  sequence = tokens.to_tokens(large, 1, (2, 2))
  merged, _ = compressor(4, "average").apply({}, sequence, sequence, None)
  np.testing.assert_allclose(merged, small.reshape(3, 24, WIDTH), rtol=1e-6)


def test_discard_keeps_the_top_left_token_of_each_window(key):
  pair, sequences = images(key, (6, 8))
  merged = compressor(4, "discard").apply({}, *sequences((2, 2)), None)
  for ours, image in zip(merged, pair, strict=True):
    np.testing.assert_array_equal(ours, image[:, ::2, ::2].reshape(3, 12, WIDTH))


def test_random_discard_keeps_one_token_of_its_window_for_key_and_value(key):
  pair = images(key, (6, 8))[1]((2, 2))
  keys, values = compressor(4, "random_discard").apply({}, *pair, key)
  windows = pair.reshape(2, 3, 12, 4, WIDTH)
  same_key = (keys[:, :, None] == windows[0]).all(axis=-1)
  same_value = (values[:, :, None] == windows[1]).all(axis=-1)
  assert (same_key.sum(axis=-1) == 1).all()
  np.testing.assert_array_equal(same_key, same_value)
  assert len(set(np.asarray(same_key.argmax(axis=-1))[0].tolist())) > 1
  again = compressor(4, "random_discard").apply({}, *pair, jax.random.key(7))
  assert (again[0] != keys).any()


def test_windows_do_not_mix(key):
  module = compressor(4, norm=True)
  sequence = jax.random.normal(key, (1, 16, WIDTH))
  params = module.init(key, sequence, sequence, None)
  touched = sequence.at[:, 3].add(1.0)  # the last token of the first window
  before, _ = module.apply(params, sequence, sequence, None)
  after, value = module.apply(params, touched, sequence, None)
  assert (before != after).any(axis=-1).tolist() == [[True, False, False, False]]
  np.testing.assert_array_equal(value, before)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"ratio": 3, "layers": (0,)}, "ratio 3 is unknown; choose one of"),
    ({"ratio": 4, "layers": (1, 1)}, r"layers \(1, 1\) name a layer twice"),
    ({"ratio": 4}, r"ratio 4 in layers \(\) contradicts itself"),
    ({"layers": (1,)}, r"ratio 1 in layers \(1,\) contradicts itself"),
  ],
)
def test_contradictions_are_named(fields, message):
  with pytest.raises(ValueError, match=message):
    KVCompression(**fields)
