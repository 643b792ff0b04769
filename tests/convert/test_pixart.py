"""PixArt's weights out of the official and diffusers' layouts, and back."""

import diffusers
import jax
import numpy as np
import pytest
import torch

from pixsigma_jax.convert import from_diffusers, from_pixart, to_diffusers, to_pixart
from pixsigma_jax.convert.layouts import DIFFUSERS, OFFICIAL, names_of
from pixsigma_jax.convert.pixart import (
  COMPRESSED_CLASS,
  NULL_CAPTION,
  POSITIONS,
  diffusers_config,
  null_caption_in,
  shown_by_config,
)
from pixsigma_jax.models.kv_compression import KVCompression
from pixsigma_jax.models.pixart import PixArtConfig, abstract_params
from tests.models import reference

CASES = ("ms_plain", "ms_kv2", "ms_kv3", "ms_qknorm", "ms_micro", "plain_square")


def official(case="ms_kv2"):
  _, arrays = reference.load(case)
  return {k.removeprefix("w."): v for k, v in arrays.items() if k.startswith("w.")}


def random_model(**fields):
  config = PixArtConfig.from_variant(
    "Nano/2",
    caption_width=32,
    caption_length=6,
    **{"base_size": 4, "pe_interpolation": 0.5, **fields},
  )
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    # Weak enough that float32 tells two equal networks from different ones.
    lambda leaf: rng.normal(0, 0.15, leaf.shape).astype(leaf.dtype),
    abstract_params(config),
  )
  return config, params


def assert_equal_trees(one, other):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("case", CASES)
def test_official_weights_show_their_own_hyper_parameters(case):
  expected, _ = reference.load(case)
  config, params = from_pixart(official(case), num_heads=4)
  assert config == expected
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), params)
  wanted = jax.tree.map(lambda x: (x.shape, x.dtype), abstract_params(expected))
  assert shapes == wanted


@pytest.mark.parametrize("case", CASES)
def test_official_weights_come_back_to_the_bit(case):
  weights = official(case)
  config, params = from_pixart(weights, num_heads=4)
  back = to_pixart(config, params, null_caption_in(weights))
  assert set(back) == set(weights)
  for name, array in weights.items():
    if name == POSITIONS:  # recomputed in float32: the reference's sines are float64
      np.testing.assert_allclose(back[name], array, rtol=0, atol=1e-6)
    else:
      np.testing.assert_array_equal(back[name], array)


@pytest.mark.parametrize(
  "fields",
  [
    {},
    {"qk_norm": True},
    {"size_conditions": True},
    {"learn_variance": False, "in_channels": 16, "mlp_ratio": 2.0},
    {"kv_compression": KVCompression(ratio=2, layers=(1,))},
    {"kv_compression": KVCompression(ratio=4, layers=(0,), norm=False)},
    {"kv_compression": KVCompression(ratio=16, layers=(0, 1))},
  ],
  ids=str,
)
def test_our_parameters_come_back_to_the_bit_through_both_layouts(fields):
  config, params = random_model(**fields)
  shown = shown_by_config(diffusers_config(config))
  for there, back, known in (
    (to_pixart, from_pixart, {"caption_length": 6}),
    (to_diffusers, from_diffusers, {**shown, "caption_length": 6}),
  ):
    restored_config, restored = back(there(config, params), **{"num_heads": 4, **known})
    assert restored_config == config
    assert_equal_trees(restored, params)


def test_the_positions_kept_in_a_checkpoint_tell_base_size_and_scale():
  for scale in (0.5, 1.0, 1.4142, 2.0, 4.0, 5.625, 8.0):
    config, params = random_model(base_size=8, pe_interpolation=scale)
    weights = to_pixart(config, params)
    # In half precision only to an eighth, which all published scales are.
    for dtype in (np.float32, np.float16) if scale % 0.125 == 0 else (np.float32,):
      weights[POSITIONS] = weights[POSITIONS].astype(dtype)
      assert from_pixart(weights, num_heads=4, caption_length=6)[0] == config


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"caption_length": 300}, "caption_length=300 was asked for.*caption_length=10"),
    ({"base_size": 32}, "base_size=32 was asked for.*base_size=4"),
    (
      {"pe_interpolation": 1.0},
      r"pe_interpolation=1.0 was asked .*pe_interpolation=2.0",
    ),
  ],
)
def test_flags_that_contradict_the_weights_are_refused(given, message):
  with pytest.raises(ValueError, match=message):
    from_pixart(official(), num_heads=4, **given)


