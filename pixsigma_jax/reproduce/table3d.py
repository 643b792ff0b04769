"""Table 3d: how long a step and an image take, with and without compression."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from pixsigma_jax.models import splash
from pixsigma_jax.plan import roofline, sampling, topology
from pixsigma_jax.reproduce import stages
from pixsigma_jax.reproduce.registry import Options
from pixsigma_jax.reproduce.result import Result, Table
from pixsigma_jax.reproduce.table4 import plan_of
from pixsigma_jax.train.config import model_config

# Resolution, ratio, seconds a step at a batch of 32, seconds an image (PixArt-Σ, 3d).
PAPER = (
  ("2K", 1, 56, 58),
  ("2K", 4, 37, 38),
  ("4K", 1, 191, 91),
  ("4K", 4, 125, 60),
)
# Of ours: what it is called, without and with compression. Which of the two sizes the
# paper timed as 4K it does not say: docs/stages.md.
PAIRS = (
  ("1K", "stage_1k:full", "stage_1k"),
  ("2K", "stage_2k:full", "stage_2k"),
  ("UHD (2880²)", "stage_4k:uhd_full", "stage_4k:uhd"),
  ("4096²", "stage_4k:full", "stage_4k"),
)
MACHINES = ("v5e:8x8", "v5p:2x4x4", "v6e:8x8")
_BATCH = 32  # the paper's


def run(options: Options) -> Result:
  """Table 3d on all machines."""
  del options
  return reproduce(PAIRS, MACHINES)


def reproduce(pairs: Sequence[tuple[str, str, str]], machines: Sequence[str]) -> Result:
  """Table 3d of these pairs of configs on these machines."""
  data: dict[str, Any] = {}
  tables = [_papers_table()]
  for machine in machines:
    rows = []
    for name, full, compressed in pairs:
      found = [_times(config, machine) for config in (full, compressed)]
      data.setdefault(machine, {})[name] = dict(zip(("1", "4"), found, strict=True))
      rows += [_row(name, 1, found[0], None), _row(name, 4, found[1], found[0])]
    header = (
      *("Pixels", "Ratio", "Step, s", "arithmetic bound, s"),
      *("Image, s", "arithmetic bound, s"),
    )
    tables.append(
      Table(f"{machine}: batch of {_BATCH}, an image on one chip", header, rows)
    )
  return Result(
    title="Table 3d: seconds with and without KV compression",
    setting={
      "step": f"`plan`'s roofline of a batch of {_BATCH}, each config's mesh",
      "image": f"{sampling.STEPS} steps with guidance on one chip, its arithmetic with "
      "what padding to the matrix unit adds; text encoder and autoencoder left out",
      "arithmetic bound": "needed operations over the peak of the chips",
      "compression": "ratio 4 in 14 of 28 layers",
    },
    tables=tables,
    remarks=(
      "Compression saves only attention's products. Where attention runs at the speed "
      "of other products, as a fused kernel's nearly does, its share of the time is "
      "its share of the operations, and the saving is that of the operations: at 2K a "
      "quarter, at 4096² a third. The paper saves a third at 2K already: there, as its "
      "own times say, attention took longer for the same operations than the rest of "
      "the network, so taking some of it away saved more. A faster kernel takes less "
      "time in all, and gains less, relatively, by compression.",
    ),
    data=data,
  )


def _times(name: str, machine: str) -> dict[str, float]:
  """Seconds of a step and of an image, each with its arithmetic bound."""
  config = {**stages.config_of(name), "batch_size": _BATCH}
  plan = plan_of(config, machine)
  model, machines = model_config(config["model"]), topology.parse(machine)
  chip, dtype = machines.chip, config["compute"]["dtype"]
  peak = chip.peak(dtype)
  # Two passes a step: with the prompt, and without.
  flops = 2 * sampling.STEPS * sum(roofline.needed(model).values())
  ceiling = roofline.ceiling(
    model,
    chip.matrix_unit,
    our_kernels=splash.has_room(
      model.base_size**2, model.width // model.num_heads, machines.kind
    ),
    training=False,
    itemsize=jnp.dtype(dtype).itemsize,
  )
  return {
    "step_seconds": plan.seconds,
    "step_arithmetic_seconds": plan.time.needed / (machines.count * peak),
    "image_seconds": flops / (peak * ceiling),
    "image_arithmetic_seconds": flops / peak,
  }


def _row(
  name: str, ratio: int, found: dict[str, float], full: dict[str, float] | None
) -> tuple[str, ...]:
  cells = [
    _cell(seconds, full[key] if full else None) for key, seconds in found.items()
  ]
  return (name, str(ratio), *cells)


def _cell(seconds: float | int, full: float | int | None) -> str:
  saved = "" if full is None else f" ({seconds / full - 1:+.0%})"
  return f"{seconds:.3g}{saved}"


def _papers_table() -> Table:
  whole = {name: row for name, ratio, *row in PAPER if ratio == 1}
  rows = []
  for name, ratio, *seconds in PAPER:
    full = [None, None] if ratio == 1 else whole[name]
    rows.append((name, str(ratio), *map(_cell, seconds, full)))
  header = ("Resolution", "Ratio", "Step of 32, s", "Image, s")
  return Table("The paper's table 3d", header, rows)
