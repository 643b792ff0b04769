"""Masked softmax attention in one place, by interchangeable implementations.

  xla      the reference: scores of all pairs, memory quadratic in tokens
  chunked  online softmax over chunks of queries and keys, memory linear in tokens
  splash   TPU's kernels, see `models/splash.py`
  cudnn    GPU's kernels: float16 or bfloat16, from compute capability 8.0 on
  auto     the best of them for the devices and the shapes at hand

All compute scores, softmax and the weighted sum in float32 (DESIGN, section 5) from
queries, keys and values of any float dtype. Keys where the mask is False are not seen
(they must hold finite numbers: the network zeroes padding where it enters); a query
that may see no key at all receives zeros.

XLA cannot divide a kernel among devices. On a mesh each device therefore attends with
the rows and the queries that it has, to the keys and values of everybody; or, where
less is sent so, with the rows that it has and some of the heads.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import einops
import jax
import jax.numpy as jnp
from absl import logging
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32

from pixsigma_jax.mesh_axes import CONTEXT, network_rows
from pixsigma_jax.models import products, splash

# Names under which remat policies find what the backward pass needs of attention.
OUTPUT = "attention_output"
CUDNN_FORWARD = "dot_product_attention_fwd"  # how JAX's primitives begin

_MASKED = -1e30  # finite: a fully masked chunk must not turn into inf - inf
_QUERY_CHUNK = 1024
_KEY_CHUNK = 1024
_FEW_SCORES = 2**18  # of a head


def attend(
  query: Float[Array, "b n k f"],
  key: Float[Array, "b m k f"],
  value: Float[Array, "b m k f"],
  mask: Bool[Array, "b m"],
  implementation: str,
  mesh: Mesh | None = None,
  *,
  keys_everywhere: bool = False,
) -> Float[Array, "b n k f"]:
  """softmax(q·kᵀ/√f)·v over the keys that `mask` allows, in the dtype of `value`.

  Args:
    implementation: one of `IMPLEMENTATIONS`, or `auto`.
    mesh: devices that share the work, with the axes of `pixsigma_jax.mesh_axes`. What
      an axis does not divide, all its devices compute.
    keys_everywhere: every device has all keys and values of its rows already.

  Raises:
    ValueError: `cudnn` in another dtype than it knows.
  """
  if implementation == "auto":
    implementation = choose(query, key, mesh)
  one_device = IMPLEMENTATIONS[implementation]
  if implementation == "splash":
    kind = _device(mesh).device_kind
    one_device = functools.partial(one_device, device_kind=kind)
  if implementation == "chunked":
    on_cpu = _device(mesh).platform == "cpu"
    one_device = functools.partial(one_device, one_by_one=on_cpu)
  if mesh is None or mesh.size == 1:
    return one_device(query, key, value, mask)

  rows, context = network_rows(mesh), mesh.shape[CONTEXT]
  if len(query) % math.prod(mesh.shape[axis] for axis in rows):
    rows = None

  def tokens(x: Array) -> str | None:
    return CONTEXT if x.shape[1] % context == 0 else None

  (n, heads), m = query.shape[1:3], key.shape[1]
  of_keys = None if keys_everywhere else tokens(key)
  split = context > 1 and of_keys is not None
  trades = split and tokens(query) is not None and trades_heads(n, m, heads, context)

  def each_device(query, key, value, mask):
    if trades:
      query, key, value = (_trade(x, give=2, take=1) for x in (query, key, value))
    elif split:  # the transpose hands each device the gradient of its own part
      key, value = (
        jax.lax.all_gather(x, CONTEXT, axis=1, tiled=True) for x in (key, value)
      )
    out = one_device(query, key, value, mask)
    return _trade(out, give=1, take=2) if trades else out

  return jax.shard_map(
    each_device,
    mesh=mesh,
    in_specs=(P(rows, tokens(query)), *[P(rows, of_keys)] * 2, P(rows)),
    out_specs=P(rows, tokens(query)),
    check_vma=False,  # scans that start from constants; kernels do not say what varies
  )(query, key, value, mask)


def trades_heads(queries: int, keys: int, heads: int, context: int) -> bool:
  """Whether devices that split an image's tokens trade tokens for heads to attend.

  Each then attends with some of the heads, from all tokens to all (Ulysses, Jacobs et
  al. 2023), in place of gathering keys and values. Between chips in a line gathering s
  bytes passes s·(c - 1)/c over a link, and a trade s/4 over the middle one: it pays for
  four devices and more, and not for keys that are compressed to a quarter. GPUs, whose
  links all reach each other, go by the same rule.
  """
  gathered = 2 * keys * (context - 1) / context
  traded = 2 * (queries + keys) / 4
  return heads % context == 0 and traded < gathered


def _trade(x: Float[Array, "b n k f"], *, give: int, take: int) -> Array:
  """Hands the other devices their parts of axis `give`, for theirs of axis `take`."""
  return jax.lax.all_to_all(x, CONTEXT, give, take, tiled=True)


def choose(
  query: Float[Array, "b n k f"], key: Float[Array, "b m k f"], mesh: Mesh | None
) -> str:
  """Resolves `auto` by the mesh's devices or those that JAX computes on."""
  # Not by the platform that is lowered for: what would be chosen then is traced for
  # all, where cuDNN asks for a GPU, and under remat lowered for all.
  n, m, width = query.shape[1], key.shape[1], query.shape[-1]
  return _choose(_device(mesh), jnp.dtype(query.dtype).name, n, m, width)


