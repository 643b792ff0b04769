"""Operations of the network by part, counted from its shapes.

Matrix products alone, a multiplication and an addition counting as two; what norms,
softmax and activations add is below one percent at XL/2's width. Recomputation is not
counted: this is what the model needs, whatever a machine spends on it.
"""

import math

from pixsigma_jax.models.embeddings import FREQUENCIES
from pixsigma_jax.models.pixart import PixArtConfig
from pixsigma_jax.models.tokens import Grid

TRAINING = 3  # forward, and twice that for the gradients of inputs and of parameters


def block_flops(
  config: PixArtConfig, layer: int, grid: Grid, caption_tokens: int
) -> dict[str, float]:
  """Operations of one block's forward pass over one image.

  Args:
    layer: 0-based; decides whether keys and values are compressed.
    grid: token rows and columns.
    caption_tokens: those that the image attends to.
  """
  n, width = float(math.prod(grid)), config.width
  compression = config.kv_compression
  keys, merged = n, 0.0
  if layer in compression.layers:
    keys = float(
      math.prod(side // r for side, r in zip(grid, config.window, strict=True))
    )
    # Keys and values: each token times its weight, and added up.
    merged = 4 * n * width if compression.operator in ("conv", "average") else 0.0
  return {
    "attention projections": 8 * n * width**2,
    "kv compression": merged,
    "attention": 4 * n * keys * width,
    "cross-attention projections": 4 * (n + caption_tokens) * width**2,
    "cross-attention": 4 * n * caption_tokens * width,
    "mlp": 4 * config.mlp_ratio * n * width**2,
  }


def forward_flops(
  config: PixArtConfig, grid: Grid, caption_tokens: int
) -> dict[str, float]:
  """Operations of the network's forward pass over one image, by part."""
  n, width, patch = float(math.prod(grid)), config.width, config.patch_size**2
  parts: dict[str, float] = {}
  for layer in range(config.depth):
    for name, flops in block_flops(config, layer, grid, caption_tokens).items():
      parts[name] = parts.get(name, 0) + flops
  parts["patches in and out"] = (
    2 * n * width * patch * (config.in_channels + config.out_channels)
  )
  parts["caption projection"] = (
    2.0 * caption_tokens * width * (config.caption_width + width)
  )
  parts["timestep"] = 2.0 * width * (FREQUENCIES + width + 6 * width)
  return parts
