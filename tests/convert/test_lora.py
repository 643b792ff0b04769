"""Low-rank adapters: PEFT and diffusers load ours and draw the same, we theirs."""

import json
import re

import diffusers
import jax
import numpy as np
import peft
import pytest
import torch
from diffusers.loaders.peft import PeftAdapterMixin
from safetensors.numpy import load_file, save_file

from pixsigma_jax import tree
from pixsigma_jax.convert import verify
from pixsigma_jax.convert.lora import read_lora, write_lora
from pixsigma_jax.convert.pixart import diffusers_config, to_diffusers
from pixsigma_jax.models.kv_compression import KVCompression
from pixsigma_jax.models.pixart import PixArtConfig, abstract_params
from pixsigma_jax.transforms import merge_lora
from pixsigma_jax.transforms.lora import Lora
from tests import commands
from tests.convert.test_pixart import random_model

# The modules that the official training script of a LoRA names.
OFFICIAL_TARGETS = [
  *("to_k", "to_q", "to_v", "to_out.0", "proj_in", "proj_out"),
  *("ff.net.0.proj", "ff.net.2", "proj", "linear", "linear_1", "linear_2"),
]
EVERYTHING = ("kernel",)

# The same products of float32 in another order, through two blocks.
TOLERANCE = 1e-5


def lora(targets=("attention/", "mlp/"), **fields):
  fields = {"rank": 4, "alpha": 6.0, "dora": False, **fields}
  return Lora(targets=targets, **fields)


def random_adapter(spec, params, seed=0):
  """Every number of it at random: what training leaves. A DoRA's lengths stay near."""
  draw = np.random.default_rng(seed)
  kernels = tree.named_leaves(params)

  def random(name, leaf):
    noise = draw.normal(size=leaf.shape).astype(np.float32)
    if name.endswith("magnitude"):
      kernel = kernels[name.replace("magnitude", "kernel")]
      matrices = kernel.reshape(*leaf.shape[:-1], -1, leaf.shape[-1])
      return np.linalg.norm(matrices, axis=-2) * (1 + 0.3 * noise)
    return 0.1 * noise

  return tree.map_with_name(
    random, jax.eval_shape(spec.init, params, jax.random.key(0))
  )


class Adaptable(diffusers.PixArtTransformer2DModel, PeftAdapterMixin):
  """diffusers' transformer with diffusers' loader, which its own class lacks."""


def theirs(config, params, kind=diffusers.PixArtTransformer2DModel):
  model = kind.from_config(diffusers_config(config))
  weights = to_diffusers(config, params)
  model.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
  return model.eval()


def output_of(model, config):
  inputs = verify.fixed_inputs(config)
  with torch.no_grad():
    output = model(
      torch.tensor(np.moveaxis(inputs.latents, -1, 1)),
      encoder_hidden_states=torch.tensor(inputs.caption_embeddings),
      timestep=torch.tensor(inputs.timesteps),
      added_cond_kwargs={"resolution": None, "aspect_ratio": None},
      encoder_attention_mask=torch.tensor(inputs.caption_mask),
      return_dict=False,
    )[0]
  return np.moveaxis(output.numpy(), 1, -1)


def our_output(config, params):
  """Of our parameters in diffusers' network: a compilation less than in our own."""
  return output_of(theirs(config, params), config)


def distance(have, want):
  return np.abs(have - want).max() / np.abs(want).max()


CASES = {
  "attention and MLP": lora(),
  "every kernel, the patches' convolution too": lora(EVERYTHING),
  "DoRA of every kernel": lora(EVERYTHING, dora=True),
  "alpha as large as the rank": lora(("qkv",), alpha=4.0),
}


