"""Low-rank adapters as PEFT and as diffusers keep them, in and out.

A folder of an adapter holds it in both formats:

  adapter_config.json, adapter_model.safetensors   what PEFT loads
  pytorch_lora_weights.safetensors                 what diffusers loads

Names are those of diffusers' modules, `transformer_blocks.0.attn1.to_q.lora_A.weight`,
after `base_model.model.` in the one and `transformer.` in the other. In diffusers' file
lora_B is scaled already: whoever reads it, with or without an idea of alpha, finds the
same model.
"""

import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from pixsigma_jax import disk, tree
from pixsigma_jax.convert import files
from pixsigma_jax.convert.layouts import DIFFUSERS, Array, TensorSlot, slots_of
from pixsigma_jax.convert.lora_settings import Settings
from pixsigma_jax.models.pixart import PixArtConfig, abstract_params
from pixsigma_jax.transforms.lora import DOWN, MAGNITUDE, UP, Lora, nested
from pixsigma_jax.wording import listed

_CONFIG = "adapter_config.json"
_PEFT = ("adapter_model.safetensors", "adapter_model.bin")
_DIFFUSERS = "pytorch_lora_weights.safetensors"
_PREFIXES = ("base_model.model.", "transformer.")
# Kohya's and OneTrainer's: lora_transformer_transformer_blocks_0_attn1_to_q.alpha.
_FLAT_PREFIXES = ("lora_transformer_", "lora_unet_")
# The entry of a file's header in which diffusers keeps PEFT's settings, as JSON.
_HEADER = "lora_adapter_metadata"
# What a module's tensors are called, and the leaves of ours that they become.
_PARTS = {
  ".lora_A.weight": DOWN,
  ".lora_B.weight": UP,
  ".lora_magnitude_vector": MAGNITUDE,
}
# What is more or other than down · up → a tensor of it, by the ends of names that
# LyCORIS (lycoris/modules), its readers and PEFT give them.
_OTHER_KINDS = {
  "a LoHa": r"\.hada_[wt][12]",
  "a LoKr": r"\.lokr_[wt][12]",
  "a LoCon in Tucker's form": r"\.lora_mid\.weight$",
  "a DoRA of LyCORIS": r"\.dora_scale$",
  "an OFT or BOFT": r"\.(oft_(blocks|diag|r)|boft_[rs])\b",
  "an (IA)³": r"\.(on_input|ia3_l)\b",
  "a GLoRA": r"\.[ab][12]\.weight$",
  "a change of whole matrices": r"\.(diff|diff_b|set_weight)$",
}
_ALPHA = "alpha"  # of a module by itself: Kohya's files have no settings
_READ = _PARTS | {".lora_down.weight": DOWN, ".lora_up.weight": UP, ".alpha": _ALPHA}


def write_lora(
  folder: pathlib.Path,
  config: PixArtConfig,
  adapter: Any,
  lora: Lora,
  note: Mapping[str, Any] | None = None,
) -> None:
  """Writes an adapter in both formats, all files or none; what is there stays.

  Args:
    folder: of the adapter.
    config: of the model that it changes.
    adapter: see `transforms.lora`.
    lora: how it was trained.
    note: JSON for `note_of_lora`.
  """
  if folder.exists():
    return
  tensors = _tensors(config, adapter)
  settings = {
    "peft_type": "LORA",
    "task_type": None,
    "base_model_name_or_path": None,
    "r": lora.rank,
    "lora_alpha": lora.alpha,
    "lora_dropout": 0.0,
    "target_modules": list(tensors),
    "use_dora": lora.dora,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "init_lora_weights": True,
    "inference_mode": True,
    "bias": "none",
    "fan_in_fan_out": False,
    "lora_bias": False,
    "modules_to_save": None,
    "layer_replication": None,
  }
  with disk.whole_folder(folder) as partial:
    files.write_json(partial / _CONFIG, settings)
    scaled = {**settings, "lora_alpha": lora.rank}
    packed = {f"{_PREFIXES[1]}{name}": value for name, value in scaled.items()}
    for file, prefix, scale, header in (
      (_PEFT[0], _PREFIXES[0], 1.0, {}),
      (_DIFFUSERS, _PREFIXES[1], lora.scale, {_HEADER: json.dumps(packed)}),
    ):
      weights = {
        f"{prefix}{module}{suffix}": parts[part] * (scale if part == UP else 1)
        for module, parts in tensors.items()
        for suffix, part in _PARTS.items()
        if part in parts
      }
      files.write_safetensors(
        partial / file,
        {k: np.ascontiguousarray(v) for k, v in weights.items()},
        note,
        header=header,
      )


