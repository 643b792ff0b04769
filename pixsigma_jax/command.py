"""Start, progress and errors of every command.

A mistake in what the user gave ends in one line on stderr and exit code 1; a mistake in
the program keeps its traceback. Ctrl-C ends in one line, too, and exit code 130.
"""

import functools
import logging as python_logging
import pathlib
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NoReturn, TypeVar

import jax
from absl import app, flags, logging
from tqdm.auto import tqdm

from pixsigma_jax import disk

_PACKAGE = pathlib.Path(__file__).parent
_SECONDS_BETWEEN_LINES = 10

_TRACEBACK = flags.DEFINE_bool(
  "traceback", False, "Show where in the program an error arose."
)

INTERRUPTED = 130  # exit code: 128 + SIGINT, as shells have it

T = TypeVar("T")


class Interrupted(KeyboardInterrupt):
  """Ctrl-C where a command can say what is done and how to go on: its message."""


def run(main: Callable[[list[str]], None], positional: Sequence[str] = ()) -> None:
  """Parses the flags, runs `main` on the arguments that are `positional`, and exits.

  One line instead of a traceback is all that a user sees of: a file that cannot be
  opened or written (OSError), a ValueError or MemoryError that this package raised
  itself, and an exception of a type that this package defines. Ctrl-C is one line too,
  of what `Interrupted` says if `main` raises that. `--traceback` shows the rest.
  """
  handler = logging.get_absl_handler()
  if handler is not None:
    handler.addFilter(_is_for_the_user)
  app.run(functools.partial(_run, main, positional))


def keep_compiled() -> None:
  """Keeps compiled programs in a cache on the disk.

  In JAX's persistent cache: in `disk.user_cache`, or where JAX_COMPILATION_CACHE_DIR
  says.
  """
  if jax.config.values["jax_compilation_cache_dir"] is None:
    jax.config.update("jax_compilation_cache_dir", str(disk.user_cache() / "xla"))


def draws_bars() -> bool:
  """Whether progress bars can be shown: in a terminal or a notebook."""
  kernel = sys.modules.get("ipykernel.kernelapp")
  # Loaded is not running: whatever executes notebooks loads ipykernel as well.
  in_notebook = kernel is not None and kernel.IPKernelApp.initialized()
  return in_notebook or sys.stderr.isatty()


def progress(items: Iterable[T], total: int | None, what: str) -> Iterator[T]:
  """Yields `items` and shows how many: as a bar where `draws_bars`, else in lines.

  Args:
    total: how many there will be; None if that is not known.
  """
  if draws_bars():
    yield from tqdm(items, total=total, desc=what)
    return
  shown, done = time.monotonic(), 0
  of_all = "" if total is None else f" of {total}"
  for done, item in enumerate(items, 1):
    yield item
    if done == total or time.monotonic() - shown > _SECONDS_BETWEEN_LINES:
      shown = time.monotonic()
      logging.info("%s: %d%s", what, done, of_all)
  if total is None:
    logging.info("%s: %d", what, done)


def _run(
  main: Callable[[list[str]], None], positional: Sequence[str], argv: list[str]
) -> None:
  arguments = argv[1:]
  if len(arguments) > len(positional):
    raise app.UsageError(f"Not a flag: {' '.join(arguments[len(positional) :])}")
  if len(arguments) < len(positional):
    raise app.UsageError(f"Missing: {' '.join(positional[len(arguments) :])}")
  try:
    main(arguments)
  except KeyboardInterrupt as interrupt:
    if _TRACEBACK.value:
      raise
    if sys.stderr.isatty():  # where ^C, and perhaps a bar, stand in the line
      print(file=sys.stderr)
    said = str(interrupt) if isinstance(interrupt, Interrupted) else "by Ctrl-C."
    _end(f"Interrupted: {said}", INTERRUPTED)
  except Exception as error:
    if _TRACEBACK.value or not _is_users(error):
      raise
    _end(f"Error: {error}", 1)


def _end(message: str, code: int) -> NoReturn:
  logging.flush()
  print(" ".join(message.splitlines()), file=sys.stderr)
  sys.exit(code)


def _is_users(error: Exception) -> bool:
  """Whether an exception shows a mistake in the user's input."""
  if isinstance(error, OSError):
    return True
  if type(error).__module__.partition(".")[0] == _PACKAGE.name:
    return True
  # A ValueError out of NumPy or JAX is of our making: what a user can get wrong is
  # checked and worded by this package. So is what there is too little memory for.
  innermost = traceback.extract_tb(error.__traceback__)[-1]
  return isinstance(error, ValueError | MemoryError) and _is_ours(innermost.filename)


def _is_ours(filename: str) -> bool:
  return pathlib.Path(filename).is_relative_to(_PACKAGE)


def _is_for_the_user(record: python_logging.LogRecord) -> bool:
  # Orbax and Grain tell everything that they do at this level.
  return record.levelno != python_logging.INFO or _is_ours(record.pathname)
