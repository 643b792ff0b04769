"""T5's files: what is read, where it goes, and what is refused instead of guessed."""

import gc
import json
import shutil
import weakref
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import T5Config as PublishedConfig
from transformers import T5EncoderModel, T5ForConditionalGeneration

from pixsigma_jax import sharding, tree
from pixsigma_jax.convert.files import open_weights
from pixsigma_jax.convert.t5 import (
  load_text_encoder,
  load_tokenizer,
  t5_config_from,
  t5_from_weights,
  t5_names,
  t5_to_weights,
)
from pixsigma_jax.models.t5 import T5Config, abstract_t5_params
from tests.convert.published import VOCABULARY, write_t5, write_tokenizer

CONFIG = T5Config(
  width=32,
  num_layers=2,
  num_heads=8,
  head_width=6,
  hidden=64,
  vocabulary=VOCABULARY,
)
TIED = "encoder.embed_tokens.weight"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
  folder = tmp_path_factory.mktemp("published")
  write_t5(folder / "text_encoder")
  write_tokenizer(folder / "tokenizer")
  return folder


@pytest.fixture(scope="module")
def weights(published):
  return load_file(published / "text_encoder" / "model.safetensors")


@pytest.fixture
def copied(published, tmp_path):
  """A copy of both folders that a test may spoil."""
  return shutil.copytree(published, tmp_path / "model")


def convert(weights, dtype=jnp.float32, mesh=None):
  return t5_from_weights(weights, CONFIG, dtype=dtype, mesh=mesh)


def load(folder, dtype=jnp.float32):
  return load_text_encoder(folder / "text_encoder", folder / "tokenizer", dtype=dtype)


def edit(path, **fields):
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def assert_same(one, other):
  assert tree.differences(one, other) == []
  jax.tree.map(np.testing.assert_array_equal, one, other)


class Counted(Mapping):
  """Weights that are read one by one, and count how many of them are still in use."""

  def __init__(self, weights):
    self.weights = weights
    self.read = []
    self.alive = self.most_alive = 0

  def __getitem__(self, name):
    array = self.weights[name].copy()
    self.read.append(name)
    self.alive += 1
    self.most_alive = max(self.most_alive, self.alive)
    weakref.finalize(array, self.let_go)
    return array

  def let_go(self):
    self.alive -= 1

  def __contains__(self, name):
    return name in self.weights

  def __iter__(self):
    return iter(self.weights)

  def __len__(self):
    return len(self.weights)


def test_names_and_shapes_are_transformers_own(weights):
  names = t5_names(CONFIG)
  assert sorted(names.values()) == sorted(weights)
  params = abstract_t5_params(CONFIG)
  assert list(tree.named_leaves(params)) == sorted(names)
  wide = params["layer_00"]["mlp"]["gate"]["kernel"]
  name = names["layer_00/mlp/gate/kernel"]
  assert (wide.shape, weights[name].shape) == ((32, 64), (64, 32))


def test_there_and_back_is_equal_to_the_bit(weights):
  back = t5_to_weights(convert(weights), CONFIG)
  assert back.keys() == weights.keys()
  for name, array in weights.items():
    assert back[name].flags.c_contiguous
    assert (back[name].dtype, back[name].tobytes()) == (array.dtype, array.tobytes())


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_files_are_read_to_the_bit(weights, dtype):
  halves = {name: array.astype(dtype) for name, array in weights.items()}
  wide = {name: array.astype(np.float32) for name, array in halves.items()}
  assert_same(convert(halves), convert(wide))
  if dtype == ml_dtypes.bfloat16:
    back = t5_to_weights(convert(halves, jnp.bfloat16), CONFIG)
    assert all(back[n].tobytes() == a.tobytes() for n, a in halves.items())


