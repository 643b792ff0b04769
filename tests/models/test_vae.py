"""The autoencoder: diffusers' numbers, and the same ones on many devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pixsigma_jax import sharding, tree
from pixsigma_jax.convert.vae import vae_from_weights
from pixsigma_jax.models import attention, vae
from pixsigma_jax.models.vae import KLAutoencoder, VAEConfig, abstract_params
from tests.convert.published_vae import CHANNELS, NORM_GROUPS, make_vae, tensors

CONFIG = VAEConfig(channels=CHANNELS, norm_groups=NORM_GROUPS)
# Two levels of one block: enough for what is about devices and tiles, quick to compile.
SMALL = VAEConfig(channels=(8, 16), blocks_per_level=1, norm_groups=4)


def relative(ours, theirs):
  """The largest difference, in parts of the largest number."""
  assert ours.shape == theirs.shape
  return np.abs(ours - theirs).max() / np.abs(theirs).max()


def channels_first(array):
  return torch.from_numpy(np.moveaxis(array, -1, 1).copy())


def channels_last(tensor):
  return np.moveaxis(tensor.detach().numpy(), 1, -1)


def draw(*shape, seed=0):
  return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


@pytest.fixture(scope="module")
def reference():
  return make_vae()


@pytest.fixture(scope="module")
def params(reference):
  return vae_from_weights(tensors(reference), CONFIG)


@pytest.fixture(scope="module")
def expected(reference):
  """What diffusers makes of 2 images of 48 x 64 pixels, and of their latents."""
  posterior = reference.encode(channels_first(draw(2, 48, 64, 3))).latent_dist
  decoded = reference.decode(channels_first(draw(2, 6, 8, 4))).sample
  parts = (posterior.mean, posterior.std, decoded)
  return dict(zip(("mean", "std", "images"), map(channels_last, parts), strict=True))


def autoencoder(params, config=CONFIG, dtype=jnp.float32, **fields):
  return KLAutoencoder(
    config=config, params=params, scaling_factor=0.13025, dtype=dtype, **fields
  )


@pytest.fixture(scope="module")
def small():
  random = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: np.float32(random.normal(size=leaf.shape) * leaf.shape[-1] ** -0.5),
    abstract_params(SMALL),
  )
  return autoencoder(params, SMALL)


def mesh_of(count):
  return sharding.make_mesh(
    data=1, fsdp=1, context=count, devices=jax.devices()[:count]
  )


def test_the_full_size_is_that_of_the_published_weights():
  params = abstract_params(VAEConfig())
  assert tree.size(params["encoder"]) == 34_163_664  # with quant_conv
  assert tree.size(params["decoder"]) == 49_490_199  # with post_quant_conv
  assert tree.size(params) == 83_653_863


def test_moments_are_those_of_diffusers(params, expected):
  mean, log_variance = autoencoder(params).moments(draw(2, 48, 64, 3))
  # The bound for the whole network in float32.
  assert relative(mean, expected["mean"]) < 1e-5
  assert relative(np.exp(log_variance / 2), expected["std"]) < 1e-5


def test_decoded_images_are_those_of_diffusers(params, expected):
  images = autoencoder(params).decode(draw(2, 6, 8, 4))
  assert relative(images, expected["images"]) < 1e-5


def test_in_bfloat16_numbers_agree_to_3_percent(params, expected):
  ours = autoencoder(params, dtype=jnp.bfloat16)
  images = ours.decode(draw(2, 6, 8, 4))
  mean, log_variance = ours.moments(draw(2, 48, 64, 3))
  std = np.exp(log_variance / 2)
  for name, array in (("images", images), ("mean", mean), ("std", std)):
    assert array.dtype == np.float32
    error = np.sqrt(np.mean((array - expected[name]) ** 2))
    # The bound; bfloat16 has 8 bits, and 30 layers add their roundings.
    assert error < 0.03 * np.sqrt(np.mean(expected[name] ** 2)), name


def test_nearly_flat_maps_are_normalised_as_by_torch():
  x = 1e-3 * draw(2, 3, 5, 8)  # a variance at which the epsilon counts
  norm = torch.nn.GroupNorm(4, 8, eps=1e-6)
  norm.load_state_dict(
    {"weight": torch.arange(1.0, 9.0), "bias": torch.arange(8.0)}, strict=True
  )
  params = {"scale": jnp.arange(1.0, 9.0), "bias": jnp.arange(8.0)}
  ours = vae.GroupNorm(4).apply({"params": params}, jnp.asarray(x))
  # One layer in float32.
  assert relative(np.asarray(ours), channels_last(norm(channels_first(x)))) < 1e-6


def test_norms_of_bfloat16_maps_are_computed_in_float32():
  x = jnp.asarray(100 + 4 * draw(1, 16, 16, 8), jnp.bfloat16)  # steps of a half
  params = {"scale": jnp.ones(8), "bias": jnp.zeros(8)}
  ours, exact = (
    vae.GroupNorm(4).apply({"params": params}, each)
    for each in (x, x.astype(jnp.float32))
  )
  np.testing.assert_array_equal(ours, exact)


def test_the_mean_is_what_encode_returns(small):
  images = draw(1, 8, 12, 3)
  np.testing.assert_array_equal(small.encode(images), small.moments(images)[0])


def test_standard_deviations_stay_finite_whatever_the_network_says(small):
  encoder = small.params["encoder"]
  bias = np.repeat([0.0, 1e4, -1e4], [4, 2, 2]).astype(np.float32)
  quant_conv = {**encoder["quant_conv"], "bias": bias}
  wild = dataclasses.replace(
    small, params={**small.params, "encoder": {**encoder, "quant_conv": quant_conv}}
  )
  _, log_variance = wild.moments(draw(1, 8, 12, 3))
  bounds = np.repeat([20.0, -30.0], 2)  # the reference's
  np.testing.assert_array_equal(
    log_variance, np.broadcast_to(bounds, log_variance.shape)
  )


@pytest.mark.parametrize("half", ["decode", "moments"])
@pytest.mark.parametrize(
  ("batch", "height"), [(1, 12), (1, 6), (2, 6), (1, 5)], ids=str
)
def test_devices_that_share_the_rows_give_the_whole_images_numbers(
  small, half, batch, height
):
  shared = dataclasses.replace(small, mesh=mesh_of(4))
  shape = {"decode": (height, 10, 4), "moments": (2 * height, 20, 3)}[half]
  x = draw(batch, *shape)
  # Sums over rows come in another order: float32's rounding, through some 20 layers.
  jax.tree.map(
    lambda ours, alone: np.testing.assert_array_less(relative(ours, alone), 1e-5),
    getattr(shared, half)(x),
    getattr(small, half)(x),
  )


@pytest.mark.parametrize(
  ("batch", "height", "images", "rows"),
  [(1, 12, 1, 4), (1, 6, 1, 2), (2, 6, 2, 2), (8, 7, 4, 1), (3, 16, 1, 4)],
)
def test_devices_take_whole_images_first_and_then_as_many_rows_as_divide(
  small, batch, height, images, rows
):
  mesh = dataclasses.replace(small, mesh=mesh_of(4))._mesh(batch, height)
  assert mesh.devices.size == 4  # all take part, and hold the result
  assert (mesh.shape["images"], mesh.shape["rows"]) == (images, rows)


def test_each_of_the_devices_holds_its_part_of_the_activations_only(small, monkeypatch):
  monkeypatch.setattr(attention, "_QUERY_CHUNK", 128)  # scores must not outweigh them
  monkeypatch.setattr(attention, "_KEY_CHUNK", 128)
  mesh = dataclasses.replace(small, mesh=mesh_of(4))._mesh(1, 128)

  def temporary(mesh):
    place = mesh and NamedSharding(mesh, P("images", "rows"))
    latents = jax.ShapeDtypeStruct((1, 128, 64, 4), jnp.float32, sharding=place)
    decoder = vae.Decoder(SMALL, jnp.float32, mesh)
    lowered = vae.run.lower(small.params["decoder"], latents, network=decoder)
    return lowered.compile().memory_analysis().temp_size_in_bytes

  # A quarter, and all keys and values, which weigh much in so small a network.
  assert temporary(mesh) < 0.6 * temporary(None)


def test_attention_never_holds_the_scores_of_all_pairs(monkeypatch):
  monkeypatch.setattr(attention, "_QUERY_CHUNK", 128)
  monkeypatch.setattr(attention, "_KEY_CHUNK", 128)
  module = vae.Attention(SMALL, jnp.float32, mesh=None)
  x = jax.ShapeDtypeStruct((1, 64, 64, 8), jnp.float32)
  params = jax.eval_shape(module.init, jax.random.key(0), x)
  compiled = jax.jit(module.apply).lower(params, x).compile()
  temporary = compiled.memory_analysis().temp_size_in_bytes
  assert temporary < 64**4 * 4 / 16  # bytes of all scores: 64 MiB


def test_an_image_as_large_as_a_tile_is_decoded_as_a_whole(small):
  latents = draw(1, 8, 8, 4)
  tiled = dataclasses.replace(small, tile_size=16)
  np.testing.assert_array_equal(tiled.decode(latents), small.decode(latents))


def test_an_image_of_a_tiles_area_is_a_whole_whatever_its_shape(small):
  latents = draw(1, 4, 16, 4)
  tiled = dataclasses.replace(small, tile_size=16)
  np.testing.assert_array_equal(tiled.decode(latents), small.decode(latents))


def test_what_only_one_tile_sees_is_that_tiles_own_decode(small):
  latents = draw(1, 13, 8, 4)  # tiles of 8 rows from 0 and 5
  tiled = dataclasses.replace(small, tile_size=16).decode(latents)
  np.testing.assert_array_equal(tiled[:, :10], small.decode(latents[:, :8])[:, :10])
  np.testing.assert_array_equal(tiled[:, 16:], small.decode(latents[:, 5:])[:, 6:])


def test_what_only_one_tile_sees_is_that_tiles_own_encoding(small):
  images = draw(1, 16, 26, 3)  # tiles of 16 columns from 0 and 10
  tiled = dataclasses.replace(small, tile_size=16)
  for ours, left, right in zip(
    tiled.moments(images),
    small.moments(images[:, :, :16]),
    small.moments(images[:, :, 10:]),
    strict=True,
  ):
    np.testing.assert_array_equal(ours[:, :, :5], left[:, :, :5])
    np.testing.assert_array_equal(ours[:, :, 8:], right[:, :, 3:])


def test_all_tiles_of_an_image_run_through_one_program(small):
  tiled = dataclasses.replace(small, tile_size=12)
  before = vae.run._cache_size()
  tiled.decode(draw(1, 17, 25, 4))
  assert vae.run._cache_size() == before + 1


@pytest.mark.parametrize(
  ("unit_in", "unit_out"), [(1, 2), (2, 1)], ids=["decoding", "encoding"]
)
def test_tiles_of_an_image_blend_into_the_image_to_the_bit(unit_in, unit_out):
  image = draw(2, 17 * unit_in, 29 * unit_in, 3)

  def program(tile):  # knows no neighbours: every tile says the same of a place
    tile = tile[:, ::unit_in, ::unit_in]
    return tile.repeat(unit_out, axis=1).repeat(unit_out, axis=2)

  joined = vae._in_tiles(program, image, (17, 29), 8, (unit_in, unit_out))
  np.testing.assert_array_equal(joined, program(image))


def test_a_seam_is_a_straight_line_from_one_tile_to_the_next():
  parts = [np.zeros((1, 4), np.float32), np.ones((1, 4), np.float32)]
  seam = vae.blend(parts, [0, 1], axis=1)
  np.testing.assert_allclose(seam, [[0, 0.25, 0.5, 0.75, 1]], rtol=1e-7)


@given(st.integers(2, 64), st.integers(0, 400))
def test_tiles_cover_a_length_and_overlap_by_a_quarter(tile, more):
  length = tile + more
  starts = np.array(vae.tile_starts(length, tile))
  assert (starts[0], starts[-1]) == (0, length - tile)
  assert len(starts) <= 1 + np.ceil(more / np.floor(0.75 * tile))
  assert (np.diff(starts) <= np.ceil(0.75 * tile)).all()


@pytest.mark.parametrize(
  ("factor", "name"), [(0.13025, "sdxl-vae"), (0.18215, "sd-vae"), (1.5305, "kl-vae")]
)
def test_whose_latents_they_are_follows_from_the_scaling_factor(small, factor, name):
  named = dataclasses.replace(small, scaling_factor=factor)
  assert (named.channels, named.downsampling) == (4, 2)
  assert named.identity == {"name": name, "latent_channels": 4, "downsampling": 2}


@pytest.mark.parametrize("shape", [(1, 7, 8, 3), (1, 8, 7, 3), (1, 8, 8, 4)], ids=str)
def test_images_it_cannot_encode_are_refused_with_what_it_takes(small, shape):
  with pytest.raises(ValueError, match=r"\[b H W 3\] .* multiples of 2, not \(1, "):
    small.encode(draw(*shape))


def test_latents_of_another_autoencoder_are_refused(small):
  with pytest.raises(ValueError, match=r"\[b h w 4\], not \(1, 4, 4, 16\)"):
    small.decode(draw(1, 4, 4, 16))


@pytest.mark.parametrize("size", [0, 2, 17])
def test_a_tile_that_cannot_be_cut_is_refused(small, size):
  with pytest.raises(ValueError, match=rf"tile_size={size} must be a multiple of 2"):
    dataclasses.replace(small, tile_size=size)


def test_groups_that_do_not_divide_the_channels_are_refused():
  with pytest.raises(ValueError, match=r"norm_groups=32 .* \(16, 32\)"):
    VAEConfig(channels=(16, 32))
