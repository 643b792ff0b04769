"""8-bit integers: how close they come, and what they are spared."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixsigma_jax.models import int8
from pixsigma_jax.models.kv_compression import KVCompression
from pixsigma_jax.models.layers import Compute
from pixsigma_jax.models.pixart import (
  PixArt,
  PixArtConfig,
  abstract_params,
  caption_keys_values,
  laid_out,
)

CONFIG = PixArtConfig.from_variant(
  "Nano/2",
  base_size=4,
  pe_interpolation=1.0,
  caption_width=16,
  caption_length=8,
  kv_compression=KVCompression(ratio=4, layers=(1,)),
)


@pytest.fixture(autouse=True)
def needs_qwix():
  pytest.importorskip("qwix")


def random_params():
  draw = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: jnp.asarray(draw.normal(0, 0.1, leaf.shape), leaf.dtype),
    abstract_params(CONFIG),
  )


def kernel_of(kernel):
  tree = {"blocks_00_00": {"mlp": {"in": {"kernel": kernel}}}}
  return int8.quantize(tree)["blocks_00_00"]["mlp"]["in"]["kernel"]


@pytest.mark.parametrize("merge_rows", [True, False])
def test_a_product_errs_by_the_rounding_of_its_factors_whatever_their_scales(
  merge_rows,
):
  compute = Compute(dtype=jnp.float32, merge_rows=merge_rows)
  x, kernel = (
    jax.random.normal(jax.random.key(i), shape)
    for i, shape in ((2, (2, 5, 256)), (3, (256, 128)))
  )
  ours = compute.matmul(x, kernel_of(kernel))
  assert ours.dtype == jnp.float32
  exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
  error = np.sqrt(np.mean((ours - exact) ** 2) / 256)
  # Uniform within a step, of either factor beside the other's unit size.
  steps = [np.abs(x).max(axis=-1) / 127.5, np.abs(kernel).max(axis=0) / 127.5]
  expected = np.sqrt(sum(np.mean(step**2) / 12 for step in steps))
  np.testing.assert_allclose(error, expected, rtol=0.1)
  # A token and a channel have scales of their own: powers of two go through exactly.
  of_token = np.exp2(np.arange(-5, 5, dtype=np.float32)).reshape(2, 5, 1)
  of_channel = np.exp2(np.arange(128, dtype=np.float32) % 9 - 4)
  scaled = compute.matmul(x * of_token, kernel_of(kernel * of_channel[None]))
  np.testing.assert_array_equal(scaled, ours * of_token * of_channel.reshape(1, 1, -1))


def test_only_the_maps_inside_of_blocks_are_quantized_and_the_rest_is_shared():
  params = random_params()
  quantized = int8.quantize(params)
  found = {
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      quantized, is_leaf=int8.is_quantized
    )
    if int8.is_quantized(leaf)
  }
  maps = ("attention/qkv", "attention/out", "mlp/in", "mlp/out")
  maps += tuple(f"cross_attention/{name}" for name in ("query", "kv", "out"))
  blocks = ("blocks_00_00", "blocks_01_01")
  assert found == {f"{block}/{name}/kernel" for block in blocks for name in maps}
  assert quantized["out"]["kernel"] is params["out"]["kernel"]


@pytest.mark.parametrize("unroll", [False, True])
def test_the_network_multiplies_integers_and_stays_within_a_few_percent(key, unroll):
  params, compute = random_params(), Compute(dtype=jnp.float32, unroll=unroll)
  latents, captions = (
    jax.random.normal(key, shape) for shape in ((2, 8, 8, 4), (2, 8, 16))
  )
  mask, times = jnp.ones((2, 8), bool), jnp.array([900.0, 20.0])

  @jax.jit
  def network(params):
    return PixArt(CONFIG, compute).apply(
      {"params": laid_out(params, compute)}, latents, times, captions, mask
    )

  exact, ours = network(params), network(int8.quantize(params))
  error = jnp.linalg.norm(ours - exact) / jnp.linalg.norm(exact)
  assert 1e-4 < error < 0.03
  text = network.lower(int8.quantize(params)).as_text()
  products = [line for line in text.splitlines() if "dot_general" in line]
  integer = [line for line in products if "xi8>" in line]
  # Seven maps a block, of which qkv is three products and kv two; of two blocks, which
  # differ.
  assert len(integer) == 10 * 2
  assert all("xi32>" in line.split("->")[-1] for line in integer)


def test_keys_and_values_of_captions_are_made_of_them_too(key):
  params, compute = random_params(), Compute(dtype=jnp.float32)
  captions, mask = jax.random.normal(key, (1, 8, 16)), jnp.ones((1, 8), bool)
  exact, ours = (
    caption_keys_values(p, CONFIG, compute, captions, mask)
    for p in (params, int8.quantize(params))
  )
  for name in exact:
    error = jnp.linalg.norm(ours[name] - exact[name]) / jnp.linalg.norm(exact[name])
    assert 1e-4 < error < 0.03


def test_without_qwix_it_is_said_how_to_get_it(monkeypatch):
  monkeypatch.setitem(sys.modules, "qwix", None)
  with pytest.raises(ValueError, match=r'pip install -e "\.\[int8\]"'):
    int8.quantize(random_params())
