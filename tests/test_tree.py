"""Trees seen as paths: names are those of the checkpoint, differences name the leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixsigma_jax import sharding, tree

TREE = {"b": {"kernel": np.zeros((2, 3), np.float32)}, "a": [np.zeros(4, np.int32)]}


def test_a_leaf_is_named_by_the_way_to_it():
  assert list(tree.named_leaves(TREE)) == ["a/0", "b/kernel"]
  assert tree.named_leaves(TREE)["b/kernel"] is TREE["b"]["kernel"]


def test_a_map_by_name_meets_every_leaf_with_its_own_name_and_keeps_the_tree():
  out = tree.map_with_name(lambda name, leaf: (name, leaf.shape), TREE)
  assert out == {"b": {"kernel": ("b/kernel", (2, 3))}, "a": [("a/0", (4,))]}


def test_the_size_counts_every_number_once_and_a_scalar_as_one():
  assert tree.size(TREE) == 10
  assert tree.size({"step": np.int32(3)}) == 1
  abstract = jax.eval_shape(lambda: TREE)
  assert tree.size(abstract) == 10


def test_trees_of_equal_names_shapes_and_dtypes_do_not_differ():
  assert tree.differences(TREE, jax.tree.map(np.ones_like, TREE)) == []


def test_a_difference_is_shown_from_both_sides_with_shape_and_dtype():
  other = {"b": {"kernel": np.zeros((3, 2), np.float32)}, "a": [np.zeros(4)], "c": {}}
  assert tree.differences(TREE, other) == [
    "- a/0 int32[4]",
    "- b/kernel float32[2, 3]",
    "+ a/0 float64[4]",
    "+ b/kernel float32[3, 2]",
  ]


def params():
  draw = np.random.default_rng(0)
  return {
    "kernel": draw.normal(size=(16, 8)).astype(np.float32),
    "bias": draw.normal(size=(8,)).astype(jnp.bfloat16),
    "flags": np.array([True, False]),
    "count": np.int32(3),
  }


def test_a_fingerprint_is_the_same_on_every_mesh_and_for_every_copy():
  want = tree.fingerprint(params())
  assert tree.fingerprint(jax.tree.map(jnp.asarray, params())) == want
  for axes in ({"data": 1, "fsdp": 8}, {"data": 4, "fsdp": 2}):
    mesh = sharding.make_mesh(**axes, context=1)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    spread = {**params(), "kernel": jax.device_put(params()["kernel"], place)}
    assert tree.fingerprint(spread) == want


@pytest.mark.parametrize("name", params())
def test_a_fingerprint_changes_with_any_bit(name):
  want = tree.fingerprint(params())
  leaf = np.atleast_1d(params()[name])
  found = set()
  for at in (0, leaf.nbytes - 1):
    changed = leaf.copy()
    changed.view(np.uint8).reshape(-1)[at] ^= 1
    found.add(tree.fingerprint({**params(), name: changed.reshape(np.shape(leaf))}))
  assert want not in found
  assert len(found) == 2 or leaf.nbytes == 1


def test_a_fingerprint_changes_with_the_order_the_name_the_shape_and_the_dtype():
  kernel = params()["kernel"]
  others = [
    kernel,
    kernel[::-1],
    kernel.T,
    kernel.reshape(8, 16),
    kernel.view(np.int32),
    np.zeros_like(kernel),
    -np.zeros_like(kernel),
  ]
  found = {tree.fingerprint({"kernel": other}) for other in others}
  found.add(tree.fingerprint({"other": kernel}))
  assert len(found) == len(others) + 1