@pytest.mark.parametrize("spec", CASES.values(), ids=CASES)
def test_peft_and_diffusers_load_our_adapter_and_see_our_merged_model(spec, tmp_path):
  config, params = random_model()
  adapter = random_adapter(spec, params)
  folder = tmp_path / "adapter"
  write_lora(folder, config, adapter, spec)
  assert sorted(path.name for path in folder.iterdir()) == [
    "adapter_config.json",
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
  ]
  ours = our_output(config, spec.merged(params, adapter))
  before = our_output(config, params)
  assert distance(before, ours) > 0.02  # or nothing would be seen

  in_peft = peft.PeftModel.from_pretrained(theirs(config, params), folder)
  assert distance(output_of(in_peft, config), ours) < TOLERANCE
  in_diffusers = theirs(config, params, Adaptable)
  in_diffusers.load_lora_adapter(
    str(folder), weight_name="pytorch_lora_weights.safetensors"
  )
  assert distance(output_of(in_diffusers, config), ours) < TOLERANCE
  # What is taken out again is the model that it was put into.
  with in_peft.disable_adapter():
    assert distance(output_of(in_peft, config), before) < TOLERANCE


@pytest.mark.parametrize("file", ["", "pytorch_lora_weights.safetensors"])
@pytest.mark.parametrize("spec", CASES.values(), ids=CASES)
def test_our_adapter_is_read_back_from_either_format(spec, file, tmp_path):
  config, params = random_model()
  adapter = random_adapter(spec, params)
  write_lora(tmp_path / "adapter", config, adapter, spec)
  back = read_lora(tmp_path / "adapter" / file, config)
  have, want = tree.named_leaves(back), tree.named_leaves(adapter)
  assert have.keys() == want.keys()
  for name, leaf in want.items():
    scale = np.float32(spec.scale) if name.endswith("/up") else 1
    np.testing.assert_array_equal(have[name], leaf * scale, err_msg=name)


PEFTS = {
  "as the official script": {"target_modules": OFFICIAL_TARGETS},
  "queries and values alone": {"target_modules": ["to_q", "to_v"]},
  "DoRA of queries alone": {"target_modules": ["to_q"], "use_dora": True},
  "one layer": {"target_modules": r"transformer_blocks\.1\.attn1\.to_[qkv]"},
  "ranks and alphas of their own": {
    "target_modules": ["to_q", "to_k", "ff.net.2"],
    "rank_pattern": {"to_k": 7, r"transformer_blocks\.0\.ff.net.2": 2},
    "alpha_pattern": {"attn1.to_k": 3},
  },
  "rank-stabilized": {"target_modules": ["to_q"], "use_rslora": True},
}


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize("fields", PEFTS.values(), ids=PEFTS)
def test_an_adapter_that_peft_saved_merges_to_what_peft_draws(fields, tmp_path):
  config, params = random_model()
  torch.manual_seed(0)
  settings = peft.LoraConfig(r=4, lora_alpha=6, **fields)
  model = peft.get_peft_model(theirs(config, params), settings).eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if "lora_magnitude" in name:
        parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
      elif "lora_" in name:
        parameter.copy_(0.1 * torch.randn_like(parameter))
  model.save_pretrained(tmp_path)
  _, after = merge_lora(config, params, adapter=read_lora(tmp_path, config))
  want = output_of(model, config)
  assert distance(our_output(config, params), want) > 0.005
  assert distance(our_output(config, after), want) < TOLERANCE
  # Kernels that it does not name are the very same.
  changed = tree.named_leaves(read_lora(tmp_path, config))
  for name, leaf in tree.named_leaves(params).items():
    if not any(part.startswith(name.removesuffix("kernel")) for part in changed):
      assert tree.named_leaves(after)[name] is leaf


def trained_by_peft(settings, config, params, kind=diffusers.PixArtTransformer2DModel):
  """A model with an adapter of PEFT's whose every number is at random."""
  torch.manual_seed(0)
  model = theirs(config, params, kind)
  if kind is Adaptable:
    model.add_adapter(settings)
  else:
    model = peft.get_peft_model(model, settings)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if "lora_" in name:
        parameter.add_(0.1 * torch.randn_like(parameter))
  return model


def merged_by_peft(folder, config, params):
  model = peft.PeftModel.from_pretrained(theirs(config, params), folder)
  return {k: v.numpy() for k, v in model.merge_and_unload().state_dict().items()}


def merged_by_us(path, config, params):
  _, after = merge_lora(config, params, adapter=read_lora(path, config))
  return to_diffusers(config, after)


