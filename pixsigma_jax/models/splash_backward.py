"""The backward pass of attention on TPU in one kernel: dq, dk and dv of each block.

JAX's splash attention has two ways. Its two kernels make scores and their gradient
twice, seven matrix products for each block of queries and keys; its one kernel makes
them once, five products, and writes a dq for every block of keys, 6.5 GB at 4096
pixels, to be summed afterwards. Here the dq of a whole head stays in the core's own
memory until every block of keys has added to it: five products, and nothing to sum.

A matrix unit holds a piece of one matrix, as wide and as deep as itself, and takes its
time for every row of the other that streams through it. A head is 72 wide, a little
more than half of a unit of 128 and a quarter of one of 256. Scores want that width in
the unit's depth, and nothing can be done; but dq, dk and dv come out with that width in
rows, where JAX's kernels have it in columns: 72 rows, and full pieces.

Formulas: FlashAttention-2 (Dao 2023), algorithm 2. Heads may be divided among the two
cores of a TPU v5p, of which JAX's backward kernels use one.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

_SUBLANES = 8  # least number of rows of a float32 block

# How kernels are called in a compiled program, where `plan` counts them.
NAME = "attention_backward"


def room(queries: int) -> int:
  """Bytes of a core's own memory in which the kernel runs, with what a compiler adds.

  The dq of a head in float32, 128 wide at most; and blocks, as many as there are.
  """
  return queries * 128 * 4 + _BLOCKS


_BLOCKS = 24 * 2**20


def gradients(
  query: Float[Array, "h n f1"],
  key: Float[Array, "h m f1"],
  value: Float[Array, "h m f"],
  gradient: Float[Array, "h n f"],
  logsumexp: Float32[Array, "h n"],
  correction: Float32[Array, "h n"],
  *,
  block_q: int,
  block_k: int,
  interpret: bool,
) -> tuple[Float[Array, "h n f1"], Float[Array, "h m f1"], Float[Array, "h m f"]]:
  """Of softmax(q·kᵀ)·v with respect to queries, keys and values.

  Args:
    gradient: with respect to the output.
    logsumexp: of each query's scores.
    correction: each query's sum of output times `gradient`.
    block_q, block_k: multiples of 128 that divide the lengths.
  """
  from jax.experimental import pallas as pl  # half a second that only TPUs need
  from jax.experimental.pallas import tpu as pltpu

  heads, n, f1 = query.shape
  m, f = value.shape[1:]
  last_k = m // block_k - 1

  def of_queries(h, j, i):
    del j
    return h, i, 0

  def of_keys(h, j, i):
    del i
    return h, j, 0

  def of_sums(h, j, i):
    del j
    return h, 0, i

  def of_result(h, j, i):
    # One block until the last keys, when each is written once.
    return h, jnp.where(j == last_k, i, 0), 0

  def rows(x: Float32[Array, "h n"]) -> Float32[Array, "h 8 n"]:
    return jnp.broadcast_to(x[:, None, :], (heads, _SUBLANES, n))

  def scratch(length: int, width: int):
    return pltpu.VMEM((length, width), jnp.float32)

  return pl.pallas_call(
    functools.partial(_kernel, block_q=block_q),
    grid=(heads, m // block_k, n // block_q),
    in_specs=[
      pl.BlockSpec((None, block_q, f1), of_queries),
      pl.BlockSpec((None, block_k, f1), of_keys),
      pl.BlockSpec((None, block_k, f), of_keys),
      pl.BlockSpec((None, block_q, f), of_queries),
      pl.BlockSpec((None, _SUBLANES, block_q), of_sums),
      pl.BlockSpec((None, _SUBLANES, block_q), of_sums),
    ],
    out_specs=[
      pl.BlockSpec((None, block_q, f1), of_result),
      pl.BlockSpec((None, block_k, f1), of_keys),
      pl.BlockSpec((None, block_k, f), of_keys),
    ],
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key, value)],
    scratch_shapes=[scratch(f1, n), scratch(f1, block_k), scratch(f, block_k)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary"),
      vmem_limit_bytes=room(n),
    ),
    name=f"{NAME}_{block_q}_{block_k}",
    interpret=interpret,
  )(query, key, value, gradient, rows(logsumexp), rows(correction))


def _kernel(
  q_ref,
  k_ref,
  v_ref,
  do_ref,
  logsumexp_ref,
  correction_ref,
  dq_ref,
  dk_ref,
  dv_ref,
  dq_sum,
  dk_sum,
  dv_sum,
  *,
  block_q: int,
):
  """One block of keys and one of queries; keys lie in rows, queries in columns."""
  from jax.experimental import pallas as pl

  j, i = pl.program_id(1), pl.program_id(2)
  queries = pl.ds(pl.multiple_of(i * block_q, block_q), block_q)

  @pl.when(j == 0)
  def _():
    dq_sum[:, queries] = jnp.zeros((dq_sum.shape[0], block_q), jnp.float32)

  @pl.when(i == 0)
  def _():
    dk_sum[...] = jnp.zeros_like(dk_sum)
    dv_sum[...] = jnp.zeros_like(dv_sum)

  q, k, v, do = q_ref[...], k_ref[...], v_ref[...], do_ref[...]
  p = jnp.exp(_product(k, q, 1, 1) - logsumexp_ref[:1, :])
  dv_sum[...] += _product(do, p.astype(do.dtype), 0, 1)
  ds = ((_product(v, do, 1, 1) - correction_ref[:1, :]) * p).astype(q.dtype)
  dk_sum[...] += _product(q, ds, 0, 1)
  dq_sum[:, queries] += _product(k, ds, 0, 0)

  @pl.when(i == pl.num_programs(2) - 1)
  def _():
    dk_ref[...] = dk_sum[...].T.astype(dk_ref.dtype)
    dv_ref[...] = dv_sum[...].T.astype(dv_ref.dtype)

  @pl.when(j == pl.num_programs(1) - 1)
  def _():
    dq_ref[...] = dq_sum[:, queries].T.astype(dq_ref.dtype)


def _product(a: Array, b: Array, over_a: int, over_b: int) -> Float32[Array, "..."]:
  """a · b over one axis of each, accumulated in float32."""
  return jax.lax.dot_general(
    a, b, (((over_a,), (over_b,)), ((), ())), preferred_element_type=jnp.float32
  )