def test_one_tensor_of_the_source_is_in_memory_at_a_time(weights):
  # The mesh with copies on several devices, the one device, and a second name.
  mesh = sharding.make_mesh(data=2, fsdp=2, context=2)
  twice = weights | {TIED: weights["shared.weight"]}
  for place, source in ((mesh, weights), (None, twice)):
    counted = Counted(source)
    gc.disable()  # it is not a matter of cycles found in time
    try:
      params = convert(counted, mesh=place)
    finally:
      gc.enable()
    assert counted.most_alive == 1
    assert counted.alive == 0
    assert set(counted.read) == set(source)
    assert jax.tree.all(jax.tree.map(lambda leaf: leaf.is_fully_addressable, params))


def test_each_tensor_goes_to_its_place_on_the_mesh(weights):
  mesh = sharding.make_mesh(data=1, fsdp=8, context=1)
  params = convert(weights, mesh=mesh)
  attention = params["layer_01"]["attention"]
  for leaf, part in (
    (attention["q"]["kernel"], (32, 6)),
    (attention["out"]["kernel"], (6, 32)),
    (params["embedding"], (VOCABULARY, 4)),
    (params["relative_bias"], (32, 8)),
  ):
    assert {shard.data.shape for shard in leaf.addressable_shards} == {part}
  assert_same(jax.device_get(params), jax.device_get(convert(weights)))


def test_shards_are_read_as_one_file_is(published, tmp_path, weights):
  write_t5(tmp_path, shards=3)
  assert len(list(tmp_path.glob("*.safetensors"))) == 3
  assert_same(convert(open_weights(tmp_path)), convert(weights))


def test_the_embeddings_may_have_their_other_name_or_both(weights):
  table = weights["shared.weight"]
  renamed = {n: a for n, a in weights.items() if n != "shared.weight"} | {TIED: table}
  expected = convert(weights)
  assert_same(convert(renamed), expected)
  assert_same(convert(weights | {TIED: table}), expected)
  with pytest.raises(ValueError, match=rf"shared.weight and {TIED} differ"):
    convert(weights | {TIED: table + 1})


def test_of_a_whole_t5_the_encoder_is_taken(weights):
  config = PublishedConfig(
    vocab_size=VOCABULARY,
    d_model=32,
    d_kv=6,
    d_ff=64,
    num_layers=2,
    num_heads=8,
    feed_forward_proj="gated-gelu",
  )
  whole = T5ForConditionalGeneration(config).state_dict()
  extra = {n: a.numpy() for n, a in whole.items() if n.startswith(("decoder", "lm_"))}
  assert len(extra) > 20
  counted = Counted(weights | extra)
  assert_same(convert(counted), convert(weights))
  assert not set(counted.read) & set(extra)


def test_tensors_that_are_missing_or_left_over_are_named(weights):
  name = "encoder.block.1.layer.0.SelfAttention.k.weight"
  fewer = {n: a for n, a in weights.items() if n != name}
  with pytest.raises(ValueError, match=rf"T5 .* of 2 layers: {name} is missing"):
    convert(fewer)
  more = weights | {"encoder.block.2.layer.0.layer_norm.weight": np.ones(32)}
  with pytest.raises(
    ValueError, match=r"block.2.layer.0.layer_norm.weight is not used"
  ):
    convert(more)


def test_a_tensor_of_another_shape_or_kind_is_named_with_both(weights):
  name = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
  with pytest.raises(ValueError, match=rf"{name} has shape \[32, 64\].*it \[64, 32\]"):
    convert(weights | {name: weights[name].T})
  with pytest.raises(ValueError, match=rf"{name} is int8: quantised"):
    convert(weights | {name: weights[name].astype(np.int8)})


# As google/t5-v1_1-xxl, google/flan-t5-xxl and PixArt's text_encoder/ have it.
XXL = {
  "architectures": ["T5ForConditionalGeneration"],
  "d_ff": 10240,
  "d_kv": 64,
  "d_model": 4096,
  "decoder_start_token_id": 0,
  "dropout_rate": 0.1,
  "eos_token_id": 1,
  "feed_forward_proj": "gated-gelu",
  "initializer_factor": 1.0,
  "is_encoder_decoder": True,
  "layer_norm_epsilon": 1e-06,
  "model_type": "t5",
  "num_decoder_layers": 24,
  "num_heads": 64,
  "num_layers": 24,
  "output_past": True,
  "pad_token_id": 0,
  "relative_attention_num_buckets": 32,
  "tie_word_embeddings": False,
  "vocab_size": 32128,
}


