"""Runs of the miniature that stand for the paper's: what is trained from what.

A weak model at 8 pixels a digit, the same at 16 and at 24, and from these short
branches in which one thing differs. All have the configs of `configs/quickstart/`.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from pixsigma_jax.models.pixart import VARIANTS
from pixsigma_jax.reproduce import stages
from pixsigma_jax.train.config import DEFAULT, config_dict, origins

Where: TypeAlias = Literal["shallow", "middle", "deep"]

# At 24 pixels a cell, windows of 2 and of 3 tokens divide the grid.
LATENT_PIXELS = 32  # as 8 x 8 latents
DATA_SEED = 1  # of the records, which all runs share


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
  """How long miniatures are trained, and how well they are looked at.

  Attributes:
    seeds: of each run.
    records: images at each resolution.
    variant: of the network.
    low_steps, high_steps, highest_steps: at 8, at 16 and at 24 pixels.
    latent_steps: on the latents of a small autoencoder, for figure 8a.
    branch_steps: of what starts from one of these.
    mark_every: steps between two measurements of a branch.
    swap_steps, swap_mark_every: the same after a swap of autoencoders.
    per_task: prompts of each task, of seen and of unseen scenes each.
    sampling_steps: of an image.
    held_out: images of the held-out loss.
    taught: cells of each colored digit that teach the classifier whose features are
      compared, and
    epochs: how often.
    side: in pixels, of the images that autoencoders are measured on.
    autoencoder: fields of `configs/vae_tiny.py` that are others.
  """

  seeds: int
  records: int
  variant: str
  low_steps: int
  high_steps: int
  highest_steps: int
  latent_steps: int
  branch_steps: int
  mark_every: int
  swap_steps: int
  swap_mark_every: int
  per_task: int
  sampling_steps: int
  held_out: int
  taught: int
  epochs: int
  side: int
  autoencoder: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def marks(self) -> tuple[int, ...]:
    """Steps of a branch that can be measured."""
    return tuple(range(0, self.branch_steps + 1, self.mark_every))

  @property
  def swap_marks(self) -> tuple[int, ...]:
    """The same after a swap of autoencoders."""
    return tuple(range(0, self.swap_steps + 1, self.swap_mark_every))


BUDGETS = {
  "laptop": Budget(
    seeds=3,
    records=8000,
    variant="Mini/2",
    low_steps=4500,
    high_steps=2000,
    highest_steps=500,
    latent_steps=4000,
    branch_steps=100,
    mark_every=50,
    swap_steps=400,
    swap_mark_every=200,
    per_task=20,
    sampling_steps=14,
    held_out=256,
    taught=60,
    epochs=30,
    side=256,
  ),
  # That everything runs, in seconds: nothing is learned.
  "smoke": Budget(
    seeds=1,
    records=48,
    variant="Nano/2",
    low_steps=2,
    high_steps=2,
    highest_steps=2,
    latent_steps=2,
    branch_steps=2,
    mark_every=1,
    swap_steps=2,
    swap_mark_every=1,
    per_task=1,
    sampling_steps=2,
    held_out=8,
    taught=2,
    epochs=1,
    side=64,
    autoencoder={
      "channels": (4, 4, 4),
      "norm_groups": 2,
      "total_steps": 2,
      "crops": (32,),
    },
  ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compression:
  """Compression of keys and values, for a network of any depth.

  Attributes:
    where: which half of the layers.
    ratio, operator, norm, initialization: see `add_kv_compression`.
  """

  where: Where = "deep"
  ratio: int = 4
  operator: str = "conv"
  norm: bool = False
  initialization: str = "average"

  def fields(self, depth: int) -> dict[str, Any]:
    """The section `model.kv_compression` of a config."""
    first = {"shallow": 0, "middle": depth // 4, "deep": depth // 2}[self.where]
    return {
      "ratio": self.ratio,
      "layers": tuple(range(first, first + depth // 2)),
      "operator": self.operator,
      "norm": self.norm,
    }

  def transform(self, depth: int) -> dict[str, Any]:
    """The transform that leads to it."""
    fields = self.fields(depth)
    name = "add_kv_compression"
    return {"name": name, **fields, "initialization": self.initialization}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
  """A branch: one row of a table, or one curve of a figure.

  Attributes:
    label: in table and figure.
    positions: transform of the positions from 8 pixels to 16; None for a branch of a
      model that is at its resolution already.
    compression: of keys and values; None for none.
    pixels: of a cell.
  """

  label: str
  positions: str | None = None
  compression: Compression | None = None
  pixels: int = 16

  @property
  def name(self) -> str:
    """Name of its runs, from what it is and not what a table calls it."""
    if self.positions is not None:
      return self.positions
    of = self.compression
    if of is None:
      return f"full_{self.pixels}px"
    norm = "norm" if of.norm else "plain"
    start = f"{of.initialization}_{norm}" if of.operator == "conv" else "start"
    return f"{of.where}_{of.ratio}_{of.operator}_{start}_{self.pixels}px"


@dataclasses.dataclass(frozen=True)
class Data:
  """Records that a run is trained on.

  Attributes:
    pixels: side of a digit's cell.
    records: how many images.
    autoencoder: name of the one whose latents they are; None for the pixels themselves.
  """

  pixels: int
  records: int
  autoencoder: str | None = None

  @property
  def name(self) -> str:
    """Name of its folder."""
    own = f"_{self.autoencoder}" if self.autoencoder else ""
    return f"{self.pixels}px_{self.records}{own}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """A run of the trainer.

  Attributes:
    name: with the seed, for people.
    data: what it is trained on.
    config: of the trainer, without the paths of data and parent.
    parent: the run that it starts from, at its last step; None for fresh parameters.
  """

  name: str
  data: Data
  config: Mapping[str, Any]
  parent: "Run | None"

  @property
  def steps(self) -> int:
    """Steps until its end."""
    return self.config["total_steps"]

  @property
  def lineage(self) -> "list[Run]":
    """The runs that lead to this one, and itself as the last."""
    return [*([] if self.parent is None else self.parent.lineage), self]

  @functools.cached_property
  def key(self) -> str:
    """Name of its folder: another config, data or ancestor makes it another run.

    What a config has by default does not count, so that a new field of the trainer
    leaves all runs what they were.
    """
    config = {
      name: value
      for name, value, origin in origins(self.config, ())
      if origin != DEFAULT
    }
    data = dataclasses.asdict(self.data)
    of = [config, data, DATA_SEED, self.parent and self.parent.key]
    text = json.dumps(of, sort_keys=True, default=list)
    return f"{self.name}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"


class Miniature:
  """The runs of a budget."""

  def __init__(self, budget: Budget):
    self.budget = budget
    self._depth = VARIANTS[budget.variant]["depth"]

  def low(self, seed: int) -> Run:
    """The weak model, from fresh parameters at 8 pixels."""
    steps = self.budget.low_steps
    return self._run("low", "low", seed, None, self._data(8), steps=steps, changes={})

  def high(self, seed: int) -> Run:
    """The model at 16 pixels, by PE interpolation."""
    changes = {"checkpoint.snapshot_every": 0}
    steps, low = self.budget.high_steps, self.low(seed)
    data = self._data(16)
    return self._run("high", "high", seed, low, data, steps=steps, changes=changes)

  def highest(self, seed: int) -> Run:
    """The model at 24 pixels, by PE interpolation."""
    changes = {
      **_positions("interpolate_pe", 24),
      "checkpoint.snapshot_every": 0,
      "optimizer.learning_rate": 1e-3,
    }
    steps, high, data = self.budget.highest_steps, self.high(seed), self._data(24)
    return self._run("highest", "high", seed, high, data, steps=steps, changes=changes)

  def branch(self, variant: Variant, seed: int) -> Run:
    """A short run, at a constant rate, in which a variant shows itself."""
    budget, compression = self.budget, variant.compression
    changes: dict[str, Any] = {
      "optimizer.schedule": "constant",
      "checkpoint.snapshot_every": budget.mark_every,
      "log.every": budget.mark_every,
    }
    if variant.positions is not None:
      parent = self.low(seed)
      changes |= _positions(variant.positions, variant.pixels)
    else:
      parent = self.high(seed) if variant.pixels == 16 else self.highest(seed)
      changes |= _positions(None, variant.pixels)
      changes["optimizer.learning_rate"] = 1e-3
    if compression is not None:
      own = compression.fields(self._depth).items()
      changes |= {f"model.kv_compression.{name}": value for name, value in own}
      changes["init.transforms"] = (compression.transform(self._depth),)
    return self._run(
      variant.name,
      "high",
      seed,
      parent,
      self._data(variant.pixels),
      steps=budget.branch_steps,
      changes=changes,
    )

  def on_latents(self, seed: int, autoencoder: str) -> Run:
    """A model of an autoencoder's latents, from fresh parameters."""
    steps, data = self.budget.latent_steps, self._data(LATENT_PIXELS, autoencoder)
    return self._run(
      "latent", "low", seed, None, data, steps=steps, changes={"model.in_channels": 4}
    )

  def swapped(
    self, seed: int, before: str, after: str, transform: Mapping[str, Any] | None
  ) -> Run:
    """A run on another autoencoder's latents.

    Args:
      before, after: names of the autoencoders.
      transform: `swap_vae` with its arguments; None for fresh parameters.
    """
    changes = {
      "model.in_channels": 4,
      "optimizer.schedule": "constant",
      "optimizer.learning_rate": 2e-3,
      "optimizer.warmup_steps": 20,
      "checkpoint.snapshot_every": self.budget.swap_mark_every,
      "log.every": self.budget.swap_mark_every,
      "init.transforms": () if transform is None else (dict(transform),),
    }
    fresh = transform is None
    start = "fresh" if fresh else "matched" if "old_std" in transform else "swapped"
    parent = None if fresh else self.on_latents(seed, before)
    data, steps = self._data(LATENT_PIXELS, after), self.budget.swap_steps
    return self._run(start, "low", seed, parent, data, steps=steps, changes=changes)

  def _data(self, pixels: int, autoencoder: str | None = None) -> Data:
    return Data(pixels, self.budget.records, autoencoder)

  def _run(
    self,
    name: str,
    config: str,
    seed: int,
    parent: Run | None,
    data: Data,
    *,
    steps: int,
    changes: Mapping[str, Any],
  ) -> Run:
    """One of the quickstart's configs, with what differs."""
    budget = self.budget
    complete = config_dict(stages.config_of(f"quickstart.{config}"))
    warmup_steps = complete.to_dict()["optimizer"]["warmup_steps"]
    complete.update_from_flattened_dict(
      {
        "stage": f"reproduce/{name}",
        "seed": seed,
        "total_steps": steps,
        "model.variant": budget.variant,
        "data.path": "",
        "data.holdout": 0.05 if budget.records >= 1000 else 0.25,
        "init.parent": "",
        "checkpoint.every": 500,
        "checkpoint.keep_last": 1,
        "log.sample_every": 0,
        "log.prompts": (),
        **changes,
        "optimizer.warmup_steps": min(
          changes.get("optimizer.warmup_steps", warmup_steps), steps // 2
        ),
      }
    )
    return Run(
      name=f"{name}_seed{seed}",
      data=data,
      config=complete.to_dict(),
      parent=parent,
    )


def _positions(transform: str | None, pixels: int) -> dict[str, Any]:
  """Fields of a model of that resolution, and of how it is reached."""
  base_size = pixels // 2  # tokens of 2x2 pixels
  scale = 1.0 if transform == "extend_pe" else pixels / 8
  fields: dict[str, Any] = {
    "model.base_size": base_size,
    "model.pe_interpolation": scale,
    "init.transforms": (),
  }
  if transform is not None:
    fields["init.transforms"] = ({"name": transform, "base_size": base_size},)
  return fields
