"""Roofline of a train step: its time by the machine's limits alone.

Each part takes as long as its arithmetic, on matrices padded to the chip's matrix unit,
or its bytes in memory, whichever is more; then come the bytes between devices, of which
those that arrive while something else is computed take no time of their own. What a
real chip does beside that is not in it: take the result for a floor under a step's
time. What real steps took beside it: `calibration.py`.
"""

import dataclasses
import math
from collections.abc import Mapping

from pixsigma_jax import tree
from pixsigma_jax.chips import Chip
from pixsigma_jax.mesh_axes import CONTEXT, DATA, FSDP
from pixsigma_jax.models import attention
from pixsigma_jax.models.flops import TRAINING, forward_flops
from pixsigma_jax.models.pixart import PixArtConfig
from pixsigma_jax.models.splash_kernels import TILE_ROWS, padded, tile_rows
from pixsigma_jax.plan import memory
from pixsigma_jax.plan.stage import Stage, keys_of

FLOAT, _HALF = 4, 2  # bytes of float32 and of bfloat16


@dataclasses.dataclass(frozen=True)
class Attention:
  """Cost of an implementation of attention.

  Attributes:
    backward: its arithmetic in the backward pass, in forward passes.
    forward, backward_scores: how often a query and key and head's score, or what is
      made of it, is written or read in memory: in float32, and in the compute dtype.
    kept: whether the backward pass needs no further forward pass once the output is
      kept (`remat: attention`).
  """

  backward: float
  forward_scores: tuple[int, int]
  backward_scores: tuple[int, int]
  kept: bool


# Forward: scores, their maximum, their exponentials as products take them, the sum:
# written and read again, unless a kernel keeps them. Backward: two products for each of
# forward's; one more where scores are made again; two where a kernel makes them twice.
ATTENTIONS: dict[str, Attention] = {
  "xla": Attention(2.0, (3, 2), (5, 3), False),
  "chunked": Attention(3.5, (3, 2), (8, 5), True),
  "splash": Attention(3.5, (0, 0), (0, 0), True),  # JAX's; ours: `Stage.our_kernels`
  "cudnn": Attention(2.5, (0, 0), (0, 0), True),
}


@dataclasses.dataclass(frozen=True)
class Part:
  """A part of a step, on one device.

  Attributes:
    flops: that the machine does, padding and recomputation among them.
    bytes: read and written in its memory.
    seconds: that it takes.
    bound: "compute" or "memory".
  """

  flops: float
  bytes: float
  seconds: float
  bound: str


@dataclasses.dataclass(frozen=True)
class Transfer:
  """Communication volume that a device receives in a step, for one purpose.

  Attributes:
    axis: of the mesh.
    network: "link" within a slice or a box, "network" between them.
    overlaps: whether it arrives while something is computed that does not wait for it.
  """

  axis: str
  network: str
  bytes: float
  seconds: float
  overlaps: bool


@dataclasses.dataclass(frozen=True)
class Time:
  """A step by its parts.

  Attributes:
    needed: operations that the model needs for the batch, forward and backward.
    ceiling: the share of the peak that padding to the matrix unit leaves.
  """

  parts: Mapping[str, Part]
  transfers: Mapping[str, Transfer]
  seconds: float
  needed: float
  ceiling: float


def needed(model: PixArtConfig) -> dict[str, float]:
  """Operations of a square image's forward pass by part, see `models/flops.py`."""
  return forward_flops(model, (model.base_size, model.base_size), model.caption_length)


def padding(unit: int, *sides: int) -> float:
  """Factor of extra products in a matrix unit whose sides are not filled."""
  return math.prod(padded(side, unit) / side for side in sides)


def ceiling(
  model: PixArtConfig,
  unit: int,
  *,
  our_kernels: bool = False,
  training: bool = True,
  itemsize: int = _HALF,
) -> float:
  """The share of the peak that padding matrices to the unit leaves.

  Args:
    our_kernels: attention by `models/splash_kernels.py`, of whose products many take
      the head's width as it is: one of two forward, three of four backward that a step
      needs.
    training: backward too.
    itemsize: bytes of what products take, which our kernels' rows depend on.
  """
  saved = 1.0
  if our_kernels:
    forward, backward = narrow(model, unit, itemsize)
    saved = (2 + forward + 3 * backward) / 6 if training else (1 + forward) / 2
  parts = needed(model)
  multiplied = sum(
    flops * padding_of(name, model, unit) * (saved if name in _ATTENTIONS else 1)
    for name, flops in parts.items()
  )
  return sum(parts.values()) / multiplied


