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
from tests.convert.test_pixart import random_model
from tests.train import runs

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


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
  with runs.quick_compilation():
    yield


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


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"peft_type": "LOHA"}, "of the kind 'LOHA', not LORA"),
    ({"bias": "all"}, "made with bias='all'"),
    ({"modules_to_save": ["proj_out"]}, r"made with modules_to_save=\['proj_out'\]"),
  ],
)
def test_an_adapter_that_is_more_than_a_lora_is_refused(fields, message, tmp_path):
  folder, config = saved(tmp_path, lambda _: None, fields)
  with pytest.raises(ValueError, match=message):
    read_lora(folder, config)


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