@pytest.mark.parametrize("name", [POSITIONS, NULL_CAPTION])
def test_what_the_weights_do_not_show_is_asked_for(name):
  weights = official()
  del weights[name]
  asked = {POSITIONS: "base_size", NULL_CAPTION: "caption_length"}[name]
  with pytest.raises(ValueError, match=f"Neither the weights .* show {asked}: give it"):
    from_pixart(weights, num_heads=4)


def test_heads_of_an_unnamed_size_are_asked_for():
  with pytest.raises(ValueError, match="show num_heads: give it"):
    from_pixart(official())


def test_every_tensor_missing_left_over_or_misshapen_is_named():
  weights = official()
  weights["blocks.9.attn.qkv.weight"] = np.zeros((3, 1), np.float32)
  del weights["blocks.1.mlp.fc2.bias"]
  with pytest.raises(ValueError, match="not the weights") as error:
    from_pixart(weights, num_heads=4)
  assert "blocks.1.mlp.fc2.bias is missing" in str(error.value)
  assert "blocks.9.attn.qkv.weight is not used" in str(error.value)

  weights = official()
  weights["t_block.1.bias"] = weights["t_block.1.bias"][:5]
  with pytest.raises(ValueError, match=r"t_block.1.bias has shape \[5\], not \[288\]"):
    from_pixart(weights, num_heads=4)


def test_a_lora_is_told_from_a_model():
  lora = {"transformer_blocks.0.attn1.to_q.lora_A.weight": np.zeros((4, 8), np.float32)}
  with pytest.raises(ValueError, match=r"weights of a LoRA .*\.transform merge_lora"):
    from_diffusers(lora, num_heads=4)
  with pytest.raises(ValueError, match="no layer was found"):
    from_diffusers(official(), num_heads=4)


def test_a_table_of_learned_positions_is_refused():
  weights = official()
  weights[POSITIONS] = weights[POSITIONS] + 0.1
  with pytest.raises(ValueError, match="not a table of PixArt's fixed positions"):
    from_pixart(weights, num_heads=4)


def test_a_compression_without_parameters_is_not_exported():
  compression = KVCompression(ratio=4, layers=(1,), operator="average")
  config, params = random_model(kv_compression=compression)
  for export in (to_pixart, to_diffusers):
    with pytest.raises(ValueError, match="only 'conv' can be exported"):
      export(config, params)


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("_class_name", "UNet2DConditionModel", "of the class 'UNet2DConditionModel'"),
    ("norm_type", "ada_norm_zero", "norm_type='ada_norm_zero'; PixArt's"),
    ("attention_bias", False, "attention_bias=False; PixArt's"),
    ("sample_size", None, "does not say sample_size"),
  ],
)
def test_configs_of_other_networks_are_refused(field, value, message):
  json = {**diffusers_config(random_model()[0]), field: value}
  with pytest.raises(ValueError, match=message):
    shown_by_config(json)


def test_a_config_without_a_scale_means_what_diffusers_takes_it_for():
  json = diffusers_config(random_model()[0])
  for sample_size, scale in ((32, 1.0), (64, 1.0), (128, 2.0), (256, 4.0)):
    shown = shown_by_config(
      {**json, "sample_size": sample_size, "interpolation_scale": None}
    )
    assert shown == {
      "num_heads": 4,
      "base_size": sample_size // 2,
      "pe_interpolation": scale,
    }


def test_the_compressed_class_is_one_that_diffusers_does_not_have():
  compression = KVCompression(ratio=4, layers=(1,))
  config, _ = random_model(kv_compression=compression)
  json = diffusers_config(config)
  assert json["_class_name"] == COMPRESSED_CLASS
  assert not hasattr(diffusers, COMPRESSED_CLASS)


def test_full_size_names_are_those_of_the_peers():
  config = PixArtConfig.from_variant("XL/2", base_size=64, pe_interpolation=2.0)
  # The official files have 437 entries, two of them buffers.
  assert len(names_of(config, OFFICIAL)) == 435
  with torch.device("meta"):
    peer = diffusers.PixArtTransformer2DModel.from_config(diffusers_config(config))
  assert set(names_of(config, DIFFUSERS)) == set(peer.state_dict())
