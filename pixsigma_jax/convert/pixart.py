"""PixArt's weights as the official repository and as diffusers keep them, in and out.

What a state dict shows of its hyper-parameters is read off it. What it does not show is
an argument, and an argument that contradicts the weights is an error: nothing is
guessed, because a wrong position scale draws images that are merely bad.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from pixsigma_jax.convert.files import LazyWeights, Renamed, Weights
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
# The same of diffusers': its versions 0.22 to 0.24 kept the null caption, so exports of
# α have it; the table is there if somebody kept buffers that diffusers recomputes.
PEER_POSITIONS = "pos_embed.pos_embed"
PEER_NULL_CAPTION = "caption_projection.y_embedding"

# Base size and scale of the one table that OneTrainer writes, whatever the model is
# (`convert_pixart_diffusers_to_ckpt.py`). No release has both: it tells nothing.
_ONETRAINER = {"base_size": 64, "pe_interpolation": 1.0}
_POSITIONS_HINT = (
  "So says pos_embed: if that is not the model's, as tools write one that is not "
  "(OneTrainer does), leave it out with --nopos_embed."
)

_COMPRESSOR = "blocks/attention/kv_compressor"


def from_pixart(
  weights: Weights,
  *,
  num_heads: int | None = None,
  base_size: int | None = None,
  pe_interpolation: float | None = None,
  caption_length: int | None = None,
  stored_positions: bool = True,
) -> tuple[PixArtConfig, Any]:
  """Hyper-parameters and parameters out of an official state dict.

  Args:
    weights: official names to NumPy arrays, perhaps with the buffers `pos_embed` and
      `y_embedder.y_embedding`, which show what is not given below.
    num_heads: needed where depth and width are not those of a named variant; that of
      XL/2 goes with every depth.
    base_size, pe_interpolation: see `PixArtConfig`; needed without `pos_embed`, and
      where that is the table of OneTrainer, which writes one for all models.
    caption_length: needed without `y_embedder.y_embedding`.
    stored_positions: False leaves `pos_embed` out of account.

  Raises:
    ValueError: tensors are missing, left over or misshapen, a hyper-parameter is
      neither shown nor given, or what is given contradicts the weights.
  """
  shown = _length_shown(weights)
  given = {
    "num_heads": num_heads,
    "base_size": base_size,
    "pe_interpolation": pe_interpolation,
    "caption_length": caption_length,
  }
  if POSITIONS in weights and stored_positions:
    shown |= _positions_told(weights[POSITIONS], given)
  known = settled(shown, given, hints=dict.fromkeys(_ONETRAINER, _POSITIONS_HINT))
  parameters = _Changed(weights, without=(POSITIONS, NULL_CAPTION))
  config = _config(parameters, OFFICIAL, known)
  _check_null_caption(weights, config)
  return config, params_from(parameters, config, OFFICIAL)


def null_caption_in(weights: Weights) -> Float32[np.ndarray, "t e"] | None:
  """The null caption of a state dict, None without one.

  Raises:
    ValueError: it is no sequence of embeddings.
  """
  name = next((n for n in (NULL_CAPTION, PEER_NULL_CAPTION) if n in weights), None)
  if name is None:
    return None
  # A copy: a view would keep the whole file in memory.
  null_caption = np.array(weights[name], np.float32)
  if null_caption.ndim != 2:
    raise ValueError(
      f"{name} has shape {list(null_caption.shape)}, not [tokens, caption channels]."
    )
  return null_caption


def _check_null_caption(weights: Weights, config: PixArtConfig) -> None:
  null_caption = null_caption_in(weights)
  if null_caption is not None and null_caption.shape[1] != config.caption_width:
    raise ValueError(
      f"The null caption is {null_caption.shape[1]} channels wide, but captions of "
      f"these weights are {config.caption_width}: the file was put together from two."
    )


def _length_shown(weights: Weights) -> dict[str, Any]:
  null_caption = null_caption_in(weights)
  return {} if null_caption is None else {"caption_length": len(null_caption)}


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
  config_json: Mapping[str, Any] | None = None,
) -> tuple[PixArtConfig, Any]:
  """Hyper-parameters and parameters out of a `PixArtTransformer2DModel`'s state dict.

  Args:
    weights: diffusers' names to NumPy arrays, perhaps with the buffers that older
      versions of it kept: the null caption and the table of positions.
    num_heads, base_size, pe_interpolation: needed without `config_json`.
    caption_length: 300 for Σ, 120 for α; needed where the null caption is not kept.
    config_json: the content of diffusers' config.json.

  Raises:
    ValueError: see `from_pixart`; or `config_json` is another network's than the
      weights.
  """
  shown = _length_shown(weights)
  if config_json is not None:
    shown |= shown_by_config(config_json)
  given = {
    "num_heads": num_heads,
    "base_size": base_size,
    "pe_interpolation": pe_interpolation,
    "caption_length": caption_length,
  }
  known = settled(shown, given)
  if PEER_POSITIONS in weights:
    known = settled(_positions_shown(weights[PEER_POSITIONS]), known)
  parameters = _Changed(weights, without=(PEER_POSITIONS, PEER_NULL_CAPTION))
  parameters = _without_guard(_with_peers_norms(parameters))
  if config_json is not None:
    _check_heads(config_json, parameters)
  config = _config(parameters, DIFFUSERS, known)
  if config_json is not None:
    _check_config(config_json, config)
  _check_null_caption(weights, config)
  return config, params_from(parameters, config, DIFFUSERS)


def to_diffusers(config: PixArtConfig, params: Any) -> dict[str, np.ndarray]:
  """diffusers' state dict; of a compressing model with names that only we know.

  Stock diffusers leaves out names that it does not know, with a warning. So that it
  refuses a compressing model, `scale_shift_table` has a row of zeros more than its own.

  Raises:
    ValueError: the compression has no parameters to tell it by.
  """
  _check_operator(config)
  weights = weights_from(params, config, DIFFUSERS)
  if config.kv_compression.layers:
    table = weights[_GUARDED]
    weights[_GUARDED] = np.concatenate([table, np.zeros_like(table[:1])])
  return weights


# What the official repository's export calls the norms of queries and keys, by its own
# names, and diffusers.
_NORMS = {".attn1.q_norm.": ".attn1.norm_q.", ".attn1.k_norm.": ".attn1.norm_k."}


def _with_peers_norms(weights: Weights) -> Weights:
  """A state dict with diffusers' own names for the norms of queries and keys."""

  def renamed(name: str) -> str:
    old = next((old for old in _NORMS if old in name), None)
    new = name if old is None else name.replace(old, _NORMS[old])
    return name if new != name and new in weights else new  # both: one is left over

  return Renamed(weights, {renamed(name): name for name in weights})


