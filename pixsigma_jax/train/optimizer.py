"""The optimizer of a stage: clipping, the update, its learning rate over the steps."""

import difflib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import optax
from optax import contrib

from pixsigma_jax import tree
from pixsigma_jax.train.came import scale_by_came
from pixsigma_jax.train.config import call
from pixsigma_jax.train.tensors import each_tensor

# The batch that the official configs name their learning rates for.
BASE_BATCH = 256
# Rule → factor of the learning rate, given batch over base batch.
SCALE_RULES: dict[str, Callable[[float], float]] = {
  "none": lambda ratio: 1.0,
  "sqrt": math.sqrt,
  "linear": lambda ratio: ratio,
}

# Pattern of leaf names → factor of their learning rate; the first match counts.
Groups: TypeAlias = Sequence[Any]


def scaled_rate(learning_rate: float, *, rule: str, batch_size: int) -> float:
  """Learning rate of a batch, from the rate for a batch of 256.

  `none` takes it as it is; `sqrt` is what the official code does without a word
  (`auto_lr`), with images of all devices and accumulated batches counted.

  Raises:
    ValueError: an unknown rule.
  """
  if rule not in SCALE_RULES:
    known = ", ".join(map(repr, SCALE_RULES))
    raise ValueError(f"Unknown optimizer.scale_rule {rule!r}; choose one of {known}.")
  return learning_rate * SCALE_RULES[rule](batch_size / BASE_BATCH)


def rate_in_words(learning_rate: float, *, rule: str, batch_size: int) -> str:
  """The learning rate of a run, and how it came about."""
  rate = scaled_rate(learning_rate, rule=rule, batch_size=batch_size)
  return (
    f"Learning rate {rate:.4g}: the config's {learning_rate:g} by the rule {rule!r}, "
    f"batch {batch_size}, base batch {BASE_BATCH}."
  )


def make_schedule(
  *,
  learning_rate: float,
  scale_rule: str,
  schedule: str,
  warmup_steps: int,
  total_steps: int,
  batch_size: int,
) -> optax.Schedule:
  """Linear warm-up from 0, then constant, or half a cosine down to 0 at `total_steps`.

  Raises:
    ValueError: an unknown schedule or rule, or a warm-up that does not leave a step.
  """
  if not 0 <= warmup_steps < total_steps:
    raise ValueError(
      f"optimizer.warmup_steps={warmup_steps} must be at least 0 and below "
      f"total_steps={total_steps}."
    )
  rate = scaled_rate(learning_rate, rule=scale_rule, batch_size=batch_size)
  if schedule == "constant":
    after = optax.constant_schedule(rate)
  elif schedule == "cosine":
    after = optax.cosine_decay_schedule(rate, total_steps - warmup_steps)
  else:
    raise ValueError(
      f"Unknown optimizer.schedule {schedule!r}; choose 'constant' or 'cosine'."
    )
  # The first update of a warm-up has rate 0, as the reference's.
  warmup = optax.linear_schedule(0.0, rate, max(warmup_steps, 1))
  return optax.join_schedules([warmup, after], [warmup_steps])


def _adamw(*, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
  return optax.scale_by_adam(b1=b1, b2=b2, eps=eps)


def _lion(*, b1: float, b2: float) -> optax.GradientTransformation:
  return optax.scale_by_lion(b1=b1, b2=b2)


def _adafactor(
  *,
  b1: float,
  decay_rate: float,
  eps: float,
  clip_threshold: float,
  min_size_to_factor: int,
  scale_by_parameter: bool,
) -> optax.GradientTransformation:
  """Adafactor's update (Shazeer & Stern 2018), of each tensor of the reference."""
  parts = [
    optax.scale_by_factored_rms(
      decay_rate=decay_rate, epsilon=eps, min_dim_size_to_factor=min_size_to_factor
    ),
    optax.clip_by_block_rms(clip_threshold),
  ]
  if scale_by_parameter:
    parts.append(optax.scale_by_param_block_rms())
  update = each_tensor(optax.chain(*parts))
  # The momentum knows no tensors, and keeps the places of the parameters.
  return optax.chain(update, optax.ema(b1, debias=False)) if b1 else update


# The blocks' matrices: all their kernels but the compressor's, a filter a channel.
_ORTHOGONAL = re.compile(r"^blocks_.*(?<!kv_compressor)/kernel$")


def _muon(
  *,
  beta: float,
  nesterov: bool,
  newton_schulz_steps: int,
  consistent_rms: float | None,
  eps: float,
  adam_b1: float,
  adam_b2: float,
) -> optax.GradientTransformation:
  """Muon (Jordan et al. 2024) for the blocks' matrices, Adam for everything else.

  The last two axes of a leaf are a matrix, whatever stands before them a stack: each
  of q, k and v of each layer is orthogonalized by itself.
  """

  matrix = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

  def matrices(params: Any) -> Any:
    return tree.map_with_name(
      lambda name, _: matrix if _ORTHOGONAL.search(name) else None, params
    )

  muon = contrib.muon(
    learning_rate=1.0,
    ns_steps=newton_schulz_steps,
    beta=beta,
    eps=eps,
    nesterov=nesterov,
    consistent_rms=consistent_rms,
    adam_b1=adam_b1,
    adam_b2=adam_b2,
    muon_weight_dimension_numbers=matrices,
  )
  return optax.chain(muon, optax.scale(-1.0))  # the rate and its sign come later


# Name of an optimizer → its update before weight decay and learning rate.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
  "adamw": _adamw,
  "came": scale_by_came,
  "adafactor": _adafactor,
  "lion": _lion,
  "muon": _muon,
}


