"""Whether config, data, parent and checkpoint fit each other, before any long work."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import logging
from jax.sharding import Mesh

from pixsigma_jax import checkpoint, metadata
from pixsigma_jax.data.mixture import Mixture
from pixsigma_jax.metadata import Metadata
from pixsigma_jax.models.autoencoders import downsampling
from pixsigma_jax.models.pixart import PixArtConfig
from pixsigma_jax.train.config import DATA_FIELDS, FIELDS, check_fields
from pixsigma_jax.transforms import Model, apply_transforms


def check_config(config: Mapping[str, Any]) -> None:
  """Looks at the sections that no call of their own looks at.

  Raises:
    ValueError: names what is missing, unknown or impossible.
  """
  check_fields("", config, FIELDS)
  check_fields("init", config["init"], ("parent", "transforms"))
  check_fields("data", config["data"], DATA_FIELDS)
  check_fields(
    "checkpoint",
    config["checkpoint"],
    ("every", "keep_last", "keep_every", "snapshot_every"),
  )
  check_fields("log", config["log"], ("every", "sample_every", "prompts"))
  if config["init"]["transforms"] and not config["init"]["parent"]:
    raise ValueError(
      "config.init.transforms are for a parent, and config.init.parent is empty: name "
      "the parent's --workdir, or give no transforms."
    )
  if config["log"]["every"] < 1:
    raise ValueError(f"config.log.every={config['log']['every']} must be at least 1.")


def check_data(
  config: Mapping[str, Any], model: PixArtConfig, mixture: Mixture
) -> None:
  """Compares what the config says of the data with what the manifests say.

  Raises:
    ValueError: names the fields, both values and the way out.
  """
  _check_features(model, mixture)
  _check_hashes(config["data"]["hashes"], mixture)


def _check_features(model: PixArtConfig, mixture: Mixture) -> None:
  """Compares the model's hyper-parameters with what the mixture holds."""
  features = mixture.features
  pairs = {
    "in_channels": (model.in_channels, features.channels),
    "caption_width": (model.caption_width, features.caption_width),
  }
  for name, (ours, theirs) in pairs.items():
    if ours != theirs:
      raise ValueError(
        f"config.model.{name}={ours}, but {mixture} was prepared with "
        f"{theirs}: change the one or prepare the other again."
      )
  latents = features.resolution / downsampling(features.autoencoder)
  side = latents / model.patch_size
  if side != model.base_size:
    raise ValueError(
      f"config.model.base_size={model.base_size}, but {mixture} holds images "
      f"of {features.resolution} pixels, {side:g} tokens a side: set base_size="
      f"{side:g} (with pe_interpolation, see the transform interpolate_pe), or give "
      "data of the other resolution."
    )


def _check_hashes(wanted: Mapping[str, str], mixture: Mixture) -> None:
  """Compares the config's hashes, of those that it names, with the manifests'."""
  check_fields("data.hashes", wanted, ("autoencoder", "text_encoder", "crop_rule"))
  named = {name: value for name, value in wanted.items() if value}
  for dataset in mixture.datasets:
    have = {name: dataset.manifest.hashes.get(name) for name in named}
    if lines := metadata.disagreements(have, named):
      raise ValueError(
        f"{dataset.directory} was not prepared with what config.data.hashes names "
        f"(have → want): {'; '.join(lines)}. Prepare it again, or correct the config."
      )


def check_batch(batch_size: int, mesh: Mesh) -> None:
  """Whether each part of the mesh gets as many rows; a ValueError if not."""
  rows = mesh.shape["data"] * mesh.shape["fsdp"]
  if batch_size % rows:
    raise ValueError(
      f"config.batch_size={batch_size} must be a multiple of data × fsdp = {rows} of "
      f"the mesh {dict(mesh.shape)}."
    )


