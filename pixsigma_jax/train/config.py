"""From a config file's fields to calls: a section is the call that it stands for.

A config spells out every field. A missing or an unknown one is an error before anything
is built, so that no default hides in the code and no typo passes unseen.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pixsigma_jax.models.kv_compression import KVCompression
from pixsigma_jax.models.pixart import VARIANTS, PixArtConfig
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
  "log": ("every", "sample_every", "prompts", "sample_set", "profile"),
  "log.sample_set": ("every", "count"),
}


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