def make_optimizer(
  learning_rate: optax.Schedule,
  *,
  name: str,
  weight_decay: float,
  clip_norm: float,
  groups: Groups,
  **fields: Any,
) -> optax.GradientTransformation:
  """Clips gradients to a global norm of `clip_norm`, then updates.

  Weight decay is decoupled and acts on every parameter that is trained, as in the
  reference.

  Args:
    groups: (pattern, factor) pairs: the learning rate of a leaf is multiplied with the
      factor of the first pattern that its name has anywhere; 1 if none. A factor of 0
      freezes: no update, no decay, no state, no part in the norm.
    fields: those of the optimizer: b1, b2 and eps of AdamW; for CAME see
      `scale_by_came`.

  Raises:
    ValueError: an unknown optimizer, fields that are not its own, a norm that is not
      positive or groups that are none; from the transformation's `init`, a pattern
      that no leaf has, or nothing left to train.
  """
  if name not in OPTIMIZERS:
    known = ", ".join(map(repr, OPTIMIZERS))
    raise ValueError(f"Unknown optimizer.name {name!r}; choose one of {known}.")
  if clip_norm <= 0:
    raise ValueError(f"optimizer.clip_norm={clip_norm} must be above 0.")
  factor = group_factor(groups)
  tx = optax.chain(
    optax.clip_by_global_norm(clip_norm),
    call(OPTIMIZERS[name], "optimizer", fields),
    optax.add_decayed_weights(weight_decay),
    optax.stateless(
      lambda updates, _: tree.map_with_name(
        lambda name, update: update if factor(name) == 1 else factor(name) * update,
        updates,
      )
    ),
    optax.scale_by_learning_rate(learning_rate),
  )
  if any(value == 0 for _, value in groups):

    def labels(params: Any) -> Any:
      return tree.map_with_name(
        lambda name, _: "trained" if factor(name) else "frozen", params
      )

    tx = optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)

  def init(params: Any) -> Any:
    _check_groups(groups, list(tree.named_leaves(params)))
    return tx.init(params)

  return optax.GradientTransformation(init, tx.update)


def group_factor(groups: Groups) -> Callable[[str], float]:
  """Name of a leaf → factor of its learning rate; 0 for what is frozen.

  Raises:
    ValueError: a group is no pair of a regular expression and a factor of at least 0.
  """
  for group in groups:
    if len(group) != 2 or not 0 <= group[1] < math.inf:
      raise ValueError(
        f"optimizer.groups: {group} must be a pattern and a factor of at least 0."
      )
    try:
      re.compile(group[0])
    except re.error as error:
      raise ValueError(
        f"optimizer.groups: {group[0]!r} is no regular expression: {error}."
      ) from None
  return lambda name: next((f for rule, f in groups if re.search(rule, name)), 1)


def _check_groups(groups: Groups, names: Sequence[str]) -> None:
  for rule, _ in groups:
    if not any(re.search(rule, name) for name in names):
      near = difflib.get_close_matches(rule, names, n=3, cutoff=0.3)
      raise ValueError(
        f"optimizer.groups: no parameter has {rule!r} in its name. Near are "
        f"{', '.join(near or names[:3])}."
      )
  factor = group_factor(groups)
  if not any(factor(name) for name in names):
    raise ValueError(
      "optimizer.groups freeze every parameter: leave something to train."
    )
