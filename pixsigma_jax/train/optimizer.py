"""The optimizer of a stage: clipping, AdamW, and its learning rate over the steps."""

import optax


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


def make_optimizer(
  learning_rate: optax.Schedule,
  *,
  name: str,
  b1: float,
  b2: float,
  eps: float,
  weight_decay: float,
  clip_norm: float,
) -> optax.GradientTransformation:
  """Clips gradients to a global norm of `clip_norm`, then updates.

  Weight decay acts on every parameter, as in the reference.

  Raises:
    ValueError: an unknown optimizer, or a norm that is not positive.
  """
  if name != "adamw":
    raise ValueError(f"Unknown optimizer.name {name!r}; choose 'adamw'.")
  if clip_norm <= 0:
    raise ValueError(f"optimizer.clip_norm={clip_norm} must be above 0.")
  return optax.chain(
    optax.clip_by_global_norm(clip_norm),
    optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay),
  )
