"""PEFT's settings of a LoRA, read as PEFT reads them.

They say what a file's tensors mean: how strong the change is, which modules have one,
and whether it is a change of the model at hand. Fields that are not understood are
refused unless they are switched off, whichever version of PEFT wrote them.

Reference: `peft/tuners/lora/config.py`, `get_pattern_key` in `peft/utils/other.py` and
`check_target_module_exists` in `peft/tuners/tuners_utils.py`, 0.21.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

# What PEFT takes where its file leaves it out.
_DEFAULT_RANK = _DEFAULT_ALPHA = 8

# Fields that change nothing of what trained tensors mean. PEFT itself ignores the
# config of an initialisation that `init_lora_weights` does not name.
_OF_NO_MATTER = {
  *("peft_version", "task_type", "auto_mapping", "inference_mode", "runtime_config"),
  *("base_model_name_or_path", "revision", "lora_dropout", "ensure_weight_tying"),
  *("megatron_core", "qalora_group_size"),
  *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
}
_UNDERSTOOD = {
  *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"),
  *("use_dora", "target_modules", "exclude_modules", "layers_to_transform"),
  *("layers_pattern", "init_lora_weights"),
}
# Of the understood and the others, what is off though it is not empty.
_OFF = {"bias": "none"}
# Initialisations that leave the base as it is: the others keep a part of it in the
# adapter, so that the adapter fits no other base.
_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclasses.dataclass(frozen=True)
class Settings:
  """The content of adapter_config.json.

  Attributes:
    fields: as PEFT writes them.

  Raises:
    ValueError: they make the adapter something else than down · up added to this
      model's kernels, or make no sense; names the fields.
  """

  fields: Mapping[str, Any]

  def __post_init__(self):
    kind = self.fields.get("peft_type", "LORA")
    if kind != "LORA":
      raise ValueError(f"it is of the kind {kind!r}, not LORA")
    start = self.fields.get("init_lora_weights", True)
    if (start.lower() if isinstance(start, str) else start) not in _INITIALISATIONS:
      raise ValueError(
        f"it was started with init_lora_weights={start!r}, which takes a part out of "
        "the base model, so that it fits no other: save it by PEFT's save_pretrained "
        "with path_initial_model_for_weight_conversion, or merge it there "
        "(merge_and_unload) and convert the model"
      )
    unknown = [
      f"{name}={value!r}"
      for name, value in self.fields.items()
      if name not in _OF_NO_MATTER | _UNDERSTOOD
      and not _is_off(value)
      and value != _OFF.get(name)
    ]
    if unknown:
      raise ValueError(
        f"it was made with {', '.join(unknown)}, by which it may be more than a LoRA: "
        "merge it with PEFT (merge_and_unload) and convert the model"
      )
    self._check_numbers()
    self._check_names()

  def _check_numbers(self) -> None:
    for name, default in (("r", _DEFAULT_RANK), ("lora_alpha", _DEFAULT_ALPHA)):
      if not _is_number(value := self.fields.get(name, default)):
        raise ValueError(f"it has {name}={value!r}, which is no number")
    for name in ("rank_pattern", "alpha_pattern"):
      pattern = self.fields.get(name) or {}
      if not isinstance(pattern, Mapping) or not all(map(_is_number, pattern.values())):
        raise ValueError(
          f"it has {name}={pattern!r}, which gives no number to each name"
        )
      _check_expressions(name, pattern)
    layers = self.fields.get("layers_to_transform") or []
    if not all(map(_is_number, layers if isinstance(layers, list) else [layers])):
      raise ValueError(f"it has layers_to_transform={layers!r}, which are no layers")

  def _check_names(self) -> None:
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
      value = self.fields.get(name) or []
      names = [value] if isinstance(value, str) else value
      if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise ValueError(f"it has {name}={value!r}, which names no modules")
      if isinstance(value, str) or name == "layers_pattern":
        _check_expressions(name, names)

  def rank(self, module: str) -> int | float:
    """The rank that a module's tensors must have."""
    return self._of("rank_pattern", module, self.fields.get("r", _DEFAULT_RANK))

  def scale(self, module: str, rank: int) -> float:
    """Factor of down · up: α / rank, or α / √rank if rank-stabilized."""
    alpha = self.fields.get("lora_alpha", _DEFAULT_ALPHA)
    alpha = self._of("alpha_pattern", module, alpha)
    return alpha / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)

  def problem(self, module: str, rank: int, *, dora: bool) -> str:
    """Contradiction between a module's tensors and the settings; empty without one.

    Args:
      module: diffusers' name of it.
      rank: of its tensors.
      dora: whether there is a magnitude among them.
    """
    if not self._targets(module):
      return "the settings do not target it, so that PEFT leaves its tensors out"
    if (wanted := self.rank(module)) != rank:
      return f"its tensors are of rank {rank}, and the settings say {wanted}"
    if dora != bool(self.fields.get("use_dora", False)):
      there = "a magnitude" if dora else "no magnitude"
      return f"it has {there}, and the settings say use_dora={not dora}"
    return ""

  def _of(self, field: str, module: str, default: int | float) -> int | float:
    """The value of the first pattern that the module's name ends with."""
    patterns = self.fields.get(field) or {}
    for pattern, value in patterns.items():
      if re.match(rf"(.*\.)?({pattern})$", module):
        return value
    return default

  def _targets(self, module: str) -> bool:
    targets = self.fields.get("target_modules")
    if _is_named(module, self.fields.get("exclude_modules") or []):
      return False
    if targets in (None, "all-linear"):  # chosen by the model's kind
      return True
    if not _is_named(module, targets):
      return False
    layers = self.fields.get("layers_to_transform")
    if isinstance(targets, str) or module in targets or layers in (None, []):
      return True
    patterns = self.fields.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    whole = [rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\." for pattern in patterns]
    found = _first_match(whole or [r".*?\.[^.]*\.(?P<layer>\d+)\."], module)
    layers = [layers] if isinstance(layers, int) else layers
    return found is not None and int(found["layer"]) in layers


def _first_match(patterns: Iterable[str], name: str) -> re.Match[str] | None:
  return next((m for pattern in patterns if (m := re.match(pattern, name))), None)


def _is_named(module: str, names: str | list[str]) -> bool:
  if isinstance(names, str):
    return re.fullmatch(names, module) is not None
  return any(module == name or module.endswith(f".{name}") for name in names)


def _is_off(value: Any) -> bool:
  if isinstance(value, Mapping):
    return all(map(_is_off, value.values()))
  return value in (None, False, 0, "", [])


def _is_number(value: Any) -> bool:
  number = isinstance(value, int | float) and not isinstance(value, bool)
  return number and math.isfinite(value)


def _check_expressions(field: str, expressions: Iterable[str]) -> None:
  for expression in expressions:
    try:
      re.compile(expression)
    except re.error as error:
      raise ValueError(
        f"it has {field} with {expression!r}, which is no regular expression: {error}"
      ) from None
