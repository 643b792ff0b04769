"""An image that several devices draw together, beside the same image of one."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pixsigma_jax import sharding
from pixsigma_jax.data import buckets
from pixsigma_jax.mesh_axes import CONTEXT, ROWS, SAMPLING_AXES
from pixsigma_jax.models import attention
from pixsigma_jax.models.kv_compression import KVCompression
from pixsigma_jax.models.pixart import PixArtConfig
from pixsigma_jax.sample import devices, program
from pixsigma_jax.sample.companions import WeakModel
from tests.sample import models

PROMPTS = ["a red seven", "a blue two"]
# 7 x 9 and 9 x 7 tokens: of one length, padded, and no windows in the last of each.
SIZES = {"height": [14, 18], "width": [18, 14]}
PLAIN = models.nano(kv_compression=KVCompression())


def mesh(**sizes):
  sizes = {"data": 1, "guidance": 1, "context": 1} | sizes
  count = int(np.prod(list(sizes.values())))
  return sharding.make_mesh(**sizes, fsdp=1, devices=jax.devices()[:count])


def latents_of(subject, **arguments):
  arguments = {"num_inference_steps": 3, "output_type": "latent", **arguments}
  return subject(PROMPTS, **SIZES, **arguments).images


@pytest.fixture(scope="module")
def compressed():
  return models.pipeline(batch_size=2)


@pytest.fixture(scope="module")
def alone(compressed):
  """Latents of one device, by what is asked for."""
  return {
    "guided": latents_of(compressed),
    "everything": latents_of(compressed, **models.EVERYTHING),
  }


def assert_same(one, other):
  for ours, theirs in zip(one, other, strict=True):
    # Of the largest, as an untrained network's latents are in the hundreds.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


# Of four heads, four devices trade some for tokens; two and eight gather.
@pytest.mark.parametrize(
  "sizes",
  [
    {"context": 2},
    {"context": 8},
    {"guidance": 2},
    {"data": 2, "guidance": 2, "context": 2},
  ],
  ids=str,
)
def test_devices_draw_together_what_one_draws(compressed, alone, sizes):
  assert_same(latents_of(compressed.replace(mesh=mesh(**sizes))), alone["guided"])


def test_all_guidance_and_step_caching_go_over_all_axes(compressed, alone):
  shared = compressed.replace(mesh=mesh(guidance=2, context=4))
  assert_same(latents_of(shared, **models.EVERYTHING), alone["everything"])


def test_heads_are_traded_where_nothing_is_compressed():
  assert attention.trades_heads(64, 64, PLAIN.num_heads, 4)
  subject = models.pipeline(PLAIN, batch_size=2)
  arguments = {"guidance_scale": 1.0}  # one branch: guidance's devices take tokens
  shared = subject.replace(mesh=mesh(guidance=2, context=2))
  assert_same(latents_of(shared, **arguments), latents_of(subject, **arguments))


def test_steps_of_a_callback_go_over_devices_too(compressed, alone):
  shared = compressed.replace(mesh=mesh(guidance=2, context=2), guidance_passes=2)
  seen = []
  watched = latents_of(
    shared, callback_on_step_end=lambda *arguments: seen.append(arguments[1])
  )
  assert seen == [0, 1, 2]
  assert_same(watched, alone["guided"])


def regions_of(*prompts):
  return [
    {"prompt": prompt, "box": (2 * i, 4, 2 * i + 8, 14), "weight": 0.7}
    for i, prompt in enumerate(prompts)
  ]


def photographs():
  draw = np.random.default_rng(0)
  shapes = zip(SIZES["height"], SIZES["width"], strict=True)
  return [draw.integers(0, 256, (*shape, 3)).astype(np.uint8) for shape in shapes]


DISCARDING = KVCompression(ratio=4, layers=(1,), operator="random_discard")
WEAK = WeakModel(models.nano(), models.random_params(models.nano(), 1))


@pytest.mark.parametrize(
  ("config", "fields", "arguments"),
  [
    (models.nano(size_conditions=True), {}, {}),
    (models.nano(kv_compression=DISCARDING), {}, {}),
    (models.nano(), {}, {"sampler": "euler-ancestral"}),
    (models.nano(), {}, {"regions": regions_of("a one", "three")}),
    (models.nano(), {}, {"regions": regions_of("a one"), "guidance_scale": 1.0}),
    (models.nano(), {"weak_model": WEAK}, {"autoguidance_scale": 2}),
    (
      models.nano(),
      {},
      {
        "image": photographs(),
        "mask_image": [image[..., 0] > 99 for image in photographs()],
        "strength": 0.7,
      },
    ),
  ],
  ids=[
    *("sizes", "discarding", "noise", "regions", "regions unguided", "autoguidance"),
    "mask",
  ],
)
def test_devices_share_networks_and_calls_of_every_kind(config, fields, arguments):
  subject = models.pipeline(config, batch_size=2, **fields)
  shared = subject.replace(mesh=mesh(guidance=2, context=2))
  assert_same(latents_of(shared, **arguments), latents_of(subject, **arguments))


@pytest.mark.parametrize(
  ("arguments", "branches", "axes"),
  [
    ({}, 2, {"guidance": 2, "context": 2}),
    ({"guidance_scale": 1.0}, 1, {"context": 4}),
    ({"regions": regions_of("a one")}, 3, {"context": 4}),
    ({"regions": regions_of("a one", "three")}, 4, {"guidance": 2, "context": 2}),
    (
      {"regions": regions_of("a one"), "guidance_scale": 1.0},
      2,
      {"guidance": 2, "context": 2},
    ),
    ({"autoguidance_scale": 2}, 2, {"context": 4}),
    ({"autoguidance_scale": 2, "guidance_scale": 1.0}, 1, {"context": 4}),
  ],
)
def test_a_call_has_the_devices_as_they_suit_its_branches(
  monkeypatch, arguments, branches, axes
):
  """Results would be the same with others, and late."""
  asked = []

  def not_drawn(params, batch, *arguments, **static):
    asked.append(program._Drawing(params, batch, *arguments, **static))
    return batch["noise"], None

  monkeypatch.setattr(program, "sample", not_drawn)
  fields = {"batch_size": 2, "weak_model": WEAK, "guidance_passes": 2}
  subject = models.pipeline(mesh=mesh(guidance=2, context=2), **fields)
  latents_of(subject, **arguments)
  [drawing] = asked
  assert len(drawing.captions) == branches
  assert dict(drawing.compute.mesh.shape) == {"data": 1, "fsdp": 1, **axes}
  assert drawing.batch["noise"].sharding.spec == P(ROWS, CONTEXT)
  assert drawing.passes_of(branches) == branches // axes.get("guidance", 1)


def test_devices_share_weights_of_8_bits(tmp_path):
  pytest.importorskip("qwix")
  models.save_snapshot(tmp_path, models.nano(), 1)
  one, several = (
    models.Pipeline.from_checkpoint(
      tmp_path, compute=models.FLOAT32, batch_size=2, quantize="int8", mesh=mesh
    )
    for mesh in ("none", "guidance=2,context=2")
  )
  arguments = {"num_inference_steps": 1, "sampler": "ddim"}
  alone, rows, shared = (
    np.concatenate([image.ravel() for image in latents_of(subject, **arguments)])
    for subject in (one, one.replace(batch_size=4), several)
  )
  # An activation beside the middle between two levels falls to either, as the order of
  # sums will have it: so it does, on one device, in batches of another size.
  levels = np.abs(rows - alone).mean()
  assert 0 < levels < 0.05 * np.abs(alone).mean()
  assert np.abs(shared - alone).mean() < 2 * levels


# ------------------------------------------------------------------------- the choice


@pytest.mark.parametrize(
  ("count", "batch_size", "tokens", "branches", "sizes"),
  [
    (1, 1, 4096, 2, (1, 1, 1)),
    (2, 1, 4096, 2, (1, 2, 1)),
    (8, 1, 4096, 2, (1, 2, 4)),
    (8, 1, 4096, 1, (1, 1, 8)),
    (8, 1, 4096, 3, (1, 1, 8)),
    (8, 2, 4096, 2, (2, 2, 2)),
    (8, 16, 4096, 2, (8, 1, 1)),
    (8, 1, 512, 2, (1, 2, 2)),  # too little for more
    (8, 1, 64, 2, (1, 1, 1)),
    (6, 1, 4096, 2, (1, 2, 3)),
  ],
)
def test_devices_are_shared_out_by_batch_guidance_and_tokens(
  count, batch_size, tokens, branches, sizes
):
  have = devices.best_sizes(
    count, batch_size=batch_size, tokens=tokens, branches=branches
  )
  assert tuple(have.values()) == sizes
  assert list(have) == ["data", "guidance", "context"]


def test_a_mesh_is_chosen_asked_for_or_none():
  fitting = {"batch_size": 1, "tokens": 4096, "branches": 2}
  chosen = devices.mesh_of("auto", **fitting)
  assert chosen.axis_names == SAMPLING_AXES
  assert chosen.devices.shape == (1, 1, 2, 4)
  asked = devices.mesh_of("context=2, guidance=2", **fitting)
  assert asked.devices.shape == (1, 1, 2, 2)
  assert devices.mesh_of("none", **fitting) is None
  assert devices.mesh_of("context=1", **fitting) is None
  assert devices.mesh_of("auto", **fitting, devices=jax.devices()[:1]) is None


@pytest.mark.parametrize(
  ("asked", "said"),
  [
    ("", "mesh '' is none, for '': say auto, none, or sizes of data, guidance, con"),
    ("tokens=2", "for 'tokens=2': say auto"),
    ("fsdp=2", "for 'fsdp=2': say auto"),
    ("context", "for 'context': say auto"),
    ("context=0", "for 'context=0': say auto"),
    ("context=-1", "for 'context=-1': say auto"),
    ("context=2,context=2", "for 'context=2': say auto"),
    ("context=3", "takes 3 devices, which does not divide the 8 that there are"),
    ("context=16", "takes 16 devices, which does not divide the 8"),
    ("data=2", "among 2 groups of devices, and batch_size is 1: make it a multiple"),
    ("guidance=2", "among 2 groups of devices, and there is 1, no guidance: leave"),
  ],
)
def test_a_mesh_that_cannot_be_says_so(asked, said):
  with pytest.raises(ValueError, match=said):
    devices.mesh_of(asked, batch_size=1, tokens=4096, branches=1)


def test_a_mesh_that_cannot_be_is_told_before_a_checkpoint_is_sought():
  with pytest.raises(ValueError, match="takes 3 devices"):
    models.Pipeline.from_checkpoint("/nowhere", mesh="context=3")


def test_a_checkpoint_is_read_onto_a_mesh_by_its_name(tmp_path):
  models.save_snapshot(tmp_path, models.nano(base_size=16), 1)
  read = models.Pipeline.from_checkpoint(tmp_path, mesh="auto")
  assert dict(read.mesh.shape) == {"data": 1, "fsdp": 1, "guidance": 2, "context": 1}


def test_branches_that_do_not_fit_leave_their_devices_to_tokens():
  shared = mesh(data=2, guidance=2, context=2)
  assert devices.suited_to(shared, 2, alike=True) is shared
  assert devices.suited_to(shared, 4, alike=True) is shared
  for branches, alike in ((1, True), (3, True), (2, False)):
    suited = devices.suited_to(shared, branches, alike=alike)
    assert dict(suited.shape) == {"data": 2, "fsdp": 1, "context": 4}
    # In the same order, in which parameters lie.
    assert list(suited.devices.flat) == list(shared.devices.flat)
  assert devices.suited_to(None, 1, alike=True) is None


def test_devices_that_share_tokens_take_more_branches_at_once():
  assert program.passes_by_size(1, 4096, None) == 2
  assert program.passes_by_size(1, 4096, mesh(context=2)) == 1
  assert program.passes_by_size(1, 16384, mesh(context=4)) == 2


def test_branches_are_counted():
  weakened = program.Weakened(1.0, None)
  guided = program.Guidance(4.5, 0.0, 1.0, 0.0)
  assert program.count_branches(None, 1) == 1
  assert program.count_branches(None, 3) == 3
  assert program.count_branches(guided, 1) == 2
  assert program.count_branches(guided._replace(perturbed=weakened), 3) == 7
  alone = guided._replace(scale=None, skipped=weakened)
  assert program.count_branches(alone, 1) == 2


def test_the_tokens_of_a_batch_lie_over_context_and_its_rows_over_data():
  of_tokens = ("noise", "coordinates", "original", "original_noise", "redrawn")
  names = dict.fromkeys(of_tokens, 3)
  names |= {"areas": 4, "caption_embeddings": 3, "grid": 2}
  batch = {name: np.zeros((2, 8, 8, 8)[:rank]) for name, rank in names.items()}
  places = sharding.batch_shardings(batch, mesh(data=2, guidance=2, context=2))
  shapes = {name: places[name].shard_shape(batch[name].shape) for name in batch}
  assert shapes == {
    **dict.fromkeys(of_tokens, (1, 4, 8)),
    "areas": (1, 8, 4, 8),
    "caption_embeddings": (1, 8, 8),
    "grid": (1, 8),
  }


@pytest.mark.parametrize("resolution", buckets.BUCKETS)
def test_the_sizes_of_a_resolution_share_three_programs_at_most(resolution):
  side = resolution // 16
  config = PixArtConfig.from_variant("XL/2", base_size=side, pe_interpolation=1.0)
  grids = [
    (size.height // 16, size.width // 16)
    for size in buckets.sampling_buckets(resolution).values()
  ]
  assert len({height * width for height, width in grids}) > 3
  for sizes in ({}, {"guidance": 2, "context": 4}):
    assert len({devices.padded_length(config, grid, sizes) for grid in grids}) <= 3


@pytest.mark.parametrize("window", [(1, 1), (2, 2), (3, 3)])
def test_a_sequence_has_whole_windows_on_each_device(window):
  ratio = window[0] * window[1]
  compression = KVCompression(ratio=ratio, layers=(1,) if ratio > 1 else ())
  config = dataclasses.replace(models.nano(), kv_compression=compression)
  for sizes in ({"context": 4}, {"guidance": 2, "context": 4}, {}):
    parts = sizes.get("guidance", 1) * sizes.get("context", 1)
    for grid in ((7, 9), (4, 4), (1, 5)):
      length = devices.padded_length(config, grid, sizes)
      least = grid[0] * grid[1]
      assert least <= length < least + parts * ratio
      assert parts == 1 or length % (parts * ratio) == 0
