r"""Evaluates models: their images for a suite's prompts, scored and side by side.

  python -m pixsigma_jax.evaluate SUITE --output=FOLDER --checkpoints=[NAME=]DIR,…

does all four steps of a suite, which can be run, stopped and repeated alone:

  python -m pixsigma_jax.evaluate prompts SUITE --output=FOLDER
  python -m pixsigma_jax.evaluate sample SUITE --output=FOLDER --checkpoints=…
  python -m pixsigma_jax.evaluate score SUITE --output=FOLDER [--images=[NAME=]DIR,…]
  python -m pixsigma_jax.evaluate report SUITE --output=FOLDER

People and a multimodal model say which images they prefer:

  python -m pixsigma_jax.evaluate study create --folder=FOLDER --study=NAME --raters=10
  python -m pixsigma_jax.evaluate study serve --folder=FOLDER --study=NAME
  python -m pixsigma_jax.evaluate study report --folder=FOLDER --study=NAME
  python -m pixsigma_jax.evaluate judge --folder=FOLDER --judge=MODEL

The sample sets of a run are scored while it trains, into its TensorBoard:

  python -m pixsigma_jax.evaluate watch WORKDIR [--scorers=clip,texture] [--once]

`evaluate COMMAND --help` lists a command's flags.
"""

import sys
from collections.abc import Sequence

from pixsigma_jax import command
from pixsigma_jax.evaluate import commands
from pixsigma_jax.evaluate.suites import SUITES


def _define(arguments: Sequence[str]) -> tuple[commands.Command, tuple[str, ...]]:
  """The command that the first argument names, and the names of all words."""
  first = arguments[0] if arguments else ""
  if first in commands.COMMANDS:
    defined = commands.define(first, arguments[1:])
    return defined, ("COMMAND", *defined.words)
  if first in SUITES:
    from pixsigma_jax.evaluate import steps

    return steps.define_all(first), ("SUITE",)
  known = f"commands are {', '.join(commands.COMMANDS)}, suites {', '.join(SUITES)}"
  if any(word.lstrip("-").partition("=")[0] == "task" for word in arguments):
    raise ValueError(
      "A task is a suite now: `evaluate digits --checkpoints=… --output=FOLDER`. The "
      "counts are in FOLDER/report.json."
    )
  if first and not first.startswith("-"):
    raise ValueError(f"There is no command or suite {first!r}: {known}.")

  def refuse(_: Sequence[str]) -> None:
    raise ValueError(f"Begin with a command or a suite: {known}.")

  return commands.Command(refuse), ()


def main() -> None:
  """Entry point: flags are defined for the command asked for, and then parsed."""
  try:
    defined, words = _define(sys.argv[1:])
  except ValueError as error:
    sys.exit(f"Error: {error}")
  command.run(lambda given: defined.run(given[1:]), words)


if __name__ == "__main__":
  main()