@pytest.mark.parametrize(
  "newer",
  [
    {},
    {"architectures": ["T5EncoderModel"], "dense_act_fn": "gelu_new"},
    {"is_gated_act": True, "relative_attention_max_distance": 128},
  ],
)
def test_xxl_is_read_from_every_kind_of_its_config(newer):
  expected = T5Config(
    width=4096,
    num_layers=24,
    num_heads=64,
    head_width=64,
    hidden=10240,
    vocabulary=32128,
  )
  assert t5_config_from(XXL | newer) == expected


@pytest.mark.parametrize(
  ("field", "value", "match"),
  [
    ("architectures", ["CLIPTextModel"], "of CLIPTextModel; a T5 encoder is one of"),
    ("model_type", "umt5", "model_type='umt5', where T5 v1.1 and Flan-T5 have 't5'"),
    ("feed_forward_proj", "relu", "feed_forward_proj='relu', where .* 'gated-gelu'"),
    ("feed_forward_proj", None, "feed_forward_proj=None"),
    ("dense_act_fn", "silu", "dense_act_fn='silu', where .* 'gelu_new'"),
    ("is_gated_act", False, "is_gated_act=False, where .* True"),
    ("layer_norm_epsilon", 1e-5, "layer_norm_epsilon=1e-05, where .* 1e-06"),
    ("quantization_config", {"load_in_8bit": True}, "quantization_config={'load_in"),
    ("d_kv", None, "every size as a whole number from 1 on, and has d_kv=None"),
    ("num_heads", "64", "has num_heads='64'"),
  ],
)
def test_the_config_of_another_network_is_refused_with_its_value(field, value, match):
  with pytest.raises(ValueError, match=match):
    t5_config_from(XXL | {field: value})


def test_a_config_that_does_not_say_its_feed_forward_layer_is_a_plain_t5():
  silent = {name: x for name, x in XXL.items() if name != "feed_forward_proj"}
  with pytest.raises(ValueError, match="feed_forward_proj='relu'"):
    t5_config_from(silent)


def test_what_transformers_loads_we_load(published, copied):
  encoder = load(copied, jnp.bfloat16)
  assert encoder.config == CONFIG
  assert encoder.params["embedding"].dtype == jnp.bfloat16
  back = T5EncoderModel.from_pretrained(published / "text_encoder")
  table = back.shared.weight.detach().numpy()
  np.testing.assert_array_equal(load(published).params["embedding"], table)


def test_bad_text_encoder_folders_are_refused_by_name(copied):
  with pytest.raises(ValueError, match=r"bfloat16 or float32, not in float16"):
    load(copied, jnp.float16)
  edit(copied / "text_encoder" / "config.json", model_type="mt5")
  with pytest.raises(ValueError, match=r"text encoder of .*text_encoder: .*='mt5'"):
    load(copied)
  (copied / "text_encoder" / "config.json").unlink()
  with pytest.raises(FileNotFoundError, match=r"no config.json in .*text_encoder"):
    load(copied)


def test_weights_and_config_of_different_models_are_refused(copied):
  edit(copied / "text_encoder" / "config.json", d_ff=128)
  with pytest.raises(ValueError, match=r"has shape .* are of different models"):
    load(copied)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(copied):
  edit(copied / "text_encoder" / "config.json", vocab_size=100)
  with pytest.raises(ValueError, match=r"ids up to \d+, and T5 only 100 embeddings"):
    load(copied)


