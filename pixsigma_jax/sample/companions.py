"""Models beside a pipeline's own: a refiner for the last steps, a weaker one to leave.

Both are told by their metadata whether they go with the first model, before any
parameter is read. Each model has its own LoRAs, as each pipeline of diffusers has.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from jax.sharding import Mesh

from pixsigma_jax import checkpoint
from pixsigma_jax.metadata import Metadata, disagreements
from pixsigma_jax.models.pixart import PixArtConfig
from pixsigma_jax.sample import weights
from pixsigma_jax.sample.adapters import Adaptable, Adapter, Adapters, read_flags
from pixsigma_jax.sample.program import SCHEDULE

_Loras: TypeAlias = Mapping[str, tuple[Adapter, float]]

# What a model was trained with, which all models of a pipeline share.
_FEATURES = ("autoencoder", "scaling_factor", "text_encoder")


@dataclasses.dataclass(frozen=True, eq=False)
class Refiner(Adaptable):
  """The second of two models that share the schedule.

  Attributes:
    config, params: as the pipeline's own, of the same hyper-parameters.
    switch_at: timestep below which this model draws, and the first one from there up.
    loras: its own, which do not act in the first model.
  """

  switch_at: int

  def __post_init__(self):
    _check_switch(self.switch_at)


@dataclasses.dataclass(frozen=True, eq=False)
class WeakModel(Adaptable):
  """A worse model of the same latents and captions, for autoguidance.

  Attributes:
    config, params: its own, perhaps smaller than the pipeline's.
    loras: its own, which do not act in the pipeline's.
  """


@dataclasses.dataclass(frozen=True)
class Located:
  """Where a pipeline's further models are; they have been found to go with it.

  Attributes:
    refiner, weak: checkpoints, or None.
    switch_at: see `Refiner`.
    origin: facts for images' settings.
    loras, refiner_loras, weak_loras: of the first model, the refiner and the weaker
      one, by name with a scale each.
    arguments: of `Pipeline.from_checkpoint`, for the same.
  """

  refiner: weights.Located | None
  switch_at: int | None
  weak: weights.Located | None
  origin: Mapping[str, Any]
  loras: _Loras
  refiner_loras: _Loras
  weak_loras: _Loras
  arguments: Mapping[str, Any]

  def identities(self) -> dict[str, Any]:
    """What images depend on, wherever it lies: hashes, scales and `switch_at`."""
    about: dict[str, Any] = {}
    for name, loras in (
      ("loras", self.loras),
      ("refiner_loras", self.refiner_loras),
      ("autoguidance_loras", self.weak_loras),
    ):
      about[name] = [
        {"fingerprint": lora.fingerprint, "scale": scale}
        for lora, scale in loras.values()
        if scale
      ]
    for name, located in (("refiner", self.refiner), ("autoguidance", self.weak)):
      if located is not None:
        snapshot = checkpoint.read_snapshot(os.fspath(located.checkpoint))
        about[name] = snapshot.with_fingerprint().fingerprint
    about["switch_at"] = self.switch_at
    return {name: value for name, value in about.items() if value}

  def read(
    self, null_caption: Any, mesh: Mesh | None, prepare: Callable[[Any], Any]
  ) -> dict[str, Any]:
    """The models as fields of a `Pipeline`.

    Args:
      null_caption: the first model's.
      mesh: devices to share parameters.
      prepare: what is made of parameters before they draw.

    Raises:
      ValueError: the refiner was trained with another null caption, or a LoRA is in its
        model already.
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
      fields["refiner"] = Refiner(
        snapshot.config,
        prepare(snapshot.params),
        self.switch_at,
        loras=Adapters(snapshot.path),
      ).with_adapters(self.refiner_loras)
    if self.weak is not None:
      snapshot = checkpoint.read_snapshot(os.fspath(self.weak.checkpoint), mesh)
      fields["weak_model"] = WeakModel(
        snapshot.config, prepare(snapshot.params), loras=Adapters(snapshot.path)
      ).with_adapters(self.weak_loras)
    return fields


