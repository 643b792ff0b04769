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
from pixsigma_jax.mesh_axes import CONTEXT, FSDP
from pixsigma_jax.models import attention
from pixsigma_jax.models.kv_compression import KVCompression
from pixsigma_jax.models.pixart import PixArtConfig, segment_name
from pixsigma_jax.models.splash_kernels import padded
from pixsigma_jax.plan.stage import Stage

_FLOAT = 4
# Fitted on libtpu's programs that `tests/plan/compiled.jsonl` calls fitted: bytes of a
# program for each run of equal layers, and numbers for each token and unit of width.
_CODE = 46 * 2**20
_AROUND_ATTENTION = 6.5
_LANES = 128  # a TPU stores the last axis of an array in whole ones


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
  state, places = stage.state, stage.places
  parts = {
    "parameters": bytes_a_device(state.params, places.params),
    "optimizer": bytes_a_device(state.opt_state, places.opt_state),
    "averages": bytes_a_device(state.ema_params, places.ema_params),
    "frozen": 0,
    "batch": bytes_a_device(
      stage.batch, sharding.batch_shardings(stage.batch, stage.mesh)
    ),
  }
  if stage.program.lora:
    parts["frozen"] = bytes_a_device(state.frozen, places.frozen)
  if stage.program.ema.offload:
    parts["averages"] = 0  # they lie in the host's memory
  return parts


def gradients(stage: Stage) -> int:
  """Bytes of a device's part of the gradients."""
  return sum(_parts(stage.state.params, stage.places.params).values())


def _parts(params: Any, places: Any) -> dict[str, int]:
  """Bytes of a device's part of float32 arrays like the parameters, by their names."""
  placed = tree.named_leaves(places)
  return {
    name: math.prod(placed[name].shard_shape(leaf.shape)) * _FLOAT
    for name, leaf in tree.named_leaves(params).items()
  }


def estimate(stage: Stage) -> Memory:
  """Estimate without a compiler: the most that is alive in the backward pass.

  That is where it enters a run of equal layers (`PixArtConfig.segments`): all that this
  run and those before it keep is there, and the gradients of this run and those after
  it. The update comes later, when nothing is kept any more, and takes less.
  """
  model, grads = stage.model, _parts(stage.state.params, stage.places.params)
  alive = peak = 0
  for layers, compression in model.segments():
    alive += len(layers) * _kept(stage, compression)
    peak = max(peak, alive + _working_set(stage, compression))
    own = f"{segment_name(layers)}/"  # its gradients come after those of later layers
    alive -= sum(size for name, size in grads.items() if name.startswith(own))
  total = sum(grads.values())
  code = 0
  if stage.topology.platform == "tpu":
    code = _loops(stage) * _CODE * len(model.segments())
  summed = total if stage.config["accumulation"] > 1 else 0
  return Memory(
    **fixed(stage),
    gradients=total,
    temporary=max(peak + summed + _throughout(stage), 0),
    code=code,
    compiled=False,
  )


def _throughout(stage: Stage) -> int:
  """Bytes that the whole backward pass needs, whatever it keeps of the layers."""
  model, itemsize, operand = stage.model, stage.dtype.itemsize, _operand(stage)
  used = "frozen" if stage.program.lora else "params"
  parts = _parts(getattr(stage.state, used), getattr(stage.places, used))
  kernels = sum(size for name, size in parts.items() if name.endswith("/kernel"))
  # Compilers round all matrices once, before the loops that use them.
  remat = stage.program.model.compute.remat != "none"
  again = remat or stage.config["accumulation"] > 1
  rounded = kernels * operand // _FLOAT if again and operand < _FLOAT else 0
  # The stream's gradient, and the last layer's input.
  stream = _tokens(stage) * model.width * (_FLOAT + operand)
  # Of the caption projection: embeddings, the layer within, and what comes out: for the
  # blocks, and for its own gradient, which is summed over them.
  captions = stage.rows * model.caption_length
  caption = model.caption_width * operand + model.width * (_FLOAT + 3 * itemsize)
  return rounded + stream + captions * caption


def _operand(stage: Stage) -> int:
  """Bytes of a number that a matrix product takes: a TPU rounds float32."""
  most = 2 if stage.topology.platform == "tpu" else _FLOAT
  return min(stage.dtype.itemsize, most)


def _tokens(stage: Stage) -> int:
  """Number of tokens that a device has at a time, of all its images."""
  return stage.rows * stage.length