def assert_merged_alike(have, want, before):
  """Within the rounding of sums of products; and some kernel did change."""
  assert have.keys() == want.keys()
  for name, array in want.items():
    np.testing.assert_allclose(have[name], array, rtol=0, atol=1e-6, err_msg=name)
  assert any(np.abs(want[name] - before[name]).max() > 1e-3 for name in want)


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
UNDERSTOOD = {
  "gaussian": {"init_lora_weights": "gaussian"},
  "no initialisation": {"init_lora_weights": False},
  "orthogonal": {"init_lora_weights": "orthogonal"},
  "EVA, which leaves the base alone": {
    "init_lora_weights": "eva",
    "eva_config": peft.EvaConfig(),
  },
  "alternatives in one pattern": {
    "rank_pattern": {"to_q|attn1.to_v": 6},
    "alpha_pattern": {"attn1.to_k|to_out.0": 3},
  },
  "the first of several patterns": {
    "alpha_pattern": {"attn2.to_k": 5, "to_k": 2, "attn1.to_k": 50},
    "rank_pattern": {r"attn\d.to_v": 2, "to_v": 6},
  },
  "patterns of whole names": {
    "alpha_pattern": {"^transformer_blocks.0.attn1.to_q": 3, "o_q": 7, "attn1": 9},
  },
  "rank-stabilized, with patterns": {
    "use_rslora": True,
    "rank_pattern": {"to_v": 2},
    "alpha_pattern": {"to_q": 1.5},
  },
  "some layers": {
    "layers_to_transform": [1],
    "layers_pattern": "transformer_blocks",
  },
  "one layer by one of two patterns": {
    "layers_to_transform": 0,
    "layers_pattern": ["blocks", "transformer_blocks"],
  },
  "without some": {"exclude_modules": ["attn2.to_q"]},
  "without some by an expression": {"exclude_modules": r".*attn1\..*"},
  "targets by an expression": {"target_modules": r".*\.1\..*to_[qv]"},
  "DoRA, with patterns": {"use_dora": True, "alpha_pattern": {"to_v": 9}},
}


# Remarks of PEFT's on what a test does on purpose.
@pytest.mark.filterwarnings("ignore:lora with eva initialization used")
@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")
@pytest.mark.parametrize("fields", UNDERSTOOD.values(), ids=UNDERSTOOD)
def test_settings_of_peft_mean_to_us_what_they_mean_to_peft(fields, tmp_path):
  config, params = random_model()
  settings = peft.LoraConfig(
    r=4, lora_alpha=6, **{"target_modules": ATTENTION, **fields}
  )
  trained_by_peft(settings, config, params).save_pretrained(tmp_path)
  assert_merged_alike(
    merged_by_us(tmp_path, config, params),
    merged_by_peft(tmp_path, config, params),
    to_diffusers(config, params),
  )


def test_what_a_file_of_settings_leaves_out_is_peft_s_default(tmp_path):
  config, params = random_model()
  settings = peft.LoraConfig(r=8, lora_alpha=3, target_modules=["to_q"])
  trained_by_peft(settings, config, params).save_pretrained(tmp_path)
  said = json.loads((tmp_path / "adapter_config.json").read_text())
  kept = {name: said[name] for name in ("peft_type", "target_modules")}
  (tmp_path / "adapter_config.json").write_text(json.dumps(kept))
  assert_merged_alike(
    merged_by_us(tmp_path, config, params),
    merged_by_peft(tmp_path, config, params),
    to_diffusers(config, params),
  )


@pytest.mark.filterwarnings("ignore:.*changes the base weights of the model")
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_an_adapter_that_holds_a_part_of_its_base_is_refused(start, tmp_path):
  config, params = random_model()
  settings = peft.LoraConfig(
    r=4, lora_alpha=6, target_modules=["to_q", "to_v"], init_lora_weights=start
  )
  model = peft.get_peft_model(theirs(config, params), settings)
  model.peft_config["default"].init_lora_weights = True
  model.save_pretrained(tmp_path / "initial")
  model.peft_config["default"].init_lora_weights = start
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if "lora_" in name:
        parameter.add_(0.1 * torch.randn_like(parameter))
  model.save_pretrained(tmp_path / "trained")
  with pytest.raises(
    ValueError,
    match=f"init_lora_weights='{start}', which takes a part out of the base model, .*"
    "path_initial_model_for_weight_conversion",
  ):
    read_lora(tmp_path / "trained", config)
  # The way out that the message names.
  model.save_pretrained(
    tmp_path / "converted",
    path_initial_model_for_weight_conversion=str(tmp_path / "initial"),
  )
  want = {k: v.numpy() for k, v in model.merge_and_unload().state_dict().items()}
  have = merged_by_us(tmp_path / "converted", config, params)
  for name, array in want.items():
    np.testing.assert_allclose(have[name], array, rtol=0, atol=1e-5, err_msg=name)


