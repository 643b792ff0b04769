"""Devices that draw an image together: their mesh, and how an image is padded for it.

Rows of a batch go over `data`, the branches of guidance over `guidance`, which exchange
nothing but their predictions, and the tokens of an image over `context`, whose devices
exchange keys and values, or tokens for heads, in every layer (`models/attention.py`).
All of it is exact: nothing of another step is used, and only sums change their order.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from pixsigma_jax import sharding
from pixsigma_jax.mesh_axes import AXES, CONTEXT, DATA, FSDP, GUIDANCE
from pixsigma_jax.models.pixart import PixArtConfig
from pixsigma_jax.models.tokens import Grid

MESH_HELP = (
  "Devices that draw together: auto, none, or sizes of data (images of a batch), "
  "guidance (its branches) and context (an image's tokens), as context=4,guidance=2."
)
_AXES = (DATA, GUIDANCE, CONTEXT)

# Sequences are padded to a multiple of this share of the training grid's tokens: the
# buckets of a resolution, all near the same area, share two or three programs.
_LENGTHS_PER_GRID = 16

# Tokens of an image below which a device computes for less time than it waits for
# others: an image of 256 px.
_TOKENS_OF_A_DEVICE = 256


def mesh_of(
  asked: str,
  *,
  batch_size: int,
  tokens: int,
  branches: int,
  devices: Sequence[Any] | None = None,
) -> Mesh | None:
  """The mesh that `--mesh` asks for; None for one device.

  `auto` gives images of a batch devices of their own first, then branches of guidance,
  then tokens, as long as each device has enough of them. What is left stays idle.

  Args:
    asked: "auto", "none", or sizes of axes, "context=4,guidance=2"; those that are not
      named are 1.
    batch_size: images of a batch.
    tokens: of an image; of the smallest, if there are several.
    branches: of guidance, 1 without any.
    devices: None for those of all processes.

  Raises:
    ValueError: the text is no mesh, or one that does not fit what is drawn.
  """
  devices = jax.devices() if devices is None else devices
  sizes = check(asked, len(devices), batch_size=batch_size, branches=branches)
  if sizes is None:
    sizes = best_sizes(
      len(devices), batch_size=batch_size, tokens=tokens, branches=branches
    )
  used = devices[: math.prod(sizes.values())]
  if len(used) == 1:
    return None
  return sharding.make_mesh(**sizes, fsdp=1, devices=used)


def best_sizes(
  count: int, *, batch_size: int, tokens: int, branches: int
) -> dict[str, int]:
  """Sizes of the axes that suit so many devices best, see `mesh_of`."""
  data = math.gcd(count, batch_size)
  left = count // data
  guidance = math.gcd(left, branches) if tokens >= _TOKENS_OF_A_DEVICE else 1
  left //= guidance
  context = max(
    size
    for size in range(1, left + 1)
    if left % size == 0 and (size == 1 or tokens >= size * _TOKENS_OF_A_DEVICE)
  )
  return {DATA: data, GUIDANCE: guidance, CONTEXT: context}


def check(
  asked: str, count: int, *, batch_size: int, branches: int
) -> dict[str, int] | None:
  """Sizes of the axes that a text asks for, of so many devices; None for "auto".

  Raises:
    ValueError: see `mesh_of`, whose arguments these are.
  """
  if asked == "auto":
    return None
  if asked == "none":
    return dict.fromkeys(_AXES, 1)
  sizes = _read(asked)
  _check_fit(asked, sizes, count, batch_size, branches)
  return sizes


def _read(asked: str) -> dict[str, int]:
  sizes: dict[str, int] = {}
  for part in asked.split(","):
    axis, _, size = part.strip().partition("=")
    if axis not in _AXES or axis in sizes or not size.isdecimal() or int(size) < 1:
      raise ValueError(
        f"mesh {asked!r} is none, for {part.strip()!r}: say auto, none, or sizes of "
        f"{', '.join(_AXES)}, each once and at least 1, such as context=4,guidance=2."
      )
    sizes[axis] = int(size)
  return {axis: sizes.get(axis, 1) for axis in _AXES}


def _check_fit(
  asked: str, sizes: Mapping[str, int], count: int, batch_size: int, branches: int
) -> None:
  wanted = math.prod(sizes.values())
  if count % wanted:
    raise ValueError(
      f"mesh {asked!r} takes {wanted} devices, which does not divide the {count} that "
      "there are."
    )
  if batch_size % sizes[DATA]:
    raise ValueError(
      f"mesh {asked!r} shares the images of a batch among {sizes[DATA]} groups of "
      f"devices, and batch_size is {batch_size}: make it a multiple of {sizes[DATA]}, "
      "or split tokens, by context."
    )
  if branches % sizes[GUIDANCE]:
    raise ValueError(
      f"mesh {asked!r} shares the branches of guidance among {sizes[GUIDANCE]} groups "
      f"of devices, and there "
      f"{'is 1, no guidance' if branches == 1 else f'are {branches}'}: leave guidance "
      "out of it, and make context larger."
    )


def suited_to(mesh: Mesh | None, branches: int, *, alike: bool) -> Mesh | None:
  """The same devices for a call; `context` has `guidance`'s where branches do not fit.

  Args:
    branches: of guidance.
    alike: whether the network's every call has all of them. Another network, to guide
      away from, has some.
  """
  groups = 1 if mesh is None else mesh.shape.get(GUIDANCE, 1)
  if mesh is None or (branches % groups == 0 and (alike or groups == 1)):
    return mesh
  layout = mesh.devices.reshape(mesh.shape[DATA], mesh.shape[FSDP], -1)
  return Mesh(layout, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def padded_length(config: PixArtConfig, grid: Grid, sizes: Mapping[str, int]) -> int:
  """Tokens that an image's sequence is padded to: a function of its size alone.

  Args:
    grid: token rows and columns.
    sizes: of the mesh's axes, as `suited_to` may join them.
  """
  multiple = max(1, config.base_size**2 // _LENGTHS_PER_GRID)
  length = -(-math.prod(grid) // multiple) * multiple
  parts = sizes.get(GUIDANCE, 1) * sizes.get(CONTEXT, 1)
  return sharding.split_length(length, parts, config.window)
