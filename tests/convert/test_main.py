"""`python -m pixsigma_jax.convert`: whole models from format to format."""

import json
import pathlib
import pickle
import re

import diffusers
import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from pixsigma_jax import checkpoint
from pixsigma_jax.convert import files
from pixsigma_jax.metadata import Metadata
from pixsigma_jax.models.kv_compression import KVCompression
from tests import commands
from tests.convert.test_pixart import (
  assert_equal_trees,
  onetrainers_table,
  random_model,
)
from tests.models import reference
from tests.sample.models import metadata

COMPRESSED = {"kv_compression": KVCompression(ratio=4, layers=(1,))}
SIZES = ("--base_size=4", "--pe_interpolation=2", "--num_heads=4")
SIGMA = ("--caption_length=10", "--scaling_factor=0.13025")


@pytest.fixture
def convert(capsys, monkeypatch):
  return lambda *arguments: commands.run(capsys, monkeypatch, "convert", *arguments)


def write_official(path, case="ms_kv2", **entries):
  """A .pth as the official trainer writes it, with tiny weights."""
  _, arrays = reference.load(case)
  state = {
    k.removeprefix("w."): torch.tensor(v) for k, v in arrays.items() if k[:2] == "w."
  }
  torch.save({"state_dict": state, "epoch": 3, **entries}, path)
  return {name: tensor.numpy() for name, tensor in state.items()}


def write_snapshot(workdir, **fields):
  config, params = random_model(**fields)
  null_caption = np.ones((config.caption_length, config.caption_width), np.float32)
  about = metadata(config, provenance=({"stage": "first"},))
  checkpoint.save_snapshot(
    workdir, 7, params=params, null_caption=null_caption, metadata=about
  )
  return params, about


def diffusers_transformer(*, sample_size, interpolation_scale):
  """A transformer of diffusers with random weights."""
  torch.manual_seed(0)
  model = diffusers.PixArtTransformer2DModel(
    num_attention_heads=4,
    attention_head_dim=12,
    in_channels=4,
    out_channels=8,
    num_layers=2,
    cross_attention_dim=48,
    sample_size=sample_size,
    caption_channels=32,
    interpolation_scale=interpolation_scale,
    use_additional_conditions=False,
  )
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.copy_(0.1 * torch.randn_like(parameter))
  return model


def write_diffusers(folder, *, shards=False):
  """A transformer of diffusers, saved by diffusers."""
  model = diffusers_transformer(sample_size=8, interpolation_scale=2.0)
  model.save_pretrained(folder, max_shard_size="50KB" if shards else "10GB")
  return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("fields", [{}, COMPRESSED], ids=["plain", "compressed"])
@pytest.mark.parametrize("form", ["pixart", "diffusers"])
def test_a_snapshot_comes_back_from_either_format_with_all_that_it_says(
  convert, tmp_path, form, fields
):
  params, about = write_snapshot(tmp_path / "run", **fields)
  there = tmp_path / ("there.pth" if form == "pixart" else "there")
  done = convert("--from=orbax", f"--to={form}", tmp_path / "run", there, "--verify")
  assert done.code == 0, done.err
  assert "block 1" in done.out
  assert "The same network" in done.out

  done = convert(f"--from={form}", "--to=orbax", there, tmp_path / "back")
  assert done.code == 0, done.err
  snapshot = checkpoint.read_snapshot(tmp_path / "back")
  assert_equal_trees(jax.tree.map(np.asarray, snapshot.params), params)
  assert snapshot.metadata == Metadata.from_json(
    json.loads(json.dumps(about.to_json()))
  )
  # diffusers has no place for it; the sampler asks the text encoder again.
  assert (snapshot.null_caption is None) == (form == "diffusers")


