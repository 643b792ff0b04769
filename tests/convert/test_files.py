"""Files as others write them: names, wrappers, variants, shards, float8."""

import json
import pathlib
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from pixsigma_jax import tree
from pixsigma_jax.convert import files, model, t5, vae
from pixsigma_jax.convert.files import Network, open_weights, part_of
from pixsigma_jax.models.vae import VAEConfig
from tests import commands
from tests.convert.published import write_spiece, write_t5
from tests.convert.published_vae import CHANNELS, NORM_GROUPS, make_vae
from tests.convert.test_main import write_diffusers, write_official

GIVEN = model.Given(
  num_heads=4,
  base_size=4,
  pe_interpolation=2.0,
  caption_length=10,
  scaling_factor=0.13025,
)
DIFFUSERS = model.Given(caption_length=10, scaling_factor=0.13025)
VAE = VAEConfig(channels=CHANNELS, norm_groups=NORM_GROUPS)
NETWORK = Network(landmarks=("one",), prefixes=("vae.",))
SOME = {"one": np.arange(6, dtype=np.float32).reshape(2, 3), "two": np.ones(3, "f4")}


@pytest.fixture(scope="module")
def official(tmp_path_factory):
  """A .pth of the official trainer, and its tensors."""
  path = tmp_path_factory.mktemp("official") / "model.pth"
  return path, write_official(path)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
  """The root of a pipeline of diffusers."""
  root = tmp_path_factory.mktemp("pipeline")
  (root / "model_index.json").write_text('{"_class_name": "PixArtSigmaPipeline"}')
  write_diffusers(root / "transformer")
  make_vae().save_pretrained(root / "vae")
  write_t5(root / "text_encoder")
  write_spiece(root / "tokenizer")
  return root


def tensors(weights):
  return {name: torch.tensor(array) for name, array in weights.items()}


def assert_same(one, other):
  assert tree.differences(one, other) == []
  for name, leaf in tree.named_leaves(one).items():
    np.testing.assert_array_equal(leaf, tree.named_leaves(other)[name], name)


def assert_weights(found, expected):
  assert set(found) == set(expected)
  for name, array in expected.items():
    np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize(
  "prefix",
  [
    "module.",
    "model.",
    "base_model.",
    "base_model.model.",
    "_orig_mod.",
    "module._orig_mod.",
    "model.diffusion_model.",
    "diffusion_model.",
  ],
)
def test_a_transformer_is_read_under_any_wrappers_name(official, tmp_path, prefix):
  path, weights = official
  wrapped = {f"{prefix}{name}": array for name, array in weights.items()}
  torch.save(tensors(wrapped), tmp_path / "wrapped.pth")
  found = model.read(tmp_path / "wrapped.pth", "pixart", GIVEN)
  expected = model.read(path, "pixart", GIVEN)
  assert found.config == expected.config
  assert_same(found.params, expected.params)
  np.testing.assert_array_equal(found.null_caption, expected.null_caption)


def test_what_lies_beside_a_wrapper_is_not_forgotten(official, tmp_path):
  _, weights = official
  wrapped = {f"module.{name}": array for name, array in weights.items()}
  counted = wrapped | {"n_averaged": np.asarray(3)}  # torch's AveragedModel
  torch.save(tensors(counted), tmp_path / "model.pth")
  model.read(tmp_path / "model.pth", "pixart", GIVEN)
  more = wrapped | {"controlnet.0.weight": np.ones(3, "f4")}
  torch.save(tensors(more), tmp_path / "model.pth")
  with pytest.raises(ValueError, match=r"controlnet\.0\.weight is not used"):
    model.read(tmp_path / "model.pth", "pixart", GIVEN)
  twice = wrapped | {f"model.{name}": array for name, array in weights.items()}
  torch.save(tensors(twice), tmp_path / "model.pth")
  with pytest.raises(ValueError, match=r"network 2 times, under 'mod\w+\.', 'mod"):
    model.read(tmp_path / "model.pth", "pixart", GIVEN)