def _device(mesh: Mesh | None) -> Any:
  return jax.devices()[0] if mesh is None else mesh.devices.flat[0]


def best(
  platform: str, capability: float, dtype: str, n: int, m: int, width: int
) -> str:
  """The implementation that suits devices best, for n queries, m keys and one width.

  Args:
    capability: a GPU's compute capability; of other platforms nobody asks.
    dtype: of queries, keys and values.
  """
  if platform == "tpu":
    return "splash"
  cudnn = dtype in _CUDNN_DTYPES and width <= _CUDNN_WIDTH and capability >= 8
  if platform == "gpu" and cudnn:
    return "cudnn"
  return "xla" if n * m <= _FEW_SCORES else "chunked"


@functools.cache  # and so logged once
def _choose(device: Any, dtype: str, n: int, m: int, width: int) -> str:
  on_gpu = device.platform == "gpu"
  capability = float(device.compute_capability) if on_gpu else 0.0
  chosen = best(device.platform, capability, dtype, n, m, width)
  logging.info(
    "Attention of %d queries to %d keys of width %d in %s on %s: %s.",
    *(n, m, width, dtype, device.device_kind, chosen),
  )
  return chosen


def _named(out: Float[Array, "b n k f"]) -> Float[Array, "b n k f"]:
  """Names an array for remat policies; heads joined, so no narrow axis is padded."""
  flat = checkpoint_name(einops.rearrange(out, "b n k f -> b n (k f)"), OUTPUT)
  return einops.rearrange(flat, "b n (k f) -> b n k f", k=out.shape[2])


def _scores(
  query: Float[Array, "n f"], key: Float[Array, "m f"], mask: Bool[Array, " m"]
) -> Float32[Array, "n m"]:
  # Transposed before: a CPU multiplies rows by rows at half the speed.
  scores = products.matmul(query, key.T)
  hidden = jnp.where(mask, 0, _MASKED)
  return scores * query.shape[-1] ** -0.5 + hidden[None]


def _weighted_sum(
  weights: Float32[Array, "n m"], value: Float[Array, "m f"]
) -> Float32[Array, "n f"]:
  return products.matmul(weights.astype(value.dtype), value)


def _head_at_once(
  query: Float[Array, "n f"],
  key: Float[Array, "m f"],
  value: Float[Array, "m f"],
  mask: Bool[Array, " m"],
) -> Float[Array, "n f"]:
  scores = _scores(query, key, mask)
  weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
  out = _weighted_sum(weights, value) / weights.sum(axis=-1, keepdims=True)
  return jnp.where(mask.any(), out, 0).astype(value.dtype)


def _head_in_chunks(
  query: Float[Array, "n f"],
  key: Float[Array, "m f"],
  value: Float[Array, "m f"],
  mask: Bool[Array, " m"],
) -> Float[Array, "n f"]:
  """Online softmax (Milakov & Gimelshein 2018) with recomputation in the backward pass.

  Chunks are padded to equal length; padded keys are masked, padded queries cut off. A
  chunk that is all masked counts for nothing beside one that is not.
  """
  n, m = len(query), len(key)
  queries = _split(query, min(_QUERY_CHUNK, n))
  keys, values, masks = (_split(x, min(_KEY_CHUNK, m)) for x in (key, value, mask))

  @jax.checkpoint  # keeps (max, sum, total) of a chunk, not its scores
  def add_chunk(carry, chunk):
    query, peak, weight, total = carry
    key, value, mask = chunk
    scores = _scores(query, key, mask)
    new_peak = jnp.maximum(peak, jax.lax.stop_gradient(scores.max(axis=-1)))
    weights = jnp.exp(scores - new_peak[:, None])
    rescale = jnp.exp(peak - new_peak)
    weight = weight * rescale + weights.sum(axis=-1)
    total = total * rescale[:, None] + _weighted_sum(weights, value)
    return (query, new_peak, weight, total), None

  def one_query_chunk(query):
    start = (
      query,
      jnp.full(len(query), _MASKED, jnp.float32),
      jnp.zeros(len(query), jnp.float32),
      jnp.zeros(query.shape, jnp.float32),
    )
    (_, _, weight, total), _ = jax.lax.scan(add_chunk, start, (keys, values, masks))
    return jnp.where(mask.any(), total / weight[:, None], 0).astype(value.dtype)

  out = jax.lax.map(jax.checkpoint(one_query_chunk), queries)
  return einops.rearrange(out, "i n f -> (i n) f")[:n]


