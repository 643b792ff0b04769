"""Runs two forms of one model on the same inputs and compares them block by block.

A network in the official layout is run by the few lines of torch below, which read the
official names themselves; one in diffusers' layout by diffusers; one of ours by ours.
So a mistake in a table of names cannot cancel itself.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pixsigma_jax.convert.files import Weights
from pixsigma_jax.convert.pixart import (
  PEER_NULL_CAPTION,
  PEER_POSITIONS,
  diffusers_config,
)
from pixsigma_jax.models import tokens
from pixsigma_jax.models.block import Block
from pixsigma_jax.models.layers import Compute
from pixsigma_jax.models.pixart import PixArt, PixArtConfig, laid_out

# Name of a place in the network → what passes there: `block 0` … `[b n d]`, tokens
# row-major, and `output` `[b H W c]`.
Trace: TypeAlias = Mapping[str, np.ndarray]

# Largest difference, relative to the largest number, that float32 explains over 28
# layers whose sums are ordered differently.
TOLERANCE = 2e-4


class Inputs(NamedTuple):
  """Inputs of both networks, float32."""

  latents: np.ndarray  # [b H W c]
  timesteps: np.ndarray  # [b]
  caption_embeddings: np.ndarray  # [b t e]
  caption_mask: np.ndarray  # [b t]
  image_size: np.ndarray  # [b 2]
  aspect_ratio: np.ndarray  # [b]


class Difference(NamedTuple):
  """Difference between two networks at one place."""

  place: str
  absolute: float  # the largest difference of two numbers
  relative: float  # the same over the largest number there


def fixed_inputs(config: PixArtConfig) -> Inputs:
  """Two images of 8 x 12 tokens at both ends of the noise, one caption cut short."""
  draw = np.random.default_rng(0)
  grid = (8, 12)
  height, width = (side * config.patch_size for side in grid)
  length = config.caption_length
  mask = np.ones((2, length), bool)
  mask[1, max(1, length // 3) :] = False
  return Inputs(
    latents=draw.normal(size=(2, height, width, config.in_channels)).astype(np.float32),
    timesteps=np.array([999, 20], np.float32),
    caption_embeddings=draw.normal(size=(2, length, config.caption_width)).astype(
      np.float32
    ),
    caption_mask=mask,
    image_size=np.array([[512, 768], [1024, 640]], np.float32),
    aspect_ratio=np.array([0.67, 1.6], np.float32),
  )


def compare(theirs: Trace, ours: Trace) -> list[Difference]:
  """The differences at every place, in the network's order."""
  differences = []
  for place, expected in theirs.items():
    absolute = float(np.abs(ours[place] - expected).max())
    scale = max(float(np.abs(expected).max()), np.finfo(np.float32).tiny)
    differences.append(Difference(place, absolute, float(absolute / scale)))
  return differences