_ATTENTIONS = ("attention", "cross-attention")  # their own products


def narrow(model: PixArtConfig, unit: int, itemsize: int) -> tuple[float, float]:
  """Cost of a product with the head's width in rows over one padded to `unit`.

  Forward and backward, see `models/splash_kernels.py`.
  """
  head = model.width // model.num_heads
  # Forward there are ones beside the values, in rows of bfloat16's whatever the dtype.
  forward, backward = padding(TILE_ROWS, head), padding(tile_rows(itemsize), head)
  return forward / padding(unit, head), backward / padding(unit, head)


def padding_of(name: str, model: PixArtConfig, unit: int) -> float:
  """Factor of extra products of a part of `needed`."""
  width, head = model.width, model.width // model.num_heads
  hidden = round(width * model.mlp_ratio)
  return {
    "attention": padding(unit, head),
    "cross-attention": padding(unit, head, model.caption_length),
    "mlp": padding(unit, width, hidden),
    "caption projection": padding(unit, width, model.caption_width),
    "patches in and out": 1.0,  # bound by memory, and little
    "kv compression": 1.0,  # not a matrix product
  }.get(name, padding(unit, width, width))


def step_time(stage: Stage) -> Time:
  """The model of one train step."""
  chip = stage.topology.chip
  parts = _parts(stage, chip)
  transfers = _transfers(stage, chip)
  computing = sum(part.seconds for part in parts.values())
  hidden = sum(t.seconds for t in transfers.values() if t.overlaps)
  exposed = sum(t.seconds for t in transfers.values() if not t.overlaps)
  seconds = max(computing, hidden) + exposed
  total = TRAINING * sum(needed(stage.model).values()) * stage.config["batch_size"]
  return Time(
    parts=parts,
    transfers=transfers,
    seconds=seconds,
    needed=total,
    ceiling=ceiling(
      *(stage.model, chip.matrix_unit),
      our_kernels=stage.our_kernels,
      itemsize=stage.dtype.itemsize,
    ),
  )


def _parts(stage: Stage, chip: Chip) -> dict[str, Part]:
  model, compute = stage.model, stage.program.model.compute
  itemsize = stage.dtype.itemsize
  remat = compute.remat != "none"
  passes = TRAINING + remat
  accumulation = stage.config["accumulation"]
  # Of the whole batch, in this device's part of rows and tokens.
  rows = stage.rows * accumulation / stage.sizes[CONTEXT]
  tokens = float(stage.rows * accumulation * stage.length)
  kind, backward = ATTENTIONS[stage.attention], ATTENTIONS[stage.attention].backward
  forward = 1.0
  if stage.our_kernels:  # of two and five products, one and three are narrow
    of_forward, of_backward = narrow(model, chip.matrix_unit, itemsize)
    forward, backward = (1 + of_forward) / 2, (2 + 3 * of_backward) / 2
  again = remat and not (compute.remat in ("attention", "offload") and kind.kept)

  flops = {
    name: rows * count * padding_of(name, model, chip.matrix_unit)
    for name, count in needed(model).items()
  }
  # Padding to the longest sequence is computed as well.
  longer = stage.tokens / model.base_size**2
  of_attention = (1 + again) * forward + backward
  scores = {
    "attention": sum(keys_of(stage, layer) for layer in range(model.depth)),
    "cross-attention": model.caption_length * model.depth,
  }
  parts: dict[str, tuple[float, float]] = {}
  for name, keys in scores.items():
    each = zip(kind.forward_scores, kind.backward_scores, strict=True)
    float32, rounded = ((1 + again) * there + back for there, back in each)
    touched = FLOAT * float32 + itemsize * rounded
    # Queries, keys, values and output; backward, their gradients too.
    operands = 4 * itemsize * tokens * model.width * model.depth * (1 + again + 2)
    stretch = longer**2 if name == "attention" else longer
    parts[name] = (
      flops.pop(name) * stretch * of_attention,
      tokens * keys * model.num_heads * touched + operands,
    )
  parts["matrix products"] = (
    sum(flops.values()) * longer * passes,
    passes * products_bytes(model, tokens, itemsize, accumulation),
  )
  parts["norms and residuals"] = (0.0, passes * norms_bytes(model, tokens, itemsize))
  fixed = memory.fixed(stage)
  state = sum(fixed[name] for name in ("parameters", "optimizer", "averages"))
  parts["optimizer and averages"] = (0.0, 2.0 * (state + memory.gradients(stage)))
  return {name: _part(stage, chip, *costs) for name, costs in parts.items()}


