"""A stage laid over machines, by shapes alone: nothing is made and nothing compiled."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from pixsigma_jax import sharding
from pixsigma_jax.data.buckets import BUCKETS
from pixsigma_jax.mesh_axes import CONTEXT, DATA, FSDP
from pixsigma_jax.models import attention, splash
from pixsigma_jax.models.pixart import PixArtConfig
from pixsigma_jax.plan import gpus
from pixsigma_jax.plan.topology import Topology
from pixsigma_jax.train import compatibility
from pixsigma_jax.train.config import call, complete, model_config
from pixsigma_jax.train.program import Program, abstract_batch, make_program

# No number of a plan depends on it; the program wants one.
SCALING_FACTOR = 0.13025
_PIXELS_A_TOKEN = 16


@dataclasses.dataclass(frozen=True)
class Stage:
  """A stage laid over machines, before it has devices.

  Attributes:
    config: of the stage, as a plain dict.
    topology: the machines.
    sizes: of the mesh's axes.
    program: what is computed, by shapes: on no mesh.
    state, batch: shapes and dtypes, over all devices.
    tokens: of an image, with what it is padded to.
  """

  config: Mapping[str, Any]
  topology: Topology
  sizes: Mapping[str, int]
  program: Program
  state: Any
  batch: Mapping[str, Any]
  tokens: int

  @property
  def model(self) -> PixArtConfig:
    """The network's hyper-parameters."""
    return self.program.model.config

  @property
  def mesh(self) -> AbstractMesh:
    """The mesh without its devices."""
    return AbstractMesh(tuple(self.sizes.values()), tuple(self.sizes))

  @functools.cached_property
  def places(self) -> Any:
    """Shardings of the state."""
    return self.state.shardings(self.mesh)

  @property
  def dtype(self) -> jnp.dtype:
    """Dtype of the operands of matrix products and attention."""
    return jnp.dtype(self.program.model.compute.dtype)

  @property
  def attention(self) -> str:
    """Implementation of attention on these machines, see `models/attention.py: best`.

    As layers have it that compress nothing: where no kernel knows the dtype, a layer
    of few enough scores has them all at once.
    """
    asked, platform = self.program.model.compute.attention, self.topology.platform
    if asked != "auto":
      return asked
    capability = gpus.capability(self.topology.kind) if platform == "gpu" else 0.0
    head = self.model.width // self.model.num_heads
    lengths = self.tokens, self.tokens
    return attention.best(platform, capability, self.dtype.name, *lengths, head)

  @property
  def our_kernels(self) -> bool:
    """Whether attention is done by `models/splash_kernels.py`."""
    # All of its tokens, as where heads are traded.
    head = self.model.width // self.model.num_heads
    return self.attention == "splash" and splash.has_room(
      self.tokens, head, self.topology.kind
    )

  @property
  def rows(self) -> int:
    """Number of images of which a device has all or a part in one forward pass."""
    parts = self.sizes[DATA] * self.sizes[FSDP] * self.config["accumulation"]
    return self.config["batch_size"] // parts

  @property
  def length(self) -> int:
    """Number of tokens of each image that a device has."""
    return self.tokens // self.sizes[CONTEXT]


def longest_sequence(model: PixArtConfig) -> int:
  """Tokens of the largest size of the resolution's table, or of the square."""
  square = (model.base_size * _PIXELS_A_TOKEN,) * 2
  table = BUCKETS.get(square[0], {1.0: square})
  return max(height * width for height, width in table.values()) // _PIXELS_A_TOKEN**2


def stage_on(config: Mapping[str, Any], topology: Topology, state: Any = None) -> Stage:
  """Lays a stage over machines, as `train` would.

  Args:
    state: shapes and dtypes of the state, if a stage of the same model, optimizer,
      averages and adapter has them: they take a second or more to find.

  Raises:
    ValueError: the config is not one, its attention does not compute in its dtype, or
      its batch or mesh do not fit the machines.
  """
  compatibility.check_config(config)
  config = complete(config)
  model = model_config(config["model"])
  batch_size, fields = config["batch_size"], dict(config["mesh"])
  slices = fields.pop("slices", None)
  if slices not in (sharding.CHOSEN, topology.slices, None):
    raise ValueError(
      f"config.mesh.slices={slices}, and these are {topology}: set it to "
      f"{sharding.CHOSEN}, or give --slices={slices}."
    )
  sizes, _ = call(
    sharding.sizes_over_slices,
    "mesh",
    fields,
    topology.count,
    slices=topology.slices,
    batch_size=batch_size // config["accumulation"],
    width=model.width,
  )
  mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
  compatibility.check_batch(batch_size, config["accumulation"], mesh)
  context = sizes[CONTEXT]
  tokens = sharding.split_length(longest_sequence(model), context, model.window)
  program = make_program(config, mesh=None, scaling_factor=SCALING_FACTOR)
  compute = program.model.compute
  attention.check_dtype(compute.attention, compute.dtype)
  return Stage(
    config=config,
    topology=topology,
    sizes=sizes,
    program=program,
    state=program.abstract_state() if state is None else state,
    batch=abstract_batch(model, batch_size=batch_size, sequence_length=tokens),
    tokens=tokens,
  )


def keys_of(stage: Stage, layer: int) -> int:
  """Number of keys that a token attends to in a layer, padding included."""
  compression = stage.model.kv_compression
  if layer not in compression.layers:
    return stage.tokens
  return stage.tokens // math.prod(compression.window)