def test_a_file_of_diffusers_means_what_its_header_says(tmp_path, caplog):
  config, params = random_model()
  settings = peft.LoraConfig(
    r=4, lora_alpha=6, target_modules=ATTENTION, alpha_pattern={"to_q": 1}
  )
  model = trained_by_peft(settings, config, params, Adaptable)
  model.save_lora_adapter(tmp_path)
  again = theirs(config, params, Adaptable)
  again.load_lora_adapter(
    str(tmp_path), prefix=None, weight_name="pytorch_lora_weights.safetensors"
  )
  again.fuse_lora()
  again.unload_lora()
  want = {k: v.detach().numpy() for k, v in again.state_dict().items()}
  have = merged_by_us(tmp_path, config, params)
  assert_merged_alike(have, want, to_diffusers(config, params))
  assert "alpha" not in caplog.text


def without_settings(folder):
  (folder / "adapter_config.json").unlink()


def without_header(folder):
  file = folder / "pytorch_lora_weights.safetensors"
  save_file(load_file(file), file)


@pytest.mark.parametrize(
  ("file", "edit"),
  [
    ("adapter_model.safetensors", without_settings),
    ("pytorch_lora_weights.safetensors", without_header),
  ],
)
def test_alpha_is_never_guessed_without_a_warning(file, edit, tmp_path, caplog):
  config, params = random_model()
  spec = lora(("qkv",))
  adapter = random_adapter(spec, params)
  write_lora(tmp_path, config, adapter, spec)
  write_lora(tmp_path / "a", config, adapter, spec)
  read_lora(tmp_path / "a" / file, config)
  assert "alpha" not in caplog.text
  edit(tmp_path / "a")
  back = tree.named_leaves(read_lora(tmp_path / "a" / file, config))
  assert re.search(rf"{file} says nothing of alpha, .* rank", caplog.text)
  unscaled = file == "adapter_model.safetensors"
  for name, leaf in tree.named_leaves(adapter).items():
    scale = spec.scale if name.endswith("/up") and not unscaled else 1
    np.testing.assert_array_equal(back[name], leaf * np.float32(scale))


def kohya(folder, alpha, prefix="lora_transformer_"):
  """A file as Kohya's trainer and OneTrainer write it, of the same adapter."""
  weights = {}
  for name, array in load_file(folder / "adapter_model.safetensors").items():
    module, _, part = name.removeprefix("base_model.model.").partition(".lora_")
    module = f"{prefix}{module.replace('.', '_')}"
    part = {"A.weight": "down.weight", "B.weight": "up.weight"}[part]
    weights[f"{module}.lora_{part}"] = array
    weights[f"{module}.alpha"] = np.asarray(alpha, np.float32)
  save_file(weights, folder / "kohya.safetensors")
  return folder / "kohya.safetensors"


@pytest.mark.parametrize("prefix", ["lora_transformer_", "lora_unet_"])
def test_a_file_of_kohyas_means_what_its_alphas_say(prefix, tmp_path, caplog):
  config, params = random_model()
  spec = lora(("attention/", "mlp/"), alpha=6.0)
  write_lora(tmp_path / "a", config, random_adapter(spec, params), spec)
  want = tree.named_leaves(read_lora(tmp_path / "a", config))
  path = kohya(tmp_path / "a", spec.alpha, prefix)
  have = tree.named_leaves(read_lora(path, config))
  assert set(have) == set(want)
  for name, leaf in want.items():
    np.testing.assert_allclose(have[name], leaf, rtol=1e-6, atol=0, err_msg=name)
  assert "alpha" not in caplog.text
  for alpha, shown in ((np.nan, "nan"), (-1, "-1.0"), ([1, 2], "1.0, 2.0")):
    with pytest.raises(ValueError, match=f"its alpha is {shown}"):
      read_lora(kohya(tmp_path / "a", alpha, prefix), config)


