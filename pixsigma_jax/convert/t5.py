"""T5 from transformers' files: its weights, straight to their devices; its tokenizer.

A tensor is read, cast and split, and forgotten before the next is read: XXL, 19 GB in
float32, passes through the memory of a small host, and never through torch.
"""

import dataclasses
import itertools
import os
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from pixsigma_jax import checkpoint, disk, errors, sharding, tree
from pixsigma_jax.convert import spiece
from pixsigma_jax.convert.files import (
  Network,
  Weights,
  check_names,
  lone_file,
  open_weights,
  part_folder,
  part_of,
  read_json,
  write_json,
  write_safetensors,
)
from pixsigma_jax.models.t5 import (
  END,
  PAD,
  T5Config,
  T5TextEncoder,
  abstract_t5_params,
  layer_name,
  t5_shardings,
)
from pixsigma_jax.wording import listed

# Ours ↔ theirs. Kernels of ours are [in, out], theirs [out, in]; the rest is the same.
_OUTSIDE: dict[str, str] = {
  "embedding": "shared.weight",
  "relative_bias": (
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
  ),
  "final_norm/scale": "encoder.final_layer_norm.weight",
}
_LAYER: dict[str, str] = {
  "attention_norm/scale": "layer.0.layer_norm.weight",
  "attention/q/kernel": "layer.0.SelfAttention.q.weight",
  "attention/k/kernel": "layer.0.SelfAttention.k.weight",
  "attention/v/kernel": "layer.0.SelfAttention.v.weight",
  "attention/out/kernel": "layer.0.SelfAttention.o.weight",
  "mlp_norm/scale": "layer.1.layer_norm.weight",
  "mlp/gate/kernel": "layer.1.DenseReluDense.wi_0.weight",
  "mlp/in/kernel": "layer.1.DenseReluDense.wi_1.weight",
  "mlp/out/kernel": "layer.1.DenseReluDense.wo.weight",
}
# The embedding table's second name: some files have only this one, some have both.
_TIED = "encoder.embed_tokens.weight"
# The other half of a full T5, which makes text and is of no use here, and a tokenizer
# that ComfyUI keeps beside the weights.
_UNUSED = ("decoder.", "lm_head.", "spiece_model")
# Alone in a file as in a file of ComfyUI with all of a pipeline, or in one of ours.
_NETWORK = Network(
  landmarks=(f"encoder.block.0.{_LAYER['attention/q/kernel']}",),
  prefixes=(
    "text_encoders.t5xxl.transformer.",
    "t5xxl.transformer.",
    "text_encoder.",
    "cond_stage_model.t5xxl.transformer.",
  ),
)

_ARCHITECTURES = ("T5EncoderModel", "T5ForConditionalGeneration", "T5Model")
_SIZES = {
  "width": "d_model",
  "num_layers": "num_layers",
  "num_heads": "num_heads",
  "head_width": "d_kv",
  "hidden": "d_ff",
  "vocabulary": "vocab_size",
}
# What the encoder in models/t5.py is: a field of config.json, its value there, and what
# transformers takes if the field is missing.
_REQUIRED: tuple[tuple[str, Any, Any], ...] = (
  ("model_type", "t5", None),
  ("feed_forward_proj", "gated-gelu", "relu"),
  ("dense_act_fn", "gelu_new", "gelu_new"),
  ("is_gated_act", True, True),
  ("layer_norm_epsilon", 1e-6, 1e-6),
  ("quantization_config", None, None),
)

_TOKENIZER_FILES = (spiece.TOKENIZER, spiece.SPIECE)
# Embeddings that belong to no token: T5's sentinels, which not every tokenizer counts,
# and what rounds the table up to a multiple of 128.
_SPARE_ROWS = 256
# Every letter: a vocabulary of whatever language that T5 ever had can spell it.
_SENTENCE = "the quick brown fox jumps over a lazy dog."


def t5_names(config: T5Config) -> dict[str, str]:
  """Every leaf of ours by name → the tensor of transformers that holds it."""
  return _OUTSIDE | {
    f"{layer_name(i)}/{ours}": f"encoder.block.{i}.{theirs}"
    for i in range(config.num_layers)
    for ours, theirs in _LAYER.items()
  }