def _split(x: Array, chunk: int) -> Array:
  """`[n ...]` → `[i chunk ...]`, zero-padded to whole chunks."""
  x = jnp.pad(x, [(0, -len(x) % chunk)] + [(0, 0)] * (x.ndim - 1))
  return x.reshape(-1, chunk, *x.shape[1:])


def _attend_xla(
  query: Float[Array, "b n k f"],
  key: Float[Array, "b m k f"],
  value: Float[Array, "b m k f"],
  mask: Bool[Array, "b m"],
  *,
  head: Callable[..., Array] = _head_at_once,
) -> Float[Array, "b n k f"]:
  heads = jax.vmap(head, in_axes=(0, 0, 0, None))
  query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
  return _named(jnp.swapaxes(jax.vmap(heads)(query, key, value, mask), 1, 2))


def _attend_chunked(
  query: Float[Array, "b n k f"],
  key: Float[Array, "b m k f"],
  value: Float[Array, "b m k f"],
  mask: Bool[Array, "b m"],
  *,
  one_by_one: bool = False,
) -> Float[Array, "b n k f"]:
  """Chunked attention; a head at a time where `one_by_one`, for a CPU's cache."""
  if not one_by_one:
    return _attend_xla(query, key, value, mask, head=_head_in_chunks)
  heads = [einops.rearrange(x, "b n k f -> (b k) n f") for x in (query, key, value)]
  masks = jnp.repeat(mask, query.shape[2], axis=0)
  out = jax.lax.map(lambda each: _head_in_chunks(*each), (*heads, masks))
  return _named(einops.rearrange(out, "(b k) n f -> b n k f", b=len(query)))


def check_dtype(implementation: str, dtype: Any) -> None:
  """Refuses what an implementation does not compute in.

  Raises:
    ValueError: `cudnn` in another dtype than it knows.
  """
  if implementation == "cudnn" and (name := jnp.dtype(dtype).name) not in _CUDNN_DTYPES:
    raise ValueError(
      f"Attention 'cudnn' computes in {' or '.join(_CUDNN_DTYPES)}, not in {name}: "
      "choose such a dtype, or attention 'chunked'."
    )


_CUDNN_DTYPES = ("float16", "bfloat16")
_CUDNN_WIDTH = 128  # 256 from Hopper on, which no model here has


def _attend_cudnn(
  query: Float[Array, "b n k f"],
  key: Float[Array, "b m k f"],
  value: Float[Array, "b m k f"],
  mask: Bool[Array, "b m"],
) -> Float[Array, "b n k f"]:
  """`jax.nn.dot_product_attention`, which knows of padding as a number of keys.

  A mask need not be a beginning of the keys: those that it allows are brought to the
  front, which changes nothing for attention. Not named for remat policies: what they
  keep is all that the kernel returns, see `CUDNN_FORWARD`.
  """
  width = query.shape[-1]
  check_dtype("cudnn", query.dtype)
  order = jnp.argsort(~mask, axis=-1, stable=True)
  seen = jnp.take_along_axis(mask, order, axis=-1)

  def front(x: Array) -> Array:
    x = jnp.take_along_axis(x, order[:, :, None, None], axis=1)
    # Also keeps out of the gradient whatever cuDNN leaves where it does not look.
    return jnp.where(seen[:, :, None, None], x, 0)

  def whole(x: Array) -> Array:
    # cuDNN wants a multiple of 8 features, and for a gradient an even number of tokens.
    return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, -width % 8)))

  out = jax.nn.dot_product_attention(
    *(whole(x) for x in (query, front(key), front(value))),
    key_value_seq_lengths=jnp.maximum(seen.sum(axis=-1, dtype=jnp.int32), 1),
    scale=width**-0.5,
    implementation="cudnn",
  )[:, : query.shape[1], :, :width]
  return jnp.where(seen.any(axis=-1).reshape(-1, 1, 1, 1), out, 0)


IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {
  "xla": _attend_xla,
  "chunked": _attend_chunked,
  "splash": functools.partial(splash.attend, residual_name=OUTPUT),
  "cudnn": _attend_cudnn,
}
CHOICES = (*IMPLEMENTATIONS, "auto")