def _tensors(config: PixArtConfig, adapter: Any) -> dict[str, dict[str, Array]]:
  """Module of diffusers → its tensors as torch lays them out, by our names."""
  leaves = {k: np.asarray(v, np.float32) for k, v in tree.named_leaves(adapter).items()}
  kernels = tree.named_leaves(abstract_params(config))
  tensors: dict[str, dict[str, Array]] = {}
  for their_name, slot in slots_of(config, DIFFUSERS).items():
    ours = slot.leaf.removesuffix("/kernel")
    if not slot.leaf.endswith("/kernel") or f"{ours}/{DOWN}" not in leaves:
      continue
    parts = {
      part: leaves[f"{ours}/{part}"][slot.index]
      for part in _PARTS.values()
      if f"{ours}/{part}" in leaves
    }
    # As the kernel lies: a convolution's rows are the numbers of its window.
    window = kernels[slot.leaf].shape[len(slot.index) : -1]
    rank = parts[DOWN].shape[-1]
    parts[DOWN] = slot.rearrangement.to_theirs(parts[DOWN].reshape(*window, rank))
    ones = (1,) * (len(window) - 1)
    parts[UP] = parts[UP].T.reshape(-1, rank, *ones)
    if MAGNITUDE in parts and ones:
      parts[MAGNITUDE] = parts[MAGNITUDE].reshape(1, -1, *ones)
    tensors[their_name.removesuffix(".weight")] = parts
  return tensors


def read_lora(path: str | pathlib.Path, config: PixArtConfig) -> Any:
  """An adapter for a model, its scale already in `up`.

  Ranks and scales may differ from module to module, and modules may be missing: what a
  stack has beyond them is zero.

  Args:
    path: a folder as PEFT or diffusers write it, or a file of diffusers' names or of
      Kohya's. Where neither adapter_config.json nor the file's header nor a tensor
      beside a module's says what alpha is, it is taken for the rank, with a warning.
    config: of the model that it is for.

  Raises:
    FileNotFoundError: there is no adapter.
    ValueError: it is of another model, or holds what is not a LoRA's; names the
      tensors or the settings.
  """
  path = pathlib.Path(path)
  weights, settings = _open(path)
  slots = slots_of(config, DIFFUSERS)
  modules, problems = _by_module(weights, slots)
  if settings is None and not all(_ALPHA in parts for parts in modules.values()):
    logging.warning(
      "%s says nothing of alpha, which is taken for the rank of each module, as "
      "diffusers does. If it was trained with another, merge it with "
      "--scale=ALPHA/RANK; or put PEFT's adapter_config.json beside its %s.",
      path,
      _PEFT[0],
    )
  kernels = tree.named_leaves(abstract_params(config))
  found: dict[str, list[tuple[tuple[int, ...], dict[str, Array]]]] = {}
  for module, parts in modules.items():
    slot = slots[f"{module}.weight"]
    matrix, reason = _moved(parts, slot, kernels[slot.leaf].shape, settings, module)
    if reason:
      problems.append(f"{module}: {reason}")
    else:
      found.setdefault(slot.leaf, []).append((slot.index, matrix))
  if problems or not found:
    shown = listed(problems, joint="; ") if problems else "it holds no tensors"
    raise ValueError(
      f"{path} is no LoRA for a PixArt of {config.depth} layers of width "
      f"{config.width}: {shown}."
    )
  leaves: dict[str, Array] = {}
  for leaf, filled in found.items():
    _, first = filled[0]
    stack = kernels[leaf].shape[: len(filled[0][0])]
    rank = max(parts[DOWN].shape[-1] for _, parts in filled)
    fan_in, features = len(first[DOWN]), first[UP].shape[-1]
    down = np.zeros((*stack, fan_in, rank), np.float32)
    up = np.zeros((*stack, rank, features), np.float32)
    magnitude = np.full((*stack, features), np.nan, np.float32)
    for index, parts in filled:
      r = parts[DOWN].shape[-1]
      down[(*index, slice(None), slice(r))] = parts[DOWN]
      up[(*index, slice(r))] = parts[UP]
      magnitude[index] = parts.get(MAGNITUDE, np.nan)
    name = leaf.removesuffix("/kernel")
    leaves |= {f"{name}/{DOWN}": down, f"{name}/{UP}": up}
    if not np.isnan(magnitude).all():
      leaves[f"{name}/{MAGNITUDE}"] = magnitude
  return nested(leaves)


def note_of_lora(path: str | pathlib.Path) -> Any:
  """JSON that `write_lora` left in an adapter's files, None in others'.

  Raises:
    FileNotFoundError: there is no adapter.
  """
  file = _file_at(pathlib.Path(path))
  return files.note_in(file) if file.suffix == ".safetensors" else None


def _file_at(path: pathlib.Path) -> pathlib.Path:
  """The file with an adapter's tensors: `path` or, in a folder, by its usual names."""
  if not path.exists():
    raise FileNotFoundError(f"There is no adapter at {path}: no such file or folder.")
  if not path.is_dir():
    return path
  names = (*_PEFT, _DIFFUSERS)
  file = next((path / name for name in names if (path / name).exists()), None)
  if file is None:
    found = listed(disk.whole_files(path))
    raise FileNotFoundError(
      f"{path} holds no adapter: expected one of {', '.join(names)}, found {found}."
    )
  return file