def t5_from_weights(
  weights: Weights, config: T5Config, *, dtype: DTypeLike, mesh: Mesh | None = None
) -> dict[str, Any]:
  """Parameters from transformers' names, each tensor placed as soon as it is read.

  Of a full T5, `decoder.*` and `lm_head.*` are left out. `encoder.embed_tokens.weight`
  may stand for `shared.weight`, or beside it if the two are equal.

  Args:
    weights: names → tensors, read one at a time.
    dtype: of every parameter.
    mesh: where they go, split by `models.t5.RULES`; without one, the first device.

  Raises:
    ValueError: tensors are missing, left over, of another shape or not of floating
      point; names them.
  """
  mesh = sharding.single_device_mesh() if mesh is None else mesh
  names = t5_names(config)
  if names["embedding"] not in weights and _TIED in weights:
    names["embedding"] = _TIED
  _check_names(weights, names, config)

  def place(ours: str, leaf: jax.ShapeDtypeStruct, where: NamedSharding) -> jax.Array:
    array = weights[names[ours]]
    _check_array(names[ours], array, _their_shape(ours, leaf.shape))
    array = array.T if _is_kernel(ours) else array

    def part(index: Any) -> np.ndarray:
      # A copy always: a view would keep the whole tensor, or its file, in use.
      return np.array(array[index], dtype, order="C")

    return jax.make_array_from_callback(leaf.shape, where, part)

  places = tree.named_leaves(t5_shardings(config, mesh))
  params = tree.map_with_name(
    # Waited for, lest many tensors wait for their devices in the host's memory.
    lambda ours, leaf: jax.block_until_ready(place(ours, leaf, places[ours])),
    abstract_t5_params(config),
  )
  if _TIED in weights and names["embedding"] != _TIED:
    first, second = (_checksum(weights[name]) for name in (names["embedding"], _TIED))
    if first != second:
      raise ValueError(
        f"{names['embedding']} and {_TIED} differ: T5 has one table of embeddings "
        "under both names, and which of them is meant cannot be told."
      )
  return params


def t5_to_weights(params: Mapping[str, Any], config: T5Config) -> dict[str, np.ndarray]:
  """The inverse of `t5_from_weights`, equal to the bit, in the dtype of `params`.

  All tensors are in the host's memory at once.
  """
  names = t5_names(config)
  return {
    names[ours]: np.ascontiguousarray(
      np.asarray(leaf).T if _is_kernel(ours) else np.asarray(leaf)
    )
    for ours, leaf in tree.named_leaves(params).items()
  }


def _is_kernel(ours: str) -> bool:
  return ours.endswith("/kernel")


