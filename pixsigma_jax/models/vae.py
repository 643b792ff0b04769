"""The KL autoencoder of Stable Diffusion and SDXL: images to latents and back, frozen.

The network is Rombach et al. 2022, appendix G (one head of attention between two
residual blocks at the coarsest resolution); reference: diffusers' `AutoencoderKL`.

A 4096² image is 24 GiB of activations in bfloat16. Three ways to compute it:

  whole   attention in chunks, everything else as it comes
  rows    the same numbers on several devices, each holding some rows of the image; only
          a convolution's border rows, norms' statistics, keys and values travel
  tiles   for one device: overlapping tiles, blended. Norms' statistics and attention
          see a tile each, so this is not what the whole image would give
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from pixsigma_jax.models import attention
from pixsigma_jax.models.autoencoders import vae_identity
from pixsigma_jax.models.layers import Compute, Linear, zeros_init

# One device computes an image of more than TILE_SIZE² pixels in tiles of that side:
# 1.5 GiB of activations in bfloat16, beside which a network and T5's keys still fit.
TILE_SIZE = 1024
OVERLAP = 0.25  # of a tile, at least, with each of its neighbours

EPSILON = 1e-6  # of every group norm
LOG_VARIANCE_RANGE = (-30.0, 20.0)  # the reference's, against overflow of exp

# The mesh that `KLAutoencoder` lays over the devices, and where an image lies on it.
AXES = ("images", "rows", "copies")
ROWS = P("images", "rows")


@dataclasses.dataclass(frozen=True)
class VAEConfig:
  """Hyper-parameters; the defaults are those of SD's and SDXL's autoencoder.

  Attributes:
    channels: at each resolution, from the image's to the latents'.
    blocks_per_level: residual blocks of an encoder's level; the decoder has one more.
    latent_channels: of latents.
    norm_groups: of every group norm.

  Raises:
    ValueError: a norm's groups do not divide a level's channels.
  """

  channels: tuple[int, ...] = (128, 256, 512, 512)
  blocks_per_level: int = 2
  latent_channels: int = 4
  norm_groups: int = 32

  def __post_init__(self):
    if any(width % self.norm_groups for width in self.channels):
      raise ValueError(
        f"norm_groups={self.norm_groups} must divide the channels of every level, "
        f"{self.channels}."
      )

  @property
  def downsampling(self) -> int:
    """Pixels per latent along one side."""
    return 2 ** (len(self.channels) - 1)


class Conv(nn.Module):
  """A convolution in `dtype` that accumulates in, and returns, float32.

  With stride 2 it is the reference's downsampling: padded at the far edges only.
  """

  features: int
  size: int
  dtype: DTypeLike
  stride: int = 1

  @nn.compact
  def __call__(self, x: Float[Array, "b h w i"]) -> Float32[Array, "b h2 w2 o"]:
    shape = (self.size, self.size, x.shape[-1], self.features)
    # Nothing to draw: parameters come from a file, `init` is for their shapes.
    kernel = self.param("kernel", zeros_init, shape)
    bias = self.param("bias", zeros_init, (self.features,))
    border = self.size // 2
    out = jax.lax.conv_general_dilated(
      x.astype(self.dtype),
      kernel.astype(self.dtype),
      window_strides=(self.stride, self.stride),
      padding=[(border, border) if self.stride == 1 else (0, 1)] * 2,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      preferred_element_type=jnp.float32,
    )
    return out + bias[None, None, None]


class GroupNorm(nn.Module):
  """Group norm over rows, columns and a group's channels, in float32."""

  groups: int

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float32[Array, "b h w c"]:
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
    bias = self.param("bias", zeros_init, x.shape[-1:])
    x = x.astype(jnp.float32)
    x = x - self._mean(x)
    variance = self._mean(jnp.square(x))
    x = x * jax.lax.rsqrt(variance + EPSILON)
    return x * scale[None, None, None] + bias[None, None, None]

  def _mean(self, x: Float32[Array, "b h w c"]) -> Float32[Array, "b 1 1 c"]:
    # Channels are grouped when there is but one number of each: a whole map with an
    # axis for the groups would be laid out anew, padded, on a TPU.
    means = einops.rearrange(x.mean(axis=(1, 2)), "b (g c) -> b g c", g=self.groups)
    means = jnp.broadcast_to(means.mean(axis=-1, keepdims=True), means.shape)
    return einops.rearrange(means, "b g c -> b 1 1 (g c)")


class ResidualBlock(nn.Module):
  """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 map of x to a new width."""

  features: int
  config: VAEConfig
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h w o"]:
    hidden = x
    for i in (1, 2):
      hidden = nn.silu(GroupNorm(self.config.norm_groups, name=f"norm_{i}")(hidden))
      hidden = Conv(self.features, 3, self.dtype, name=f"conv_{i}")(hidden)
      if i == 1:  # the second stays float32 until it is added
        hidden = hidden.astype(self.dtype)
    if x.shape[-1] != self.features:
      x = Conv(self.features, 1, self.dtype, name="shortcut")(x)
    return (x.astype(jnp.float32) + hidden).astype(self.dtype)


