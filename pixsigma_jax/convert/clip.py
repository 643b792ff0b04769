"""CLIP from transformers' files: its weights, straight to their devices; its tokenizer.

From a folder or the hub, tensor by tensor, and never through torch.
"""

import os
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from pixsigma_jax import sharding, tree
from pixsigma_jax.convert.files import (
  Weights,
  check_names,
  hub_folder,
  open_weights,
  read_json,
)
from pixsigma_jax.models.clip import (
  MEAN,
  STD,
  Clip,
  ClipConfig,
  TowerConfig,
  abstract_clip_params,
  layer_name,
)

Tower = Literal["image", "text"]
TOWERS: tuple[Tower, ...] = ("image", "text")

# Ours ↔ theirs, below the tower's prefix.
_PREFIX = {"image": "vision_model", "text": "text_model"}
_OUTSIDE: dict[str, dict[str, str]] = {
  "image": {
    "patch_kernel": "embeddings.patch_embedding.weight",
    "class_embedding": "embeddings.class_embedding",
    "positions": "embeddings.position_embedding.weight",
    "first_norm/scale": "pre_layrnorm.weight",
    "first_norm/bias": "pre_layrnorm.bias",
    "last_norm/scale": "post_layernorm.weight",
    "last_norm/bias": "post_layernorm.bias",
  },
  "text": {
    "embedding": "embeddings.token_embedding.weight",
    "positions": "embeddings.position_embedding.weight",
    "last_norm/scale": "final_layer_norm.weight",
    "last_norm/bias": "final_layer_norm.bias",
  },
}
_PROJECTION = {"image": "visual_projection.weight", "text": "text_projection.weight"}
_LAYER = {
  "attention_norm": "layer_norm1",
  "attention/q": "self_attn.q_proj",
  "attention/k": "self_attn.k_proj",
  "attention/v": "self_attn.v_proj",
  "attention/out": "self_attn.out_proj",
  "mlp_norm": "layer_norm2",
  "mlp_in": "mlp.fc1",
  "mlp_out": "mlp.fc2",
}
# In files beside the parameters: buffers of older versions, and the scale of training.
_UNUSED = ("logit_scale", "position_ids")

# What transformers takes where a config.json leaves a field out.
_DEFAULTS: dict[str, dict[str, Any]] = {
  "vision_config": {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 32,
  },
  "text_config": {
    "hidden_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
  },
}
_LEGACY_END = 2  # transformers then embeds a text at its largest id


def clip_config_from(content: Mapping[str, Any]) -> ClipConfig:
  """Sizes from the content of transformers' config.json of a whole CLIP.

  Raises:
    ValueError: it is of another network, or computes what this one does not.
  """
  if content.get("model_type") != "clip":
    raise ValueError(
      f"config.json is of a {content.get('model_type')!r}; a whole CLIP is needed, "
      "with model_type 'clip', such as openai/clip-vit-large-patch14."
    )
  if content.get("quantization_config"):
    raise ValueError("config.json is of quantised weights: take float32 or float16.")
  parts = {
    name: {**defaults, **(content.get(name) or content.get(f"{name}_dict") or {})}
    for name, defaults in _DEFAULTS.items()
  }
  vision, text = parts["vision_config"], parts["text_config"]

  def tower(name: str, part: Mapping[str, Any]) -> TowerConfig:
    activation = part.get("hidden_act", "quick_gelu")
    if activation not in ("quick_gelu", "gelu"):
      raise ValueError(
        f"config.json has {name}.hidden_act={activation!r}; known are quick_gelu and "
        "gelu."
      )
    return TowerConfig(
      width=part["hidden_size"],
      num_layers=part["num_hidden_layers"],
      num_heads=part["num_attention_heads"],
      hidden=part["intermediate_size"],
      activation=activation,
      epsilon=part.get("layer_norm_eps", 1e-5),
    )

  end = text["eos_token_id"]
  return ClipConfig(
    image=tower("vision_config", vision),
    text=tower("text_config", text),
    projection=content.get("projection_dim", 512),
    image_size=vision["image_size"],
    patch_size=vision["patch_size"],
    vocabulary=text["vocab_size"],
    max_length=text["max_position_embeddings"],
    end=None if end == _LEGACY_END else end,
  )


def clip_names(config: ClipConfig, which: Tower) -> dict[str, str]:
  """Every leaf of a tower by name → the tensor of transformers that holds it."""
  prefix = _PREFIX[which]
  names = {ours: f"{prefix}.{theirs}" for ours, theirs in _OUTSIDE[which].items()}
  for layer in range(getattr(config, which).num_layers):
    for ours, theirs in _LAYER.items():
      weight = "scale" if ours.endswith("norm") else "kernel"
      for part, their_part in ((weight, "weight"), ("bias", "bias")):
        names[f"layers/{layer_name(layer)}/{ours}/{part}"] = (
          f"{prefix}.encoder.layers.{layer}.{theirs}.{their_part}"
        )
  return names | {"projection/kernel": _PROJECTION[which]}


