"""Weights on a disk: safetensors, in one file or in shards, and torch's pickles.

Reading is lazy, one tensor at a time, so that a model is never in memory twice. Writing
is whole or not at all: a temporary name, fsync, rename.
"""

import collections
import dataclasses
import json
import os
import pathlib
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from absl import logging
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pixsigma_jax import disk, errors
from pixsigma_jax.wording import install, listed

Weights: TypeAlias = Mapping[str, np.ndarray]

# What diffusers and transformers call the weights of a folder, first what is taken
# first, and their indexes: NAME.fp16.safetensors, NAME.safetensors.index.fp16.json.
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_ENDINGS = ("safetensors", "bin")
_IN_FOLDER = re.compile(
  rf"(?P<stem>{'|'.join(_STEMS)})(\.(?P<variant>[A-Za-z]\w*))?"
  rf"\.(?P<ending>{'|'.join(_ENDINGS)})"
  r"(?P<index>\.index(\.(?P<of_index>[A-Za-z]\w*))?\.json)?"
)
# What torch raises for a pickle whose bytes are damaged.
_DAMAGED_PICKLES = (
  *(pickle.UnpicklingError, zipfile.BadZipFile, struct.error, RuntimeError, EOFError),
  *(ValueError, LookupError, TypeError, AttributeError, AssertionError, OSError),
)
PICKLES = (".pth", ".pt", ".bin", ".ckpt")
_NOTE = "pixsigma_jax"
# A pickle's entries for a state dict: the official trainer's first, then those of DiT,
# of DeepSpeed and of others.
_STATE_KEYS = {
  "raw": ("state_dict", "model", "module"),
  "ema": ("state_dict_ema", "ema"),
}
# Whatever holds a network while it is trained puts its own name before all of theirs.
_WRAPPERS = re.compile(
  r"((module|model|base_model|transformer|_orig_mod|_fsdp_wrapped_module)\.)*"
)
# torch's AveragedModel counts beside its `module.`.
_COUNTERS = ("n_averaged",)

# Types of safetensors: what NumPy has or ml_dtypes adds, and what is read by hand.
_NUMPY = {"BOOL", "BF16", "F16", "F32", "F64", "C64"} | {
  f"{sign}{bits}" for sign in "IU" for bits in (8, 16, 32, 64)
}
_FLOAT8 = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
# As ComfyUI and others store factors beside quantised tensors.
_SCALES = re.compile(
  r"(^|\.)(scaled_fp8|scale_weight|scale_input|(weight|input)_scale(_2|_inv)?"
  r"|comfy_quant|SCB|quant_map|absmax|qweight|qzeros)$"
)
_TAKE_PLAIN = "take the file in float32, bfloat16 or float16"


@dataclasses.dataclass(frozen=True)
class Network:
  """Rules for finding one network in a file that may hold others.

  Attributes:
    landmarks: names of tensors, of which every such network has one.
    prefixes: what stands before its names in a file of several networks.
  """

  landmarks: tuple[str, ...]
  prefixes: tuple[str, ...]


class LazyWeights(Mapping[str, np.ndarray]):
  """Tensors by name, each read when it is asked for.

  A subclass has `_names`, whose keys are the names, and reads in `__getitem__`.
  """

  _names: Mapping[str, Any]

  def __contains__(self, name: object) -> bool:
    return name in self._names

  def __iter__(self) -> Iterator[str]:
    return iter(self._names)

  def __len__(self) -> int:
    return len(self._names)


class _Safetensors(LazyWeights):
  """Tensors of a safetensors file."""

  def __init__(self, path: pathlib.Path):
    self._path, self._file = path, _opened(path)
    self._names = dict.fromkeys(self._file.keys())

  def __getitem__(self, name: str) -> np.ndarray:
    if name not in self._names:
      raise KeyError(name)
    kind = self._file.get_slice(name).get_dtype()
    if kind in _FLOAT8:
      return _read_float8(self._path, name)
    if kind not in _NUMPY:
      raise ValueError(
        f"{self._path}: {name} is of the type {kind}, which cannot be read: "
        f"{_TAKE_PLAIN}."
      )
    return self._file.get_tensor(name)


