"""Start of commands whose flag --config names a config file, and its overrides."""

import contextlib
import importlib.machinery
import importlib.util
import inspect
import itertools
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from pixsigma_jax import command
from pixsigma_jax.train.config import (
  complete,
  config_dict,
  origins,
  unknown_names,
  use_optimizer,
)


class ConfigFileError(Exception):
  """A config file that is not there, fails, or holds no config."""


def run_with_config(main: Callable[[dict[str, Any]], None]) -> None:
  """As `command.run`, for a command with a flag --config; `main` gets every field.

  The flag is one of ml_collections. The config file is read, completed by the defaults,
  and its fields changed by flags such as --config.batch_size=8, while flags are parsed:
  what goes wrong there ends in one line as well.
  """

  def with_config(_: list[str]) -> None:
    flag: Any = flags.FLAGS["config"]
    main(complete(flag.value))

  flags.FLAGS["config"].parser = _Parser()
  flags.mark_flag_as_required("config")
  try:
    command.run(with_config)
  except ConfigFileError as error:
    if "--traceback" in sys.argv:
      raise
    _end(f"--config={error}")
  except (AttributeError, LookupError, TypeError, ValueError) as error:
    # ml_collections raises these of a flag that it makes nothing of.
    if flags.FLAGS.is_parsed() or "--traceback" in sys.argv:
      raise
    _end(f"A flag --config.FIELD is wrong: {_innermost(error)}")


def described(config: Mapping[str, Any]) -> str:
  """A line for each field of a complete config: where its value is from, and what."""
  flag: Any = flags.FLAGS["config"]
  return "\n".join(
    f"{origin:<14}{name} = {value!r}"
    for name, value, origin in origins(config, flag.override_values)
  )


class _Parser(flags.ArgumentParser):
  """Reads a config file and fills in the defaults."""

  def parse(self, argument: str) -> ConfigDict:
    """The complete config of FILE or FILE:ARGUMENT.

    Raises:
      ConfigFileError: see there; or a flag --config.FIELD names no field.
    """
    file, *arguments = argument.split(":", 1)
    get_config = _get_config(file)
    if arguments and not inspect.signature(get_config).parameters:
      raise ConfigFileError(f"{file}: it takes no argument, and got {arguments[0]!r}.")
    with _named(argument):
      given = get_config(*arguments)
    if not isinstance(given, Mapping | ConfigDict):
      raise ConfigFileError(
        f"{argument}: get_config returned {type(given).__name__}: it must return a "
        "dict or a ConfigDict of what differs from the defaults."
      )
    try:
      config: Any = config_dict(given)
      name = _on_command_line("config.optimizer.name")
      if name is not None and name != config.optimizer.name:
        # Now, so that there are flags for the fields of that optimizer.
        use_optimizer(config, name=name)
    except ValueError as error:
      raise ConfigFileError(f"{argument}: {error}") from error
    if problems := unknown_names(_overrides(), config.to_dict()):
      raise ConfigFileError(f"{argument}: {'; '.join(problems)}.")
    return config.lock()

  def flag_type(self) -> str:
    """What the flag's help calls its value."""
    return "config file"


def _get_config(file: str) -> Callable[..., Any]:
  """The function `get_config` of a file."""
  if not pathlib.Path(file).is_file():
    raise ConfigFileError(
      f"{file}: there is no such file; give one of configs/, or your own."
    )
  loader = importlib.machinery.SourceFileLoader("config_file", file)
  spec = importlib.util.spec_from_loader(loader.name, loader)
  assert spec is not None
  module = importlib.util.module_from_spec(spec)
  sys.modules[loader.name] = module  # where dataclasses look for it
  with _named(file):
    loader.exec_module(module)
  if not callable(getattr(module, "get_config", None)):
    raise ConfigFileError(f"{file}: it has no function get_config.")
  return module.get_config


@contextlib.contextmanager
def _named(argument: str) -> Iterator[None]:
  """Runs a user's program, so that whatever it raises names its file."""
  try:
    yield
  except Exception as error:
    raise ConfigFileError(f"{argument}: {_innermost(error)}") from error


def _on_command_line(flag: str) -> str | None:
  """Last value of a flag that is not parsed yet; None if it is not given."""
  found = None
  for argument, following in itertools.pairwise([*_argv(), ""]):
    name, equals, value = argument.partition("=")
    if name in (f"-{flag}", f"--{flag}"):
      found = value if equals else following
  return found


def _overrides() -> list[str]:
  """Names of the fields for which the command line has flags."""
  matches = (re.match(r"--?(?:no)?config\.([^=]+)", argument) for argument in _argv())
  return [match[1] for match in matches if match]


def _argv() -> list[str]:
  """The command line, with what --flagfile names in its place."""
  return flags.FLAGS.read_flags_from_files(sys.argv, force_gnu=False)


def _innermost(error: BaseException) -> str:
  """What an exception says, on one line, with its type unless that is a ValueError."""
  while error.args and isinstance(error.args[0], Exception):
    error = error.args[0]  # ml_collections raises AttributeError(KeyError(…))
  said = " ".join(str(error.args[0] if error.args else error).split())
  return said if isinstance(error, ValueError) else f"{type(error).__name__}: {said}"


def _end(message: str) -> None:
  print(f"Error: {message} (--traceback shows where)", file=sys.stderr)
  sys.exit(1)
