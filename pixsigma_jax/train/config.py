"""Calls from a config's fields: each section stands for a call.

A config spells out every field. A missing or an unknown one is an error before anything
is built, so that no default hides in the code and no typo passes unseen.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pixsigma_jax.models.kv_compression import KVCompression
from pixsigma_jax.models.pixart import VARIANTS, PixArtConfig
from pixsigma_jax.train.checks import (
  Check,
  complaints,
  each,
  factor_of_group,
  named,
  none_or,
  number,
  number_or_pair,
  one_of,
  span,
  text,
  truth,
  whole,
  zero_or,
)
from pixsigma_jax.wording import listed

# Sections and fields of a training config, read by `train/loop.py`.
FIELDS = (
  "stage",
  "seed",
  "total_steps",
  "batch_size",
  "accumulation",
  "model",
  "compute",
  "data",
  "loss",
  "optimizer",
  "ema",
  "adapter",
  "init",
  "mesh",
  "checkpoint",
  "guards",
  "validation",
  "log",
  "frozen",
)
# Of sections that no call of their own checks, each after the one that it lies in;
# docs/training.md says what the fields are.
SECTIONS: dict[str, tuple[str, ...]] = {
  "": FIELDS,
  "init": ("parent", "transforms"),
  "data": (
    "path",
    "weights",
    "holdout",
    "hashes",
    "long_caption_ratio",
    "num_threads",
    "num_workers",
    "damaged",
  ),
  "data.hashes": ("autoencoder", "text_encoder", "crop_rule"),
  "checkpoint": (
    "every",
    "keep_last",
    "keep_every",
    "snapshot_every",
    "local",
    "local_every",
    "remote",
    "remote_every",
  ),
  "validation": ("every", "examples"),
  "log": ("every", "sample_every", "prompts", "sample_set", "profile", "wandb"),
  "log.sample_set": ("every", "count"),
  "log.wandb": ("project", "entity"),
}


_DECAY = number(least=0, below=1)
_POSITIVE = number(above=0)
_PERIOD = whole(0)  # steps between two of something; 0 for never
_AXIS = whole(-1)
# Dotted name of a field → what its value must be, by itself. How fields go together is
# checked where they meet: in `agreement`, and by what a section is the call of.
CHECKS: dict[str, Check] = {
  "stage": text,
  # More would be drawn from as if they were less.
  "seed": whole(0, below=2**32),
  "total_steps": whole(1),
  "batch_size": whole(1),
  "accumulation": whole(1),
  "model.variant": text,
  "model.base_size": whole(1),
  "model.pe_interpolation": _POSITIVE,
  "model.mlp_ratio": _POSITIVE,
  "model.in_channels": whole(1),
  "model.learn_variance": truth,
  "model.caption_width": whole(1),
  "model.caption_length": whole(1),
  "model.qk_norm": truth,
  "model.size_conditions": truth,
  "model.kv_compression.ratio": whole(1),
  "model.kv_compression.layers": each(whole(0)),
  "model.kv_compression.operator": text,
  "model.kv_compression.norm": truth,
  "compute.dtype": one_of("float32", "bfloat16", "float16"),
  "compute.attention": text,
  "compute.remat": text,
  "compute.unroll": truth,
  "data.path": text,
  "data.weights": each(_POSITIVE),
  "data.holdout": number(least=0, below=1),
  "data.hashes.autoencoder": text,
  "data.hashes.text_encoder": text,
  "data.hashes.crop_rule": text,
  "data.long_caption_ratio": number(least=0, most=1),
  "data.num_threads": whole(0),
  "data.num_workers": whole(0),
  "data.damaged": one_of("stop", "replace"),
  "loss.caption_dropout": number(least=0, most=1),
  "loss.snr_switch": truth,
  "loss.min_snr_gamma": none_or(_POSITIVE),
  "loss.snr_shift": _POSITIVE,
  "optimizer.name": text,
  "optimizer.learning_rate": number(least=0),
  "optimizer.scale_rule": text,
  "optimizer.schedule": text,
  "optimizer.warmup_steps": whole(0),
  "optimizer.weight_decay": number(least=0),
  "optimizer.clip_norm": number(above=0, infinite=True),
  "optimizer.groups": each(factor_of_group),
  # Of the optimizers, wherever one has them.
  "optimizer.b1": _DECAY,
  "optimizer.b2": _DECAY,
  "optimizer.b3": _DECAY,
  "optimizer.eps": number_or_pair(_POSITIVE),
  "optimizer.clip_threshold": number(above=0, infinite=True),
  "optimizer.momentum_dtype": text,
  "optimizer.decay_rate": _POSITIVE,
  "optimizer.min_size_to_factor": whole(1),
  "optimizer.scale_by_parameter": truth,
  "optimizer.beta": _DECAY,
  "optimizer.nesterov": truth,
  "optimizer.newton_schulz_steps": whole(1),
  "optimizer.consistent_rms": none_or(_POSITIVE),
  "optimizer.adam_b1": _DECAY,
  "optimizer.adam_b2": _DECAY,
  "ema.kind": text,
  "ema.values": each(number(least=0)),
  "ema.unit": text,
  "ema.offload": truth,
  "adapter.rank": whole(0),
  "adapter.alpha": _POSITIVE,
  "adapter.targets": each(text),
  "adapter.dora": truth,
  "init.parent": text,
  "init.transforms": each(named),
  "mesh.slices": whole(0),
  "mesh.data": _AXIS,
  "mesh.fsdp": _AXIS,
  "mesh.context": _AXIS,
  "checkpoint.every": _PERIOD,
  "checkpoint.keep_last": whole(
    1,
    way_out="it is how many of the newest checkpoints stay: for all of them give a "
    "number that is never reached, or keep_every=1",
  ),
  "checkpoint.keep_every": _PERIOD,
  "checkpoint.snapshot_every": _PERIOD,
  "checkpoint.local": text,
  "checkpoint.local_every": _PERIOD,
  "checkpoint.remote": text,
  "checkpoint.remote_every": _PERIOD,
  "guards.bad_step": text,
  "guards.spike_factor": zero_or(number(above=1)),
  "guards.max_bad_steps": whole(1),
  "guards.hang_factor": zero_or(number(above=1)),
  "validation.every": _PERIOD,
  "validation.examples": whole(0),
  "log.every": whole(1),
  "log.sample_every": _PERIOD,
  "log.prompts": each(text),
  "log.sample_set.every": _PERIOD,
  "log.sample_set.count": whole(0),
  "log.profile": span,
  "log.wandb.project": text,
  "log.wandb.entity": text,
  "frozen": text,
}


def check_values(config: Mapping[str, Any]) -> None:
  """Looks at every value by itself.

  Raises:
    ValueError: names all fields whose values make no sense.
  """
  if said := complaints(config, CHECKS):
    raise ValueError(f"The config makes no sense: {'; '.join(said)}.")


def check_fields(section: str, have: Mapping[str, Any], want: Any) -> None:
  """Compares the names in a section with those it must have.

  Raises:
    ValueError: names the missing fields, and the unknown with their nearest.
  """
  dot = f"config.{section}." if section else "config."
  want = list(want)
  problems = []
  for name in have:
    if name not in want:
      near = difflib.get_close_matches(name, want, n=1)
      hint = f" (did you mean {dot}{near[0]}?)" if near else ""
      problems.append(f"unknown {dot}{name}{hint}")
  problems += [f"missing {dot}{name}" for name in want if name not in have]
  if problems:
    raise ValueError(
      f"The config does not fit: {listed(problems, 20, '; ')}. "
      f"Its fields here are {', '.join(want)}."
    )


def call(
  function: Callable[..., Any], section: str, fields: Mapping[str, Any], *args, **more
) -> Any:
  """`function(*args, **fields, **more)`, with the section's names checked first.

  The section must name every keyword-only argument that `more` does not give, and no
  other unless the function hands further ones on.
  """
  parameters = inspect.signature(function).parameters.values()
  names = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
  have = fields
  if any(p.kind is p.VAR_KEYWORD for p in parameters):
    # What is handed on is not known here, but a typo of something missing is.
    missing = [name for name in names if name not in {**fields, **more}]
    have = {
      name: value
      for name, value in fields.items()
      if name in names or difflib.get_close_matches(name, missing)
    }
  check_fields(section, have, [name for name in names if name not in more])
  return function(*args, **fields, **more)


def model_config(fields: Mapping[str, Any]) -> PixArtConfig:
  """`config.model`: a variant of `VARIANTS`, and every other field of PixArtConfig."""
  fields = dict(fields)
  names = [
    name
    for name in inspect.signature(PixArtConfig).parameters
    if name not in VARIANTS["XL/2"]
  ]
  check_fields("model", fields, ["variant", *names])
  compression = call(KVCompression, "model.kv_compression", fields["kv_compression"])
  return PixArtConfig.from_variant(**{**fields, "kv_compression": compression})
