"""Fields of the page for the settings of a pipeline, made from `Settings`."""

import itertools
import re
from typing import Any, TypeAlias

import gradio as gr

from pixsigma_jax.sample.settings import (
  SETTINGS,
  Choice,
  Interval,
  Margins,
  Number,
  Switch,
  Whole,
  WholeList,
)

Field: TypeAlias = gr.Textbox | gr.Number | gr.Dropdown | gr.Checkbox

# Folded parts of the page, and what is in them; `page.build` has places for the rest.
ABOUT_IMAGES = ("strength", "outpaint")
GROUPS: dict[str, tuple[str, ...]] = {
  "Guidance in detail": (
    "guidance_method",
    "guidance_interval",
    "guidance_rescale",
    "pag_scale",
    "pag_applied_layers",
    "skip_layer_guidance_scale",
    "skip_guidance_layers",
    "autoguidance_scale",
    "apg_eta",
    "apg_threshold",
    "apg_momentum",
  ),
  "Steps in detail": ("use_karras_sigmas", "timesteps", "step_caching"),
  "Prompt and size": (
    "prompt_weighting",
    "caption_cleaning",
    "unconditional_mask",
    "use_resolution_binning",
  ),
}
# Numbers with a field from here that may be empty: Gradio's own for numbers makes 0 of
# nothing, so they are texts.
_EMPTIED = {
  name
  for name in (*ABOUT_IMAGES, *itertools.chain(*GROUPS.values()))
  if isinstance(SETTINGS[name].kind, Number | Whole) and SETTINGS[name].default is None
}
_ABBREVIATIONS = {"pag": "PAG", "apg": "APG", "karras": "Karras"}
_SEPARATOR = re.compile(r"\s*,\s*")


def label(name: str) -> str:
  """What the page calls a setting."""
  words = [_ABBREVIATIONS.get(word, word) for word in name.split("_")]
  return " ".join([words[0][:1].upper() + words[0][1:], *words[1:]])


def field(name: str) -> Field:
  """An empty place for a setting's value, with its default in it."""
  setting = SETTINGS[name]
  info = setting.help
  if setting.default_is:
    info += f" By default {setting.default_is}."
  value = shown(name, setting.default)
  same: dict[str, Any] = {"label": label(name), "info": info, "elem_id": name}
  match setting.kind:
    case Choice(names):
      return gr.Dropdown(list(names), value=value, **same)
    case Switch():
      return gr.Checkbox(value=value, **same)
    case Interval() | WholeList() | Margins():
      same["info"] += " Separated by commas."
      return gr.Textbox(value=value, **same)
    case _ if name in _EMPTIED:
      return gr.Textbox(value=value, **same)
    case Number():
      return gr.Number(value=value, **same)
    case Whole():
      return gr.Number(value=value, precision=0, **same)
    case _:
      return gr.Textbox(value=value, **same)


def shown(name: str, value: Any) -> Any:
  """A setting's value as its field shows it."""
  match SETTINGS[name].kind:
    case Interval() | WholeList() | Margins():
      return "" if value is None else ", ".join(f"{number:g}" for number in value)
    case _ if name in _EMPTIED:
      return "" if value is None else f"{value:g}"
    case _:
      return value


def value_of(name: str, content: Any) -> Any:
  """A setting's value from what its field shows; the setting checks it.

  Raises:
    ValueError: numbers between commas, or a number, are none.
  """
  match SETTINGS[name].kind:
    case _ if name in _EMPTIED:
      return _number(name, content)
    case Interval():
      number, what = float, "two numbers, low, high"
    case WholeList():
      number, what = int, "whole numbers, such as 14 or 7, 8, 9"
    case Margins():
      number, what = int, "four whole numbers, left, top, right, bottom"
    case _:
      return content
  if not content.strip():
    return SETTINGS[name].default
  try:
    return tuple(map(number, _SEPARATOR.split(content.strip())))
  except ValueError:
    raise ValueError(f"{label(name)} {content!r} must be {what}.") from None


def _number(name: str, content: str) -> float | None:
  if not content.strip():
    return None
  try:
    return float(content)
  except ValueError:
    raise ValueError(f"{label(name)} {content!r} must be a number.") from None
