"""CAME: Adam's update with factored second moments and a confidence (Luo et al. 2023).

Reference: `CAME` of came-pytorch, which PixArt-Σ was trained with, on tensors as torch
lays them out. Statistics belong to one tensor of theirs, so each of our leaves is first
seen as what it is there (`train/tensors.py`): a layer of a stack is a tensor by itself,
stacked maps of one input are one matrix, and a convolution is factored over its window.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Float32

from pixsigma_jax import tree
from pixsigma_jax.train.tensors import View, view

MOMENTUM_DTYPES = ("float32", "bfloat16")


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


def scale_by_came(
  *,
  b1: float,
  b2: float,
  b3: float,
  eps: tuple[float, float],
  clip_threshold: float,
  momentum_dtype: str,
) -> optax.GradientTransformation:
  """CAME's update, before learning rate and weight decay.

  There is no bias correction: in the first steps matrices move by about eleven times
  the learning rate, vectors by a tenth of it.

  Args:
    b1, b2, b3: decay of the momentum, of the squares, of the squared surprises.
    eps: what is added to the squares and to the squared surprises.
    clip_threshold: root mean square that a tensor's update is cut down to before it
      enters the momentum.
    momentum_dtype: what the momentum is kept in, `float32` or `bfloat16`. Updates are
      computed in float32 from what was kept; bfloat16 halves the optimizer's memory.

  Raises:
    ValueError: a decay is not between 0 and 1, the threshold is not positive, or an
      unknown dtype.
  """
  decays = {"b1": b1, "b2": b2, "b3": b3}
  for name, decay in decays.items():
    if not 0 <= decay < 1:
      raise ValueError(f"optimizer.{name}={decay} must be at least 0 and below 1.")
  if clip_threshold <= 0:
    raise ValueError(f"optimizer.clip_threshold={clip_threshold} must be above 0.")
  if momentum_dtype not in MOMENTUM_DTYPES:
    raise ValueError(
      f"Unknown optimizer.momentum_dtype {momentum_dtype!r}; choose "
      f"{' or '.join(map(repr, MOMENTUM_DTYPES))}."
    )

  def start(seen: View, leaf: Any) -> Factored | Full:
    shape = jax.eval_shape(seen.into, leaf).shape
    if len(shape) - seen.stacked < 2:
      return Full(jnp.zeros(shape, jnp.float32))
    row = jnp.zeros(shape[:-1], jnp.float32)
    column = jnp.zeros((*shape[:-2], shape[-1]), jnp.float32)
    return Factored(row, column, row, column)

  def init(params: Any) -> CameState:
    return CameState(
      momentum=jax.tree.map(lambda x: jnp.zeros(x.shape, momentum_dtype), params),
      statistics=tree.map_with_name(lambda name, x: start(view(name), x), params),
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
      seen = view(name)
      step = jax.vmap(one_tensor) if seen.stacked else one_tensor
      found, kept, statistics = step(
        seen.into(gradient.astype(jnp.float32)),
        seen.into(momentum.astype(jnp.float32)),
        statistics,
      )
      kept = seen.back(kept, gradient).astype(momentum_dtype)
      rows.append((seen.back(found, gradient), kept, statistics))
    found, momentum, statistics = (
      structure.unflatten(c) for c in zip(*rows, strict=True)
    )
    return found, CameState(momentum, statistics)

  return optax.GradientTransformation(init, update)


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
