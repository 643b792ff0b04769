"""PixArt's weights out of the official and diffusers' layouts, and back."""

import diffusers
import jax
import ml_dtypes
import numpy as np
import pytest
import torch

from pixsigma_jax.convert import (
  files,
  from_diffusers,
  from_pixart,
  to_diffusers,
  to_pixart,
)
from pixsigma_jax.convert.layouts import DIFFUSERS, OFFICIAL, names_of
from pixsigma_jax.convert.pixart import (
  COMPRESSED_CLASS,
  NULL_CAPTION,
  PEER_NULL_CAPTION,
  PEER_POSITIONS,
  POSITIONS,
  diffusers_config,
  null_caption_in,
  shown_by_config,
)
from pixsigma_jax.models.kv_compression import KVCompression
from pixsigma_jax.models.pixart import VARIANTS, PixArtConfig, abstract_params
from tests.models import reference

CASES = ("ms_plain", "ms_kv2", "ms_kv3", "ms_qknorm", "ms_micro", "plain_square")


def official(case="ms_kv2"):
  _, arrays = reference.load(case)
  return {k.removeprefix("w."): v for k, v in arrays.items() if k.startswith("w.")}


def random_model(**fields):
  config = PixArtConfig(
    **{
      **VARIANTS["Nano/2"],
      **{"caption_width": 32, "caption_length": 6},
      **{"base_size": 4, "pe_interpolation": 0.5, **fields},
    }
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


def onetrainers_table(width):
  """`pos_embed` as OneTrainer makes it for every model, of another width."""
  peer = diffusers.models.embeddings.PatchEmbed(
    height=128,
    width=128,
    patch_size=2,
    in_channels=4,
    embed_dim=width,
    interpolation_scale=1.0,
  )
  return peer.pos_embed.numpy()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_table_of_onetrainer_tells_nothing_of_the_model(dtype):
  weights = official()
  weights[POSITIONS] = onetrainers_table(48).astype(dtype)
  for given in ({}, {"base_size": 64}, {"pe_interpolation": 1.0}):
    left = " and ".join({"base_size", "pe_interpolation"} - given.keys())
    with pytest.raises(ValueError, match=r"OneTrainer writes .*: give") as error:
      from_pixart(weights, num_heads=4, **given)
    assert f"give --{left}" in str(error.value) or not given
  for given in (
    {"base_size": 64, "pe_interpolation": 2.0},
    {"base_size": 32, "pe_interpolation": 1.0},
    {"base_size": 64, "pe_interpolation": 1.0},
  ):
    config, params = from_pixart(weights, num_heads=4, **given)
    assert {name: getattr(config, name) for name in given} == given
    assert_equal_trees(params, from_pixart(official(), num_heads=4)[1])


def test_a_table_that_is_not_the_models_is_left_out_where_asked():
  given = {"num_heads": 4, "base_size": 32, "pe_interpolation": 1.0}
  with pytest.raises(ValueError, match="leave it out with --nopos_embed"):
    from_pixart(official(), **given)
  config, _ = from_pixart(official(), **given, stored_positions=False)
  assert (config.base_size, config.pe_interpolation) == (32, 1.0)
  with pytest.raises(ValueError, match="show base_size: give --base_size"):
    from_pixart(official(), num_heads=4, stored_positions=False)
  # What the table does not tell is no matter of the table.
  with pytest.raises(ValueError, match="caption_length=300") as error:
    from_pixart(official(), num_heads=4, caption_length=300)
  assert "pos_embed" not in str(error.value)


def exported(**fields):
  """A model, and diffusers' state dict and config.json of it."""
  config, params = random_model(**fields)
  return config, params, to_diffusers(config, params), diffusers_config(config)


def test_the_official_repositorys_export_of_a_model_with_qk_norm_is_read():
  config, params, weights, json = exported(qk_norm=True)
  as_exported = {
    name.replace("attn1.norm_q", "attn1.q_norm").replace("norm_k", "k_norm"): array
    for name, array in weights.items()
  }
  assert set(as_exported) != set(weights)
  have, restored = from_diffusers(
    as_exported, config_json=json, caption_length=config.caption_length
  )
  assert have == config
  assert_equal_trees(restored, params)
  twice = {**as_exported, **weights}
  with pytest.raises(ValueError, match=r"attn1\.[qk]_norm\.\w+ is not used"):
    from_diffusers(twice, config_json=json, caption_length=config.caption_length)


def test_the_null_caption_in_older_exports_of_diffusers_is_read():
  config, params, weights, json = exported()
  null_caption = np.ones((6, 32), np.float16)
  weights[PEER_NULL_CAPTION] = null_caption
  have, restored = from_diffusers(weights, config_json=json)
  assert have == config
  assert_equal_trees(restored, params)
  np.testing.assert_array_equal(null_caption_in(weights), null_caption)
  with pytest.raises(ValueError, match=r"caption_length=300 was .*caption_length=6"):
    from_diffusers(weights, config_json=json, caption_length=300)


@pytest.mark.parametrize("name", [NULL_CAPTION, PEER_NULL_CAPTION])
@pytest.mark.parametrize(
  ("null_caption", "message"),
  [
    (np.ones((10, 31), np.float32), "31 channels wide, but .* are 32"),
    (np.ones((1, 10, 32), np.float32), r"shape \[1, 10, 32\], not \[tokens"),
  ],
)
def test_a_null_caption_of_another_model_is_refused(name, null_caption, message):
  if name == NULL_CAPTION:
    weights, read, known = official(), from_pixart, {"num_heads": 4}
  else:
    _, _, weights, json = exported()
    read, known = from_diffusers, {"config_json": json}
  with pytest.raises(ValueError, match=message):
    read({**weights, name: null_caption}, **known)


def test_a_table_of_positions_kept_by_diffusers_must_be_the_configs():
  config, params, weights, json = exported(base_size=8, pe_interpolation=2.0)
  peer = diffusers.PixArtTransformer2DModel.from_config(json)
  weights[PEER_POSITIONS] = peer.pos_embed.pos_embed.numpy()
  have, restored = from_diffusers(weights, config_json=json, caption_length=6)
  assert have == config
  assert_equal_trees(restored, params)
  with pytest.raises(ValueError, match=r"pe_interpolation=1.0 .*pe_interpolation=2.0"):
    from_diffusers(
      weights, config_json={**json, "interpolation_scale": 1.0}, caption_length=6
    )


@pytest.mark.parametrize("name", [POSITIONS, NULL_CAPTION])
def test_what_the_weights_do_not_show_is_asked_for(name):
  weights = official()
  del weights[name]
  asked = {POSITIONS: "base_size", NULL_CAPTION: "caption_length"}[name]
  with pytest.raises(
    ValueError, match=f"Neither the weights .* show {asked}: give --{asked}"
  ):
    from_pixart(weights, num_heads=4)


def test_heads_of_an_unnamed_size_are_asked_for():
  with pytest.raises(ValueError, match="show num_heads: give --num_heads"):
    from_pixart(official())


def test_the_width_of_xl_shows_its_heads_at_every_depth(monkeypatch):
  # PixArt 900M is XL/2 with 42 blocks; here XL/2 is as small as the model.
  heads = {"depth": 28, "width": 48, "num_heads": 4, "patch_size": 2}
  monkeypatch.setitem(VARIANTS, "XL/2", heads)
  config, params = random_model(depth=3)
  restored_config, restored = from_pixart(to_pixart(config, params), caption_length=6)
  assert restored_config == config
  assert_equal_trees(restored, params)


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
    ("sample_size", 9, "sample_size=9, which is no multiple of patch_size=2"),
    ("sample_size", [8, 8], r"sample_size=\[8, 8\], which is no number above 0"),
    ("num_attention_heads", "4", "num_attention_heads='4', which is no number"),
    ("interpolation_scale", 0, "interpolation_scale=0, which is no number above 0"),
    ("attention_type", "gated", "attention_type='gated'; PixArt's"),
    ("only_cross_attention", True, "only_cross_attention=True; PixArt's"),
  ],
)
def test_configs_of_other_networks_are_refused(field, value, message):
  json = {**diffusers_config(random_model()[0]), field: value}
  with pytest.raises(ValueError, match=message):
    shown_by_config(json)


