"""Runs a command of the package in this process, from its argv to its exit code."""

import runpy
import sys
from typing import NamedTuple

import pytest
from absl import flags

import pixsigma_jax.command  # its flag is there before and after


class Done(NamedTuple):
  """What a command left behind."""

  code: int
  out: str
  err: str


def run(capsys, monkeypatch, module, *arguments):
  """`python -m pixsigma_jax.MODULE ARGUMENTS`, without starting another Python."""
  monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
  # With the suite's type checks in it, a `__main__` must not be cached as bytecode: a
  # Python without them would read it.
  monkeypatch.setattr(sys, "dont_write_bytecode", True)
  # Not in the home of whoever runs the tests.
  monkeypatch.setattr(pixsigma_jax.command, "keep_compiled", lambda: None)
  capsys.readouterr()
  try:
    with pytest.raises(SystemExit) as exit_:
      runpy.run_module(f"pixsigma_jax.{module}", run_name="__main__", alter_sys=True)
  finally:
    # The command's own flags make place for those of the next.
    for module_, own in list(flags.FLAGS.flags_by_module_dict().items()):
      for flag in list(own):
        # Overrides of a config's fields are flags too, which ml_collections defines in
        # absl's name while it parses them.
        if module_.endswith("__main__.py") or flag.name.startswith("config."):
          delattr(flags.FLAGS, flag.name)
    flags.FLAGS.unparse_flags()
  out, err = capsys.readouterr()
  return Done(int(exit_.value.code or 0), out, err)
