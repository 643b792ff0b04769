"""Attention on TPU in two Pallas kernels, forward and backward, heads' widths in rows.

A matrix unit holds a piece of one matrix, as wide and as deep as itself, and takes time
for every row of the other that streams through it. A head is 72 wide, a little more
than half of a unit of 128 and a quarter of one of 256. Scores need that width in the
unit's depth, where it must be padded. The output, dq, dk and dv have that width in rows
here, where JAX's splash attention has it in columns: 72 rows, and full pieces. Operands
have the same layout, in memory and in the core, where 72 columns would take 128 places.
Each query's largest score and sum are rows, not columns.

Padding rows are used too. The key mask uses a padding row of the head dimension, with
ones in queries and large negative numbers where a key is hidden, which costs nothing.
Rows of ones beside the values make the sums of the weights in the output.

The backward pass makes scores and their gradient once: JAX's two kernels make them
twice, seven matrix products for each block of queries and keys, and its one kernel
writes a dq for every block of keys, 6.5 GB at 4096 pixels, to be summed afterwards.
Here the dq of a whole head stays in the core's own memory until every block of keys has
added to it: five products, and nothing to sum.

Formulas: FlashAttention-2 (Dao 2023), algorithms 1 and 2. Heads may be divided among
the two cores of a TPU v5p, of which JAX's backward kernels use one.
"""

import dataclasses
import functools
from typing import Any

import einops
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Float32

# How kernels are called in a compiled program, where `plan` counts them.
NAME = "attention"

