"""Averages the parameters of several models of one shape."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pixsigma_jax.metadata import disagreements
from pixsigma_jax.models.pixart import PixArtConfig


def average(
  config: PixArtConfig,
  params: Any,
  *,
  others: Sequence[Any],  # no type of items: a check would read one more
  weights: Sequence[float] = (),
) -> tuple[PixArtConfig, Any]:
  """The weighted mean of a model and `others`, as p_0 + Σ w_i (p_i - p_0).

  In that form a leaf that is the same in all models comes out as it was, to the bit.

  Args:
    others: hyper-parameters and parameters of the others; each is looked up once, one
      after the other, so that a sequence may read them as it is asked.
    weights: of the model itself and of each of the others, in sum 1; those below 0
      move away from a model. Empty: all weigh the same.

  Returns:
    The hyper-parameters and the mean; leaves that are the same in all are shared.

  Raises:
    ValueError: there are no others, the models differ in their hyper-parameters, or
      the weights do not fit.
  """
  count = 1 + len(others)
  if count == 1:
    raise ValueError("average has nothing to average with: name others.")
  weights = weights or [1 / count] * count
  if len(weights) != count:
    raise ValueError(
      f"average has {len(weights)} weights for {count} models: the first is of the "
      "model itself, the others follow in their order."
    )
  # The sum of 1/3 in six digits must pass, a forgotten weight must not.
  if not math.isclose(sum(weights), 1, abs_tol=1e-4):
    raise ValueError(
      f"The weights {', '.join(map(str, weights))} sum to {sum(weights):g}: they must "
      "sum to 1, or the mean is smaller or larger than its parts."
    )
  change = jax.tree.map(jnp.zeros_like, params)
  for number, weight in enumerate(weights[1:], 1):
    other_config, other = others[number - 1]
    if lines := disagreements(config.to_dict(), other_config.to_dict()):
      raise ValueError(
        f"Model {number} of the others has other hyper-parameters than the first: "
        f"{'; '.join(lines)}. Transform the one or the other before."
      )
    change = _moved(change, params, other, weight)
  mean, differs = _added(params, change)
  return config, jax.tree.map(
    lambda old, new, differ: new if differ else old, params, mean, differs
  )


# Each compiled in one: leaf by leaf would take longer.
@functools.partial(jax.jit, donate_argnums=0)
def _moved(change: Any, params: Any, other: Any, weight: Any) -> Any:
  return jax.tree.map(lambda c, a, b: c + weight * (b - a), change, params, other)


@jax.jit
def _added(params: Any, change: Any) -> tuple[Any, Any]:
  """The sum, and for each leaf whether it has changed."""
  return jax.tree.map(jnp.add, params, change), jax.tree.map(jnp.any, change)
