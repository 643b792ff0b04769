"""Descriptions of GPUs that are elsewhere, for XLA's compiler.

Its description of a chip is a text of field names and numbers, which XLA writes down of
a chip that it sees (`GpuTargetConfigProto`). The numbers here are NVIDIA's: white
papers of Ampere and Hopper, and the table of compute capabilities in the CUDA C++
programming guide.
"""

import dataclasses
import importlib.util
from collections.abc import Sequence
from typing import Any

from jax.experimental import topologies

from pixsigma_jax.chips import CHIPS


@dataclasses.dataclass(frozen=True)
class _Gpu:
  """Properties of a GPU that a compiler needs besides `chips.Chip`.

  Attributes:
    capability: compute capability.
    cores: streaming multiprocessors.
    lanes: float32 units of each.
    shared: bytes of its shared memory, of which a block may have all but one KiB.
    cache: bytes of level 2.
    clock: GHz, boosted.
  """

  capability: tuple[int, int]
  cores: int
  lanes: int
  shared: int
  cache: int
  clock: float


_HOPPER = _Gpu((9, 0), 132, 128, 228 * 1024, 50 * 2**20, 1.98)
_GPUS = {
  "NVIDIA A100-SXM4-80GB": _Gpu((8, 0), 108, 64, 164 * 1024, 40 * 2**20, 1.41),
  "NVIDIA H100": _HOPPER,
  "NVIDIA H200": _HOPPER,
}
# CUDA's and cuDNN's lowest that JAX's plugin for CUDA 13 takes.
_CUDA, _CUDNN = (13, 0), (9, 12)


def capability(kind: str) -> float:
  """Compute capability of a `device_kind` of `topology.GENERATIONS`, as JAX says it."""
  major, minor = _GPUS[kind].capability
  return float(f"{major}.{minor}")


def can_compile() -> bool:
  """Whether JAX's CUDA plugin is installed, whose compiler needs no GPU."""
  spec = importlib.util.find_spec("jax_plugins")
  return spec is not None and any(
    importlib.util.find_spec(f"jax_plugins.{name}") is not None
    for name in ("xla_cuda13", "xla_cuda12")
  )


def devices(kind: str, *, boxes: int, per_box: int) -> Sequence[Any]:
  """Devices of that kind, as the CUDA plugin describes them.

  Args:
    kind: a `device_kind` of `chips.CHIPS`.
  """
  return topologies.get_topology_desc(
    platform="cuda", target_config=_target(kind), topology=f"{boxes}x1x{per_box}"
  ).devices


def _target(kind: str) -> str:
  gpu, chip = _GPUS[kind], CHIPS[kind]
  major, minor = gpu.capability
  return f"""
    gpu_device_info {{
      cuda_compute_capability {{ major: {major} minor: {minor} }}
      core_count: {gpu.cores}
      fpus_per_core: {gpu.lanes}
      clock_rate_ghz: {gpu.clock}
      threads_per_warp: 32
      threads_per_block_limit: 1024
      threads_per_core_limit: 2048
      block_dim_limit_x: {2**31 - 1}
      block_dim_limit_y: {2**16 - 1}
      block_dim_limit_z: {2**16 - 1}
      registers_per_core_limit: {2**16}
      registers_per_block_limit: {2**16}
      shared_memory_per_core: {gpu.shared}
      shared_memory_per_block: {48 * 1024}
      shared_memory_per_block_optin: {gpu.shared - 1024}
      l2_cache_size: {gpu.cache}
      memory_bandwidth: {chip.bandwidth:.0f}
      device_memory_size: {chip.memory}
    }}
    platform_name: "CUDA"
    runtime_version {{ major: {_CUDA[0]} minor: {_CUDA[1]} }}
    dnn_version_info {{ major: {_CUDNN[0]} minor: {_CUDNN[1]} }}
    device_description_str: "{kind}"
  """