@pytest.mark.parametrize(
  ("raw", "ema"),
  [("state_dict", "state_dict_ema"), ("model", "ema"), ("module", "ema")],
)
def test_a_checkpoint_with_both_states_gives_the_one_that_is_asked(tmp_path, raw, ema):
  other = {name: array + 1 for name, array in SOME.items()}
  path = tmp_path / "model.pt"
  torch.save({raw: tensors(SOME), ema: tensors(other), "epoch": 3}, path)
  assert_weights(open_weights(path), SOME)
  assert_weights(open_weights(path, "ema"), other)
  torch.save({ema: tensors(other)}, path)
  with pytest.raises(ValueError, match=rf"only {ema}: give --ema"):
    open_weights(path)
  torch.save({raw: tensors(SOME)}, path)
  with pytest.raises(ValueError, match=rf"only {raw}: leave out --ema"):
    open_weights(path, "ema")


def test_one_file_with_a_whole_pipeline_gives_each_network(
  official, pipeline, tmp_path, caplog
):
  caplog.set_level("INFO", logger="absl")
  path, weights = official
  t5_weights = load_file(pipeline / "text_encoder" / "model.safetensors")
  ldm = vae.vae_to_weights(
    vae.load_autoencoder(pipeline / "vae", dtype="float32").params, VAE, "ldm"
  )
  parts = {
    "model.diffusion_model.": weights,
    "text_encoders.t5xxl.transformer.": t5_weights,
    "vae.": ldm,
  }
  whole = {
    f"{prefix}{name}": np.ascontiguousarray(array)
    for prefix, part in parts.items()
    for name, array in part.items()
  }
  file = tmp_path / "all_in_one.safetensors"
  save_file(whole, file)

  found = model.read(file, "pixart", GIVEN)
  assert_same(found.params, model.read(path, "pixart", GIVEN).params)
  assert f"left out: {len(t5_weights)} of text_encoders, {len(ldm)} of vae" in (
    caplog.text
  )
  encoder = t5.load_text_encoder(file, pipeline / "tokenizer", dtype="float32")
  expected = t5.load_text_encoder(
    pipeline / "text_encoder", pipeline / "tokenizer", dtype="float32"
  )
  assert encoder.config == expected.config
  assert_same(encoder.params, expected.params)
  for prefix in ("vae.", "first_stage_model."):
    renamed = {n.replace("vae.", prefix): array for n, array in whole.items()}
    read = vae.vae_from_weights(renamed, VAE)
    assert_same(read, vae.vae_from_weights(ldm, VAE))


def test_the_discriminator_of_an_autoencoder_is_left_out(pipeline):
  weights = load_file(pipeline / "vae" / "diffusion_pytorch_model.safetensors")
  trained = weights | {"loss.discriminator.main.0.weight": np.ones(3, "f4")}
  assert_same(vae.vae_from_weights(trained, VAE), vae.vae_from_weights(weights, VAE))


def test_a_pipelines_root_stands_for_the_part_that_is_asked(pipeline, tmp_path):
  root, part = (
    model.read(p, "diffusers", DIFFUSERS) for p in (pipeline, pipeline / "transformer")
  )
  assert_same(root.params, part.params)
  one, other = (
    vae.load_autoencoder(path, dtype="float32") for path in (pipeline, pipeline / "vae")
  )
  assert_same(one.params, other.params)
  encoder = t5.load_text_encoder(pipeline, pipeline / "tokenizer", dtype="float32")
  assert encoder.config.num_layers == 2
  t5.convert_text_encoder(
    pipeline, tmp_path / "t5", from_format="diffusers", to_format="orbax"
  )
  (tmp_path / "model_index.json").write_text("{}")
  with pytest.raises(FileNotFoundError, match=r"without transformer/: it has t5"):
    model.read(tmp_path, "diffusers", DIFFUSERS)


def halves(weights):
  return {name: array.astype(np.float16) for name, array in weights.items()}


@pytest.mark.parametrize(
  ("stem", "ending"),
  [
    ("diffusion_pytorch_model", "safetensors"),
    ("model", "safetensors"),
    ("diffusion_pytorch_model", "bin"),
    ("pytorch_model", "bin"),
  ],
)
@pytest.mark.parametrize("variant", ["", "fp16"])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_folder_is_read_by_every_name_that_its_weights_have(
  tmp_path, stem, ending, variant, shards
):
  def save(weights, path):
    if ending == "bin":
      torch.save(tensors(weights), path)
    else:
      save_file(weights, path)

  dotted = f".{variant}" if variant else ""
  if shards == 1:
    save(SOME, tmp_path / f"{stem}{dotted}.{ending}")
  else:
    weight_map = {}
    for number, name in enumerate(SOME, 1):
      file = f"{stem}{dotted}-{number:05d}-of-00002.{ending}"
      save({name: SOME[name]}, tmp_path / file)
      weight_map[name] = file
    index = tmp_path / f"{stem}.{ending}.index{dotted}.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
  assert_weights(open_weights(tmp_path), SOME)
  if variant:
    assert_weights(open_weights(tmp_path, variant=variant), SOME)
    save_file(halves(SOME), tmp_path / "model.safetensors")
    assert open_weights(tmp_path)["one"].dtype == np.float16  # without a variant
    assert open_weights(tmp_path, variant=variant)["one"].dtype == np.float32
  with pytest.raises(FileNotFoundError, match="no weights of the variant 'bf16', only"):
    open_weights(tmp_path, variant="bf16")


