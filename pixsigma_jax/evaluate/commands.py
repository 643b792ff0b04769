"""Commands of `evaluate`, each in a module that defines and reads its own flags."""

import importlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

# Command → module of this room whose `define` defines its flags.
COMMANDS: dict[str, str] = {
  "prompts": "steps",
  "sample": "steps",
  "score": "steps",
  "report": "steps",
  "study": "study.command",
  "judge": "judge.command",
  "make-set": "make_set",
  "watch": "watch",
}


class Command(NamedTuple):
  """A command whose flags are defined.

  Attributes:
    run: runs it, with the words that follow its own; flags are parsed by then.
    words: names of these words, all of which must be given.
  """

  run: Callable[[list[str]], None]
  words: tuple[str, ...] = ()


def define(name: str, arguments: Sequence[str]) -> Command:
  """Defines the flags of one command, and of no other.

  A module's `define` has the same arguments; `options.OptionFlags` makes flags.

  Args:
    name: a key of `COMMANDS`.
    arguments: all that follows it, before flags are parsed: a command may have other
      flags after another word.
  """
  module = importlib.import_module(f"pixsigma_jax.evaluate.{COMMANDS[name]}")
  return module.define(name, arguments)