def _open(path: pathlib.Path) -> tuple[files.Weights, Settings | None]:
  """Opens an adapter: its tensors, and PEFT's settings if it has any."""
  file = _file_at(path)
  fields = _fields_of(file)
  weights = files.open_weights(file)
  _refuse_other_kinds(path, weights)
  if fields is None:
    return weights, None
  try:
    settings = Settings(fields)
  except ValueError as error:
    raise ValueError(f"{path} cannot be merged here: {error}.") from None
  return weights, settings


def _refuse_other_kinds(path: pathlib.Path, weights: files.Weights) -> None:
  """Refuses what LyCORIS and its like keep beside or in place of down and up."""
  for kind, ending in _OTHER_KINDS.items():
    found = next(
      (name for name in weights if re.search(ending, name, re.IGNORECASE)), None
    )
    if found is not None:
      raise ValueError(
        f"{path} is {kind} ({found}), not a LoRA, and is not supported: merge it into "
        "its model with the program that trained it, and convert the model."
      )


def _fields_of(file: pathlib.Path) -> dict[str, Any] | None:
  """PEFT's settings from beside a file or from its header, None if neither has them."""
  beside = file.with_name(_CONFIG)
  if file.name in _PEFT and beside.exists():
    fields, whose = files.read_json(beside), str(beside)
  elif file.suffix == ".safetensors" and (text := files.header_of(file).get(_HEADER)):
    whose = f"{_HEADER} in {file}"
    try:
      fields = json.loads(text)
    except ValueError as error:
      raise ValueError(f"{whose} is not JSON: {error}.") from None
  else:
    return None
  if not isinstance(fields, dict):
    raise ValueError(f"{whose} holds a {type(fields).__name__}, not PEFT's settings.")
  # A pipeline's file has the settings of all its networks, each after its prefix.
  if packed := [name for name in fields if name.startswith(_PREFIXES[1])]:
    return {name.removeprefix(_PREFIXES[1]): fields[name] for name in packed}
  return None if any("." in name for name in fields) else fields


def _by_module(
  weights: files.Weights, slots: Mapping[str, TensorSlot]
) -> tuple[dict[str, dict[str, Array]], list[str]]:
  """Groups tensors by module, and lists problems with their names."""
  modules: dict[str, dict[str, Array]] = {}
  problems: list[str] = []
  known = [name.removesuffix(".weight") for name in slots]
  flat = {f"{p}{m.replace('.', '_')}": m for p in _FLAT_PREFIXES for m in known}
  for name in weights:
    bare = next((name.removeprefix(p) for p in _PREFIXES if name.startswith(p)), name)
    bare = bare.removesuffix(".weight") if ".lora_magnitude_vector" in bare else bare
    suffix = next((suffix for suffix in _READ if bare.endswith(suffix)), None)
    module = bare.removesuffix(suffix or "")
    module = flat.get(module, module)
    slot = slots.get(f"{module}.weight")
    if suffix is None or slot is None or not slot.leaf.endswith("/kernel"):
      problems.append(f"{name} is not used")
    else:
      tensor = np.asarray(weights[name], np.float32)
      modules.setdefault(module, {})[_READ[suffix]] = tensor
  return modules, problems


def _moved(
  parts: Mapping[str, Array],
  slot: TensorSlot,
  kernel: tuple[int, ...],
  settings: Settings | None,
  module: str,
) -> tuple[dict[str, Array], str]:
  """A module's matrices in our layout, or the reason why they do not fit."""
  if missing := [
    s for s, part in _PARTS.items() if part in (DOWN, UP) and part not in parts
  ]:
    return {}, f"{missing[0].removeprefix('.')} is missing"
  matrix = kernel[len(slot.index) :]
  shape = (math.prod(matrix[:-1]), matrix[-1])
  down, up = parts[DOWN], parts[UP]
  rank = len(down)
  wanted = {
    DOWN: slot.rearrangement.to_theirs(
      np.broadcast_to(np.float32(0), (*matrix[:-1], rank))
    ).shape,
    UP: (shape[1], rank, *(1,) * (len(matrix) - 2)),
  }
  for part, want in wanted.items():
    if parts[part].shape != want:
      have = list(parts[part].shape)
      return {}, f"{part} has shape {have}, not {list(want)}"
  scale = 1.0
  if settings is not None:
    if problem := settings.problem(module, rank, dora=MAGNITUDE in parts):
      return {}, problem
    scale = settings.scale(module, rank)
  if _ALPHA in parts:
    alpha = parts[_ALPHA]
    if alpha.size != 1 or not 0 < alpha.item() < math.inf:
      return {}, f"its alpha is {listed(alpha.reshape(-1).tolist())}"
    if settings is not None and not math.isclose(scale, alpha.item() / rank):
      return {}, f"its alpha is {alpha.item():g}, and the settings say {scale * rank:g}"
    scale = alpha.item() / rank
  moved = {
    DOWN: slot.rearrangement.to_ours(down).reshape(-1, rank),
    UP: up.reshape(-1, rank).T * np.float32(scale),
  }
  if MAGNITUDE in parts:
    if parts[MAGNITUDE].size != shape[1]:
      return {}, f"the magnitude has {parts[MAGNITUDE].size} numbers, not {shape[1]}"
    moved[MAGNITUDE] = parts[MAGNITUDE].reshape(-1)
  return moved, ""
