"""PixArt-Σ: a diffusion transformer with adaLN-single and T5 cross-attention.

Reference: `PixArt.py`, `PixArtMS.py` of PixArt-alpha/PixArt-sigma. The core takes token
sequences, so that one program serves every aspect ratio of a resolution; the module's
`__call__` wraps it for latents on one grid.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

from pixsigma_jax.models import attention, int8, positions, tokens
from pixsigma_jax.models.block import (
  BLOCK_INPUT,
  Block,
  BlockInputs,
  LayerInputs,
  modulate,
  table_init,
)
from pixsigma_jax.models.conditions import Conditions
from pixsigma_jax.models.embeddings import (
  XL_WIDTH,
  CaptionProjection,
  PatchEmbedding,
  ScalarEmbedding,
  SizeConditions,
)
from pixsigma_jax.models.kv_compression import KVCompression
from pixsigma_jax.models.layers import (
  HOST_MEMORY,
  Compute,
  Linear,
  normal_init,
  zeros_init,
)
from pixsigma_jax.models.tokens import Grid

# Name of a segment → keys and values of its layers, `[layers 2 b t d]`.
CaptionKV: TypeAlias = dict[str, Array]


def _keeps(names: Callable[..., Any]) -> Callable[..., Any]:
  """A remat policy that keeps named arrays and the outputs of cuDNN's kernel."""

  def policy(primitive: Any, *arguments: Any, **params: Any) -> Any:
    if primitive.name.startswith(attention.CUDNN_FORWARD):
      return True
    return names(primitive, *arguments, **params)

  return policy


_REMAT_POLICIES = {
  "block": jax.checkpoint_policies.nothing_saveable,
  "attention": _keeps(jax.checkpoint_policies.save_only_these_names(attention.OUTPUT)),
  "offload": _keeps(
    jax.checkpoint_policies.save_and_offload_only_these_names(
      names_which_can_be_saved=[],
      names_which_can_be_offloaded=[attention.OUTPUT, BLOCK_INPUT],
      offload_src="device",
      offload_dst=HOST_MEMORY,
    )
  ),
}

