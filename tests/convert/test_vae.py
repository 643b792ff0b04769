"""The autoencoder's files: each tensor to its leaf and back, whoever wrote them."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.numpy import load_file, save_file

from pixsigma_jax import sharding, tree
from pixsigma_jax.convert.vae import (
  load_autoencoder,
  vae_config,
  vae_from_weights,
  vae_to_weights,
)
from pixsigma_jax.models.vae import VAEConfig, abstract_params
from tests import commands
from tests.convert.published_vae import CHANNELS, NORM_GROUPS, make_vae, tensors

CONFIG = VAEConfig(channels=CHANNELS, norm_groups=NORM_GROUPS)
WEIGHTS = "diffusion_pytorch_model.safetensors"
LAYOUTS = ["diffusers", "diffusers-legacy", "ldm"]


@pytest.fixture(scope="module")
def reference():
  return make_vae()


@pytest.fixture(scope="module")
def weights(reference):
  return tensors(reference)


@pytest.fixture(scope="module")
def params(weights):
  return vae_from_weights(weights, CONFIG)


@pytest.fixture
def folder(reference, tmp_path):
  reference.save_pretrained(tmp_path)
  return tmp_path


def edit_config(folder, **fields):
  path = folder / "config.json"
  config = json.loads(path.read_text()) | fields
  path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


def assert_same(ours, theirs):
  assert ours.keys() == theirs.keys()
  for name in theirs:
    np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_every_tensor_of_the_full_size_has_its_leaf():
  with torch.device("meta"):
    theirs = make_vae(VAEConfig().channels, VAEConfig().norm_groups).state_dict()
  params = jax.tree.map(
    # Strides of nothing: the shape alone, without 335 MB.
    lambda leaf: np.broadcast_to(np.float32(0), leaf.shape),
    abstract_params(VAEConfig()),
  )
  ours = vae_to_weights(params, VAEConfig())
  assert len(ours) == 248
  assert {k: v.shape for k, v in ours.items()} == {
    k: tuple(v.shape) for k, v in theirs.items()
  }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_round_trip_is_equal_to_the_bit(weights, params, layout):
  there = vae_to_weights(params, CONFIG, layout)
  assert len(there) == len(weights)
  back = vae_from_weights(there, CONFIG)
  jax.tree.map(np.testing.assert_array_equal, back, params)
  assert_same(vae_to_weights(back, CONFIG), weights)


def test_what_diffusers_makes_of_the_ldm_layout_is_its_own(reference, weights, params):
  ldm = vae_to_weights(params, CONFIG, "ldm")
  assert ldm["decoder.up.3.block.0.conv1.weight"].ndim == 4  # the coarsest, run first
  as_torch = {name: torch.from_numpy(value) for name, value in ldm.items()}
  theirs = convert_ldm_vae_checkpoint(as_torch, dict(reference.config))
  assert_same({name: value.numpy() for name, value in theirs.items()}, weights)


def test_what_diffusers_makes_of_the_legacy_names_is_its_own(folder, weights, params):
  save_file(vae_to_weights(params, CONFIG, "diffusers-legacy"), folder / WEIGHTS)
  assert_same(tensors(AutoencoderKL.from_pretrained(folder)), weights)


def test_weights_inside_a_stable_diffusion_file_are_found(params):
  ldm = vae_to_weights(params, CONFIG, "ldm")
  prefixed = {f"first_stage_model.{name}": value for name, value in ldm.items()}
  jax.tree.map(
    np.testing.assert_array_equal, vae_from_weights(prefixed, CONFIG), params
  )


def test_half_precision_is_read_as_float32(weights, params):
  halves = {name: value.astype(np.float16) for name, value in weights.items()}
  read = vae_from_weights(halves, CONFIG)
  assert {leaf.dtype for leaf in jax.tree.leaves(read)} == {np.dtype(np.float32)}
  jax.tree.map(
    lambda ours, whole: np.testing.assert_array_equal(ours, np.float16(whole)),
    read,
    params,
  )


def test_tensors_that_do_not_fit_are_all_named(weights):
  spoilt = dict(weights)
  del spoilt["decoder.conv_out.bias"], spoilt["quant_conv.weight"]
  spoilt["encoder.extra"] = np.zeros((), np.float32)
  spoilt["encoder.conv_in.weight"] = np.zeros((16, 4, 3, 3), np.float32)
  spoilt["encoder.conv_in.bias"] = spoilt["encoder.conv_in.bias"].astype(np.int8)
  with pytest.raises(ValueError, match="layout 'diffusers': ") as error:
    vae_from_weights(spoilt, CONFIG)
  _, _, problems = str(error.value).partition("layout 'diffusers': ")
  assert problems.split("; ") == [
    "missing: decoder.conv_out.bias, quant_conv.weight",
    "not used: encoder.extra",
    "encoder.conv_in.bias is int8, which is quantised",
    "encoder.conv_in.weight has shape (16, 4, 3, 3), not (16, 3, 3, 3).",
  ]


def test_attention_of_more_than_one_pixel_is_refused(params):
  ldm = vae_to_weights(params, CONFIG, "ldm")
  name = "encoder.mid.attn_1.q.weight"
  wide = np.repeat(ldm[name], 3, axis=-1)
  with pytest.raises(ValueError, match=rf"{name} has shape \(32, 32, 1, 3\), not"):
    vae_from_weights({**ldm, name: wide}, CONFIG)


def test_parameters_of_another_size_are_not_written(params):
  wider = VAEConfig(channels=(16, 32, 32, 64), norm_groups=8)
  with pytest.raises(ValueError, match=r"\+ decoder/conv_in/bias float32\[64\]"):
    vae_to_weights(params, wider)
  with pytest.raises(ValueError, match="Unknown layout 'keras'; choose one of diff"):
    vae_to_weights(params, CONFIG, "keras")


def test_a_saved_folder_gives_the_autoencoder(folder, reference, params):
  ours = load_autoencoder(folder, dtype=jnp.float32)
  assert (ours.config, ours.scaling_factor) == (CONFIG, 0.13025)
  assert ours.identity["name"] == "sdxl-vae"
  jax.tree.map(np.testing.assert_array_equal, ours.params, params)
  latents = np.random.default_rng(0).normal(size=(1, 2, 4, 4)).astype(np.float32)
  theirs = reference.decode(torch.from_numpy(latents.transpose(0, 3, 1, 2)))
  theirs = theirs.sample.detach().numpy().transpose(0, 2, 3, 1)
  # The bound for the whole network in float32.
  error = np.abs(ours.decode(latents) - theirs).max()
  assert error < 1e-5 * np.abs(theirs).max()


def test_parameters_are_read_onto_every_device_of_the_mesh(folder):
  mesh = sharding.make_mesh(data=1, fsdp=2, context=4)
  ours = load_autoencoder(folder, dtype=jnp.bfloat16, mesh=mesh)
  for leaf in jax.tree.leaves(ours.params):
    assert leaf.sharding.is_fully_replicated
    assert len(leaf.sharding.device_set) == 8


def test_a_scaling_factor_is_never_guessed(folder):
  edit_config(folder, scaling_factor="absent")
  with pytest.raises(ValueError, match=r"has no scaling_factor: pass .*0\.18215"):
    load_autoencoder(folder, dtype=jnp.float32)
  given = load_autoencoder(folder, dtype=jnp.float32, scaling_factor=0.18215)
  assert given.identity["name"] == "sd-vae"


def test_two_scaling_factors_are_one_too_many(folder):
  with pytest.raises(ValueError, match=r"scaling_factor 0\.13025, and 0\.18215 was"):
    load_autoencoder(folder, dtype=jnp.float32, scaling_factor=0.18215)


def test_a_scaling_factor_of_nothing_is_refused(folder):
  edit_config(folder, scaling_factor=0)
  with pytest.raises(ValueError, match="scaling_factor 0 must be a positive"):
    load_autoencoder(folder, dtype=jnp.float32)


def test_a_folder_without_config_is_refused_by_name(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"There is no config\.json in"):
    load_autoencoder(tmp_path, dtype=jnp.float32)


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("_class_name", "AutoencoderTiny", "_class_name is 'AutoencoderTiny': only"),
    ("shift_factor", 0.0609, "shift_factor=0.0609: only None"),
    ("latents_mean", [0.5], "latents_mean=[0.5]: only None"),
    ("latents_std", [0.5], "latents_std=[0.5]: only None"),
    ("act_fn", "relu", "act_fn='relu': only 'silu'"),
    ("use_quant_conv", False, "use_quant_conv=False: only True"),
    ("in_channels", 4, "in_channels=4: only 3"),
    ("mid_block_add_attention", False, "mid_block_add_attention=False: only True"),
    ("up_block_types", ["AttnUpDecoderBlock2D"] * 4, "up_block_types=['AttnUp"),
    ("down_block_types", ["DownEncoderBlock2D"] * 3, "down_block_types=['DownEnc"),
    ("patch_size", [2, 2], "unknown field, patch_size=[2, 2]"),
    ("norm_num_groups", "absent", "config.json lacks norm_num_groups"),
  ],
)
def test_a_network_of_another_kind_is_refused_by_the_value(
  folder, field, value, message
):
  edit_config(folder, **{field: value})
  with pytest.raises(ValueError, match=re.escape(message)):
    load_autoencoder(folder, dtype=jnp.float32)


def test_the_published_sdxl_config_is_read():
  config = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.20.0.dev0",
    "_name_or_path": "../sdxl-vae/",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
  }
  assert vae_config(config) == VAEConfig()


def test_leaves_are_named_alike_in_both_halves(params):
  names = tree.named_leaves(params)
  assert "encoder/level_0/block_0/conv_1/kernel" in names
  assert names["encoder/level_1/block_0/shortcut/kernel"].shape == (1, 1, 16, 32)
  assert names["decoder/level_0/block_0/shortcut/kernel"].shape == (1, 1, 32, 16)


def test_the_command_takes_the_autoencoder_there_and_back(
  capsys, monkeypatch, tmp_path
):
  model = make_vae()
  model.save_pretrained(tmp_path / "vae")
  one_file, back = tmp_path / "vae.safetensors", tmp_path / "back"

  def convert(*arguments):
    return commands.run(capsys, monkeypatch, "convert", "--model=vae", *arguments)

  done = convert("--from=diffusers", "--to=ldm", tmp_path / "vae", one_file)
  assert done.code == 0, done.err
  assert "encoder.down.0.block.0.conv1.weight" in load_file(one_file)
  done = convert("--from=diffusers", "--to=ldm", tmp_path / "vae", one_file)
  assert (done.code, "exists already" in done.err) == (1, True)

  done = convert("--from=diffusers", "--to=diffusers-legacy", tmp_path / "vae", back)
  assert done.code == 0, done.err
  # diffusers reads what it used to write itself, and finds the same numbers.
  theirs = AutoencoderKL.from_pretrained(back)
  assert theirs.config.scaling_factor == 0.13025
  for name, array in tensors(model).items():
    np.testing.assert_array_equal(theirs.state_dict()[name].numpy(), array)

  # Of SDXL's size alone: one file does not say its own.
  done = convert("--from=ldm", "--to=diffusers", one_file, tmp_path / "other")
  assert (done.code, "does not say its scaling factor" in done.err) == (1, True)
  done = convert(
    *("--from=ldm", "--to=diffusers", one_file, tmp_path / "other"),
    "--scaling_factor=0.13025",
  )
  assert (done.code, "not the weights of an autoencoder" in done.err) == (1, True)
  done = convert("--from=pixart", "--to=ldm", one_file, tmp_path / "other")
  assert (done.code, "has no format 'pixart'" in done.err) == (1, True)
  assert not (tmp_path / "other").exists()
