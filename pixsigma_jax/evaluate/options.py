"""Options of commands, suites and scorers: values by name, as flags or in Python."""

import dataclasses
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from absl import flags

from pixsigma_jax.wording import listed


@dataclasses.dataclass(frozen=True)
class Option:
  """One value that a command, a suite or a scorer takes.

  Attributes:
    name: of the flag and of the key.
    default: None where there is none; its owner then says what is missing.
    help: what it is, in a sentence.
    kind: `str`, `int`, `float`, `bool`, or `list` for texts between commas.
    choices: the only texts it may be; empty for any.
  """

  name: str
  default: Any
  help: str
  kind: type = str
  choices: tuple[str, ...] = ()


def merge(*groups: Iterable[Option]) -> tuple[Option, ...]:
  """Options of several owners, each name once.

  Raises:
    ValueError: two owners mean different things by one name.
  """
  found: dict[str, Option] = {}
  for option in (option for group in groups for option in group):
    if found.setdefault(option.name, option) != option:
      raise ValueError(f"Two options have the name {option.name!r}: rename one.")
  return tuple(found.values())


def resolve(options: Iterable[Option], values: Mapping[str, Any]) -> dict[str, Any]:
  """`values` with the defaults of all other options.

  Raises:
    ValueError: there is no option of a name, or a value is not of its kind.
  """
  known = {option.name: option for option in options}
  if unknown := sorted(set(values) - set(known)):
    raise ValueError(
      f"There is no option {listed(unknown)}: known are {listed(known, 20)}."
    )
  for name, value in values.items():
    option = known[name]
    wanted = (int, float) if option.kind is float else option.kind
    is_bool = isinstance(value, bool) and option.kind is not bool
    if value is not None and (is_bool or not isinstance(value, wanted)):
      raise ValueError(f"{name}={value!r} must be a {option.kind.__name__}.")
    if option.choices and value not in option.choices:
      raise ValueError(f"{name}={value!r} is not one of {', '.join(option.choices)}.")
  return {name: values.get(name, option.default) for name, option in known.items()}


class OptionFlags:
  """Flags of options, each of the option's name, default and help."""

  def __init__(self, options: Iterable[Option]):
    self._holders: dict[str, flags.FlagHolder[Any]] = {}
    for option in options:
      self._holders[option.name] = _define(option)

  def values(self) -> dict[str, Any]:
    """Values by name; to be read once flags are parsed."""
    return {name: holder.value for name, holder in self._holders.items()}


def _define(option: Option) -> flags.FlagHolder[Any]:
  if option.choices:
    return flags.DEFINE_enum(
      option.name,
      option.default,
      list(option.choices),
      option.help,
      module_name=sys.argv[0],  # as absl calls the main module
    )
  define = {
    str: flags.DEFINE_string,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_bool,
    list: flags.DEFINE_list,
  }[option.kind]
  return define(option.name, option.default, option.help, module_name=sys.argv[0])
