"""Step caching: steps that reuse what most blocks added in an earlier one.

Between neighbouring steps a network's input changes little, and what its blocks add to
the residual stream less. The first block is always computed. While the relative L1
change of what it adds, against the last step that was computed whole, stays below a
threshold, what all other blocks added then is added again. This is the "first block
cache" of ParaAttention (2024), which judges a step as TeaCache does (Liu et al. 2024,
arXiv:2411.19108, equation 3), but by the block's output and not by a fit of its input.

Every image has its own decision, so that it does not depend on its neighbours; a
batch spares the work where all of its images agree. Both halves of guidance have
one: guidance multiplies their difference, and halves of different steps would differ by
what has changed between the steps too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Computed(NamedTuple):
  """Steps computed whole: `[b]` that each image asked for, and that any of them did."""

  images: Any
  batch: Any


class Memory(NamedTuple):
  """State of step caching that a solver's scan carries.

  Attributes:
    first, rest: `[passes rows n d]`, what the first block and all others added in the
      step of each image that was computed last.
    computed: how many were so far.
  """

  first: Any
  rest: Any
  computed: Computed


def nothing_yet(shape: tuple[int, int, int, int], images: int) -> Memory:
  """Initial state, with which every threshold computes the first step."""
  zeros = jnp.zeros(shape, jnp.float32)
  return Memory(zeros, zeros, Computed(jnp.zeros(images, jnp.int32), jnp.int32(0)))


def add_rest(
  memory: Memory,
  x: Float[Array, "p r n d"],
  first: Float[Array, "p r n d"],
  rest: Callable[[], Array],
  mask: Bool[Array, "b n"],
  threshold: Float[Array, ""],
) -> tuple[Float[Array, "p r n d"], Memory]:
  """Output of the last block, computed or estimated from the cache.

  Args:
    x: what the first block returned: halves of guidance, and images in each, laid out
      over passes p and rows r of them.
    first: what it added.
    rest: computes what the other blocks add to `x`.
    mask: True for a token of the image; padding decides nothing.
    threshold: of the relative change below which the memory is good enough.
  """

  def size(added: Array) -> Float[Array, " b"]:
    halves = added.reshape(-1, *mask.shape, added.shape[-1])
    valid = mask.reshape(1, *mask.shape, 1)
    return jnp.abs(jnp.where(valid, halves, 0)).sum(axis=(0, 2, 3))

  stale = size(first - memory.first) >= threshold * size(memory.first)
  added = jax.lax.cond(stale.any(), rest, lambda: memory.rest)
  passes, rows = x.shape[:2]
  chosen = jnp.tile(stale, passes * rows // len(stale)).reshape(passes, rows, 1, 1)
  added = jnp.where(chosen, added, memory.rest)
  return x + added, Memory(
    first=jnp.where(chosen, first, memory.first),
    rest=added,
    computed=jax.tree.map(
      lambda count, more: count + more.astype(jnp.int32),
      memory.computed,
      Computed(stale, stale.any()),
    ),
  )
