"""Trees seen as paths: names are those of the checkpoint, differences name the leaf."""

import jax
import numpy as np

from pixsigma_jax import tree

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