def test_an_export_that_breaks_off_can_be_made_again(convert, tmp_path, monkeypatch):
  write_snapshot(tmp_path / "run")
  command = ("--from=orbax", "--to=diffusers", tmp_path / "run", tmp_path / "there")

  def full(*_, **__):
    raise OSError("No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr("pixsigma_jax.convert.files.write_json", full)
    assert "No space left" in convert(*command).err
  assert not (tmp_path / "there").exists()
  assert convert(*command).code == 0
  assert (tmp_path / "there" / "config.json").exists()
  assert "exists already" in convert(*command).err


@pytest.mark.parametrize("case", ["ms_kv2", "ms_qknorm", "ms_micro", "ms_plain"])
def test_the_network_of_the_official_file_is_ours(convert, tmp_path, case):
  weights = write_official(tmp_path / "model.pth", case)
  done = convert(
    *("--from=pixart", "--to=orbax", tmp_path / "model.pth", tmp_path / "run"),
    *("--num_heads=4", "--scaling_factor=0.13025", "--verify"),
  )
  assert done.code == 0, done.err
  snapshot = checkpoint.read_snapshot(tmp_path / "run")
  assert snapshot.metadata.autoencoder["name"] == "sdxl-vae"
  assert snapshot.metadata.resolution == 64
  np.testing.assert_array_equal(
    snapshot.null_caption, weights["y_embedder.y_embedding"]
  )


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_diffusers_own_folder_and_network_are_ours(convert, tmp_path, shards):
  weights = write_diffusers(tmp_path / "transformer", shards=shards)
  assert (len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1) == shards
  done = convert(
    *("--from=diffusers", "--to=orbax", tmp_path / "transformer", tmp_path / "run"),
    *(*SIGMA, "--verify"),
  )
  assert done.code == 0, done.err
  snapshot = checkpoint.read_snapshot(tmp_path / "run")
  assert snapshot.config.pe_interpolation == 2.0
  assert snapshot.config.base_size == 4

  done = convert("--from=orbax", "--to=diffusers", tmp_path / "run", tmp_path / "back")
  assert done.code == 0, done.err
  back = load_file(tmp_path / "back" / "diffusion_pytorch_model.safetensors")
  assert set(back) == set(weights)
  for name, array in weights.items():
    np.testing.assert_array_equal(back[name], array)
  model = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path / "back")
  assert model.config.interpolation_scale == 2.0


def test_the_null_caption_of_an_older_export_is_the_models(convert, tmp_path):
  weights = write_diffusers(tmp_path / "transformer")
  null_caption = np.arange(120 * 32, dtype=np.float32).reshape(120, 32)
  save_file(
    {**weights, "caption_projection.y_embedding": null_caption},
    tmp_path / "transformer" / "diffusion_pytorch_model.safetensors",
  )
  done = convert(
    *("--from=diffusers", "--to=orbax", tmp_path / "transformer", tmp_path / "run"),
    *("--scaling_factor=0.18215", "--verify"),
  )
  assert done.code == 0, done.err
  snapshot = checkpoint.read_snapshot(tmp_path / "run")
  assert snapshot.config.caption_length == 120
  np.testing.assert_array_equal(snapshot.null_caption, null_caption)


def test_a_file_of_onetrainer_is_what_is_said_of_it(convert, tmp_path):
  """It stores the positions of 1024 pixels at scale 1 beside any model's weights."""
  weights = {
    **write_official(tmp_path / "model.pth"),
    "pos_embed": onetrainers_table(48),
  }
  path = tmp_path / "model.safetensors"
  save_file(weights, path)
  about = ("--num_heads=4", "--scaling_factor=0.13025")
  arguments = ("--from=pixart", "--to=orbax", path, tmp_path / "run", *about)
  done = convert(*arguments)
  assert (done.code, "OneTrainer writes" in done.err) == (1, True)
  assert not (tmp_path / "run").exists()
  done = convert(*arguments, "--base_size=64", "--pe_interpolation=2")
  assert done.code == 0, done.err
  config = checkpoint.read_snapshot(tmp_path / "run").config
  assert (config.base_size, config.pe_interpolation) == (64, 2.0)


def test_a_stored_table_is_left_out_where_asked(convert, tmp_path):
  write_official(tmp_path / "model.pth")
  arguments = ("--from=pixart", "--to=orbax", tmp_path / "model.pth", tmp_path / "run")
  about = ("--num_heads=4", "--scaling_factor=0.13025")
  sizes = ("--base_size=64", "--pe_interpolation=2")
  done = convert(*arguments, *about, *sizes)
  assert (done.code, "leave it out with --nopos_embed" in done.err) == (1, True)
  done = convert(*arguments, *about, *sizes, "--nopos_embed")
  assert done.code == 0, done.err
  assert checkpoint.read_snapshot(tmp_path / "run").config.base_size == 64
  write_diffusers(tmp_path / "transformer")
  done = convert(
    *("--from=diffusers", "--to=orbax", tmp_path / "transformer", tmp_path / "x"),
    *(*SIGMA, "--nopos_embed"),
  )
  assert (done.code, "diffusers stores no pos_embed" in done.err) == (1, True)


