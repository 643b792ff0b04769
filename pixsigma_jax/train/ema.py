"""Moving averages of the parameters; the first of them is the model for use."""

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float32, Int

from pixsigma_jax import checkpoint
from pixsigma_jax.metadata import Metadata
from pixsigma_jax.models.layers import HOST_MEMORY
from pixsigma_jax.transforms.post_hoc_ema import exponent

Step: TypeAlias = Callable[[Any, Any], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ema:
  """Averages that a run keeps, in float32, and their memory.

  An update moves each average A by a share of its distance to the parameters θ:
  A ← A + (1 - β) (θ - A). In β A + (1 - β) θ the two factors, each rounded to float32,
  would not sum to 1, and an average of 10,000 updates lose a ten-thousandth of itself.

  Attributes:
    kind: `exponential`, of constant β; `power`, of β = (1 - 1/t)^(γ + 1) at update t
      (Karras et al. 2024, equation 126), which weighs update s by its power s^γ
      and so spans the same share of a run of any length.
    values: an average for each. `exponential` by updates: β. `exponential` by images:
      half-lives, the images after which a parameter counts half. `power`: σ_rel, the
      average's standard deviation in time as a share of the run.
    unit: `updates` or `images`. A half-life in images means the same at any batch
      size, and unlike a β per image it can be read.
    offload: keep the averages in the host's memory, from which each update fetches
      them.
    batch_size: images that an update sees.

  Raises:
    ValueError: an unknown kind or unit, values that are none of theirs, or the same
      value twice.
  """

  kind: str
  values: tuple[float, ...]
  unit: str
  offload: bool
  batch_size: int

  def __post_init__(self):
    choices = {"kind": ("exponential", "power"), "unit": ("updates", "images")}
    for name, known in choices.items():
      if getattr(self, name) not in known:
        raise ValueError(
          f"Unknown ema.{name} {getattr(self, name)!r}; choose "
          f"{' or '.join(map(repr, known))}."
        )
    names = [label(value) for value in self.values]
    if not names or len(set(names)) < len(names):
      raise ValueError(
        f"ema.values={self.values} must name at least one average, and none twice."
      )
    if self.kind == "power":
      if self.unit != "updates":
        raise ValueError(
          "ema.kind='power' spans a share of the run, whatever it is counted in: set "
          f"ema.unit='updates' in place of {self.unit!r}."
        )
      for value in self.values:
        exponent(value)  # refuses what is no σ_rel
      return
    for value in self.values:
      if self.unit == "updates" and not 0 <= value < 1:
        raise ValueError(
          f"ema.values: the decay {value} must be at least 0 and below 1 (half-lives "
          "go with ema.unit='images')."
        )
      if self.unit == "images" and not 1 <= value < math.inf:
        raise ValueError(
          f"ema.values: the half-life {value} must be at least one image (decays go "
          "with ema.unit='updates')."
        )

  def init(self, params: Any) -> tuple[Any, ...]:
    """Every average before the first update: the parameters."""
    # Copies: a donated state must not hold one buffer twice.
    return tuple(jax.tree.map(jnp.copy, params) for _ in self.values)

  def update(
    self, averages: tuple[Any, ...], params: Any, updates: Int[Array, ""]
  ) -> tuple[Any, ...]:
    """Every average after an update.

    Args:
      updates: how many there have been, with the one that led to `params`.
    """
    shares = [self._share(value, updates) for value in self.values]
    return tuple(
      jax.tree.map(lambda old, new, share=share: old + share * (new - old), old, params)
      for old, share in zip(averages, shares, strict=True)
    )

  def _share(self, value: float, updates: Int[Array, ""]) -> float | Float32[Array, ""]:
    """1 - β."""
    if self.kind == "power":
      # By logarithms: float32's 1 - (1 - 1e-6)^7 has two digits.
      since = jnp.log1p(-1 / updates.astype(jnp.float32))
      return -jnp.expm1((exponent(value) + 1) * since)
    if self.unit == "images":
      return -math.expm1(-math.log(2) * self.batch_size / value)
    return 1 - value

  def places(self, places: Any) -> Any:
    """Shardings of a train state, with those of its averages where they are kept.

    Raises:
      ValueError: the devices reach no memory of the host.
    """
    if not self.offload:
      return places
    _check_memory(jax.tree.leaves(places.ema_params))
    moved = jax.tree.map(lambda p: p.with_memory_kind(HOST_MEMORY), places.ema_params)
    return places.replace(ema_params=moved)

  def fetched_for(self, train_step: Step) -> Step:
    """A train step on a state whose averages are on the devices while it runs."""
    if not self.offload:
      return train_step

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
      averages = jax.device_put(state.ema_params, jax.memory.Space.Device)
      return train_step(state.replace(ema_params=averages), batch)

    return step

  def for_use(self, averages: tuple[Any, ...], number: int = 0) -> Any:
    """The first average, or another, on the devices."""
    chosen = averages[number]
    if not self.offload:
      return chosen
    places = jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind("device"), chosen)
    return jax.device_put(chosen, places)


def label(value: float) -> str:
  """Name of an average in paths: 0.9999, 500000."""
  return f"{value:.12g}"


def save_snapshots(
  workdir: str | pathlib.Path,
  ema: Ema,
  state: Any,
  metadata: Metadata,
  model_of: Callable[[Any, int], Any] | None,
) -> None:
  """Writes each average of a train state as a snapshot, which says which one it is.

  The first goes to WORKDIR/snapshots, the others to WORKDIR/ema/VALUE/snapshots.

  Args:
    model_of: (state, number) → the model that an average makes; None if it is one.

  Raises:
    checkpoint.SavingError: see `checkpoint.save_snapshot`.
  """
  step = int(state.step)
  *before, last = metadata.provenance
  for number, value in enumerate(ema.values):
    if number and not step:
      return  # before any update they are all the parameters
    about = {"kind": ema.kind, "value": value, "unit": ema.unit, "step": step}
    checkpoint.save_snapshot(
      pathlib.Path(workdir, "ema", label(value)) if number else workdir,
      step,
      params=model_of(state, number) if model_of else state.ema_params[number],
      null_caption=state.null_caption,
      metadata=dataclasses.replace(
        metadata, provenance=(*before, {**last, "ema": about})
      ),
    )


def _check_memory(places: list[NamedSharding]) -> None:
  for device in places[0].device_set:
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST_MEMORY not in kinds:
      raise ValueError(
        f"ema.offload=True needs memory of kind {HOST_MEMORY!r}, and {device} has "
        f"{', '.join(kinds) or 'none'}: set it to False."
      )
