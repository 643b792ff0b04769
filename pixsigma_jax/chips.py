"""Accelerators by their data sheets: arithmetic, memory and links; and their prices.

Arithmetic is dense. Sources: cloud.google.com/tpu/docs/system-architecture and the data
sheets of NVIDIA's V100, A100, A800, H100, H200, B200, L4 and T4 (float16 for V100, T4);
links between TPUs, and their share of the data center's network, from "How to Scale
Your Model" (jax-ml.github.io/scaling-book, part 2); what a program may have of a TPU's
memory, from the message of libtpu 0.0.51 to one that wants more.
"""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device as JAX shows it: a whole chip, but for TPU v3 and 7x, whose chip is two.

  Attributes:
    flops: peak, per second, counting a multiplication and an addition as two; of
      operands in bfloat16.
    float32_flops: of operands in float32, at JAX's default precision: a TPU rounds them
      to bfloat16, a GPU to TF32 where it has it (the T4 has not).
    memory: bytes.
    bandwidth: bytes per second.
    usable: bytes that a program may have; what is left of `memory`.
    link: bytes per second that a device receives while it shares something with others
      along one axis of a mesh. Of a TPU, one link, one way: chips in a line. Where they
      close a ring it is twice that. Of a GPU, NVLink (PCIe for L4 and T4), one way.
    network: the same between slices or boxes, over the data center's network. Of GPUs,
      one network card each, as in a DGX (200 Gb/s for A100, 400 for what came after).
    matrix_unit: width of the unit that multiplies matrices: sides are padded to it.
  """

  flops: float
  float32_flops: float
  memory: int
  bandwidth: float
  usable: int
  link: float
  network: float
  matrix_unit: int

  def peak(self, dtype: DTypeLike) -> float:
    """Operations a second of products whose operands have that dtype."""
    return self.flops if jnp.dtype(dtype).itemsize <= 2 else self.float32_flops


_GIB = 2**30


def _tpu(
  flops: float,
  memory: int,
  usable: float,
  bandwidth: float,
  link: float,
  network: float,
  matrix_unit: int,
) -> Chip:
  gib = memory * _GIB, int(usable * _GIB)
  return Chip(flops, flops, gib[0], bandwidth, gib[1], link, network, matrix_unit)


def _gpu(
  flops: float,
  memory: int,
  bandwidth: float,
  link: float,
  network: float,
  float32_flops: float | None = None,  # in TF32 if it is None, half of bfloat16's
) -> Chip:
  # JAX takes nine tenths for itself unless XLA_PYTHON_CLIENT_MEM_FRACTION says else.
  # Tensor cores multiply pieces of 16.
  size = memory * _GIB
  float32_flops = flops / 2 if float32_flops is None else float32_flops
  usable = size * 9 // 10
  return Chip(flops, float32_flops, size, bandwidth, usable, link, network, 16)


# How a device's kind begins → the chip; the longest match counts.
CHIPS: dict[str, Chip] = {
  "TPU v3": _tpu(61.5e12, 16, 15.48, 450e9, 100e9, 3.125e9, 128),
  "TPU v4": _tpu(275e12, 32, 30.75, 1228e9, 45e9, 6.25e9, 128),
  "TPU v5 lite": _tpu(197e12, 16, 15.75, 819e9, 45e9, 3.125e9, 128),
  "TPU v5": _tpu(459e12, 96, 95.73, 2765e9, 90e9, 6.25e9, 128),
  "TPU v6 lite": _tpu(918e12, 32, 31.24, 1640e9, 90e9, 12.5e9, 256),
  "TPU7x": _tpu(1153e12, 96, 94.74, 3690e9, 90e9, 6.25e9, 256),
  "NVIDIA T4": _gpu(65e12, 16, 320e9, 16e9, 16e9, 8.1e12),
  "Tesla T4": _gpu(65e12, 16, 320e9, 16e9, 16e9, 8.1e12),
  "Tesla V100-SXM2-32GB": _gpu(125e12, 32, 900e9, 150e9, 12.5e9, 15.7e12),
  "NVIDIA L4": _gpu(121e12, 24, 300e9, 32e9, 32e9),
  "NVIDIA A100-SXM4-40GB": _gpu(312e12, 40, 1555e9, 300e9, 25e9),
  "NVIDIA A100-SXM4-80GB": _gpu(312e12, 80, 2039e9, 300e9, 25e9),
  "NVIDIA A800-SXM4-80GB": _gpu(312e12, 80, 2039e9, 200e9, 25e9),
  "NVIDIA H100": _gpu(989e12, 80, 3350e9, 450e9, 50e9),
  "NVIDIA H200": _gpu(989e12, 141, 4800e9, 450e9, 50e9),
  "NVIDIA B200": _gpu(2250e12, 180, 8000e9, 900e9, 50e9),
}

# Dollars an hour of one chip, by the names of `plan`. TPUs on demand in the United
# States, cloud.google.com/tpu/pricing; GPUs about what they are let for. As of 2025,
# rounded, and gone when you read this: `plan --price` says yours.
PRICES = {
  "v3": 2.0,
  "v4": 3.22,
  "v5e": 1.2,
  "v5p": 4.2,
  "v6e": 2.7,
  "tpu7x": 12.0,
  "a100": 1.5,
  "h100": 2.5,
  "h200": 3.5,
}

# Share of their peak that chips are planned with until a step has been measured on
# them: an assumption. PixArt-Σ's own numbers imply 4 to 15 % (`reproduce table4`), the
# best published training of diffusion transformers in JAX reaches 40 % (MaxDiffusion).
UTILIZATION = 0.3


def find_chip(device_kind: str) -> Chip | None:
  """The chip of a device by its `device_kind`; None if it is not in the table."""
  names = [name for name in CHIPS if device_kind.startswith(name)]
  return CHIPS[max(names, key=len)] if names else None
