"""How tests compile for the CPU: once for all of them, and without LLVM's last efforts.

A test's programs run for milliseconds and take seconds to compile. The directory of
compiled programs is one for all workers and for the processes that tests start, and is
gone when the tests have ended.
"""

import contextlib
import os

import jax
from jax.experimental.compilation_cache import compilation_cache

# Set by `tests/conftest.py` before there are workers, and inherited by them.
DIRECTORY = "PIXSIGMA_JAX_TEST_PROGRAMS"


def environment():
  """Variables by which another process compiles in the same way."""
  return {
    "JAX_COMPILATION_CACHE_DIR": os.environ[DIRECTORY],
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
  }


@contextlib.contextmanager
def quick():
  """The same for this process, for a while."""
  options = {
    "jax_compilation_cache_dir": os.environ[DIRECTORY],
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_disable_most_optimizations": True,
  }
  before = {name: jax.config.values[name] for name in options}
  try:
    _update(options)
    yield
  finally:
    _update(before)


def _update(options):
  if all(jax.config.values[name] == value for name, value in options.items()):
    return
  for name, value in options.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()  # which has kept the directory it began with
