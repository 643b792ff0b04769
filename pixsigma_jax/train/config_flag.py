"""Start of commands whose flag --config names a file of `configs/`."""

import pathlib
import sys
from collections.abc import Callable
from typing import Any

from absl import flags
from ml_collections import config_flags

from pixsigma_jax import command


def run_with_config(main: Callable[[dict[str, Any]], None]) -> None:
  """As `command.run`, for a command with a flag --config; `main` gets its fields.

  A file of `configs/` is read, and its fields changed by flags such as
  --config.batch_size=8, while flags are parsed: what goes wrong there ends in one line
  as well.
  """

  def with_config(_: list[str]) -> None:
    flag: Any = flags.FLAGS["config"]
    path = pathlib.Path(config_flags.get_config_filename(flag).partition(":")[0])
    if not path.is_file():
      raise FileNotFoundError(f"There is no config file {path}: give one of configs/.")
    main(flag.value.to_dict())

  flags.mark_flag_as_required("config")
  try:
    command.run(with_config)
  except Exception as error:
    if flags.FLAGS.is_parsed() or "--traceback" in sys.argv:
      raise
    print(_of_config(error), file=sys.stderr)
    sys.exit(1)


def _of_config(error: Exception) -> str:
  """Turns errors of a config file, or of a flag for its fields, into one message."""
  while error.args and isinstance(error.args[0], Exception):
    error = error.args[0]  # ml_collections raises AttributeError(KeyError(…))
  message = str(error.args[0] if error.args else error)
  return (
    "Error: --config, or a flag that changes one of its fields, is wrong: "
    f"{type(error).__name__}: {' '.join(message.split())} (--traceback shows where)"
  )