def test_a_tokenizer_needs_a_folder_and_a_vocabulary(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"tokenizer at .*nowhere: no such"):
    load_tokenizer(tmp_path / "nowhere")
  write_tokenizer(tmp_path)
  (tmp_path / "tokenizer.json").unlink()
  # transformers would make a dummy of this.
  with pytest.raises(FileNotFoundError, match=r"expected tokenizer.json or spiece"):
    load_tokenizer(tmp_path)


def spoil(folder, edit_content):
  path = folder / "tokenizer.json"
  content = json.loads(path.read_text())
  edit_content(content)
  path.write_text(json.dumps(content))


def only_specials(content):
  """What transformers' silent dummy has."""
  content["model"]["vocab"] = content["model"]["vocab"][:4]


def swapped_specials(content):
  vocab = content["model"]["vocab"]
  vocab[0], vocab[1] = vocab[1], vocab[0]
  content["added_tokens"] = []


def a_letter_less(content):
  content["model"]["vocab"] = [x for x in content["model"]["vocab"] if x[0] != "q"]


def one_letter_for_all(content):
  content["model"]["vocab"] = [*content["model"]["vocab"][:4], ["a", -1.0]]
  letters = {"type": "Replace", "pattern": {"Regex": "[^ ]"}, "content": "a"}
  content["normalizer"] = letters


@pytest.mark.parametrize(
  ("damage", "match"),
  [
    (only_specials, r"\(4 tokens\) turns 'the quick .* into \[3, 2, 3, 2, .* missing"),
    (swapped_specials, r"pads with 1 and ends with 0; T5's pads with 0 and ends with"),
    (a_letter_less, r"turns 'the quick .* vocabulary is missing or damaged"),
    (one_letter_for_all, r"turns 'the quick .* into \[3, 4, 4, 4, 3, .* damaged"),
  ],
)
def test_a_tokenizer_that_does_not_work_is_refused(tmp_path, damage, match):
  write_tokenizer(tmp_path)
  # T5Tokenizer would put its own normalizer for that of tokenizer.json.
  edit(tmp_path / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
  assert len(load_tokenizer(tmp_path)) < VOCABULARY
  spoil(tmp_path, damage)
  with pytest.raises(ValueError, match=rf"tokenizer of {tmp_path}.*{match}"):
    load_tokenizer(tmp_path)


def test_a_tokenizer_that_is_not_t5s_is_refused(tmp_path):
  write_tokenizer(tmp_path)
  (tmp_path / "tokenizer_config.json").unlink()
  with pytest.raises(ValueError, match=r"pads with None .* lacks its tokenizer_config"):
    load_tokenizer(tmp_path)
  write_tokenizer(tmp_path)
  spoil(tmp_path, lambda content: content.update(post_processor=None))
  edit(tmp_path / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
  with pytest.raises(ValueError, match=r"ends a text with \d+, not with </s> \(1\)"):
    load_tokenizer(tmp_path)
  edit(tmp_path / "tokenizer_config.json", tokenizer_class="ByT5Tokenizer")
  with pytest.raises(ValueError, match=r"ByT5Tokenizer, .* SentencePiece vocabulary"):
    load_tokenizer(tmp_path)


def test_damaged_tokenizer_files_are_refused_by_name(tmp_path):
  write_tokenizer(tmp_path)
  path = tmp_path / "tokenizer.json"
  path.write_text(path.read_text()[:1000])
  with pytest.raises(ValueError, match=rf"Could not read the tokenizer of {tmp_path}"):
    load_tokenizer(tmp_path)
  path.rename(tmp_path / "spiece.model")
  with pytest.raises(ValueError, match=r"spiece.model is no SentencePiece model"):
    load_tokenizer(tmp_path)


def test_a_bad_tokenizer_is_found_before_the_weights_are_read(copied):
  save_file({"nothing": np.ones(1)}, copied / "text_encoder" / "model.safetensors")
  (copied / "tokenizer" / "tokenizer.json").unlink()
  with pytest.raises(FileNotFoundError, match=r"has no tokenizer"):
    load(copied)