def test_stock_diffusers_refuses_a_compressing_model_loudly(convert, tmp_path):
  write_snapshot(tmp_path / "run", **COMPRESSED)
  done = convert("--from=orbax", "--to=diffusers", tmp_path / "run", tmp_path / "there")
  assert done.code == 0, done.err
  with pytest.raises(Exception, match="PixArtKVCompressedTransformer2DModel"):
    diffusers.AutoModel.from_pretrained(tmp_path / "there")
  with pytest.raises(ValueError, match="scale_shift_table"):
    diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path / "there")


def test_a_wrong_weight_is_found_by_running_both(convert, tmp_path, monkeypatch):
  write_official(tmp_path / "model.pth")
  write_pickle = files.write_pickle

  def spoil(path, weights, note):
    weights["blocks.2.attn.sr.weight"] = 1.5 * weights["blocks.2.attn.sr.weight"]
    write_pickle(path, weights, note)

  convert(
    *("--from=pixart", "--to=orbax", tmp_path / "model.pth", tmp_path / "run"),
    *("--num_heads=4", "--scaling_factor=0.13025"),
  )
  monkeypatch.setattr(files, "write_pickle", spoil)
  there = tmp_path / "there.pth"
  done = convert("--from=orbax", "--to=pixart", tmp_path / "run", there, "--verify")
  assert done.code == 1
  assert "are not the same network" in done.err
  lines = {
    line.split()[:2][1]: line for line in done.out.splitlines() if "block" in line
  }
  assert float(lines["1"].split()[-1]) < 1e-5 < float(lines["2"].split()[-1])


def test_ema_weights_are_taken_where_asked(convert, tmp_path):
  path = tmp_path / "model.pth"
  raw = write_official(path)
  ema = {name: torch.tensor(array) + 1 for name, array in raw.items()}
  ema["pos_embed"] -= 1
  write_official(path, state_dict_ema=ema)
  arguments = ("--from=pixart", "--to=orbax", path)
  known = ("--num_heads=4", "--scaling_factor=0.13025")
  for name, flags, bias in (("raw", (), 0), ("ema", ("--ema",), 1)):
    done = convert(*arguments, tmp_path / name, *known, *flags)
    assert done.code == 0, done.err
    params = checkpoint.read_snapshot(tmp_path / name).params
    np.testing.assert_array_equal(
      params["modulation"]["bias"], raw["t_block.1.bias"] + np.float32(bias)
    )
  write_official(path)
  done = convert(*arguments, tmp_path / "none", *known, "--ema")
  assert (done.code, "has no state_dict_ema" in done.err) == (1, True)


class Malice:
  def __init__(self, path):
    self._path = path

  def __reduce__(self):
    return (pathlib.Path.touch, (self._path,))


def test_a_malicious_pickle_does_not_run(convert, tmp_path):
  path, touched = tmp_path / "model.pth", tmp_path / "touched"
  for write in (torch.save, lambda x, p: p.write_bytes(pickle.dumps(x, 2))):
    write({"state_dict": {}, "extra": Malice(touched)}, path)
    done = convert("--from=pixart", "--to=orbax", path, tmp_path / "run")
    assert done.code == 1
    assert "could run any code and is not loaded" in done.err
    assert not touched.exists()
    assert not (tmp_path / "run").exists()


