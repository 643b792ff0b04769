"""Trees of parameters seen as paths: names of leaves, maps by name, differences."""

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32


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
  """Total number of elements in all leaves."""
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def differences(have: Any, want: Any) -> list[str]:
  """Differences of two trees of arrays in name, shape and dtype, a line each.

  `- name float32[3]` stands only in `have`, `+ …` only in `want`.
  """

  def lines(tree: Any) -> dict[str, None]:
    leaves = named_leaves(tree)
    return {f"{name} {x.dtype}{list(x.shape)}": None for name, x in leaves.items()}

  have_lines, want_lines = lines(have), lines(want)
  return [f"- {line}" for line in have_lines if line not in want_lines] + [
    f"+ {line}" for line in want_lines if line not in have_lines
  ]


def fingerprint(tree: Any) -> str:
  """A hash of names, shapes, dtypes and every bit of the arrays in a tree.

  It does not depend on how arrays are spread over devices: each number is hashed with
  its place, and integers sum to the same in any order. One pass over the memory; of
  arrays that several processes share, all must ask for it.
  """
  meshes = [
    leaf.sharding.mesh
    for leaf in jax.tree.leaves(tree)
    if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding)
  ]
  # Every process needs the sums.
  place = NamedSharding(meshes[0], PartitionSpec()) if meshes else None
  checksums = jax.jit(lambda tree: jax.tree.map(_checksum, tree), out_shardings=place)
  sums = jax.device_get(checksums(tree))
  digest = hashlib.sha256()
  for (name, leaf), found in zip(
    named_leaves(tree).items(), jax.tree.leaves(sums), strict=True
  ):
    about = f"{name} {leaf.dtype}{list(leaf.shape)} {found.tolist()}\n"
    digest.update(about.encode())
  return digest.hexdigest()[:16]


def _checksum(leaf: Any) -> UInt32[Array, " 2"]:
  """Two sums of hashed numbers, modulo 2^32."""
  leaf = jnp.asarray(leaf)
  size = leaf.dtype.itemsize
  unsigned = jnp.dtype(f"uint{8 * min(size, 4)}")
  if leaf.dtype == bool:
    words = leaf.astype(jnp.uint32)
  else:
    words = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
  place = jnp.zeros(words.shape, jnp.uint32)
  stride = 1
  for axis in reversed(range(words.ndim)):
    along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    place += along * np.uint32(stride % 2**32)
    stride *= words.shape[axis]
  mixed = _mixed(words ^ _mixed(place + np.uint32(0x9E3779B9)))
  again = _mixed(mixed + np.uint32(0x85EBCA77))
  return jnp.stack([jnp.sum(x, dtype=jnp.uint32) for x in (mixed, again)])


def _mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
  """MurmurHash3's finalizer: a bijection in which each bit moves all others."""
  x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
