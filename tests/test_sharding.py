"""The mesh and the table of rules: a pod's layout, checked without a pod."""

import ast
import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from pixsigma_jax import sharding, tree
from pixsigma_jax.mesh_axes import CONTEXT, FSDP
from pixsigma_jax.models.kv_compression import KVCompression
from pixsigma_jax.models.pixart import PixArtConfig, abstract_params, init_params
from pixsigma_jax.train.ema import Ema
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
EMA = Ema(
  kind="exponential", values=(0.9999,), unit="updates", offload=False, batch_size=1
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
    groups=(),
  )

  def build():
    key = jax.random.key(0)
    null_caption = jnp.zeros((XL.caption_length, XL.caption_width))
    return init_state(init_params(XL, key), null_caption, tx, EMA, key)

  return jax.eval_shape(build)


def size_in_bytes(shape, leaf):
  return math.prod(shape) * (
    4 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
  )


def shard_shapes(state, mesh, *params):
  places = tree.named_leaves(sharding.state_shardings(state, mesh, *params))
  leaves = tree.named_leaves(state)
  return {
    name: (leaf, places[name].shard_shape(leaf.shape)) for name, leaf in leaves.items()
  }


def test_no_leaf_of_xl_over_64_megabytes_is_whole_on_every_chip(xl_state):
  shapes = shard_shapes(xl_state, POD, xl_state.params)
  for name, (leaf, shape) in shapes.items():
    if shape == leaf.shape:
      assert size_in_bytes(shape, leaf) < 64 * MEGABYTE, name


def test_a_chip_holds_a_sixteenth_of_xls_train_state(xl_state):
  shapes = shard_shapes(xl_state, POD, xl_state.params)
  whole = sum(size_in_bytes(leaf.shape, leaf) for leaf, _ in shapes.values())
  chip = sum(size_in_bytes(shape, leaf) for leaf, shape in shapes.values())
  assert whole > 4 * 4 * 610e6  # parameters, EMA and two moments, in float32
  # Biases, tables and the small conditions stay whole: 6 % of a sixteenth at most.
  assert whole / 16 <= chip < 1.06 * whole / 16 + 4 * 5 * MEGABYTE


def test_a_kernel_is_split_along_its_input_and_so_are_its_moments_and_its_ema(xl_state):
  shapes = shard_shapes(xl_state, POD, xl_state.params)
  for kind in ("params", "ema_params/0", "opt_state/1/mu", "opt_state/1/nu"):
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


