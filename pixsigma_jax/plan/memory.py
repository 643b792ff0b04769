"""Memory of a device during a train step.

State and batch follow from shapes and shardings, to the byte. What a step needs beside
them is the compiler's to say; `estimate` is for where nothing is compiled.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from pixsigma_jax import sharding, tree
from pixsigma_jax.mesh_axes import FSDP
from pixsigma_jax.models.pixart import PixArtConfig
from pixsigma_jax.plan.stage import Stage, keys_of

_FLOAT = 4


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of one device, by what they hold.

  Attributes:
    parameters, optimizer, averages, frozen, batch: as the shardings divide them;
      `frozen` is a model whose adapter is trained.
    gradients: of what is trained, in float32.
    temporary: activations and whatever else a step makes, but for the gradients.
    code: the program's own.
    compiled: whether the compiler says so, or `estimate`.
  """

  parameters: int
  optimizer: int
  averages: int
  frozen: int
  batch: int
  gradients: int
  temporary: int
  code: int
  compiled: bool

  @property
  def total(self) -> int:
    """Total bytes at the step's peak."""
    parts = dataclasses.asdict(self)
    del parts["compiled"]
    return sum(parts.values())


class DoesNotFitError(Exception):
  """A step takes more than a device's memory."""


_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def is_too_large(message: str) -> bool:
  """Whether a compiler's message says that a program does not fit a TPU's memory.

  It may also run out of what a core has for itself (VMEM): that is the kernel's fault.
  """
  return message.startswith("RESOURCE_EXHAUSTED") and "hbm" in message.lower()


def wanted(message: str) -> int | None:
  """Bytes of temporaries that the compiler asked for in vain; None if it does not say.

  It says so in one place: "… required for HLO temporaries (29.31G) exceeds …".
  """
  match = re.search(r"temporaries \(([\d.]+)([KMGT])\)", message)
  return round(float(match[1]) * _UNITS[match[2]]) if match else None


def bytes_a_device(leaves: Any, places: Any) -> int:
  """Bytes of a tree's arrays on one device, by their shardings."""
  sizes = jax.tree.map(
    lambda leaf, place: (
      math.prod(place.shard_shape(leaf.shape)) * _itemsize(leaf.dtype)
    ),
    leaves,
    places,
  )
  return sum(jax.tree.leaves(sizes))


def _itemsize(dtype: Any) -> int:
  # A key of JAX is two words, which its dtype does not say.
  return 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize


def fixed(stage: Stage) -> dict[str, int]:
  """Bytes that a device holds before and after a step, by the names of `Memory`."""
  state, mesh = stage.state, stage.mesh
  places = state.shardings(mesh)
  parts = {
    "parameters": bytes_a_device(state.params, places.params),
    "optimizer": bytes_a_device(state.opt_state, places.opt_state),
    "averages": bytes_a_device(state.ema_params, places.ema_params),
    "frozen": 0,
    "batch": bytes_a_device(stage.batch, sharding.batch_shardings(stage.batch, mesh)),
  }
  if stage.program.lora:
    parts["frozen"] = bytes_a_device(state.frozen, places.frozen)
  if stage.program.ema.offload:
    parts["averages"] = 0  # they lie in the host's memory
  return parts


def gradients(stage: Stage) -> int:
  """Bytes of a device's part of the gradients."""
  params = stage.state.params
  places = tree.named_leaves(sharding.shardings(params, stage.mesh))
  return sum(
    math.prod(places[name].shard_shape(leaf.shape)) * _FLOAT
    for name, leaf in tree.named_leaves(params).items()
  )


def _working_set(itemsize: int) -> int:
  """Working set of a block's backward pass for each token, in bytes and widths.

  The MLP's hidden layer and its gradient, queries, keys and values with theirs: in
  float32 and as products take them; and the residual stream with its.
  """
  both = _FLOAT + itemsize
  return 2 * 4 * both + 2 * 3 * both + 4 * _FLOAT


def estimate(stage: Stage) -> Memory:
  """Estimate without a compiler: kept activations and one block's working set.

  Good for ranking meshes; compilers differ from it by tens of percent either way.
  """
  model, compute = stage.model, stage.program.model.compute
  itemsize = stage.dtype.itemsize
  rows_and_tokens = stage.rows * stage.length
  each = rows_and_tokens * model.width
  work = each * _working_set(itemsize)
  work += _scores(stage, range(model.depth), of_all=False)
  if compute.remat == "none":
    kept = model.depth * work
    if stage.attention == "xla":
      kept += _scores(stage, range(model.depth), of_all=True)
  elif compute.remat == "offload":
    kept = 0  # it waits in the host's memory
  else:
    kept = model.depth * each * _FLOAT
    if compute.remat == "attention":  # outputs, and each query's sum by head
      sums = rows_and_tokens * model.num_heads * _FLOAT
      kept += model.depth * 2 * (each * itemsize + sums)
  # A block's matrices are gathered before they are used, and so is their gradient.
  gathered = _block_parameters(model) * (itemsize + _FLOAT) * (stage.sizes[FSDP] > 1)
  return Memory(
    **fixed(stage),
    gradients=gradients(stage),
    temporary=kept + work + gathered,
    code=0,
    compiled=False,
  )


def _scores(stage: Stage, layers: range, *, of_all: bool) -> int:
  """Attention's scores in float32, and their softmax: of all layers or of the worst."""
  if stage.attention != "xla":
    return 0
  each = [
    stage.rows * stage.model.num_heads * stage.length * keys_of(stage, layer)
    for layer in layers
  ]
  return (sum(each) if of_all else max(each)) * (_FLOAT + stage.dtype.itemsize)


def _block_parameters(model: PixArtConfig) -> int:
  return round((8 + 2 * model.mlp_ratio) * model.width**2)


def in_use(compiled: Any) -> int:
  """Peak bytes of a device during a compiled program, without its code."""
  stats = compiled.memory_analysis()
  # Its own sum of what is temporary misleads both ways: libtpu 0.0.42 counts gaps of a
  # train step, beyond what it itself allows, and a tenth of what a sampler's loop uses.
  if stats.peak_memory_in_bytes:
    return stats.peak_memory_in_bytes
  # Arguments, padded to the chip's tiles, that are not donated to results stay.
  arguments = stats.argument_size_in_bytes
  results = stats.output_size_in_bytes - stats.alias_size_in_bytes
  return arguments + results + stats.temp_size_in_bytes


def of_compiled(stage: Stage, compiled: Any) -> Memory:
  """Memory as the compiler reports it, split by what `fixed` knows."""
  parts, grads = fixed(stage), gradients(stage)
  temporary = max(in_use(compiled) - sum(parts.values()), 0)
  grads = min(grads, temporary)
  return Memory(
    **parts,
    gradients=grads,
    temporary=temporary - grads,
    code=compiled.memory_analysis().generated_code_size_in_bytes,
    compiled=True,
  )
