"""Machines by name: `v5e:8x8`, `h200:8`, and several of the same."""

import contextlib
import dataclasses
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from pixsigma_jax.chips import CHIPS, PRICES, Chip
from pixsigma_jax.plan import gpus
from pixsigma_jax.wording import install

GPUS_A_BOX = 8


@dataclasses.dataclass(frozen=True)
class _Generation:
  """Machines that a name before the colon stands for.

  Attributes:
    kind: of its devices, a key of `chips.CHIPS`.
    price: dollars an hour of one chip.
    devices: of one chip, as JAX shows them.
    options: what libtpu must be told to show them so.
    known: shapes of a TPU slice that libtpu compiles for, as examples; the libtpu that
      is installed decides. Empty for a GPU.
  """

  kind: str
  price: float
  devices: int = 1
  options: tuple[tuple[str, str], ...] = ()
  known: tuple[str, ...] = ()


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")

GENERATIONS: dict[str, _Generation] = {
  "v3": _Generation(
    "TPU v3", PRICES["v3"], devices=2, known=("2x2", "4x4", "4x8", "8x8")
  ),
  "v4": _Generation(
    "TPU v4", PRICES["v4"], options=(("chip_config_name", "megacore"),), known=_CUBES
  ),
  "v5e": _Generation("TPU v5 lite", PRICES["v5e"], known=_FLAT),
  "v5p": _Generation("TPU v5", PRICES["v5p"], known=_CUBES),
  "v6e": _Generation("TPU v6 lite", PRICES["v6e"], known=_FLAT),
  "tpu7x": _Generation("TPU7x", PRICES["tpu7x"], devices=2, known=("2x2x1", "4x4x4")),
  "a100": _Generation("NVIDIA A100-SXM4-80GB", PRICES["a100"]),
  "h100": _Generation("NVIDIA H100", PRICES["h100"]),
  "h200": _Generation("NVIDIA H200", PRICES["h200"]),
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """Accelerators of one or several slices or boxes.

  Attributes:
    name: as it was given, "v5e:8x8".
    slices: groups of this shape, which the data center's network joins.
    per_slice: devices of one.
    chips: in all slices; what is paid for.
    chip: what one device is.
    kind: its `device_kind`.
    platform: "tpu" or "gpu".
    price: dollars an hour of a chip.
  """

  name: str
  slices: int
  per_slice: int
  chips: int
  chip: Chip
  kind: str
  platform: str
  price: float

  @property
  def count(self) -> int:
    """Devices in all slices."""
    return self.slices * self.per_slice

  def __str__(self) -> str:
    return self.name if self.slices == 1 else f"{self.slices} slices of {self.name}"


def known() -> str:
  """Known names, for a message."""
  names = [
    f"{name}:{{{','.join(generation.known)}}}" if generation.known else f"{name}:1 to 8"
    for name, generation in GENERATIONS.items()
  ]
  return ", ".join(names)


def parse(name: str, slices: int = 1, price: float | None = None) -> Topology:
  """The machines of a name.

  Args:
    name: `GENERATION:SHAPE`, the shape in chips, "v5e:8x8", or `GPU:COUNT`, "h200:8".
    slices: how many of them.
    price: dollars an hour of one chip; None for that of `GENERATIONS`.

  Raises:
    ValueError: there is no such generation, or the shape is none.
  """
  generation, _, shape = name.partition(":")
  if generation not in GENERATIONS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
    raise _unknown(name)
  about = GENERATIONS[generation]
  sides = [int(side) for side in shape.split("x")]
  if not about.known and (len(sides) > 1 or sides[0] > GPUS_A_BOX):
    raise ValueError(
      f"Topology {name!r}: a box has up to {GPUS_A_BOX} GPUs. Say "
      f"{generation}:{GPUS_A_BOX}, and how many boxes with --slices."
    )
  if about.known and len(sides) != about.known[0].count("x") + 1:
    raise _unknown(name)
  chips = 1
  for side in sides:
    chips *= side
  return Topology(
    name=name,
    slices=slices,
    per_slice=chips * about.devices,
    chips=slices * chips,
    chip=CHIPS[about.kind],
    kind=about.kind,
    platform="tpu" if about.known else "gpu",
    price=about.price if price is None else price,
  )


def here(found: Sequence[Any]) -> Topology:
  """The machines that a process's devices are.

  Raises:
    ValueError: they are of no generation that has a name here, or no whole slice.
  """
  kind = found[0].device_kind
  names = [name for name, about in GENERATIONS.items() if kind.startswith(about.kind)]
  if not names:
    raise ValueError(f"{kind} is no accelerator that plans know; known are {known()}.")
  name = max(names, key=lambda name: len(GENERATIONS[name].kind))
  if not GENERATIONS[name].known:
    return parse(f"{name}:{len(found)}")
  axes = GENERATIONS[name].known[0].count("x") + 1
  by_axis = list(zip(*(device.coords for device in found), strict=True))[:axes]
  shape = "x".join(str(max(sides) - min(sides) + 1) for sides in by_axis)
  machines = parse(f"{name}:{shape}")
  if machines.count != len(found):
    raise ValueError(
      f"These {len(found)} devices are no whole {machines}, which has {machines.count}."
    )
  return machines


_WITHOUT = (
  "Or give --nocompile for the analytic model, which --sample has of several devices."
)


def devices(topology: Topology) -> Sequence[Any]:
  """A topology's devices, as the installed compiler for them describes them.

  Raises:
    ValueError: there is no such compiler, libtpu or JAX's CUDA plugin, or it does not
      know the topology.
  """
  if topology.platform == "gpu":
    if not gpus.can_compile():
      raise ValueError(
        "Compiling for a GPU needs JAX's CUDA plugin, which runs on any machine with "
        f"Linux: {install('gpu')}. {_WITHOUT}"
      )
    return gpus.devices(
      topology.kind, boxes=topology.slices, per_box=topology.per_slice
    )
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError(
      "Compiling for a TPU needs libtpu, which runs on any machine: "
      f"{install('plan')}. {_WITHOUT}"
    )
  generation = topology.name.partition(":")[0]
  options: dict[str, Any] = dict(GENERATIONS[generation].options)
  if set(topology.name.partition(":")[2].split("x")) == {"1"}:
    options["chips_per_host_bounds"] = [1, 1, 1]  # else a host has four
  if topology.slices > 1:
    options["num_slices"] = topology.slices
  try:
    with _told(_AWAY):
      described = topologies.get_topology_desc(
        platform="tpu", topology_name=topology.name, **options
      ).devices
  except jax.errors.JaxRuntimeError as error:
    if not str(error).startswith("INVALID_ARGUMENT"):  # a lock of libtpu's, say
      raise
    raise _unknown(topology.name, str(error).splitlines()[0]) from error
  assert len(described) == topology.count
  return described


# What libtpu reads when it is loaded. Another process may hold its lock, and nothing
# here touches a TPU; nor shall it ask a cloud's server where it is, and complain.
_AWAY = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
}


@contextlib.contextmanager
def _told(variables: Mapping[str, str]) -> Iterator[None]:
  """Sets environment variables for the block, and restores them afterwards."""
  before = {name: os.environ.get(name) for name in variables}
  os.environ.update(variables)
  try:
    yield
  finally:
    for name, value in before.items():
      if value is None:
        del os.environ[name]
      else:
        os.environ[name] = value


def _unknown(name: str, why: str = "") -> ValueError:
  return ValueError(
    f"Unknown topology {name!r}{f' ({why})' if why else ''}. Known are {known()}; "
    "several slices or boxes of one by --slices."
  )
