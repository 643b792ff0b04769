"""Adds key/value compression to a model, or removes it (PixArt-Σ, section 3.3).

The reference normalizes what its convolution makes, and so sets keys and values of a
trained model to another scale: from the paper's start, the mean of each window, little
of what the model knew is left. A norm of large numbers that vary little does hardly
anything. With a = κ · rms(z) for outputs z of the convolution, and u of ±1 in turn,

  a · norm(z + a u) - a u = z - mean(z) - mean(u z) u + O(z / κ),

means over channels, since the norm divides by a √(1 + O(1 / κ)). A convolution's bias
a u, its norm's scale a and bias -a u are therefore a start at which two of all
directions are lost, and everything else is as without a norm.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from pixsigma_jax.models.kv_compression import KVCompression
from pixsigma_jax.models.pixart import PixArtConfig, segment_name

INITIALIZATIONS = ("average", "calibrated", "random")

# κ above. A float16 holds z + a u to 2⁻¹¹ of a, so that others who compute in it still
# have z to a hundredth.
_OFFSET = 16.0


def add_kv_compression(
  config: PixArtConfig,
  params: Any,
  *,
  ratio: int,
  layers: tuple[int, ...],
  operator: str = "conv",
  norm: bool = True,
  initialization: str = "average",
  seed: int = 0,
) -> tuple[PixArtConfig, Any]:
  """Gives `layers` a compressor and regroups the stacked blocks around them.

  Args:
    ratio, layers, operator, norm: see `KVCompression`.
    initialization: of the convolution. `average`, the paper's "Conv Avg Init.", starts
      from the mean of each window, so the model sees blurred keys, not noise; `random`
      is torch's default for a convolution, what the paper compares it with.
      `calibrated` is the mean with a norm that does hardly anything: see the module.
    seed: of the random initialisation.

  Returns:
    The new hyper-parameters and tree; leaves outside regrouped blocks are shared.

  Raises:
    ValueError: the model compresses already, or the arguments contradict each other.
  """
  if config.kv_compression.layers:
    raise ValueError(
      f"The model already compresses keys and values ({config.kv_compression}); "
      "start from one that does not."
    )
  if initialization not in INITIALIZATIONS:
    known = ", ".join(map(repr, INITIALIZATIONS))
    raise ValueError(
      f"Unknown initialization {initialization!r}; choose one of {known}."
    )
  if initialization == "calibrated" and (operator != "conv" or not norm):
    raise ValueError(
      "initialization='calibrated' sets the norm after a convolution, and with "
      f"operator={operator!r}, norm={norm} there is none: use 'average'."
    )
  compression = KVCompression(
    ratio=ratio,
    layers=tuple(layers),
    operator=operator,  # pyright: ignore[reportArgumentType]: checked there
    norm=norm,
  )
  target = dataclasses.replace(config, kv_compression=compression)

  params = dict(params)
  stack = params.pop(segment_name(range(config.depth)))
  for segment, active in target.segments():
    # A whole stack is handed on as it is, a part of it has to be cut out.
    blocks = (
      stack
      if len(segment) == config.depth
      else jax.tree.map(lambda leaf, s=segment: leaf[s.start : s.stop], stack)
    )
    if active.layers and operator == "conv":
      compressor = _compressor(target, blocks, initialization, segment, seed)
      attention = {**blocks["attention"], "kv_compressor": compressor}
      blocks = {**blocks, "attention": attention}
    params[segment_name(segment)] = blocks
  return target, params


def remove_kv_compression(
  config: PixArtConfig, params: Any
) -> tuple[PixArtConfig, Any]:
  """Takes the compressors out and stacks all blocks in one again.

  Undoes `add_kv_compression` to the bit. After training, what the compressors learned
  is lost, and the compressed layers see keys and values that they have not seen since.

  Returns:
    The new hyper-parameters and tree; leaves outside regrouped blocks are shared.

  Raises:
    ValueError: the model compresses nothing.
  """
  if not config.kv_compression.layers:
    raise ValueError("The model does not compress keys and values: nothing to remove.")
  target = dataclasses.replace(config, kv_compression=KVCompression())
  params = dict(params)
  stacks = []
  for segment, _ in config.segments():
    blocks = params.pop(segment_name(segment))
    attention = dict(blocks["attention"])
    attention.pop("kv_compressor", None)  # only the operator `conv` learns anything
    stacks.append({**blocks, "attention": attention})
  params[segment_name(range(config.depth))] = (
    stacks[0]
    if len(stacks) == 1
    else jax.tree.map(lambda *parts: jnp.concatenate(parts), *stacks)
  )
  return target, params


def _compressor(
  config: PixArtConfig,
  blocks: Any,
  initialization: str,
  segment: range,
  seed: int,
) -> dict[str, Any]:
  """Stacked parameters of `KVCompressor` for the layers of a segment.

  Args:
    blocks: of the segment, without compressor.
  """
  window, width, depth = config.window, config.width, len(segment)
  size = window[0] * window[1]
  shape = (depth, *window, width)
  if initialization == "random":
    # torch.nn.Conv2d draws both from U(±1/√fan_in), and the fan-in is the window.
    draw = np.random.default_rng([seed, segment.start])
    limit = size**-0.5
    kernel = jnp.asarray(draw.uniform(-limit, limit, shape), jnp.float32)
    bias = jnp.asarray(draw.uniform(-limit, limit, (depth, width)), jnp.float32)
  else:
    kernel = jnp.full(shape, 1 / size, jnp.float32)
    bias = jnp.zeros((depth, width), jnp.float32)
  if not config.kv_compression.norm:
    return {"kernel": kernel, "bias": bias}
  norm = {"scale": jnp.ones((depth, width)), "bias": jnp.zeros((depth, width))}
  if initialization == "calibrated":
    signs = jnp.where(jnp.arange(width) % 2, -1.0, 1.0)[None]
    offset = _OFFSET * _rms(blocks["attention"])[:, None]
    bias = offset * signs
    norm = {"scale": jnp.broadcast_to(offset, bias.shape), "bias": -bias}
  return {"kernel": kernel, "bias": bias, "norm": norm}


def _rms(attention: Any) -> Float32[Array, " layers"]:
  """Root mean square of keys or of values, of whichever it is larger, by the weights.

  Their input is a layer norm's, of about unit variance.

  Args:
    attention: stacked parameters, with `qkv` as `[layers 3 in out]`.
  """
  kernel, bias = (attention["qkv"][name][:, 1:] for name in ("kernel", "bias"))
  squares = jnp.square(kernel).sum(axis=2) + jnp.square(bias)
  keys, values = jnp.unstack(squares.mean(axis=-1), axis=1)
  if "key_norm" in attention:
    own = attention["key_norm"]
    keys = (jnp.square(own["scale"]) + jnp.square(own["bias"])).mean(axis=-1)
  return jnp.sqrt(jnp.maximum(keys, values))