def _without_guard(weights: Weights) -> Weights:
  """A state dict less the row that `to_diffusers` adds; earlier exports lack it."""
  if _GUARDED not in weights or not layers_in(
    weights, DIFFUSERS, f"{_COMPRESSOR}/kernel"
  ):
    return weights
  table = weights[_GUARDED]
  if len(table) != 3 or np.any(table[2]):
    return weights
  return _Changed(weights, instead={_GUARDED: table[:2]})


# What diffusers' config.json must say, where it says anything, for the network to be
# the one that is built here.
_REQUIRED = {
  "norm_type": "ada_norm_single",
  "norm_elementwise_affine": False,
  "norm_eps": 1e-6,
  "activation_fn": "gelu-approximate",
  "attention_bias": True,
  "attention_type": "default",
  "only_cross_attention": False,
  "double_self_attention": False,
  "num_vector_embeds": None,
}
CLASSES = ("PixArtTransformer2DModel", "Transformer2DModel")
# The class that a compressing model is exported under: stock diffusers has none of that
# name and says so, where it would load the known class and drop the compression.
COMPRESSED_CLASS = "PixArtKVCompressedTransformer2DModel"
_GUARDED = "scale_shift_table"


def shown_by_config(json: Mapping[str, Any]) -> dict[str, Any]:
  """Reads num_heads, base_size and pe_interpolation from diffusers' config.json.

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
  heads, size = json["num_attention_heads"], json["sample_size"]
  patch_size = json.get("patch_size", 2)
  scale = json.get("interpolation_scale")
  if scale is None:  # diffusers' own rule
    scale = max(size // 64, 1) if isinstance(size, int) else 1
  for field, value, kinds in (
    ("num_attention_heads", heads, int),
    ("sample_size", size, int),
    ("patch_size", patch_size, int),
    ("interpolation_scale", scale, int | float),
  ):
    if not isinstance(value, kinds) or isinstance(value, bool) or not value > 0:
      raise ValueError(
        f"config.json has {field}={value!r}, which is no number above 0."
      )
  if size % patch_size:
    raise ValueError(
      f"config.json has sample_size={size}, which is no multiple of "
      f"patch_size={patch_size}."
    )
  return {
    "num_heads": heads,
    "base_size": size // patch_size,
    "pe_interpolation": float(scale),
  }


def _check_heads(json: Mapping[str, Any], weights: Weights) -> None:
  """Compares the width, which is that of all heads together in diffusers."""
  heads = json["num_attention_heads"]
  size = json.get("attention_head_dim")
  width = shapes_in(weights, DIFFUSERS).get("patch_embedding/bias", (None,))[0]
  if size is not None and width is not None and heads * size != width:
    raise ValueError(
      f"config.json has num_attention_heads={heads} of attention_head_dim={size}, "
      f"together {heads * size}, but these weights are of width {width}: they are of "
      "two models. Fetch the config.json that belongs to the weights."
    )


def _check_config(json: Mapping[str, Any], config: PixArtConfig) -> None:
  """Compares what config.json says with what the weights show.

  What it leaves out is no contradiction, nor are fields that shape no tensor.

  Raises:
    ValueError: they differ; names each field with both values.
  """
  shown = diffusers_config(config)
  stated = {field: json[field] for field in _SHAPING if field in json}
  # None means what it does to diffusers: as many, or what the size suggests.
  if stated.get("out_channels", 0) is None:
    stated["out_channels"] = config.in_channels
  if stated.get("use_additional_conditions", False) is None:
    del stated["use_additional_conditions"]
  problems = [
    f"{field}={value!r} (the weights: {shown.get(field)!r})"
    for field, value in stated.items()
    if value != shown.get(field)
  ]
  compressed = json["_class_name"] == COMPRESSED_CLASS
  if compressed != bool(config.kv_compression.layers):
    problems.insert(
      0,
      f"the class {json['_class_name']} (the weights are of {shown['_class_name']})",
    )
  if problems:
    raise ValueError(
      f"config.json has {', '.join(problems)}: they are of two models. Fetch the "
      "config.json that belongs to the weights."
    )


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


# Fields of diffusers' config.json that a tensor's shape shows, too.
_SHAPING = (
  *("num_layers", "attention_head_dim", "cross_attention_dim", "patch_size"),
  *("in_channels", "out_channels", "caption_channels", "use_additional_conditions"),
  *("kv_compress_ratio", "kv_compress_layers", "kv_compress_norm"),
)


def settled(
  shown: Mapping[str, Any],
  given: Mapping[str, Any],
  *,
  hints: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
  """The value that is detected or given (not None), if both agree.

  Args:
    hints: what to say besides where these do not agree.

  Raises:
    ValueError: they do not; names every contradiction.
  """
  asked = {name: value for name, value in given.items() if value is not None}
  others = [name for name in asked if asked[name] != shown.get(name, asked[name])]
  if others:
    more = dict.fromkeys(f" {hints[name]}" for name in others if name in hints)
    flags = ", ".join(f"--{name}" for name in others)
    raise ValueError(
      f"{', '.join(f'{name}={asked[name]}' for name in others)} was asked for, but "
      f"these weights have {', '.join(f'{name}={shown[name]}' for name in others)}: "
      f"they are of another release or resolution. Change {flags} or "
      f"--release.{''.join(more)}"
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
    raise ValueError(f"These weights lack {listed(absent)}: they are incomplete.")
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
        f"Neither the weights nor their config show {name}: give --{name} ({example})."
      )
  return PixArtConfig(**fields)


def _named_variant(depth: int, width: int, patch_size: int) -> dict[str, int]:
  for name, sizes in VARIANTS.items():
    # XL/2 is known in other depths too: PixArt 900M has 42 blocks.
    fits = name == "XL/2" or sizes["depth"] == depth
    if fits and (sizes["width"], sizes["patch_size"]) == (width, patch_size):
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
      f"These are the weights of a LoRA ({names[0]}), not of a model: give it to "
      "python -m pixsigma_jax.sample as --lora; or convert the model that it changes "
      "to orbax, and merge the two with python -m pixsigma_jax.transform merge_lora "
      "MODEL DST --adapter=LORA."
    )
  return (
    f"These are not PixArt's weights in this layout: no layer was found among "
    f"{len(names)} tensors such as {listed(names, 3)}. Is --from right?"
  )


def _positions_told(table: np.ndarray, given: Mapping[str, Any]) -> dict[str, Any]:
  """Base size and scale from a table of positions; nothing for OneTrainer's.

  Raises:
    ValueError: it tells nothing, and they are not given.
  """
  shown = _positions_shown(table)
  if shown != _ONETRAINER:
    return shown
  unsaid = [name for name in shown if given.get(name) is None]
  if unsaid:
    raise ValueError(
      "pos_embed has base_size=64 and pe_interpolation=1.0, the table that OneTrainer "
      "writes whatever the model is: give "
      f"{' and '.join(f'--{name}' for name in unsaid)} (64 and 2 for 1024 pixels), or "
      "--release."
    )
  return {}


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


class _Changed(LazyWeights):
  """A state dict less some names, with other tensors under some."""

  def __init__(
    self,
    weights: Weights,
    *,
    without: tuple[str, ...] = (),
    instead: Weights | None = None,
  ):
    self._weights = weights
    self._instead = instead or {}
    self._names = {name: None for name in weights if name not in without}

  def __getitem__(self, name: str) -> np.ndarray:
    if name not in self._names:
      raise KeyError(name)
    return self._instead[name] if name in self._instead else self._weights[name]
