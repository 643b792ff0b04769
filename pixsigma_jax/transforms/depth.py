"""Makes a model deeper by blocks that change nothing at first."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pixsigma_jax.models.pixart import PixArtConfig, segment_name

# The last map of each branch of a block. Zeros in the gates of attention and MLP would
# not do: the timestep's modulation is added to them, and cross-attention has no gate.
_LAST_MAPS = (("attention", "out"), ("cross_attention", "out"), ("mlp", "out"))


def grow_depth(
  config: PixArtConfig, params: Any, *, depth: int, layers: tuple[int, ...] = ()
) -> tuple[PixArtConfig, Any]:
  """Inserts copies of blocks that add nothing to what they are given.

  A copy stands right after its block and is it, except that the last map of
  self-attention, of cross-attention and of the MLP is zero, kernel and bias. So the
  network's output is the parent's to the bit, and these maps learn from the first step,
  all others from the second ("block expansion", LLaMA Pro, arXiv 2401.02415, section
  3.2). A copy of a block that compresses keys and values compresses too.

  Args:
    depth: number of blocks afterwards; 42 makes a PixArt-Σ one of 900M parameters.
    layers: numbers of the blocks, from 0, that are copied, one for each new block; the
      same number several times for several copies. By default evenly spread.

  Returns:
    The new hyper-parameters and tree; leaves outside the blocks are shared.

  Raises:
    ValueError: the depth is not larger, there are more or fewer layers than new blocks,
      or a layer that the model does not have.
    ValueError: the model drops keys at random, by draws that its depth changes.
  """
  added = depth - config.depth
  if added < 1:
    raise ValueError(
      f"depth={depth} must be above the {config.depth} blocks that the model has."
    )
  if (
    config.kv_compression.operator == "random_discard" and config.kv_compression.layers
  ):
    raise ValueError(
      "The model discards keys and values at random, and more blocks draw others: "
      "grow_depth could not leave its output as it is. Remove the compression first "
      "(remove_kv_compression)."
    )
  layers = tuple(layers) or tuple(
    -(-(i + 1) * config.depth // added) - 1 for i in range(added)
  )
  if len(layers) != added:
    raise ValueError(
      f"depth={depth} has {added} blocks more than the model, and layers names "
      f"{len(layers)}: name one block to copy for each, or none."
    )
  if unknown := [layer for layer in layers if not 0 <= layer < config.depth]:
    raise ValueError(
      f"layers names {', '.join(map(str, unknown))}, but blocks are 0 … "
      f"{config.depth - 1}."
    )

  # Of each block afterwards, which it was; a copy comes after its original.
  origins = sorted([*range(config.depth), *layers])
  compression = dataclasses.replace(
    config.kv_compression,
    layers=tuple(
      i for i, origin in enumerate(origins) if origin in config.kv_compression.layers
    ),
  )
  target = dataclasses.replace(config, depth=depth, kv_compression=compression)
  params = dict(params)
  for (old, _), (new, _) in zip(config.segments(), target.segments(), strict=True):
    stack = params.pop(segment_name(old))
    params[segment_name(new)] = _with_copies(
      stack, np.array([origins[i] - old.start for i in new])
    )
  return target, params


def _with_copies(stack: Mapping[str, Any], origins: np.ndarray) -> dict[str, Any]:
  """Blocks `origins` of a stack; one that came before is given zeros as last maps."""
  if len(np.unique(origins)) == len(origins):  # no copies: shared as it is
    return dict(stack)
  copied = np.flatnonzero(np.diff(origins, prepend=-1) == 0)
  grown = jax.tree.map(lambda leaf: jnp.asarray(leaf)[origins], dict(stack))
  for branch, last in _LAST_MAPS:
    zeroed = jax.tree.map(lambda leaf: leaf.at[copied].set(0), grown[branch][last])
    grown[branch] = {**grown[branch], last: zeroed}
  return grown