class _Tensors(LazyWeights):
  """A torch state dict, whose tensors become NumPy arrays when they are asked for."""

  def __init__(self, tensors: Mapping[str, Any]):
    self._names = tensors

  def __getitem__(self, name: str) -> np.ndarray:
    import torch

    tensor = self._names[name].detach()
    if tensor.is_meta:
      raise ValueError(
        f"{name} has a shape and no numbers: it was saved before its model was loaded."
      )
    # Whatever a state dict may hold a tensor as: sparse, conjugated, negated, a view.
    tensor = tensor.to_dense().resolve_conj().resolve_neg().contiguous()
    # NumPy has none of these of its own.
    for kind, bits, of_ours in (
      (torch.bfloat16, torch.int16, ml_dtypes.bfloat16),
      (torch.float8_e4m3fn, torch.uint8, ml_dtypes.float8_e4m3fn),
      (torch.float8_e5m2, torch.uint8, ml_dtypes.float8_e5m2),
    ):
      if tensor.dtype == kind:
        return tensor.view(bits).numpy().view(of_ours)
    try:
      return tensor.numpy()
    except TypeError as error:
      raise ValueError(
        f"{name} is of the type {tensor.dtype}, which cannot be read: {_TAKE_PLAIN}."
      ) from error


class _Shards(LazyWeights):
  """Tensors of several files, of which one is open at a time."""

  def __init__(self, files: Mapping[str, pathlib.Path]):
    self._names = files  # tensor → its file
    self._open: tuple[pathlib.Path, Weights] | None = None

  def __getitem__(self, name: str) -> np.ndarray:
    path = self._names[name]
    if self._open is None or self._open[0] != path:
      self._open = (path, _open_file(path, "raw"))  # the shard before is let go
    return self._open[1][name]


class Renamed(LazyWeights):
  """Some tensors under other names."""

  def __init__(self, weights: Weights, names: Mapping[str, str]):
    self._weights, self._names = weights, names  # here → there

  def __getitem__(self, name: str) -> np.ndarray:
    return self._weights[self._names[name]]


