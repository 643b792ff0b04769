"""Low-rank adapters as PEFT and as diffusers keep them, in and out.

A folder of an adapter holds it in both formats:

  adapter_config.json, adapter_model.safetensors   what PEFT loads
  pytorch_lora_weights.safetensors                 what diffusers loads

Names are those of diffusers' modules, `transformer_blocks.0.attn1.to_q.lora_A.weight`,
after `base_model.model.` in the one and `transformer.` in the other. In diffusers' file
lora_B is scaled already: whoever reads it, with or without an idea of alpha, finds the
same model. Kohya's trainer, OneTrainer and ComfyUI keep one file of flattened names,
with alpha beside each module: `lora_transformer_transformer_blocks_0_attn1_to_q.alpha`.
"""

import collections
import json
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from absl import logging

from pixsigma_jax import disk, tree
from pixsigma_jax.convert import files
from pixsigma_jax.convert.layouts import DIFFUSERS, Array, TensorSlot, slots_of
from pixsigma_jax.convert.lora_settings import Settings
from pixsigma_jax.models.pixart import PixArtConfig, abstract_params
from pixsigma_jax.transforms.lora import DOWN, MAGNITUDE, UP, Lora, nested
from pixsigma_jax.wording import listed

FORMATS = ("peft", "diffusers", "kohya")

# Module of diffusers → its tensors as torch lays them out, by our names.
Modules: TypeAlias = Mapping[str, Mapping[str, Array]]

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
_LAYER = re.compile(r"transformer_blocks[._](\d+)[._]")
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
  alphas = dict.fromkeys(tensors, lora.alpha)
  with disk.whole_folder(folder) as partial:
    _write_peft(partial, tensors, alphas, note)
    _write_diffusers(partial / _DIFFUSERS, tensors, alphas, note)


def convert_lora(
  source: pathlib.Path, target: pathlib.Path, *, from_format: str, to_format: str
) -> None:
  """Writes a LoRA under the names of another program; numbers stay to the bit.

  But for `diffusers`, whose `up` has the scale in it, as in `write_lora`.

  Args:
    source: a file or folder as in `read_lora`.
    target: a new folder for `peft`, a new .safetensors else.

  Raises:
    FileNotFoundError: there is no adapter.
    FileExistsError: there is something at `target` already.
    ValueError: it is no LoRA for PixArt or of another format, or the format of `target`
      cannot hold it.
  """
  if to_format != "peft" and target.suffix != ".safetensors":
    raise ValueError(
      f"{target} must end in .safetensors: {to_format} is one such file."
    )
  if target.exists():
    raise FileExistsError(f"{target} exists already and is left as it is.")
  weights, settings = _open(source)
  found = _format_of(weights)
  if found != from_format:
    raise ValueError(
      f"{source} has the names of {found}, not of {from_format}: give --from={found}."
    )
  depth = 1 + max((int(n) for name in weights for n in _LAYER.findall(name)), default=0)
  modules, problems = _by_module(weights, _modules_of(depth))
  alphas = {}
  for module, parts in modules.items():
    scale, problem = _scale(module, parts, settings)
    if problem:
      problems.append(f"{module}: {problem}")
    else:
      alphas[module] = scale * len(parts[DOWN])
  if problems or not modules:
    shown = listed(problems, joint="; ") if problems else "it holds no tensors"
    raise ValueError(f"{source} is no LoRA for a PixArt: {shown}.")
  _warn_of_alpha(source, modules, settings)
  match to_format:
    case "peft":
      with disk.whole_folder(target) as partial:
        _write_peft(partial, modules, alphas, None)
    case "diffusers":
      _write_diffusers(target, modules, alphas, None)
    case _:
      _write_kohya(target, modules, alphas)


def _write_peft(
  folder: pathlib.Path, modules: Modules, alphas: Mapping[str, float | int], note: Any
) -> None:
  ranks = {module: len(parts[DOWN]) for module, parts in modules.items()}
  files.write_json(folder / _CONFIG, _fields(modules, ranks, alphas))
  tensors = _renamed(modules, _PREFIXES[0], dict.fromkeys(modules, 1.0))
  files.write_safetensors(folder / _PEFT[0], tensors, note)


def _write_diffusers(
  file: pathlib.Path, modules: Modules, alphas: Mapping[str, float | int], note: Any
) -> None:
  ranks = {module: len(parts[DOWN]) for module, parts in modules.items()}
  fields = _fields(modules, ranks, ranks)  # as the scale is in the tensors
  header = {_HEADER: json.dumps({f"{_PREFIXES[1]}{k}": v for k, v in fields.items()})}
  scales = {module: alphas[module] / ranks[module] for module in modules}
  tensors = _renamed(modules, _PREFIXES[1], scales)
  files.write_safetensors(file, tensors, note, header=header)


def _write_kohya(
  file: pathlib.Path, modules: Modules, alphas: Mapping[str, float | int]
) -> None:
  dora = [module for module, parts in modules.items() if MAGNITUDE in parts]
  if dora:
    raise ValueError(
      f"{dora[0]} has a DoRA's magnitude, which programs with Kohya's names read in "
      "ways of their own: convert it to peft or diffusers."
    )
  tensors: dict[str, Array] = {}
  for module, parts in modules.items():
    name = f"{_FLAT_PREFIXES[0]}{module.replace('.', '_')}"
    tensors |= {
      f"{name}.lora_down.weight": np.ascontiguousarray(parts[DOWN]),
      f"{name}.lora_up.weight": np.ascontiguousarray(parts[UP]),
      f"{name}.alpha": np.asarray(alphas[module], np.float32),
    }
  files.write_safetensors(file, tensors)


