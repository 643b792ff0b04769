"""The T5 v1.1 encoder (Flan-T5's too), not trained: captions to embeddings.

Architecture: Raffel et al. 2020 (arXiv 1910.10683) with the gated GELU of Shazeer 2020
(arXiv 2002.05202), as `modeling_t5.py` of transformers runs it. Three things in it are
unusual: queries meet keys without 1/√f, positions enter only as a bias of the scores,
which layer 0 owns and all layers share, and norms neither centre nor shift.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from pixsigma_jax import tree
from pixsigma_jax.mesh_axes import CONTEXT, DATA, FSDP
from pixsigma_jax.models.layers import Initializer
from pixsigma_jax.wording import shortened

# Captions and a length in tokens to arrays of a batch.
ReadCaptions: TypeAlias = Callable[[Sequence[str], int], dict[str, np.ndarray]]

PAD, END = 0, 1  # ids, the same in every published T5

_EPSILON = 1e-6
# Finite: where a row has no key at all (it pads a batch), softmax stays a number.
_MASKED = float(np.finfo(np.float32).min)

# Name of a leaf → where it is split. Heads and hidden units lie on `fsdp`, so that a
# layer of a small batch costs two sums over devices, and no kernel is ever gathered.
RULES: tuple[tuple[str, P], ...] = (
  (r"attention/(q|k|v)/kernel$", P(None, FSDP)),
  (r"attention/out/kernel$", P(FSDP, None)),
  (r"mlp/(gate|in)/kernel$", P(None, FSDP)),
  (r"mlp/out/kernel$", P(FSDP, None)),
  (r"^embedding$", P(None, FSDP)),
  (r"(^relative_bias|/scale)$", P()),
)
# Prompts are split over the other axes; `fsdp` has the heads of all of them.
_ROW_AXES = (DATA, CONTEXT)

_MAX_ROWS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
  """Sizes of an encoder.

  Attributes:
    width: of the embeddings (4096 for XXL).
    num_layers, num_heads: 24 and 64 for XXL.
    head_width: features of a head; num_heads · head_width need not be `width`.
    hidden: units of the feed-forward layer (10240 for XXL).
    vocabulary: rows of the embedding table; some of the last belong to no token.
    num_buckets, max_distance: distances between tokens are told apart up to
      `num_buckets` / 4, then on a logarithmic scale up to `max_distance`.
  """

  width: int
  num_layers: int
  num_heads: int
  head_width: int
  hidden: int
  vocabulary: int
  num_buckets: int = 32
  max_distance: int = 128


def layer_name(layer: int) -> str:
  """The name of a layer's subtree of parameters."""
  return f"layer_{layer:02d}"


class T5Encoder(nn.Module):
  """Token ids to embeddings.

  Parameters lie layer by layer (`layer_00`, …), so that each tensor of a file goes to
  its devices by itself. Matrix products take operands in `dtype`; everything else, the
  residual stream, norms and softmax, is float32.
  """

  config: T5Config
  dtype: DTypeLike

  @nn.compact
  def __call__(
    self, ids: Int[Array, "b t"], mask: Bool[Array, "b t"]
  ) -> Float32[Array, "b t e"]:
    """Embeds every position; `mask` is True where a token may be attended to."""
    config = self.config
    embedding = self.param(
      "embedding", nn.initializers.normal(1.0), (config.vocabulary, config.width)
    )
    relative_bias = self.param(
      "relative_bias",
      nn.initializers.normal(config.width**-0.5),
      (config.num_buckets, config.num_heads),
    )
    buckets = relative_buckets(ids.shape[1], config.num_buckets, config.max_distance)
    bias = jnp.moveaxis(relative_bias.astype(jnp.float32)[buckets], -1, 0)
    x = embedding[ids].astype(jnp.float32)
    for layer in range(config.num_layers):
      x = _Layer(config, self.dtype, name=layer_name(layer))(x, bias, mask)
    return _RMSNorm(name="final_norm")(x)


