"""Weights from where they lie: any format is drawn from as the converted model is."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import huggingface_hub
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from pixsigma_jax import checkpoint, disk
from pixsigma_jax.convert import model
from pixsigma_jax.convert.model import Options
from pixsigma_jax.evaluate import sampling
from pixsigma_jax.models.layers import Compute
from pixsigma_jax.sample import Pipeline, image_files, weights
from tests import commands
from tests.convert.published import write_t5, write_tokenizer
from tests.convert.published_vae import make_vae
from tests.convert.test_main import write_diffusers, write_official, write_snapshot
from tests.convert.test_pixart import assert_equal_trees

ROOT = pathlib.Path(__file__).parents[2]
KNOWN = {"caption_length": 10, "scaling_factor": 0.13025}
OFFICIAL = {"num_heads": 4, "scaling_factor": 0.13025}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  """A cache of each test's own, where nobody else looks."""
  monkeypatch.setenv("PIXSIGMA_JAX_CACHE", str(tmp_path / "cache"))
  return tmp_path / "cache"


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
  """A whole pipeline as diffusers saves it, with tiny networks."""
  root = tmp_path_factory.mktemp("published") / "pipeline"
  write_diffusers(root / "transformer")
  make_vae().save_pretrained(root / "vae")
  write_t5(root / "text_encoder")
  write_tokenizer(root / "tokenizer")
  index = {
    "_class_name": "PixArtSigmaPipeline",
    "_diffusers_version": "0.42.1",
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "PixArtTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
  }
  (root / "model_index.json").write_text(json.dumps(index))
  return root


def params_of(located):
  return checkpoint.read_snapshot(located.checkpoint).params


def converted(path, form, **fields):
  return model.read(path, form, Options(**fields).given())


@pytest.mark.parametrize(
  "kind", ["pth", "official safetensors", "diffusers safetensors", "transformer"]
)
def test_every_format_is_read_as_convert_reads_it(kind, tmp_path):
  if kind == "pth":
    write_official(path := tmp_path / "model.pth")
    form, about = "pixart", OFFICIAL
  elif kind == "official safetensors":
    save_file(
      write_official(tmp_path / "x.pth"), path := tmp_path / "any name.safetensors"
    )
    form, about = "pixart", OFFICIAL
  else:
    write_diffusers(path := tmp_path / "transformer")
    form, about = "diffusers", KNOWN
  want = converted(path, form, **about)
  if kind == "diffusers safetensors":
    # By itself: nothing beside it says what the tensors do not.
    path = tmp_path / "alone.safetensors"
    shutil.copy(tmp_path / "transformer/diffusion_pytorch_model.safetensors", path)
    with pytest.raises(ValueError, match="show base_size: give --base_size"):
      weights.locate(path, Options(**about))
    about = {**about, "num_heads": 4, "base_size": 4, "pe_interpolation": 2.0}
  located = weights.locate(path, Options(**about))
  assert_equal_trees(params_of(located), want.params)
  snapshot = checkpoint.read_snapshot(located.checkpoint)
  assert snapshot.config == want.config
  assert snapshot.metadata.scaling_factor == 0.13025
  assert located.encoders is None


def test_a_pipeline_brings_its_encoders_and_says_what_its_transformer_does_not(
  pipeline_folder, capsys, monkeypatch, tmp_path
):
  compute = Compute(dtype=jnp.float32)
  whole = Pipeline.from_pretrained(pipeline_folder, compute=compute)
  # Of a pipeline of Σ, and of the VAE beside the transformer.
  assert whole.config.caption_length == 300
  assert whole.autoencoder.scaling_factor == 0.13025
  part = Pipeline.from_checkpoint(pipeline_folder / "transformer", compute=compute)
  by_hand = model.read(
    pipeline_folder,
    "diffusers",
    Options(caption_length=300, scaling_factor=0.13025).given(),
  )
  model.write(tmp_path / "run", "orbax", by_hand)
  want = Pipeline.from_checkpoint(
    tmp_path / "run", frozen=pipeline_folder, compute=compute
  )
  draw = {"num_inference_steps": 2, "seed": 3, "height": 64, "width": 64}
  image = np.asarray(want("a red fox", **draw).images[0])
  for pipeline in (whole, part):
    output = pipeline("a red fox", **draw)
    np.testing.assert_array_equal(output.images[0], image)
  assert output.settings[0]["checkpoint"] == str(pipeline_folder / "transformer")
  assert len(output.settings[0]["weights"]) == 32

  # As a command, which reads T5 first and drops it.
  done = commands.run(
    *(capsys, monkeypatch, "sample", f"--checkpoint={pipeline_folder}"),
    *("--prompt=a red fox", "--seed=3", "--num_inference_steps=2", "--height=64"),
    *("--width=64", "--dtype=float32", f"--output={tmp_path / 'images'}"),
  )
  assert done.code == 0, done.err
  drawn = image_files.settings_of(tmp_path / "images" / "00000.png")
  assert drawn["checkpoint"] == str(pipeline_folder)
  levels = np.abs(
    np.asarray(Image.open(tmp_path / "images" / "00000.png"), int) - image
  )
  assert levels.max() <= 1  # T5 encoded two captions together