@pytest.mark.parametrize(
  ("stated", "message"),
  [
    ({"num_layers": 3}, r"num_layers=3 \(the weights: 2\)"),
    ({"attention_head_dim": 24}, "num_attention_heads=4 of attention_head_dim=24"),
    ({"num_attention_heads": 2}, "num_attention_heads=2 of .* 24, but .* of width 48"),
    ({"num_attention_heads": 7}, "together 84, but these weights are of width 48"),
    ({"cross_attention_dim": 32}, r"cross_attention_dim=32 \(the weights: 48\)"),
    ({"cross_attention_dim": None}, r"cross_attention_dim=None \(the weights: 48\)"),
    ({"in_channels": 16}, r"in_channels=16 \(the weights: 4\)"),
    ({"out_channels": 4}, r"out_channels=4 \(the weights: 8\)"),
    ({"out_channels": None}, r"out_channels=4 \(the weights: 8\)"),
    ({"patch_size": 4}, r"patch_size=4 \(the weights: 2\)"),
    ({"caption_channels": 4096}, r"caption_channels=4096 \(the weights: 32\)"),
    ({"caption_channels": None}, r"caption_channels=None \(the weights: 32\)"),
    (
      {"use_additional_conditions": True},
      r"use_additional_conditions=True \(the weights: False\)",
    ),
    ({"num_layers": 28, "caption_channels": 1}, "num_layers=28 .*caption_channels=1 "),
    ({"_class_name": COMPRESSED_CLASS}, f"the class {COMPRESSED_CLASS} "),
    ({"kv_compress_ratio": 4}, r"kv_compress_ratio=4 \(the weights: None\)"),
  ],
  ids=str,
)
def test_a_config_that_contradicts_its_weights_is_refused(stated, message):
  _, _, weights, json = exported()
  with pytest.raises(ValueError, match=message):
    from_diffusers(weights, caption_length=6, config_json={**json, **stated})