def open_weights(
  path: str | os.PathLike[str], which: str = "raw", *, variant: str | None = None
) -> Weights:
  """Names and tensors of a file or folder; a tensor is read when it is asked for.

  Of a folder whose weights lie there several times, those without a variant in their
  names are taken before a variant's, and safetensors before pickles.

  Args:
    path: a .safetensors file; a pickle of torch, of which nothing but tensors and plain
      containers is loaded, so that it cannot run code; or a folder of diffusers or
      transformers with either, in one file or in shards with an index.
    which: "raw" or "ema": which state dict of a pickle that holds both.
    variant: "fp16" for a folder's `….fp16.safetensors`.

  Raises:
    FileNotFoundError: there are no weights at `path`; says what is there.
    ValueError: the files are damaged or hold something else than weights, or a folder
      has several variants, and none was asked for.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    weights = _open_folder(path, which, variant)
  elif not path.exists():
    raise FileNotFoundError(f"There are no weights at {path}: no such file.")
  elif variant is not None:
    raise ValueError(f"{path} is one file: leave out --variant={variant}.")
  else:
    weights = _open_file(path, which)
  return weights


def paths_of(
  path: str | os.PathLike[str], variant: str | None = None
) -> list[pathlib.Path]:
  """Files that `open_weights` reads: one, or an index and its shards.

  Raises:
    FileNotFoundError, ValueError: see `open_weights`.
  """
  path = pathlib.Path(path)
  if not path.is_dir():
    return [path]
  chosen = _chosen(path, variant)
  if chosen.suffix != ".json":
    return [chosen]
  shards = sorted(set(_weight_map(chosen).values()))
  return [chosen, *(chosen.parent / shard for shard in shards)]


def part_of(weights: Weights, network: Network, source: object) -> Weights:
  """The tensors of one network by their own names, out of a file with more or wrapped.

  Prefixes of whatever held the network in training (`module.`, `model.`,
  `base_model.model.`) are taken off; what lies outside of them stays, to be refused as
  unused. In a file of several networks those outside are left out, which is logged.
  Weights in which the network is not found are returned as they are.

  Args:
    weights: of `open_weights`.
    network: the one that is meant.
    source: for messages.

  Raises:
    ValueError: the network is there several times, or quantised with factors that its
      tensors are to be multiplied with.
  """
  found = {
    name.removesuffix(landmark): None
    for landmark in network.landmarks
    for name in weights
    if name.endswith(landmark) and _is_prefix(name.removesuffix(landmark), network)
  }
  if len(found) > 1:
    raise ValueError(
      f"{source} holds the network {len(found)} times, under "
      f"{listed([repr(prefix) for prefix in found])}, and which is meant cannot be "
      "told: save one of them alone."
    )
  prefix = next(iter(found), "")
  scaled = [n for n in weights if n.startswith(prefix) and _SCALES.search(n)]
  if scaled:
    raise ValueError(
      f"{source} is quantised: beside its tensors it has what they must be multiplied "
      f"with ({listed(scaled, 2)}), which is not supported: {_TAKE_PLAIN}."
    )
  if not prefix:
    return weights
  names = {n.removeprefix(prefix): n for n in weights if n.startswith(prefix)}
  others = [n for n in weights if not n.startswith(prefix)]
  if _WRAPPERS.fullmatch(prefix):
    left_out = [name for name in others if name in _COUNTERS]
    names |= {name: name for name in others if name not in _COUNTERS}
  else:
    left_out = others
  counts = collections.Counter(name.split(".")[0] for name in left_out)
  logging.info(
    "Of %s what is under %r is taken; left out: %s.",
    source,
    prefix,
    listed([f"{count} of {name}" for name, count in counts.items()]),
  )
  return Renamed(weights, names)


def check_names(
  weights: Weights,
  wanted: Iterable[str],
  what: str,
  is_spare: Callable[[str], bool] = lambda name: False,
) -> None:
  """Refuses weights that lack a tensor, or hold one that nobody reads.

  Args:
    wanted: names of the tensors that are read.
    what: the network that they make up, "a CLIP of config.json's sizes".
    is_spare: whether a tensor of another name may be left unread.

  Raises:
    ValueError: names what is missing and what is left over.
  """
  names = dict.fromkeys(wanted)
  problems = [f"{name} is missing" for name in names if name not in weights]
  problems += [
    f"{name} is not used"
    for name in weights
    if name not in names and not is_spare(name)
  ]
  if problems:
    raise ValueError(
      f"These are not the weights of {what}: {listed(problems, joint='; ')}."
    )


def hub_folder(
  source: str | os.PathLike[str], patterns: Sequence[str], advice: str
) -> pathlib.Path:
  """A folder on the disk, or the hub's copy in its cache, fetched if it is not there.

  Args:
    source: a folder, or an id of the hub.
    patterns: which files are fetched.
    advice: what to do, at the end of the error.

  Raises:
    FileNotFoundError: it is neither a folder nor can it be fetched from the hub.
  """
  folder = pathlib.Path(source)
  if folder.is_dir():
    return folder
  import huggingface_hub
  from huggingface_hub.errors import HfHubHTTPError, HFValidationError

  hub_id = os.fspath(source)
  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(hub_id, allow_patterns=list(patterns))
    )
  except (HFValidationError, HfHubHTTPError, OSError) as error:
    if isinstance(error, OSError) and error.errno is not None:  # a full disk, say
      raise
    # The first sentence: advice that may follow is for callers of huggingface_hub.
    reason = re.split(r"(?<=\.)\s", errors.first_line(error))[0]
    raise FileNotFoundError(
      f"{hub_id} is neither a folder nor could it be fetched from the hub: "
      f"{reason.rstrip('.')}. {advice}"
    ) from error


def part_folder(path: pathlib.Path, name: str) -> pathlib.Path:
  """The folder of a part, where `path` may be that of the whole pipeline of diffusers.

  Raises:
    FileNotFoundError: it is a pipeline without such a part; says what it has.
  """
  if not (path / "model_index.json").is_file():
    return path
  if not (path / name).is_dir():
    parts = sorted(part.name for part in path.iterdir() if part.is_dir())
    raise FileNotFoundError(
      f"{path} is a pipeline without {name}/: it has {listed(parts)}."
    )
  return path / name


def lone_file(path: pathlib.Path) -> pathlib.Path | None:
  """A file of weights without config.json: `path`, or the only one in that folder.

  By a name of its own: a file that is named as diffusers or transformers name it should
  have a config.json beside it.
  """
  if path.is_file():
    return path
  if not path.is_dir() or (path / "config.json").exists() or weights_in(path):
    return None
  found = [p for p in path.iterdir() if p.suffix in (".safetensors", *PICKLES)]
  return found[0] if len(found) == 1 else None


def _is_prefix(prefix: str, network: Network) -> bool:
  inner = prefix[len(_WRAPPERS.match(prefix)[0]) :]  # pyright: ignore[reportOptionalSubscript]
  return not inner or prefix in network.prefixes or inner in network.prefixes


def _open_file(path: pathlib.Path, which: str) -> Weights:
  if path.suffix == ".safetensors":
    return _Safetensors(path)
  if path.suffix in PICKLES:
    return _open_pickle(path, which)
  raise ValueError(
    f"{path} is not a file of weights: give .safetensors, {', '.join(PICKLES)}, or a "
    "folder of diffusers or transformers."
  )


def _open_folder(folder: pathlib.Path, which: str, variant: str | None) -> Weights:
  path = _chosen(folder, variant)
  if path.suffix == ".json":
    return _open_index(path)
  return _open_file(path, which)


def _chosen(folder: pathlib.Path, variant: str | None) -> pathlib.Path:
  """The file or index of a folder that is read."""
  found = weights_in(folder)
  if not found:
    raise FileNotFoundError(
      f"{folder} has no weights: expected {_STEMS[0]}.safetensors or "
      f"{_STEMS[1]}.safetensors (or .bin), or its shards with an index, and found "
      f"{listed(sorted(p.name for p in folder.iterdir()))}."
    )
  variants = sorted(found)
  if variant is None and "" not in found and len(found) > 1:
    raise ValueError(
      f"{folder} has its weights as {', '.join(variants)}, and none that is plainly "
      f"{_STEMS[0]} or {_STEMS[1]}: say with --variant of convert which to take, or "
      "leave one of them there."
    )
  chosen = variant or ("" if "" in found else variants[0])
  if chosen not in found:
    raise FileNotFoundError(
      f"{folder} has no weights of the variant {variant!r}, only "
      f"{', '.join(name or 'those without one' for name in variants)}."
    )
  if chosen:
    logging.info("Reading %s.", found[chosen])
  return found[chosen]


def weights_in(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Variant ("" for none) → the file or index with a folder's weights in it."""
  found: dict[str, list[tuple[int, int, int, pathlib.Path]]] = {}
  for path in folder.iterdir():
    match = _IN_FOLDER.fullmatch(path.name)
    if match is None:
      continue
    variant = match["variant"] or match["of_index"] or ""
    found.setdefault(variant, []).append(
      (
        _ENDINGS.index(match["ending"]),
        _STEMS.index(match["stem"]),
        0 if match["index"] else 1,
        path,
      )
    )
  return {variant: min(paths)[-1] for variant, paths in found.items()}