def metadata_of(
  config: Mapping[str, Any],
  model: PixArtConfig,
  mixture: Mixture,
  parent: checkpoint.Snapshot | None,
) -> Metadata:
  """What this run's checkpoints will say about themselves.

  Raises:
    ValueError: the parent was trained on other features than the data holds.
  """
  entry: dict[str, Any] = {
    "stage": config["stage"],
    "parent": None,
    "transforms": list(config["init"]["transforms"]),
    "config": config,
  }
  if parent is not None:
    entry["parent"] = {
      "path": str(parent.path),
      "stage": parent.metadata.stage,
      "step": parent.step,
    }
  features = mixture.features
  about = Metadata(
    stage=config["stage"],
    model=_as_dict(model),
    autoencoder=dict(features.autoencoder),
    scaling_factor=features.scaling_factor,
    text_encoder=dict(features.text_encoder),
    resolution=features.resolution,
    provenance=(*(parent.metadata.provenance if parent else ()), entry),
  )
  # As it will be read: tuples become lists now, not between two saves.
  about = Metadata.from_json(json.loads(json.dumps(about.to_json())))
  if parent is not None:
    _check_inputs(parent.metadata, about, f"The parent {parent.path}", mixture)
  return about


def _check_inputs(have: Metadata, want: Metadata, whose: str, mixture: Mixture) -> None:
  """Latents and captions must come from the same frozen networks."""
  names = ("autoencoder", "scaling_factor", "text_encoder")
  lines = metadata.disagreements(
    {name: getattr(have, name) for name in names},
    {name: getattr(want, name) for name in names},
  )
  if lines:
    raise ValueError(
      f"{whose} was trained on other features than {mixture} holds: "
      f"{'; '.join(lines)}. Prepare the data with the former."
    )


def check_same_run(
  stored: Metadata,
  config: Mapping[str, Any],
  model: PixArtConfig,
  mixture: Mixture,
) -> Metadata:
  """The stored metadata, if the config still describes the run that wrote it.

  Raises:
    ValueError: it is another model, or was trained on other features.
  """
  _refuse(
    stored.model, model, "The checkpoint of this workdir", "choose a new --workdir"
  )
  ours = metadata_of(config, model, mixture, None)
  _check_inputs(stored, ours, "This run", mixture)
  changed = metadata.disagreements(
    stored.provenance[-1]["config"], ours.provenance[-1]["config"]
  )
  if changed:
    logging.warning("The config has changed since step 0: %s.", "; ".join(changed))
  return stored


def transformed(
  parent: checkpoint.Snapshot,
  transforms: Sequence[Mapping[str, Any]],
  want: PixArtConfig,
  mesh: Mesh,
) -> Model:
  """The parent after the transforms, which leads to the model of the config.

  Raises:
    ValueError: it does not; names the transform that would bridge what is left.
  """

  def read(path: str) -> tuple[Metadata, Callable[[], Any]]:
    about = checkpoint.read_metadata(path)
    return about, lambda: checkpoint.read_snapshot(path, mesh).params

  model = Model(
    config=parent.config,
    params=parent.params,
    null_caption=parent.null_caption,
    metadata=parent.metadata,
  )
  model = apply_transforms(model, transforms, read=read)
  _refuse(
    model.metadata.model,
    want,
    f"The parent {parent.path} after {len(transforms)} transforms",
    "add the transform to config.init.transforms",
  )
  return model


def _refuse(
  have: Mapping[str, Any], want: PixArtConfig, whose: str, way_out: str
) -> None:
  bridges = {
    "base_size": "interpolate_pe",
    "pe_interpolation": "interpolate_pe",
    "kv_compression": "add_kv_compression",
    "in_channels": "swap_vae",
    "caption_length": "alpha_to_sigma",
    "size_conditions": "alpha_to_sigma",
  }
  lines = metadata.disagreements(dict(have), _as_dict(want))
  if lines:
    named = {bridges.get(line.split(":")[0].split(".")[0]) for line in lines} - {None}
    bridge = f" ({', '.join(sorted(map(str, named)))} would bridge it)" if named else ""
    raise ValueError(
      f"{whose} has another model than config.model (have → want): "
      f"{'; '.join(lines)}{bridge}. Change config.model, or {way_out}."
    )


def _as_dict(model: PixArtConfig) -> dict[str, Any]:
  return json.loads(json.dumps(model.to_dict()))