@pytest.mark.parametrize(
  ("stated", "message"),
  [
    ({"_class_name": "PixArtTransformer2DModel"}, f"are of {COMPRESSED_CLASS}"),
    ({"kv_compress_ratio": 2}, r"kv_compress_ratio=2 \(the weights: 4\)"),
    ({"kv_compress_layers": [0, 1]}, r"kv_compress_layers=\[0, 1\] .*: \[1\]"),
    ({"kv_compress_norm": False}, "kv_compress_norm=False .*: True"),
  ],
  ids=str,
)
def test_a_config_of_another_compression_is_refused(stated, message):
  _, _, weights, json = exported(kv_compression=KVCompression(ratio=4, layers=(1,)))
  with pytest.raises(ValueError, match=message):
    from_diffusers(weights, caption_length=6, config_json={**json, **stated})


def test_what_a_config_leaves_out_contradicts_nothing():
  """Exports of α say less, and diffusers' own defaults are those of another size."""
  config, params, weights, json = exported(learn_variance=False)
  said = ("_class_name", "num_attention_heads", "sample_size", "interpolation_scale")
  for stated in (
    {field: json[field] for field in said},
    {**json, "out_channels": None},  # as many as in_channels
    {**json, "use_additional_conditions": None},  # what the size suggests
    {**json, "_class_name": "Transformer2DModel", "double_self_attention": False},
  ):
    have, restored = from_diffusers(weights, caption_length=6, config_json=stated)
    assert have == config
    assert_equal_trees(restored, params)


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


STOCK = [
  *(diffusers.PixArtTransformer2DModel, diffusers.Transformer2DModel),
  *(diffusers.AutoModel, diffusers.DiffusionPipeline),
]

