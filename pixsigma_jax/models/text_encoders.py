"""Known text encoders, from their identity in a checkpoint to the object."""

from collections.abc import Mapping
from typing import Any

from pixsigma_jax.models.hashed_words import HashedWordEncoder

_NAMES = {"hashed-words": lambda identity: HashedWordEncoder(identity["width"])}


def text_encoder_from(identity: Mapping[str, Any]) -> HashedWordEncoder:
  """The text encoder that an `identity` names, as records and checkpoints hold it.

  Raises:
    ValueError: there is none of that name, or it is of another version.
  """
  name = identity.get("name")
  if name not in _NAMES:
    raise ValueError(
      f"Unknown text encoder {name!r}: this version of pixsigma_jax knows "
      f"{', '.join(_NAMES)}."
    )
  encoder = _NAMES[name](identity)
  if encoder.identity != dict(identity):
    raise ValueError(
      f"The text encoder {dict(identity)} is not what this version of pixsigma_jax has "
      f"under that name, {encoder.identity}: use the version that wrote it."
    )
  return encoder