def test_safetensors_are_taken_before_pickles(tmp_path):
  (tmp_path / "pytorch_model.bin").write_bytes(b"not even read")
  save_file(SOME, tmp_path / "model.safetensors")
  assert_weights(open_weights(tmp_path), SOME)


def test_several_variants_are_refused_until_one_is_chosen(tmp_path):
  for variant in ("fp16", "non_ema"):
    save_file(SOME, tmp_path / f"diffusion_pytorch_model.{variant}.safetensors")
  with pytest.raises(ValueError, match=r"as fp16, non_ema, .* say with --variant of c"):
    open_weights(tmp_path)
  assert_weights(open_weights(tmp_path, variant="non_ema"), SOME)
  with pytest.raises(ValueError, match=r"is one file: leave out --variant=fp16"):
    open_weights(tmp_path / "diffusion_pytorch_model.fp16.safetensors", variant="fp16")


def test_a_shard_that_is_missing_or_short_is_named(tmp_path):
  torch.save(tensors({"one": SOME["one"]}), tmp_path / "a.bin")
  index = tmp_path / "pytorch_model.bin.index.json"
  index.write_text(json.dumps({"weight_map": {"one": "a.bin", "two": "a.bin"}}))
  with pytest.raises(ValueError, match=r"a\.bin lacks tensors that .* promises: two"):
    open_weights(tmp_path)
  index.write_text(json.dumps({"weight_map": {"one": "a.bin", "two": "b.bin"}}))
  with pytest.raises(FileNotFoundError, match=r"names b\.bin, which is missing"):
    open_weights(tmp_path)


def test_the_command_chooses_a_variant_and_takes_the_root(
  pipeline, tmp_path, capsys, monkeypatch
):
  root = shutil.copytree(pipeline, tmp_path / "root")
  plain = root / "vae" / "diffusion_pytorch_model.safetensors"
  weights = load_file(plain)
  for variant in ("fp16", "bf16"):
    dtype = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}[variant]
    cast = {name: array.astype(dtype) for name, array in weights.items()}
    save_file(cast, plain.with_name(f"diffusion_pytorch_model.{variant}.safetensors"))
  plain.unlink()

  def convert(*arguments):
    return commands.run(
      *(capsys, monkeypatch, "convert", "--model=vae", "--from=diffusers"),
      *("--to=ldm", root, tmp_path / "out.safetensors", *arguments),
    )

  done = convert()
  assert (done.code, "--variant" in done.err) == (1, True)
  assert convert("--variant=bf16").code == 0
  found = load_file(tmp_path / "out.safetensors")["decoder.conv_in.weight"]
  expected = weights["decoder.conv_in.weight"].astype(ml_dtypes.bfloat16)
  np.testing.assert_array_equal(found, expected.astype(np.float32))


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_float8_without_factors_is_read_as_the_numbers_that_it_is(
  tmp_path, kind, ending
):
  numbers = torch.linspace(-3, 3, 24).reshape(4, 6).to(kind)
  path = tmp_path / f"model.{ending}"
  if ending == "pth":
    torch.save({"one": numbers}, path)
  else:
    save_torch({"first": torch.ones(3), "one": numbers}, path)
  found = open_weights(path)["one"]
  assert found.shape == (4, 6)
  np.testing.assert_array_equal(found.astype(np.float32), numbers.float().numpy())


@pytest.mark.parametrize(
  "factor",
  ["scaled_fp8", "one.scale_weight", "one.weight_scale", "one.scale_input", "one.SCB"],
)
def test_weights_that_need_a_factor_are_refused_in_words(tmp_path, factor):
  path = tmp_path / "model.safetensors"
  save_torch(
    {"one.weight": torch.ones(4).to(torch.float8_e4m3fn), factor: torch.ones(1)}, path
  )
  with pytest.raises(
    ValueError, match=rf"quantised: .*\({factor}\).* take the file in"
  ):
    part_of(open_weights(path), NETWORK, path)


