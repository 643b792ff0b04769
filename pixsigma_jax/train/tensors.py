"""The reference's tensors in our leaves: each has statistics of its own.

Torch keeps a layer's matrix, a fused qkv and a convolution as one tensor each; we keep
stacks of layers, stacked maps of one input, and other orders of axes.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import optax
from jaxtyping import Array

from pixsigma_jax import tree

Reshape: TypeAlias = Callable[[Array], Array]


class View(NamedTuple):
  """View of a leaf: `stacked` layers first, then one tensor of the reference."""

  stacked: bool
  into: Reshape
  back: Callable[[Array, Array], Array]  # (seen, a leaf of the shape to go back to)


def _moved(permutation: tuple[int, ...]) -> tuple[Reshape, Callable]:
  inverse = tuple(permutation.index(i) for i in range(len(permutation)))
  return (lambda x: x.transpose(permutation), lambda x, _: x.transpose(inverse))


def _fused_kernel(x: Array) -> Array:
  layers, copies, fan_in, features = x.shape
  return x.transpose(0, 2, 1, 3).reshape(layers, fan_in, copies * features)


def _unfused_kernel(x: Array, like: Array) -> Array:
  layers, copies, fan_in, features = like.shape
  return x.reshape(layers, fan_in, copies, features).transpose(0, 2, 1, 3)


# Name of a leaf → its view; the first match counts. A matrix may be seen transposed:
# rows and columns have equal parts in every update.
_VIEWS: tuple[tuple[str, View], ...] = (
  (r"^blocks_.*/(qkv|kv)/kernel$", View(True, _fused_kernel, _unfused_kernel)),
  (
    r"^blocks_.*/(qkv|kv)/bias$",
    View(True, lambda x: x.reshape(len(x), -1), lambda x, like: x.reshape(like.shape)),
  ),
  (r"^blocks_.*/kv_compressor/kernel$", View(True, *_moved((0, 3, 1, 2)))),
  (r"^patch_embedding/kernel$", View(False, *_moved((3, 2, 0, 1)))),
  # An adapter has two tensors for each map of a stack.
  (
    r"^blocks_.*/(qkv|kv)/(down|up|magnitude)$",
    View(
      True,
      lambda x: x.reshape(-1, *x.shape[2:]),
      lambda x, like: x.reshape(like.shape),
    ),
  ),
  (r"^blocks_", View(True, lambda x: x, lambda x, _: x)),
  (r"", View(False, lambda x: x, lambda x, _: x)),
)


def view(name: str) -> View:
  """View of the parameter of this name."""
  return next(view for rule, view in _VIEWS if re.search(rule, name))


def each_tensor(tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """Applies `tx` to every tensor of the reference by itself.

  Its state has, in the place of each leaf, that of `tx` for the leaf's tensors, those
  of a stack stacked.
  """

  def init(params: Any) -> Any:
    def start(name: str, leaf: Array) -> Any:
      seen = view(name)
      begin = jax.vmap(tx.init) if seen.stacked else tx.init
      return begin(seen.into(leaf))

    return tree.map_with_name(start, params)

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    names = list(tree.named_leaves(updates))
    leaves, structure = jax.tree.flatten(updates)
    rows = []
    for name, leaf, part, param in zip(
      names,
      leaves,
      structure.flatten_up_to(state),
      structure.flatten_up_to(params),
      strict=True,
    ):
      seen = view(name)
      step: Any = jax.vmap(tx.update) if seen.stacked else tx.update
      found, part = step(seen.into(leaf), part, seen.into(param))
      rows.append((seen.back(found, leaf), part))
    found, state = (structure.unflatten(column) for column in zip(*rows, strict=True))
    return found, state

  return optax.GradientTransformation(init, update)
