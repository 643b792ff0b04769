"""What the makers say of their accelerators: peak arithmetic, memory and its bandwidth.

Arithmetic is dense bfloat16. Sources: cloud.google.com/tpu/docs/system-architecture and
the data sheets of NVIDIA's A100, H100, H200, B200, L4 and T4 (float16 for the last).
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device as JAX shows it: a whole chip, but for TPU7x, whose chip is two.

  Attributes:
    flops: peak, per second, counting a multiplication and an addition as two.
    memory: bytes.
    bandwidth: bytes per second.
  """

  flops: float
  memory: int
  bandwidth: float


_GIB = 2**30

# How a device's kind begins → the chip; the longest match counts.
CHIPS: dict[str, Chip] = {
  "TPU v4": Chip(275e12, 32 * _GIB, 1228e9),
  "TPU v5 lite": Chip(197e12, 16 * _GIB, 819e9),
  "TPU v5": Chip(459e12, 95 * _GIB, 2765e9),
  "TPU v6 lite": Chip(918e12, 32 * _GIB, 1640e9),
  "TPU7x": Chip(1153e12, 96 * _GIB, 3690e9),
  "NVIDIA T4": Chip(65e12, 16 * _GIB, 320e9),
  "Tesla T4": Chip(65e12, 16 * _GIB, 320e9),
  "NVIDIA L4": Chip(121e12, 24 * _GIB, 300e9),
  "NVIDIA A100-SXM4-40GB": Chip(312e12, 40 * _GIB, 1555e9),
  "NVIDIA A100-SXM4-80GB": Chip(312e12, 80 * _GIB, 2039e9),
  "NVIDIA H100": Chip(989e12, 80 * _GIB, 3350e9),
  "NVIDIA H200": Chip(989e12, 141 * _GIB, 4800e9),
  "NVIDIA B200": Chip(2250e12, 180 * _GIB, 8000e9),
}


def find_chip(device_kind: str) -> Chip | None:
  """The chip of a device by its `device_kind`; None if it is not in the table."""
  names = [name for name in CHIPS if device_kind.startswith(name)]
  return CHIPS[max(names, key=len)] if names else None
