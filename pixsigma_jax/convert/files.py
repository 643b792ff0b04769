"""Weights on a disk: safetensors, in one file or in shards, and torch's pickles.

Reading is lazy, one tensor at a time, so that a model is never in memory twice. Writing
is whole or not at all: a temporary name, fsync, rename.
"""

import json
import os
import pathlib
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pixsigma_jax import disk

Weights: TypeAlias = Mapping[str, np.ndarray]

# What diffusers and transformers call the weights of a folder.
_FOLDER_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
_PICKLES = (".pth", ".pt", ".bin", ".ckpt")
_NOTE = "pixsigma_jax"
_STATE_KEYS = {"raw": "state_dict", "ema": "state_dict_ema"}


class _Safetensors(Mapping[str, np.ndarray]):
  """Tensors of one or several safetensors files, each read when it is asked for."""

  def __init__(self, files: Mapping[str, pathlib.Path]):
    self._files = files  # tensor name → its file
    self._open: tuple[pathlib.Path, Any] | None = None

  def __getitem__(self, name: str) -> np.ndarray:
    path = self._files[name]
    if self._open is None or self._open[0] != path:
      self._open = (path, _opened(path))  # the shard before is let go
    return self._open[1].get_tensor(name)

  def __iter__(self) -> Iterator[str]:
    return iter(self._files)

  def __len__(self) -> int:
    return len(self._files)


class _Tensors(Mapping[str, np.ndarray]):
  """A torch state dict, whose tensors become NumPy arrays when they are asked for."""

  def __init__(self, tensors: Mapping[str, Any]):
    self._tensors = tensors

  def __getitem__(self, name: str) -> np.ndarray:
    import torch

    tensor = self._tensors[name].detach().contiguous()
    if tensor.dtype == torch.bfloat16:  # NumPy has no bfloat16 of its own
      return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()

  def __iter__(self) -> Iterator[str]:
    return iter(self._tensors)

  def __len__(self) -> int:
    return len(self._tensors)


def open_weights(path: str | os.PathLike[str], which: str = "raw") -> Weights:
  """Names and tensors of a file or folder; a tensor is read when it is asked for.

  Args:
    path: a .safetensors file; a folder of diffusers or transformers, its weights in one
      file or in shards with an index; or a pickle of torch, of which nothing but
      tensors and plain containers is loaded, so that it cannot run code.
    which: "raw" or "ema": which state dict of a pickle that holds both.

  Raises:
    FileNotFoundError: there are no weights at `path`; says what is there.
    ValueError: the files are damaged, or hold something else than weights.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    return _open_folder(path)
  if not path.exists():
    raise FileNotFoundError(f"There are no weights at {path}: no such file.")
  if path.suffix == ".safetensors":
    return _Safetensors(dict.fromkeys(_opened(path).keys(), path))
  if path.suffix in _PICKLES:
    return _open_pickle(path, which)
  raise ValueError(
    f"{path} is not a file of weights: give .safetensors, {', '.join(_PICKLES)}, or a "
    "folder of diffusers or transformers."
  )


def _open_folder(folder: pathlib.Path) -> Weights:
  for name in _FOLDER_NAMES:
    index = folder / f"{name}.index.json"
    if index.exists():
      return _open_index(index)
    if (folder / name).exists():
      return open_weights(folder / name)
  found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
  raise FileNotFoundError(
    f"{folder} has no weights: expected {' or '.join(_FOLDER_NAMES)}, or its shards "
    f"with an index, and found {found}."
  )


def _open_index(index: pathlib.Path) -> Weights:
  """Shards, in the order of their files: reading all of them opens each once."""
  weight_map = read_json(index).get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    raise ValueError(f"{index} has no weight_map: it is not an index of shards.")
  files: dict[str, pathlib.Path] = {}
  for shard in sorted(set(weight_map.values())):
    path = index.parent / shard
    if not path.exists():
      raise FileNotFoundError(f"{index} names {shard}, which is missing beside it.")
    present = set(_opened(path).keys())
    names = [name for name, file in weight_map.items() if file == shard]
    missing = sorted(set(names) - present)
    if missing:
      raise ValueError(
        f"{path} lacks tensors that {index.name} promises: {missing[:4]}."
      )
    files |= dict.fromkeys(names, path)
  return _Safetensors(files)


def _opened(path: pathlib.Path) -> Any:
  try:
    return safe_open(path, framework="np")
  except (SafetensorError, OSError) as error:
    raise ValueError(
      f"Could not read {path}: {error}. The file is truncated or not safetensors: "
      "fetch it again."
    ) from error


def _load_pickle(path: pathlib.Path) -> dict[str, Any]:
  torch = _torch(path)
  if not path.exists():
    raise FileNotFoundError(f"There are no weights at {path}: no such file.")
  try:
    # Only files of torch 1.6 and later, which are zip archives, can be mapped.
    content = torch.load(
      path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
    )
  except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    raise ValueError(
      f"Could not read {path}: {reason[0]} The file is truncated, or holds more than "
      "tensors; such a pickle could run any code and is not loaded."
    ) from error
  if not isinstance(content, dict):
    raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict.")
  return content


def _open_pickle(path: pathlib.Path, which: str) -> Weights:
  torch, content = _torch(path), _load_pickle(path)
  present = [name for name in _STATE_KEYS.values() if name in content]
  if present:
    if _STATE_KEYS[which] not in present:
      raise ValueError(
        f"{path} has no {_STATE_KEYS[which]} ({which} weights), only "
        f"{', '.join(present)}."
      )
    content = content[_STATE_KEYS[which]]
  elif which == "ema":
    raise ValueError(f"{path} is a bare state dict: it has no EMA weights.")
  others = [name for name, x in content.items() if not isinstance(x, torch.Tensor)]
  if others or not content:
    raise ValueError(f"{path} is not a state dict of tensors: it holds {others[:4]}.")
  return _Tensors(content)


def _torch(path: pathlib.Path) -> Any:
  try:
    import torch
  except ImportError:
    raise ValueError(
      f"{path} is a pickle of torch, and torch is not installed: "
      'pip install "pixsigma-jax[convert]".'
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
  """What a safetensors file says of itself beside its tensors."""
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
  disk.write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))