def _open_index(index: pathlib.Path) -> Weights:
  """Shards, in the order of their files: reading all of them opens each once."""
  weight_map = _weight_map(index)
  files: dict[str, pathlib.Path] = {}
  for shard in sorted(set(weight_map.values())):
    path = index.parent / shard
    if not path.exists():
      raise FileNotFoundError(f"{index} names {shard}, which is missing beside it.")
    present = _open_file(path, "raw")
    names = [name for name, file in weight_map.items() if file == shard]
    missing = sorted(name for name in names if name not in present)
    if missing:
      raise ValueError(
        f"{path} lacks tensors that {index.name} promises: {listed(missing, 4)}."
      )
    files |= dict.fromkeys(names, path)
  return _Shards(files)


def _weight_map(index: pathlib.Path) -> dict[str, str]:
  """Tensor → name of its shard."""
  content = read_json(index)
  weight_map = content.get("weight_map") if isinstance(content, dict) else None
  if not isinstance(weight_map, dict) or not weight_map:
    raise ValueError(f"{index} has no weight_map: it is not an index of shards.")
  return weight_map


def _opened(path: pathlib.Path) -> Any:
  try:
    return safe_open(path, framework="np")
  except (SafetensorError, OSError) as error:
    if not errors.of_content(error):
      raise
    raise ValueError(
      f"Could not read {path}: {error}. The file is truncated or not safetensors: "
      "fetch it again."
    ) from error


def _read_float8(path: pathlib.Path, name: str) -> np.ndarray:
  """A tensor by the format itself: the length of a JSON header, the header, bytes."""
  with path.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
    entry = json.loads(file.read(length))[name]
    start, stop = entry["data_offsets"]
    file.seek(8 + length + start)
    content = file.read(stop - start)
  return np.frombuffer(content, _FLOAT8[entry["dtype"]]).reshape(entry["shape"])