def _their_shape(ours: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  return shape[::-1] if _is_kernel(ours) else shape


def _check_names(weights: Weights, names: Mapping[str, str], config: T5Config) -> None:
  check_names(
    weights,
    names.values(),
    f"a T5 v1.1 encoder of {config.num_layers} layers",
    lambda name: name == _TIED or name.startswith(_UNUSED),
  )


def _check_array(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
  if array.shape != shape:
    raise ValueError(
      f"{name} has shape {list(array.shape)}, and config.json makes it {list(shape)}: "
      "weights and config are of different models."
    )
  if not jnp.issubdtype(array.dtype, jnp.floating):
    raise ValueError(
      f"{name} is {array.dtype}: quantised weights cannot be used. Take float32, "
      "bfloat16 or float16."
    )


def _checksum(array: np.ndarray) -> int:
  return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def t5_config_from(content: Mapping[str, Any]) -> T5Config:
  """Sizes from the content of transformers' config.json.

  Raises:
    ValueError: it is of another network than a T5 v1.1 or Flan-T5; says in what.
  """
  architectures = content.get("architectures") or [_ARCHITECTURES[0]]
  if not set(architectures) & set(_ARCHITECTURES):
    raise ValueError(
      f"config.json is of {listed(architectures)}; a T5 encoder is one of "
      f"{', '.join(_ARCHITECTURES)}."
    )
  for field, want, assumed in _REQUIRED:
    have = content.get(field, assumed)
    if have != want:
      raise ValueError(
        f"config.json has {field}={have!r}, where T5 v1.1 and Flan-T5 have {want!r}: "
        "other T5s are not supported."
      )
  sizes = {ours: content.get(theirs) for ours, theirs in _SIZES.items()}
  bad = [
    f"{_SIZES[ours]}={size!r}"
    for ours, size in sizes.items()
    if not isinstance(size, int) or size < 1
  ]
  if bad:
    raise ValueError(
      f"config.json must give every size as a whole number from 1 on, and has "
      f"{', '.join(bad)}."
    )
  return T5Config(
    **sizes,  # pyright: ignore[reportArgumentType]
    num_buckets=content.get("relative_attention_num_buckets", 32),
    max_distance=content.get("relative_attention_max_distance", 128),
  )


def t5_config_shown(weights: Weights) -> T5Config:
  """Sizes from the shapes of an encoder's tensors, for a file without config.json.

  Raises:
    ValueError: it is no T5 v1.1.
  """

  def shape(ours: str) -> tuple[int, ...]:
    name = (_OUTSIDE | _LAYER)[ours]
    name = name if ours in _OUTSIDE else f"encoder.block.0.{name}"
    if ours == "embedding" and name not in weights:
      name = _TIED
    if name not in weights or weights[name].ndim != 2:
      raise ValueError(
        f"{name} is missing or no matrix: these are not the weights of a T5 v1.1, but "
        f"{len(weights)} tensors such as {listed(weights, 3)}."
      )
    return weights[name].shape

  vocabulary, width = shape("embedding")
  num_buckets, num_heads = shape("relative_bias")
  inner = shape("attention/q/kernel")[0]
  norm = _LAYER["attention_norm/scale"]
  depth = next(
    i for i in itertools.count() if f"encoder.block.{i}.{norm}" not in weights
  )
  if inner % num_heads:
    raise ValueError(
      f"{num_heads} heads do not divide the {inner} features of T5's attention."
    )
  return T5Config(
    width=width,
    num_layers=depth,
    num_heads=num_heads,
    head_width=inner // num_heads,
    hidden=shape("mlp/gate/kernel")[0],
    vocabulary=vocabulary,
    num_buckets=num_buckets,
  )


def load_text_encoder(
  path: str | os.PathLike[str],
  tokenizer_folder: str | os.PathLike[str],
  *,
  dtype: DTypeLike,
  mesh: Mesh | None = None,
) -> T5TextEncoder:
  """T5 from a `text_encoder/` and a `tokenizer/` as diffusers and transformers save it.

  Args:
    path: a folder with config.json and the weights, in one file or in shards; or one
      file, alone in its folder or by its own name, as ComfyUI has it.
    tokenizer_folder: with tokenizer.json or spiece.model; may be the same folder.
    dtype: of parameters and matrix products: bfloat16 or float32. XXL overflows in
      float16.
    mesh: see `t5_from_weights`.

  Raises:
    FileNotFoundError: files are missing; says which.
    ValueError: the files are of another network or damaged, the tokenizer does not
      belong to T5, or `dtype` is float16.
  """
  path = pathlib.Path(path)
  dtype = jnp.dtype(dtype)
  if dtype not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
    raise ValueError(f"T5 runs in bfloat16 or float32, not in {dtype.name}.")
  mesh = sharding.single_device_mesh() if mesh is None else mesh
  try:
    source = _Source.at(path)
    # Before the weights, which take minutes.
    tokenizer = load_tokenizer(tokenizer_folder)
    _check_vocabulary(tokenizer, tokenizer_folder, source)
    params = source.params(dtype, mesh)
  except ValueError as error:
    raise ValueError(f"Could not load the text encoder of {path}: {error}") from error
  return T5TextEncoder(
    config=source.config, params=params, tokenizer=tokenizer, dtype=dtype, mesh=mesh
  )


FORMATS = ("diffusers", "orbax", "comfyui")


def convert_text_encoder(
  source: pathlib.Path,
  target: pathlib.Path,
  *,
  from_format: str,
  to_format: str,
  variant: str | None = None,
) -> None:
  """Writes T5's encoder as another of `FORMATS`, in its own dtype, to the bit.

  `load_text_encoder` reads them all; `orbax` is read in parallel and without a
  transpose. float8 becomes bfloat16, which holds the same numbers.

  Args:
    source, target: a folder, of `comfyui` a file.
    variant: see `open_weights`.

  Raises:
    FileNotFoundError: there is no source.
    FileExistsError: there is a target.
    ValueError: the source is not T5's, or not of the format.
  """
  if target.exists():
    raise FileExistsError(f"{target} exists already and is left as it is.")
  if to_format == "comfyui" and target.suffix != ".safetensors":
    raise ValueError(
      f"{target} must end in .safetensors: --to=comfyui writes one such file."
    )
  found = _Source.at(source, variant)
  if found.form != from_format:
    raise ValueError(
      f"{source} is not of the format {from_format!r}: give --from={found.form}."
    )
  dtype = found.dtype()
  params = found.params(dtype, sharding.single_device_mesh())
  if to_format == "comfyui":
    write_safetensors(target, t5_to_weights(params, found.config))
    return
  with disk.whole_folder(target) as folder:
    if to_format == "orbax":
      checkpoint.save_arrays(folder, params)
    else:
      weights = t5_to_weights(params, found.config)
      write_safetensors(folder / "model.safetensors", weights)
    write_json(folder / "config.json", {**found.content, "dtype": dtype.name})


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Source:
  """An encoder on a disk, of any format; its weights are not read yet.

  Attributes:
    path: its folder or file.
    form: which of `FORMATS` it is.
    content: config.json, or what it would be.
    weights: unless the format is `orbax`.
  """

  path: pathlib.Path
  form: str
  config: T5Config
  content: dict[str, Any]
  weights: Weights | None

  @classmethod
  def at(cls, path: pathlib.Path, variant: str | None = None) -> "_Source":
    path = part_folder(path, "text_encoder")
    file = lone_file(path)
    if file is not None:
      weights = part_of(open_weights(file, variant=variant), _NETWORK, file)
      config = t5_config_shown(weights)
      return cls(
        path=path,
        form="comfyui",
        config=config,
        content=_config_fields(config),
        weights=weights,
      )
    content = read_json(path / "config.json")
    config = t5_config_from(content)
    form, weights = "orbax", None
    if not checkpoint.has_arrays(path):
      form, weights = "diffusers", open_weights(path, variant=variant)
      weights = part_of(weights, _NETWORK, path)
    return cls(path=path, form=form, config=config, content=content, weights=weights)

  def dtype(self) -> np.dtype:
    """Dtype of the weights: the widest, as some files keep a few tensors in float32."""
    if self.weights is None:
      named = self.content.get("dtype") or self.content.get("torch_dtype")
      return jnp.dtype(named or "float32")
    some = (_LAYER["attention/q/kernel"], _LAYER["mlp/out/kernel"])
    names = [f"encoder.block.0.{name}" for name in some]
    kinds = {self.weights[name].dtype for name in names if name in self.weights}
    if not kinds or not all(jnp.issubdtype(kind, jnp.floating) for kind in kinds):
      return jnp.dtype(jnp.float32)  # refused when they are read
    return max(
      (jnp.dtype(jnp.bfloat16) if kind.itemsize == 1 else kind for kind in kinds),
      key=lambda kind: kind.itemsize,
    )

  def params(self, dtype: np.dtype, mesh: Mesh) -> Any:
    """The parameters, straight into their shards."""
    if self.weights is not None:
      return t5_from_weights(self.weights, self.config, dtype=dtype, mesh=mesh)
    shapes = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype),
      abstract_t5_params(self.config),
    )
    placed = sharding.placed(shapes, t5_shardings(self.config, mesh))
    return checkpoint.read_arrays(self.path, placed)