def test_an_alpha_that_the_settings_contradict_is_refused(tmp_path):
  name = "base_model.model.transformer_blocks.0.attn1.to_q.alpha"
  folder, config = saved(
    tmp_path, lambda w: w.update({name: np.asarray(3, np.float32)})
  )
  with pytest.raises(ValueError, match=r"its alpha is 3, and the settings say"):
    read_lora(folder, config)


def test_a_header_that_is_none_is_an_error(tmp_path):
  config, params = random_model()
  spec = lora(("qkv",))
  write_lora(tmp_path / "a", config, random_adapter(spec, params), spec)
  file = tmp_path / "a" / "pytorch_lora_weights.safetensors"
  for text, message in (("{", "is not JSON"), ("[]", "holds a list, not PEFT's")):
    save_file(load_file(file), file, metadata={"lora_adapter_metadata": text})
    with pytest.raises(ValueError, match=f"lora_adapter_metadata in .* {message}"):
      read_lora(file, config)
  # Settings of another network of the pipeline are not the transformer's.
  text = json.dumps({"text_encoder.lora_alpha": 90, "text_encoder.bias": "all"})
  save_file(load_file(file), file, metadata={"lora_adapter_metadata": text})
  read_lora(file, config)


def test_our_network_draws_what_peft_draws_from_our_adapter(tmp_path):
  config, params = random_model()
  spec = lora(EVERYTHING, dora=True)
  adapter = random_adapter(spec, params)
  write_lora(tmp_path / "adapter", config, adapter, spec)
  model = peft.PeftModel.from_pretrained(theirs(config, params), tmp_path / "adapter")
  merged = spec.merged(params, adapter)
  ours = verify.run_ours(config, merged, verify.fixed_inputs(config))["output"]
  assert distance(output_of(model, config), ours) < TOLERANCE


def test_a_layer_that_an_adapter_does_not_name_stays_to_the_bit(tmp_path):
  config, params = random_model()
  settings = peft.LoraConfig(
    r=2, target_modules=["transformer_blocks.1.attn1.to_k"], use_dora=True
  )
  model = peft.get_peft_model(theirs(config, params), settings)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if "lora_" in name:
        parameter.copy_(torch.randn_like(parameter))
  model.save_pretrained(tmp_path)
  _, after = merge_lora(config, params, adapter=read_lora(tmp_path, config))
  before, after = (
    p["blocks_00_01"]["attention"]["qkv"]["kernel"] for p in (params, after)
  )
  changed = np.any(np.asarray(before) != np.asarray(after), axis=(2, 3))
  assert changed.tolist() == [[False, False, False], [False, True, False]]


def test_names_are_those_that_loaders_ask_for(tmp_path):
  config, params = random_model()
  spec = lora()
  write_lora(tmp_path / "a", config, random_adapter(spec, params), spec)
  settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
  assert (settings["r"], settings["lora_alpha"]) == (4, 6.0)
  modules = {
    f"transformer_blocks.{i}.{name}"
    for i in range(config.depth)
    for name in (
      *(f"attn1.to_{x}" for x in ("q", "k", "v", "out.0")),
      *(f"attn2.to_{x}" for x in ("q", "k", "v", "out.0")),
      *("ff.net.0.proj", "ff.net.2"),
    )
  }
  assert set(settings["target_modules"]) == modules
  for file, prefix in (
    ("adapter_model.safetensors", "base_model.model"),
    ("pytorch_lora_weights.safetensors", "transformer"),
  ):
    assert set(load_file(tmp_path / "a" / file)) == {
      f"{prefix}.{module}.lora_{x}.weight" for module in modules for x in "AB"
    }


