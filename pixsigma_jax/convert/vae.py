"""Weights of the KL autoencoder, in and out: diffusers' names and those of LDM.

One table leads from a leaf's name to a tensor's in each layout; read backwards, the
same table says which tensor fills which leaf.
"""

import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from pixsigma_jax import checkpoint, disk, sharding, tree
from pixsigma_jax.convert.files import (
  Network,
  Weights,
  lone_file,
  open_weights,
  part_folder,
  part_of,
  read_json,
  write_json,
  write_safetensors,
)
from pixsigma_jax.models.vae import KLAutoencoder, VAEConfig, abstract_params
from pixsigma_jax.wording import listed

_SHARED = (
  (r"^\w+/(quant_conv|post_quant_conv)", r"\1"),
  (r"/(norm|conv)_(\d)/", r"/\1\2/"),
)
_DIFFUSERS = (
  *_SHARED,
  (r"(down|up)sample_(\d)", r"level_\2/\1samplers/0/conv"),
  (r"encoder/level_(\d)", r"encoder/down_blocks/\1"),
  (r"decoder/level_(\d)", r"decoder/up_blocks/\1"),
  (r"middle/attention", r"mid_block/attentions/0"),
  (r"middle/", r"mid_block/"),
  (r"block_(\d)/", r"resnets/\1/"),
  (r"shortcut", r"conv_shortcut"),
  (r"(attentions/0)/norm", r"\1/group_norm"),
  (r"norm_out", r"conv_norm_out"),
)
# Layout → what turns a leaf's name into its own, one rule after the other.
_RULES: dict[str, tuple[tuple[str, str], ...]] = {
  "diffusers": (
    *_DIFFUSERS,
    (r"(attentions/0)/(q|k|v)\w+/", r"\1/to_\2/"),
    (r"(attentions/0)/out", r"\1/to_out/0"),
  ),
  # Before diffusers 0.12, as the published SD autoencoders still are.
  "diffusers-legacy": (*_DIFFUSERS, (r"(attentions/0)/out", r"\1/proj_attn")),
  "ldm": (
    *_SHARED,
    (r"(down|up)sample_(\d)", r"level_\2/\1sample/conv"),
    (r"encoder/level_(\d)", r"encoder/down/\1"),
    (r"decoder/level_(\d)", r"decoder/up/\1"),
    (r"middle/attention", r"mid/attn_1"),
    (r"middle/block_0", r"mid/block_1"),
    (r"middle/block_1", r"mid/block_2"),
    (r"(down|up)/(\d)/block_(\d)", r"\1/\2/block/\3"),
    (r"shortcut", r"nin_shortcut"),
    (r"(attn_1)/(q|k|v)\w+/", r"\1/\2/"),
    (r"(attn_1)/out", r"\1/proj_out"),
  ),
}
# In a file with all of a Stable Diffusion model, in its own layout and in ComfyUI's.
_NETWORK = Network(
  landmarks=("decoder.conv_in.weight",), prefixes=("first_stage_model.", "vae.")
)
# What LDM's own autoencoders were trained with.
_UNUSED = ("loss.",)

# Fields of diffusers' config.json that may have one value here, or be absent.
_ONLY: dict[str, Any] = {
  "act_fn": "silu",
  "in_channels": 3,
  "out_channels": 3,
  "mid_block_add_attention": True,
  "use_quant_conv": True,
  "use_post_quant_conv": True,
  "shift_factor": None,
  "latents_mean": None,
  "latents_std": None,
}
_BLOCK_TYPES = {
  "down_block_types": "DownEncoderBlock2D",
  "up_block_types": "UpDecoderBlock2D",
}
_SIZES = (
  "block_out_channels",
  "layers_per_block",
  "latent_channels",
  "norm_num_groups",
)
_WITHOUT_EFFECT = (
  "sample_size",
  "force_upcast",
)  # beside every name with an underscore