def test_factors_of_one_network_do_not_stand_in_anothers_way(tmp_path):
  path = tmp_path / "model.safetensors"
  save_file({"vae.one": SOME["one"], "t5.scaled_fp8": SOME["two"]}, path)
  assert_weights(part_of(open_weights(path), NETWORK, path), {"one": SOME["one"]})


def test_types_that_nobody_can_read_are_refused_in_words(tmp_path):
  path = tmp_path / "model.safetensors"
  header = {
    "first": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    "one": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [4, 8]},
  }
  text = json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
  with pytest.raises(ValueError, match="one is of the type F8_E8M0, which cannot be"):
    open_weights(path)["one"]


def test_a_pickles_tensors_are_their_numbers_however_torch_holds_them(tmp_path):
  matrix = torch.arange(12.0).reshape(3, 4) - 5
  held = {
    "transposed": matrix.t(),
    "a column": matrix[:, 1],
    "expanded": matrix[:1].expand(3, 4),
    "empty": matrix[:0],
    "tied": matrix,
    "tied too": matrix,
    "trained": torch.nn.Parameter(matrix.clone()),
    "halves": matrix.half().t(),
    "a counter": torch.tensor(7),
    "sparse": matrix.to_sparse(),
    "negated": torch.complex(matrix, matrix).conj().imag,
    "conjugated": torch.complex(matrix, matrix).conj(),
  }
  torch.save(held, tmp_path / "a.pth")
  found = open_weights(tmp_path / "a.pth")
  assert set(found) == set(held)
  for name, tensor in held.items():
    want = tensor.detach().to_dense().resolve_conj().resolve_neg()
    assert found[name].dtype == want.numpy().dtype
    assert found[name].tolist() == want.tolist(), name


def test_tensors_that_were_saved_without_their_numbers_are_named(tmp_path):
  held = {"first": torch.zeros(3), "one": torch.zeros(3, device="meta")}
  torch.save(held, tmp_path / "a.pth")
  with pytest.raises(ValueError, match="one has a shape and no numbers"):
    open_weights(tmp_path / "a.pth")["one"]


def test_integers_are_not_taken_for_a_transformers_weights(official, tmp_path):
  _, weights = official
  name = "blocks.0.attn.qkv.weight"
  torch.save(
    tensors(weights | {name: weights[name].astype(np.int8)}), tmp_path / "a.pt"
  )
  with pytest.raises(ValueError, match=rf"{name} is int8, which is quantised"):
    model.read(tmp_path / "a.pt", "pixart", GIVEN)


def test_a_t5_in_one_file_converts_both_ways(pipeline, tmp_path, capsys, monkeypatch):
  weights = load_file(pipeline / "text_encoder" / "model.safetensors")
  file = tmp_path / "t5xxl_fp16.safetensors"
  save_file(halves(weights), file)

  def convert(*arguments):
    done = commands.run(capsys, monkeypatch, "convert", "--model=t5", *arguments)
    assert done.code == 0, done.err

  convert("--from=comfyui", "--to=diffusers", file, tmp_path / "folder")
  found = load_file(tmp_path / "folder" / "model.safetensors")
  assert_weights(found, halves(weights))
  assert {array.dtype for array in found.values()} == {np.dtype(np.float16)}
  from transformers import T5EncoderModel

  theirs = T5EncoderModel.from_pretrained(tmp_path / "folder", dtype="float32")
  original = T5EncoderModel.from_pretrained(pipeline / "text_encoder")
  ids = torch.arange(3, 9)[None]
  with torch.no_grad():
    gap = theirs(ids).last_hidden_state - original(ids).last_hidden_state
  assert gap.abs().max() < 0.02  # half precision's, in weights of up to 3
  convert(
    "--from=diffusers", "--to=comfyui", tmp_path / "folder", tmp_path / "b.safetensors"
  )
  assert_weights(load_file(tmp_path / "b.safetensors"), halves(weights))


