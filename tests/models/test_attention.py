"""Attention: every implementation is the softmax of the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixsigma_jax.models import attention

IMPLEMENTATIONS = ["xla", "chunked"]


def exact(query, key, value, mask):
  """The definition, in float64 NumPy, one query at a time."""
  query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
  out = np.zeros_like(query)
  for b, n, k in np.ndindex(*query.shape[:3]):
    scores = key[b, :, k] @ query[b, n, k] / np.sqrt(query.shape[-1])
    weights = np.where(mask[b], np.exp(scores - scores.max()), 0)
    if weights.sum():
      out[b, n, k] = weights @ value[b, :, k] / weights.sum()
  return out


def draw(shape_q, shape_k, dtype, seed=0):
  keys = jax.random.split(jax.random.key(seed), 3)
  query = 3 * jax.random.normal(keys[0], shape_q, dtype)
  return query, *(jax.random.normal(k, shape_k, dtype) for k in keys[1:])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
  monkeypatch.setattr(attention, "_QUERY_CHUNK", 8)
  monkeypatch.setattr(attention, "_KEY_CHUNK", 8)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
  ("dtype", "tolerance"),
  [(jnp.float32, 1e-5), (jnp.bfloat16, 0.03)],  # of values of size 1
  ids=["float32", "bfloat16"],
)
def test_is_the_softmax_of_the_definition_at_odd_lengths(
  implementation, dtype, tolerance
):
  query, key, value = draw((2, 17, 3, 12), (2, 29, 3, 12), dtype)
  mask = np.arange(29) < np.array([29, 5])[:, None]
  ours = attention.attend(query, key, value, jnp.asarray(mask), implementation)
  assert ours.dtype == dtype
  expected = exact(query, key, value, mask)
  np.testing.assert_allclose(ours.astype(jnp.float32), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_its_gradient_is_that_of_finite_differences(implementation):
  query, key, value = draw((1, 9, 1, 4), (1, 11, 1, 4), jnp.float32)
  mask = jnp.arange(11)[None] < 10

  def loss(*arrays):
    return (attention.attend(*arrays, mask, implementation) ** 2).sum()

  def exact_loss(*arrays):
    return (exact(*arrays, mask) ** 2).sum()

  ours = jax.grad(loss, (0, 1, 2))(query, key, value)
  arrays = [np.asarray(x, np.float64) for x in (query, key, value)]
  for i, array in enumerate(arrays):
    direction = np.random.default_rng(i).normal(size=array.shape)
    ends = [
      exact_loss(*arrays[:i], array + h * direction, *arrays[i + 1 :])
      for h in (1e-5, -1e-5)
    ]
    np.testing.assert_allclose(
      np.sum(np.asarray(ours[i]) * direction), (ends[0] - ends[1]) / 2e-5, rtol=1e-4
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_query_that_may_see_no_key_receives_zeros(implementation):
  query, key, value = draw((1, 3, 1, 4), (1, 5, 1, 4), jnp.float32)
  mask = jnp.zeros((1, 5), bool)
  out = attention.attend(query, key, value, mask, implementation)
  np.testing.assert_array_equal(out, np.zeros_like(out))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_scores_do_not_overflow(implementation):
  query, key, value = draw((1, 9, 1, 4), (1, 20, 1, 4), jnp.float32)
  mask = jnp.ones((1, 20), bool)
  out = attention.attend(1e4 * query, key, value, mask, implementation)
  best = np.argmax(np.einsum("nf,mf->nm", query[0, :, 0], key[0, :, 0]), axis=-1)
  np.testing.assert_allclose(out[0, :, 0], value[0, best, 0], rtol=1e-6)


def test_memory_of_chunked_attention_grows_linearly(monkeypatch):
  monkeypatch.setattr(attention, "_QUERY_CHUNK", 256)
  monkeypatch.setattr(attention, "_KEY_CHUNK", 256)

  def temporary(n):
    x = jax.ShapeDtypeStruct((1, n, 2, 8), jnp.float32)
    mask = jax.ShapeDtypeStruct((1, n), bool)
    loss = lambda *a: attention.attend(*a, "chunked").sum()  # noqa: E731
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, mask).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  small, large = temporary(1024), temporary(4096)
  assert large < 5 * small  # 4 times the tokens; scores of all pairs would be 16 times
  assert large < 4096**2 * 2 * 4  # bytes of all scores