class Attention(nn.Module):
  """x + attention among all places, one head of full width, scores in chunks."""

  config: VAEConfig
  dtype: DTypeLike
  mesh: Mesh | None

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    # Rows and columns stay apart in the products: rows may be sharded.
    compute = Compute(dtype=self.dtype, merge_rows=False)
    hidden = GroupNorm(self.config.norm_groups, name="norm")(x)
    query, key, value = (
      Linear(x.shape[-1], compute, kernel_init=zeros_init, name=name)(hidden).astype(
        self.dtype
      )
      for name in ("query", "key", "value")
    )
    if self.mesh is None:
      hidden = _attend(query, key, value)
    else:
      # By hand: left to itself, XLA gathers keys and values anew for every chunk.
      hidden = jax.shard_map(
        _attend_to_all_rows,
        mesh=self.mesh,
        in_specs=ROWS,
        out_specs=ROWS,
        check_vma=False,  # `attend` starts its scan from constants, the same everywhere
      )(query, key, value)
    hidden = Linear(x.shape[-1], compute, name="out")(hidden)
    return (x.astype(jnp.float32) + hidden).astype(self.dtype)


def _attend(
  query: Float[Array, "b h w c"],
  key: Float[Array, "b h2 w c"],
  value: Float[Array, "b h2 w c"],
) -> Float[Array, "b h w c"]:
  rows = query.shape[1]
  query, key, value = (
    einops.rearrange(x, "b h w c -> b (h w) 1 c") for x in (query, key, value)
  )
  everything = jnp.ones(key.shape[:2], bool)
  out = attention.attend(query, key, value, everything, "chunked")
  return einops.rearrange(out, "b (h w) 1 c -> b h w c", h=rows)


def _attend_to_all_rows(query: Array, key: Array, value: Array) -> Array:
  """One device's part: its own rows' queries, everybody's keys and values."""
  key, value = (jax.lax.all_gather(x, "rows", axis=1, tiled=True) for x in (key, value))
  return _attend(query, key, value)


class Middle(nn.Module):
  """The part that both halves have at the latents' resolution."""

  config: VAEConfig
  dtype: DTypeLike
  mesh: Mesh | None

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    width = self.config.channels[-1]
    x = ResidualBlock(width, self.config, self.dtype, name="block_0")(x)
    x = Attention(self.config, self.dtype, self.mesh, name="attention")(x)
    return ResidualBlock(width, self.config, self.dtype, name="block_1")(x)


class Encoder(nn.Module):
  """Images in [-1, 1] to the posterior's moments: mean, then log-variance, clipped."""

  config: VAEConfig
  dtype: DTypeLike
  mesh: Mesh | None = None

  @nn.compact
  def __call__(self, images: Float[Array, "b H W 3"]) -> Float32[Array, "b h w m"]:
    config, dtype = self.config, self.dtype
    x = Conv(config.channels[0], 3, dtype, name="conv_in")(images).astype(dtype)
    for i, width in enumerate(config.channels):
      x = _Level(width, config.blocks_per_level, config, dtype, name=f"level_{i}")(x)
      if i + 1 < len(config.channels):
        x = Conv(width, 3, dtype, stride=2, name=f"downsample_{i}")(x).astype(dtype)
    x = Middle(config, dtype, self.mesh, name="middle")(x)
    x = nn.silu(GroupNorm(config.norm_groups, name="norm_out")(x))
    x = Conv(2 * config.latent_channels, 3, dtype, name="conv_out")(x)
    moments = Conv(2 * config.latent_channels, 1, dtype, name="quant_conv")(x)
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    log_variance = jnp.clip(log_variance, *LOG_VARIANCE_RANGE)
    return jnp.concatenate([mean, log_variance], axis=-1)


class Decoder(nn.Module):
  """Unscaled latents to images, about [-1, 1], not clipped.

  Levels are numbered as the encoder's: level 0 has the image's resolution.
  """

  config: VAEConfig
  dtype: DTypeLike
  mesh: Mesh | None = None

  @nn.compact
  def __call__(self, latents: Float[Array, "b h w c"]) -> Float32[Array, "b H W 3"]:
    config, dtype = self.config, self.dtype
    x = Conv(config.latent_channels, 1, dtype, name="post_quant_conv")(latents)
    x = Conv(config.channels[-1], 3, dtype, name="conv_in")(x).astype(dtype)
    x = Middle(config, dtype, self.mesh, name="middle")(x)
    for i, width in reversed(list(enumerate(config.channels))):
      blocks = config.blocks_per_level + 1
      x = _Level(width, blocks, config, dtype, name=f"level_{i}")(x)
      if i:
        x = x.repeat(2, axis=1).repeat(2, axis=2)
        x = Conv(width, 3, dtype, name=f"upsample_{i}")(x).astype(dtype)
    x = nn.silu(GroupNorm(config.norm_groups, name="norm_out")(x))
    return Conv(3, 3, dtype, name="conv_out")(x)


