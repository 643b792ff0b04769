"""Trees of parameters seen as paths: names of leaves, maps by name, differences."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def path_name(path: tuple[Any, ...]) -> str:
  """A key path as `blocks_00_13/attention/qkv/kernel`."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def map_with_name(function: Callable[[str, Any], Any], tree: Any) -> Any:
  """Applies `function(name, leaf)` to every leaf."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: function(path_name(path), leaf), tree
  )


def named_leaves(tree: Any) -> dict[str, Any]:
  """Every leaf by its name, in the tree's order."""
  return {path_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def size(tree: Any) -> int:
  """Numbers in all leaves together."""
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def differences(have: Any, want: Any) -> list[str]:
  """What tells two trees of arrays apart by name, shape and dtype, a line each.

  `- name float32[3]` stands only in `have`, `+ …` only in `want`.
  """

  def lines(tree: Any) -> dict[str, None]:
    leaves = named_leaves(tree)
    return {f"{name} {x.dtype}{list(x.shape)}": None for name, x in leaves.items()}

  have_lines, want_lines = lines(have), lines(want)
  return [f"- {line}" for line in have_lines if line not in want_lines] + [
    f"+ {line}" for line in want_lines if line not in have_lines
  ]