VARIANTS: dict[str, dict[str, int]] = {
  "XL/2": {"depth": 28, "width": 1152, "num_heads": 16, "patch_size": 2},
  "Mini/2": {"depth": 4, "width": 64, "num_heads": 4, "patch_size": 2},
  "Nano/2": {"depth": 2, "width": 48, "num_heads": 4, "patch_size": 2},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixArtConfig:
  """Hyper-parameters: everything that shapes parameters or outputs.

  Attributes:
    depth, width, num_heads, mlp_ratio, patch_size: size of the transformer.
    in_channels: channels of the latents.
    learn_variance: twice as many output channels, the second half variance logits.
    caption_width: width of the text encoder's embeddings (4096 for T5-XXL).
    caption_length: caption tokens the model was trained with (300; 120 for α).
    base_size: token grid side of the training resolution (resolution / 16 for XL/2).
    pe_interpolation: how many times finer than the 512 px field positions are laid.
    qk_norm: LayerNorm on queries and keys.
    size_conditions: α-1024's image size and aspect ratio conditions.
    kv_compression: see `KVCompression`.

  Raises:
    ValueError: sizes that do not fit together, or compressed layers beyond the depth.
  """

  depth: int
  width: int
  num_heads: int
  patch_size: int
  base_size: int
  pe_interpolation: float
  mlp_ratio: float = 4.0
  in_channels: int = 4
  learn_variance: bool = True
  caption_width: int = 4096
  caption_length: int = 300
  qk_norm: bool = False
  size_conditions: bool = False
  kv_compression: KVCompression = KVCompression()

  def __post_init__(self):
    if self.width % (4 * self.num_heads) or (self.size_conditions and self.width % 3):
      thirds = " and 3" if self.size_conditions else ""
      raise ValueError(
        f"width {self.width} must be a multiple of 4 · num_heads "
        f"(= {4 * self.num_heads}){thirds}."
      )
    if any(not 0 <= layer < self.depth for layer in self.kv_compression.layers):
      raise ValueError(
        f"KV compression names layers {self.kv_compression.layers}, "
        f"but layers are 0 … {self.depth - 1}."
      )

  @classmethod
  def from_variant(cls, variant: str, **fields: Any) -> "PixArtConfig":
    """The named size of `VARIANTS` with the given other fields.

    Raises:
      ValueError: the variant is unknown.
    """
    if variant not in VARIANTS:
      raise ValueError(f"Unknown variant {variant!r}; choose one of {list(VARIANTS)}.")
    return cls(**VARIANTS[variant], **fields)

  @classmethod
  def from_dict(cls, fields: dict[str, Any]) -> "PixArtConfig":
    """The inverse of `to_dict`, also after a round trip through JSON."""
    compression = dict(fields["kv_compression"])
    compression["layers"] = tuple(compression["layers"])
    return cls(**{**fields, "kv_compression": KVCompression(**compression)})

  def to_dict(self) -> dict[str, Any]:
    """The fields as plain values, for a checkpoint's metadata."""
    return dataclasses.asdict(self)

  @property
  def out_channels(self) -> int:
    """Channels of the output: noise, and variance logits if they are learned."""
    return self.in_channels * (2 if self.learn_variance else 1)

  @property
  def window(self) -> Grid:
    """The window in whose order the model takes its tokens."""
    return self.kv_compression.window

  def segments(self) -> list[tuple[range, KVCompression]]:
    """Runs of equal layers, each scanned over its stacked parameters."""
    compressed = [i in self.kv_compression.layers for i in range(self.depth)]
    starts = [0] + [
      i for i in range(1, self.depth) if compressed[i] != compressed[i - 1]
    ]
    ends = [*starts[1:], self.depth]
    return [
      (range(a, b), self.kv_compression if compressed[a] else KVCompression())
      for a, b in zip(starts, ends, strict=True)
    ]


_STACK = "blocks_"


def segment_name(layers: range) -> str:
  """Name of a segment's stacked parameters: `blocks_FIRST_LAST`."""
  return f"{_STACK}{layers.start:02d}_{layers.stop - 1:02d}"


def layer_name(layer: int) -> str:
  """Name of one layer's parameters out of a stack, `block_LAYER`: see `laid_out`."""
  return f"block_{layer:02d}"


class Embedded(NamedTuple):
  """Conditions at the network's width, as `PixArt.enter` makes them once for a call.

  Attributes:
    time: float32 `[b d]`, of timesteps, and of sizes with `size_conditions`.
    captions: float `[b t d]`; None beside `Conditions.caption_kv`.
  """

  time: Any
  captions: Any


class PixArt(nn.Module):
  """The network.

  Attributes:
    config: hyper-parameters.
    compute: precision, attention implementation, rematerialisation.
  """

  config: PixArtConfig
  compute: Compute = Compute()

  def __call__(
    self,
    latents: Float[Array, "b h w c"],
    timesteps: Array,
    caption_embeddings: Float[Array, "b t e"],
    caption_mask: Bool[Array, "b t"],
    image_size: Float[Array, "b 2"] | None = None,
    aspect_ratio: Float[Array, " b"] | None = None,
  ) -> Float32[Array, "b h w o"]:
    """Noise prediction ‖ variance logits for `[b h' w' c]` latents of one size.

    Args:
      latents: noisy latents, scaled.
      timesteps: `[b]`, 0 … 999, integer or float.
      caption_embeddings: the text encoder's output.
      caption_mask: True where a caption token is to be seen.
      image_size: (height, width) in pixels, and
      aspect_ratio: height / width; both only with `size_conditions`.

    Raises:
      ValueError: sides that the patch size does not divide; conditions missing.
    """
    config, batch = self.config, latents.shape[0]
    grid = tokens.token_grid((latents.shape[1], latents.shape[2]), config.patch_size)
    conditions = Conditions(
      coordinates=jnp.tile(
        tokens.coordinates(grid, config.window)[None], (batch, 1, 1)
      ),
      grid=jnp.tile(jnp.asarray(grid, jnp.int32)[None], (batch, 1)),
      timesteps=timesteps,
      caption_mask=caption_mask,
      caption_embeddings=caption_embeddings,
      image_size=image_size,
      aspect_ratio=aspect_ratio,
    )
    prediction = self.on_tokens(
      tokens.to_tokens(latents, config.patch_size, config.window), conditions
    )
    return tokens.from_tokens(prediction, grid, config.patch_size, config.window)

  def setup(self):
    config, compute = self.config, self.compute
    self.patch_embedding = PatchEmbedding(config.width, config.patch_size, compute)
    self.timestep_embedding = ScalarEmbedding(config.width, compute)
    if config.size_conditions:
      self.size_conditions = SizeConditions(config.width, compute)
    self.modulation = Linear(
      6 * config.width, compute, kernel_init=normal_init(config.width, XL_WIDTH)
    )
    self.caption_projection = CaptionProjection(config.width, compute)
    for layers, compression in config.segments():
      if not compute.unroll:
        setattr(self, segment_name(layers), self._scan(layers, compression))
        continue
      if self.has_variable("params", segment_name(layers)):
        raise ValueError(
          f"The layers of {segment_name(layers)} are stacked, and with unroll the "
          "network takes each for itself: pass the parameters through "
          "models.pixart.laid_out."
        )
      for layer in layers:
        block, arguments = self._block(compression)
        setattr(self, layer_name(layer), block(*arguments))
    self.scale_shift_table = self.param(
      "scale_shift_table", table_init, (2, config.width)
    )
    self.out = Linear(
      config.patch_size**2 * config.out_channels, compute, kernel_init=zeros_init
    )

  def on_tokens(
    self, noisy_tokens: Float[Array, "b n c"], conditions: Conditions
  ) -> Float32[Array, "b n o"]:
    """The network on sequences in window-major order, of any mix of aspect ratios.

    It is `enter`, `go_through` all blocks and `leave`.

    Args:
      noisy_tokens: patches of noisy latents, `models/tokens.py: to_tokens`, padded.
    """
    x, embedded = self.enter(noisy_tokens, conditions)
    x = self.go_through(range(self.config.depth), x, embedded, conditions)
    return self.leave(x, embedded)

  @nn.nowrap
  def enter(
    self, noisy_tokens: Float[Array, "b n c"], conditions: Conditions
  ) -> tuple[Float32[Array, "b n d"], Embedded]:
    """Inputs of the first block, and the embedded conditions."""
    config = self.config
    mask = tokens.token_mask(conditions.grid, noisy_tokens.shape[1])
    # Padding enters as zeros, so whatever it held, NaN included, reaches nothing.
    noisy_tokens = jnp.where(mask[..., None], noisy_tokens, 0)

    x = self.patch_embedding(noisy_tokens)
    x = x + positions.sincos_2d(
      conditions.coordinates,
      conditions.grid,
      config.width,
      base_size=config.base_size,
      pe_interpolation=config.pe_interpolation,
    )

    time = self.timestep_embedding(conditions.timesteps)
    if config.size_conditions:
      if conditions.image_size is None or conditions.aspect_ratio is None:
        raise ValueError(
          "A model with size_conditions needs image_size and aspect_ratio."
        )
      time = time + self.size_conditions(conditions.image_size, conditions.aspect_ratio)
    captions = None
    if conditions.caption_kv is None:
      captions = _captions(
        self.caption_projection, conditions.caption_embeddings, conditions.caption_mask
      )
    return x, Embedded(time, captions)

  @nn.nowrap
  def go_through(
    self,
    blocks: range,
    x: Float32[Array, "b n d"],
    embedded: Embedded,
    conditions: Conditions,
  ) -> Float32[Array, "b n d"]:
    """Applies some consecutive blocks.

    Args:
      x, embedded: from `enter`, x perhaps from earlier blocks.
    """
    config = self.config
    modulation = self.modulation(jax.nn.silu(embedded.time))
    inputs = BlockInputs(
      modulation=modulation.reshape(-1, 6, config.width),
      grid=conditions.grid,
      captions=embedded.captions,
      caption_mask=conditions.caption_mask,
    )
    discard_keys = None
    if config.kv_compression.operator == "random_discard":
      discard_keys = jax.random.split(self.make_rng("kv_discard"), config.depth)
    for layers, compression in config.segments():
      chosen = range(max(blocks.start, layers.start), min(blocks.stop, layers.stop))
      if not chosen:
        continue
      keys = None if discard_keys is None else discard_keys[np.array(layers)]
      kv = conditions.caption_kv
      kv = None if kv is None else kv[segment_name(layers)]
      own = LayerInputs(
        discard_key=keys,
        caption_kv=kv,
        identity_attention=_by_layer(conditions.identity_attention, layers),
        skipped=_by_layer(conditions.skipped, layers),
      )
      if self.compute.unroll:
        for i in chosen:
          layer = getattr(self, layer_name(i))
          x, _ = layer(x, inputs, _layer(own, i - layers.start))
      else:
        x = self._scanned(layers, chosen, compression, x, inputs, own)
    return x

  @nn.nowrap
  def leave(
    self, x: Float32[Array, "b n d"], embedded: Embedded
  ) -> Float32[Array, "b n o"]:
    """Output tokens, from the last block's."""
    # The final layer reads the timestep itself, not the blocks' modulation of it.
    table = self.scale_shift_table[None] + embedded.time[:, None, :]
    shift, scale = jnp.unstack(table, axis=1)
    return self.out(modulate(x, shift, scale))

  @nn.nowrap
  def _block(self, compression: KVCompression) -> tuple[Any, tuple[Any, ...]]:
    """The class of a block, rematerialised or not, and its arguments."""
    config, compute = self.config, self.compute
    block = Block
    if compute.remat != "none":
      # Inside a scan XLA cannot undo the recomputation, outside it must be kept off.
      policy = _REMAT_POLICIES[compute.remat]
      block = nn.remat(block, prevent_cse=compute.unroll, policy=policy)
    return block, (
      config.num_heads,
      config.mlp_ratio,
      config.qk_norm,
      compression,
      compute,
    )

  @nn.nowrap
  def _scan(self, layers: range, compression: KVCompression) -> nn.Module:
    """A run of equal blocks over their stacked parameters."""
    block, arguments = self._block(compression)
    return nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(nn.broadcast, 0),  # pyright: ignore
      length=len(layers),
    )(*arguments)

  @nn.nowrap
  def _scanned(
    self,
    layers: range,
    chosen: range,
    compression: KVCompression,
    x: Float32[Array, "b n d"],
    inputs: BlockInputs,
    own: LayerInputs,
  ) -> Float32[Array, "b n d"]:
    """Applies the chosen blocks of a run of equal ones.

    Args:
      own: of all blocks of the run.
    """
    name = segment_name(layers)
    if chosen == layers:
      x, _ = getattr(self, name)(x, inputs, own)
      return x
    block, arguments = self._block(compression)
    params = self.get_variable("params", name)

    def one(x: Array, i: Any) -> tuple[Array, None]:
      layer = block(*arguments, parent=None)
      return layer.apply({"params": _layer(params, i)}, x, inputs, _layer(own, i))

    numbers = [i - layers.start for i in chosen]
    if len(numbers) == 1:
      return one(x, numbers[0])[0]
    # One layer at a time out of the stack: a part of it would be a copy.
    return jax.lax.scan(one, x, jnp.array(numbers))[0]


