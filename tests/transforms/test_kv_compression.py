"""Compression added to a trained model and removed: the blocks stay as they are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixsigma_jax import tree
from pixsigma_jax.models.kv_compression import KVCompression, KVCompressor
from pixsigma_jax.models.pixart import PixArt, PixArtConfig, abstract_params
from pixsigma_jax.transforms import add_kv_compression, remove_kv_compression
from pixsigma_jax.transforms.kv_compression import INITIALIZATIONS
from tests.sample import models

PLAIN = PixArtConfig(
  depth=4,
  width=48,
  num_heads=4,
  patch_size=2,
  base_size=4,
  pe_interpolation=1.0,
  caption_width=8,
  caption_length=5,
)
CONV = {"ratio": 4, "operator": "conv", "norm": True, "initialization": "average"}


@pytest.fixture(scope="module")
def params():
  return models.random_params(PLAIN)


def layer_of(params, config, layer):
  """The parameters of one layer, wherever its segment begins; without compressor."""
  for segment, _ in config.segments():
    if layer in segment:
      stack = params[f"blocks_{segment.start:02d}_{segment.stop - 1:02d}"]
      attention = dict(stack["attention"])
      attention.pop("kv_compressor", None)
      at = layer - segment.start
      layers = {**stack, "attention": attention}
      return jax.tree.map(lambda leaf, at=at: leaf[at], layers)
  raise AssertionError(layer)


@pytest.mark.parametrize("layers", [(2, 3), (1,), (0, 3), (0, 1, 2, 3), (3, 2)])
@pytest.mark.parametrize("initialization", INITIALIZATIONS)
def test_the_tree_is_that_of_the_new_config_and_every_layer_keeps_its_numbers(
  params, layers, initialization
):
  fields = {**CONV, "layers": layers, "initialization": initialization}
  config, new = add_kv_compression(PLAIN, params, **fields)
  compression = KVCompression(ratio=4, layers=layers)
  assert config == dataclasses.replace(PLAIN, kv_compression=compression)
  assert tree.differences(new, abstract_params(config)) == []
  for layer in range(PLAIN.depth):
    jax.tree.map(
      np.testing.assert_array_equal,
      layer_of(new, config, layer),
      layer_of(params, PLAIN, layer),
    )


def test_what_is_outside_the_blocks_is_shared_and_the_input_is_untouched(params):
  before = tree.named_leaves(params)
  _, new = add_kv_compression(PLAIN, params, **CONV, layers=(1, 2))
  assert "blocks_00_03" not in new
  for name in params:
    if name != "blocks_00_03":
      assert new[name] is params[name]
  after = tree.named_leaves(params)
  assert list(after) == list(before)
  assert all(after[name] is before[name] for name in before)


def test_a_stack_that_is_compressed_as_a_whole_is_shared(params):
  _, new = add_kv_compression(PLAIN, params, **CONV, layers=(0, 1, 2, 3))
  old, stack = params["blocks_00_03"], new["blocks_00_03"]
  assert all(stack[name] is old[name] for name in old if name != "attention")
  for name in old["attention"]:
    assert stack["attention"][name] is old["attention"][name]
  assert "kv_compressor" not in old["attention"]


@pytest.mark.parametrize("norm", [True, False])
def test_average_initialisation_is_the_mean_of_the_window(params, norm):
  fields = {**CONV, "norm": norm, "ratio": 2}
  _, new = add_kv_compression(PLAIN, params, **fields, layers=(2, 3))
  compressor = new["blocks_02_03"]["attention"]["kv_compressor"]
  assert compressor["kernel"].shape == (2, 1, 2, 48)
  np.testing.assert_array_equal(compressor["kernel"], 0.5)
  np.testing.assert_array_equal(compressor["bias"], 0)
  assert ("norm" in compressor) == norm
  if norm:
    np.testing.assert_array_equal(compressor["norm"]["scale"], 1)
    np.testing.assert_array_equal(compressor["norm"]["bias"], 0)


def run(config, params, latents):
  captions = jnp.ones((1, 5, 8)) / 3
  arguments = (latents, jnp.array([300]), captions, jnp.ones((1, 5), bool))
  # Run once: compiling well would take longer than running badly.
  apply = jax.jit(
    PixArt(config, models.FLOAT32).apply,
    compiler_options={"xla_backend_optimization_level": 0},
  )
  return apply({"params": params}, *arguments)


def test_freshly_averaging_convolutions_predict_what_a_true_mean_predicts(params):
  shared = {"layers": (1, 3), "ratio": 4}
  conv, with_conv = add_kv_compression(
    PLAIN, params, **shared, operator="conv", norm=False, initialization="average"
  )
  mean, with_mean = add_kv_compression(PLAIN, params, **shared, operator="average")
  latents = jax.random.normal(jax.random.key(1), (1, 8, 8, 4))
  found, expected = run(conv, with_conv, latents), run(mean, with_mean, latents)
  # Four layers in float32; the means differ in how they round.
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
  assert not np.allclose(found, run(PLAIN, params, latents), rtol=1e-2)


def test_a_calibrated_norm_loses_two_directions_of_the_mean_and_little_else(params):
  fields = {**CONV, "initialization": "calibrated"}
  config, new = add_kv_compression(PLAIN, params, **fields, layers=(2, 3))
  layer = jax.tree.map(lambda leaf: leaf[1], new["blocks_02_03"]["attention"])
  # As a layer norm's output.
  x = jax.random.normal(jax.random.key(1), (1, 64, 48))
  _, *tokens = jnp.einsum("bni,sio->sbno", x, layer["qkv"]["kernel"])
  compressor = KVCompressor(config.kv_compression, models.FLOAT32)
  found = compressor.apply({"params": layer["kv_compressor"]}, *tokens, None)
  u = np.where(np.arange(48) % 2, -1.0, 1.0)
  for merged, of in zip(found, tokens, strict=True):
    z = np.asarray(of).reshape(1, 16, 4, 48).mean(axis=2)
    kept = z - z.mean(-1, keepdims=True) - (z * u).mean(-1, keepdims=True) * u
    error = np.linalg.norm(merged - kept) / np.linalg.norm(kept)
    # 1 / κ, of windows' means, which are half as large as the tokens.
    assert error < 1 / 16


def test_a_calibrated_norm_predicts_what_no_norm_predicts(params):
  stack = params["blocks_00_03"]
  # Keys and values that a norm would change, as training makes them.
  qkv = jax.tree.map(lambda leaf: 4 * leaf, stack["attention"]["qkv"])
  attention = {**stack["attention"], "qkv": qkv}
  wide = {**params, "blocks_00_03": {**stack, "attention": attention}}
  latents = jax.random.normal(jax.random.key(1), (1, 8, 8, 4))

  def prediction(**fields):
    given = {**CONV, "layers": (2, 3), **fields}
    return run(*add_kv_compression(PLAIN, wide, **given), latents)

  expected = prediction(norm=False)

  def error(**fields):
    return np.linalg.norm(prediction(**fields) - expected) / np.linalg.norm(expected)

  assert error(initialization="calibrated") < error() / 4


def test_the_mean_of_equal_keys_and_values_changes_nothing(params):
  # Without positions, an image of one colour gives every token the same key and value.
  flat = dataclasses.replace(PLAIN, pe_interpolation=1e9)
  config, new = add_kv_compression(
    flat, params, **{**CONV, "norm": False}, layers=(1, 2)
  )
  latents = jnp.broadcast_to(jnp.arange(4.0).reshape(1, 1, 1, 4), (1, 8, 8, 4))
  found, expected = run(config, new, latents), run(flat, params, latents)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_random_initialisation_fills_the_range_of_torchs_and_follows_its_seed(params):
  def compressors(seed):
    fields = {**CONV, "initialization": "random", "ratio": 9, "seed": seed}
    _, new = add_kv_compression(PLAIN, params, **fields, layers=(0, 2, 3))
    return [
      new[name]["attention"]["kv_compressor"]
      for name in ("blocks_00_00", "blocks_02_03")
    ]

  first, second = compressors(0)
  for leaf in (second["kernel"], second["bias"]):
    assert 0.3 < np.abs(leaf).max() <= 1 / 3  # 1/√fan_in, a window of nine
    assert abs(np.mean(leaf)) < 0.1
  # Layers are drawn apart, and so are segments.
  assert (second["kernel"][0] != second["kernel"][1]).all()
  assert (first["kernel"][0] != second["kernel"][0]).all()
  jax.tree.map(np.testing.assert_array_equal, [first, second], compressors(0))
  assert (compressors(1)[1]["kernel"] != second["kernel"]).all()


@pytest.mark.parametrize("operator", ["average", "discard", "random_discard"])
def test_operators_that_learn_nothing_add_no_parameter(params, operator):
  fields = {**CONV, "operator": operator}
  config, new = add_kv_compression(PLAIN, params, **fields, layers=(2, 3))
  assert config.kv_compression.operator == operator
  assert tree.size(new) == tree.size(params)
  assert tree.differences(new, abstract_params(config)) == []


def test_a_model_that_compresses_already_is_refused(params):
  config, new = add_kv_compression(PLAIN, params, **CONV, layers=(2, 3))
  with pytest.raises(ValueError, match=r"already compresses .*layers=\(2, 3\)"):
    add_kv_compression(config, new, **CONV, layers=(1,))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (
      {"initialization": "zeros"},
      "initialization 'zeros'; choose one of 'average', 'calibrated', 'random'",
    ),
    (
      {"initialization": "calibrated", "norm": False},
      "norm=False there is none: use 'average'",
    ),
    (
      {"initialization": "calibrated", "operator": "average"},
      "operator='average', norm=True there is none",
    ),
    ({"ratio": 5}, "ratio 5 is unknown"),
    ({"layers": (4,)}, r"names layers \(4,\), but layers are 0 … 3"),
    ({"layers": ()}, "contradicts itself"),
  ],
)
def test_arguments_that_fit_nothing_are_named(params, fields, message):
  with pytest.raises(ValueError, match=message):
    add_kv_compression(PLAIN, params, **{**CONV, "layers": (2, 3), **fields})


@pytest.mark.parametrize("layers", [(2, 3), (1,), (0, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("operator", ["conv", "average"])
def test_removing_what_was_added_gives_the_model_back_to_the_bit(
  params, layers, operator
):
  fields = {**CONV, "operator": operator}
  added = add_kv_compression(PLAIN, params, **fields, layers=layers)
  config, back = remove_kv_compression(*added)
  assert config == PLAIN
  assert tree.differences(back, abstract_params(PLAIN)) == []
  jax.tree.map(np.testing.assert_array_equal, back, params)


def test_removing_shares_what_is_outside_the_blocks_and_leaves_its_input_alone(params):
  config, compressed = add_kv_compression(PLAIN, params, **CONV, layers=(0, 3))
  before = tree.named_leaves(compressed)
  _, back = remove_kv_compression(config, compressed)
  for name in params:
    if name != "blocks_00_03":
      assert back[name] is params[name]
  after = tree.named_leaves(compressed)
  assert list(after) == list(before)
  assert all(after[name] is before[name] for name in before)


def test_a_stack_that_was_compressed_as_a_whole_is_shared_when_compression_goes(params):
  added = add_kv_compression(PLAIN, params, **CONV, layers=(0, 1, 2, 3))
  _, back = remove_kv_compression(*added)
  before, after = tree.named_leaves(params), tree.named_leaves(back)
  assert all(after[name] is before[name] for name in before)


def test_a_model_that_does_not_compress_has_nothing_to_remove(params):
  with pytest.raises(ValueError, match=r"does not compress .*nothing to remove"):
    remove_kv_compression(PLAIN, params)
