"""A chain of transforms, applied to a model and its metadata.

A transform knows hyper-parameters and parameters. What lies beside them follows here:
the metadata (whose latents, which resolution) and the null caption.
"""

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from pixsigma_jax import tree
from pixsigma_jax.metadata import Metadata, disagreements
from pixsigma_jax.models.autoencoders import downsampling
from pixsigma_jax.models.pixart import PixArtConfig
from pixsigma_jax.transforms.alpha_to_sigma import alpha_to_sigma, became_sigma
from pixsigma_jax.transforms.average import average
from pixsigma_jax.transforms.depth import grow_depth
from pixsigma_jax.transforms.kv_compression import (
  add_kv_compression,
  remove_kv_compression,
)
from pixsigma_jax.transforms.lora import merge_lora, unmerge_lora
from pixsigma_jax.transforms.positions import extend_pe, interpolate_pe
from pixsigma_jax.transforms.post_hoc_ema import post_hoc_ema
from pixsigma_jax.transforms.vae_swap import swap_vae, swapped

TRANSFORMS: dict[str, Callable[..., tuple[PixArtConfig, Any]]] = {
  "interpolate_pe": interpolate_pe,
  "extend_pe": extend_pe,
  "add_kv_compression": add_kv_compression,
  "remove_kv_compression": remove_kv_compression,
  "grow_depth": grow_depth,
  "swap_vae": swap_vae,
  "alpha_to_sigma": alpha_to_sigma,
  "merge_lora": merge_lora,
  "unmerge_lora": unmerge_lora,
  "average": average,
  "post_hoc_ema": post_hoc_ema,
}

# Those of several models, whose `others` are paths.
OF_SEVERAL = ("average", "post_hoc_ema")

# Those whose `adapter` is a path.
OF_ADAPTERS = ("merge_lora", "unmerge_lora")