def _renamed(
  modules: Modules, prefix: str, scales: Mapping[str, float | int]
) -> dict[str, Array]:
  """Tensors by PEFT's names after a prefix, `up` scaled."""
  return {
    f"{prefix}{module}{suffix}": np.ascontiguousarray(
      parts[part] * (scales[module] if part == UP else 1)
    )
    for module, parts in modules.items()
    for suffix, part in _PARTS.items()
    if part in parts
  }


def _fields(
  modules: Modules, ranks: Mapping[str, int], alphas: Mapping[str, float | int]
) -> dict[str, Any]:
  """PEFT's settings: the commonest rank and alpha, and patterns for other modules."""
  (rank, _), *_ = collections.Counter(ranks.values()).most_common(1)
  (alpha, _), *_ = collections.Counter(alphas.values()).most_common(1)
  return {
    "peft_type": "LORA",
    "task_type": None,
    "base_model_name_or_path": None,
    "r": rank,
    "lora_alpha": alpha,
    "lora_dropout": 0.0,
    "target_modules": list(modules),
    "use_dora": any(MAGNITUDE in parts for parts in modules.values()),
    "use_rslora": False,
    "rank_pattern": {m: r for m, r in ranks.items() if r != rank},
    "alpha_pattern": {m: a for m, a in alphas.items() if a != alpha},
    "init_lora_weights": True,
    "inference_mode": True,
    "bias": "none",
    "fan_in_fan_out": False,
    "lora_bias": False,
    "modules_to_save": None,
    "layer_replication": None,
  }


def _format_of(weights: files.Weights) -> str:
  """A key of `FORMATS` by the names of the first tensor."""
  name = next(iter(weights), "")
  if name.startswith(_FLAT_PREFIXES):
    return "kohya"
  return "peft" if name.startswith(_PREFIXES[0]) else "diffusers"


def _modules_of(depth: int) -> list[str]:
  """Names of all maps that an adapter may change, of a model of so many layers."""
  names = []
  for ours, rule in DIFFUSERS.items():
    if ours.endswith("/kernel"):
      layers = range(depth) if ours.startswith("blocks/") else range(1)
      names += [n.format(i=i) for i in layers for n in rule.names]
  return [name.removesuffix(".weight") for name in names]


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
  known = [n.removesuffix(".weight") for n, s in slots.items() if _is_kernel(s.leaf)]
  modules, problems = _by_module(weights, known)
  _warn_of_alpha(path, modules, settings)
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


def _is_kernel(leaf: str) -> bool:
  return leaf.endswith("/kernel")


def _warn_of_alpha(
  path: pathlib.Path, modules: Modules, settings: Settings | None
) -> None:
  if settings is None and not all(_ALPHA in parts for parts in modules.values()):
    logging.warning(
      "%s says nothing of alpha, which is taken for the rank of each module, as "
      "diffusers does. If it was trained with another, give it the scale ALPHA/RANK; "
      "or put PEFT's adapter_config.json beside its %s.",
      path,
      _PEFT[0],
    )


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
  weights: files.Weights, known: Sequence[str]
) -> tuple[dict[str, dict[str, Array]], list[str]]:
  """Groups tensors by module of `known`, and lists problems with their names."""
  modules: dict[str, dict[str, Array]] = {}
  problems: list[str] = []
  names = set(known)
  flat = {f"{p}{m.replace('.', '_')}": m for p in _FLAT_PREFIXES for m in known}
  for name in weights:
    bare = next((name.removeprefix(p) for p in _PREFIXES if name.startswith(p)), name)
    bare = bare.removesuffix(".weight") if ".lora_magnitude_vector" in bare else bare
    suffix = next((suffix for suffix in _READ if bare.endswith(suffix)), None)
    module = bare.removesuffix(suffix or "")
    module = flat.get(module, module)
    if suffix is None or module not in names:
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
  scale, problem = _scale(module, parts, settings)
  if problem:
    return {}, problem
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
  moved = {
    DOWN: slot.rearrangement.to_ours(down).reshape(-1, rank),
    UP: up.reshape(-1, rank).T * np.float32(scale),
  }
  if MAGNITUDE in parts:
    if parts[MAGNITUDE].size != shape[1]:
      return {}, f"the magnitude has {parts[MAGNITUDE].size} numbers, not {shape[1]}"
    moved[MAGNITUDE] = parts[MAGNITUDE].reshape(-1)
  return moved, ""


def _scale(
  module: str, parts: Mapping[str, Array], settings: Settings | None
) -> tuple[float, str]:
  """Factor of a module's down · up, or why its tensors are none of a LoRA's."""
  if missing := [
    s for s, part in _PARTS.items() if part in (DOWN, UP) and part not in parts
  ]:
    return 0.0, f"{missing[0].removeprefix('.')} is missing"
  rank, scale = len(parts[DOWN]), 1.0
  if parts[UP].shape[1:2] != (rank,):
    return 0.0, f"down has {rank} rows, and up the shape {list(parts[UP].shape)}"
  if settings is not None:
    if problem := settings.problem(module, rank, dora=MAGNITUDE in parts):
      return 0.0, problem
    scale = settings.scale(module, rank)
  if _ALPHA in parts:
    alpha = parts[_ALPHA]
    if alpha.size != 1 or not 0 < alpha.item() < math.inf:
      return 0.0, f"its alpha is {listed(alpha.reshape(-1).tolist())}"
    if settings is not None and not math.isclose(scale, alpha.item() / rank):
      says = f"the settings say {scale * rank:g}"
      return 0.0, f"its alpha is {alpha.item():g}, and {says}"
    scale = alpha.item() / rank
  return scale, ""