OPTIMIZERS = {
  "came": {
    "b1": 0.9,
    "b2": 0.999,
    "b3": 0.9999,
    "eps": (1e-30, 1e-16),
    "clip_threshold": 1.0,
    "momentum_dtype": "bfloat16",
  },
  "lion": {"b1": 0.9, "b2": 0.99},
  "adafactor": {
    "b1": 0.9,
    "decay_rate": 0.8,
    "eps": 1e-30,
    "clip_threshold": 1.0,
    "min_size_to_factor": 128,
    "scale_by_parameter": False,
  },
  "muon": {
    "beta": 0.95,
    "nesterov": True,
    "newton_schulz_steps": 5,
    "consistent_rms": 0.2,
    "eps": 1e-8,
    "adam_b1": 0.9,
    "adam_b2": 0.99,
  },
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizers_state_of_xl_has_its_place(name):
  tx = make_optimizer(
    lambda step: step,
    name=name,
    weight_decay=0.0,
    clip_norm=1.0,
    groups=(("^size_conditions", 0.0), ("qkv", 0.5)),
    **OPTIMIZERS[name],
  )
  params = abstract_params(XL)
  shapes = shard_shapes(jax.eval_shape(tx.init, params), POD, params)
  whole = [size_in_bytes(leaf.shape, leaf) for leaf, s in shapes.values()]
  chip = [size_in_bytes(shape, leaf) for leaf, shape in shapes.values()]
  # A sixteenth, and what is small: rows, columns, vectors, tables.
  assert sum(chip) < sum(whole) / 16 + 24 * MEGABYTE
  assert not any("size_conditions" in leaf for leaf in shapes)


def test_a_parameter_without_a_rule_is_named():
  leaves = {"blocks": {"gate": jax.ShapeDtypeStruct((3, 4), np.float32)}}
  with pytest.raises(
    ValueError, match=r"names the parameter 'blocks/gate' of shape \(3, 4\)"
  ):
    sharding.shardings(leaves, POD)


def test_a_parameter_that_the_mesh_does_not_divide_is_named_with_both_numbers():
  leaves = {"out": {"kernel": jax.ShapeDtypeStruct((40, 4), np.float32)}}
  message = r"'out/kernel' of shape \(40, 4\) .* fsdp=16 does not divide 40"
  with pytest.raises(ValueError, match=message):
    sharding.shardings(leaves, POD)


def test_state_lies_as_the_parameter_whose_name_and_shape_it_has():
  """Of an optimizer that nobody knows, with names that are each other's endings."""
  shape = jax.ShapeDtypeStruct
  params = {
    "out": {"kernel": shape((32, 8), np.float32)},
    "mlp": {"out": {"kernel": shape((64, 8), np.float32)}},
  }
  own = {
    "slow": jax.tree.map(lambda leaf: shape(leaf.shape, jnp.bfloat16), params),
    "rows": jax.tree.map(lambda leaf: shape(leaf.shape[:1], np.float32), params),
    "inner": {"out": {"kernel": {"square": shape((32, 8), np.float32)}}},
    "seen": shape((16,), np.int32),
  }
  places = tree.named_leaves(sharding.state_shardings((params, own), POD, params))
  split = {name for name, place in places.items() if any(place.spec)}
  assert split == {
    *("0/out/kernel", "0/mlp/out/kernel"),
    *("1/slow/out/kernel", "1/slow/mlp/out/kernel"),
  }


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


def test_the_axes_names_stand_in_one_place():
  package = pathlib.Path(sharding.__file__).parent
  naming = {
    path.name
    for path in package.rglob("*.py")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    # "data" is a section of a config as well.
    if isinstance(node, ast.Constant) and node.value in (FSDP, CONTEXT)
  }
  assert naming == {"mesh_axes.py"}


def test_replicated_is_whole_everywhere():
  mesh = sharding.make_mesh(data=2, fsdp=2, context=2)
  assert sharding.replicated(mesh).spec == P()
  assert sharding.replicated(mesh).shard_shape((8, 3)) == (8, 3)


@dataclasses.dataclass(frozen=True)
class Chip:
  """A device as far as a mesh looks at one."""

  id: int
  process_index: int
  slice_index: int = 0
  platform: str = "cpu"
  device_kind: str = "cpu"


def chips(count, each=4, slices=1):
  """Of hosts with some each."""
  return [Chip(i, i // each, i * slices // count) for i in range(count)]


def chosen(count, batch_size, slices=1, width=1152, **sizes):
  sizes = {"data": 0, "fsdp": 0, "context": 0} | sizes
  sizes, why = sharding.choose_axes(
    count, slices=slices, batch_size=batch_size, width=width, **sizes
  )
  return tuple(sizes.values()), why


# The meshes that were best for XL/2, compiled ahead of time and counted in cycles.
@pytest.mark.parametrize(
  ("count", "batch_size", "mesh"),
  [
    (8, 32, (-1, 8, 1)),
    (32, 32, (-1, 8, 1)),
    (64, 256, (-1, 8, 1)),
    (64, 32, (-1, 8, 2)),
    (256, 32, (-1, 8, 8)),
    (1024, 16384, (-1, 8, 1)),
    (1, 32, (-1, 1, 1)),
    (4, 2, (-1, 2, 2)),
  ],
)
def test_a_mesh_is_chosen_by_rows_first_and_then_by_tiles(count, batch_size, mesh):
  assert chosen(count, batch_size)[0] == mesh


def test_a_choice_keeps_what_is_fixed_and_says_why():
  sizes, why = chosen(64, 32, fsdp=16)
  assert sizes == (-1, 16, 2)
  assert why == (
    "context 2, as a batch of 32 gives its rows to 32 of 64 devices; data has the rest"
  )
  assert chosen(8, 64, data=4, context=1) == ((4, -1, 1), "fsdp has what data leaves")
  assert chosen(8, 64, width=64)[0] == (-1, 4, 1)  # 16 rows in a tile
  assert chosen(8, 64, data=2, fsdp=-1, context=4) == ((2, -1, 4), "as configured")


def test_neither_parameters_nor_tokens_are_split_over_slices():
  assert chosen(8, 2, slices=2)[0] == (-1, 1, 4)
  assert chosen(8, 64, slices=4)[0] == (-1, 2, 1)


def make(devices, **fields):
  fields = {"slices": 0, "data": -1, "fsdp": 1, "context": 1} | fields
  return sharding.make_mesh_of_slices(
    **fields, devices=devices, batch_size=64, width=1152
  )


def test_only_data_crosses_slices():
  mesh = make(chips(16, slices=2), fsdp=4, context=2)
  assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "context": 2}
  for part, slice_ in enumerate(mesh.devices):
    assert {chip.slice_index for chip in slice_.flat} == {part}


def test_devices_that_do_not_say_their_slice_are_neighbors():
  mesh = make(chips(16), slices=4, fsdp=2, context=2)
  assert [chip.id for chip in mesh.devices.flat] == list(range(16))
  mesh = make(chips(16), slices=2, fsdp=2)
  assert [chip.id for chip in mesh.devices.flat] == list(range(16))


@pytest.mark.parametrize(
  ("devices", "fields", "message"),
  [
    (chips(16, slices=2), {"slices": 1}, r"slices=1 does not fit 16 devices in 2 sl"),
    (chips(16), {"slices": 3}, r"slices=3 does not fit 16 devices in 1 slices: set"),
    (
      chips(16, slices=2),
      {"fsdp": 16},
      r"'fsdp': 16, 'context': 1} does not fit 2 slices of 8 devices: fsdp × context",
    ),
    (chips(16, slices=2), {"fsdp": 3}, r"does not cover 16 devices"),
  ],
)
def test_a_mesh_that_does_not_fit_its_slices_is_refused(devices, fields, message):
  with pytest.raises(ValueError, match=message):
    make(devices, **fields)


def mesh_of(shape, order, each=4):
  return Mesh(
    np.array([Chip(i, i // each) for i in order], object).reshape(shape), sharding.AXES
  )


def test_processes_that_share_images_hold_the_same_part_of_a_batch():
  # Four hosts of four; images of a row lie on eight devices, or on two.
  across = mesh_of((1, 2, 8), range(16))
  assert [sharding.batch_part(across, i) for i in range(4)] == [
    *[(0, 2), (0, 2)],
    *[(1, 2), (1, 2)],
  ]
  within = mesh_of((2, 4, 2), range(16))
  assert [sharding.batch_part(within, i) for i in range(4)] == [
    (i, 4) for i in range(4)
  ]


def test_the_rows_of_a_process_need_not_follow_each_other():
  # A host's chips form a square: rows 0, 1, 4, 5 and 2, 3, 6, 7.
  mesh = mesh_of((2, 4, 1), [0, 1, 4, 5, 2, 3, 6, 7])
  assert sharding.batch_part(mesh, 0) == (0, 2)
  assert sharding.batch_part(mesh, 1) == (1, 2)


def test_processes_that_share_some_rows_and_not_others_are_refused():
  mesh = mesh_of((4, 1, 3), range(12), each=4)
  with pytest.raises(ValueError, match="share some rows of a batch and not others"):
    sharding.batch_part(mesh, 0)


@pytest.fixture
def topology(libtpu, monkeypatch):
  """Chips that are elsewhere, as libtpu describes them."""
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

  def describe(name, slices=1):
    return topologies.get_topology_desc(
      platform="tpu",
      topology_name=name,
      **({"num_slices": slices} if slices > 1 else {}),
    ).devices

  return describe


def test_a_pod_of_two_slices_crosses_between_them_along_data_alone(topology):
  mesh = make(topology("v5e:2x4", slices=2), fsdp=8)
  assert dict(mesh.shape) == {"data": 2, "fsdp": 8, "context": 1}
  for number, slice_ in enumerate(mesh.devices):
    assert {chip.slice_index for chip in slice_.flat} == {number}


# On 8×8 chips with hosts of 2×2: images of eight chips are shared by four hosts.
@pytest.mark.parametrize(("context", "parts"), [(1, 16), (2, 16), (8, 4)])
def test_every_host_of_a_pod_holds_a_part_of_a_batch(topology, context, parts):
  mesh = make(topology("v5e:8x8"), fsdp=8, context=context)
  held = [sharding.batch_part(mesh, host) for host in range(16)]
  assert sorted(held) == [
    (part, parts) for part in range(parts) for _ in range(16 // parts)
  ]
