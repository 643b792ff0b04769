"""Models beside a pipeline's own: a refiner for the last steps, a weaker one to leave.

Both are told by their metadata whether they go with the first model, before any
parameter is read.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from pixsigma_jax import checkpoint
from pixsigma_jax.metadata import Metadata, disagreements
from pixsigma_jax.models.pixart import PixArtConfig
from pixsigma_jax.sample import weights
from pixsigma_jax.sample.program import SCHEDULE

# What a model was trained with, which all models of a pipeline share.
_FEATURES = ("autoencoder", "scaling_factor", "text_encoder")


@dataclasses.dataclass(frozen=True, eq=False)
class Refiner:
  """The second of two models that share the schedule.

  Attributes:
    params: as the pipeline's own, of the same hyper-parameters.
    switch_at: timestep below which this model draws, and the first one from there up.
  """

  params: Any
  switch_at: int

  def __post_init__(self):
    last = SCHEDULE.num_timesteps - 1
    if not 1 <= self.switch_at <= last:
      raise ValueError(
        f"switch_at={self.switch_at} must be a timestep from 1 to {last}: the first "
        "model draws from there up, the refiner below."
      )


@dataclasses.dataclass(frozen=True, eq=False)
class WeakModel:
  """A worse model of the same latents and captions, for autoguidance.

  Attributes:
    config, params: its own, perhaps smaller than the pipeline's.
  """

  config: PixArtConfig
  params: Any


@dataclasses.dataclass(frozen=True)
class Located:
  """Where a pipeline's further models are; they have been found to go with it.

  Attributes:
    refiner, weak: checkpoints, or None.
    switch_at: see `Refiner`.
    origin: facts for images' settings.
  """

  refiner: weights.Located | None
  switch_at: int | None
  weak: weights.Located | None
  origin: Mapping[str, Any]

  def read(
    self, null_caption: Any, mesh: Mesh | None, prepare: Callable[[Any], Any]
  ) -> dict[str, Any]:
    """The models as fields of a `Pipeline`.

    Args:
      null_caption: the first model's.
      mesh: devices to share parameters.
      prepare: what is made of parameters before they draw.

    Raises:
      ValueError: the refiner was trained with another null caption.
    """
    fields: dict[str, Any] = {}
    if self.refiner is not None:
      snapshot = checkpoint.read_snapshot(os.fspath(self.refiner.checkpoint), mesh)
      theirs = snapshot.null_caption
      # Those of T5 in bfloat16 are not equal to the bit on all machines.
      if (null_caption is not None and theirs is not None) and not np.allclose(
        np.asarray(null_caption), np.asarray(theirs), rtol=0.02, atol=0.02
      ):
        raise ValueError(
          f"The refiner {self.refiner.checkpoint} was trained with another null "
          "caption than the first model: with guidance they do not draw as one."
        )
      assert self.switch_at is not None
      fields["refiner"] = Refiner(prepare(snapshot.params), self.switch_at)
    if self.weak is not None:
      snapshot = checkpoint.read_snapshot(os.fspath(self.weak.checkpoint), mesh)
      fields["weak_model"] = WeakModel(snapshot.config, prepare(snapshot.params))
    return fields


def locate(
  first: Metadata,
  *,
  refiner: str | os.PathLike[str] | None,
  switch_at: int | None,
  autoguidance: str | os.PathLike[str] | None,
  options: weights.Options,
) -> Located:
  """Finds further models, and checks them against the first by their metadata.

  Args:
    first: of the pipeline's own model.
    refiner, autoguidance: see `weights.locate`; None for none.
    switch_at: see `Refiner`.
    options: what weights of another format leave open.

  Raises:
    FileNotFoundError: there is none.
    ValueError: refiner or switch_at without the other; a refiner of another
      architecture; one of another autoencoder or text encoder.
  """
  if (refiner is None) != (switch_at is None):
    raise ValueError(
      f"refiner={refiner} and switch_at={switch_at} go together: give both, the second "
      "model and the timestep below which it draws, or neither."
    )
  origin: dict[str, Any] = {}
  found: list[weights.Located | None] = []
  for name, path in (("refiner", refiner), ("autoguidance", autoguidance)):
    if path is None:
      found.append(None)
      continue
    own = weights.Options() if weights.is_ours(path) else options
    located = weights.locate(path, own)
    metadata = checkpoint.read_metadata(located.checkpoint)
    found.append(located)
    origin[name] = str(located.origin.get("checkpoint", located.checkpoint))
    fields = (*_FEATURES, "model") if name == "refiner" else _FEATURES
    have, want = ({f: getattr(m, f) for f in fields} for m in (first, metadata))
    lines = disagreements(have, want)
    if name == "refiner" and lines:
      raise ValueError(
        f"The refiner {path} does not go with the first model: {'; '.join(lines)}. "
        "Both must have one architecture, autoencoder and text encoder."
      )
    if name == "autoguidance":
      have, want = (
        _of_tokens(PixArtConfig.from_dict(m.model)) for m in (first, metadata)
      )
      lines += disagreements(have, want)
      if lines:
        raise ValueError(
          f"autoguidance={path} cannot guide the model: {'; '.join(lines)}. Depth and "
          "width may differ; autoencoder, text encoder and tokens must not."
        )
  if switch_at is not None:
    Refiner(None, switch_at)  # refuses what is no timestep
    origin["switch_at"] = switch_at
  return Located(found[0], switch_at, found[1], origin)


def _of_tokens(config: PixArtConfig) -> dict[str, Any]:
  """How a model takes latents and captions, which one that it leaves must share."""
  return {
    "in_channels": config.in_channels,
    "patch_size": config.patch_size,
    "caption_width": config.caption_width,
    "caption_length": config.caption_length,
    "kv_compression.window": list(config.window),
  }


def check_weak(config: PixArtConfig, weak: PixArtConfig) -> None:
  """Refuses a weaker model that takes other tokens.

  Raises:
    ValueError: it does.
  """
  if lines := disagreements(_of_tokens(config), _of_tokens(weak)):
    raise ValueError(
      f"weak_model cannot guide the model: {'; '.join(lines)}. Depth and width may "
      "differ; latents, tokens and captions must not."
    )