def broken_sources(folder):
  """What is wrong → (flags with paths, what the error says)."""
  official, transformer = folder / "model.pth", folder / "transformer"
  write_official(official)
  write_diffusers(transformer)
  truncated = folder / "truncated.pth"
  truncated.write_bytes(official.read_bytes()[:-2000])
  short = folder / "short"
  short.mkdir()
  (short / "config.json").write_text((transformer / "config.json").read_text())
  whole = (transformer / "diffusion_pytorch_model.safetensors").read_bytes()
  (short / "diffusion_pytorch_model.safetensors").write_bytes(whole[:-64])
  lora = folder / "lora"
  lora.mkdir()
  (lora / "config.json").write_text((transformer / "config.json").read_text())
  name = "transformer_blocks.0.attn1.to_q.lora_A.weight"
  save_file({name: np.zeros((4, 8), np.float32)}, lora / "model.safetensors")
  pixart = ("--from=pixart", "--to=orbax")
  peer = ("--from=diffusers", "--to=orbax")
  heads = ("--num_heads=4", "--scaling_factor=0.13025")
  return {
    "truncated pth": ((*pixart, truncated), "is truncated or none of torch's: fetch"),
    "truncated safetensors": ((*peer, short, *SIGMA), "truncated or not safetensors"),
    "no file": ((*pixart, folder / "none.pth"), "no such file"),
    "no folder": ((*peer, folder / "none"), "is not a folder"),
    "lora": ((*peer, lora, *SIGMA), "weights of a LoRA"),
    "alpha for sigma": (
      (*pixart, official, "--num_heads=4", "--release=sigma-512"),
      "caption_length=300.* was asked for, but .* have .*caption_length=10",
    ),
    "1024 for 512": (
      (*peer, transformer, "--release=sigma-512"),
      "base_size=32.* was asked for, but these weights have base_size=4",
    ),
    "flag against release": (
      (*pixart, official, "--release=sigma-512", "--caption_length=120"),
      "caption_length=120 was asked for, but the release has caption_length=300",
    ),
    "unsaid factor": (
      (*pixart, official, "--num_heads=4"),
      "show the scaling factor: give --scaling_factor",
    ),
    "unsaid length": (
      (*peer, transformer),
      "show caption_length: give --caption_length",
    ),
    "folder as pth": ((*pixart, transformer, *heads), "takes a .pth file"),
    "same format": (("--from=orbax", "--to=orbax", official), "there is nothing to do"),
  }


CASES = (
  "truncated pth",
  "truncated safetensors",
  "no file",
  "no folder",
  "lora",
  "alpha for sigma",
  "1024 for 512",
  "flag against release",
  "unsaid factor",
  "unsaid length",
  "folder as pth",
  "same format",
)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
  return broken_sources(tmp_path_factory.mktemp("broken"))


@pytest.mark.parametrize("case", CASES)
def test_bad_sources_end_in_one_line_and_leave_nothing(convert, tmp_path, broken, case):
  arguments, message = broken[case]
  assert set(broken) == set(CASES)
  done = convert(*arguments, tmp_path / "out")
  assert done.code == 1
  assert done.err.count("\n") == 1 or "Error:" in done.err.splitlines()[-1]
  assert re.search(message, done.err), done.err
  assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(convert, tmp_path):
  write_snapshot(tmp_path / "run")
  (tmp_path / "there.pth").write_text("mine")
  done = convert(
    "--from=orbax", "--to=pixart", tmp_path / "run", tmp_path / "there.pth"
  )
  assert (done.code, "exists already" in done.err) == (1, True)
  assert (tmp_path / "there.pth").read_text() == "mine"


def test_a_disk_that_fills_up_leaves_no_half_a_file(convert, tmp_path, monkeypatch):
  write_snapshot(tmp_path / "run")

  def full(weights, path, metadata):
    pathlib.Path(path).write_text("half")
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(files, "save_file", full)
  done = convert("--from=orbax", "--to=diffusers", tmp_path / "run", tmp_path / "there")
  assert (done.code, "No space left" in done.err) == (1, True)
  assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_snapshot_says_itself_what_it_is(convert, tmp_path):
  write_snapshot(tmp_path / "run")
  done = convert(
    "--from=orbax", "--to=pixart", tmp_path / "run", tmp_path / "x.pth", "--base_size=8"
  )
  assert (done.code, "leave out --base_size" in done.err) == (1, True)


def test_what_is_written_beside_the_weights_is_json(convert, tmp_path):
  _, about = write_snapshot(tmp_path / "run")
  convert("--from=orbax", "--to=diffusers", tmp_path / "run", tmp_path / "there")
  noted = json.loads((tmp_path / "there" / "pixsigma_jax.json").read_text())
  assert noted["stage"] == about.stage
  convert("--from=orbax", "--to=pixart", tmp_path / "run", tmp_path / "there.pth")
  content = torch.load(tmp_path / "there.pth", weights_only=True)
  # The official loader reads this entry and no other.
  assert set(content) == {"state_dict", "pixsigma_jax"}