def locate(
  first: Metadata,
  *,
  options: weights.Options,
  refiner: str | os.PathLike[str] | None = None,
  switch_at: int | None = None,
  autoguidance: str | os.PathLike[str] | None = None,
  lora: Sequence[str] = (),
  refiner_lora: Sequence[str] = (),
  autoguidance_lora: Sequence[str] = (),
) -> Located:
  """Finds further models and LoRAs, and checks them against the first.

  Args:
    first: of the pipeline's own model.
    options: what weights of another format leave open.
    refiner, autoguidance: see `weights.locate`; None for none.
    switch_at: see `Refiner`.
    lora, refiner_lora, autoguidance_lora: PATH[:SCALE] of each model's LoRAs.

  Raises:
    FileNotFoundError: there is none.
    ValueError: refiner or switch_at without the other; a refiner of another
      architecture; one of another autoencoder or text encoder; LoRAs of a model that is
      not there, or see `adapters.read_flags`.
  """
  if (refiner is None) != (switch_at is None):
    raise ValueError(
      f"refiner={refiner} and switch_at={switch_at} go together: give both, the second "
      "model and the timestep below which it draws, or neither."
    )
  for name, path, loras in (
    ("refiner", refiner, refiner_lora),
    ("autoguidance", autoguidance, autoguidance_lora),
  ):
    if loras and path is None:
      raise ValueError(
        f"{name}_lora={','.join(loras)} is for a model that there is not: give {name}, "
        f"or leave {name}_lora out."
      )
  config = weak_config = PixArtConfig.from_dict(first.model)
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
      weak_config = PixArtConfig.from_dict(metadata.model)
      lines += disagreements(_of_tokens(config), _of_tokens(weak_config))
      if lines:
        raise ValueError(
          f"autoguidance={path} cannot guide the model: {'; '.join(lines)}. Depth and "
          "width may differ; autoencoder, text encoder and tokens must not."
        )
  if switch_at is not None:
    _check_switch(switch_at)
    origin["switch_at"] = switch_at
  second, weak = found
  return Located(
    refiner=second,
    switch_at=switch_at,
    weak=weak,
    origin=origin,
    loras=read_flags(lora, config),
    refiner_loras=read_flags(refiner_lora, config),
    weak_loras=read_flags(autoguidance_lora, weak_config),
    arguments={
      "refiner": None if second is None else second.checkpoint,
      "switch_at": switch_at,
      "autoguidance": None if weak is None else weak.checkpoint,
      "lora": lora,
      "refiner_lora": refiner_lora,
      "autoguidance_lora": autoguidance_lora,
    },
  )


def _of_tokens(config: PixArtConfig) -> dict[str, Any]:
  """How a model takes latents and captions, which one that it leaves must share."""
  return {
    "in_channels": config.in_channels,
    "patch_size": config.patch_size,
    "caption_width": config.caption_width,
    "caption_length": config.caption_length,
    "kv_compression.window": list(config.window),
  }


def check_scale(autoguidance: str | os.PathLike[str] | None, scale: float) -> None:
  """Refuses a weaker model without a scale that calls it, and such a scale without one.

  Raises:
    ValueError: it is either.
  """
  if (autoguidance is not None) != (scale > 1):
    raise ValueError(
      f"--autoguidance={autoguidance} and --autoguidance_scale={scale:g} go together: "
      "give a weaker model and a scale above 1, or neither."
    )


def _check_switch(switch_at: int) -> None:
  last = SCHEDULE.num_timesteps - 1
  if not 1 <= switch_at <= last:
    raise ValueError(
      f"switch_at={switch_at} must be a timestep from 1 to {last}: the first model "
      "draws from there up, the refiner below."
    )


def check_refiner(config: PixArtConfig, refiner: PixArtConfig) -> None:
  """Refuses a refiner of another architecture.

  Raises:
    ValueError: it is one.
  """
  if lines := disagreements(config.to_dict(), refiner.to_dict()):
    raise ValueError(
      f"The refiner does not go with the first model: {'; '.join(lines)}. Both must "
      "have one architecture."
    )


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
