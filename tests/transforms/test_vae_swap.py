"""From one autoencoder's latents to another's: the same network, in other units."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixsigma_jax import tree
from pixsigma_jax.models.kv_compression import KVCompression
from pixsigma_jax.models.pixart import PixArt, abstract_params
from pixsigma_jax.transforms import swap_vae
from tests.sample import models

CONFIG = models.nano(in_channels=4, kv_compression=KVCompression())
PARAMS = models.random_params(CONFIG)

OLD = {"scaling": 0.5, "mean": (0.2, -1.0, 3.0, 0.0), "std": (2.0, 1.0, 0.5, 4.0)}
NEW = {"scaling": 2.0, "mean": (1.0, 0.5, -2.0, 0.3), "std": (0.4, 1.0, 0.2, 0.3)}


def swap(old, new, config=CONFIG, params=PARAMS, **fields):
  return swap_vae(
    config,
    params,
    scaling_factor=new["scaling"],
    old_scaling_factor=old["scaling"],
    old_mean=old["mean"],
    old_std=old["std"],
    new_mean=new["mean"],
    new_std=new["std"],
    **fields,
  )


@functools.cache
def program(config):
  # Run once or twice: compiling well would take longer than running badly.
  return jax.jit(
    PixArt(config, models.FLOAT32).apply,
    compiler_options={"xla_backend_optimization_level": 0},
  )


def predictions(config, params, latents):
  """The network's noise and variance logits, each `[b h w c]`."""
  captions = jnp.ones((1, 8, 16)) / 3
  arguments = (latents, jnp.array([300]), captions, jnp.ones((1, 8), bool))
  output = np.asarray(program(config)({"params": params}, *arguments))
  return output[..., : config.in_channels], output[..., config.in_channels :]


def draws(channels, seed=0):
  shape = (1, 8, 8, channels)
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def scaled(standard, about):
  """Latents of one autoencoder, as the network sees them, of an image in z-scores."""
  return np.float32(about["scaling"]) * (
    np.float32(about["mean"]) + np.float32(about["std"]) * standard
  )


def assert_close(found, expected):
  # Two layers in float32, whose sums are taken of other summands.
  tolerance = 1e-5 * np.abs(expected).max()
  np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


# ------------------------------------------------------------------ nothing to change


def test_a_new_scaling_factor_alone_changes_no_parameter():
  config, params = swap_vae(CONFIG, PARAMS, scaling_factor=0.13025)
  assert config == CONFIG
  assert params is PARAMS


def test_latents_of_equal_statistics_change_no_parameter():
  config, params = swap(OLD, OLD)
  assert config == CONFIG
  assert params is PARAMS


def test_a_scaling_factor_that_makes_up_for_the_spread_leaves_only_the_mean_to_move():
  new = {"scaling": 1.0, "mean": NEW["mean"], "std": (1.0, 0.5, 0.25, 2.0)}
  _, params = swap(OLD, new)
  before, after = tree.named_leaves(PARAMS), tree.named_leaves(params)
  changed = [name for name in before if after[name] is not before[name]]
  assert changed == ["patch_embedding/bias"]


# ------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("learn_variance", [True, False])
def test_on_the_new_latents_of_an_image_it_says_what_it_said_on_the_old(learn_variance):
  config = models.nano(
    in_channels=4, kv_compression=KVCompression(), learn_variance=learn_variance
  )
  params = models.random_params(config)
  image = draws(4)
  swapped, new_params = swap(OLD, NEW, config, params)
  assert swapped == config
  old_noise, old_logits = predictions(config, params, scaled(image, OLD))
  noise, logits = predictions(config, new_params, scaled(image, NEW))
  # In units of the new latents: a spread of 0.5 · d_old is one of 2 · d_new now.
  ratio = 0.5 * np.array(OLD["std"]) / (2.0 * np.array(NEW["std"]))
  assert_close(noise * ratio.astype(np.float32).reshape(1, 1, 1, 4), old_noise)
  if learn_variance:
    assert_close(logits, old_logits)


def test_there_and_back_is_the_model_that_it_was():
  _, there = swap(OLD, NEW)
  _, back = swap(NEW, OLD, params=there)
  # Rounded to float32 twice on the way.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), back, PARAMS)


def test_only_patch_embedding_and_head_are_touched_and_the_input_stays():
  before = tree.named_leaves(PARAMS)
  copies = jax.tree.map(np.array, PARAMS)
  _, params = swap(OLD, NEW)
  after = tree.named_leaves(params)
  assert list(after) == list(before)
  changed = {name for name in before if after[name] is not before[name]}
  assert changed == {
    f"{part}/{leaf}"
    for part in ("patch_embedding", "out")
    for leaf in ("kernel", "bias")
  }
  jax.tree.map(np.testing.assert_array_equal, PARAMS, copies)


