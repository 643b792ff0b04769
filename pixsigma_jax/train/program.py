"""What a stage computes, from its config alone: model, loss, optimizer and train step.

Nothing here touches data, disk or device, so that a stage of any size can be looked at
by its shapes, or compiled for machines that are elsewhere.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from pixsigma_jax.diffusion.schedule import linear_schedule
from pixsigma_jax.models.layers import Compute
from pixsigma_jax.models.pixart import PixArt, PixArtConfig, init_params
from pixsigma_jax.train.config import call, check_fields, model_config
from pixsigma_jax.train.loss import LossFn, make_loss
from pixsigma_jax.train.optimizer import make_optimizer, make_schedule
from pixsigma_jax.train.step import TrainState, init_state, make_train_step

_RATES = ("learning_rate", "schedule", "warmup_steps")


@dataclasses.dataclass(frozen=True)
class Program:
  """A stage's functions.

  Attributes:
    model: the network, with its hyper-parameters in `config` and how it is computed in
      `compute`.
    loss: see `make_loss`.
    learning_rate: update → rate.
    tx: the optimizer.
    train_step: `(state, batch) → (state, metrics)`, see `make_train_step`.
  """

  model: PixArt
  loss: LossFn
  learning_rate: optax.Schedule
  tx: optax.GradientTransformation
  train_step: Callable[[TrainState, Any], tuple[TrainState, Any]]

  def fresh_state(self, init_key: Any, null_caption: Any, key: Any) -> TrainState:
    """Before the first step, from new parameters."""
    params = init_params(self.model.config, init_key)
    return self.first_state(params, null_caption, key)

  def first_state(self, params: Any, null_caption: Any, key: Any) -> TrainState:
    """Before the first step, from a parent's parameters."""
    return init_state(params, null_caption, self.tx, key)

  def abstract_state(self) -> TrainState:
    """Shapes and dtypes of the state."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    config = self.model.config
    null_caption = jax.ShapeDtypeStruct(
      (config.caption_length, config.caption_width), np.float32
    )
    return jax.eval_shape(self.fresh_state, key, null_caption, key)


def make_program(
  config: Mapping[str, Any], *, context: int, scaling_factor: float
) -> Program:
  """Reads the sections model, compute, loss and optimizer.

  Args:
    config: of a stage, see `train`.
    context: parts that each image's tokens are split into.
    scaling_factor: of the autoencoder's latents.

  Raises:
    ValueError: a field is missing, unknown or impossible.
  """
  compute = call(Compute, "compute", config["compute"], merge_rows=context == 1)
  model = PixArt(model_config(config["model"]), compute)
  schedule = linear_schedule()
  loss = call(
    make_loss, "loss", config["loss"], model, schedule, scaling_factor=scaling_factor
  )
  optimizer = dict(config["optimizer"])
  check_fields("optimizer", {r: 0 for r in _RATES if r in optimizer}, _RATES)
  rates = {rate: optimizer.pop(rate) for rate in _RATES}
  learning_rate = make_schedule(**rates, total_steps=config["total_steps"])
  tx = call(make_optimizer, "optimizer", optimizer, learning_rate)
  train_step = make_train_step(
    loss, tx, ema_decay=config["ema_decay"], num_timesteps=schedule.num_timesteps
  )
  return Program(model, loss, learning_rate, tx, train_step)


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
