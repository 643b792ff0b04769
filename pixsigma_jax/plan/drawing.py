"""Roofline of drawing one image on several devices: its time, and what they exchange.

As `roofline.py` has it of a train step: each part of a call of the network takes as
long as its arithmetic or its bytes in memory, whichever is more. Keys and values, heads
traded for tokens, and the predictions of guidance's branches arrive while nothing else
is computed. Latency is not in it: how long the first byte takes, in every layer. Nor
are the text encoder and the autoencoder.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from pixsigma_jax.mesh_axes import CONTEXT, GUIDANCE, SAMPLING_AXES
from pixsigma_jax.models import attention, splash
from pixsigma_jax.models.flops import forward_flops
from pixsigma_jax.models.pixart import PixArtConfig
from pixsigma_jax.models.tokens import Grid
from pixsigma_jax.plan import gpus, roofline
from pixsigma_jax.plan.topology import Topology
from pixsigma_jax.sample import devices, program
from pixsigma_jax.sample.settings import Settings

_DEFAULTS = Settings()
STEPS, BRANCHES = _DEFAULTS.num_inference_steps, _DEFAULTS.branches

# Token rows and columns; UHD is 3840 x 2160 pixels.
SIZES: dict[str, Grid] = {
  "1K": (64, 64),
  "2K": (128, 128),
  "UHD": (135, 240),
  "4096²": (256, 256),
}


@dataclasses.dataclass(frozen=True)
class Drawn:
  """An image that some devices draw together, from noise to latents.

  Attributes:
    guidance, context: sizes of the mesh's axes.
    tokens: of a sequence, padded.
    seconds: that it takes, `exchange` of it waiting for other devices.
    sent: bytes that collectives leave on a device, its own share among them, as
      `hlo.read` counts them.
  """

  guidance: int
  context: int
  tokens: int
  seconds: float
  exchange: float
  sent: float

  @property
  def count(self) -> int:
    """Number of devices."""
    return self.guidance * self.context


def splits(count: int) -> list[tuple[int, int]]:
  """Sizes of `guidance` and `context` that use so many devices for one image."""
  return [(size, count // size) for size in (1, BRANCHES) if count % size == 0]


def by_count(
  model: PixArtConfig, grid: Grid, machines: Topology, dtype: str
) -> list[Drawn]:
  """The best split for each power of two of devices of one slice or box."""
  counts = [2**i for i in range(machines.per_slice.bit_length())]
  return [
    min(
      (drawn(model, grid, machines, dtype, *split) for split in splits(count)),
      key=lambda one: one.seconds,
    )
    for count in counts
  ]


def drawn(
  model: PixArtConfig,
  grid: Grid,
  machines: Topology,
  dtype: str,
  guidance: int,
  context: int,
) -> Drawn:
  """The model of one guided image of that many token rows and columns."""
  chip, itemsize = machines.chip, jnp.dtype(dtype).itemsize
  n = devices.padded_length(model, grid, {GUIDANCE: guidance, CONTEXT: context})
  mesh = AbstractMesh((1, 1, guidance, context), SAMPLING_AXES)
  passes = program.passes_by_size(1, n, mesh)
  calls = 1 if passes == 1 else BRANCHES // guidance
  rows = BRANCHES // guidance // calls  # images of a call, on a device
  parts = _parts(model, grid, machines, dtype, n, context)
  # Weights are read once a call, all else for each image.
  seconds = 0.0
  for flops, touched, weights in parts:
    computing = rows * flops / chip.peak(dtype)
    seconds += max(computing, (rows * touched + weights) / chip.bandwidth)
  gathered, traded = 0, 0
  if context > 1:
    for keys in _keys(model, n):
      if attention.trades_heads(n, keys, model.num_heads, context):
        traded += 2 * (n + keys)
      else:
        gathered += 2 * keys
  token = rows * itemsize * model.width
  others = (context - 1) / context
  # A quarter of what is traded crosses the middle link of chips in a line.
  on_link = 1 / 4 if machines.platform == "tpu" else others / context
  exchange = (gathered * others + traded * on_link) * token / chip.link
  sent = (gathered + traded / context) * token
  # Each branch's noise, in float32, of the tokens that a device has.
  noise = roofline.FLOAT * model.patch_size**2 * model.in_channels
  joined = BRANCHES * n / context * noise if guidance > 1 else 0.0
  joining = joined * (guidance - 1) / guidance / chip.link
  return Drawn(
    guidance=guidance,
    context=context,
    tokens=n,
    seconds=STEPS * (calls * (seconds + exchange) + joining),
    exchange=STEPS * (calls * exchange + joining),
    sent=STEPS * (calls * sent + joined),
  )


def _keys(model: PixArtConfig, n: int) -> list[int]:
  """Keys of each layer's self-attention, padding included."""
  compression = model.kv_compression
  merged = n // math.prod(compression.window)
  return [merged if i in compression.layers else n for i in range(model.depth)]


def _parts(
  model: PixArtConfig,
  grid: Grid,
  machines: Topology,
  dtype: str,
  n: int,
  context: int,
) -> list[tuple[float, float, float]]:
  """Operations, bytes, and bytes of weights of a call's parts, on a device.

  Captions are not in it: their keys and values are made once, before the first step.
  """
  chip, itemsize = machines.chip, jnp.dtype(dtype).itemsize
  tokens, t = n / context, model.caption_length
  head, unit = model.width // model.num_heads, chip.matrix_unit
  capability = gpus.capability(machines.kind) if machines.platform == "gpu" else 0.0
  platform = machines.platform
  name = attention.best(platform, capability, jnp.dtype(dtype).name, n, n, head)
  kind, narrow = roofline.ATTENTIONS[name], 1.0
  if name == "splash" and splash.has_room(n, head, machines.kind):
    narrow = (1 + roofline.narrow(model, unit, itemsize)[0]) / 2
  flops = forward_flops(model, grid, t)
  del flops["caption projection"]
  flops["cross-attention projections"] -= 4.0 * t * model.width**2 * model.depth
  stretch = n / math.prod(grid)
  padded = {
    part: count / context * stretch * roofline.padding_of(part, model, unit)
    for part, count in flops.items()
  }
  float32, rounded = kind.forward_scores
  touched = roofline.FLOAT * float32 + itemsize * rounded
  # Queries, keys, values and output of both attentions.
  operands = 4 * itemsize * tokens * model.width * model.depth
  keys: dict[str, Sequence[int]] = {
    "attention": _keys(model, n),
    "cross-attention": [t] * model.depth,
  }
  parts = []
  for part, counts in keys.items():
    longer = stretch if part == "attention" else 1.0
    scores = tokens * sum(counts) * model.num_heads * touched
    parts.append((padded.pop(part) * longer * narrow, scores + operands, 0.0))
  products = roofline.products_bytes(model, tokens, itemsize, 0)
  weights = roofline.products_bytes(model, 0.0, itemsize)
  parts.append((sum(padded.values()), products, weights))
  parts.append((0.0, roofline.norms_bytes(model, tokens, itemsize), 0.0))
  return parts