def clip_from_weights(
  weights: Weights, config: ClipConfig, which: Tower, *, mesh: Mesh
) -> dict[str, Any]:
  """Parameters of one tower in float32, each placed whole as soon as it is read.

  Raises:
    ValueError: tensors are missing, left over or of another shape; names them.
  """
  names = clip_names(config, which)
  of_both = {name for w in TOWERS for name in clip_names(config, w).values()}
  check_names(
    weights,
    names.values(),
    "a CLIP of config.json's sizes",
    lambda name: name in of_both or name.endswith(_UNUSED),
  )
  whole = NamedSharding(mesh, P())

  def place(ours: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    array = _to_ours(ours, weights[names[ours]])
    if array.shape != leaf.shape:
      raise ValueError(
        f"{names[ours]} becomes {list(array.shape)}, and config.json makes it "
        f"{list(leaf.shape)}: weights and config are of different models."
      )
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise ValueError(f"{names[ours]} is {array.dtype}, not of floating point.")
    array = np.array(array, np.float32, order="C")
    return jax.make_array_from_callback(array.shape, whole, array.__getitem__)

  return tree.map_with_name(place, abstract_clip_params(config, which))


def _to_ours(ours: str, array: np.ndarray) -> np.ndarray:
  if ours == "patch_kernel":  # OIHW
    return array.transpose(2, 3, 1, 0)
  return array.T if ours.endswith("/kernel") else array


def load_clip(
  source: str | os.PathLike[str],
  *,
  towers: Sequence[Tower] = TOWERS,
  dtype: DTypeLike = jnp.float32,
  mesh: Mesh | None = None,
  batch_size: int = 16,
) -> Clip:
  """CLIP from a folder of transformers or from the hub.

  Args:
    source: folder or hub id, such as openai/clip-vit-large-patch14-336.
    towers: what is loaded of it.
    dtype: of matrix products.
    mesh: devices that share a batch; the first device without one.
    batch_size: see `Clip`.

  Raises:
    FileNotFoundError: it is neither a folder nor can it be fetched; or files lack.
    ValueError: it is another network, or its files are damaged.
  """
  mesh = sharding.single_device_mesh() if mesh is None else mesh
  folder = hub_folder(
    source,
    ["*.json", "*.txt", "*.safetensors"],
    "Give a folder with a CLIP of transformers.",
  )
  try:
    config = clip_config_from(read_json(folder / "config.json"))
    _check_preprocessing(folder, config)
    tokenizer = _load_tokenizer(folder, config) if "text" in towers else None
    weights = open_weights(folder)
    params = {
      which: clip_from_weights(weights, config, which, mesh=mesh) for which in towers
    }
  except ValueError as error:
    raise ValueError(f"Could not load CLIP of {source}: {error}") from error
  identity = {"clip": os.fspath(source), "hash": _hash(params)}
  return Clip(
    config=config,
    params=params,
    tokenizer=tokenizer,
    identity=identity,
    dtype=jnp.dtype(dtype),
    mesh=mesh,
    batch_size=batch_size,
  )


def _hash(params: Mapping[str, Any]) -> str:
  value = 0
  for name, leaf in sorted(tree.named_leaves(params).items()):
    value = zlib.crc32(name.encode(), value)
    value = zlib.crc32(
      np.ascontiguousarray(leaf).view(np.uint8).reshape(-1).data, value
    )
  return f"{value:08x}"


def _check_preprocessing(folder: pathlib.Path, config: ClipConfig) -> None:
  """Checks that the folder's own preprocessing is that of `models.clip`."""
  path = folder / "preprocessor_config.json"
  if not path.is_file():
    return
  content = read_json(path)
  size = content.get("size", config.image_size)
  size = size.get("shortest_edge") if isinstance(size, Mapping) else size
  wanted = {
    "size": (size, config.image_size),
    "resample": (content.get("resample", 3), 3),  # Pillow's bicubic
    "image_mean": (tuple(content.get("image_mean", MEAN)), MEAN),
    "image_std": (tuple(content.get("image_std", STD)), STD),
  }
  for name, (have, want) in wanted.items():
    same = (
      np.allclose(have, want, atol=1e-4) if isinstance(want, tuple) else have == want
    )
    if not same:
      raise ValueError(
        f"preprocessor_config.json has {name}={have!r}, where CLIP has {want!r}: this "
        "model wants other pixels than are made here."
      )


def _load_tokenizer(folder: pathlib.Path, config: ClipConfig) -> Any:
  names = ("tokenizer.json", "vocab.json")
  if not any((folder / name).is_file() for name in names):
    raise FileNotFoundError(
      f"{folder} has no tokenizer: neither {' nor '.join(names)}."
    )
  from transformers import CLIPTokenizer

  tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
  largest = max(tokenizer.get_vocab().values())
  if largest >= config.vocabulary:
    raise ValueError(
      f"its tokenizer has ids up to {largest}, and the network {config.vocabulary} "
      "embeddings"
    )
  ids = tokenizer("a photo of a cat")["input_ids"]
  # The end must be found where the network looks for it.
  end = max(ids) if config.end is None else config.end
  if len(ids) < 3 or ids[-1] != end or end in ids[:-1]:
    raise ValueError(
      f"its tokenizer turns 'a photo of a cat' into {ids[:12]}, and the network looks "
      f"for an end token {end}: vocabulary or config.json are another model's"
    )
  return tokenizer
