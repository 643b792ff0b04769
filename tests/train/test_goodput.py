"""The share of the time that was used, over restarts, and arithmetic by the chip."""

import dataclasses
import json
from unittest import mock

import jax
import numpy as np
import pytest

from pixsigma_jax import chips
from pixsigma_jax.models import flops
from pixsigma_jax.models.kv_compression import KVCompression
from pixsigma_jax.models.pixart import PixArtConfig
from pixsigma_jax.train import goodput
from pixsigma_jax.train.goodput import Arithmetic, Goodput

MODEL = PixArtConfig.from_variant(
  "XL/2",
  base_size=64,
  pe_interpolation=2.0,
  kv_compression=KVCompression(ratio=4, layers=tuple(range(14, 28))),
)


def test_goodput_counts_the_time_between_two_starts_of_a_run(tmp_path, monkeypatch):
  now = 1000.0
  monkeypatch.setattr(goodput.time, "time", lambda: now)
  first = Goodput(tmp_path, None)
  now = 1100.0
  line = first.add(60.0)
  assert line == {"productive_seconds": 60.0, "goodput": 0.6}
  now = 1200.0
  assert first.add(60.0)["goodput"] == pytest.approx(120 / 200)
  # It died; only the first line's steps were saved. Started again at 1300:
  now = 1300.0
  second = Goodput(tmp_path, line)
  now = 1400.0
  assert second.add(80.0) == {"productive_seconds": 140.0, "goodput": 0.35}
  second.go_on_from(line)  # rolled back
  assert second.add(20.0)["productive_seconds"] == 80.0
  assert json.loads((tmp_path / "started.json").read_text()) == {"time": 1000.0}


def test_a_steps_arithmetic_is_that_of_its_images_and_captions_without_padding():
  counted = Arithmetic(MODEL, "bfloat16")
  images = [((64, 64), 12), ((32, 128), 300), ((64, 64), 0)]
  batch = {
    "grid": np.array([grid for grid, _ in images]),
    "caption_mask": np.arange(300) < np.array([[tokens] for _, tokens in images]),
  }
  want = 3 * sum(
    sum(flops.forward_flops(MODEL, grid, tokens).values()) for grid, tokens in images
  )
  assert counted.of_batch(batch) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(("dtype", "slower"), [("bfloat16", 1), ("float32", 2)])
def test_mfu_is_the_share_of_the_chips_peak_on_each_device(dtype, slower):
  counted = Arithmetic(MODEL, dtype)
  device = mock.Mock(device_kind="NVIDIA H200")
  device.memory_stats.return_value = {"peak_bytes_in_use": 3 * 2**30}
  counted.add(989e12 * 4)
  counted.add(989e12 * 4)
  with mock.patch.object(jax, "local_devices", return_value=[device] * 4):
    values = counted.close(4.0 * slower)  # of operands in TF32 half as many
    assert values["mfu"] == pytest.approx(0.5)
    assert values["tflops_per_device"] == pytest.approx(989 / 2 / slower)
    assert values["memory_peak_gib"] == 3.0
    assert counted.close(1.0)["mfu"] == 0.0
    device.device_kind = "cpu"
    device.memory_stats.return_value = None
    assert counted.close(1.0) == {"tflops_per_device": 0.0}


def test_kinds_of_devices_are_found_by_their_longest_name():
  found = {kind: chips.find_chip(kind) for kind in ("TPU v5 lite", "TPU v5")}
  assert found["TPU v5 lite"] != found["TPU v5"]
  assert chips.find_chip("NVIDIA H100 80GB HBM3") == chips.CHIPS["NVIDIA H100"]
  assert chips.find_chip("cpu") is None
  for chip in chips.CHIPS.values():
    assert all(value > 0 for value in dataclasses.astuple(chip))
    # Arithmetic for each byte read: what makes a large matrix product bound by it.
    assert 50 < chip.flops / chip.bandwidth < 600


def test_counting_a_batch_of_a_thousand_images_costs_no_step():
  counted = Arithmetic(MODEL, "bfloat16")
  draw = np.random.default_rng(0)
  batch = {
    "grid": draw.choice(np.array([[64, 64], [32, 128], [128, 32]]), 1024),
    "caption_mask": draw.random((1024, 300)) < 0.5,
  }
  calls = mock.Mock(wraps=flops.forward_flops)
  with mock.patch.object(flops, "forward_flops", calls):
    counted.of_batch(batch)
  assert calls.call_count == 2 * 3  # a grid is counted once