def test_the_adapter_of_a_full_size_model_has_the_modules_of_diffusers(tmp_path):
  config = PixArtConfig.from_variant("XL/2", base_size=32, pe_interpolation=1.0)
  spec = lora(rank=16)
  adapter = jax.eval_shape(spec.init, abstract_params(config), jax.random.key(0))
  # Of each block: eight maps of 1152 to 1152, and two between 1152 and 4608.
  assert tree.size(adapter) == 28 * 16 * (8 * 2 * 1152 + 2 * (1152 + 4608))
  assert tree.size(adapter) == 13_418_496
  everything = lora(EVERYTHING, rank=16)
  adapter = jax.eval_shape(everything.init, abstract_params(config), jax.random.key(0))
  with torch.device("meta"):
    peer = diffusers.PixArtTransformer2DModel.from_config(diffusers_config(config))
    settings = peft.LoraConfig(r=16, target_modules=OFFICIAL_TARGETS)
    peer = peft.get_peft_model(peer, settings)
  assert tree.size(adapter) == sum(
    parameter.numel() for name, parameter in peer.named_parameters() if "lora_" in name
  )


def test_a_folder_is_whole_or_not_there_and_what_is_there_stays(tmp_path, monkeypatch):
  config, params = random_model()
  spec = lora(("qkv",))
  first, second = (random_adapter(spec, params, seed) for seed in (0, 1))
  folder = tmp_path / "adapters" / "7"

  def full(*_, **__):
    raise OSError("No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr("pixsigma_jax.convert.files.write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
      write_lora(folder, config, first, spec)
  assert list(folder.parent.iterdir()) == []
  write_lora(folder, config, first, spec)
  before = {path.name: path.read_bytes() for path in folder.iterdir()}
  write_lora(folder, config, second, spec)
  assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def saved(tmp_path, edit, config_fields=()):
  """An adapter of ours with another set of tensors, or other settings."""
  config, params = random_model()
  spec = lora(("attention/qkv",))
  folder = tmp_path / "adapter"
  write_lora(folder, config, random_adapter(spec, params), spec)
  weights = load_file(folder / "adapter_model.safetensors")
  edit(weights)
  save_file(weights, folder / "adapter_model.safetensors")
  settings = json.loads((folder / "adapter_config.json").read_text())
  settings |= dict(config_fields)
  (folder / "adapter_config.json").write_text(json.dumps(settings))
  return folder, config


QUERY = "base_model.model.transformer_blocks.0.attn1.to_q.lora_A.weight"


@pytest.mark.parametrize(
  ("edit", "message"),
  [
    (lambda w: w.update({"text_model.q.lora_A.weight": w[QUERY]}), "text_model.* not"),
    (
      lambda w: w.update({QUERY.replace("blocks.0", "blocks.9"): w[QUERY]}),
      r"blocks\.9\.attn1\.to_q\.lora_A\.weight is not used",
    ),
    (
      lambda w: w.update({QUERY.replace("lora_A.weight", "lora_B.bias"): w[QUERY]}),
      r"to_q\.lora_B\.bias is not used",
    ),
    (lambda w: w.pop(QUERY), r"blocks\.0\.attn1\.to_q: lora_A\.weight is missing"),
    (
      lambda w: w.update({QUERY: w[QUERY][:, :-1].copy()}),
      r"to_q: down has shape \[4, 47\], not \[4, 48\]",
    ),
    (lambda w: [w.pop(name) for name in list(w)], "holds no tensors"),
  ],
)
def test_every_tensor_is_used_or_named(edit, message, tmp_path):
  folder, config = saved(tmp_path, edit)
  with pytest.raises(ValueError, match=message):
    read_lora(folder, config)


MORE_THAN_A_LORA = [
  *({"bias": "all"}, {"bias": "lora_only"}, {"modules_to_save": ["proj_out"]}),
  *({"fan_in_fan_out": True}, {"lora_bias": True}, {"use_qalora": True}),
  *({"layer_replication": [[0, 2]]}, {"target_parameters": ["scale_shift_table"]}),
  *({"trainable_token_indices": [0]}, {"alora_invocation_tokens": [5, 6]}),
  *({"use_bdlora": {"nblocks": 1}}, {"arrow_config": {"top_k": 3}}),
  *({"kasa_config": {"beta": 1e-4}}, {"megatron_config": {"a": 1}}),
  {"a_setting_of_tomorrow": "other"},
]


@pytest.mark.parametrize("fields", MORE_THAN_A_LORA, ids=str)
def test_an_adapter_that_is_more_than_a_lora_is_refused(fields, tmp_path):
  folder, config = saved(tmp_path, lambda _: None, fields)
  ((name, value),) = fields.items()
  message = re.escape(f"made with {name}={value!r}, by which it may be more")
  with pytest.raises(ValueError, match=f"{re.escape(str(folder))} .* {message}"):
    read_lora(folder, config)


@pytest.mark.parametrize("off", [None, False, [], {}, "", {"fast": False}], ids=str)
def test_a_setting_of_tomorrow_that_is_off_is_no_matter(off, tmp_path):
  folder, config = saved(tmp_path, lambda _: None, {"a_setting_of_tomorrow": off})
  read_lora(folder, config)


def test_every_setting_of_the_peft_at_hand_is_fine_at_its_default(tmp_path):
  defaults = peft.LoraConfig(r=4, lora_alpha=6).to_dict()
  defaults |= {"peft_type": "LORA", "target_modules": ["to_q", "to_k", "to_v"]}
  folder, config = saved(tmp_path, lambda _: None, defaults)
  read_lora(folder, config)


STARTS = ["corda", "loftq", "lora_ga", "mica", "PiSSA", "one_of_tomorrow", 3]


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"peft_type": "LOHA"}, "of the kind 'LOHA', not LORA"),
    *(
      ({"init_lora_weights": s}, f"init_lora_weights={s!r}, which takes")
      for s in STARTS
    ),
    ({"r": 8}, r"to_q: its tensors are of rank 4, and the settings say 8"),
    ({"rank_pattern": {"to_k": 2}}, "1.to_k: its tensors are of rank 4, .* say 2"),
    (
      {"use_dora": True},
      "to_q: it has no magnitude, and the settings say use_dora=True",
    ),
    ({"target_modules": ["to_q"]}, "to_k: the settings do not target it"),
    ({"target_modules": ".*to_q"}, "to_k: the settings do not target it"),
    ({"exclude_modules": ["to_k"]}, "to_k: the settings do not target it"),
    (
      {
        "target_modules": ["to_q", "to_k", "to_v"],
        "layers_to_transform": [0],
        "layers_pattern": "transformer_blocks",
      },
      r"blocks\.1\.attn1\.to_q: the settings do not target it",
    ),
    ({"lora_alpha": "six"}, "it has lora_alpha='six', which is no number"),
    ({"lora_alpha": None}, "it has lora_alpha=None, which is no number"),
    (
      {"alpha_pattern": {"to_q": None}},
      "alpha_pattern=.*'to_q': None.* gives no number",
    ),
    (
      {"alpha_pattern": {"to_(": 1}},
      r"alpha_pattern with 'to_\(', which is no regular",
    ),
    ({"target_modules": "to_("}, r"target_modules with 'to_\(', which is no regular"),
    ({"exclude_modules": [1]}, r"exclude_modules=\[1\], which names no modules"),
    (
      {"layers_to_transform": ["1"]},
      r"layers_to_transform=\['1'\], which are no layers",
    ),
  ],
)
def test_settings_that_the_tensors_contradict_are_refused(fields, message, tmp_path):
  folder, config = saved(tmp_path, lambda _: None, fields)
  with pytest.raises(ValueError, match=message):
    read_lora(folder, config)