def products_bytes(
  model: PixArtConfig, tokens: float, itemsize: int, turns: int = 1
) -> float:
  """Bytes that matrix products of all blocks touch in a forward pass on a device.

  Args:
    tokens: of all images, in all turns.
    turns: how often the weights are read.
  """
  # Of a block, for each token, in widths: what its eight matrix products read and
  # write, in its dtype or, where the residual stream is next, in float32.
  hidden = model.mlp_ratio
  each = itemsize * (1 + 3 + 1 + 1 + 1 + 1 + 1 + 2 * hidden) + 3 * FLOAT
  weights = itemsize * (8 + 2 * hidden) * model.width**2 * turns
  return model.depth * (tokens * model.width * each + weights)


def norms_bytes(model: PixArtConfig, tokens: float, itemsize: int) -> float:
  """Bytes that norms and residual sums of all blocks touch in a forward pass."""
  # Norms read the stream and write what products take; sums read it, a branch, and
  # write it.
  stream = 3 * (FLOAT + itemsize) + 3 * 3 * FLOAT
  return model.depth * tokens * model.width * stream


def _part(stage: Stage, chip: Chip, flops: float, touched: float) -> Part:
  compute, moving = flops / chip.peak(stage.dtype), touched / chip.bandwidth
  bound = "compute" if compute >= moving else "memory"
  return Part(flops, touched, max(compute, moving), bound)


def _transfers(stage: Stage, chip: Chip) -> dict[str, Transfer]:
  """Bytes between devices. Of n that share X, each receives X · (n - 1) / n."""
  model, sizes = stage.model, stage.sizes
  fsdp, context = sizes[FSDP], sizes[CONTEXT]
  slices = stage.topology.slices
  remat = stage.program.model.compute.remat != "none"
  accumulation = stage.config["accumulation"]
  trained = tree.size(stage.state.params)
  used = tree.size(stage.state.frozen) if stage.program.lora else trained
  gradients = memory.gradients(stage)
  itemsize = stage.dtype.itemsize
  token = itemsize * stage.rows * accumulation * model.width
  gathered, traded = _shared_tokens(stage)
  replicas = sizes[DATA] // slices * context
  counted = {
    # Forward, again if a block is recomputed, and backward.
    "gather parameters": (
      FSDP,
      "link",
      (2 + remat) * accumulation * itemsize * used,
      fsdp,
      True,
    ),
    "scatter gradients": (FSDP, "link", accumulation * FLOAT * trained, fsdp, True),
    "gather keys and values": (CONTEXT, "link", gathered * token, context, False),
    "sum gradients": (DATA, "link", 2.0 * gradients, replicas, False),
    "sum gradients over slices": (DATA, "network", 2.0 * gradients, slices, False),
  }
  transfers = {}
  for name, (axis, network, size, count, overlaps) in counted.items():
    if count > 1:
      received = size * (count - 1) / count
      rate = chip.link if network == "link" else chip.network
      transfers[name] = Transfer(axis, network, received, received / rate, overlaps)
  if traded:
    size = traded * token
    received = size / context * (context - 1) / context
    # A quarter of the bytes cross the middle link of chips in a line.
    passed = size / 4 if stage.topology.platform == "tpu" else received
    transfers["trade tokens for heads"] = Transfer(
      CONTEXT, "link", received, passed / chip.link, False
    )
  return transfers


def _shared_tokens(stage: Stage) -> tuple[float, float]:
  """Bytes of an image in a step: gathered as keys and values, or traded for heads.

  Counted forward, again if a block is recomputed, and backward, where they are
  gradients. What a kernel returned may be kept; it is sent again all the same.
  """
  compute, context = stage.program.model.compute, stage.sizes[CONTEXT]
  again = compute.remat != "none"
  gathered = traded = 0.0
  for layer in range(stage.model.depth):
    n, m = stage.tokens, keys_of(stage, layer)
    if attention.trades_heads(n, m, stage.model.num_heads, context):
      traded += (2 + again) * 2 * (n + m)
    else:
      gathered += (2 + again) * 2 * m
  return gathered, traded
