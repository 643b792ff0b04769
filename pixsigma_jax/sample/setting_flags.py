"""Flags of commands for the settings of a pipeline, made from `Settings`."""

import sys
from typing import Any

from absl import flags

from pixsigma_jax.sample.settings import (
  SETTINGS,
  Choice,
  Interval,
  Margins,
  Number,
  Setting,
  Switch,
  Whole,
  WholeList,
)


class SettingFlags:
  """The flags of some settings, each of the setting's name, default and help."""

  def __init__(self, *names: str, **defaults: Any):
    """Defines them.

    Args:
      names: of the settings; all of them if there is none.
      defaults: of settings whose default is another in this command.
    """
    self._holders = {}
    for name in names or SETTINGS:
      setting = SETTINGS[name]
      self._holders[name] = _define(setting, defaults.get(name, setting.default))

  def values(self) -> dict[str, Any]:
    """Values of the flags or defaults; to be read once flags are parsed.

    A setting that each prompt can have its own of, but for texts and seeds, is a list.

    Raises:
      ValueError: a flag of numbers has other things.
    """
    return {
      name: _of_list(name, holder.value) for name, holder in self._holders.items()
    }


def _define(setting: Setting, default: Any) -> flags.FlagHolder[Any]:
  name, help_ = setting.name, setting.help
  of_command: Any = {"module_name": sys.argv[0]}  # as absl calls the main module
  if setting.default_is:
    help_ += f" By default {setting.default_is}."
  match setting.kind:
    case Choice(names):
      return flags.DEFINE_enum(name, default, list(names), help_, **of_command)
    case Switch():
      return flags.DEFINE_bool(name, default, help_, **of_command)
    case Interval():
      return flags.DEFINE_list(
        name, [f"{end:g}" for end in default], help_, **of_command
      )
    case WholeList() | Margins():
      help_ += " Separated by commas."
      return flags.DEFINE_list(name, default, help_, **of_command)
    case Number():
      return flags.DEFINE_float(name, default, help_, **of_command)
    case Whole() if setting.of_a_prompt and setting.optional:
      help_ += " Once for all prompts, or once for each."
      return flags.DEFINE_multi_integer(name, default, help_, **of_command)
    case Whole():
      return flags.DEFINE_integer(name, default, help_, **of_command)
    case _:
      return flags.DEFINE_string(name, default, help_, **of_command)


def _of_list(name: str, value: Any) -> Any:
  """Numbers of a flag that has several between commas; other values as they are."""
  match SETTINGS[name].kind:
    case Interval():
      number, what = float, "two numbers, LOW,HIGH"
    case WholeList() if value is not None:
      number, what = int, "whole numbers, such as 14 or 7,8,9"
    case Margins() if value is not None:
      number, what = int, "four whole numbers, LEFT,TOP,RIGHT,BOTTOM"
    case _:
      return value
  try:
    return tuple(map(number, value))
  except ValueError:
    raise ValueError(f"--{name}={','.join(value)} must be {what}.") from None
