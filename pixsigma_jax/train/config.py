"""Training configs: made complete by defaults, looked at, and turned into calls.

What a file of `configs/` or a user says is what differs from the defaults of
`train/fields.py`. A name that is unknown is an error before anything is built, so that
no typo passes unseen.
"""

import dataclasses
import difflib
import functools
import inspect
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict, FieldReference

from pixsigma_jax.models.kv_compression import KVCompression
from pixsigma_jax.models.pixart import VARIANTS, PixArtConfig
from pixsigma_jax.train import fields
from pixsigma_jax.train.checks import complaints
from pixsigma_jax.wording import listed

T = TypeVar("T")


def default_config() -> ConfigDict:
  """Every field with its default, for a config file to change.

  A stage must at least say its `total_steps`, `batch_size` and `data.path`.
  """
  return config_dict({})


def config_dict(given: Mapping[str, Any] | ConfigDict) -> ConfigDict:
  """A config with every field: what is given, and the defaults of all others.

  Whole numbers that are given for real ones become real, and a field that may be None
  takes any type, so that flags can set one where the file has the other.

  Raises:
    ValueError: unknown names, with the nearest known; or a section that is none.
  """
  plain = ConfigDict({**given}).to_dict()  # sections may be ConfigDicts, too
  return ConfigDict(_filled("", plain, defaults_of(plain)))


