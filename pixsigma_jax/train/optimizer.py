"""The optimizer of a stage: clipping, the update, its learning rate over the steps."""

from collections.abc import Callable
from typing import Any

import optax

from pixsigma_jax.train.came import scale_by_came
from pixsigma_jax.train.config import call


def make_schedule(
  *, learning_rate: float, schedule: str, warmup_steps: int, total_steps: int
) -> optax.Schedule:
  """Linear warm-up from 0, then constant, or half a cosine down to 0 at `total_steps`.

  Raises:
    ValueError: an unknown schedule, or a warm-up that does not leave a step.
  """
  if not 0 <= warmup_steps < total_steps:
    raise ValueError(
      f"optimizer.warmup_steps={warmup_steps} must be at least 0 and below "
      f"total_steps={total_steps}."
    )
  if schedule == "constant":
    after = optax.constant_schedule(learning_rate)
  elif schedule == "cosine":
    after = optax.cosine_decay_schedule(learning_rate, total_steps - warmup_steps)
  else:
    raise ValueError(
      f"Unknown optimizer.schedule {schedule!r}; choose 'constant' or 'cosine'."
    )
  # The first update of a warm-up has rate 0, as the reference's.
  warmup = optax.linear_schedule(0.0, learning_rate, max(warmup_steps, 1))
  return optax.join_schedules([warmup, after], [warmup_steps])


def _adamw(*, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
  return optax.scale_by_adam(b1=b1, b2=b2, eps=eps)


# Name of an optimizer → its update before weight decay and learning rate.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
  "adamw": _adamw,
  "came": scale_by_came,
}


def make_optimizer(
  learning_rate: optax.Schedule,
  *,
  name: str,
  weight_decay: float,
  clip_norm: float,
  **fields: Any,
) -> optax.GradientTransformation:
  """Clips gradients to a global norm of `clip_norm`, then updates.

  Weight decay is decoupled and acts on every parameter, as in the reference.

  Args:
    fields: those of the optimizer: b1, b2 and eps of AdamW; for CAME see
      `scale_by_came`.

  Raises:
    ValueError: an unknown optimizer, fields that are not its own, or a norm that is not
      positive.
  """
  if name not in OPTIMIZERS:
    known = " or ".join(map(repr, OPTIMIZERS))
    raise ValueError(f"Unknown optimizer.name {name!r}; choose {known}.")
  if clip_norm <= 0:
    raise ValueError(f"optimizer.clip_norm={clip_norm} must be above 0.")
  return optax.chain(
    optax.clip_by_global_norm(clip_norm),
    call(OPTIMIZERS[name], "optimizer", fields),
    optax.add_decayed_weights(weight_decay),
    optax.scale_by_learning_rate(learning_rate),
  )