NO_OTHERS = dict.fromkeys(("vae", "text_encoder", "tokenizer"))


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("peer", STOCK, ids=lambda peer: peer.__name__)
def test_every_class_of_stock_diffusers_refuses_a_compressing_model(
  peer, low_cpu_mem_usage, tmp_path
):
  _, _, weights, json = exported(kv_compression=KVCompression(ratio=4, layers=(1,)))
  # As somebody might name it who wants it to load.
  for name in (json["_class_name"], "PixArtTransformer2DModel"):
    write_pipeline(tmp_path / name, weights, {**json, "_class_name": name})
    folder, others = tmp_path / name, NO_OTHERS
    if peer is not diffusers.DiffusionPipeline:
      folder, others = folder / "transformer", {}
    with pytest.raises(
      (ValueError, RuntimeError),
      match=f"scale_shift_table|no class `{COMPRESSED_CLASS}",
    ):
      peer.from_pretrained(str(folder), low_cpu_mem_usage=low_cpu_mem_usage, **others)
  assert not hasattr(diffusers, COMPRESSED_CLASS)


@pytest.mark.parametrize("peer", STOCK, ids=lambda peer: peer.__name__)
def test_stock_diffusers_loads_a_model_that_does_not_compress(peer, tmp_path):
  """Or the refusals above would say nothing."""
  _, _, weights, json = exported()
  write_pipeline(tmp_path, weights, json)
  if peer is diffusers.DiffusionPipeline:
    model = peer.from_pretrained(tmp_path, **NO_OTHERS).transformer
  else:
    model = peer.from_pretrained(str(tmp_path / "transformer"))
  np.testing.assert_array_equal(
    model.scale_shift_table.detach().numpy(), weights["scale_shift_table"]
  )


def write_pipeline(folder, weights, json):
  """A pipeline of diffusers without text encoder and autoencoder."""
  (folder / "transformer").mkdir(parents=True)
  files.write_json(folder / "transformer" / "config.json", json)
  files.write_safetensors(
    folder / "transformer" / "diffusion_pytorch_model.safetensors", weights
  )
  diffusers.DDIMScheduler().save_pretrained(folder / "scheduler")
  index = {
    "_class_name": "PixArtSigmaPipeline",
    "transformer": ["diffusers", json["_class_name"]],
    "scheduler": ["diffusers", "DDIMScheduler"],
  }
  files.write_json(folder / "model_index.json", index)


@pytest.mark.parametrize("fields", [{}, {"norm": False}], ids=str)
def test_compressing_models_exported_before_the_row_of_zeros_are_read(fields):
  compression = KVCompression(ratio=4, layers=(1,), **fields)
  config, params, weights, json = exported(kv_compression=compression)
  before = {**weights, "scale_shift_table": weights["scale_shift_table"][:2]}
  for export in (weights, before):
    have, restored = from_diffusers(export, caption_length=6, config_json=json)
    assert have == config
    assert_equal_trees(restored, params)
  spoiled = {**weights, "scale_shift_table": weights["scale_shift_table"] + 1}
  with pytest.raises(ValueError, match=r"scale_shift_table has shape \[3, 48\], not"):
    from_diffusers(spoiled, caption_length=6, config_json=json)
  # A row too many in a model that does not compress is no sign of ours.
  _, _, plain, json = exported()
  plain["scale_shift_table"] = weights["scale_shift_table"]
  with pytest.raises(ValueError, match=r"scale_shift_table has shape \[3, 48\], not"):
    from_diffusers(plain, caption_length=6, config_json=json)


def test_full_size_names_are_those_of_the_peers():
  config = PixArtConfig.from_variant("XL/2", base_size=64, pe_interpolation=2.0)
  # The official files have 437 entries, two of them buffers.
  assert len(names_of(config, OFFICIAL)) == 435
  with torch.device("meta"):
    peer = diffusers.PixArtTransformer2DModel.from_config(diffusers_config(config))
  assert set(names_of(config, DIFFUSERS)) == set(peer.state_dict())