def _by_layer(
  rows: Bool[Array, "b all_layers"] | None, layers: range
) -> Bool[Array, "layers b"] | None:
  """A segment's share of what is said of every layer."""
  return None if rows is None else rows[:, layers.start : layers.stop].T


def _layer(stack: Any, i: Any) -> Any:
  """One layer of a segment's stack."""
  return jax.tree.map(lambda leaf: leaf[i], stack)


def laid_out(params: Any, compute: Compute) -> Any:
  """Parameters as `PixArt` with that `compute` takes them.

  They are stored with a stack for each segment, `segment_name`. With `compute.unroll`
  every layer has a tree of its own, `layer_name`; gradients are stacked again in one
  operation. What is laid out already stays as it is, and other leaves are shared.
  """
  if not compute.unroll:
    return params
  apart: dict[str, Any] = {}
  for name, stack in params.items():
    if not name.startswith(_STACK):
      apart[name] = stack
      continue
    first = int(name.removeprefix(_STACK).split("_")[0])
    leaves, structure = jax.tree.flatten(stack)
    layers = zip(*map(jnp.unstack, leaves), strict=True)
    apart |= {
      layer_name(i): structure.unflatten(layer) for i, layer in enumerate(layers, first)
    }
  return apart


def inference_params(params: Any, compute: Compute) -> Any:
  """Parameters as forward passes with that `compute` use them; not for training.

  The network's output is the same to the bit. Matrices are stored in the dtype of their
  products, so they are not rounded in every call: in bfloat16 this saves half the
  memory, and a third of XL/2's time at 256 pixels on a CPU. They are `laid_out`:
  cutting every layer out of a stack in every call is two fifths of that time. Other
  leaves are shared.
  """

  def one(path: Any, leaf: Any) -> Any:
    cast = path[-1].key == "kernel" and not int8.is_quantized(leaf)
    return jnp.asarray(leaf, compute.dtype) if cast else leaf

  params = jax.tree_util.tree_map_with_path(one, params, is_leaf=int8.is_quantized)
  return laid_out(params, compute)


