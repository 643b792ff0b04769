"""What a checkpoint says about itself, so that it is never used for what it is not."""

import dataclasses
import json
from typing import Any, TypeAlias

Json: TypeAlias = Any  # what JSON holds

FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metadata:
  """Everything about a checkpoint that its arrays do not show.

  Attributes:
    stage: name of the training stage that wrote it.
    model: hyper-parameters, `dataclasses.asdict(PixArtConfig)`.
    autoencoder: identity of what made the latents.
    scaling_factor: what those latents were multiplied with for training.
    text_encoder: identity of what made the caption embeddings.
    resolution: side of the stage's square images, in pixels.
    provenance: how it came to be, oldest first: one entry a stage, with its parent's
      path and step, the transforms applied and its config.
  """

  stage: str
  model: dict[str, Json]
  autoencoder: dict[str, Json]
  scaling_factor: float
  text_encoder: dict[str, Json]
  resolution: int
  provenance: tuple[dict[str, Json], ...] = ()

  def to_json(self) -> dict[str, Json]:
    """As JSON holds it, which knows no tuples."""
    return json.loads(json.dumps({"format": FORMAT, **dataclasses.asdict(self)}))

  @classmethod
  def from_json(cls, fields: dict[str, Json]) -> "Metadata":
    """The inverse of `to_json`.

    Raises:
      ValueError: another format, or fields that are not this one's.
    """
    fields = dict(fields)
    if (have := fields.pop("format", None)) != FORMAT:
      raise ValueError(
        f"Checkpoint metadata has format {have!r}; this version of pixsigma_jax reads "
        f"format {FORMAT}."
      )
    expected = {field.name for field in dataclasses.fields(cls)}
    if set(fields) != expected:
      raise ValueError(
        "Checkpoint metadata does not have the fields of its format: "
        f"missing {sorted(expected - set(fields))}, "
        f"unknown {sorted(set(fields) - expected)}."
      )
    return cls(**{**fields, "provenance": tuple(fields["provenance"])})


def disagreements(have: Json, want: Json, name: str = "") -> list[str]:
  """Every field in which two JSON values differ, as `name: have → want`."""
  if isinstance(have, dict) and isinstance(want, dict):
    keys = list(have) + [key for key in want if key not in have]
    return [
      line
      for key in keys
      for line in disagreements(
        have.get(key), want.get(key), f"{name}.{key}" if name else key
      )
    ]
  if isinstance(have, tuple | list) and isinstance(want, tuple | list):
    have, want = list(have), list(want)  # JSON knows no tuples
  return [] if have == want else [f"{name}: {have!r} → {want!r}"]
