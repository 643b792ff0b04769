"""Masked softmax attention in one place, by interchangeable implementations.

  xla      the reference: scores of all pairs, memory quadratic in tokens
  chunked  online softmax over chunks of queries and keys, memory linear in tokens

Both compute scores, softmax and the weighted sum in float32 (DESIGN, section 5) from
queries, keys and values of any float dtype. Keys where the mask is False are not seen
(they must hold finite numbers: the network zeroes padding where it enters); a query
that may see no key at all receives zeros.
"""

from collections.abc import Callable

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_MASKED = -1e30  # finite: a fully masked chunk must not turn into inf - inf
_QUERY_CHUNK = 1024
_KEY_CHUNK = 1024


def attend(
  query: Float[Array, "b n k f"],
  key: Float[Array, "b m k f"],
  value: Float[Array, "b m k f"],
  mask: Bool[Array, "b m"],
  implementation: str,
) -> Float[Array, "b n k f"]:
  """softmax(q·kᵀ/√f)·v over the keys that `mask` allows, in the dtype of `value`.

  `implementation` is one of `IMPLEMENTATIONS`.
  """
  return IMPLEMENTATIONS[implementation](query, key, value, mask)


def _scores(
  query: Float[Array, "b n k f"], key: Float[Array, "b m k f"], mask: Bool[Array, "b m"]
) -> Float[Array, "b k n m"]:
  scores = jnp.einsum(
    "bnkf,bmkf->bknm", query, key, preferred_element_type=jnp.float32
  ) * (query.shape[-1] ** -0.5)
  return jnp.where(mask[:, None, None, :], scores, _MASKED)


def _weighted_sum(
  weights: Float[Array, "b k n m"], value: Float[Array, "b m k f"]
) -> Float[Array, "b n k f"]:
  return jnp.einsum(
    "bknm,bmkf->bnkf",
    weights.astype(value.dtype),
    value,
    preferred_element_type=jnp.float32,
  )


def _normalise(
  total: Float[Array, "b n k f"], weight: Float[Array, "b k n"]
) -> Float[Array, "b n k f"]:
  weight = einops.rearrange(weight, "b k n -> b n k 1")
  return total / jnp.maximum(weight, jnp.finfo(jnp.float32).tiny)


def _attend_xla(
  query: Float[Array, "b n k f"],
  key: Float[Array, "b m k f"],
  value: Float[Array, "b m k f"],
  mask: Bool[Array, "b m"],
) -> Float[Array, "b n k f"]:
  scores = _scores(query, key, mask)
  peak = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
  weights = jnp.where(mask[:, None, None, :], jnp.exp(scores - peak), 0)
  total = _weighted_sum(weights, value)
  return _normalise(total, weights.sum(axis=-1)).astype(value.dtype)


def _attend_chunked(
  query: Float[Array, "b n k f"],
  key: Float[Array, "b m k f"],
  value: Float[Array, "b m k f"],
  mask: Bool[Array, "b m"],
) -> Float[Array, "b n k f"]:
  """Online softmax (Milakov & Gimelshein 2018) with recomputation in the backward pass.

  Chunks are padded to equal length; padded keys are masked, padded queries cut off.
  """
  n, m = query.shape[1], key.shape[1]
  queries = _split(query, min(_QUERY_CHUNK, n))
  key_chunk = min(_KEY_CHUNK, m)
  keys, values, masks = (_split(x, key_chunk) for x in (key, value, mask))

  @jax.checkpoint  # keeps (max, sum, total) of a chunk, not its scores
  def add_chunk(carry, chunk):
    query, peak, weight, total = carry
    key, value, mask = chunk
    scores = _scores(query, key, mask)
    new_peak = jnp.maximum(peak, jax.lax.stop_gradient(scores.max(axis=-1)))
    weights = jnp.exp(scores - new_peak[..., None])
    weights = jnp.where(mask[:, None, None, :], weights, 0)
    rescale = jnp.exp(peak - new_peak)
    weight = weight * rescale + weights.sum(axis=-1)
    total = total * einops.rearrange(rescale, "b k n -> b n k 1")
    return (query, new_peak, weight, total + _weighted_sum(weights, value)), None

  def one_query_chunk(query):
    b, n, k, f = query.shape
    start = (
      query,
      jnp.full((b, k, n), _MASKED, jnp.float32),
      jnp.zeros((b, k, n), jnp.float32),
      jnp.zeros((b, n, k, f), jnp.float32),
    )
    (_, _, weight, total), _ = jax.lax.scan(add_chunk, start, (keys, values, masks))
    return _normalise(total, weight).astype(value.dtype)

  out = jax.lax.map(jax.checkpoint(one_query_chunk), queries)
  return einops.rearrange(out, "i b n k f -> b (i n) k f")[:, :n]


def _split(x: Array, chunk: int) -> Array:
  """`[b n ...]` → `[i b chunk ...]`, zero-padded to whole chunks."""
  padding = [(0, 0), (0, -x.shape[1] % chunk)] + [(0, 0)] * (x.ndim - 2)
  return einops.rearrange(jnp.pad(x, padding), "b (i n) ... -> i b n ...", n=chunk)


IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {
  "xla": _attend_xla,
  "chunked": _attend_chunked,
}
