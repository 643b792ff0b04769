"""CAME: Adam's update with factored second moments and a confidence (Luo et al. 2023).

Reference: `CAME` of came-pytorch, which PixArt-Σ was trained with, on tensors as torch
lays them out. Statistics belong to one tensor of theirs, so each of our leaves is first
seen as what it is there: a layer of a stack is a tensor of its own, stacked maps of one
input are one matrix, and a convolution is factored over its window.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Float32

from pixsigma_jax import tree

Reshape: TypeAlias = Callable[[Array], Array]


class Factored(NamedTuple):
  """Running means over the rows and columns of squares, and of squared surprises."""

  row: Float32[Array, "..."]
  column: Float32[Array, "..."]
  surprise_row: Float32[Array, "..."]
  surprise_column: Float32[Array, "..."]


class Full(NamedTuple):
  """Running mean of squares, of a vector."""

  square: Float32[Array, "..."]


class CameState(NamedTuple):
  """`momentum` like the parameters, `statistics` a `Factored` or `Full` each."""

  momentum: Any
  statistics: Any


class _View(NamedTuple):
  """How a leaf is seen: `stacked` layers first, then one tensor of the reference."""

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
# rows and columns have equal parts in the update.
_VIEWS: tuple[tuple[str, _View], ...] = (
  (r"^blocks_.*/(qkv|kv)/kernel$", _View(True, _fused_kernel, _unfused_kernel)),
  (
    r"^blocks_.*/(qkv|kv)/bias$",
    _View(True, lambda x: x.reshape(len(x), -1), lambda x, like: x.reshape(like.shape)),
  ),
  (r"^blocks_.*/kv_compressor/kernel$", _View(True, *_moved((0, 3, 1, 2)))),
  (r"^patch_embedding/kernel$", _View(False, *_moved((3, 2, 0, 1)))),
  (r"^blocks_", _View(True, lambda x: x, lambda x, _: x)),
  (r"", _View(False, lambda x: x, lambda x, _: x)),
)


def scale_by_came(
  *, b1: float, b2: float, b3: float, eps: tuple[float, float], clip_threshold: float
) -> optax.GradientTransformation:
  """CAME's update, before learning rate and weight decay.

  There is no bias correction: in the first steps matrices move by about eleven times
  the learning rate, vectors by a tenth of it.

  Args:
    b1, b2, b3: decay of the momentum, of the squares, of the squared surprises.
    eps: what is added to the squares and to the squared surprises.
    clip_threshold: root mean square that a tensor's update is cut down to before it
      enters the momentum.

  Raises:
    ValueError: a decay is not between 0 and 1, or the threshold is not positive.
  """
  decays = {"b1": b1, "b2": b2, "b3": b3}
  for name, decay in decays.items():
    if not 0 <= decay < 1:
      raise ValueError(f"optimizer.{name}={decay} must be at least 0 and below 1.")
  if clip_threshold <= 0:
    raise ValueError(f"optimizer.clip_threshold={clip_threshold} must be above 0.")

  def start(view: _View, leaf: Any) -> Factored | Full:
    shape = jax.eval_shape(view.into, leaf).shape
    if len(shape) - view.stacked < 2:
      return Full(jnp.zeros(shape, jnp.float32))
    row = jnp.zeros(shape[:-1], jnp.float32)
    column = jnp.zeros((*shape[:-2], shape[-1]), jnp.float32)
    return Factored(row, column, row, column)

  def init(params: Any) -> CameState:
    return CameState(
      momentum=jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params),
      statistics=tree.map_with_name(lambda n, x: start(_view(n), x), params),
    )

  def one_tensor(
    gradient: Array, momentum: Array, statistics: Factored | Full
  ) -> tuple[Array, Array, Factored | Full]:
    """Update, momentum and statistics of one tensor of the reference."""
    square = gradient**2 + eps[0]
    if isinstance(statistics, Full):
      statistics = Full(_mean(b2, statistics.square, square))
      direction = gradient * jax.lax.rsqrt(statistics.square)
    else:
      row, column = _means(b2, statistics.row, statistics.column, square)
      statistics = statistics._replace(row=row, column=column)
      direction = gradient * _inverse_root(row, column)
    size = jnp.sqrt(jnp.mean(direction**2))
    direction = direction / jnp.maximum(1.0, size / clip_threshold)
    momentum = _mean(b1, momentum, direction)
    if isinstance(statistics, Full):
      return momentum, momentum, statistics
    surprise = (direction - momentum) ** 2 + eps[1]
    row, column = _means(
      b3, statistics.surprise_row, statistics.surprise_column, surprise
    )
    statistics = statistics._replace(surprise_row=row, surprise_column=column)
    return momentum * _inverse_root(row, column), momentum, statistics

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, CameState]:
    del params
    names = list(tree.named_leaves(updates))
    gradients, structure = jax.tree.flatten(updates)
    rows = []
    for name, gradient, momentum, statistics in zip(
      names,
      gradients,
      structure.flatten_up_to(state.momentum),
      structure.flatten_up_to(state.statistics),
      strict=True,
    ):
      view = _view(name)
      step = jax.vmap(one_tensor) if view.stacked else one_tensor
      seen = view.into(gradient.astype(jnp.float32))
      found, kept, statistics = step(seen, view.into(momentum), statistics)
      rows.append((view.back(found, gradient), view.back(kept, gradient), statistics))
    found, momentum, statistics = (
      structure.unflatten(c) for c in zip(*rows, strict=True)
    )
    return found, CameState(momentum, statistics)

  return optax.GradientTransformation(init, update)


def _view(name: str) -> _View:
  return next(view for rule, view in _VIEWS if re.search(rule, name))


def _mean(decay: float, old: Array, new: Array) -> Array:
  return decay * old + (1 - decay) * new


def _means(
  decay: float, row: Array, column: Array, square: Array
) -> tuple[Array, Array]:
  return (
    _mean(decay, row, square.mean(axis=-1)),
    _mean(decay, column, square.mean(axis=-2)),
  )


def _inverse_root(row: Array, column: Array) -> Float[Array, "..."]:
  """1/√ of the matrix whose row and column means these are, as far as rank 1 goes."""
  row = jax.lax.rsqrt(row / row.mean(axis=-1, keepdims=True))
  return row[..., None] * jax.lax.rsqrt(column)[..., None, :]
