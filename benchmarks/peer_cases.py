"""What `benchmarks.peers` compares, and one side's turn at it."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from pixsigma_jax.models.flops import TRAINING
from pixsigma_jax.models.kv_compression import KVCompression
from pixsigma_jax.models.pixart import PixArtConfig
from pixsigma_jax.plan.roofline import needed

SIDES = ("ours", "torch", "torch.compile")
STEPS, GUIDANCE = 20, 4.5
T5_LAYERS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """What is timed: `kind` is forward, train, sample, decode or encode (captions)."""

  kind: str
  pixels: int = 0
  batch: int = 1
  layers: int = 28
  ratio: int = 1
  remat: bool = False

  @property
  def name(self) -> str:
    """For people."""
    parts = [self.kind, str(self.pixels or ""), f"{self.ratio}:1" * (self.ratio > 1)]
    return " ".join(part for part in parts if part)

  @property
  def model(self) -> PixArtConfig:
    """XL/2 for that many pixels."""
    layers = tuple(range(self.layers // 2, self.layers)) if self.ratio > 1 else ()
    config = PixArtConfig.from_variant(
      "XL/2",
      base_size=self.pixels // 16,
      pe_interpolation=self.pixels / 512,
      kv_compression=KVCompression(ratio=self.ratio, layers=layers),
    )
    return dataclasses.replace(config, depth=self.layers)

  @property
  def flops(self) -> float:
    """That the transformer needs; 0 where there is none."""
    if not self.pixels or self.kind == "decode":
      return 0.0
    forward = sum(needed(self.model).values())
    times = {"forward": 1, "train": TRAINING, "sample": 2 * STEPS}[self.kind]
    return forward * times * self.batch


_GPU_BATCHES = {512: 32, 1024: 8, 2048: 2, 2880: 1, 4096: 1}
SETS: dict[str, tuple[Case, ...]] = {
  "cpu": (
    *(Case(kind="forward", pixels=pixels) for pixels in (256, 512)),
    *(Case(kind="train", pixels=pixels, layers=14) for pixels in (256, 512)),
    Case(kind="decode", pixels=512),
    Case(kind="encode"),
  ),
  "gpu": (
    *(Case(kind="sample", pixels=pixels) for pixels in (512, 1024, 2048, 4096)),
    *(
      Case(kind="train", pixels=pixels, batch=batch, ratio=ratio, remat=True)
      for pixels, batch in _GPU_BATCHES.items()
      for ratio in (1, 4)
    ),
  ),
}


@dataclasses.dataclass(frozen=True)
class Turn:
  """What a side has measured: seconds of its runs, its device, its bytes at most."""

  seconds: list[float]
  device: str
  memory: int


def take_turn(
  side: str, case: Case, dtype: str, *, machine: str, runs: int, threads: int
) -> Turn:
  """Times a side in this process.

  Args:
    machine: cpu or gpu.
    runs: that are timed.
    threads: of torch on a CPU; XLA takes all cores that it may use.
  """
  if side == "ours":
    from benchmarks import peer_ours as module

    run = module.prepare(case, dtype, machine=machine)
  else:
    from benchmarks import peer_torch as module

    run = module.prepare(
      case, dtype, machine=machine, compiled=side == "torch.compile", threads=threads
    )
  run()  # compiles
  seconds = [_seconds(run) for _ in range(runs)]
  return Turn(seconds, *module.device(machine))


def _seconds(run: Callable[[], Any]) -> float:
  began = time.perf_counter()
  run()
  return time.perf_counter() - began