def test_without_a_mean_to_move_the_bias_of_the_patches_is_shared():
  centered = [{**about, "mean": (0.0,) * 4} for about in (OLD, NEW)]
  _, params = swap(*centered)
  assert params["patch_embedding"]["bias"] is PARAMS["patch_embedding"]["bias"]
  assert params["patch_embedding"]["kernel"] is not PARAMS["patch_embedding"]["kernel"]


# --------------------------------------------------------------------------- channels


def test_new_channels_change_nothing_that_is_said_of_the_old():
  config, params = swap_vae(CONFIG, PARAMS, scaling_factor=1.0, channels=6)
  assert config.in_channels == 6
  assert tree.differences(params, abstract_params(config)) == []
  latents = draws(6)
  old_noise, old_logits = predictions(CONFIG, PARAMS, latents[..., :4])
  noise, logits = predictions(config, params, latents)
  assert_close(noise[..., :4], old_noise)
  assert_close(logits[..., :4], old_logits)
  # As a fresh head says: nothing.
  np.testing.assert_array_equal(noise[..., 4:], 0)
  np.testing.assert_array_equal(logits[..., 4:], 0)


def test_new_channels_learn_from_the_first_step():
  config, params = swap_vae(CONFIG, PARAMS, scaling_factor=1.0, channels=5)
  latents, captions = jnp.asarray(draws(5)), jnp.ones((1, 8, 16)) / 3
  inputs = (latents, jnp.array([300]), captions, jnp.ones((1, 8), bool))

  def loss(part):
    output = PixArt(config, models.FLOAT32).apply(
      {"params": {**params, **part}}, *inputs
    )
    return jnp.square(output - 1).mean()

  parts = {name: params[name] for name in ("patch_embedding", "out")}
  options = {"xla_backend_optimization_level": 0}
  gradient = jax.jit(jax.grad(loss), compiler_options=options)(parts)
  head = gradient["out"]["kernel"].reshape(48, 4, 2, 5)
  assert (gradient["patch_embedding"]["kernel"][:, :, 4] != 0).all()
  assert (head[..., 4] != 0).all()


def test_fewer_channels_say_what_was_said_when_the_others_were_zero():
  config, params = swap_vae(CONFIG, PARAMS, scaling_factor=1.0, channels=3)
  assert tree.differences(params, abstract_params(config)) == []
  latents = draws(4)
  latents[..., 3] = 0
  old_noise, old_logits = predictions(CONFIG, PARAMS, latents)
  noise, logits = predictions(config, params, latents[..., :3])
  assert_close(noise, old_noise[..., :3])
  assert_close(logits, old_logits[..., :3])


def test_statistics_are_of_the_channels_that_both_have():
  wide = {"scaling": 2.0, "mean": (*NEW["mean"], 9.0), "std": (*NEW["std"], 7.0)}
  _, expected = swap(OLD, NEW)
  _, params = swap(OLD, wide, channels=5)
  kernel = params["patch_embedding"]["kernel"]
  same = np.testing.assert_array_equal
  same(kernel[:, :, :4], expected["patch_embedding"]["kernel"])
  same(kernel[:, :, 4], 0)
  same(params["patch_embedding"]["bias"], expected["patch_embedding"]["bias"])
  head = params["out"]["bias"].reshape(4, 2, 5)
  same(head[..., :4], expected["out"]["bias"].reshape(4, 2, 4))


# ---------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"scaling_factor": 0.0}, r"scaling_factor=0.0 must be positive"),
    ({"scaling_factor": float("nan")}, r"scaling_factor=nan must be positive"),
    ({"channels": 0}, r"channels=0 must be at least 1"),
    ({"old_mean": (0.0,) * 4}, r"but not old_scaling_factor, new_mean, .* or none"),
    ({"old_scaling_factor": 1.0}, r"but not old_mean, new_mean, old_std, new_std"),
  ],
)
def test_arguments_that_contradict_each_other_are_named(fields, message):
  with pytest.raises(ValueError, match=message):
    swap_vae(CONFIG, PARAMS, **{"scaling_factor": 1.0, **fields})


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"mean": (0.0,) * 3}, r"new_mean has 3 numbers for 4 channels"),
    ({"std": (1.0,) * 5}, r"new_std has 5 numbers for 4 channels"),
    ({"std": (1.0, 0.0, 1.0, 1.0)}, r"new_std=1.0, 0.0, 1.0, 1.0 must be positive"),
    ({"mean": (0.0, float("inf"), 0.0, 0.0)}, r"new_mean=.*inf.* must be finite"),
  ],
)
def test_statistics_that_cannot_be_are_named(change, message):
  with pytest.raises(ValueError, match=message):
    swap(OLD, {**NEW, **change})
