"""Goodput of a run: needed arithmetic and productive time."""

import functools
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from pixsigma_jax import chips, disk
from pixsigma_jax.models import flops
from pixsigma_jax.models.pixart import PixArtConfig


class Goodput:
  """The share of the wall time since a run's first start that went into its steps.

  Steps that were lost (redone after a restart or a rollback), compiling, restoring,
  waiting for data, saving, drawing, validating, and the time when nothing ran: none of
  it is productive.
  """

  def __init__(self, workdir: pathlib.Path, last: Mapping[str, Any] | None):
    """Continues from the run's last metrics.

    Args:
      workdir: holds `started.json`, written at the run's first start.
      last: line of metrics.jsonl, of the steps that count; None if none do.
    """
    path = workdir / "started.json"
    if not path.exists():
      text = json.dumps({"time": time.time()})
      disk.write_text(path, text)
    self._started = json.loads(path.read_text())["time"]
    self.go_on_from(last)

  def go_on_from(self, last: Mapping[str, Any] | None) -> None:
    """Forgets steps that are to be made again: those after the line `last`."""
    self._productive = float(last["productive_seconds"]) if last else 0.0

  def add(self, seconds: float) -> dict[str, float]:
    """Counts these seconds of steps; what metrics.jsonl is to say."""
    self._productive += seconds
    wall = max(time.time() - self._started, self._productive)
    return {
      "productive_seconds": self._productive,
      "goodput": self._productive / wall if wall else 1.0,
    }


class Arithmetic:
  """Counts what the model needs for the images that it sees, in this process."""

  def __init__(self, model: PixArtConfig, dtype: DTypeLike):
    """Starts with nothing.

    Args:
      dtype: of matrix products.
    """
    self._model, self._dtype = model, dtype
    self._flops = 0.0
    self._of_image = functools.lru_cache(maxsize=None)(self._count)

  def _count(self, grid: tuple[int, int]) -> tuple[float, float]:
    """Operations of training on one image: without a caption, and for each token."""
    none, one = (
      flops.TRAINING * sum(flops.forward_flops(self._model, grid, tokens).values())
      for tokens in (0, 1)
    )
    return none, one - none

  def of_batch(self, batch: Mapping[str, np.ndarray]) -> float:
    """Operations of a training step on this process's part of a batch."""
    total = 0.0
    tokens = batch["caption_mask"].sum(axis=1)
    for (h, w), count in zip(batch["grid"].tolist(), tokens.tolist(), strict=True):
      image, token = self._of_image((h, w))
      total += image + token * count
    return total

  def add(self, flops: float) -> None:
    """A step that needs so much has been started."""
    self._flops += flops

  def close(self, seconds: float) -> dict[str, float]:
    """The rate over so many seconds, for each device; starts anew.

    `mfu` is its share of the chip's peak for the dtype, where the chip is in
    `chips.CHIPS`.
    """
    devices = jax.local_devices()
    rate = self._flops / seconds / len(devices)
    self._flops = 0.0
    values = {"tflops_per_device": rate / 1e12}
    if (chip := chips.find_chip(devices[0].device_kind)) is not None:
      values["mfu"] = rate / chip.peak(self._dtype)
    if memory := devices[0].memory_stats():
      values["memory_peak_gib"] = memory["peak_bytes_in_use"] / 2**30
    return values