def _keys(stage: Stage, compression: KVCompression) -> int:
  """Number of keys that a device attends to at a time in a layer, of all its images."""
  context = stage.sizes[CONTEXT]
  keys = stage.tokens // math.prod(compression.window)
  trades = attention.trades_heads(stage.tokens, keys, stage.model.num_heads, context)
  return stage.rows * keys // (context if trades else 1)


def _width_of_heads(stage: Stage) -> int:
  """Width of all heads in memory: where JAX's kernels have each in lanes, they fill."""
  model = stage.model
  if stage.attention != "splash" or stage.our_kernels:
    return model.width
  return model.num_heads * padded(model.width // model.num_heads, _LANES)


def _kept(stage: Stage, compression: KVCompression) -> int:
  """Bytes that a layer keeps for its backward pass: what JAX makes a loop return."""
  model, remat = stage.model, stage.program.model.compute.remat
  tokens, itemsize, operand = _tokens(stage), stage.dtype.itemsize, _operand(stage)
  if remat == "offload":
    return 0  # it waits in the host's memory
  stream = tokens * model.width * _FLOAT
  # Attention's output, and each query's sum by head: of both attentions.
  heads = _width_of_heads(stage)
  outputs = 2 * tokens * (heads * itemsize + model.num_heads * _FLOAT)
  if remat != "none":
    return stream + (outputs if remat == "attention" else 0)
  # In float32 eight of norms and gates, and five, as wide as the MLP's hidden layer, of
  # its GELU. What products multiply: five, and what the GELU returns.
  kept = (8 + 5 * model.mlp_ratio) * stream
  kept += (5 + model.mlp_ratio) * tokens * model.width * operand
  # Of both attentions; captions are padded to a kernel's blocks.
  captions = stage.rows * padded(model.caption_length, _LANES)
  keys_and_values = 2 * (_keys(stage, compression) + captions)
  kept += outputs + (2 * tokens + keys_and_values) * heads * itemsize
  if compression.layers:  # of keys and values each, a window's tokens, three of a norm
    window = math.prod(compression.window)
    kept += 2 * (window + 3) * (tokens // window) * model.width * _FLOAT
  if stage.sizes[FSDP] > 1 or operand < _FLOAT:  # matrices as they are multiplied
    kept += _block_parameters(model) * operand
  return round(kept) + _scores(stage, compression)


def _working_set(stage: Stage, compression: KVCompression) -> int:
  """Bytes that a layer's backward pass needs at a time, beside what layers keep."""
  model, itemsize, operand = stage.model, stage.dtype.itemsize, _operand(stage)
  hidden = model.mlp_ratio
  if stage.program.model.compute.remat == "none":
    # The GELU's five, out of all layers', and the gradient.
    each = hidden * (5 * _FLOAT + operand) + itemsize
  else:
    # The MLP's hidden layer and its gradient. Where products merge rows and tokens the
    # latter comes in float32, and what the GELU returned is there too.
    merged = stage.sizes[CONTEXT] == 1
    each = hidden * (2 * _FLOAT + operand if merged else _FLOAT + operand)
    # Three of the stream, and what comes in and out of attention.
    each += 3 * _FLOAT + _AROUND_ATTENTION * itemsize
  work = _loops(stage) * _tokens(stage) * model.width * each
  # A block's matrices are gathered before they are used, and the gradients of the MLP's
  # two are there before they are scattered.
  work += _block_parameters(model) * operand
  if stage.sizes[FSDP] > 1:
    work += 2 * hidden * model.width**2 * _FLOAT
  return round(work) + _scores(stage, compression)


def _loops(stage: Stage) -> int:
  """Number of loops over layers that are at work at a time.

  Over several slices XLA takes a layer out of each loop, so as to send while it
  computes, and begins the next loop's before a loop has ended.
  """
  over_slices = stage.topology.platform == "tpu" and stage.topology.slices > 1
  return 2 if over_slices else 1


def _scores(stage: Stage, compression: KVCompression) -> int:
  """Attention's scores in float32, and their softmax as products take it."""
  if stage.attention != "xla":
    return 0
  keys = stage.tokens // math.prod(compression.window)
  numbers = stage.rows * stage.model.num_heads * stage.length * keys
  itemsize = stage.dtype.itemsize
  return numbers * (_FLOAT + (itemsize if itemsize < _FLOAT else 0))


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
