"""Which device holds which part: the mesh, and one visible table of rules.

Mesh axes: `data`, replicas of the model; `fsdp`, shards of its parameters, which also
split the batch; `context`, shards of the token axis for 2K images and above.
Parameters stay a plain tree of arrays; a leaf's place follows from its name.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pixsigma_jax import tree

AXES = ("data", "fsdp", "context")

# Name of a leaf → the logical axes of its last dimensions; dimensions before them, such
# as the layers of a scanned stack, stay whole. The first match counts. A leaf is split
# over `fsdp` along one axis, that of the input of its matrix (1152 of XL/2's width is a
# multiple of 8 and 16, not of 64: facts of XLA's tiling make fsdp=8 the best degree).
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (r"/(surprise_)?(row|column)$", ()),  # CAME's statistics, a row or column a matrix
  (r"/square$", ()),
  (r"mlp/out/kernel$", ("hidden", None)),
  (r"caption_projection/in/kernel$", ("caption", None)),
  (r"patch_embedding/kernel$", ("embed",)),
  (r"timestep_embedding/in/kernel$", (None, "embed")),
  (r"size_conditions/.*kernel$", ()),
  (r"kv_compressor/kernel$", ()),
  (r"kernel$", ("embed", None)),
  (r"(bias|scale|scale_shift_table)$", ()),
  (r"(^|/)(step|key|count|null_caption)$", ()),
)
MESH_AXIS: dict[str | None, str | None] = {
  None: None,
  "embed": "fsdp",
  "hidden": "fsdp",
  "caption": "fsdp",
}

# Arrays of a batch whose second axis is the image's tokens.
_TOKEN_ARRAYS = ("latents", "latent_moments", "coordinates")


def make_mesh(
  *, data: int, fsdp: int, context: int, devices: Sequence[Any] | None = None
) -> Mesh:
  """A mesh over all devices; one axis may be -1, which takes what the others leave.

  Raises:
    ValueError: the axes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = {"data": data, "fsdp": fsdp, "context": context}
  free = [axis for axis, size in sizes.items() if size == -1]
  known = int(np.prod([size for size in sizes.values() if size != -1]))
  if len(free) == 1 and known > 0 and len(devices) % known == 0:
    sizes[free[0]] = len(devices) // known
  if any(size < 1 for size in sizes.values()) or np.prod(list(sizes.values())) != len(
    devices
  ):
    raise ValueError(
      f"Mesh {sizes} does not cover {len(devices)} devices: the axes must multiply to "
      "that number, and at most one of them may be -1."
    )
  # Auto, because Linen layers under Explicit axes refuse FSDP-sharded parameters.
  return jax.make_mesh(
    tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
  )


def single_device_mesh() -> Mesh:
  """A mesh of this process's first device alone."""
  return make_mesh(data=1, fsdp=1, context=1, devices=jax.local_devices()[:1])


def shardings(abstract_tree: Any, mesh: Mesh | AbstractMesh) -> Any:
  """A `NamedSharding` for every leaf of parameters or of a train state.

  Raises:
    ValueError: a leaf that no rule names, or one that its mesh axis does not divide.
  """

  def place(name: str, leaf: Any) -> NamedSharding:
    if not leaf.shape:
      return NamedSharding(mesh, P())
    logical = next((axes for rule, axes in RULES if re.search(rule, name)), None)
    if logical is None:
      raise ValueError(
        f"No sharding rule names the leaf {name!r} of shape {leaf.shape}; add one to "
        "pixsigma_jax/sharding.py."
      )
    axes = [MESH_AXIS[axis] for axis in logical]
    spec = [None] * (len(leaf.shape) - len(axes)) + axes
    for size, axis in zip(leaf.shape, spec, strict=True):
      if axis and size % mesh.shape[axis]:
        raise ValueError(
          f"The leaf {name!r} of shape {leaf.shape} cannot be split: mesh axis "
          f"{axis}={mesh.shape[axis]} does not divide {size}."
        )
    return NamedSharding(mesh, P(*spec))

  return tree.map_with_name(place, abstract_tree)


def placed(abstract_tree: Any, places: Any) -> Any:
  """Shapes and dtypes with the `shardings` that they are to be read or made onto."""
  return jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
    abstract_tree,
    places,
  )


def batch_shardings(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
  """Rows over `data` and `fsdp` together, tokens over `context`."""
  rows = ("data", "fsdp")
  return {
    name: NamedSharding(mesh, P(rows, "context") if name in _TOKEN_ARRAYS else P(rows))
    for name in batch
  }


def replicated(mesh: Mesh) -> NamedSharding:
  """The same on every device."""
  return NamedSharding(mesh, P())


def global_batch(
  local: Mapping[str, np.ndarray], places: Mapping[str, NamedSharding]
) -> dict[str, jax.Array]:
  """This process's rows, put where they belong in the global batch."""
  return {
    name: jax.make_array_from_process_local_data(places[name], rows)
    for name, rows in local.items()
  }