def vae_config(config: Mapping[str, Any]) -> VAEConfig:
  """The hyper-parameters in diffusers' config.json of an `AutoencoderKL`.

  Raises:
    ValueError: it is of another class, or a field is missing, unknown, or has a value
      that this network does not know.
  """
  name = config.get("_class_name")
  if name != "AutoencoderKL":
    raise ValueError(f"_class_name is {name!r}: only AutoencoderKL can be read.")
  missing = [field for field in (*_SIZES, *_BLOCK_TYPES) if field not in config]
  if missing:
    raise ValueError(f"The autoencoder's config.json lacks {', '.join(missing)}.")
  only = _ONLY | {
    field: [kind] * len(config["block_out_channels"])
    for field, kind in _BLOCK_TYPES.items()
  }
  for field, value in config.items():
    if field in only and value != only[field]:
      raise ValueError(
        f"The autoencoder's config.json has {field}={value!r}: only {only[field]!r}, "
        "which SD's and SDXL's autoencoders have, is supported."
      )
    known = field in (*only, *_SIZES, *_WITHOUT_EFFECT, "scaling_factor")
    if not known and not field.startswith("_") and value is not None:
      raise ValueError(
        f"The autoencoder's config.json has an unknown field, {field}={value!r}: "
        "remove it if it does not change what the network computes."
      )
  return VAEConfig(
    channels=tuple(config["block_out_channels"]),
    blocks_per_level=config["layers_per_block"],
    latent_channels=config["latent_channels"],
    norm_groups=config["norm_num_groups"],
  )


def vae_from_weights(weights: Weights, config: VAEConfig) -> dict[str, Any]:
  """The parameters, float32, from tensors of any layout of `_RULES`.

  The layout is the one that has most of the names. Names may stand under
  `first_stage_model.` or `vae.`, beside those of other networks; the discriminator that
  LDM trained with, `loss.*`, is left out.

  Raises:
    ValueError: tensors are missing, left over, of another shape or not of floating
      point; names them.
  """
  weights = part_of(weights, _NETWORK, "this file")
  present = {name for name in weights if not name.startswith(_UNUSED)}
  expected = abstract_params(config)
  layouts = {layout: _names(expected, config, layout) for layout in _RULES}
  layout = max(layouts, key=lambda x: len(present & set(layouts[x].values())))
  names = layouts[layout]

  missing = sorted(set(names.values()) - present)
  unused = sorted(present - set(names.values()))
  problems = [f"missing: {listed(missing)}"] if missing else []
  problems += [f"not used: {listed(unused)}"] if unused else []
  leaves = {}
  for leaf, shape in tree.named_leaves(expected).items():
    if names[leaf] in missing:
      continue
    # One tensor at a time: `weights` may be on a disk.
    tensor = np.asarray(weights[names[leaf]])
    wanted = _outward(np.empty(shape.shape, np.bool_), leaf, layout).shape
    if tensor.shape != wanted:
      problems.append(f"{names[leaf]} has shape {tensor.shape}, not {wanted}")
      continue
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
      problems.append(f"{names[leaf]} is {tensor.dtype}, which is quantised")
      continue
    leaves[leaf] = _inward(tensor, leaf).astype(np.float32)
  if problems:
    raise ValueError(
      f"These are not the weights of an autoencoder with {config}, in the layout "
      f"{layout!r}: {listed(problems, joint='; ')}."
    )
  return tree.map_with_name(lambda leaf, _: leaves[leaf], expected)


