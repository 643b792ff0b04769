"""Embeddings of patches, timestep, image size and caption.

Reference: `PixArt_blocks.py: TimestepEmbedder, SizeEmbedder, CaptionEmbedder`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from pixsigma_jax.models.layers import Compute, Linear, normal_init, uniform_init

# What the published initialisation is for: width, T5-XXL's width, a patch of latents.
XL_WIDTH, XL_CAPTION_WIDTH, XL_PATCH = 1152, 4096, 16

FREQUENCIES = 256
_MAX_PERIOD = 1e4


def timestep_features(timesteps: Array) -> Float32[Array, "*b 256"]:
  """Sinusoids of a scalar: 128 cosines, then 128 sines. Always float32.

  A timestep in bfloat16 would be rounded (999 → 1000) before its sine is taken.
  """
  half = FREQUENCIES // 2
  # Exponents rounded to float32, as the reference's: at t = 999 an ulp shows.
  exponents = (
    np.float32(-np.log(_MAX_PERIOD)) * np.arange(half, dtype=np.float32) / half
  )
  frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
  angles = timesteps.astype(jnp.float32)[..., None] * frequencies.reshape(
    (1,) * timesteps.ndim + (half,)
  )
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class ScalarEmbedding(nn.Module):
  """A scalar as sinusoids through a two-layer MLP with SiLU."""

  width: int
  compute: Compute
  published_width: int = XL_WIDTH

  @nn.compact
  def __call__(self, scalars: Array) -> Float32[Array, "*b d"]:
    init = normal_init(FREQUENCIES, FREQUENCIES)
    out_init = normal_init(self.width, self.published_width)
    x = timestep_features(scalars)
    x = Linear(self.width, self.compute, kernel_init=init, name="in")(x)
    x = jax.nn.silu(x)
    return Linear(self.width, self.compute, kernel_init=out_init, name="out")(x)


class SizeConditions(nn.Module):
  """α-1024's conditions: image height, width and aspect ratio, beside the timestep.

  A third of the width each, in this order.
  """

  width: int
  compute: Compute

  @nn.compact
  def __call__(
    self, image_size: Float[Array, "b 2"], aspect_ratio: Float[Array, " b"]
  ) -> Float32[Array, "b d"]:
    third = self.width // 3
    published = XL_WIDTH // 3
    size = ScalarEmbedding(third, self.compute, published, name="size")(image_size)
    ratio = ScalarEmbedding(third, self.compute, published, name="aspect_ratio")(
      aspect_ratio
    )
    return jnp.concatenate([size.reshape(size.shape[0], -1), ratio], axis=-1)


class CaptionProjection(nn.Module):
  """Caption embeddings to the network's width: an MLP with tanh-GELU."""

  width: int
  compute: Compute

  @nn.compact
  def __call__(self, embeddings: Float[Array, "b t e"]) -> Float32[Array, "b t d"]:
    init = normal_init(embeddings.shape[-1], XL_CAPTION_WIDTH)
    out_init = normal_init(self.width, XL_WIDTH)
    x = Linear(self.width, self.compute, kernel_init=init, name="in")(embeddings)
    x = jax.nn.gelu(x, approximate=True)
    return Linear(self.width, self.compute, kernel_init=out_init, name="out")(x)


class PatchEmbedding(nn.Module):
  """A linear map of each patch. The kernel `[p q c d]` keeps the convolution's axes."""

  width: int
  patch_size: int
  compute: Compute

  @nn.compact
  def __call__(self, tokens: Float[Array, "b n c"]) -> Float32[Array, "b n d"]:
    p, fan_in = self.patch_size, tokens.shape[-1]
    # Xavier at XL/2's sizes. As weak beside the positions at others: a network that
    # predicts noise copies its input, and layer norm spoils a copy that is most of it.
    limit = (6 / (XL_PATCH + XL_WIDTH) * XL_PATCH / fan_in) ** 0.5
    kernel = self.param(
      "kernel", uniform_init(limit), (p, p, fan_in // (p * p), self.width)
    )
    # The reference leaves this bias at Conv2d's default, uniform within ±1/√fan_in.
    bias = self.param("bias", uniform_init(fan_in**-0.5), (self.width,))
    kernel = kernel.reshape(fan_in, self.width)
    return self.compute.matmul(tokens, kernel) + bias.reshape(1, 1, -1)