def complete(given: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
  """The same as a plain dict."""
  return config_dict(given).to_dict()


def defaults_of(given: Mapping[str, Any]) -> fields.Config:
  """Defaults of a config: those of the optimizer are of the one that is named.

  Raises:
    ValueError: an unknown optimizer.
  """
  optimizer = given.get("optimizer", {})
  name = optimizer.get("name") if isinstance(optimizer, Mapping) else None
  config = fields.Config()
  if not isinstance(name, str):
    return config
  return dataclasses.replace(config, optimizer=fields.section_of(name))


def _filled(section: str, given: Any, defaults: Any) -> dict[str, Any]:
  if not isinstance(given, Mapping):
    raise ValueError(
      f"The config makes no sense: config.{section}={given!r} must be a section of "
      "fields."
    )
  known = {field.name: field for field in dataclasses.fields(defaults)}
  _refuse(section, _unknown(section, given, known), known)
  filled: dict[str, Any] = {}
  for name, field in known.items():
    default = getattr(defaults, name)
    if dataclasses.is_dataclass(default):
      filled[name] = _filled(_within(section, name), given.get(name, {}), default)
      continue
    value = given.get(name, default)
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if is_whole and field.type in (float, float | None):
      value = float(value)
    if field.type == float | None:
      value = FieldReference(value, field_type=object)
    filled[name] = value
  return filled


def use_optimizer(config: Any, *, name: str, **own: Any) -> None:
  """Puts another optimizer in a config; what every optimizer has stays as it is.

  Args:
    config: a ConfigDict with every field.
    name: of the optimizer.
    own: its own fields that differ from their defaults.

  Raises:
    ValueError: an unknown optimizer, or fields that are not its own.
  """
  shared = {field.name for field in dataclasses.fields(fields.Optimizer)}
  kept = {n: value for n, value in config.optimizer.to_dict().items() if n in shared}
  section = {**kept, "name": name, **own}
  config.optimizer = config_dict({"optimizer": section})["optimizer"]


def choose(argument: str, known: Mapping[str, T]) -> T:
  """What an argument of a config file stands for.

  Args:
    known: argument → what it stands for.

  Raises:
    ValueError: an unknown argument; lists the known ones.
  """
  if argument not in known:
    near = difflib.get_close_matches(argument, known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    names = ", ".join(map(repr, known))
    raise ValueError(f"Unknown argument {argument!r}{hint}; known are {names}.")
  return known[argument]


DEFAULT, FILE, COMMAND_LINE = "default", "file", "command line"


def origins(
  config: Mapping[str, Any], overrides: Iterable[str]
) -> Iterator[tuple[str, Any, str]]:
  """Yields each field's dotted name, its value, and where that came from.

  What a file says and is the default as well counts as the default.

  Args:
    config: complete.
    overrides: dotted names of what the command line changed: fields, what lies within
      one, or sections.
  """
  overridden = [name.partition("[")[0] for name in overrides]
  defaults = fields.fields(defaults_of(config))
  defaults["optimizer.name"] = fields.fields(fields.Config())["optimizer.name"]
  for name, field in defaults.items():
    value = functools.reduce(operator.getitem, name.split("."), config)
    if any(f"{name}.".startswith(f"{o}.") for o in overridden):
      yield name, value, COMMAND_LINE
    else:
      yield name, value, DEFAULT if value == field.default else FILE


def check_values(config: Mapping[str, Any]) -> None:
  """Looks at every value by itself.

  Raises:
    ValueError: names all fields whose values make no sense.
  """
  if said := complaints(config, fields.checks(defaults_of(config))):
    raise ValueError(f"The config makes no sense: {'; '.join(said)}.")


def check_fields(section: str, have: Mapping[str, Any], want: Iterable[str]) -> None:
  """Compares the names in a section with those it must have.

  Raises:
    ValueError: names the missing fields, and the unknown with their nearest.
  """
  want = list(want)
  missing = [
    f"missing config.{_within(section, name)}" for name in want if name not in have
  ]
  _refuse(section, [*_unknown(section, have, want), *missing], want)


def _unknown(section: str, have: Iterable[str], known: Collection[str]) -> list[str]:
  """A clause for each name that a section does not have."""
  return [
    f"unknown config.{_within(section, name)}{_hint(section, name, known)}"
    for name in have
    if name not in known
  ]


def _hint(section: str, name: str, known: Iterable[str]) -> str:
  """The field that may be meant: of this section, or of that name in another."""
  if near := difflib.get_close_matches(name, known, n=1):
    return f" (did you mean config.{_within(section, near[0])}?)"
  if section == "optimizer":
    owners = [
      optimizer
      for optimizer, own in fields.OPTIMIZERS.items()
      if name in {field.name for field in dataclasses.fields(own)}
    ]
    if owners:
      return (
        f" (a field of {' and '.join(owners)}: in a file use_optimizer, or a flag "
        "--config.optimizer.name, exchanges an optimizer's fields too)"
      )
  elsewhere: dict[str, list[str]] = {}
  for dotted in fields.fields(fields.Config()):
    elsewhere.setdefault(dotted.rpartition(".")[2], []).append(dotted)
  for near in difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.8):
    if len(elsewhere[near]) == 1:
      return f" (did you mean config.{elsewhere[near][0]}?)"
  return ""


def unknown_names(names: Iterable[str], config: Mapping[str, Any]) -> list[str]:
  """A clause for each dotted name that a complete config does not have.

  An index may follow the name of a field, as in `ema.values[0]`.
  """
  defaults = defaults_of(config)
  known = {*fields.fields(defaults), *fields.sections(defaults)} - {""}
  found = []
  for dotted in names:
    path = dotted.partition("[")[0].split(".")
    for end, name in enumerate(path):
      section = ".".join(path[:end])
      if _within(section, name) not in known:
        inner = section and f"{section}."
        here = [k.removeprefix(inner) for k in known if k.startswith(inner)]
        found += _unknown(section, [name], [k for k in here if "." not in k])
        break
  return found


def _within(section: str, name: str) -> str:
  return f"{section}.{name}" if section else name


def _refuse(section: str, problems: list[str], known: Iterable[str]) -> None:
  if problems:
    raise ValueError(
      f"The config does not fit: {listed(problems, 20, '; ')}. "
      f"Its fields here are {', '.join(known)}."
    )


def call(
  function: Callable[..., Any], section: str, fields: Mapping[str, Any], *args, **more
) -> Any:
  """`function(*args, **fields, **more)`, with the section's names checked first.

  The section must name every keyword-only argument that `more` does not give, and no
  other unless the function hands further ones on.
  """
  parameters = inspect.signature(function).parameters.values()
  names = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
  have = fields
  if any(p.kind is p.VAR_KEYWORD for p in parameters):
    # What is handed on is not known here, but a typo of something missing is.
    missing = [name for name in names if name not in {**fields, **more}]
    have = {
      name: value
      for name, value in fields.items()
      if name in names or difflib.get_close_matches(name, missing)
    }
  check_fields(section, have, [name for name in names if name not in more])
  return function(*args, **fields, **more)


def model_config(fields: Mapping[str, Any]) -> PixArtConfig:
  """`config.model`: a variant of `VARIANTS`, and every other field of PixArtConfig."""
  fields = dict(fields)
  names = [
    name
    for name in inspect.signature(PixArtConfig).parameters
    if name not in VARIANTS["XL/2"]
  ]
  check_fields("model", fields, ["variant", *names])
  compression = call(KVCompression, "model.kv_compression", fields["kv_compression"])
  return PixArtConfig.from_variant(**{**fields, "kv_compression": compression})
