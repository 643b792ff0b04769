"""Trains a stage, or goes on with it.

python -m pixsigma_jax.train --config=FILE --workdir=DIR [--config.field=value]

With --dry_run it says in one line where the run stands, and trains nothing; with
--print_config it prints every field of the config and where its value is from.

On several hosts, the same command on each: docs/pods.md.
"""

from typing import Any

from absl import flags, logging
from ml_collections import config_flags

from pixsigma_jax import command, distributed
from pixsigma_jax.train.compatibility import check_config
from pixsigma_jax.train.config_flag import described, run_with_config
from pixsigma_jax.train.loop import train
from pixsigma_jax.train.status import status

config_flags.DEFINE_config_file("config", help_string="A config file; FILE:ARGUMENT.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; required.")
_DRY_RUN = flags.DEFINE_bool(
  "dry_run", False, "Say where the run stands, done or open, and train nothing."
)
_PRINT_CONFIG = flags.DEFINE_bool(
  "print_config", False, "Print every field and where it is from, and train nothing."
)
_COORDINATOR_ADDRESS = flags.DEFINE_string(
  "coordinator_address",
  None,
  "HOST:PORT of process 0, where a pod or cluster does not say it: docs/pods.md.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "Processes of the job.", lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "Which of them this is, from 0.", lower_bound=0
)
_STARTUP_TIMEOUT = flags.DEFINE_integer(
  "startup_timeout", 600, "Seconds to wait for all processes.", lower_bound=1
)
_SILENCE_TIMEOUT = flags.DEFINE_integer(
  "silence_timeout", 100, "Seconds until a silent host counts as lost.", lower_bound=1
)

flags.register_multi_flags_validator(
  ["workdir", "print_config"],
  lambda given: given["workdir"] is not None or given["print_config"],
  message="--workdir, the directory of the run, must be given.",
)


def main(config: dict[str, Any]) -> None:
  """Entry point; flags are parsed."""
  logging.set_verbosity(logging.INFO)
  if _PRINT_CONFIG.value:
    print(described(config))
    check_config(config)
    return
  workdir = _WORKDIR.value
  assert workdir is not None  # the validator sees to it
  if _DRY_RUN.value:
    print(status(config, workdir))
    return
  command.keep_compiled()
  process = distributed.find_process(
    coordinator_address=_COORDINATOR_ADDRESS.value,
    num_processes=_NUM_PROCESSES.value,
    process_id=_PROCESS_ID.value,
    timeout=_STARTUP_TIMEOUT.value,
  )
  with distributed.initialized(
    process,
    startup_timeout=_STARTUP_TIMEOUT.value,
    silence_timeout=_SILENCE_TIMEOUT.value,
  ):
    train(config, workdir)


if __name__ == "__main__":
  run_with_config(main)
