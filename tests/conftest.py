"""What every test runs under."""

import contextlib
import gc
import os
import pathlib
import re
import shutil
import tempfile
from importlib import metadata

# Programs for TPUs cannot be read back from it where there is none.
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

import hypothesis
import jax
import pytest

from tests import compilation

jax.config.update("jax_num_cpu_devices", 8)  # a mesh to shard over, anywhere
jax.config.update("jax_numpy_rank_promotion", "raise")  # broadcasts are written out
jax.config.update("jax_default_matmul_precision", "highest")

# Same examples each run; no wall-clock deadline on a busy machine.
hypothesis.settings.register_profile("house", deadline=None, derandomize=True)
hypothesis.settings.load_profile("house")


def pytest_configure(config):
  """Keeps all on the CPU, unless `-m accelerator` asks for what the machine has."""
  if not hasattr(config, "workerinput"):
    programs = tempfile.mkdtemp(prefix="pixsigma_jax_programs_")
    os.environ[compilation.DIRECTORY] = programs
  if config.getoption("markexpr").strip() == "accelerator":
    return
  # A libtpu that was installed beside another version of JAX would crash its profiler,
  # and each process that a test starts would look for a TPU first.
  os.environ["JAX_PLATFORMS"] = "cpu"
  jax.config.update("jax_platforms", "cpu")


def pytest_addoption(parser):
  parser.addoption(
    "--kills", type=int, default=4, help="SIGKILLs that a run of the suite survives"
  )
  parser.addoption(
    "--bodies", type=int, default=200, help="Random bodies that a server is sent"
  )


def pytest_unconfigure(config):
  if not hasattr(config, "workerinput"):
    shutil.rmtree(os.environ.pop(compilation.DIRECTORY))


# Linux gives a process 65,530 mappings, a program takes a dozen, and JAX forgets none:
# LLVM aborts when there are no more.
_MANY_MAPPINGS = 25_000


def _forget_programs():
  mappings = pathlib.Path("/proc/self/maps")
  if mappings.exists() and mappings.read_bytes().count(b"\n") > _MANY_MAPPINGS:
    jax.clear_caches()
    gc.collect()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
  # Around the setup of its module's fixtures too. What a test compiles for other
  # devices it compiles as users do.
  others = {"libtpu", "cuda_plugin"} & set(getattr(item, "fixturenames", ()))
  on_cpu = jax.config.values["jax_platforms"] == "cpu" and not others
  quick = on_cpu and item.get_closest_marker("optimized") is None
  with compilation.quick() if quick else contextlib.nullcontext():
    result = yield
  if nextitem is None or nextitem.path != item.path:  # module's fixtures are gone
    _forget_programs()
  return result


@pytest.fixture(scope="session")
def libtpu():
  """The version of libtpu, which describes TPUs and compiles for them, anywhere."""
  pytest.importorskip("libtpu")
  have = metadata.version("libtpu")
  [pinned] = [line for line in metadata.requires("jax") or () if "libtpu" in line]
  wanted = re.match(r"libtpu==([\d.]+?)\.?\*", pinned)[1]
  if not f"{have}.".startswith(f"{wanted}."):
    pytest.skip(f"libtpu {have} crashes the profiler of a JAX that pins {wanted}")
  return have


@pytest.fixture(scope="session")
def cuda_plugin():
  """Whether JAX's CUDA plugin is here, which compiles for GPUs without one."""
  for module in ("jax_plugins.xla_cuda13", "nvidia.cu13", "nvidia.cudnn"):
    pytest.importorskip(module, reason="JAX's CUDA plugin is not installed")


@pytest.fixture
def key():
  return jax.random.key(0)