def test_a_source_is_converted_once_and_again_when_its_content_changes(
  tmp_path, monkeypatch, cache
):
  write_official(path := tmp_path / "model.pth")
  reads, hashes = [], []
  read, file_hash = model.read, disk.file_hash
  monkeypatch.setattr(model, "read", lambda *a, **k: reads.append(a) or read(*a, **k))
  monkeypatch.setattr(disk, "file_hash", lambda p: hashes.append(p) or file_hash(p))
  options = Options(**OFFICIAL)
  first = weights.locate(path, options)
  assert weights.locate(path, options) == first
  assert (len(reads), len(hashes)) == (1, 1)
  # The same content elsewhere is the same model.
  shutil.copy(path, tmp_path / "copy.pth")
  assert weights.locate(tmp_path / "copy.pth", options).checkpoint == first.checkpoint
  assert len(reads) == 1
  # Another answer, other content and another converter are others.
  other = weights.locate(path, Options(**OFFICIAL | {"scaling_factor": 0.18215}))
  write_official(path, case="ms_plain")
  changed = weights.locate(path, options)
  monkeypatch.setattr(weights, "_code", lambda: "of another version")
  newer = weights.locate(path, options)
  found = {x.checkpoint for x in (first, other, changed, newer)}
  assert len(found) == len(reads) == 4
  assert checkpoint.read_metadata(other.checkpoint).scaling_factor == 0.18215
  assert sorted(p.name for p in (cache / "converted").iterdir()) == sorted(
    p.name for p in found
  )


def test_a_conversion_that_breaks_off_leaves_nothing_and_is_made_again(
  tmp_path, monkeypatch, cache
):
  write_official(path := tmp_path / "model.pth")
  options = Options(**OFFICIAL)
  with monkeypatch.context() as patch:
    patch.setattr(
      checkpoint, "save_snapshot", lambda folder, *_, **__: _half_written(folder)
    )
    with pytest.raises(OSError, match="No space left"):
      weights.locate(path, options)
  assert list((cache / "converted").iterdir()) == []
  assert params_of(weights.locate(path, options))


def _half_written(folder):
  (folder / "snapshots").mkdir()
  raise OSError(28, "No space left on device")


def test_who_comes_second_takes_what_the_first_has_converted(tmp_path, monkeypatch):
  write_official(path := tmp_path / "model.pth")
  options, write = Options(**OFFICIAL), model.write
  first = []

  def meanwhile(folder, form, converted):
    write(folder, form, converted)
    if not first:  # another process, at the very end of this one's work
      first.append(None)
      first.append(weights.locate(path, options))

  monkeypatch.setattr(model, "write", meanwhile)
  second = weights.locate(path, options)
  assert second == first[1]
  assert params_of(second)
  assert len(list(second.checkpoint.parent.iterdir())) == 1


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"num_heads": 4}, "show the scaling factor: give --scaling_factor"),
    ({**OFFICIAL, "caption_length": 120}, "caption_length=120 was asked for, but"),
    ({"release": "sigma-512", "num_heads": 4}, "was asked for, but these weights have"),
    ({**OFFICIAL, "ema": True}, "has no state_dict_ema"),
    ({"release": "sigma-3"}, "Unknown release 'sigma-3'; choose one of sigma-256"),
  ],
)
def test_what_convert_refuses_is_refused_in_its_words(tmp_path, cache, fields, message):
  write_official(path := tmp_path / "model.pth")
  with pytest.raises(ValueError, match=message):
    Pipeline.from_checkpoint(path, **fields)
  assert not list((cache / "converted").glob("*"))


