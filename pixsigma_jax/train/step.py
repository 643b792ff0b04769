"""One optimisation step, as a pure function of (state, batch)."""

from typing import Any, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from pixsigma_jax.train.loss import Batch, LossFn

Metrics: TypeAlias = dict[str, Array]

DECILES = 10


class TrainState(flax.struct.PyTreeNode):
  """Everything a resumed run needs but its place in the data."""

  # Untyped on purpose: JAX rebuilds this tree out of shapes, specs and shardings.
  step: Any
  params: Any
  ema_params: Any
  opt_state: Any
  null_caption: Any  # the text encoder's "", not trained
  key: Any  # never split, never replaced: each step folds its own number in


def init_state(
  params: Any, null_caption: Array, tx: optax.GradientTransformation, key: Array
) -> TrainState:
  """A state before its first step; the EMA starts at the parameters."""
  return TrainState(
    step=jnp.int32(0),
    params=params,
    # A copy: a donated state must not hold one buffer twice.
    ema_params=jax.tree.map(jnp.copy, params),
    opt_state=tx.init(params),
    null_caption=null_caption,
    key=key,
  )


def make_train_step(
  loss_fn: LossFn,
  tx: optax.GradientTransformation,
  *,
  ema_decay: float,
  num_timesteps: int,
):
  """Builds the update; the caller jits it, shards it and donates `state`.

  Its metrics are those of the batch before the update: `loss`, `mse`, `vb`; norms of
  gradients (before clipping), updates and parameters; `decile_loss` and `decile_count`,
  loss summed and examples counted by tenth of the timesteps; `example_loss` by row;
  `replaced_examples`, of how many rows the record could not be read.
  """

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(state.key, state.step)
    (loss, per_example), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      state.params, state.null_caption, batch, key
    )
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    decile = per_example["timesteps"] * DECILES // num_timesteps
    metrics = {
      "loss": loss,
      "mse": per_example["mse"].mean(),
      "vb": per_example["vb"].mean(),
      "norm/gradients": optax.tree.norm(grads),
      "norm/updates": optax.tree.norm(updates),
      "norm/params": optax.tree.norm(params),
      "decile_loss": jnp.zeros(DECILES).at[decile].add(per_example["loss"]),
      "decile_count": jnp.zeros(DECILES).at[decile].add(1.0),
      "example_loss": per_example["loss"],
      "replaced_examples": batch["replaced"].sum(),
    }
    state = state.replace(
      step=state.step + 1,
      params=params,
      ema_params=optax.incremental_update(params, state.ema_params, 1 - ema_decay),
      opt_state=opt_state,
    )
    return state, metrics

  return train_step
