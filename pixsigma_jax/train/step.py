"""One optimisation step, as a pure function of (state, batch)."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float32

from pixsigma_jax import sharding, tree
from pixsigma_jax.train.ema import Ema
from pixsigma_jax.train.loss import Batch, LossFn

Metrics: TypeAlias = dict[str, Array]

DECILES = 10


class GuardState(NamedTuple):
  """Running statistics that detect a spike, see `train/guards.py`.

  `norm` is the running mean of the gradient's norm over the good steps, `good` their
  number, `bad` that of the bad ones since.
  """

  norm: Any
  good: Any
  bad: Any


class TrainState(flax.struct.PyTreeNode):
  """Everything a resumed run needs but its place in the data."""

  # Untyped on purpose: JAX rebuilds this tree out of shapes, specs and shardings.
  step: Any
  params: Any
  ema_params: Any  # a tuple, in the order of config.ema.values
  opt_state: Any
  null_caption: Any  # the text encoder's "", not trained
  guard: Any
  key: Any  # never split, never replaced: each step folds its own number in
  # Of a run that trains an adapter, what it changes. It never changes itself: a
  # checkpoint goes without it, and who resumes reads the parent again.
  frozen: Any = None

  def shardings(self, mesh: Mesh | AbstractMesh) -> Any:
    """A `NamedSharding` for every leaf, see `sharding.state_shardings`."""
    return sharding.state_shardings(self, mesh, self.params, self.frozen)


def init_state(
  params: Any,
  null_caption: Array,
  tx: optax.GradientTransformation,
  ema: Ema,
  key: Array,
  frozen: Any = None,
) -> TrainState:
  """A state before its first step; every EMA starts at the parameters."""
  return TrainState(
    step=jnp.int32(0),
    params=params,
    ema_params=ema.init(params),
    opt_state=tx.init(params),
    null_caption=null_caption,
    guard=GuardState(jnp.float32(0), jnp.int32(0), jnp.int32(0)),
    key=key,
    frozen=frozen,
  )


def decile_sums(
  per_example: dict[str, Array], num_timesteps: int
) -> tuple[Float32[Array, " 10"], Float32[Array, " 10"]]:
  """Losses summed and examples counted, by tenth of the timesteps."""
  decile = per_example["timesteps"] * DECILES // num_timesteps
  zeros = jnp.zeros(DECILES)
  return zeros.at[decile].add(per_example["loss"]), zeros.at[decile].add(1.0)


def make_train_step(
  loss_fn: LossFn,
  tx: optax.GradientTransformation,
  ema: Ema,
  *,
  trained: Callable[[str], Any],
  accumulation: int,
  num_timesteps: int,
  merged: Callable[[Any, Any], Any] | None = None,
):
  """Builds the update; the caller jits it, shards it and donates `state`.

  Its metrics are those of the batch before the update: `loss`, `mse`, `vb`; norms of
  gradients (of what is trained, before clipping), updates and parameters; `decile_loss`
  and `decile_count`, loss summed and examples counted by tenth of the timesteps;
  `example_loss` by row; `replaced_examples`, of how many rows the record could not be
  read.

  Args:
    trained: name of a parameter → whether it is; no gradient is computed of others.
    accumulation: parts that the batch is taken in, one after the other, whose gradients
      are averaged before the one update. Every row draws what it draws in the whole
      batch, so that only roundings differ. It must divide the rows of each device.
    merged: (frozen, adapter) → the model's parameters, if what is trained is an
      adapter; None if it is the model.
  """

  def gradients(
    state: TrainState, batch: Batch, key: Array
  ) -> tuple[dict[str, Array], dict[str, Array]]:
    """Gradients of the trained leaves by name; the loss's outputs for each example."""
    params = state.params
    leaves = tree.named_leaves(params)
    moving = {name: leaf for name, leaf in leaves.items() if trained(name)}

    def loss_of(moving: dict[str, Array], batch: Batch) -> Any:
      whole = tree.map_with_name(lambda name, leaf: moving.get(name, leaf), params)
      if merged is not None:
        whole = merged(state.frozen, whole)
      return loss_fn(whole, state.null_caption, batch, key)

    def of_part(part: Batch) -> tuple[dict[str, Array], dict[str, Array]]:
      return jax.grad(loss_of, has_aux=True)(moving, part)

    if accumulation == 1:
      return of_part(batch)

    def add(total: dict[str, Array], part: Batch) -> Any:
      grads, per_example = of_part(part)
      return jax.tree.map(jnp.add, total, grads), per_example

    zeros = jax.tree.map(jnp.zeros_like, moving)
    total, per_example = jax.lax.scan(add, zeros, jax.tree.map(_split, batch))
    return (
      jax.tree.map(lambda grad: grad / accumulation, total),
      jax.tree.map(_joined, per_example),
    )

  def _split(rows: Array) -> Array:
    # Examples lie on the devices in order. Microbatch i takes every `accumulation`-th
    # example, starting at i, so it covers all devices and no example moves.
    parts = rows.reshape(-1, accumulation, *rows.shape[1:])
    return parts.swapaxes(0, 1)

  def _joined(parts: Array) -> Array:
    return parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(state.key, state.step)
    moving, per_example = gradients(state, batch, key)
    grads = tree.map_with_name(
      lambda name, leaf: moving.get(name, jnp.zeros_like(leaf)), state.params
    )
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    decile_loss, decile_count = decile_sums(per_example, num_timesteps)
    metrics = {
      "loss": per_example["loss"].mean(),
      "mse": per_example["mse"].mean(),
      "vb": per_example["vb"].mean(),
      "norm/gradients": optax.tree.norm(moving),
      "norm/updates": optax.tree.norm(updates),
      "norm/params": optax.tree.norm(params),
      "decile_loss": decile_loss,
      "decile_count": decile_count,
      "example_loss": per_example["loss"],
      "replaced_examples": batch["replaced"].sum(),
    }
    state = state.replace(
      step=state.step + 1,
      params=params,
      ema_params=ema.update(state.ema_params, params, state.step + 1),
      opt_state=opt_state,
    )
    return state, metrics

  return train_step