def test_bad_sources_are_named(tmp_path, pipeline_folder):
  write_snapshot(tmp_path / "run")
  lora = {"transformer_blocks.0.attn1.to_q.lora_A.weight": np.zeros((4, 8), np.float32)}
  save_file(lora, tmp_path / "lora.safetensors")
  (tmp_path / "broken.safetensors").write_bytes(b"half")
  other = tmp_path / "flux"
  (other / "transformer").mkdir(parents=True)
  (other / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
  empty = tmp_path / "empty"
  empty.mkdir()
  (empty / "model_index.json").write_text('{"_class_name": "PixArtSigmaPipeline"}')
  for source, error, message in (
    (
      tmp_path / "none.pth",
      FileNotFoundError,
      "no weights at .*none.pth: no such file",
    ),
    (tmp_path / "nothing", FileNotFoundError, "There is no checkpoint at"),
    (tmp_path / "lora.safetensors", ValueError, "weights of a LoRA"),
    (tmp_path / "broken.safetensors", ValueError, "truncated or not safetensors"),
    (other, ValueError, "of the class 'FluxPipeline', not one of PixArtSigmaPipeline"),
    (empty, FileNotFoundError, "is a pipeline without transformer/: it has nothing"),
  ):
    with pytest.raises(error, match=message):
      Pipeline.from_checkpoint(source)
  with pytest.raises(ValueError, match=r"says itself .*: leave out --release, --ema"):
    weights.locate(tmp_path / "run", Options(release="sigma-512", ema=True))
  with pytest.raises(TypeError, match="no argument 'torch_dtype': give compute"):
    Pipeline.from_pretrained(pipeline_folder, torch_dtype="float16")


def test_the_hub_s_folders_and_files_are_fetched_and_their_releases_known(
  pipeline_folder, tmp_path, monkeypatch
):
  asked = []
  (tmp_path / "page").mkdir()
  write_official(tmp_path / "page" / "model.pth")

  def download(page, allow_patterns):
    asked.append((page, allow_patterns))
    return str({"somebody/pipeline": pipeline_folder}.get(page, tmp_path / "page"))

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  located = weights.locate("somebody/pipeline")
  assert located.encoders == pipeline_folder
  assert located.origin["checkpoint"] == "somebody/pipeline"
  assert "transformer/*" in asked[-1][1]
  assert "vae/*" in asked[-1][1]
  weights.locate("somebody/files/model.pth", Options(**OFFICIAL))
  assert asked[-1] == ("somebody/files", ["model.pth"])
  with pytest.raises(FileNotFoundError, match=r"on the hub has no file other\.pth"):
    weights.locate("somebody/files/other.pth")
  with pytest.raises(
    FileNotFoundError, match=r"neither model_index\.json nor .*, but model\.pth"
  ):
    weights.locate("somebody/files")
  # A published page is known: what it says is held against what it is called.
  known = "PixArt-alpha/PixArt-Sigma-XL-2-512-MS"
  shutil.copytree(pipeline_folder / "transformer", tmp_path / "page" / "transformer")
  with pytest.raises(
    ValueError, match=r"base_size=32, .*asked for, but .* base_size=4"
  ):
    weights.locate(known)


def test_a_hub_that_does_not_answer_ends_in_one_message(capsys, monkeypatch, tmp_path):
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")

  def silent(*_, **__):
    raise ConnectionError("Could not reach the hub. Are you online?")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", silent)
  done = commands.run(
    *(capsys, monkeypatch, "sample", "--checkpoint=somebody/nothing"),
    *("--prompt=a fox", f"--output={tmp_path / 'images'}"),
  )
  assert done.code == 1
  assert done.err.splitlines()[-1] == (
    "Error: somebody/nothing is neither a folder nor could it be fetched from the hub:"
    " Could not reach the hub. Give a run's workdir or one of its snapshots, a folder "
    "of diffusers, a .pth or a .safetensors, or the id of one on the hub."
  )


def test_torch_is_not_imported_where_no_pickle_is_read(pipeline_folder, tmp_path):
  code = (
    "import sys\n"
    "from pixsigma_jax.sample import weights\n"
    f"weights.locate({str(pipeline_folder)!r})\n"
    "print('torch' in sys.modules)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    env={**os.environ, "PIXSIGMA_JAX_CACHE": str(tmp_path)},
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.stdout == "False\n", done.stderr


def test_an_evaluation_takes_them_beside_checkpoints_of_ours(tmp_path):
  write_snapshot(tmp_path / "run")
  write_diffusers(tmp_path / "theirs" / "transformer")
  write_official(tmp_path / "model.pth")
  words = [str(tmp_path / "run"), str(tmp_path / "model.pth")]
  words.append(f"peer={tmp_path / 'theirs'}")
  options = Options(scaling_factor=0.13025, num_heads=4, caption_length=10)
  found = sampling.find_checkpoints(words, options)
  assert list(found) == ["run", "model.pth", "peer"]
  assert found["run"].checkpoint == tmp_path / "run" / "snapshots" / "7"
  assert found["peer"].origin["checkpoint"] == str(tmp_path / "theirs")
  for located in found.values():
    assert params_of(located)
  with pytest.raises(ValueError, match="leave out --caption_length, --scaling_factor"):
    sampling.find_checkpoints(words[:1], options)