def test_a_t5_file_lies_alone_in_its_folder_under_a_name_of_its_own(pipeline, tmp_path):
  weights = load_file(pipeline / "text_encoder" / "model.safetensors")
  save_file(weights, tmp_path / "t5xxl_fp32.safetensors")
  tokenizer = pipeline / "tokenizer"
  encoder = t5.load_text_encoder(tmp_path, tokenizer, dtype="float32")
  assert encoder.config == t5.text_encoder_config(pipeline / "text_encoder")
  # Under transformers' own name it is a folder that lacks its config.json.
  (tmp_path / "t5xxl_fp32.safetensors").rename(tmp_path / "model.safetensors")
  with pytest.raises(FileNotFoundError, match=r"no config\.json"):
    t5.load_text_encoder(tmp_path, tokenizer, dtype="float32")


def test_a_file_of_float8_becomes_bfloat16_with_the_same_numbers(pipeline, tmp_path):
  weights = load_file(pipeline / "text_encoder" / "model.safetensors")
  small = {n: torch.tensor(a).to(torch.float8_e4m3fn) for n, a in weights.items()}
  save_torch(small, tmp_path / "t5xxl_fp8_e4m3fn.safetensors")
  t5.convert_text_encoder(
    *(tmp_path / "t5xxl_fp8_e4m3fn.safetensors", tmp_path / "folder"),
    from_format="comfyui",
    to_format="diffusers",
  )
  found = load_file(tmp_path / "folder" / "model.safetensors")
  for name, array in small.items():
    assert found[name].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found[name].astype("f4"), array.float().numpy())


def test_the_file_of_another_t5_is_refused(pipeline, tmp_path):
  weights = load_file(pipeline / "text_encoder" / "model.safetensors")
  file = tmp_path / "t5.safetensors"
  # mT5 is T5 with a vocabulary seven times as large.
  save_file(weights | {"shared.weight": np.zeros((1000, 32), np.float32)}, file)
  with pytest.raises(ValueError, match="and this T5 1000 embeddings: they are of diff"):
    t5.load_text_encoder(file, pipeline / "tokenizer", dtype="float32")
  old = {n: a for n, a in weights.items() if "wi_0" not in n}
  save_file(old, file)
  with pytest.raises(ValueError, match=r"wi_0\.weight is missing .*no.* T5 v1\.1"):
    t5.load_text_encoder(file, pipeline / "tokenizer", dtype="float32")


def test_an_autoencoder_in_one_file_needs_its_scaling_factor(tmp_path):
  file = tmp_path / "sdxl_vae.safetensors"
  save_file({"nothing": np.ones(1, "f4")}, file)
  with pytest.raises(ValueError, match=r"scaling_factor=0\.18215 if this is Stable"):
    vae.load_autoencoder(tmp_path, dtype="float32")
  with pytest.raises(ValueError, match="not the weights of an autoencoder"):
    vae.load_autoencoder(file, dtype="float32", scaling_factor=0.13025)


def test_a_pickle_with_more_than_tensors_can_be_saved_as_the_message_says(tmp_path):
  path, clean = tmp_path / "model.pth", tmp_path / "clean.pth"
  torch.save({"state_dict": tensors(SOME), "args": pathlib.PurePosixPath("a")}, path)
  with pytest.raises(ValueError, match="it holds more than tensors") as error:
    open_weights(path)
  assert "load it in torch yourself and save its state dict alone" in str(error.value)
  for theirs in ("weights_only", "arbitrary code", "safe_globals"):
    assert theirs not in str(error.value)
  program = (
    "import sys, torch; "
    "torch.save(torch.load(sys.argv[1], weights_only=False)['state_dict'], sys.argv[2])"
  )
  subprocess.run([sys.executable, "-c", program, path, clean], check=True)
  assert_weights(open_weights(clean), SOME)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"<html>"])
def test_a_file_that_is_none_of_torchs_is_said_to_be_that(tmp_path, content):
  path = tmp_path / "model.pth"
  path.write_bytes(content)
  with pytest.raises(ValueError, match="truncated or none of torch's: fetch") as error:
    open_weights(path)
  assert len(str(error.value)) < 400
  assert "weights_only" not in str(error.value)


def test_a_file_with_many_names_is_refused_in_few_words(tmp_path):
  many = {f"layer.{i}.weight": 1 for i in range(60_000)}
  torch.save(many, tmp_path / "model.pth")
  with pytest.raises(ValueError, match="and 59,996 more") as error:
    open_weights(tmp_path / "model.pth")
  assert len(str(error.value)) < 400


def test_what_lies_there_is_listed_in_few_words(tmp_path):
  for i in range(100):
    (tmp_path / f"{i}.txt").touch()
  with pytest.raises(FileNotFoundError, match=r"has no weights: .* and 94 more"):
    files.open_weights(tmp_path)