def vae_to_weights(
  params: Any, config: VAEConfig, layout: str = "diffusers"
) -> dict[str, np.ndarray]:
  """The tensors of a layout from parameters: what `vae_from_weights` undoes.

  Args:
    layout: "diffusers", "diffusers-legacy" or "ldm".

  Raises:
    ValueError: there is no such layout, or the parameters are not those of `config`.
  """
  if layout not in _RULES:
    raise ValueError(f"Unknown layout {layout!r}; choose one of {', '.join(_RULES)}.")
  expected = abstract_params(config)
  # What a leaf has beside what it should have.
  wrong = sorted(tree.differences(params, expected), key=lambda line: line[2:])
  if wrong:
    raise ValueError(
      f"These are not the parameters of an autoencoder with {config} (- has, + wants): "
      f"{listed(wrong, joint='; ')}."
    )
  names = _names(expected, config, layout)
  return {
    names[leaf]: np.ascontiguousarray(_outward(np.asarray(array), leaf, layout))
    for leaf, array in tree.named_leaves(params).items()
  }


def load_autoencoder(
  folder: str | os.PathLike[str],
  *,
  dtype: DTypeLike,
  mesh: Mesh | None = None,
  scaling_factor: float | None = None,
) -> KLAutoencoder:
  """The autoencoder of a folder: config.json and weights, or `convert`'s arrays.

  Args:
    folder: `vae/`, the pipeline that has it, or one file without config.json: that of
      SD's or SDXL's sizes, in any layout.
    dtype: of activations, float32 or bfloat16.
    mesh: devices that are to share the work, see `KLAutoencoder`.
    scaling_factor: for a config.json without one.

  Raises:
    FileNotFoundError: the folder has no config.json or no weights.
    ValueError: either cannot be used; says which field or tensors. There is no scaling
      factor, or two of them.
  """
  source = part_folder(pathlib.Path(folder), "vae")
  path = lone_file(source)
  if path is None:
    path = source / "config.json"
    fields = read_json(path)
  else:
    source, fields = path, _config_fields(VAEConfig(), None)
  config = vae_config(fields)
  noted = fields.get("scaling_factor")
  if scaling_factor is None and noted is None:
    raise ValueError(
      f"{path} has no scaling_factor: pass scaling_factor=0.18215 if this is Stable "
      "Diffusion's autoencoder, 0.13025 if it is SDXL's."
    )
  if scaling_factor is not None and noted not in (None, scaling_factor):
    raise ValueError(
      f"{path} has scaling_factor {noted}, and {scaling_factor} was asked for: it is "
      "another autoencoder than the one that is meant."
    )
  factor = scaling_factor if noted is None else noted
  if not isinstance(factor, int | float) or not 0 < factor < math.inf:
    raise ValueError(f"scaling_factor {factor!r} must be a positive number.")
  return KLAutoencoder(
    config=config,
    params=_params(source, config, mesh),
    scaling_factor=float(factor),
    dtype=jnp.dtype(dtype),
    mesh=mesh,
  )


LAYOUTS = (*_RULES, "orbax")
_WEIGHTS = "diffusion_pytorch_model.safetensors"


def convert_autoencoder(
  source: pathlib.Path,
  target: pathlib.Path,
  *,
  from_layout: str,
  to_layout: str,
  scaling_factor: float | None,
  variant: str | None = None,
) -> None:
  """Writes the autoencoder at `source` in another of `LAYOUTS`, equal to the bit.

  Args:
    source, target: a folder of diffusers or of ours, or of LDM one file: .safetensors
      to be written, also .ckpt to be read.
    scaling_factor: for a source that does not say it, as LDM's files.
    variant: see `open_weights`.

  Raises:
    FileNotFoundError: there is no source.
    FileExistsError: there is a target.
    ValueError: the source is not such an autoencoder, or its scaling factor is unknown.
  """
  if target.exists():
    raise FileExistsError(f"{target} exists already and is left as it is.")
  if from_layout == "ldm":
    fields = _config_fields(VAEConfig(), scaling_factor)
  else:
    source = part_folder(source, "vae")
    fields = read_json(source / "config.json")
    if fields.get("scaling_factor") is None:
      fields["scaling_factor"] = scaling_factor
  if to_layout != "ldm" and fields["scaling_factor"] is None:
    raise ValueError(
      f"{source} does not say its scaling factor: give --scaling_factor, 0.13025 for "
      "SDXL's autoencoder, 0.18215 for SD's."
    )
  config = vae_config(fields)
  params = jax.tree.map(np.asarray, _params(source, config, None, variant))
  if to_layout == "ldm":
    write_safetensors(target, vae_to_weights(params, config, to_layout))
    return
  write_autoencoder(
    target, params, config, layout=to_layout, scaling_factor=fields["scaling_factor"]
  )


