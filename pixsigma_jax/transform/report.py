"""Report of a transform's changes to a model: config, metadata, every leaf."""

import collections
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from pixsigma_jax import tree
from pixsigma_jax.metadata import disagreements
from pixsigma_jax.transforms import Model

_SEGMENT = re.compile(r"(blocks_\d+_\d+)/(.*)")


def report(have: Model, want: Model) -> list[str]:
  """Every difference between two models, a line each, and a line of counts.

  `config.…` and `metadata.…` say old → new. Of the leaves, `- name float32[3]` stands
  only in `have`, `+ …` only in `want`, `~ …` in both, with other numbers or another
  shape; `= …` are stacks of blocks that were cut or joined, every layer as it was.
  Norms are Euclidean.
  """
  lines = [
    *(
      f"config.{line}"
      for line in disagreements(have.config.to_dict(), want.config.to_dict())
    ),
    *(f"metadata.{line}" for line in disagreements(_about(have), _about(want))),
  ]
  if have.null_caption is not None and want.null_caption is None:
    lines.append('null caption: dropped; it is what the text encoder makes of ""')

  old, new = tree.named_leaves(have.params), tree.named_leaves(want.params)
  stacks, moved = _regrouped(old, new)
  lines += stacks
  for name, leaf in old.items():
    if name not in new and name not in moved:
      lines.append(f"- {_named(name, leaf)}")
  shared = equal = 0
  for name, leaf in new.items():
    if name in moved:
      continue
    if name not in old:
      lines.append(f"+ {_named(name, leaf)}, norm {_norm(leaf):.4g}")
    elif leaf is old[name]:
      shared += 1
    elif leaf.shape != old[name].shape:
      norms = f"norm {_norm(old[name]):.4g} → {_norm(leaf):.4g}"
      lines.append(f"~ {_named(name, old[name])} → {list(leaf.shape)}, {norms}")
    elif change := _norm(np.asarray(leaf) - np.asarray(old[name])):
      norm = _norm(old[name])
      lines.append(f"~ {_named(name, leaf)}, norm {norm:.4g} changed by {change:.4g}")
    else:
      equal += 1
  lines.append(
    f"{len(new)} leaves: {shared} shared, {equal} copied as they were, "
    f"{len(new) - shared - equal} others; "
    f"{tree.size(have.params):,} → {tree.size(want.params):,} parameters"
  )
  return lines


def _about(model: Model) -> dict[str, Any]:
  fields = dataclasses.asdict(model.metadata)
  # The one stands above, the other is the file's.
  return {k: v for k, v in fields.items() if k not in ("model", "provenance")}


def _regrouped(
  old: Mapping[str, Any], new: Mapping[str, Any]
) -> tuple[list[str], set[str]]:
  """Lines on stacks that were cut or joined, and the leaves that these speak of."""
  parts = [_by_part(leaves) for leaves in (old, new)]
  moved: set[str] = set()
  counts: collections.Counter[str] = collections.Counter()
  for part, before in parts[0].items():
    after = parts[1].get(part, {})
    if list(before) == list(after) or not after:
      continue
    if np.array_equal(_joined(before), _joined(after)):
      counts[f"{', '.join(before)} → {', '.join(after)}"] += 1
      moved |= {f"{stack}/{part}" for stack in (*before, *after)}
  lines = [
    f"= {stacks}: {count} leaves regrouped, every layer as it was"
    for stacks, count in counts.items()
  ]
  return lines, moved


def _by_part(leaves: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """`attention/qkv/kernel` → its leaf in each stack, in the order of the layers."""
  found: dict[str, dict[str, Any]] = collections.defaultdict(dict)
  for name in sorted(leaves):
    if match := _SEGMENT.fullmatch(name):
      found[match[2]][match[1]] = leaves[name]
  return found


def _joined(stacks: Mapping[str, Any]) -> np.ndarray:
  return np.concatenate([np.asarray(leaf) for leaf in stacks.values()])


def _named(name: str, leaf: Any) -> str:
  return f"{name} {leaf.dtype}{list(leaf.shape)}"


def _norm(leaf: Any) -> float:
  return float(np.linalg.norm(np.asarray(leaf).ravel()))
