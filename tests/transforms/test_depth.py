"""A deeper model: more blocks, the same output, and all of them learn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixsigma_jax import tree
from pixsigma_jax.models.kv_compression import KVCompression
from pixsigma_jax.models.pixart import PixArt, PixArtConfig, abstract_params
from pixsigma_jax.transforms import grow_depth
from tests.sample import models
from tests.transforms.test_kv_compression import PLAIN

# Layers 1 and 2 compress: three segments.
CONFIG = dataclasses.replace(
  PLAIN, kv_compression=KVCompression(ratio=4, layers=(1, 2))
)


@pytest.fixture(scope="module")
def params():
  return models.random_params(CONFIG)


def run(config, params):
  latents = jax.random.normal(jax.random.key(1), (1, 8, 8, 4))
  captions = jnp.ones((1, 5, 8)) / 3
  arguments = (latents, jnp.array([300]), captions, jnp.ones((1, 5), bool))
  # Run once: compiling well would take longer than running badly.
  apply = jax.jit(
    PixArt(config, models.FLOAT32).apply,
    compiler_options={"xla_backend_optimization_level": 0},
  )
  return np.asarray(apply({"params": params}, *arguments))


def layer_of(params, config, layer):
  """The parameters of one layer, wherever its segment begins."""
  for segment, _ in config.segments():
    if layer in segment:
      stack = params[f"blocks_{segment.start:02d}_{segment.stop - 1:02d}"]
      return jax.tree.map(lambda leaf, at=layer - segment.start: leaf[at], stack)
  raise AssertionError(layer)


def test_the_deeper_model_predicts_what_its_parent_predicts_to_the_bit(params):
  expected = run(CONFIG, params)
  deeper = grow_depth(CONFIG, params, depth=6, layers=(1, 3))
  np.testing.assert_array_equal(run(*deeper), expected)
  assert np.ptp(expected) > 0.1


def test_every_block_is_there_once_as_it_was_and_copies_follow_theirs(params):
  config, deep = grow_depth(CONFIG, params, depth=7, layers=(3, 1, 1))
  assert config == dataclasses.replace(
    CONFIG, depth=7, kv_compression=KVCompression(ratio=4, layers=(1, 2, 3, 4))
  )
  assert tree.differences(deep, abstract_params(config)) == []
  for new, old in {0: 0, 1: 1, 4: 2, 5: 3}.items():
    jax.tree.map(
      np.testing.assert_array_equal,
      layer_of(deep, config, new),
      layer_of(params, CONFIG, old),
    )
  for new, old in {2: 1, 3: 1, 6: 3}.items():
    copy = tree.named_leaves(layer_of(deep, config, new))
    for name, leaf in tree.named_leaves(layer_of(params, CONFIG, old)).items():
      last = "/out/" in name
      np.testing.assert_array_equal(copy[name], np.zeros_like(leaf) if last else leaf)


def test_what_no_copy_joins_is_shared_and_the_input_is_untouched(params):
  before = tree.named_leaves(params)
  _, deep = grow_depth(CONFIG, params, depth=5, layers=(3,))
  names = tree.named_leaves(deep)
  for name, leaf in before.items():
    if not name.startswith("blocks_03_03"):
      assert names[name] is leaf
  after = tree.named_leaves(params)
  assert list(after) == list(before)
  assert all(after[name] is before[name] for name in before)


@pytest.mark.parametrize(
  ("parent", "depth", "copied"),
  [(28, 42, range(1, 28, 2)), (4, 6, (1, 3)), (2, 6, (0, 0, 1, 1)), (3, 4, (2,))],
)
def test_copies_are_evenly_spread(parent, depth, copied):
  shallow = dataclasses.replace(CONFIG, depth=parent, kv_compression=KVCompression())
  last = {"out": {"bias": np.ones(parent)}}
  branches = dict.fromkeys(("attention", "cross_attention", "mlp"), last)
  stack = {"number": np.arange(parent), **branches}
  _, deep = grow_depth(shallow, {f"blocks_00_{parent - 1:02d}": stack}, depth=depth)
  grown = deep[f"blocks_00_{depth - 1:02d}"]
  np.testing.assert_array_equal(grown["number"], sorted([*range(parent), *copied]))
  original = np.diff(grown["number"], prepend=-1) != 0
  for branch in branches:
    np.testing.assert_array_equal(grown[branch]["out"]["bias"], original)


def test_a_copys_last_maps_learn_from_the_first_step():
  shallow = dataclasses.replace(CONFIG, depth=1, kv_compression=KVCompression())
  config, deep = grow_depth(shallow, models.random_params(shallow), depth=2)

  def loss(deep):
    prediction = PixArt(config, models.FLOAT32).apply(
      {"params": deep},
      *(jnp.ones((1, 2, 4, 4)), jnp.array([300])),
      *(jnp.ones((1, 5, 8)), jnp.ones((1, 5), bool)),
    )
    return jnp.square(prediction).mean()  # pyright: ignore

  gradients = jax.jit(
    jax.grad(loss), compiler_options={"xla_backend_optimization_level": 0}
  )(deep)
  copy = layer_of(gradients, config, 1)
  for branch in ("attention", "cross_attention", "mlp"):
    for name in ("kernel", "bias"):
      assert (copy[branch]["out"][name] != 0).any(), (branch, name)


def test_xl_with_42_blocks_has_the_parameters_of_pixart_900m():
  config = PixArtConfig.from_variant("XL/2", base_size=64, pe_interpolation=2.0)
  params = abstract_params(dataclasses.replace(config, depth=42))
  assert tree.size(params) == 908_433_824


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"depth": 4}, "depth=4 must be above the 4 blocks"),
    ({"depth": 6, "layers": (1,)}, "depth=6 has 2 blocks more .* layers names 1"),
    ({"depth": 6, "layers": (1, 4)}, "layers names 4, but blocks are 0 … 3"),
  ],
)
def test_arguments_that_fit_nothing_are_named(params, fields, message):
  with pytest.raises(ValueError, match=message):
    grow_depth(CONFIG, params, **fields)


def test_a_model_that_discards_at_random_is_refused(params):
  random = KVCompression(ratio=4, layers=(1, 2), operator="random_discard", norm=False)
  config = dataclasses.replace(CONFIG, kv_compression=random)
  with pytest.raises(ValueError, match=r"discards .* at random.*remove_kv_compression"):
    grow_depth(config, params, depth=6)
