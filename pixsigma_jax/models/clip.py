"""CLIP, frozen: images and texts to embeddings whose cosine says how well they match.

Architecture: Radford et al. 2021 (arXiv 2103.00020), as `modeling_clip.py` of
transformers runs it: two transformers with the norm before each layer, one over patches
and a class token, one over tokens with causal attention.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8
from PIL import Image

from pixsigma_jax.mesh_axes import AXES
from pixsigma_jax.models.layers import Compute, LayerNorm, Linear

# Of every published CLIP, OpenAI's and LAION's.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

Truncation = Literal["end", "slice"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerConfig:
  """Sizes of one of CLIP's two transformers.

  Attributes:
    width: of the residual stream (1024 for the images of L/14).
    num_layers, num_heads: 24 and 16 there.
    hidden: units of the feed-forward layer (4096).
    activation: "quick_gelu" (OpenAI's) or "gelu" (LAION's H/14).
    epsilon: of the layer norms.
  """

  width: int
  num_layers: int
  num_heads: int
  hidden: int
  activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
  epsilon: float = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipConfig:
  """Sizes of CLIP.

  Attributes:
    image, text: of the two transformers.
    projection: width of the embeddings that are compared.
    image_size, patch_size: pixels a side (224 and 14 for L/14).
    vocabulary, max_length: rows of the token table and of the position table (77).
    end: id of the token at which a text is embedded; None for the largest id in it,
      as files with `eos_token_id` 2 mean it.
  """

  image: TowerConfig
  text: TowerConfig
  projection: int
  image_size: int
  patch_size: int
  vocabulary: int
  max_length: int
  end: int | None = None


def layer_name(layer: int) -> str:
  """The name of a layer's subtree of parameters."""
  return f"layer_{layer:02d}"


class ImageTower(nn.Module):
  """Images to embeddings."""

  config: ClipConfig
  compute: Compute

  @nn.compact
  def __call__(self, images: Float32[Array, "b H W 3"]) -> Float32[Array, "b e"]:
    """Embeds normalised images of the config's size; see `normalized`."""
    config, tower = self.config, self.config.image
    p = config.patch_size
    width = (p, p, 3, tower.width)
    kernel = self.param("patch_kernel", nn.initializers.lecun_normal(), width)
    small = nn.initializers.normal(tower.width**-0.5)
    first = self.param("class_embedding", small, (tower.width,))
    count = (config.image_size // p) ** 2 + 1
    positions = self.param("positions", small, (count, tower.width))
    patches = einops.rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=p)
    x = self.compute.matmul(patches, kernel.reshape(-1, tower.width))
    first = jnp.broadcast_to(first, (len(x), 1, tower.width)).astype(x.dtype)
    x = jnp.concatenate([first, x], axis=1) + positions[None]
    x = LayerNorm(tower.epsilon, name="first_norm")(x)
    x = _Layers(tower, self.compute, name="layers")(x, None)
    x = LayerNorm(tower.epsilon, name="last_norm")(x[:, 0])
    return _Projection(config.projection, self.compute, name="projection")(x)


class TextTower(nn.Module):
  """Token ids to embeddings."""

  config: ClipConfig
  compute: Compute

  @nn.compact
  def __call__(self, ids: Int[Array, "b t"]) -> Float32[Array, "b e"]:
    """Embeds texts at their end token; what follows it is not looked at."""
    config, tower = self.config, self.config.text
    small = nn.initializers.normal(0.02)
    table = self.param("embedding", small, (config.vocabulary, tower.width))
    positions = self.param("positions", small, (config.max_length, tower.width))
    length = ids.shape[1]
    x = (table[ids] + positions[None, :length]).astype(jnp.float32)
    causal = jnp.tril(jnp.ones((length, length), bool))
    x = _Layers(tower, self.compute, name="layers")(x, causal)
    x = LayerNorm(tower.epsilon, name="last_norm")(x)
    ends = (ids if config.end is None else ids == config.end).argmax(axis=1)
    x = jnp.take_along_axis(x, ends[:, None, None], axis=1)[:, 0]
    return _Projection(config.projection, self.compute, name="projection")(x)