# What a transform changes in the metadata: (metadata, config before, **arguments).
_LATENTS: dict[str, Callable[..., Metadata]] = {
  "swap_vae": swapped,
  "alpha_to_sigma": became_sigma,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  """A model as in a snapshot: hyper-parameters, parameters and metadata.

  Attributes:
    null_caption: `[t e]`, what a dropped caption is replaced with; None for what the
      text encoder makes of "".
  """

  config: PixArtConfig
  params: Any
  null_caption: Any
  metadata: Metadata


# Path of a model → what it says of itself, and what reads its parameters.
Read: TypeAlias = Callable[[str], tuple[Metadata, Callable[[], Any]]]
# Path of an adapter, and the model that it is for → the adapter.
ReadLora: TypeAlias = Callable[[str, PixArtConfig], Any]


def with_defaults(name: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
  """All arguments of a transform: those that are given, and the others' defaults.

  Raises:
    ValueError: there is no such transform, or they are not its arguments.
  """
  if name not in TRANSFORMS:
    raise ValueError(
      f"Unknown transform {name!r} (choose from {', '.join(TRANSFORMS)})."
    )
  signature = inspect.signature(TRANSFORMS[name])
  try:
    bound = signature.bind(None, None, **arguments)
  except TypeError as error:
    known = ", ".join(list(signature.parameters)[2:]) or "none"
    raise ValueError(
      f"The transform {name} cannot be called so: {error}. Its arguments are {known}."
    ) from error
  bound.apply_defaults()
  return dict(list(bound.arguments.items())[2:])


def apply_transforms(
  model: Model,
  transforms: Sequence[Mapping[str, Any]],
  *,
  read: Read,
  read_lora: ReadLora,
  on_change: Callable[[str, Model, Model], None] | None = None,
) -> Model:
  """The model after the transforms, in their order.

  Args:
    transforms: of each the `name` and the arguments, as a stage's config has them.
      `others` of `OF_SEVERAL` are paths.
    read: gives the metadata of such a path, and what reads its parameters.
    read_lora: gives the adapter at the path that is the `adapter` of `OF_ADAPTERS`.
    on_change: is called after each with its name, the model before and the model after.

  Returns:
    The new model; its metadata has the provenance of the first. A null caption goes
    (None) with `alpha_to_sigma`: Σ's is what T5 makes of "", which the reference puts
    in its place whenever it loads a model.

  Raises:
    ValueError: an unknown transform, or arguments that do not fit it or the model.
  """
  chain = []
  for transform in transforms:  # all are looked at before the first works
    arguments = dict(transform)
    name = arguments.pop("name", None)
    chain.append((name, with_defaults(name, arguments)))
  for name, arguments in chain:
    metadata = model.metadata
    if name in _LATENTS:
      metadata = _LATENTS[name](metadata, model.config, **arguments)
    if name in OF_SEVERAL:
      others = _Others(model, arguments["others"], read)
      arguments["others"] = others
      if name == "post_hoc_ema":
        arguments["stored"] = arguments["stored"] or others.profiles(model.metadata)
    if name in OF_ADAPTERS:
      arguments["adapter"] = read_lora(arguments["adapter"], model.config)
    before = model
    config, params = TRANSFORMS[name](model.config, model.params, **arguments)
    model = Model(
      config=config,
      params=params,
      null_caption=None if name == "alpha_to_sigma" else model.null_caption,
      metadata=_of_config(metadata, model, config),
    )
    if on_change is not None:
      on_change(name, before, model)
  return model


def summary(before: Model, after: Model) -> str:
  """Summary of a transform's changes in a line, from shapes and metadata alone.

  So it costs nothing wherever the parameters lie; `transform.report` has the numbers.
  """
  old, new = tree.named_leaves(before.params), tree.named_leaves(after.params)
  kept = sum(old.get(name) is leaf for name, leaf in new.items())
  sizes = [tree.size(model.params) for model in (before, after)]
  have, want = (
    {
      **model.config.to_dict(),
      "autoencoder": model.metadata.autoencoder,
      "scaling_factor": model.metadata.scaling_factor,
    }
    for model in (before, after)
  )
  lines = [
    *disagreements(have, want),
    f"{kept} of {len(new)} leaves as they were",
  ]
  if sizes[0] != sizes[1]:
    lines.append(f"{sizes[0]:,} → {sizes[1]:,} parameters")
  return "; ".join(lines)


def _of_config(metadata: Metadata, before: Model, config: PixArtConfig) -> Metadata:
  """The metadata with new hyper-parameters, and the resolution that follows from them.

  Only if base size or autoencoder are others: else the model's own word stays.
  """
  resolution = metadata.resolution
  if (config.base_size, metadata.autoencoder) != (
    before.config.base_size,
    before.metadata.autoencoder,
  ):
    pixels = downsampling(metadata.autoencoder)
    resolution = config.base_size * config.patch_size * pixels
  # As JSON holds it: a tuple would differ from what is read back.
  fields = json.loads(json.dumps(config.to_dict()))
  return dataclasses.replace(metadata, model=fields, resolution=resolution)


class _Others(Sequence):
  """Other models than the first, read one at a time as `average` comes to them."""

  def __init__(self, first: Model, paths: str | Sequence[str], read: Read):
    paths = [paths] if isinstance(paths, str) else paths
    self._paths = list(paths)
    self._others = [read(path) for path in paths]
    names = ("model", "autoencoder", "scaling_factor", "text_encoder")
    for path, (metadata, _) in zip(paths, self._others, strict=True):
      if lines := disagreements(
        {name: getattr(first.metadata, name) for name in names},
        {name: getattr(metadata, name) for name in names},
      ):
        raise ValueError(
          f"{path} is another model than the first, or trained on other features: "
          f"{'; '.join(lines)}. Their average would be neither."
        )

  def profiles(self, first: Metadata) -> list[tuple[float, int]]:
    """(σ_rel, step) of the first and of each of the others, as the trainer noted."""
    models = [("SRC", first)]
    models += [
      (path, metadata)
      for path, (metadata, _) in zip(self._paths, self._others, strict=True)
    ]
    found, runs = [], []
    for path, metadata in models:
      *before, last = metadata.provenance or ({},)
      run = {name: value for name, value in last.items() if name != "ema"}
      ema = last.get("ema") or {}
      if ema.get("kind") != "power":
        raise ValueError(
          f"{path} is no power-function average: post_hoc_ema needs snapshots of a run "
          "with config.ema.kind='power', out of WORKDIR/snapshots and "
          "WORKDIR/ema/VALUE/snapshots."
        )
      found.append((ema["value"], ema["step"]))
      runs.append([*before, run])
      if runs[-1] != runs[0]:
        raise ValueError(
          f"{path} is of another run than SRC, by its provenance: averages of one run "
          "make another average of it, those of two do not."
        )
    return found

  def __len__(self) -> int:
    return len(self._others)

  def __getitem__(self, index: Any) -> Any:
    metadata, read_params = self._others[index]
    return PixArtConfig.from_dict(metadata.model), read_params()