def _captions(
  projection: CaptionProjection,
  embeddings: Float[Array, "b t e"] | None,
  mask: Bool[Array, "b t"],
) -> Float[Array, "b t d"]:
  """Caption embeddings at the network's width, in its compute dtype."""
  assert embeddings is not None, "either these or caption_kv"
  # As with image tokens: whatever padding held reaches nothing.
  embeddings = jnp.where(mask[..., None], embeddings, 0)
  return projection(embeddings).astype(projection.compute.dtype)


def caption_keys_values(
  params: Any,
  config: PixArtConfig,
  compute: Compute,
  caption_embeddings: Float[Array, "b t e"],
  caption_mask: Bool[Array, "b t"],
) -> CaptionKV:
  """Cross-attention's keys and values of all layers, which no timestep changes."""
  projection = CaptionProjection(config.width, compute)
  bound = projection.bind({"params": params["caption_projection"]})
  captions = _captions(bound, caption_embeddings, caption_mask)
  linear = Linear(config.width, compute, copies=2)

  def one_layer(kv: Any) -> Array:
    return jnp.stack(linear.apply({"params": kv}, captions)).astype(compute.dtype)  # pyright: ignore

  def of(name: str) -> Any:
    return params[name]["cross_attention"]["kv"]

  segments = [layers for layers, _ in config.segments()]
  if not compute.unroll:
    stacks = [segment_name(layers) for layers in segments]
    return {stack: jax.lax.map(one_layer, of(stack)) for stack in stacks}
  params = laid_out(params, compute)
  return {
    segment_name(layers): jnp.stack([one_layer(of(layer_name(i))) for i in layers])
    for layers in segments
  }