def write_autoencoder(
  target: pathlib.Path,
  params: Any,
  config: VAEConfig,
  *,
  layout: str,
  scaling_factor: float,
) -> None:
  """Writes a folder that `load_autoencoder` reads, whole or not at all.

  Args:
    target: new, such as FOLDER/vae.
    layout: "orbax", or one of diffusers.
  """
  with disk.whole_folder(target) as folder:
    if layout == "orbax":
      checkpoint.save_arrays(folder, params)
    else:
      write_safetensors(folder / _WEIGHTS, vae_to_weights(params, config, layout))
    write_json(folder / "config.json", _config_fields(config, scaling_factor))


def _params(
  source: pathlib.Path,
  config: VAEConfig,
  mesh: Mesh | None,
  variant: str | None = None,
) -> Any:
  """The parameters at `source`, a folder or a file, the same on every device."""
  place = NamedSharding(mesh or sharding.single_device_mesh(), P())
  if not checkpoint.has_arrays(source):
    weights = open_weights(source, variant=variant)
    return jax.device_put(vae_from_weights(weights, config), place)
  shapes = abstract_params(config)
  places = jax.tree.map(lambda _: place, shapes)
  return checkpoint.read_arrays(source, sharding.placed(shapes, places))


def _config_fields(config: VAEConfig, scaling_factor: float | None) -> dict[str, Any]:
  """config.json of an autoencoder for diffusers."""
  levels = len(config.channels)
  return {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": list(config.channels),
    **{field: [kind] * levels for field, kind in _BLOCK_TYPES.items()},
    "in_channels": 3,
    "latent_channels": config.latent_channels,
    "layers_per_block": config.blocks_per_level,
    "norm_num_groups": config.norm_groups,
    "out_channels": 3,
    "sample_size": 1024,
    "scaling_factor": scaling_factor,
  }


def _names(params: Any, config: VAEConfig, layout: str) -> dict[str, str]:
  """Every leaf's name and its tensor's, without prefix."""

  def name_in_layout(leaf: str) -> str:
    name = leaf
    if layout != "ldm":
      # diffusers counts the decoder's levels as they are run, from the coarsest.
      last = len(config.channels) - 1
      name = re.sub(
        r"^(decoder/(?:level|upsample)_)(\d)",
        lambda match: f"{match[1]}{last - int(match[2])}",
        name,
      )
    for rule, replacement in _RULES[layout]:
      name = re.sub(rule, replacement, name)
    name = re.sub(r"/(kernel|scale)$", "/weight", name)
    return name.replace("/", ".")

  return {leaf: name_in_layout(leaf) for leaf in tree.named_leaves(params)}


def _outward(array: np.ndarray, leaf: str, layout: str) -> np.ndarray:
  """A leaf as torch lays it out: input and output of a map before its window."""
  if array.ndim == 4:
    return array.transpose(3, 2, 0, 1)
  if leaf.endswith("/kernel"):  # attention's: LDM has convolutions of one pixel there
    return array.T[:, :, None, None] if layout == "ldm" else array.T
  return array


def _inward(tensor: np.ndarray, leaf: str) -> np.ndarray:
  """A tensor as our leaf: what `_outward` undoes."""
  if leaf.endswith("/kernel"):
    if "/attention/" in leaf:
      return tensor.reshape(tensor.shape[:2]).T
    return tensor.transpose(2, 3, 1, 0)
  return tensor