class _Level(nn.Module):
  """The residual blocks of one resolution."""

  width: int
  blocks: int
  config: VAEConfig
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h w o"]:
    for i in range(self.blocks):
      x = ResidualBlock(self.width, self.config, self.dtype, name=f"block_{i}")(x)
    return x


def abstract_params(config: VAEConfig) -> dict[str, Any]:
  """The tree of parameters, `encoder` and `decoder`, as shapes without memory."""
  side = config.downsampling
  shapes = {
    "encoder": (Encoder(config, jnp.float32), (1, side, side, 3)),
    "decoder": (Decoder(config, jnp.float32), (1, 1, 1, config.latent_channels)),
  }
  return {
    name: jax.eval_shape(
      lambda key, module=module, shape=shape: module.init(key, jnp.zeros(shape)),
      jax.random.key(0),
    )["params"]
    for name, (module, shape) in shapes.items()
  }


@functools.partial(jax.jit, static_argnames="network")
def run(params: Any, x: Array, *, network: Encoder | Decoder) -> Array:
  """One half of the network as a program, shared by all autoencoders of its kind."""
  # Runs once a shape, when it is traced.
  logging.info(
    "Compiling the autoencoder's %s: %s in %s on %d device(s).",
    type(network).__name__.lower(),
    " x ".join(map(str, x.shape)),
    jnp.dtype(network.dtype).name,
    1 if network.mesh is None else network.mesh.size,
  )
  out: Any = network.apply({"params": params}, x)
  if network.mesh is None:
    return out
  # Whole on every device: each process can read all of it.
  return jax.lax.with_sharding_constraint(out, NamedSharding(network.mesh, P()))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class KLAutoencoder:
  """A trained autoencoder as the trainer, `prepare` and the sampler use it.

  Attributes:
    config: hyper-parameters.
    params: `encoder` and `decoder`, float32; on the devices already, or they are sent
      there in every call.
    scaling_factor: what the trainer multiplies latents with and the sampler divides
      them by; `encode` and `decode` leave it alone.
    dtype: of activations. Norms' statistics, softmax and sums are float32.
    mesh: devices to share the work, each with some images of the batch or some rows of
      an image; the result is the whole image's. None for one device.
    tile_size: images of more than tile_size² pixels are computed in tiles of that side
      (or the image's, if shorter) where one device has to do the work.

  Raises:
    ValueError: a tile of that size cannot be cut from latents with an overlap.
  """

  config: VAEConfig
  params: Any
  scaling_factor: float
  dtype: DTypeLike
  mesh: Mesh | None = None
  tile_size: int = TILE_SIZE

  def __post_init__(self):
    smallest = 2 * self.downsampling
    if self.tile_size < smallest or self.tile_size % self.downsampling:
      raise ValueError(
        f"tile_size={self.tile_size} must be a multiple of {self.downsampling} pixels, "
        f"at least {smallest}."
      )

  @property
  def channels(self) -> int:
    """Channels of the latents."""
    return self.config.latent_channels

  @property
  def downsampling(self) -> int:
    """Pixels per latent along one side."""
    return self.config.downsampling

  @property
  def identity(self) -> dict[str, Any]:
    """Identity in checkpoints and records, by which other latents are refused."""
    return vae_identity(self.scaling_factor, self.channels, self.downsampling)

  def encode(
    self, images: Float[Array | np.ndarray, "b H W c1"]
  ) -> Float32[np.ndarray, "b h w c2"]:
    """Images `[b H W 3]` in [-1, 1] to the posterior's mean, unscaled.

    Raises:
      ValueError: the images are of another shape, or their sides are no multiples of
        `downsampling`.
    """
    return self.moments(images)[0]

  def moments(
    self, images: Float[Array | np.ndarray, "b H W c1"]
  ) -> tuple[Float32[np.ndarray, "b h w c2"], Float32[np.ndarray, "b h w c2"]]:
    """Images `[b H W 3]` in [-1, 1] to the posterior's mean and log-variance.

    Unscaled; the log-variance is clipped to -30 … 20, as in the published code.

    Raises:
      ValueError: as `encode`.
    """
    unit, shape = self.downsampling, tuple(images.shape)
    if len(shape) != 4 or shape[-1] != 3 or shape[1] % unit or shape[2] % unit:
      raise ValueError(
        f"The autoencoder takes images of shape [b H W 3] with sides that are "
        f"multiples of {unit}, not {shape}: resize or crop them."
      )
    moments = self._apply(Encoder, images, (unit, 1))
    mean, log_variance = np.split(moments, 2, axis=-1)
    return mean, log_variance

  def decode(
    self, latents: Float[Array | np.ndarray, "b h w c1"]
  ) -> Float32[np.ndarray, "b H W 3"]:
    """Unscaled latents `[b h w c]` to images, about [-1, 1], not clipped.

    Raises:
      ValueError: the latents have another number of channels.
    """
    if latents.ndim != 4 or latents.shape[-1] != self.channels:
      raise ValueError(
        f"The autoencoder takes latents of shape [b h w {self.channels}], not "
        f"{tuple(latents.shape)}: latents of another autoencoder need that one."
      )
    return self._apply(Decoder, latents, (1, self.downsampling))

  def _apply(
    self, half: type[Encoder] | type[Decoder], x: Any, units: tuple[int, int]
  ) -> Float32[np.ndarray, "b h w c"]:
    """Runs one half of the network in the way that suits the image and the devices.

    Args:
      units: rows of the input, and of the output, to one row of latents.
    """
    height, width = (side // units[0] for side in x.shape[1:3])
    mesh = self._mesh(len(x), height)
    params = self.params["encoder" if half is Encoder else "decoder"]
    network = half(self.config, jnp.dtype(self.dtype), mesh)
    if mesh is not None:
      params = jax.device_put(params, NamedSharding(mesh, P()))
      x = jax.device_put(x, NamedSharding(mesh, ROWS))
      return np.asarray(run(params, x, network=network))
    side = self.tile_size // self.downsampling
    if height * width <= side**2:
      return np.asarray(run(params, x, network=network))
    return _in_tiles(
      lambda tile: run(params, tile, network=network), x, (height, width), side, units
    )

  def _mesh(self, batch: int, height: int) -> Mesh | None:
    """The devices, laid out for `batch` images of `height` rows of latents.

    Whole images first, which need nothing of each other, then rows. What the devices'
    number and the image's have no divisor in common for is computed more than once, so
    that every process takes part and holds the result.
    """
    if self.mesh is None:
      return None
    devices = self.mesh.devices.flatten()
    images = math.gcd(len(devices), batch)
    rows = math.gcd(len(devices) // images, height)
    if images * rows == 1:
      return None
    layout = devices.reshape(images, rows, -1)
    return Mesh(layout, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _in_tiles(
  program: Any, x: Any, grid: tuple[int, int], side: int, units: tuple[int, int]
) -> Float32[np.ndarray, "b h w c"]:
  """Applies `program` to tiles of `x`, all of one shape, and blends them linearly.

  Args:
    grid: height and width of the image in latents.
    side: of a tile, in latents.
    units: see `KLAutoencoder._apply`.
  """
  unit_in, unit_out = units
  tile = tuple(min(side, length) for length in grid)
  tops, lefts = (tile_starts(n, t) for n, t in zip(grid, tile, strict=True))
  strips = []
  for top in tops:
    rows = x[:, top * unit_in : (top + tile[0]) * unit_in]
    # All of a strip is under way before the first of it is fetched.
    parts = [
      program(rows[:, :, left * unit_in : (left + tile[1]) * unit_in]) for left in lefts
    ]
    strips.append(blend(parts, [left * unit_out for left in lefts], axis=2))
  return blend(strips, [top * unit_out for top in tops], axis=1)


def tile_starts(length: int, tile: int) -> list[int]:
  """Starts of tiles that cover `length` evenly, neighbours sharing `OVERLAP`."""
  step = max(1, math.floor(tile * (1 - OVERLAP)))
  count = 1 + math.ceil((length - tile) / step)
  return [round(i * (length - tile) / max(1, count - 1)) for i in range(count)]


def blend(
  parts: Sequence[Array | np.ndarray], starts: Sequence[int], axis: int
) -> np.ndarray:
  """Joins overlapping parts along `axis`: in an overlap, the next one fades in.

  A place is x + r·(next - x) with r rising linearly, so that weights sum to one by
  construction: parts that agree where they overlap come out as they are, to the bit.
  """
  out = np.asarray(parts[0])
  for start, part in zip(starts[1:], parts[1:], strict=True):
    overlap = out.shape[axis] - start
    before, old = np.split(out, [start], axis)
    new, after = np.split(np.asarray(part), [overlap], axis)
    ramp = (np.arange(overlap, dtype=np.float32) + 1) / np.float32(overlap + 1)
    ramp = np.expand_dims(ramp, [i for i in range(out.ndim) if i != axis])
    out = np.concatenate([before, old + ramp * (new - old), after], axis)
  return out