def _config_fields(config: T5Config) -> dict[str, Any]:
  """config.json of an encoder for transformers."""
  return {
    "architectures": [_ARCHITECTURES[0]],
    **{field: value for field, value, _ in _REQUIRED if value is not None},
    **{theirs: getattr(config, ours) for ours, theirs in _SIZES.items()},
    "relative_attention_num_buckets": config.num_buckets,
    "relative_attention_max_distance": config.max_distance,
    "pad_token_id": PAD,
    "eos_token_id": END,
    "is_encoder_decoder": False,
    "use_cache": False,
    "tie_word_embeddings": False,
  }


def text_encoder_config(path: str | os.PathLike[str]) -> T5Config:
  """Sizes of the encoder at `path`, as `load_text_encoder` finds them there.

  Raises:
    FileNotFoundError: files are missing; says which. Of weights beside a config.json
      nothing is asked.
    ValueError: they are of another network.
  """
  path = part_folder(pathlib.Path(path), "text_encoder")
  if lone_file(path) is not None:
    return _Source.at(path).config
  return t5_config_from(read_json(path / "config.json"))


def load_tokenizer(folder: str | os.PathLike[str]) -> Any:
  """T5's tokenizer from a folder on the disk, tried on a sentence.

  transformers answers a folder without a vocabulary with a dummy of 104 tokens that
  turns every caption into blanks and unknowns, and says nothing.

  Raises:
    FileNotFoundError: there is no vocabulary in `folder`.
    ValueError: what is there cannot be read, is another model's or does not work.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise FileNotFoundError(f"There is no tokenizer at {folder}: no such folder.")
  if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
    raise FileNotFoundError(
      f"{folder} has no tokenizer: expected {' or '.join(_TOKENIZER_FILES)}, found "
      f"{listed(sorted(path.name for path in folder.iterdir()))}."
    )
  # Here, because it takes a second and imports torch where that is installed.
  from transformers import AutoTokenizer

  try:
    if (folder / spiece.TOKENIZER).is_file():
      tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    else:
      tokenizer = spiece.load_fast_tokenizer(folder)
  except Exception as error:
    # tokenizers raises nothing but this very type, transformers these.
    raised = (ValueError, OSError, LookupError, TypeError, AttributeError)
    is_theirs = type(error) is Exception or isinstance(error, raised)
    if not is_theirs or not errors.of_content(error):
      raise
    raise ValueError(
      f"Could not read the tokenizer of {folder}: {errors.first_line(error)}"
    ) from error
  _check_tokenizer(tokenizer, folder)
  return tokenizer


def _check_tokenizer(tokenizer: Any, folder: pathlib.Path) -> None:
  if not tokenizer.is_fast:
    raise ValueError(
      f"The tokenizer of {folder} is a {type(tokenizer).__name__}, which does not tell "
      "where in a text a token stands: T5's SentencePiece vocabulary is needed."
    )
  special = (tokenizer.pad_token_id, tokenizer.eos_token_id)
  if special != (PAD, END):
    raise ValueError(
      f"The tokenizer of {folder} pads with {special[0]} and ends with {special[1]}; "
      f"T5's pads with {PAD} and ends with {END}. It is another model's, or lacks its "
      "tokenizer_config.json."
    )
  *ids, last = tokenizer(_SENTENCE)["input_ids"]
  # Words of their own, not one mark repeated; and nothing that it does not know.
  if tokenizer.unk_token_id in ids or len(set(ids)) < len(_SENTENCE.split()):
    raise ValueError(
      f"The tokenizer of {folder} ({len(tokenizer)} tokens) turns {_SENTENCE!r} into "
      f"{[*ids, last][:12]}: its vocabulary is missing or damaged."
    )
  if last != END:
    raise ValueError(
      f"The tokenizer of {folder} ends a text with {last}, not with </s> ({END}), as "
      "every caption of PixArt's does."
    )


def _check_vocabulary(
  tokenizer: Any, folder: str | os.PathLike[str], source: _Source
) -> None:
  largest, rows = max(tokenizer.get_vocab().values()), source.config.vocabulary
  if largest >= rows:
    raise ValueError(
      f"the tokenizer of {folder} has ids up to {largest}, and T5 only {rows} "
      "embeddings: they are of different models."
    )
  # mT5 is built as T5 is and has seven times its vocabulary.
  if source.form == "comfyui" and rows > largest + _SPARE_ROWS:
    raise ValueError(
      f"the tokenizer of {folder} has ids up to {largest}, and this T5 {rows} "
      "embeddings: they are of different models."
    )