def relative_buckets(
  length: int, num_buckets: int, max_distance: int
) -> Int32[np.ndarray, "t t"]:
  """The bucket of the distance from each query (row) to each key (column).

  `T5Attention._relative_position_bucket` of transformers, in both directions: the upper
  half of the buckets is for keys after the query. Half of each half counts single
  steps, the rest grows logarithmically up to `max_distance`.
  """
  steps = np.arange(length, dtype=np.int32)
  offsets = steps[None, :] - steps[:, None]
  per_side = num_buckets // 2
  exact = per_side // 2
  distance = np.abs(offsets)
  # float32 and this order of operations, so that bucket borders fall as they do there.
  ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
  scale = np.float32(math.log(max_distance / exact))
  far = exact + (ratio / scale * np.float32(per_side - exact)).astype(np.int32)
  bucket = np.where(distance < exact, distance, np.minimum(far, per_side - 1))
  return (bucket + per_side * (offsets > 0)).astype(np.int32)


class _RMSNorm(nn.Module):
  @nn.compact
  def __call__(self, x: Float32[Array, "b t d"]) -> Float32[Array, "b t d"]:
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
    x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + _EPSILON)
    return x * scale.astype(jnp.float32)[None, None]


class _Linear(nn.Module):
  """x · kernel without a bias, accumulated in float32."""

  features: int
  dtype: DTypeLike
  kernel_init: Initializer = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, x: Float[Array, "b t i"]) -> Float32[Array, "b t o"]:
    kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
    return jnp.matmul(
      x.astype(self.dtype),
      kernel.astype(self.dtype),
      preferred_element_type=jnp.float32,
    )


class _Attention(nn.Module):
  config: T5Config
  dtype: DTypeLike

  @nn.compact
  def __call__(
    self,
    x: Float32[Array, "b t d"],
    bias: Float32[Array, "k t t"],
    mask: Bool[Array, "b t"],
  ) -> Float32[Array, "b t d"]:
    heads = (self.config.num_heads, self.config.head_width)
    inner = math.prod(heads)
    # Queries are initialised small instead of divided by √f.
    small = nn.initializers.variance_scaling(1 / heads[1], "fan_in", "normal")

    def project(name: str, init: Initializer) -> Float[Array, "b t k f"]:
      projected = _Linear(inner, self.dtype, init, name=name)(x)
      return projected.astype(self.dtype).reshape(*x.shape[:2], *heads)

    q = project("q", small)
    k, v = (project(name, nn.initializers.lecun_normal()) for name in "kv")
    scores = jnp.einsum("btkf,bskf->bkts", q, k, preferred_element_type=jnp.float32)
    # Only keys are masked: queries at padding look at the caption too.
    scores = jnp.where(mask[:, None, None, :], scores + bias[None], _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
    out = jnp.einsum("bkts,bskf->btkf", weights, v, preferred_element_type=jnp.float32)
    return _Linear(x.shape[-1], self.dtype, name="out")(
      out.reshape(*x.shape[:2], inner)
    )


class _MLP(nn.Module):
  config: T5Config
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Float32[Array, "b t d"]) -> Float32[Array, "b t d"]:
    gate, linear = (
      _Linear(self.config.hidden, self.dtype, name=name)(x) for name in ("gate", "in")
    )
    hidden = jax.nn.gelu(gate, approximate=True) * linear
    return _Linear(x.shape[-1], self.dtype, name="out")(hidden)


class _Layer(nn.Module):
  config: T5Config
  dtype: DTypeLike

  @nn.compact
  def __call__(
    self,
    x: Float32[Array, "b t d"],
    bias: Float32[Array, "k t t"],
    mask: Bool[Array, "b t"],
  ) -> Float32[Array, "b t d"]:
    attention = _Attention(self.config, self.dtype, name="attention")
    x = x + attention(_RMSNorm(name="attention_norm")(x), bias, mask)
    mlp = _MLP(self.config, self.dtype, name="mlp")
    return x + mlp(_RMSNorm(name="mlp_norm")(x))


