"""The mesh, and one visible table of rules that shard arrays over it.

The mesh's axes are those of `mesh_axes.py`. Parameters stay a plain tree of arrays; a
parameter's place follows from its name, and state that is shaped like its parameter
lies where that does.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pixsigma_jax import tree
from pixsigma_jax.mesh_axes import AXES, CONTEXT, DATA, FSDP, GUIDANCE, ROWS

CHOSEN = 0  # the size of an axis that is left to `choose_axes`

# Name of a parameter → the logical axes of its last dimensions; dimensions before them,
# such as the layers of a scanned stack, stay whole. The first match counts. A matrix is
# split over `fsdp` along the axis of its input (1152 of XL/2's width is a multiple of 8
# and 16, not of 64: facts of XLA's tiling make fsdp=8 the best degree).
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (r"/(down|up|magnitude)$", ()),  # of an adapter: too small to be worth gathering
  (r"mlp/out/kernel$", ("hidden", None)),
  (r"caption_projection/in/kernel$", ("caption", None)),
  (r"patch_embedding/kernel$", ("embed",)),
  (r"timestep_embedding/in/kernel$", (None, "embed")),
  (r"size_conditions/.*kernel$", ()),
  (r"kv_compressor/kernel$", ()),
  (r"kernel$", ("embed", None)),
  (r"(bias|scale|scale_shift_table)$", ()),
)
MESH_AXIS: dict[str | None, str | None] = {
  None: None,
  "embed": FSDP,
  "hidden": FSDP,
  "caption": FSDP,
}

# Arrays of a batch, to train on or to draw, that have an image's tokens on this axis.
_TOKEN_AXIS = {
  **dict.fromkeys(("latents", "latent_moments", "coordinates", "noise"), 1),
  **dict.fromkeys(("original", "original_noise", "redrawn"), 1),
  "areas": 2,
}


def make_mesh(
  *,
  data: int,
  fsdp: int,
  context: int,
  guidance: int | None = None,
  devices: Sequence[Any] | None = None,
) -> Mesh:
  """A mesh over all devices; one axis may be -1, which takes what the others leave.

  Args:
    guidance: see `mesh_axes.SAMPLING_AXES`; None for a mesh without that axis.

  Raises:
    ValueError: the axes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  branches = {} if guidance is None else {GUIDANCE: guidance}
  sizes = _covering(
    {DATA: data, FSDP: fsdp, **branches, CONTEXT: context}, len(devices)
  )
  arranged = mesh_utils.create_device_mesh(
    tuple(sizes.values()), devices, allow_split_physical_axes=_splits(devices)
  )
  # Auto, because Linen layers under Explicit axes refuse FSDP-sharded parameters.
  return Mesh(arranged, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def split_length(longest: int, context: int, window: tuple[int, int]) -> int:
  """Tokens that sequences are padded to, so that `context` splits them evenly.

  Each part has whole windows, and merges its keys and values by itself.
  """
  unit = context * math.prod(window) if context > 1 else 1
  return -(-longest // unit) * unit


def _splits(devices: Sequence[Any]) -> bool:
  """Whether an axis may take part of a side of the chips' grid, as (4, 8, 2) over 8x8.

  `jax.make_mesh` lets it on v5e alone.
  """
  return devices[0].platform == "tpu"


def _covering(sizes: Mapping[str, int], count: int) -> dict[str, int]:
  """The sizes, with -1 replaced by the rest of `count` devices."""
  sizes = dict(sizes)
  free = [axis for axis, size in sizes.items() if size == -1]
  known = math.prod(size for size in sizes.values() if size != -1)
  if len(free) == 1 and known > 0 and count % known == 0:
    sizes[free[0]] = count // known
  if min(sizes.values()) < 1 or math.prod(sizes.values()) != count:
    raise ValueError(
      f"Mesh {sizes} does not cover {count} devices: the axes must multiply to that "
      "number, and at most one of them may be -1."
    )
  return sizes


def choose_axes(
  count: int,
  *,
  slices: int,
  data: int,
  fsdp: int,
  context: int,
  batch_size: int,
  width: int,
) -> tuple[dict[str, int], str]:
  """Sizes for the axes that are 0, and why; -1 still takes what the others leave.

  `context` is 1 as long as each device has a row of its own: splitting a batch costs
  nothing, splitting an image's tokens gathers keys and values. `fsdp` is 8, or the
  nearest below that leaves whole tiles: within a slice, where parameters are gathered
  at every step. What remains is `data`, the only axis that crosses slices.

  Args:
    count: devices.
    slices: groups of devices with a fast network, see `make_mesh_of_slices`.
    batch_size: rows that are computed at once, over all devices.
    width: of the network, the axis that `fsdp` splits.
  """
  sizes = {DATA: data, FSDP: fsdp, CONTEXT: context}
  if CHOSEN not in sizes.values():
    return sizes, "as configured"
  reasons = []
  within = count // slices
  if context == CHOSEN:
    rows = max(data, 1) * max(fsdp, 1)  # at least
    fitting = [
      size
      for size in range(1, within + 1)
      if within % size == 0
      and batch_size % (count // size) == 0
      and (count // size) % rows == 0
    ]
    context = sizes[CONTEXT] = min(fitting, default=1)
    reasons.append(
      f"context {context}, as a batch of {batch_size} gives its rows to "
      f"{count // context} of {count} devices"
    )
  if fsdp == CHOSEN and data > 0:
    sizes[FSDP] = -1
    reasons.append("fsdp has what data leaves")
  elif fsdp == CHOSEN:
    # Beyond 8 shards a step is no faster.
    left = within // max(context, 1)
    fitting = (f for f in (8, 4, 2) if left % f == 0 and has_whole_tiles(width, f))
    sizes[FSDP] = next(fitting, 1)
    reasons.append(f"fsdp {sizes[FSDP]}, as matrices have {width} rows")
  if data == CHOSEN:
    sizes[DATA] = -1
    reasons.append("data has the rest")
  return sizes, "; ".join(reasons)


def has_whole_tiles(width: int, fsdp: int) -> bool:
  """Whether shards of a matrix have whole tiles of 16 rows, or are no shards.

  Where they have not, XLA emulates their gathering by sums.
  """
  return fsdp == 1 or width % (16 * fsdp) == 0


def sizes_over_slices(
  count: int,
  *,
  slices: int,
  data: int,
  fsdp: int,
  context: int,
  batch_size: int,
  width: int,
) -> tuple[dict[str, int], str]:
  """All axes' sizes on so many devices, see `make_mesh_of_slices`, and why.

  Raises:
    ValueError: the axes do not cover the devices, or do not fit into the slices.
  """
  sizes, why = choose_axes(
    count,
    slices=slices,
    data=data,
    fsdp=fsdp,
    context=context,
    batch_size=batch_size,
    width=width,
  )
  sizes = _covering(sizes, count)
  if sizes[DATA] % slices:
    raise ValueError(
      f"Mesh {sizes} does not fit {slices} slices of {count // slices} devices: fsdp × "
      f"context must lie within a slice, so that data is a multiple of {slices}."
    )
  return sizes, why


def make_mesh_of_slices(
  *,
  slices: int,
  data: int,
  fsdp: int,
  context: int,
  devices: Sequence[Any],
  batch_size: int,
  width: int,
) -> Mesh:
  """The mesh of a training run: `make_mesh` over groups of devices, by rule if wished.

  Devices of a slice reach each other by a fast network (a TPU's interconnect, NVLink),
  those of several by a slow one. `data` goes over slices first: a gradient crosses the
  slow network once a step, parameters never do.

  Args:
    slices: into how many the devices fall; 0 for as many as they themselves say. Where
      they do not say, those that follow each other belong together.
    data, fsdp, context: size of an axis over all slices; -1 for what the others leave;
      0 for what `choose_axes` finds best, which is logged.
    devices: of all processes.
    batch_size: rows that are computed at once.
    width: of the network.

  Raises:
    ValueError: the axes do not cover the devices, or do not fit into the slices.
  """
  told = len({getattr(device, "slice_index", None) or 0 for device in devices})
  if slices == CHOSEN:
    slices = told
  if slices < 1 or len(devices) % slices or (told > 1 and slices != told):
    raise ValueError(
      f"config.mesh.slices={slices} does not fit {len(devices)} devices in {told} "
      f"slices: set it to {told}, or to {CHOSEN} for as many as there are."
    )
  sizes, why = sizes_over_slices(
    len(devices),
    slices=slices,
    data=data,
    fsdp=fsdp,
    context=context,
    batch_size=batch_size,
    width=width,
  )
  if slices == 1:
    mesh = make_mesh(**sizes, devices=devices)
  else:
    mesh = Mesh(
      _over_slices(sizes, slices, devices, told), AXES, axis_types=(AxisType.Auto,) * 3
    )
  if why != "as configured":
    logging.info("Chose the mesh %s: %s.", dict(mesh.shape), why)
  return mesh


def _over_slices(
  sizes: Mapping[str, int], slices: int, devices: Sequence[Any], told: int
) -> np.ndarray:
  """Devices by their place in the mesh, `data` over slices first."""
  shape = (sizes[DATA] // slices, sizes[FSDP], sizes[CONTEXT])
  if told == 1:
    each = len(devices) // slices
    groups = [devices[start : start + each] for start in range(0, len(devices), each)]
    return np.concatenate([np.array(group).reshape(shape) for group in groups])
  return mesh_utils.create_hybrid_device_mesh(
    shape,
    (slices, 1, 1),
    devices=devices,
    allow_split_physical_axes=_splits(devices),
  )


def mesh_of_rows(batch_size: int, devices: Sequence[Any] | None = None) -> Mesh | None:
  """All devices for the rows of a batch; None if they cannot share it evenly.

  Args:
    devices: None for those of all processes.
  """
  devices = jax.devices() if devices is None else devices
  if len(devices) == 1 or batch_size % len(devices):
    return None
  return make_mesh(data=-1, fsdp=1, context=1, devices=devices)


def single_device_mesh() -> Mesh:
  """A mesh of this process's first device alone."""
  return make_mesh(data=1, fsdp=1, context=1, devices=jax.local_devices()[:1])


def shardings(params: Any, mesh: Mesh | AbstractMesh) -> Any:
  """A `NamedSharding` for every parameter.

  Raises:
    ValueError: a parameter that no rule names, or that its mesh axis does not divide.
  """

  def place(name: str, leaf: Any) -> NamedSharding:
    if not leaf.shape:
      return NamedSharding(mesh, P())
    logical = next((axes for rule, axes in RULES if re.search(rule, name)), None)
    if logical is None:
      raise ValueError(
        f"No sharding rule names the parameter {name!r} of shape {leaf.shape}; add one "
        "to pixsigma_jax/sharding.py."
      )
    axes = [MESH_AXIS[axis] for axis in logical]
    spec = [None] * (len(leaf.shape) - len(axes)) + axes
    for size, axis in zip(leaf.shape, spec, strict=True):
      if axis and size % mesh.shape[axis]:
        raise ValueError(
          f"The parameter {name!r} of shape {leaf.shape} cannot be split: mesh axis "
          f"{axis}={mesh.shape[axis]} does not divide {size}."
        )
    return NamedSharding(mesh, P(*spec))

  return tree.map_with_name(place, params)


def state_shardings(state: Any, mesh: Mesh | AbstractMesh, *params: Any) -> Any:
  """A `NamedSharding` for every leaf of a tree that is built around parameters.

  A leaf whose path ends in the name of a parameter and whose shape is that parameter's
  lies as it does: the parameters themselves, averages, momenta. All else is whole on
  every device: counters, keys, and statistics that are factored into a row and a column
  of each matrix, less than a hundredth of it.

  Args:
    state: such as a train state or an optimizer's.
    params: the trees of parameters that it is built around.

  Raises:
    ValueError: see `shardings`.
  """
  known: dict[str, tuple[Any, NamedSharding]] = {}
  for own in params:
    places = tree.named_leaves(shardings(own, mesh))
    known |= {
      name: (leaf.shape, places[name]) for name, leaf in tree.named_leaves(own).items()
    }

  def place(name: str, leaf: Any) -> NamedSharding:
    parts = name.split("/")
    endings = ("/".join(parts[start:]) for start in range(len(parts)))
    shape, sharding = next((known[e] for e in endings if e in known), (None, None))
    if sharding is not None and shape == leaf.shape:
      return sharding
    return NamedSharding(mesh, P())

  return tree.map_with_name(place, state)


def placed(abstract_tree: Any, places: Any) -> Any:
  """Shapes and dtypes with the `shardings` that they are to be read or made onto."""
  return jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
    abstract_tree,
    places,
  )


def batch_shardings(
  batch: Mapping[str, Any], mesh: Mesh | AbstractMesh
) -> dict[str, NamedSharding]:
  """Shardings of a batch: rows over `data` and `fsdp`, tokens over `context`.

  Captions have all their tokens everywhere: they are few.
  """

  def place(name: str) -> NamedSharding:
    if name not in _TOKEN_AXIS:
      return NamedSharding(mesh, P(ROWS))
    whole = [None] * (_TOKEN_AXIS[name] - 1)
    return NamedSharding(mesh, P(ROWS, *whole, CONTEXT))

  return {name: place(name) for name in batch}


def replicated(mesh: Mesh) -> NamedSharding:
  """Sharding with a copy on every device."""
  return NamedSharding(mesh, P())


@functools.cache
def batch_part(mesh: Mesh, process_index: int) -> tuple[int, int]:
  """Index of the part of a batch's rows that a process holds, and number of parts.

  Processes that share the tokens of the same images hold the same part. The rows of a
  part need not follow each other on the mesh: a TPU's host has chips in a square.

  Raises:
    ValueError: parts overlap, or differ in size.
  """
  rows = mesh.devices.reshape(-1, mesh.shape[CONTEXT])
  held: dict[int, set[int]] = {}
  for row, devices in enumerate(rows):
    for device in devices:
      held.setdefault(device.process_index, set()).add(row)
  parts = sorted({tuple(sorted(part)) for part in held.values()})
  if sum(map(len, parts)) != len(rows) or len({len(part) for part in parts}) != 1:
    raise ValueError(
      f"On the mesh {dict(mesh.shape)} processes share some rows of a batch and not "
      "others: make context a divisor or a multiple of the devices of a process."
    )
  return parts.index(tuple(sorted(held[process_index]))), len(parts)


def global_batch(
  local: Mapping[str, np.ndarray], places: Mapping[str, NamedSharding]
) -> dict[str, jax.Array]:
  """Global batch from this process's part of the rows.

  Each row comes with all its tokens, of which a process takes those that it holds.
  """
  mesh = next(iter(places.values())).mesh
  assert isinstance(mesh, Mesh)
  _, parts = batch_part(mesh, jax.process_index())
  return {
    name: jax.make_array_from_process_local_data(
      places[name], rows, (len(rows) * parts, *rows.shape[1:])
    )
    for name, rows in local.items()
  }
