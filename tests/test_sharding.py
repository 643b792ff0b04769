"""The mesh and the table of rules: a pod's layout, checked without a pod."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from pixsigma_jax import sharding, tree
from pixsigma_jax.models.kv_compression import KVCompression
from pixsigma_jax.models.pixart import PixArtConfig, init_params
from pixsigma_jax.train.optimizer import make_optimizer
from pixsigma_jax.train.step import init_state

MEGABYTE = 2**20
# Everything that adds a leaf, at full size.
XL = PixArtConfig.from_variant(
  "XL/2",
  base_size=64,
  pe_interpolation=2.0,
  qk_norm=True,
  size_conditions=True,
  kv_compression=KVCompression(ratio=4, layers=tuple(range(14, 28))),
)
POD = AbstractMesh((16, 16, 1), sharding.AXES)


@pytest.fixture(scope="module")
def xl_state():
  """The whole train state of XL/2, without its 10 GB."""
  tx = make_optimizer(
    lambda step: step,
    name="adamw",
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    weight_decay=0.0,
    clip_norm=1.0,
  )

  def build():
    key = jax.random.key(0)
    null_caption = jnp.zeros((XL.caption_length, XL.caption_width))
    return init_state(init_params(XL, key), null_caption, tx, key)

  return jax.eval_shape(build)


def size_in_bytes(shape, leaf):
  return math.prod(shape) * (
    4 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
  )


def shard_shapes(state, mesh):
  places = tree.named_leaves(sharding.shardings(state, mesh))
  leaves = tree.named_leaves(state)
  return {
    name: (leaf, places[name].shard_shape(leaf.shape)) for name, leaf in leaves.items()
  }


def test_no_leaf_of_xl_over_64_megabytes_is_whole_on_every_chip(xl_state):
  shapes = shard_shapes(xl_state, POD)
  for name, (leaf, shape) in shapes.items():
    if shape == leaf.shape:
      assert size_in_bytes(shape, leaf) < 64 * MEGABYTE, name


def test_a_chip_holds_a_sixteenth_of_xls_train_state(xl_state):
  shapes = shard_shapes(xl_state, POD)
  whole = sum(size_in_bytes(leaf.shape, leaf) for leaf, _ in shapes.values())
  chip = sum(size_in_bytes(shape, leaf) for leaf, shape in shapes.values())
  assert whole > 4 * 4 * 610e6  # parameters, EMA and two moments, in float32
  # Biases, tables and the small conditions stay whole: 6 % of a sixteenth at most.
  assert whole / 16 <= chip < 1.06 * whole / 16 + 4 * 5 * MEGABYTE


def test_a_kernel_is_split_along_its_input_and_so_are_its_moments_and_its_ema(xl_state):
  shapes = shard_shapes(xl_state, POD)
  for kind in ("params", "ema_params", "opt_state/1/mu", "opt_state/1/nu"):
    expected = {
      "blocks_00_13/attention/qkv/kernel": (14, 3, 72, 1152),
      "blocks_14_27/attention/out/kernel": (14, 72, 1152),
      "blocks_14_27/attention/kv_compressor/kernel": (14, 2, 2, 1152),
      "blocks_00_13/mlp/in/kernel": (14, 72, 4608),
      "blocks_00_13/mlp/out/kernel": (14, 288, 1152),
      "caption_projection/in/kernel": (256, 1152),
      "patch_embedding/kernel": (2, 2, 4, 72),
      "timestep_embedding/in/kernel": (256, 72),
      "blocks_00_13/scale_shift_table": (14, 6, 1152),
      "blocks_00_13/mlp/in/bias": (14, 4608),
    }
    found = {name: shapes[f"{kind}/{name}"][1] for name in expected}
    assert found == expected


def test_a_leaf_without_a_rule_is_named():
  leaves = {"blocks": {"gate": jax.ShapeDtypeStruct((3, 4), np.float32)}}
  with pytest.raises(
    ValueError, match=r"names the leaf 'blocks/gate' of shape \(3, 4\)"
  ):
    sharding.shardings(leaves, POD)


def test_a_leaf_that_the_mesh_does_not_divide_is_named_with_both_numbers():
  leaves = {"out": {"kernel": jax.ShapeDtypeStruct((40, 4), np.float32)}}
  message = r"'out/kernel' of shape \(40, 4\) .* fsdp=16 does not divide 40"
  with pytest.raises(ValueError, match=message):
    sharding.shardings(leaves, POD)


@pytest.mark.parametrize(
  ("axes", "shape"),
  [((8, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((-1, 4, 2), (1, 4, 2))],
)
def test_an_axis_of_minus_one_takes_what_the_others_leave(axes, shape):
  mesh = sharding.make_mesh(**dict(zip(sharding.AXES, axes, strict=True)))
  assert dict(mesh.shape) == dict(zip(sharding.AXES, shape, strict=True))


@pytest.mark.parametrize(
  "axes", [(3, 1, 1), (2, 2, 1), (-1, 3, 1), (-1, -1, 1), (8, 0, 1), (-8, -1, 1)]
)
def test_axes_that_do_not_cover_the_devices_are_refused(axes):
  with pytest.raises(ValueError, match="does not cover 8 devices: the axes must"):
    sharding.make_mesh(**dict(zip(sharding.AXES, axes, strict=True)))


def test_one_device_is_a_mesh_too():
  mesh = sharding.single_device_mesh()
  assert mesh.devices.tolist() == [[[jax.local_devices()[0]]]]


def test_rows_go_over_data_and_fsdp_and_the_images_tokens_over_context():
  mesh = sharding.make_mesh(data=2, fsdp=2, context=2)
  batch = {
    "latents": np.arange(8 * 16 * 3, dtype=np.float32).reshape(8, 16, 3),
    "latent_moments": np.zeros((8, 16, 6), np.float16),
    "coordinates": np.zeros((8, 16, 2), np.int32),
    "caption_embeddings": np.zeros((8, 4, 5), np.float16),
    "caption_mask": np.zeros((8, 4), bool),
    "grid": np.zeros((8, 2), np.int32),
    "row": np.arange(8, dtype=np.int32),
  }
  placed = sharding.global_batch(batch, sharding.batch_shardings(batch, mesh))
  assert {
    name: rows.addressable_shards[0].data.shape for name, rows in placed.items()
  } == {
    "latents": (2, 8, 3),
    "latent_moments": (2, 8, 6),
    "coordinates": (2, 8, 2),
    "caption_embeddings": (2, 4, 5),
    "caption_mask": (2, 4),
    "grid": (2, 2),
    "row": (2,),
  }
  # Nothing but its place has changed.
  jax.tree.map(np.testing.assert_array_equal, placed, batch)


def test_replicated_is_whole_everywhere():
  mesh = sharding.make_mesh(data=2, fsdp=2, context=2)
  assert sharding.replicated(mesh).spec == P()
  assert sharding.replicated(mesh).shard_shape((8, 3)) == (8, 3)