def abstract_t5_params(config: T5Config) -> dict[str, Any]:
  """Shapes of the parameters, as float32, without making them."""
  ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  mask = jax.ShapeDtypeStruct((1, 1), jnp.bool_)
  encoder = T5Encoder(config, jnp.float32)
  return jax.eval_shape(encoder.init, jax.random.key(0), ids, mask)["params"]


def t5_shardings(config: T5Config, mesh: Mesh | AbstractMesh) -> dict[str, Any]:
  """A `NamedSharding` for every parameter, by `RULES`.

  Args:
    mesh: with the axes of `pixsigma_jax.sharding`.

  Raises:
    ValueError: `fsdp` does not divide the width, the heads' features or the hidden
      units.
  """

  def place(name: str, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    spec = next(spec for rule, spec in RULES if re.search(rule, name))
    for size, axis in zip(leaf.shape, spec, strict=False):
      if axis and size % mesh.shape[axis]:
        raise ValueError(
          f"T5's {name!r} of shape {leaf.shape} cannot be split: mesh axis "
          f"{axis}={mesh.shape[axis]} does not divide {size}."
        )
    return NamedSharding(mesh, spec)

  return tree.map_with_name(place, abstract_t5_params(config))


@functools.partial(jax.jit, static_argnames=("config", "dtype", "place"))
def _embed(
  params: dict[str, Any],
  ids: Int32[Array, "b t"],
  mask: Bool[Array, "b t"],
  *,
  config: T5Config,
  dtype: DTypeLike,
  place: NamedSharding,
) -> Float32[Array, "b t e"]:
  embeddings = T5Encoder(config, dtype).apply({"params": params}, ids, mask)
  return jax.lax.with_sharding_constraint(embeddings, place)  # pyright: ignore[reportReturnType]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class T5TextEncoder:
  """Captions to T5's embeddings; `convert.t5.load_text_encoder` makes one of files.

  Attributes:
    config: sizes of the network.
    params: its parameters, placed by `t5_shardings` on `mesh`.
    tokenizer: a fast tokenizer of transformers, which ends every caption with `</s>`.
    dtype: of matrix products.
    mesh: the devices it runs on.
  """

  config: T5Config
  params: dict[str, Any] = dataclasses.field(repr=False)
  tokenizer: Any = dataclasses.field(repr=False)
  dtype: DTypeLike
  mesh: Mesh

  @property
  def width(self) -> int:
    """Numbers in a token's embedding."""
    return self.config.width

  @property
  def identity(self) -> dict[str, Any]:
    """Identity in checkpoints and records, by which another encoder is refused."""
    return {"name": "t5", "width": self.width}

  @property
  def read_captions(self) -> ReadCaptions:
    """Captions to `caption_ids` int32 and `caption_mask` bool, both `[b t]`.

    It can be sent to another process, and raises as `encode` does.
    """
    return functools.partial(_read_captions, self.tokenizer)

  def count(self, prompt: str) -> int:
    """Number of tokens of `prompt`, the end token included."""
    return len(_ids(self.tokenizer, prompt))

  def truncated(self, prompt: str, length: int) -> tuple[str, str]:
    """The start of `prompt` that fits in `length` tokens, and what is cut off.

    The two together are `prompt`; the second is empty if all of it fits. The start
    has the tokens that a truncating tokenizer keeps, the end token among them, but for
    those last ones that are not a whole character.

    Raises:
      ValueError: `length` leaves no room for the end token.
    """
    return _truncated(self.tokenizer, prompt, length)

  def encode(
    self, prompts: Sequence[str], length: int
  ) -> tuple[Float32[np.ndarray, "b t e"], Bool[np.ndarray, "b t"]]:
    """Embeds each prompt in `length` positions, padded on the right.

    A program is compiled for each `length` and each power of two of prompts up to 16
    (times the mesh's `data` and `context`); more prompts are embedded in turns.

    Returns:
      caption_embeddings and caption_mask (True up to and with the end token).
      Embeddings behind the mask are not zero: they are what T5 makes of padding, and
      PixArt's null caption contains them.

    Raises:
      ValueError: a prompt has more than `length` tokens.
    """
    read = self.read_captions(prompts, length)
    ids, mask = read["caption_ids"], read["caption_mask"]
    embeddings = np.empty((len(prompts), length, self.width), np.float32)
    copies = math.prod(self.mesh.shape[axis] for axis in _ROW_AXES)
    for start in range(0, len(prompts), _MAX_ROWS * copies):
      turn = slice(start, start + _MAX_ROWS * copies)
      count = len(ids[turn])
      rows = copies * (1 << (math.ceil(count / copies) - 1).bit_length())
      embeddings[turn] = self._run(ids[turn], mask[turn], rows)[:count]
    return embeddings, mask

  def embed(
    self, ids: Int32[Array, "b t"], mask: Bool[Array, "b t"], place: NamedSharding
  ) -> Float32[Array, "b t e"]:
    """Embeds the output of `read_captions` on the devices, onto `place`."""
    return _embed(
      self.params, ids, mask, config=self.config, dtype=self.dtype, place=place
    )

  def _run(
    self, ids: Int32[np.ndarray, "n t"], mask: Bool[np.ndarray, "n t"], rows: int
  ) -> Float32[np.ndarray, "b t e"]:
    def placed(array: np.ndarray) -> Array:
      array = np.pad(array, ((0, rows - len(array)), (0, 0)))
      place = NamedSharding(self.mesh, P(_ROW_AXES))
      return jax.make_array_from_callback(array.shape, place, array.__getitem__)

    # Whole on every device, so that every process can read it.
    whole = NamedSharding(self.mesh, P())
    return np.asarray(self.embed(placed(ids), placed(mask), whole))


def _ids(tokenizer: Any, prompt: str) -> list[int]:
  # Not verbose: it would warn beyond 512 tokens, which T5 itself does not mind.
  return tokenizer(prompt, verbose=False)["input_ids"]


def _truncated(tokenizer: Any, prompt: str, length: int) -> tuple[str, str]:
  if length < 1:
    raise ValueError(f"A caption takes at least its end token: {length} is no limit.")
  if len(_ids(tokenizer, prompt)) <= length:
    return prompt, ""
  coded = tokenizer(prompt, return_offsets_mapping=True, verbose=False)
  ends = [stop for _, stop in coded["offset_mapping"][: length - 1]]
  # A character may be several tokens ("½" is read as "1/2"): cut before it.
  while ends and len(_ids(tokenizer, prompt[: ends[-1]])) > length:
    ends.pop()
  stop = ends[-1] if ends else 0
  return prompt[:stop], prompt[stop:]


def _read_captions(
  tokenizer: Any, prompts: Sequence[str], length: int
) -> dict[str, np.ndarray]:
  ids = np.full((len(prompts), length), PAD, np.int32)
  mask = np.zeros((len(prompts), length), bool)
  for row, prompt in enumerate(prompts):
    tokens = _ids(tokenizer, prompt)
    if len(tokens) > length:
      _, cut = _truncated(tokenizer, prompt, length)
      raise ValueError(
        f"The caption {shortened(prompt)} has {len(tokens)} tokens (the end token "
        f"included), and the limit is {length}: {shortened(cut)} at its end would be "
        "cut off. Shorten it, or raise --caption_length if you are preparing data."
      )
    ids[row, : len(tokens)] = tokens
    mask[row, : len(tokens)] = True
  return {"caption_ids": ids, "caption_mask": mask}