def _load_pickle(path: pathlib.Path) -> dict[str, Any]:
  torch = _torch(path)
  if not path.exists():
    raise FileNotFoundError(f"There are no weights at {path}: no such file.")
  try:
    # Only files of torch 1.6 and later, which are zip archives, can be mapped.
    content = torch.load(
      path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
    )
  except _DAMAGED_PICKLES as error:
    if not errors.of_content(error):
      raise
    # torch's own advice, to load it all the same, is none for a file from elsewhere.
    other = re.search(r"GLOBAL (\S+)", str(error))
    if other:
      raise ValueError(
        f"Could not read {path}: it holds more than tensors ({other[1]}), and such a "
        "pickle could run any code and is not loaded. If you trust it, load it in "
        "torch yourself and save its state dict alone with torch.save."
      ) from error
    said = errors.first_line(error)
    first = re.split(r"Weights only load failed|(?<=\.)\s", said)[0]
    raise ValueError(
      f"Could not read {path}: {first.rstrip('.') or 'it has another format'}. The "
      "file is truncated or none of torch's: fetch it again."
    ) from error
  if not isinstance(content, dict):
    raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict.")
  return content


def _open_pickle(path: pathlib.Path, which: str) -> Weights:
  torch, content = _torch(path), _load_pickle(path)
  present = {
    state: key
    for state, keys in _STATE_KEYS.items()
    for key in reversed(keys)
    if isinstance(content.get(key), dict)
  }
  if present:
    if which not in present:
      flag = "leave out --ema" if which == "ema" else "give --ema"
      raise ValueError(
        f"{path} has no {_STATE_KEYS[which][0]} ({which} weights), only "
        f"{', '.join(present.values())}: {flag}."
      )
    content = content[present[which]]
  elif which == "ema":
    raise ValueError(
      f"{path} is a bare state dict: it has no EMA weights. Leave out --ema."
    )
  others = [name for name, x in content.items() if not isinstance(x, torch.Tensor)]
  if others or not content:
    raise ValueError(
      f"{path} is not a state dict of tensors: it holds {listed(others, 4)}."
    )
  return _Tensors(content)


def _torch(path: pathlib.Path) -> Any:
  try:
    import torch
  except ImportError as error:
    if not errors.of_absence(error, "torch"):
      raise
    raise ValueError(
      f"{path} is a pickle of torch, and torch is not installed: {install('convert')}."
    ) from None
  return torch


def read_json(path: pathlib.Path) -> Any:
  """A JSON file.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is not JSON.
  """
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise FileNotFoundError(f"There is no {path.name} in {path.parent}.") from None
  except ValueError as error:
    raise ValueError(f"{path} is not JSON: {error}.") from error


def write_safetensors(
  path: pathlib.Path,
  weights: Weights,
  note: Any = None,
  *,
  header: Mapping[str, str] | None = None,
) -> None:
  """Writes one safetensors file, marked as torch's layout, as diffusers wants it.

  Args:
    note: JSON for `note_in`.
    header: what the file says of itself beside its tensors, for `header_of`.
  """
  metadata = {"format": "pt", **(header or {})}
  if note is not None:
    metadata[_NOTE] = json.dumps(note)
  disk.write_whole(
    path, lambda partial: save_file(dict(weights), partial, metadata=metadata)
  )


def header_of(path: pathlib.Path) -> dict[str, str]:
  """Metadata in a safetensors file's header."""
  return _opened(path).metadata() or {}


def note_in(path: pathlib.Path) -> Any:
  """The JSON that `write_…` left beside the weights, None in others' files."""
  if path.suffix == ".safetensors":
    note = header_of(path).get(_NOTE)
  else:
    note = _load_pickle(path).get(_NOTE)
  return None if note is None else json.loads(note)


def write_pickle(path: pathlib.Path, weights: Weights, note: Any) -> None:
  """Writes `{"state_dict": weights}` as the official repository's .pth files are.

  Args:
    note: JSON for `note_in`.
  """
  torch = _torch(path)

  def tensor(array: np.ndarray) -> Any:
    array = np.require(array, requirements=["C", "W"])  # what torch can share
    if array.dtype == ml_dtypes.bfloat16:
      return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)

  tensors = {name: tensor(array) for name, array in weights.items()}
  # As text: what is loaded with weights_only may hold little else than tensors.
  content = {"state_dict": tensors, _NOTE: json.dumps(note)}
  disk.write_whole(path, lambda partial: torch.save(content, partial))


def write_json(path: pathlib.Path, content: Any) -> None:
  """Writes JSON."""
  text = json.dumps(content, indent=2) + "\n"
  disk.write_text(path, text)