TILE_ROWS = 16  # of bfloat16; twice those of float32, see `tile_rows`
_LEAST = -0.7 * float(jnp.finfo(jnp.float32).max)  # below every score
HIDDEN = -1e9  # or less: what is added to the score of a hidden key
WIDEST = 128  # head of which `_BLOCKS` has room for blocks


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of attention's kernels, ours and JAX's.

  Attributes:
    residual_name: of what the backward pass needs of the forward pass: the output and
      the logarithm of each query's sum.
    block_q, block_k: multiples of 128 that divide the lengths.
    at_once: what the forward pass takes together, queries in ours, a multiple of
      `block_q`, and keys in JAX's, of `block_k`.
    interpret: runs the kernels step by step in XLA, on any platform.
  """

  residual_name: str
  block_q: int
  block_k: int
  at_once: int
  interpret: bool


def room(queries: int, width: int) -> int:
  """Bytes of a core's own memory in which the backward pass of a head runs.

  Its dq in float32; and blocks, as many as there are.
  """
  return queries * padded(width, TILE_ROWS) * 4 + _BLOCKS


def tile_rows(itemsize: int) -> int:
  """Rows to which a TPU fills arrays whose numbers have so many bytes."""
  return TILE_ROWS * 2 // itemsize


_BLOCKS = 24 * 2**20  # and of the forward pass, with what a compiler adds


def attend(
  options: Options,
  query: Float[Array, "b n k f"],
  key: Float[Array, "b m k f"],
  value: Float[Array, "b m k f"],
  mask: Bool[Array, "b m"],
) -> Float[Array, "b n k f"]:
  """softmax(q·kᵀ/√f)·v over keys that are seen; 0 where none is."""
  query, key, value = (_in_rows(x) for x in (query, key, value))
  seen = mask[:, None].astype(jnp.float32)
  out: Any = _attend(options, query, key, value, seen)
  return _out_of_rows(out, len(mask))


def _in_rows(x: Float[Array, "b n k f"]) -> Float[Array, "bk f n"]:
  # Heads joined while it is turned: their 72 features by themselves would take 128
  # places, and XLA a pass over twice the bytes. So a matrix product writes it turned.
  f = x.shape[-1]
  x = einops.rearrange(x, "b n k f -> b n (k f)").swapaxes(1, 2)
  return einops.rearrange(x, "b (k f) n -> (b k) f n", f=f)


def _out_of_rows(x: Float[Array, "bk f n"], batch: int) -> Float[Array, "b n k f"]:
  f = x.shape[1]
  x = einops.rearrange(x, "(b k) f n -> b (k f) n", b=batch).swapaxes(1, 2)
  return einops.rearrange(x, "b n (k f) -> b n k f", f=f)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
  options: Options,
  query: Float[Array, "h f n"],
  key: Float[Array, "h f m"],
  value: Float[Array, "h f m"],
  mask: Float32[Array, "b 1 m"],
) -> Float[Array, "h f n"]:
  out, _ = _forward(options, query, key, value, mask)
  return out


def _forward(options, *operands):
  out, logsumexp = _attention(options, *operands)
  out = checkpoint_name(out, options.residual_name)
  logsumexp = checkpoint_name(logsumexp, options.residual_name)
  return out, (*operands, out, logsumexp)


def _backward(options, residuals, gradient):
  query, key, value, mask, out, logsumexp = residuals
  correction = jnp.einsum(
    "hfn,hfn->hn", out, gradient, preferred_element_type=jnp.float32
  )
  gradients = _gradients(
    options, query, key, value, mask, gradient, logsumexp, correction
  )
  return *gradients, None


_attend.defvjp(_forward, _backward)


def _places(heads: int, images: int, axis_q: int):
  """Block specs of queries, of keys and of an image's mask.

  Each block is chosen by its place in a grid of heads, blocks of queries (`axis_q`)
  and blocks of keys.
  """
  axis_k = 3 - axis_q

  def of_queries(*place):
    return place[0], 0, place[axis_q]

  def of_keys(*place):
    return place[0], 0, place[axis_k]

  def of_mask(*place):
    return jax.lax.div(place[0], heads // images), 0, place[axis_k]

  return of_queries, of_keys, of_mask


# Kernels are told their last blocks, and do not ask Pallas: JAX 0.11.0 to 0.11.2 keep
# what it answered a module's function, and give it to the next grid of such blocks
# (jax-ml/jax issue 40847). A partial, new with each call, is traced anew.
# Without its own `jit`, remat re-runs the kernel although its output was saved.
@functools.partial(jax.jit, static_argnums=0)
def _attention(
  options: Options,
  query: Float[Array, "h f n"],
  key: Float[Array, "h f m"],
  value: Float[Array, "h f m"],
  mask: Float32[Array, "b 1 m"],
) -> tuple[Float[Array, "h f n"], Float32[Array, "h n"]]:
  """Returns the output and its logsumexp."""
  from jax.experimental import pallas as pl  # half a second that only TPUs need
  from jax.experimental.pallas import tpu as pltpu

  (heads, f, n), m = query.shape, key.shape[-1]
  rows, dtype = padded(f + 1, TILE_ROWS), query.dtype
  block_q, block_k = options.at_once, options.block_k
  of_queries, of_keys, of_mask = _places(heads, len(mask), axis_q=1)
  out, logsumexp = pl.pallas_call(
    functools.partial(_forward_kernel, last_k=m // block_k - 1),
    grid=(heads, n // block_q, m // block_k),
    in_specs=[
      pl.BlockSpec((None, f, block_q), of_queries),
      pl.BlockSpec((None, f, block_k), of_keys),
      pl.BlockSpec((None, f, block_k), of_keys),
      pl.BlockSpec((None, 1, block_k), of_mask),
    ],
    out_specs=[
      pl.BlockSpec((None, f, block_q), of_queries),
      pl.BlockSpec((None, 1, block_q), of_queries),
    ],
    out_shape=[
      jax.ShapeDtypeStruct((heads, f, n), dtype),
      jax.ShapeDtypeStruct((heads, 1, n), jnp.float32),
    ],
    scratch_shapes=[
      *(pltpu.VMEM((rows, block), dtype) for block in (block_q, block_k, block_k)),
      pltpu.VMEM((1, block_q), jnp.float32),
      pltpu.VMEM((rows, block_q), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary"),
      vmem_limit_bytes=_BLOCKS,
    ),
    name=f"{NAME}_forward_{block_q}_{block_k}",
    interpret=options.interpret,
  )(query, key, value, mask)
  return out, logsumexp[:, 0]


def _forward_kernel(
  q_ref,
  k_ref,
  v_ref,
  mask_ref,
  out_ref,
  logsumexp_ref,
  q_wide,
  k_wide,
  v_wide,
  peak,
  total,
  *,
  last_k: int,
):
  """Forward kernel for one block of queries, in columns, and one of keys, in rows."""
  from jax.experimental import pallas as pl

  j, f = pl.program_id(2), q_ref.shape[0]

  @pl.when(j == 0)
  def _():
    _widen(q_wide, _scaled(q_ref), 1)
    peak[...] = jnp.full_like(peak, _LEAST)
    total[...] = jnp.zeros_like(total)

  _widen(k_wide, k_ref[...], _hiding(mask_ref))
  _widen(v_wide, v_ref[...], 1)
  scores = _product(k_wide[...], q_wide[...], 0, 0)
  before = peak[...]
  after = jnp.maximum(before, scores.max(axis=0, keepdims=True))
  p = jnp.exp(scores - after).astype(v_wide.dtype)
  total[...] = total[...] * jnp.exp(before - after) + _product(v_wide[...], p, 1, 0)
  peak[...] = after

  @pl.when(j == last_k)
  def _():
    weight, sees = total[f : f + 1, :], peak[...] > HIDDEN / 2
    # A product, in which what is no number stays so.
    out = total[:f, :] * jnp.where(sees, 1 / weight, 0.0)
    out_ref[...] = out.astype(out_ref.dtype)
    # 0 where no key is seen: beside it hidden ones weigh nothing in the backward pass.
    logsumexp_ref[...] = jnp.where(sees, peak[...] + jnp.log(weight), 0.0)


def _gradients(
  options: Options,
  query: Float[Array, "h f n"],
  key: Float[Array, "h f m"],
  value: Float[Array, "h f m"],
  mask: Float32[Array, "b 1 m"],
  gradient: Float[Array, "h f n"],
  logsumexp: Float32[Array, "h n"],
  correction: Float32[Array, "h n"],
) -> tuple[Float[Array, "h f n"], Float[Array, "h f m"], Float[Array, "h f m"]]:
  """Gradients with respect to queries, keys and values.

  Args:
    gradient: with respect to the output.
    logsumexp: of each query's scores.
    correction: each query's sum of output times `gradient`.
  """
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import tpu as pltpu

  (heads, f, n), m = query.shape, key.shape[-1]
  rows, dtype = padded(f + 1, TILE_ROWS), query.dtype
  block_q, block_k = options.block_q, options.block_k
  last_q, last_k = n // block_q - 1, m // block_k - 1
  of_queries, of_keys, of_mask = _places(heads, len(mask), axis_q=2)

  def of_result(h, j, i):
    # One block until the last keys, when each is written once.
    return h, 0, jnp.where(j == last_k, i, 0)

  sums = n, block_k, block_k
  return pl.pallas_call(
    functools.partial(_backward_kernel, last_q=last_q, last_k=last_k),
    grid=(heads, m // block_k, n // block_q),
    in_specs=[
      pl.BlockSpec((None, f, block_q), of_queries),
      pl.BlockSpec((None, f, block_k), of_keys),
      pl.BlockSpec((None, f, block_k), of_keys),
      pl.BlockSpec((None, 1, block_k), of_mask),
      pl.BlockSpec((None, f, block_q), of_queries),
      pl.BlockSpec((None, 1, block_q), of_queries),
      pl.BlockSpec((None, 1, block_q), of_queries),
    ],
    out_specs=[
      pl.BlockSpec((None, f, block_q), of_result),
      pl.BlockSpec((None, f, block_k), of_keys),
      pl.BlockSpec((None, f, block_k), of_keys),
    ],
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key, value)],
    scratch_shapes=[
      *(pltpu.VMEM((rows, block), dtype) for block in (block_q, block_k)),
      *(pltpu.VMEM((f, length), jnp.float32) for length in sums),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary"),
      vmem_limit_bytes=room(n, f),
    ),
    name=f"{NAME}_backward_{block_q}_{block_k}",
    interpret=options.interpret,
  )(query, key, value, mask, gradient, logsumexp[:, None], correction[:, None])


def _backward_kernel(
  q_ref,
  k_ref,
  v_ref,
  mask_ref,
  do_ref,
  logsumexp_ref,
  correction_ref,
  dq_ref,
  dk_ref,
  dv_ref,
  q_wide,
  k_wide,
  dq_sum,
  dk_sum,
  dv_sum,
  *,
  last_q: int,
  last_k: int,
):
  """Backward kernel for one block of keys, in rows, and one of queries, in columns."""
  from jax.experimental import pallas as pl

  j, i, (f, block_q) = pl.program_id(1), pl.program_id(2), q_ref.shape
  queries = pl.ds(pl.multiple_of(i * block_q, block_q), block_q)

  @pl.when(j == 0)
  def _():
    dq_sum[:, queries] = jnp.zeros((f, block_q), jnp.float32)

  @pl.when(i == 0)
  def _():
    dk_sum[...] = jnp.zeros_like(dk_sum)
    dv_sum[...] = jnp.zeros_like(dv_sum)
    _widen(k_wide, k_ref[...], _hiding(mask_ref))

  q, do = _scaled(q_ref), do_ref[...]
  _widen(q_wide, q, 1)
  p = jnp.exp(_product(k_wide[...], q_wide[...], 0, 0) - logsumexp_ref[...])
  dv_sum[...] += _product(do, p.astype(do.dtype), 1, 1)
  ds = ((_product(v_ref[...], do, 0, 0) - correction_ref[...]) * p).astype(q.dtype)
  dk_sum[...] += _product(q, ds, 1, 1)
  dq_sum[:, queries] += _product(k_ref[...], ds, 1, 0)

  @pl.when(i == last_q)
  def _():
    dk_ref[...] = dk_sum[...].astype(dk_ref.dtype)
    dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)

  @pl.when(j == last_k)
  def _():
    dq_ref[...] = (dq_sum[:, queries] * f**-0.5).astype(dq_ref.dtype)


def _scaled(q_ref) -> Float[Array, "f n"]:
  """Queries over √f, in their own dtype: their rounding is relative."""
  scaled = q_ref[...].astype(jnp.float32) * q_ref.shape[0] ** -0.5
  return scaled.astype(q_ref.dtype)


def _hiding(mask_ref) -> Float32[Array, "1 m"]:
  return jnp.where(mask_ref[...] > 0, 0.0, HIDDEN)


def _widen(wide, x: Float[Array, "f n"], feature: Array | int) -> None:
  """Fills `wide` with x, and all rows below it with a feature."""
  f = x.shape[0]
  wide[:f, :] = x
  below = wide.shape[0] - f, wide.shape[1]
  wide[f:, :] = jnp.broadcast_to(feature, below).astype(wide.dtype)


def _product(a: Array, b: Array, over_a: int, over_b: int) -> Float32[Array, "..."]:
  """a · b over one axis of each, accumulated in float32."""
  return jax.lax.dot_general(
    a, b, (((over_a,), (over_b,)), ((), ())), preferred_element_type=jnp.float32
  )


def padded(length: int, block: int) -> int:
  """The least multiple of `block` that is not less than `length`."""
  return -(-length // block) * block