def test_magnitudes_that_the_settings_deny_are_refused(tmp_path):
  config, params = random_model()
  spec = lora(("qkv",), dora=True)
  write_lora(tmp_path / "a", config, random_adapter(spec, params), spec)
  file = tmp_path / "a" / "adapter_config.json"
  file.write_text(json.dumps({**json.loads(file.read_text()), "use_dora": False}))
  with pytest.raises(
    ValueError, match="a magnitude, and the settings say use_dora=Fal"
  ):
    read_lora(tmp_path / "a", config)


def test_where_there_is_no_adapter_it_says_what_is_there(tmp_path):
  config, _ = random_model()
  with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "none"))):
    read_lora(tmp_path / "none", config)
  (tmp_path / "model.safetensors").write_bytes(b"")
  with pytest.raises(FileNotFoundError, match=r"found model\.safetensors"):
    read_lora(tmp_path, config)


def test_an_adapter_fits_a_model_with_the_same_layers_in_other_stacks(tmp_path):
  """Compression parts a stack; the names of diffusers do not know of it."""
  config, params = random_model()
  spec = lora()
  adapter = random_adapter(spec, params)
  write_lora(tmp_path / "a", config, adapter, spec)
  parted, _ = random_model(kv_compression=KVCompression(ratio=4, layers=(1,)))
  found = tree.named_leaves(read_lora(tmp_path / "a", parted))
  whole = tree.named_leaves(adapter)
  for layer, stack in enumerate(("blocks_00_00", "blocks_01_01")):
    have = found[f"{stack}/attention/qkv/down"]
    np.testing.assert_array_equal(
      have[0], whole["blocks_00_01/attention/qkv/down"][layer]
    )


