"""Compatibility checks between config, data, parent and checkpoint."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import logging
from jax.sharding import AbstractMesh, Mesh

from pixsigma_jax import checkpoint, metadata
from pixsigma_jax.convert.lora import read_lora
from pixsigma_jax.data.mixture import Mixture
from pixsigma_jax.mesh_axes import DATA, FSDP
from pixsigma_jax.metadata import Metadata
from pixsigma_jax.models.autoencoders import downsampling
from pixsigma_jax.models.pixart import PixArtConfig
from pixsigma_jax.train.config import (
  call,
  check_values,
  complete,
  model_config,
)
from pixsigma_jax.train.ema import Ema
from pixsigma_jax.train.guards import Guards
from pixsigma_jax.transforms import Model, apply_transforms, summary
from pixsigma_jax.transforms.lora import Lora


def check_config(config: Mapping[str, Any]) -> None:
  """Looks at every value, and at what fields of a section make of each other.

  What needs data or devices to be judged, they judge later.

  Args:
    config: what differs from the defaults, or all of it.

  Raises:
    ValueError: names what is unknown or impossible.
  """
  check_values(config)
  config = complete(config)
  model_config(config["model"])
  call(Ema, "ema", config["ema"], batch_size=config["batch_size"])
  call(Guards, "guards", config["guards"])
  call(Lora, "adapter", config["adapter"])
  logs, validation = config["log"], config["validation"]
  for place in ("local", "remote"):
    where, every = (config["checkpoint"][f] for f in (place, f"{place}_every"))
    if bool(where) != bool(every):
      raise ValueError(
        f"config.checkpoint.{place}={where!r} and {place}_every={every} go together: "
        "a directory and steps between two checkpoints there; or '' and 0."
      )
  if config["init"]["transforms"] and not config["init"]["parent"]:
    raise ValueError(
      "config.init.transforms are for a parent, and config.init.parent is empty: name "
      "the parent's --workdir, or give no transforms."
    )
  if config["adapter"].get("rank") and not config["init"]["parent"]:
    raise ValueError(
      f"config.adapter.rank={config['adapter']['rank']} trains a change of a parent, "
      "and config.init.parent is empty: name a model, or set the rank to 0."
    )
  looks = {
    "validation": (validation["every"], validation["examples"]),
    "log.sample_set": (logs["sample_set"]["every"], logs["sample_set"]["count"]),
  }
  for name, (every, count) in looks.items():
    if every and count < 1:
      raise ValueError(
        f"config.{name}.every={every} with {count} examples: give at least 1, or set "
        "every to 0."
      )
  if validation["every"] and not config["data"]["holdout"]:
    raise ValueError(
      "config.validation measures images that are never trained on, and "
      "config.data.holdout=0.0 holds none out: give a share such as 0.01, or set "
      "validation.every to 0."
    )


def check_data(
  config: Mapping[str, Any], model: PixArtConfig, mixture: Mixture
) -> None:
  """Compares what the config says of the data with what the manifests say.

  Raises:
    ValueError: names the fields, both values and the way out.
  """
  _check_features(model, mixture)
  _check_hashes(config["data"]["hashes"], mixture)
  if config["log"]["sample_set"]["every"]:
    _check_sample_set(config["log"]["sample_set"]["count"], mixture)


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


def _check_sample_set(count: int, mixture: Mixture) -> None:
  if count > len(mixture):
    raise ValueError(
      f"config.log.sample_set.count={count}, but {mixture} has {len(mixture)} images "
      "to take captions from."
    )
  if mixture.null_caption is None:
    raise ValueError(
      f"{mixture} stores captions as text; config.log.sample_set draws those that are "
      "stored as embeddings. Prepare it so, or set sample_set.every to 0."
    )


def _check_hashes(wanted: Mapping[str, str], mixture: Mixture) -> None:
  """Compares the config's hashes, of those that it names, with the manifests'."""
  named = {name: value for name, value in wanted.items() if value}
  for dataset in mixture.datasets:
    have = {name: dataset.manifest.hashes.get(name) for name in named}
    if lines := metadata.disagreements(have, named):
      raise ValueError(
        f"{dataset.directory} was not prepared with what config.data.hashes names "
        f"(have → want): {'; '.join(lines)}. Prepare it again, or correct the config."
      )


def check_batch(batch_size: int, accumulation: int, mesh: Mesh | AbstractMesh) -> None:
  """Whether each part of the mesh gets as many rows each time; a ValueError if not."""
  if accumulation < 1:
    raise ValueError(f"config.accumulation={accumulation} must be at least 1.")
  rows = mesh.shape[DATA] * mesh.shape[FSDP]
  if batch_size % (accumulation * rows):
    times = f"accumulation × data × fsdp = {accumulation} × {rows}"
    raise ValueError(
      f"config.batch_size={batch_size} must be a multiple of "
      f"{times if accumulation > 1 else f'data × fsdp = {rows}'} of the mesh "
      f"{dict(mesh.shape)}."
    )


def metadata_of(
  config: Mapping[str, Any],
  model: PixArtConfig,
  mixture: Mixture,
  parent: checkpoint.Snapshot | None,
) -> Metadata:
  """Metadata of this run's checkpoints.

  Raises:
    ValueError: the parent was trained on other features than the data holds.
  """
  entry: dict[str, Any] = {
    "stage": config["stage"],
    "parent": parent and parent.origin,
    "transforms": list(config["init"]["transforms"]),
    "config": config,
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
  about = Metadata.from_json(about.to_json())
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
  parent: checkpoint.Snapshot | None,
) -> Metadata:
  """Returns the stored metadata; refuses a config of another run.

  Args:
    parent: what the run's adapter changes; None if it trains the model itself.

  Raises:
    ValueError: it is another model, was trained on other features, or had another
      adapter or, with one, another parent.
  """
  _refuse(
    stored.model, model, "The checkpoint of this workdir", "choose a new --workdir"
  )
  _refuse_another_state(stored.provenance[-1]["config"], config)
  ours = metadata_of(config, model, mixture, None)
  _check_inputs(stored, ours, "This run", mixture)
  before, now = stored.provenance[-1], ours.provenance[-1]
  _check_adapter(before, now, parent)
  changed = metadata.disagreements(before["config"], now["config"])
  if changed:
    logging.warning("The config has changed since step 0: %s.", "; ".join(changed))
  return stored


def _refuse_another_state(stored: Mapping[str, Any], config: Mapping[str, Any]) -> None:
  """Refuses changed fields that define the arrays of optimizer and averages."""

  def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    ema, optimizer = config.get("ema", {}), config["optimizer"]
    frozen = [group[0] for group in optimizer.get("groups", ()) if not group[1]]
    return {
      **{f"ema.{name}": ema.get(name) for name in ("kind", "values", "unit")},
      **{
        f"optimizer.{name}": optimizer.get(name)
        for name in ("name", "momentum_dtype", "min_size_to_factor")
      },
      "optimizer.b1 above 0": bool(optimizer.get("b1", 1)),
      "optimizer.groups that freeze": frozen,
    }

  if lines := metadata.disagreements(fields(stored), fields(config)):
    raise ValueError(
      f"The checkpoint of this workdir holds other averages or another optimizer's "
      f"state than the config asks for (have → want): {'; '.join(lines)}. Set them "
      "back, or choose a new --workdir with this one as config.init.parent."
    )


def _check_adapter(
  before: Mapping[str, Any],
  now: Mapping[str, Any],
  parent: checkpoint.Snapshot | None,
) -> None:
  """Refuses another base model, transforms or adapter than the checkpoint's."""
  lines = metadata.disagreements(
    before["config"]["adapter"], now["config"]["adapter"], "adapter"
  )
  if parent is not None:
    # An earlier version did not say which parameters the parent had.
    names = [n for n in ("stage", "step", "params") if n in before["parent"]]
    if "params" not in names:
      logging.warning(
        "The checkpoint of this workdir, of an earlier version, does not say which "
        "parameters its parent had: that %s is still the same is not checked.",
        parent.path,
      )
    lines += metadata.disagreements(
      {name: before["parent"][name] for name in names},
      {name: parent.origin.get(name) for name in names},
      "parent",
    )
    lines += metadata.disagreements(
      before["transforms"], now["transforms"], "init.transforms"
    )
  if lines:
    path = f" (the parent was {before['parent']['path']})" if parent else ""
    raise ValueError(
      f"The checkpoint of this workdir is of another adapter (have → want): "
      f"{'; '.join(lines)}{path}. Give what it was started with, or choose a new "
      "--workdir."
    )


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
  model = apply_transforms(
    model, transforms, read=read, read_lora=read_lora, on_change=_log_change
  )
  _refuse(
    model.metadata.model,
    want,
    f"The parent {parent.path} after {len(transforms)} transforms",
    "add the transform to config.init.transforms",
  )
  return model


def _log_change(name: str, before: Model, after: Model) -> None:
  logging.info("%s: %s.", name, summary(before, after))


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
