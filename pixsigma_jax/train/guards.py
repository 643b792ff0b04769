"""Handling of bad steps: numbers that are not finite, or a spike of the gradient."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pixsigma_jax import distributed
from pixsigma_jax.data.mixture import Mixture
from pixsigma_jax.train.step import GuardState, Metrics, TrainState

POLICIES = ("stop", "skip", "rollback")

# Good steps until the running mean of the gradient's norm is believed, and how slowly
# it forgets.
SETTLED = 50
_DECAY = 0.98


_WATCHED = ("loss", "norm/gradients", "norm/params")


class BadStepError(ArithmeticError):
  """A loss, a gradient or parameters are not finite, or the gradient leaps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guards:
  """The section `guards` of a config.

  A step is bad whose loss or gradient is not finite, or whose gradient's norm is
  `spike_factor` times its running mean.

  Attributes:
    bad_step: what a bad step does: `stop` ends the run; `skip` leaves the state as it
      was and goes on with the next batch; `rollback` goes back to the newest
      checkpoint and on with the data after the bad batch.
    spike_factor: above 1; 0 lets the norm leap as it likes.
    max_bad_steps: after so many bad steps in a row, or rollbacks to one checkpoint,
      the run ends.
    hang_factor: a step that takes so many times the median is reported with the stacks
      of all threads; 0 for never.

  Raises:
    ValueError: an unknown policy, or numbers that make no sense.
  """

  bad_step: str
  spike_factor: float
  max_bad_steps: int
  hang_factor: float

  def __post_init__(self):
    if self.bad_step not in POLICIES:
      raise ValueError(
        f"Unknown config.guards.bad_step {self.bad_step!r}; choose one of {POLICIES}."
      )
    for name in ("spike_factor", "hang_factor"):
      factor = getattr(self, name)
      if factor != 0 and not factor > 1:
        raise ValueError(
          f"config.guards.{name}={factor} must be above 1, or 0 for off."
        )
    if self.max_bad_steps < 1:
      raise ValueError(
        f"config.guards.max_bad_steps={self.max_bad_steps} must be at least 1."
      )


def guarded(
  train_step: Callable[[TrainState, Any], tuple[TrainState, Metrics]], guards: Guards
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
  """Wraps a step so that a bad one changes only counts.

  What is bad is known before the update, so the compiler chooses between old and new
  while it writes, and keeps no second copy of the state. The metrics stay those of the
  step, and gain `bad`, how many bad steps this one ends a row of, and `norm/usual`, the
  running mean before it.
  """

  def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
    after, metrics = train_step(state, batch)
    guard: GuardState = state.guard
    norm = metrics["norm/gradients"]
    good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    if guards.spike_factor:
      leaps = norm > guards.spike_factor * guard.norm
      good &= ~(leaps & (guard.good >= SETTLED))
    # A plain mean of the first norms, and from then on one that forgets.
    weight = jnp.maximum(1 - _DECAY, 1 / (guard.good + 1).astype(jnp.float32))
    moved = GuardState(
      norm=guard.norm + weight * (norm - guard.norm),
      good=guard.good + 1,
      bad=jnp.int32(0),
    )
    after = after.replace(guard=moved)
    before = state.replace(step=after.step, guard=guard._replace(bad=guard.bad + 1))
    state = jax.tree.map(lambda new, old: jnp.where(good, new, old), after, before)
    metrics["bad"] = state.guard.bad
    metrics["norm/usual"] = guard.norm
    return state, metrics

  return step


def is_bad(metrics: Any) -> bool:
  """Whether a step was bad, by its metrics on the host."""
  finite = all(np.isfinite(metrics[name]) for name in _WATCHED)
  return not finite or bool(metrics.get("bad", 0))


def describe(step: int, metrics: Any, examples: Any, mixture: Mixture) -> str:
  """Why a step is bad, and by which examples of the batch."""
  numbers = {name: float(metrics[name]) for name in _WATCHED}
  said = ", ".join(f"{name} {number}" for name, number in numbers.items())
  losses, examples = np.asarray(metrics["example_loss"]), distributed.whole(examples)
  if np.isfinite(list(numbers.values())).all():
    times = numbers["norm/gradients"] / float(metrics["norm/usual"])
    said += f" (the gradient's norm is {times:.3g} times the usual)"
    blamed = np.argsort(-losses)[:1]
  else:
    blamed = np.flatnonzero(~np.isfinite(losses))
  which = "no example of its own, every one's loss is finite"
  if len(blamed):
    chosen = examples[blamed].tolist()
    names = [
      f"{mixture.read([number])[0].id} (record {number})" for number in chosen[:8]
    ]
    which = f"the examples {', '.join(names)}"
    which += f" and {len(blamed) - 8} more" if len(blamed) > 8 else ""
  return f"{said} at step {step}, from {which} of {mixture}."
