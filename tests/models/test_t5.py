"""T5's encoder is transformers' in numbers, on any mesh; captions become its inputs.

The reference is `T5EncoderModel` with random weights, large enough that a fault shows.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh
from tokenizers import normalizers
from transformers.models.t5.modeling_t5 import T5Attention

from pixsigma_jax import sharding, tree
from pixsigma_jax.convert.t5 import load_text_encoder, load_tokenizer
from pixsigma_jax.models import t5
from pixsigma_jax.models.t5 import T5Config, abstract_t5_params
from tests.convert.published import VOCABULARY, write_t5, write_tokenizer

# The files google/t5-v1_1-*: width, layers, heads, features of a head, hidden units.
V1_1 = {
  "small": (512, 8, 6, 64, 1024),
  "base": (768, 12, 12, 64, 2048),
  "large": (1024, 24, 16, 64, 2816),
  "xl": (2048, 24, 32, 64, 5120),
  "xxl": (4096, 24, 64, 64, 10240),
}
# Beyond the distance from which all are one (128). Rows of all, of some and of one key.
LENGTH, COUNTS = 150, (150, 37, 1)


def config(size):
  names = ("width", "num_layers", "num_heads", "head_width", "hidden")
  return T5Config(**dict(zip(names, V1_1[size], strict=True)), vocabulary=32128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("t5")
  write_tokenizer(folder / "tokenizer")
  return folder


@pytest.fixture(scope="module")
def reference(folder):
  return write_t5(folder / "text_encoder")


@pytest.fixture(scope="module")
def load(folder, reference):
  def load(dtype=jnp.float32, mesh=None):
    return load_text_encoder(
      folder / "text_encoder", folder / "tokenizer", dtype=dtype, mesh=mesh
    )

  return load


@pytest.fixture(scope="module")
def encoder(load):
  return load()


@pytest.fixture(scope="module")
def inputs():
  ids = np.random.default_rng(0).integers(0, VOCABULARY, (len(COUNTS), LENGTH))
  mask = np.arange(LENGTH)[None] < np.array(COUNTS)[:, None]
  return ids.astype(np.int32), mask


def run(encoder, ids, mask):
  network = t5.T5Encoder(encoder.config, encoder.dtype)
  return np.asarray(jax.jit(network.apply)({"params": encoder.params}, ids, mask))


def run_reference(reference, ids, mask):
  with torch.no_grad():
    output = reference(
      input_ids=torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask)
    )
  return output.last_hidden_state.numpy()


def relative_rms(error, of):
  return np.sqrt(np.mean(error**2) / np.mean(of**2))


@pytest.mark.parametrize(
  ("size", "count"),
  [
    ("small", 35_332_800),
    ("base", 109_628_544),
    ("large", 341_231_104),
    ("xl", 1_223_527_424),
    ("xxl", 4_762_310_656),
  ],
)
def test_each_published_size_has_its_number_of_parameters(size, count):
  assert tree.size(abstract_t5_params(config(size))) == count


def test_distances_fall_into_the_buckets_of_transformers():
  steps = torch.arange(600)
  for num_buckets, max_distance in ((32, 128), (16, 40)):
    expected = T5Attention._relative_position_bucket(
      steps[None, :] - steps[:, None],
      num_buckets=num_buckets,
      max_distance=max_distance,
    )
    found = t5.relative_buckets(600, num_buckets, max_distance)
    np.testing.assert_array_equal(found, expected.numpy())


def test_it_is_transformers_encoder_for_captions_of_any_length(
  encoder, reference, inputs
):
  # Padding included: PixArt's null caption is made of it. Over two layers, float32
  # sums of other orders differ by 2e-5 where outputs are up to 5.
  expected = run_reference(reference, *inputs)
  np.testing.assert_allclose(run(encoder, *inputs), expected, rtol=0, atol=5e-5)


def test_in_bfloat16_it_stays_within_three_percent(load, reference, inputs):
  rounded = run(load(jnp.bfloat16), *inputs)
  assert rounded.dtype == np.float32
  expected = run_reference(reference, *inputs)
  error = relative_rms(rounded - expected, of=expected)
  # 8 bits of mantissa: half a percent a product, over a few products.
  assert 1e-3 < error < 0.03


def test_what_stands_behind_the_mask_does_not_reach_the_caption(encoder, inputs):
  ids, mask = inputs
  other = np.where(mask, ids, (ids + 1) % VOCABULARY)
  one, two = run(encoder, ids, mask), run(encoder, other, mask)
  np.testing.assert_array_equal(one[mask], two[mask])
  assert (one[~mask] != two[~mask]).any(axis=-1).all()


@pytest.mark.parametrize(
  "axes",
  [
    {"data": 1, "fsdp": 8, "context": 1},
    {"data": 2, "fsdp": 2, "context": 2},
  ],
)
def test_split_over_eight_devices_it_is_the_same(load, encoder, axes):
  split = load(mesh=sharding.make_mesh(**axes))
  kernel = split.params["layer_01"]["mlp"]["gate"]["kernel"]
  assert len(kernel.sharding.device_set) == 8
  assert kernel.addressable_shards[0].data.shape == (32, 64 // axes["fsdp"])
  prompts = ["a red fox", "", "two dogs, a cat and a small blue bird"]
  # Sums over devices are in another order: float32 rounding.
  np.testing.assert_allclose(
    split.encode(prompts, 24)[0], encoder.encode(prompts, 24)[0], rtol=0, atol=1e-5
  )


def test_no_large_parameter_of_xxl_is_whole_on_every_device():
  mesh = AbstractMesh((1, 8, 1), sharding.AXES)
  shapes = tree.named_leaves(abstract_t5_params(config("xxl")))
  places = tree.named_leaves(t5.t5_shardings(config("xxl"), mesh))
  parts = {name: places[name].shard_shape(leaf.shape) for name, leaf in shapes.items()}
  device = sum(np.prod(part) for part in parts.values())
  # An eighth, and the norms and the biases of positions, whole: 0.2 of 4762 million.
  assert 4_762_310_656 / 8 <= device < 4_762_310_656 / 8 + 250_000


def test_a_mesh_that_does_not_divide_the_network_is_refused():
  mesh = AbstractMesh((1, 3, 1), sharding.AXES)
  match = r"'embedding' of shape \(32128, 4096\) .* fsdp=3 does not divide 4096"
  with pytest.raises(ValueError, match=match):
    t5.t5_shardings(config("xxl"), mesh)


def test_captions_are_tokenized_and_padded_as_the_published_pipelines_do(
  encoder, reference
):
  prompts = ["a photo of a red fox in the snow", "", "1½ dogs!"]
  coded = encoder.tokenizer(
    prompts, padding="max_length", max_length=30, truncation=True, return_tensors="np"
  )
  ids, expected_mask = coded["input_ids"], coded["attention_mask"].astype(bool)
  embeddings, mask = encoder.encode(prompts, 30)
  np.testing.assert_array_equal(mask, expected_mask)
  assert mask.sum(axis=1).tolist() == [encoder.count(prompt) for prompt in prompts]
  assert embeddings.dtype == np.float32
  expected = run_reference(reference, ids, expected_mask)
  # As above: float32 sums of other orders.
  np.testing.assert_allclose(embeddings, expected, rtol=0, atol=5e-5)
  assert (np.abs(embeddings[~mask]).max(axis=-1) > 0.1).all()


def test_an_embedding_does_not_depend_on_its_company(encoder):
  prompts = [f"a {color} fox" for color in ("red", "green", "blue", "white")] * 5
  together, _ = encoder.encode(prompts, 8)
  for start, stop in ((0, 1), (3, 5), (17, 20)):
    alone, _ = encoder.encode(prompts[start:stop], 8)
    # Batches of other sizes may be summed in other orders.
    np.testing.assert_allclose(alone, together[start:stop], rtol=0, atol=1e-5)


def test_few_programs_are_compiled_for_many_numbers_of_prompts(encoder):
  before = t5._embed._cache_size()
  for count in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33):
    embeddings, mask = encoder.encode(["a cat"] * count, 5)
    assert (len(embeddings), len(mask)) == (count, count)
  assert t5._embed._cache_size() - before == 5  # 1, 2, 4, 8 and 16 rows


def test_no_prompts_are_no_embeddings(encoder):
  embeddings, mask = encoder.encode([], 7)
  assert (embeddings.shape, mask.shape) == ((0, 7, 32), (0, 7))


def test_a_caption_over_the_limit_is_refused_with_both_numbers(encoder):
  match = r"caption 'a red fox' has 4 tokens .* limit is 3: .* at its end would be"
  with pytest.raises(ValueError, match=match):
    encoder.encode(["a cat", "a red fox"], 3)


def test_a_caption_is_cut_where_a_truncating_tokenizer_cuts_it(encoder):
  prompt = "a red fox in the snow, and a yellow bird above it"
  kept, cut = encoder.truncated(prompt, 8)
  assert (kept, cut) == ("a red fox in the snow,", " and a yellow bird above it")
  ids = encoder.tokenizer(prompt, truncation=True, max_length=8)["input_ids"]
  assert encoder.tokenizer(kept)["input_ids"] == ids
  assert encoder.truncated(prompt, 100) == (prompt, "")


@pytest.fixture(scope="module")
def normalizing(encoder, folder):
  """With an encoder that takes characters apart, as the published ones do: ½ is 1⁄2."""
  tokenizer = load_tokenizer(folder / "tokenizer")
  tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
  return dataclasses.replace(encoder, tokenizer=tokenizer)


def test_a_caption_is_not_cut_inside_a_character(normalizing):
  assert normalizing.truncated("a cat ﬃ", 5) == ("a cat", " ﬃ")


@given(
  prompt=st.text("ab cat½ﬃ水ｆ.\n") | st.text(max_size=20), length=st.integers(1, 12)
)
def test_what_is_kept_of_any_caption_fits_and_nothing_is_lost(
  normalizing, prompt, length
):
  encoder = normalizing
  kept, cut = encoder.truncated(prompt, length)
  assert kept + cut == prompt
  assert encoder.count(kept) <= length
  assert bool(cut) == (encoder.count(prompt) > length)


def test_no_caption_fits_without_its_end_token(encoder):
  with pytest.raises(ValueError, match="0 is no limit"):
    encoder.truncated("a cat", 0)


def test_records_learn_the_encoders_name_and_width(encoder):
  assert (encoder.width, encoder.identity) == (32, {"name": "t5", "width": 32})