class _Layers(nn.Module):
  config: TowerConfig
  compute: Compute

  @nn.compact
  def __call__(
    self, x: Float32[Array, "b t d"], mask: Bool[Array, "t t"] | None
  ) -> Float32[Array, "b t d"]:
    for layer in range(self.config.num_layers):
      x = _Layer(self.config, self.compute, name=layer_name(layer))(x, mask)
    return x


class _Layer(nn.Module):
  config: TowerConfig
  compute: Compute

  @nn.compact
  def __call__(
    self, x: Float32[Array, "b t d"], mask: Bool[Array, "t t"] | None
  ) -> Float32[Array, "b t d"]:
    config, compute = self.config, self.compute
    y = LayerNorm(config.epsilon, name="attention_norm")(x)
    x = x + _Attention(config, compute, name="attention")(y, mask)
    y = LayerNorm(config.epsilon, name="mlp_norm")(x)
    y = Linear(config.hidden, compute, name="mlp_in")(y)
    if config.activation == "quick_gelu":
      y = y * jax.nn.sigmoid(1.702 * y)
    else:
      y = jax.nn.gelu(y, approximate=False)
    return x + Linear(config.width, compute, name="mlp_out")(y)


class _Attention(nn.Module):
  config: TowerConfig
  compute: Compute

  @nn.compact
  def __call__(
    self, x: Float32[Array, "b t d"], mask: Bool[Array, "t t"] | None
  ) -> Float32[Array, "b t d"]:
    config, compute = self.config, self.compute

    def project(name: str) -> Float[Array, "b t k f"]:
      projected = Linear(config.width, compute, name=name)(x).astype(compute.dtype)
      return einops.rearrange(projected, "b t (k f) -> b t k f", k=config.num_heads)

    q, k, v = (project(name) for name in "qkv")
    scores = jnp.einsum("btkf,bskf->bkts", q, k, preferred_element_type=jnp.float32)
    scores = scores * q.shape[-1] ** -0.5
    if mask is not None:
      scores = jnp.where(mask[None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(compute.dtype)
    out = jnp.einsum("bkts,bskf->btkf", weights, v, preferred_element_type=jnp.float32)
    out = einops.rearrange(out, "b t k f -> b t (k f)")
    return Linear(config.width, compute, name="out")(out)


class _Projection(nn.Module):
  features: int
  compute: Compute

  @nn.compact
  def __call__(self, x: Float32[Array, "b d"]) -> Float32[Array, "b e"]:
    init = nn.initializers.normal(x.shape[-1] ** -0.5)
    kernel = self.param("kernel", init, (x.shape[-1], self.features))
    return self.compute.matmul(x, kernel)


def tower(
  which: Literal["image", "text"], config: ClipConfig, compute: Compute
) -> ImageTower | TextTower:
  """One of the two networks."""
  return {"image": ImageTower, "text": TextTower}[which](config, compute)


def abstract_clip_params(
  config: ClipConfig, which: Literal["image", "text"]
) -> dict[str, Any]:
  """Shapes of a tower's parameters, as float32, without making them."""
  size = config.image_size
  inputs = {
    "image": jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32),
    "text": jax.ShapeDtypeStruct((1, config.max_length), jnp.int32),
  }
  network = tower(which, config, Compute(dtype=jnp.float32))
  return jax.eval_shape(network.init, jax.random.key(0), inputs[which])["params"]


def preprocess(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
  """Resizes the shorter side by Pillow's bicubic filter and cuts out the middle.

  As `CLIPImageProcessor` of transformers does before it normalises.
  """
  image = image.convert("RGB")
  width, height = image.size
  short = min(width, height)
  # Whole pixels, rounded down, as there.
  target = (size * width // short, size * height // short)
  if target != image.size:
    image = image.resize(target, Image.Resampling.BICUBIC)
  left, top = ((side - size) // 2 for side in target)
  return np.asarray(image.crop((left, top, left + size, top + size)))


def normalized(images: UInt8[Array, "b H W 3"]) -> Float32[Array, "b H W 3"]:
  """Pixels as the image tower takes them."""
  mean, std = (jnp.asarray(x, jnp.float32)[None, None, None] for x in (MEAN, STD))
  return (images.astype(jnp.float32) / 255 - mean) / std


@functools.partial(jax.jit, static_argnames=("which", "config", "dtype"))
def _embed(
  params: dict[str, Any],
  inputs: UInt8[Array, "b H W 3"] | Int[Array, "b t"],
  *,
  which: Literal["image", "text"],
  config: ClipConfig,
  dtype: DTypeLike,
) -> Float32[Array, "b e"]:
  with jax.default_matmul_precision("highest"):
    network = tower(which, config, Compute(dtype=dtype))
    inputs = normalized(inputs) if which == "image" else inputs
    return network.apply({"params": params}, inputs)  # pyright: ignore[reportReturnType]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Clip:
  """CLIP ready for use; `convert.clip.load_clip` makes one of files.

  Attributes:
    config: sizes of the networks.
    params: parameters of the towers that were loaded, "image" and "text".
    tokenizer: of transformers; None without the text tower.
    identity: hub id or folder, and a hash of the parameters.
    dtype: of matrix products; float32 where scores are to be published.
    mesh: devices that share a batch; parameters lie whole on each.
    batch_size: images or texts that are embedded together, for each device.
  """

  config: ClipConfig
  params: dict[str, Any] = dataclasses.field(repr=False)
  tokenizer: Any = dataclasses.field(repr=False)
  identity: dict[str, Any]
  dtype: DTypeLike
  mesh: Mesh
  batch_size: int = 16

  def embed_images(self, images: Sequence[Image.Image]) -> Float32[np.ndarray, "n e"]:
    """Embeds images of any size, each the same whatever stands beside it.

    Raises:
      ValueError: the image tower was not loaded.
    """
    return self.embed_pixels([preprocess(i, self.config.image_size) for i in images])

  def embed_pixels(
    self, pixels: Sequence[UInt8[np.ndarray, "size size 3"]]
  ) -> Float32[np.ndarray, "n e"]:
    """Embeds pixels of the network's own size, as `preprocess` or another makes them.

    Raises:
      ValueError: the image tower was not loaded.
    """
    size = self.config.image_size
    stacked = np.stack([*pixels]) if len(pixels) else np.zeros((0, size, size, 3), "u1")
    return self._in_batches("image", stacked)

  def embed_texts(
    self, texts: Sequence[str], *, truncate: Truncation = "end"
  ) -> Float32[np.ndarray, "n e"]:
    """Embeds texts, cut to the network's length where they are longer.

    Args:
      truncate: "end" cuts before the end token, as tokenizers do; "slice" cuts the ids
        themselves, so that long texts lose their end token and are embedded at the
        start token: what TextAtlasEval does.

    Raises:
      ValueError: the text tower was not loaded.
    """
    return self._in_batches("text", self._ids(texts, truncate))

  def count(self, text: str) -> int:
    """Number of tokens of `text`, start and end tokens included."""
    return len(self.tokenizer(text, verbose=False)["input_ids"])

  def _ids(self, texts: Sequence[str], truncate: Truncation) -> np.ndarray:
    if self.tokenizer is None:
      raise ValueError("CLIP's text tower was not loaded.")
    length = self.config.max_length
    # Behind its end token a text is not looked at: any id will do.
    ids = np.zeros((len(texts), length), np.int32)
    for row, text in zip(ids, texts, strict=True):
      tokens = self.tokenizer(text, verbose=False)["input_ids"]
      if len(tokens) > length and truncate == "end":
        tokens = [*tokens[: length - 1], tokens[-1]]
      row[: len(tokens)] = tokens[:length]
    return ids

  def _in_batches(
    self, which: Literal["image", "text"], rows: np.ndarray
  ) -> np.ndarray:
    if which not in self.params:
      raise ValueError(f"CLIP's {which} tower was not loaded.")
    axes = tuple(axis for axis in AXES if axis in self.mesh.shape)
    batch = self.batch_size * math.prod(self.mesh.shape[axis] for axis in axes)
    place = NamedSharding(self.mesh, P(axes))
    whole = NamedSharding(self.mesh, P())
    out = np.empty((len(rows), self.config.projection), np.float32)
    for start in range(0, len(rows), batch):
      part = rows[start : start + batch]
      count = len(part)
      part = np.pad(part, [(0, batch - count)] + [(0, 0)] * (part.ndim - 1))
      part = jax.make_array_from_callback(part.shape, place, part.__getitem__)
      embedded = _embed(
        self.params[which], part, which=which, config=self.config, dtype=self.dtype
      )
      out[start : start + batch] = np.asarray(jax.device_put(embedded, whole))[:count]
    return out