@pytest.fixture
def convert_lora(capsys, monkeypatch):
  def run(source, target, from_format, to_format):
    return commands.run(
      *(capsys, monkeypatch, "convert", "--model=lora", source, target),
      *(f"--from={from_format}", f"--to={to_format}"),
    )

  return run


def test_a_lora_goes_to_kohyas_names_and_back_to_the_bit(convert_lora, tmp_path):
  """Of ranks and alphas that differ, the patches' convolution included."""
  config, params = random_model()
  settings = peft.LoraConfig(
    r=4,
    lora_alpha=6,
    target_modules=["to_q", "to_k", "proj", "linear_1"],
    rank_pattern={"to_k": 7, "attn2.to_q": 2},
    alpha_pattern={"attn1.to_k": 3},
  )
  trained_by_peft(settings, config, params).save_pretrained(tmp_path / "peft")
  ways = (("peft", "kohya"), ("kohya", "diffusers"), ("kohya", "peft"))
  paths = {"peft": tmp_path / "peft"}
  for start, end in ways:
    target = tmp_path / (f"{end}-again" if end == "peft" else f"{end}.safetensors")
    done = convert_lora(paths[start], target, start, end)
    assert done.code == 0, done.err
    paths[end] = target
  file = "adapter_model.safetensors"
  before, after = (load_file(tmp_path / f / file) for f in ("peft", "peft-again"))
  assert before.keys() == after.keys()
  for name, array in before.items():
    np.testing.assert_array_equal(after[name], array, err_msg=name)
  want = merged_by_peft(tmp_path / "peft", config, params)
  base = to_diffusers(config, params)
  assert_merged_alike(merged_by_peft(paths["peft"], config, params), want, base)
  for path in paths.values():
    assert_merged_alike(merged_by_us(path, config, params), want, base)
  # What whoever reads Kohya's names expects of them.
  flat = load_file(paths["kohya"])
  module = "lora_transformer_transformer_blocks_1_attn1_to_k"
  assert flat[f"{module}.lora_down.weight"].shape == (7, config.width)
  assert flat[f"{module}.lora_up.weight"].shape == (config.width, 7)
  assert flat[f"{module}.alpha"].shape == ()
  assert flat[f"{module}.alpha"] == 3


def test_conversions_of_a_lora_that_cannot_be_end_in_one_line(convert_lora, tmp_path):
  config, params = random_model()
  for name, dora in (("plain", False), ("dora", True)):
    spec = lora(("qkv",), dora=dora)
    write_lora(tmp_path / name, config, random_adapter(spec, params), spec)
  plain, new = tmp_path / "plain", tmp_path / "new.safetensors"
  (tmp_path / "there.safetensors").write_text("mine")
  for source, target, start, end, message in (
    (
      plain,
      new,
      "kohya",
      "diffusers",
      "has the names of peft, not of kohya: give --from",
    ),
    (plain, tmp_path / "new", "peft", "kohya", "must end in .safetensors"),
    (plain, tmp_path / "there.safetensors", "peft", "kohya", "exists already"),
    (tmp_path / "dora", new, "peft", "kohya", "has a DoRA's magnitude, which programs"),
    (tmp_path / "none", new, "peft", "kohya", "There is no adapter at"),
  ):
    done = convert_lora(source, target, start, end)
    assert done.code == 1
    assert message in done.err.splitlines()[-1]
    assert not new.exists()
  assert (tmp_path / "there.safetensors").read_text() == "mine"