def split_prediction(
  output: Float[Array, "b n o"], config: PixArtConfig
) -> tuple[Float[Array, "b n c"], Float[Array, "b n c"] | None]:
  """Output tokens `(p q 2c)` → noise prediction and variance logits, each `(p q c)`."""
  if not config.learn_variance:
    return output, None
  b, n, _ = output.shape
  halves = output.reshape(b, n, -1, 2, config.in_channels)
  return halves[..., 0, :].reshape(b, n, -1), halves[..., 1, :].reshape(b, n, -1)


def init_params(config: PixArtConfig, key: Array) -> Any:
  """Fresh parameters (reference: `PixArt.py: initialize_weights`)."""
  h, w = (side * config.patch_size for side in config.window)
  latents = jnp.zeros((1, h, w, config.in_channels))
  captions = jnp.zeros((1, 1, config.caption_width))
  sizes = (jnp.ones((1, 2)), jnp.ones(1)) if config.size_conditions else ()
  keys = {"params": key, "kv_discard": key}
  model = PixArt(config, Compute(dtype=jnp.float32))
  return model.init(
    keys, latents, jnp.zeros(1), captions, jnp.ones((1, 1), bool), *sizes
  )["params"]


def abstract_params(config: PixArtConfig) -> Any:
  """Shapes and dtypes of a model's parameters, without making them."""
  return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
