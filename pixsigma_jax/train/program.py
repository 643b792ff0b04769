"""Model, loss, optimizer and train step of a stage, from its config alone.

Nothing here touches data, disk or device, so that a stage of any size can be looked at
by its shapes, or compiled for machines that are elsewhere.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from pixsigma_jax import sharding
from pixsigma_jax.diffusion.schedule import linear_schedule
from pixsigma_jax.models.layers import Compute
from pixsigma_jax.models.pixart import PixArt, PixArtConfig, init_params
from pixsigma_jax.train.config import call, check_fields, model_config
from pixsigma_jax.train.ema import Ema
from pixsigma_jax.train.guards import Guards, guarded
from pixsigma_jax.train.loss import LossFn, make_loss
from pixsigma_jax.train.optimizer import group_factor, make_optimizer, make_schedule
from pixsigma_jax.train.step import TrainState, init_state, make_train_step
from pixsigma_jax.transforms.lora import Lora

_ADAPTER = 2**32 - 1  # what an adapter's first numbers follow from: no step's number
_RATES = ("learning_rate", "scale_rule", "schedule", "warmup_steps")


@dataclasses.dataclass(frozen=True)
class Program:
  """A stage's functions.

  Attributes:
    model: the network, with its hyper-parameters in `config` and how it is computed in
      `compute`.
    validation_loss: see `make_loss`; without caption dropout, timesteps uniform in
      their range.
    num_timesteps: of the schedule.
    learning_rate: update → rate.
    tx: the optimizer.
    ema: the averages that are kept.
    train_step: `(state, batch) → (state, metrics)`, see `make_train_step`, guarded.
    guards: what becomes of a bad step.
    lora: what is trained in place of the model; None if that is trained itself.
  """

  model: PixArt
  validation_loss: LossFn
  num_timesteps: int
  learning_rate: optax.Schedule
  tx: optax.GradientTransformation
  ema: Ema
  train_step: Callable[[TrainState, Any], tuple[TrainState, Any]]
  guards: Guards
  lora: Lora | None

  def fresh_state(self, init_key: Any, null_caption: Any, key: Any) -> TrainState:
    """Initial state with fresh parameters."""
    params = init_params(self.model.config, init_key)
    return self.first_state(params, null_caption, key)

  def first_state(self, params: Any, null_caption: Any, key: Any) -> TrainState:
    """Initial state with a parent's parameters."""
    if self.lora is None:
      return init_state(params, null_caption, self.tx, self.ema, key)
    adapter = self.lora.init(params, jax.random.fold_in(key, _ADAPTER))
    return init_state(adapter, null_caption, self.tx, self.ema, key, frozen=params)

  def model_of(self, state: TrainState, number: int = 0) -> Any:
    """Parameters of the model that the first average makes, or another."""
    average = self.ema.for_use(state.ema_params, number)
    if self.lora is None:
      return average
    if not int(state.step):
      return state.frozen  # to the bit, where DoRA would round
    places = jax.tree.map(lambda leaf: leaf.sharding, state.frozen)
    leaves, structure = jax.tree.flatten(places)
    return self._merge_to(structure, *leaves)(state.frozen, average)

  @functools.cached_property
  def _merge_to(self) -> Callable[..., Any]:
    """Compiles `Lora.merged` once for each sharding of its result."""

    @functools.cache
    def merge_to(structure: Any, *leaves: Any) -> Any:
      assert self.lora is not None
      places = jax.tree.unflatten(structure, leaves)
      return jax.jit(self.lora.merged, out_shardings=places)

    return merge_to

  def abstract_state(self) -> TrainState:
    """Shapes and dtypes of the state."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    config = self.model.config
    null_caption = jax.ShapeDtypeStruct(
      (config.caption_length, config.caption_width), np.float32
    )
    return jax.eval_shape(self.fresh_state, key, null_caption, key)


def make_program(
  config: Mapping[str, Any], *, mesh: Mesh | None, scaling_factor: float
) -> Program:
  """Reads the sections model, compute, loss, optimizer, ema, adapter and guards.

  Args:
    config: of a stage, see `train`.
    mesh: that state and batches lie on; None for one device.
    scaling_factor: of the autoencoder's latents.

  Raises:
    ValueError: a field is missing, unknown or impossible.
  """
  compute = call(Compute, "compute", config["compute"], merge_rows=True, mesh=mesh)
  model = PixArt(model_config(config["model"]), compute)
  schedule = linear_schedule()

  def loss_of(**changes: Any) -> LossFn:
    section = {**config["loss"], **changes}
    return call(
      make_loss, "loss", section, model, schedule, scaling_factor=scaling_factor
    )

  loss = loss_of()
  optimizer = dict(config["optimizer"])
  check_fields("optimizer", {r: 0 for r in _RATES if r in optimizer}, _RATES)
  rates = {rate: optimizer.pop(rate) for rate in _RATES}
  learning_rate = make_schedule(
    **rates, total_steps=config["total_steps"], batch_size=config["batch_size"]
  )
  tx = call(make_optimizer, "optimizer", optimizer, learning_rate)
  ema = call(Ema, "ema", config["ema"], batch_size=config["batch_size"])
  lora = call(Lora, "adapter", config["adapter"])
  if not lora.rank:
    lora = None
  train_step = make_train_step(
    loss,
    tx,
    ema,
    trained=group_factor(optimizer["groups"]),
    accumulation=config["accumulation"],
    num_timesteps=schedule.num_timesteps,
    merged=lora and lora.merged,
  )
  guards = call(Guards, "guards", config["guards"])
  if guards.bad_step != "stop" or guards.spike_factor:
    train_step = guarded(train_step, guards)
  train_step = ema.fetched_for(train_step)
  return Program(
    model=model,
    # What is measured must not depend on captions that happen to be dropped, nor on
    # which timesteps a stage prefers; but on no others than it trains on.
    validation_loss=loss_of(caption_dropout=0.0, snr_shift=1.0, timestep_beta=None),
    num_timesteps=schedule.num_timesteps,
    learning_rate=learning_rate,
    tx=tx,
    ema=ema,
    train_step=train_step,
    guards=guards,
    lora=lora,
  )


def lower_step(
  program: Program, state: Any, batch: Any, places: Any, mesh: Mesh
) -> jax.stages.Lowered:
  """The train step as it runs on a mesh; its `compile` takes a minute or several.

  One program for a stage: every aspect ratio comes padded to the same length. The state
  is donated.

  Args:
    state, batch: arrays, or their shapes and dtypes.
    places: shardings of the state.
  """
  return jax.jit(
    program.train_step,
    in_shardings=(places, sharding.batch_shardings(batch, mesh)),
    out_shardings=(places, sharding.replicated(mesh)),
    donate_argnums=0,
  ).lower(state, batch)


def abstract_batch(
  model: PixArtConfig, *, batch_size: int, sequence_length: int
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and dtypes of a global batch of VAE and T5 features; see `data/pipeline`."""
  b, n, t = batch_size, sequence_length, model.caption_length
  moments = model.patch_size**2 * model.in_channels * 2
  arrays = {
    "latent_moments": ((b, n, moments), np.float16),
    "coordinates": ((b, n, 2), np.int32),
    "grid": ((b, 2), np.int32),
    "caption_embeddings": ((b, t, model.caption_width), np.float16),
    "caption_mask": ((b, t), np.bool_),
    "original_size": ((b, 2), np.float32),
    "aspect_ratio": ((b,), np.float32),
    "row": ((b,), np.int32),
    "example": ((b,), np.int32),
    "replaced": ((b,), np.bool_),
  }
  return {
    name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in arrays.items()
  }
