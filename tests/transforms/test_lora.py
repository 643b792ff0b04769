"""Low-rank adapters as mathematics: what they start as, what merging makes of them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixsigma_jax import tree
from pixsigma_jax.models.pixart import PixArtConfig, abstract_params
from pixsigma_jax.transforms import Model, apply_transforms, merge_lora, unmerge_lora
from pixsigma_jax.transforms.lora import Lora, merged, nested
from tests.sample import models

CONFIG = models.nano()
PARAMS = models.random_params(CONFIG)
EVERYTHING = ("kernel",)


def lora(targets=EVERYTHING, **fields):
  return Lora(**{"rank": 3, "alpha": 6.0, "dora": False, "targets": targets} | fields)


def started(spec, seed=0):
  return jax.jit(spec.init)(PARAMS, jax.random.key(seed))


def moved(spec):
  """An adapter with no number where it started."""
  draw = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: leaf + jnp.asarray(0.1 * draw.normal(size=leaf.shape), leaf.dtype),
    started(spec),
  )


def test_an_adapter_changes_nothing_at_its_start():
  before, after = (
    tree.named_leaves(p) for p in (PARAMS, lora().merged(PARAMS, started(lora())))
  )
  for name, leaf in before.items():
    np.testing.assert_array_equal(after[name], leaf, err_msg=name)
    # What it does not target is the very same; a filter for each channel has no rank.
    shared = not name.endswith("kernel") or "kv_compressor" in name
    assert (after[name] is leaf) == shared, name
  dora = lora(dora=True)
  after = tree.named_leaves(dora.merged(PARAMS, started(dora)))
  for name, leaf in before.items():
    # Divided by a length and multiplied with it again.
    np.testing.assert_allclose(after[name], leaf, rtol=1e-6, atol=0, err_msg=name)


@pytest.mark.parametrize("dora", [False, True])
def test_every_kernel_becomes_what_the_papers_say(dora):
  spec = lora(dora=dora)
  adapter = moved(spec)
  parts, after = (
    tree.named_leaves(adapter),
    tree.named_leaves(spec.merged(PARAMS, adapter)),
  )
  kernels = [
    name for name in after if after[name] is not tree.named_leaves(PARAMS)[name]
  ]
  assert len(kernels) == len(parts) // (3 if dora else 2) > 8
  for name in kernels:
    before = np.asarray(tree.named_leaves(PARAMS)[name], np.float64)
    module = name.removesuffix("kernel")
    down, up = (np.asarray(parts[module + part], np.float64) for part in ("down", "up"))
    want = before.reshape(*down.shape[:-1], -1) + 6.0 / 3 * np.einsum(
      "...ir,...ro->...io", down, up
    )
    if dora:
      lengths = np.sqrt((want**2).sum(axis=-2, keepdims=True))
      magnitude = np.asarray(parts[module + "magnitude"], np.float64)
      want = magnitude[..., None, :] * want / lengths
    # Sums of three products, and of a column, in float32.
    np.testing.assert_allclose(
      after[name], want.reshape(before.shape), rtol=1e-5, atol=1e-6, err_msg=name
    )


def test_the_start_is_torchs_and_every_map_of_a_stack_has_its_own():
  adapter = tree.named_leaves(started(lora(("qkv", "mlp/out"), rank=48)))
  assert {name.rsplit("/", 1)[0] for name in adapter} == {
    f"{segment}/{module}"
    for segment in ("blocks_00_00", "blocks_01_01")
    for module in ("attention/qkv", "mlp/out")
  }
  draws = []
  for name, leaf in adapter.items():
    if name.endswith("/up"):
      assert not leaf.any()
      continue
    # Kaiming-uniform with a = √5, as torch starts a linear map: U(-1/√i, 1/√i).
    bound = leaf.shape[-2] ** -0.5
    assert 0.98 * bound < np.abs(leaf).max() <= bound
    assert np.std(leaf) == pytest.approx(bound / 3**0.5, rel=0.03)
    draws += list(np.asarray(leaf).reshape(-1, *leaf.shape[-2:]))
  # Two layers of four maps; no two draws of a shape have anything in common.
  assert len(draws) == 2 * (3 + 1)
  for one, other in itertools.combinations(draws, 2):
    if one.shape == other.shape:
      assert np.abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.1


def test_no_gradient_goes_through_the_length_of_a_column():
  spec = lora(("mlp/in",), dora=True)
  adapter = moved(spec)
  name = "blocks_00_00"
  weights = np.random.default_rng(1).normal(
    size=PARAMS[name]["mlp"]["in"]["kernel"].shape
  )

  def dot(adapter):
    return jnp.vdot(weights, spec.merged(PARAMS, adapter)[name]["mlp"]["in"]["kernel"])

  parts = adapter[name]["mlp"]["in"]
  matrix = PARAMS[name]["mlp"]["in"]["kernel"] + 2.0 * parts["down"] @ parts["up"]
  factor = parts["magnitude"] / jnp.linalg.norm(matrix, axis=-2)
  found = jax.grad(dot)(adapter)[name]["mlp"]["in"]
  want = 2.0 * jnp.swapaxes(parts["down"], -1, -2) @ (weights * factor[:, None, :])
  np.testing.assert_allclose(found["up"], want, rtol=1e-4, atol=1e-5)
  column = (weights * matrix).sum(axis=-2) / jnp.linalg.norm(matrix, axis=-2)
  np.testing.assert_allclose(found["magnitude"], column, rtol=1e-4, atol=1e-5)


def test_what_was_merged_can_be_taken_out_again():
  adapter = moved(lora())
  config, after = merge_lora(CONFIG, PARAMS, adapter=adapter, scale=0.7)
  assert config == CONFIG
  _, back = unmerge_lora(CONFIG, after, adapter=adapter, scale=0.7)
  leaves = [tree.named_leaves(p) for p in (PARAMS, after, back)]
  for name, leaf in leaves[0].items():
    have, between = leaves[2][name], leaves[1][name]
    if between is leaf:
      assert have is leaf
      continue
    assert np.abs(between - leaf).max() > 1e-3
    # Two roundings, of numbers as large as those in between.
    size = np.abs(between).max() + np.abs(leaf).max()
    np.testing.assert_allclose(have, leaf, rtol=0, atol=1.2e-7 * size)


def test_half_of_an_adapter_is_half_way():
  adapter = moved(lora(("qkv",)))
  kernels = [
    p["blocks_00_00"]["attention"]["qkv"]["kernel"]
    for p in (
      PARAMS,
      *(merge_lora(CONFIG, PARAMS, adapter=adapter, scale=s)[1] for s in (0.5, 1.0)),
    )
  ]
  np.testing.assert_allclose(
    kernels[1], (kernels[0] + kernels[2]) / 2, rtol=1e-5, atol=1e-7
  )


def test_a_dora_cannot_be_taken_out_again():
  with pytest.raises(ValueError, match=r"DoRA .* cannot be taken out .*provenance"):
    unmerge_lora(CONFIG, PARAMS, adapter=moved(lora(dora=True)))


def test_a_column_of_zeros_stays_one_under_dora():
  """As the last layers of a fresh model are."""
  params = nested({"out/kernel": jnp.zeros((4, 2))})
  spec = lora(dora=True)
  after = spec.merged(params, spec.init(params, jax.random.key(0)))
  np.testing.assert_array_equal(after["out"]["kernel"], np.zeros((4, 2)))


def test_a_chain_reads_the_adapter_for_the_model_as_it_is_by_then():
  asked = []

  def read_lora(path, config):
    asked.append((path, config.base_size))
    return moved(lora(("qkv",)))

  before = Model(
    config=CONFIG,
    params=PARAMS,
    null_caption=None,
    metadata=models.metadata(CONFIG),
  )
  chain = (
    {"name": "interpolate_pe", "base_size": 8},
    {"name": "merge_lora", "adapter": "some/where"},
  )
  after = apply_transforms(before, chain, read=pytest.fail, read_lora=read_lora)
  assert asked == [("some/where", 8)]
  want = merged(PARAMS, moved(lora(("qkv",))), 1.0)
  jax.tree.map(np.testing.assert_array_equal, after.params, want)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"rank": -1}, "rank=-1 and alpha=6.0: the rank must be at least 0"),
    ({"alpha": 0.0}, "rank=3 and alpha=0.0: .* alpha above 0"),
    ({"targets": ("(",)}, r"targets: '\(' is no regular expression"),
  ],
)
def test_an_adapter_that_cannot_be_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    lora(**fields)


@pytest.mark.parametrize("targets", [("attn",), (), ("kv_compressor",), ("qkv", "")])
def test_a_target_that_names_no_kernel_is_refused_with_their_names(targets):
  with pytest.raises(
    ValueError, match=r"no kernel. They are .*blocks_00_00/attention/q"
  ):
    lora(targets).init(PARAMS, jax.random.key(0))


def test_the_stages_adapter_of_full_size_has_thirteen_million_numbers():
  config = PixArtConfig.from_variant("XL/2", base_size=32, pe_interpolation=1.0)
  spec = lora(("attention/", "mlp/"), rank=16)
  adapter = jax.eval_shape(spec.init, abstract_params(config), jax.random.key(0))
  # Of each block: eight maps of 1152 to 1152, and two between 1152 and 4608.
  assert tree.size(adapter) == 28 * 16 * (8 * 2 * 1152 + 2 * (1152 + 4608))
  assert tree.size(adapter) == 13_418_496
