"""PixArt's weights as the official repository and as diffusers keep them, in and out.

What a state dict shows of its hyper-parameters is read off it. What it does not show is
an argument, and an argument that contradicts the weights is an error: nothing is
guessed, because a wrong position scale draws pictures that are merely bad.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from pixsigma_jax.convert.files import Weights
from pixsigma_jax.convert.layouts import (
  DIFFUSERS,
  OFFICIAL,
  Layout,
  depth_in,
  layers_in,
  params_from,
  shapes_in,
  weights_from,
)
from pixsigma_jax.models import positions, tokens
from pixsigma_jax.models.kv_compression import WINDOWS, KVCompression
from pixsigma_jax.models.pixart import VARIANTS, PixArtConfig
from pixsigma_jax.wording import listed

# Buffers of the official state dict.
POSITIONS, NULL_CAPTION = "pos_embed", "y_embedder.y_embedding"

_COMPRESSOR = "blocks/attention/kv_compressor"


def from_pixart(
  weights: Weights,
  *,
  num_heads: int | None = None,
  base_size: int | None = None,
  pe_interpolation: float | None = None,
  caption_length: int | None = None,
) -> tuple[PixArtConfig, Any]:
  """Hyper-parameters and parameters out of an official state dict.

  Args:
    weights: official names to NumPy arrays, perhaps with the buffers `pos_embed` and
      `y_embedder.y_embedding`, which show what is not given below.
    num_heads: needed where depth and width are not those of a named variant.
    base_size, pe_interpolation: see `PixArtConfig`; needed without `pos_embed`.
    caption_length: needed without `y_embedder.y_embedding`.

  Raises:
    ValueError: tensors are missing, left over or misshapen, a hyper-parameter is
      neither shown nor given, or what is given contradicts the weights.
  """
  shown: dict[str, Any] = {}
  null_caption = null_caption_in(weights)
  if null_caption is not None:
    shown["caption_length"] = len(null_caption)
  if POSITIONS in weights:
    shown |= _positions_shown(weights[POSITIONS])
  given = {
    "num_heads": num_heads,
    "base_size": base_size,
    "pe_interpolation": pe_interpolation,
    "caption_length": caption_length,
  }
  weights = _Without(weights, (POSITIONS, NULL_CAPTION))
  config = _config(weights, OFFICIAL, settled(shown, given))
  return config, params_from(weights, config, OFFICIAL)


def null_caption_in(weights: Weights) -> Float32[np.ndarray, "t e"] | None:
  """What a dropped caption was replaced with, where an official state dict has it."""
  if NULL_CAPTION not in weights:
    return None
  # A copy: a view would keep the whole file in memory.
  return np.array(weights[NULL_CAPTION], np.float32)


def to_pixart(
  config: PixArtConfig, params: Any, null_caption: np.ndarray | None = None
) -> dict[str, np.ndarray]:
  """The official state dict, with its buffers; `from_pixart` undoes it to the bit.

  Args:
    null_caption: `[t e]`; without it the dict has no `y_embedder.y_embedding`.

  Raises:
    ValueError: the official code cannot run such a model.
  """
  _check_operator(config)
  buffers = {POSITIONS: _table(config.base_size, config.pe_interpolation, config.width)}
  if null_caption is not None:
    buffers[NULL_CAPTION] = np.asarray(null_caption, np.float32)
  return buffers | weights_from(params, config, OFFICIAL)


def from_diffusers(
  weights: Weights,
  *,
  num_heads: int | None = None,
  base_size: int | None = None,
  pe_interpolation: float | None = None,
  caption_length: int | None = None,
) -> tuple[PixArtConfig, Any]:
  """Hyper-parameters and parameters out of a `PixArtTransformer2DModel`'s state dict.

  Args:
    num_heads, base_size, pe_interpolation: as `shown_by_config` finds them.
    caption_length: 300 for Σ, 120 for α: diffusers does not note it down.

  Raises:
    ValueError: see `from_pixart`.
  """
  given = {
    "num_heads": num_heads,
    "base_size": base_size,
    "pe_interpolation": pe_interpolation,
    "caption_length": caption_length,
  }
  config = _config(weights, DIFFUSERS, settled({}, given))
  return config, params_from(weights, config, DIFFUSERS)


def to_diffusers(config: PixArtConfig, params: Any) -> dict[str, np.ndarray]:
  """diffusers' state dict; of a compressing model with names that only we know.

  Raises:
    ValueError: the compression has no parameters to tell it by.
  """
  _check_operator(config)
  return weights_from(params, config, DIFFUSERS)


# What diffusers' config.json must say, where it says anything, for the network to be
# the one that is built here.
_REQUIRED = {
  "norm_type": "ada_norm_single",
  "norm_elementwise_affine": False,
  "norm_eps": 1e-6,
  "activation_fn": "gelu-approximate",
  "attention_bias": True,
}
CLASSES = ("PixArtTransformer2DModel", "Transformer2DModel")
# The class that a compressing model is exported under: stock diffusers has none of that
# name and says so, where it would load the known class and drop the compression.
COMPRESSED_CLASS = "PixArtKVCompressedTransformer2DModel"


def shown_by_config(json: Mapping[str, Any]) -> dict[str, Any]:
  """What diffusers' config.json says: num_heads, base_size, pe_interpolation.

  Raises:
    ValueError: it is another network's.
  """
  name = json.get("_class_name")
  if name not in (*CLASSES, COMPRESSED_CLASS):
    raise ValueError(
      f"config.json is of the class {name!r}: a PixArt transformer is one of "
      f"{', '.join(CLASSES)}. Give the folder of the transformer itself."
    )
  for field, value in _REQUIRED.items():
    if json.get(field, value) != value:
      raise ValueError(
        f"config.json has {field}={json[field]!r}; PixArt's network has {value!r}."
      )
  missing = [k for k in ("num_attention_heads", "sample_size") if json.get(k) is None]
  if missing:
    raise ValueError(f"config.json does not say {' and '.join(missing)}.")
  size = json["sample_size"]
  scale = json.get("interpolation_scale")
  return {
    "num_heads": json["num_attention_heads"],
    "base_size": size // json.get("patch_size", 2),
    # diffusers' own rule for configs that leave it out.
    "pe_interpolation": float(max(size // 64, 1) if scale is None else scale),
  }


def diffusers_config(config: PixArtConfig) -> dict[str, Any]:
  """config.json of the model for diffusers, complete: no default of theirs counts."""
  json = {
    "_class_name": CLASSES[0],
    "activation_fn": _REQUIRED["activation_fn"],
    "attention_bias": True,
    "attention_head_dim": config.width // config.num_heads,
    "attention_type": "default",
    "caption_channels": config.caption_width,
    "cross_attention_dim": config.width,
    "dropout": 0.0,
    "in_channels": config.in_channels,
    "interpolation_scale": config.pe_interpolation,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_single",
    "num_attention_heads": config.num_heads,
    "num_embeds_ada_norm": 1000,
    "num_layers": config.depth,
    "out_channels": config.out_channels,
    "patch_size": config.patch_size,
    "sample_size": config.base_size * config.patch_size,
    "upcast_attention": False,
    # Their default is a guess by the size, and wrong for Σ at 1024.
    "use_additional_conditions": config.size_conditions,
  }
  if config.kv_compression.layers:
    compression = config.kv_compression
    json["_class_name"] = COMPRESSED_CLASS
    json["kv_compress_ratio"] = compression.ratio
    json["kv_compress_layers"] = list(compression.layers)
    json["kv_compress_norm"] = compression.norm
  return json


def _check_operator(config: PixArtConfig) -> None:
  operator = config.kv_compression.operator
  if config.kv_compression.layers and operator != "conv":
    raise ValueError(
      f"The compression operator {operator!r} has no parameters, so no state dict "
      "shows that it is there: only 'conv' can be exported."
    )


def settled(shown: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
  """What is shown or given (where it is not None), if they agree.

  Raises:
    ValueError: they do not; names every contradiction.
  """
  asked = {name: value for name, value in given.items() if value is not None}
  others = [name for name in asked if asked[name] != shown.get(name, asked[name])]
  if others:
    raise ValueError(
      f"{', '.join(f'{name}={asked[name]}' for name in others)} was asked for, but "
      f"these weights have {', '.join(f'{name}={shown[name]}' for name in others)}: "
      "they are of another release or resolution."
    )
  return asked | dict(shown)


def _config(weights: Weights, layout: Layout, known: Mapping[str, Any]) -> PixArtConfig:
  """Hyper-parameters from shapes, and from what is `known` otherwise."""
  depth = depth_in(weights, layout)
  if depth == 0:
    raise ValueError(_not_pixart(weights))
  shapes = shapes_in(weights, layout)
  needed = ("patch_embedding/kernel", "out/bias", "caption_projection/in/kernel")
  absent = [
    layout[n].names[0] for n in (*needed, "blocks/mlp/in/bias") if n not in shapes
  ]
  if absent:
    raise ValueError(f"These weights lack {', '.join(absent)}: they are incomplete.")
  width, in_channels, patch_size, _ = shapes["patch_embedding/kernel"]
  out_channels = shapes["out/bias"][0] // patch_size**2
  if out_channels not in (in_channels, 2 * in_channels):
    raise ValueError(
      f"The last layer gives {out_channels} channels for {in_channels} of the latents: "
      "PixArt predicts as many, or twice as many with the learned variance."
    )
  fields = {
    "depth": depth,
    "width": width,
    "patch_size": patch_size,
    "mlp_ratio": shapes["blocks/mlp/in/bias"][0] / width,
    "in_channels": in_channels,
    "learn_variance": out_channels != in_channels,
    "caption_width": shapes["caption_projection/in/kernel"][1],
    "qk_norm": "blocks/attention/query_norm/scale" in shapes,
    "size_conditions": "size_conditions/size/in/kernel" in shapes,
    "kv_compression": _compression(weights, layout, shapes),
    **_named_variant(depth, width, patch_size),
    **known,
  }
  for name, example in (
    ("num_heads", "16"),
    ("base_size", "64 for 1024 pixels"),
    ("pe_interpolation", "2 for 1024 pixels"),
    ("caption_length", "300 for Σ, 120 for α"),
  ):
    if name not in fields:
      raise ValueError(
        f"Neither the weights nor their config show {name}: give it ({example})."
      )
  return PixArtConfig(**fields)


def _named_variant(depth: int, width: int, patch_size: int) -> dict[str, int]:
  for sizes in VARIANTS.values():
    if (sizes["depth"], sizes["width"], sizes["patch_size"]) == (
      depth,
      width,
      patch_size,
    ):
      return {"num_heads": sizes["num_heads"]}
  return {}


def _compression(
  weights: Weights, layout: Layout, shapes: Mapping[str, tuple[int, ...]]
) -> KVCompression:
  layers = layers_in(weights, layout, f"{_COMPRESSOR}/kernel")
  if not layers:
    return KVCompression()
  window = shapes[f"{_COMPRESSOR}/kernel"][2:]
  ratio = next((r for r, w in WINDOWS.items() if w == tuple(window)), None)
  if ratio is None:
    raise ValueError(
      f"Keys and values are compressed by windows of {window[0]} x {window[1]}; known "
      f"are {', '.join(f'{h} x {w}' for h, w in WINDOWS.values())}."
    )
  norm = f"{_COMPRESSOR}/norm/scale" in shapes
  return KVCompression(ratio=ratio, layers=layers, operator="conv", norm=norm)


def _not_pixart(weights: Weights) -> str:
  names = list(weights)
  if any("lora" in name.lower() for name in names):
    return (
      f"These are the weights of a LoRA ({names[0]}), not of a model: "
      "convert the model that it changes to orbax, and merge the two with python -m "
      "pixsigma_jax.transform merge_lora MODEL DST --adapter=LORA."
    )
  return (
    f"These are not PixArt's weights in this layout: no layer was found among "
    f"{len(names)} tensors such as {listed(names, 3)}. Is --from right?"
  )


def _positions_shown(table: np.ndarray) -> dict[str, Any]:
  """Base size and scale that a stored table of positions was made with."""
  table = np.asarray(table, np.float32)
  count, width = table.shape[1:]
  base_size = math.isqrt(count)
  if base_size**2 != count or base_size < 2:
    raise ValueError(f"pos_embed has {count} positions, which are not a square grid.")
  # The second token's column has sine and cosine of 1 / pe_interpolation. Published
  # scales are whole eighths, to which also a table in half precision leads.
  place = math.atan2(table[0, 1, 0], table[0, 1, width // 4]) % (2 * math.pi)
  for scale in (round(8 / place) / 8, round(1 / place, 4)) if place else ():
    if scale and np.abs(table - _table(base_size, scale, width)).max() < 2e-3:
      return {"base_size": base_size, "pe_interpolation": scale}
  raise ValueError(
    "pos_embed is not a table of PixArt's fixed positions: this model was trained with "
    "others."
  )


def _table(
  base_size: int, pe_interpolation: float, width: int
) -> Float32[np.ndarray, "1 n d"]:
  grid = (base_size, base_size)
  codes = positions.sincos_2d(
    jnp.asarray(tokens.coordinates(grid, (1, 1)))[None],
    jnp.asarray([grid]),
    width,
    base_size=base_size,
    pe_interpolation=pe_interpolation,
  )
  return np.asarray(codes)


class _Without(Mapping[str, np.ndarray]):
  """A state dict less some names; still read only when asked."""

  def __init__(self, weights: Weights, names: tuple[str, ...]):
    self._weights = weights
    self._names = {name: None for name in weights if name not in names}

  def __getitem__(self, name: str) -> np.ndarray:
    if name not in self._names:
      raise KeyError(name)
    return self._weights[name]

  def __contains__(self, name: object) -> bool:
    return name in self._names

  def __iter__(self) -> Iterator[str]:
    return iter(self._names)

  def __len__(self) -> int:
    return len(self._names)
