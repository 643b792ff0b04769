"""Trains a stage, or goes on with it.

python -m pixsigma_jax.train --config=FILE --workdir=DIR [--config.field=value]
"""

import pathlib
import sys

from absl import flags, logging
from ml_collections import config_flags

from pixsigma_jax import command
from pixsigma_jax.train.loop import train

_CONFIG = config_flags.DEFINE_config_file("config", help_string="A file of configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)


def main(_: list[str]) -> None:
  """Entry point; flags are parsed."""
  logging.set_verbosity(logging.INFO)
  name = config_flags.get_config_filename(flags.FLAGS["config"])
  path = pathlib.Path(name.partition(":")[0])
  if not path.is_file():
    raise FileNotFoundError(f"There is no config file {path}: give one of configs/.")
  train(_CONFIG.value.to_dict(), _WORKDIR.value)


def _one_line(error: Exception) -> str:
  """What a config file, or a flag that changes one of its fields, ended in."""
  while error.args and isinstance(error.args[0], Exception):
    error = error.args[0]  # ml_collections raises AttributeError(KeyError(…))
  message = str(error.args[0] if error.args else error)
  return (
    "Error: --config, or a flag that changes one of its fields, is wrong: "
    f"{type(error).__name__}: {' '.join(message.split())} (--traceback shows where)"
  )


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  try:
    command.run(main)
  except Exception as error:
    # A config is read while flags are parsed, before `command` looks at errors.
    if flags.FLAGS.is_parsed() or "--traceback" in sys.argv:
      raise
    print(_one_line(error), file=sys.stderr)
    sys.exit(1)