def run_ours(config: PixArtConfig, params: Any, inputs: Inputs) -> Trace:
  """This package's network, in float32."""
  trace: dict[str, np.ndarray] = {}
  _, height, width, _ = inputs.latents.shape
  grid = (height // config.patch_size, width // config.patch_size)
  row_major = np.argsort(tokens.window_order(grid, config.window))

  def record(call, arguments, keywords, context):
    result = call(*arguments, **keywords)
    if isinstance(context.module, Block):
      sequence = np.asarray(result[0])
      trace[f"block {len(trace)}"] = sequence[:, row_major]
    return result

  # Unrolled and not compiled, so that every block is seen.
  model = PixArt(config, Compute(dtype=jnp.float32, attention="chunked", unroll=True))
  sizes = (inputs.image_size, inputs.aspect_ratio) if config.size_conditions else ()
  arrays = [jnp.asarray(x) for x in (*inputs[:4], *sizes)]
  params = laid_out(jax.tree.map(jnp.asarray, params), model.compute)
  # Accelerators round the operands of float32 products unless told otherwise.
  with nn.intercept_methods(record), jax.default_matmul_precision("highest"):
    output = model.apply({"params": params}, *arrays)
  trace["output"] = np.asarray(output)
  return trace


def run_diffusers(config: PixArtConfig, weights: Weights, inputs: Inputs) -> Trace:
  """diffusers' network, on weights in its own layout."""
  import torch
  from diffusers.models.transformers.pixart_transformer_2d import (
    PixArtTransformer2DModel,
  )

  model: Any = PixArtTransformer2DModel.from_config(diffusers_config(config))
  # Buffers of older exports are none of the network's parameters.
  names = [name for name in weights if name not in (PEER_POSITIONS, PEER_NULL_CAPTION)]
  model.load_state_dict({name: torch.tensor(weights[name]) for name in names})
  model.eval()
  trace: dict[str, np.ndarray] = {}
  for i, block in enumerate(model.transformer_blocks):
    block.register_forward_hook(
      lambda _, __, out, i=i: trace.update({f"block {i}": out.numpy()})
    )
  conditions: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
  if config.size_conditions:
    conditions = {
      "resolution": torch.tensor(inputs.image_size),
      "aspect_ratio": torch.tensor(inputs.aspect_ratio)[:, None],
    }
  with torch.no_grad():
    output = model(
      torch.tensor(np.moveaxis(inputs.latents, -1, 1)),
      encoder_hidden_states=torch.tensor(inputs.caption_embeddings),
      timestep=torch.tensor(inputs.timesteps),
      added_cond_kwargs=conditions,
      encoder_attention_mask=torch.tensor(inputs.caption_mask),
      return_dict=False,
    )[0]
  trace["output"] = np.moveaxis(output.numpy(), 1, -1)
  return trace


def run_official(config: PixArtConfig, weights: Weights, inputs: Inputs) -> Trace:
  """The network of the published code, on weights under its own names.

  Reference: `PixArtMS.py`, `PixArt_blocks.py`, from their description in this
  package's modules; float32.
  """
  import torch
  from torch.nn import functional as F

  w = {name: torch.tensor(np.asarray(weights[name], np.float32)) for name in weights}
  batch, height, width, _ = inputs.latents.shape
  p, heads = config.patch_size, config.num_heads
  h, w_tokens = height // p, width // p

  def linear(x, name):
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

  def norm(x, name):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

  def plain_norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)

  def scalar(x, name):
    frequencies = torch.exp(-np.log(1e4) * torch.arange(128, dtype=torch.float32) / 128)
    angles = x[..., None] * frequencies
    x = linear(torch.cat([angles.cos(), angles.sin()], -1), f"{name}.mlp.0")
    return linear(F.silu(x), f"{name}.mlp.2")

  def attend(query, key, value, mask=None):
    query, key, value = (
      x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value)
    )
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return out.transpose(1, 2).flatten(-2)

  def compress(x, name):
    image = x.transpose(1, 2).unflatten(-1, (h, w_tokens))
    kernel = w[f"{name}.sr.weight"]
    image = F.conv2d(
      image, kernel, w[f"{name}.sr.bias"], stride=kernel.shape[2:], groups=len(kernel)
    )
    x = image.flatten(2).transpose(1, 2)
    return norm(x, f"{name}.norm") if f"{name}.norm.weight" in w else x

  def self_attention(x, name):
    query, key, value = linear(x, f"{name}.qkv").chunk(3, dim=-1)
    if f"{name}.q_norm.weight" in w:
      query, key = norm(query, f"{name}.q_norm"), norm(key, f"{name}.k_norm")
    if f"{name}.sr.weight" in w:
      key, value = compress(key, name), compress(value, name)
    return linear(attend(query, key, value), f"{name}.proj")

  def positions():
    spans = [
      np.arange(n, dtype=np.float32) / (n / config.base_size) / config.pe_interpolation
      for n in (h, w_tokens)
    ]
    quarter = config.width // 4
    frequencies = 1e4 ** -(np.arange(quarter) / quarter)
    rows, columns = (
      np.concatenate([np.sin(a), np.cos(a)], -1)
      for a in (span[:, None] * frequencies for span in spans)
    )
    shape = (h, w_tokens, 2 * quarter)
    both = [np.broadcast_to(columns, shape), np.broadcast_to(rows[:, None], shape)]
    return torch.tensor(np.concatenate(both, -1), dtype=torch.float32).flatten(0, 1)

  trace: dict[str, np.ndarray] = {}
  with torch.no_grad():
    latents = torch.tensor(np.moveaxis(inputs.latents, -1, 1))
    x = F.conv2d(
      latents, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=p
    )
    x = x.flatten(2).transpose(1, 2) + positions()
    time = scalar(torch.tensor(inputs.timesteps), "t_embedder")
    if config.size_conditions:
      size = scalar(torch.tensor(inputs.image_size), "csize_embedder").flatten(1)
      ratio = scalar(torch.tensor(inputs.aspect_ratio), "ar_embedder")
      time = time + torch.cat([size, ratio], -1)
    modulation = linear(F.silu(time), "t_block.1").unflatten(-1, (6, -1))
    captions = linear(torch.tensor(inputs.caption_embeddings), "y_embedder.y_proj.fc1")
    captions = linear(F.gelu(captions, approximate="tanh"), "y_embedder.y_proj.fc2")
    mask = torch.tensor(inputs.caption_mask)[:, None, None, :]
    for i in range(config.depth):
      name = f"blocks.{i}"
      table = (modulation + w[f"{name}.scale_shift_table"])[:, :, None]
      shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = table.unbind(1)
      branch = self_attention(plain_norm(x) * (1 + scale) + shift, f"{name}.attn")
      x = x + gate * branch
      key, value = linear(captions, f"{name}.cross_attn.kv_linear").chunk(2, dim=-1)
      query = linear(x, f"{name}.cross_attn.q_linear")
      x = x + linear(attend(query, key, value, mask), f"{name}.cross_attn.proj")
      hidden = linear(plain_norm(x) * (1 + scale_mlp) + shift_mlp, f"{name}.mlp.fc1")
      hidden = F.gelu(hidden, approximate="tanh")
      x = x + gate_mlp * linear(hidden, f"{name}.mlp.fc2")
      trace[f"block {i}"] = x.numpy()
    table = (w["final_layer.scale_shift_table"] + time[:, None])[:, :, None]
    shift, scale = table.unbind(1)
    x = linear(plain_norm(x) * (1 + scale) + shift, "final_layer.linear")
    x = x.unflatten(1, (h, w_tokens)).unflatten(-1, (p, p, -1))
    trace["output"] = (
      x.permute(0, 1, 3, 2, 4, 5).reshape(batch, height, width, -1).numpy()
    )
  return trace
