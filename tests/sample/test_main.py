"""The command: files that say how they were made, and messages that say what to do."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from pixsigma_jax import checkpoint
from pixsigma_jax.sample.pipeline import Pipeline
from tests import commands
from tests.sample import models

STEPS = 2


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A run with two snapshots of different parameters."""
  directory, config = tmp_path_factory.mktemp("run"), models.nano()
  for step in (3, 12):
    checkpoint.save_snapshot(
      directory,
      step,
      params=models.random_params(config, seed=step),
      null_caption=models.null_caption(config),
      metadata=models.metadata(config),
    )
  return directory


@pytest.fixture
def sample(capsys, monkeypatch, workdir):
  def sample(*arguments, checkpoint=workdir):
    return commands.run(
      capsys,
      monkeypatch,
      "sample",
      f"--checkpoint={checkpoint}",
      f"--num_inference_steps={STEPS}",
      "--dtype=float32",
      *arguments,
    )

  return sample


def settings_of(path):
  with Image.open(path) as image:
    return json.loads(image.text["settings"])


def names(directory):
  return sorted(path.name for path in directory.iterdir())


def test_what_a_png_says_is_enough_to_draw_it_again(sample, workdir, tmp_path):
  out = tmp_path / "new" / "pictures"
  done = sample(
    "--prompt=a red seven",
    "--prompt=a blue two",
    f"--output={out}",
    "--seed=40",
    "--guidance_scale=3",
    "--negative_prompt=grey",
    "--num_images_per_prompt=2",
    "--height=16",
    "--sampler=dpm++-reference",
    "--guidance_passes=2",
  )
  paths = [out / f"0000{i}.png" for i in range(4)]
  assert done.code == 0
  assert done.out.splitlines() == [str(path) for path in paths]
  parts = ("text encoder", "compilation", "transformer", "autoencoder")
  seconds = ", ".join(rf"{part} \d+\.\d\d s" for part in parts)
  assert re.search(f"Spent: {seconds}\\.\n", done.err)
  assert names(out) == [path.name for path in paths]
  with Image.open(paths[3]) as image:
    assert image.size == (8, 16)
    assert image.text["prompt"] == "a blue two"
    assert image.text["seed"] == "43"

  settings = settings_of(paths[3])
  assert (settings["negative_prompt"], settings["guidance_scale"]) == ("grey", 3.0)
  assert (settings["sampler"], settings["height"]) == ("dpm++-reference", 16)
  assert settings["num_inference_steps"] == STEPS
  assert settings.pop("checkpoint") == str(workdir / "snapshots" / "12")  # the newest
  assert settings.pop("dtype") == "float32"
  how = {name: settings.pop(name) for name in ("batch_size", "guidance_passes")}
  assert how["guidance_passes"] == 2
  assert settings.pop("quantize") == "none"
  for name in ("step", "stage", "pixsigma_jax"):
    del settings[name]
  pipeline = Pipeline.from_checkpoint(workdir, compute=models.FLOAT32, **how)
  (again,) = pipeline(**settings).images  # its keys are the arguments' own names
  with Image.open(paths[3]) as image:
    np.testing.assert_array_equal(image, again)


def test_pictures_are_numbered_on_and_never_overwritten(sample, tmp_path):
  arguments = (f"--output={tmp_path}", "--prompt=a one", "--grid")
  assert sample(*arguments).code == 0
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
  done = sample(*arguments)
  assert done.out.splitlines() == [
    str(tmp_path / name) for name in ("00001.png", "grid-00001.png")
  ]
  assert names(tmp_path) == ["00000.png", "00001.png", "grid-00001.png", "grid.png"]
  for name, content in before.items():
    assert (tmp_path / name).read_bytes() == content
  # The same seed, the same picture.
  with (
    Image.open(tmp_path / "00000.png") as first,
    Image.open(tmp_path / "00001.png") as second,
  ):
    np.testing.assert_array_equal(first, second)


def test_prompts_come_from_the_flags_and_then_from_the_lines_of_a_file(
  sample, tmp_path
):
  file = tmp_path / "prompts.txt"
  file.write_text("\n a green three \n\na वर्ण five\n", encoding="utf-8")
  out = tmp_path / "out"
  done = sample(f"--prompts_file={file}", "--prompt=a one", f"--output={out}", "--grid")
  assert done.code == 0
  about = [settings_of(out / f"0000{i}.png") for i in range(3)]
  prompts = ["a one", "a green three", "a वर्ण five"]
  assert [settings["prompt"] for settings in about] == prompts
  assert [settings["seed"] for settings in about] == [0, 1, 2]
  assert settings_of(out / "grid.png")["prompts"] == prompts


def test_one_snapshot_of_a_run_can_be_named(sample, workdir, tmp_path):
  sample("--prompt=a", f"--output={tmp_path}", checkpoint=workdir / "snapshots" / "3")
  assert settings_of(tmp_path / "00000.png")["step"] == 3


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((), "Give --prompt=TEXT"),
    (("--prompt=a b c d e f g h",), "has 9 tokens"),
    (("--prompt=a", "--height=9"), "must be multiples of 2"),
    (("--prompt=a", "--height=64", "--width=64"), "position embedding is laid out"),
    (("--prompts_file=nowhere.txt",), "nowhere.txt"),
  ],
)
def test_a_mistake_is_named_before_anything_is_written(
  sample, tmp_path, arguments, message
):
  out = tmp_path / "out"
  done = sample(f"--output={out}", *arguments)
  assert (done.code, done.out) == (1, "")
  assert done.err.count("\n") == 1
  assert message in done.err
  assert not out.exists()


def test_a_checkpoint_that_is_none_is_named(sample, tmp_path):
  for path, message in (
    (tmp_path / "nowhere", "There is no checkpoint at"),
    (tmp_path, "is not a checkpoint of pixsigma_jax"),
  ):
    done = sample("--prompt=a", f"--output={tmp_path / 'out'}", checkpoint=path)
    assert done.code == 1
    assert done.err.startswith("Error: ")
    assert str(path) in done.err
    assert message in done.err


def test_a_damaged_checkpoint_is_named(sample, workdir, tmp_path):
  checkpoint.save_snapshot(
    tmp_path / "run",
    5,
    params=models.random_params(models.nano()),
    null_caption=models.null_caption(models.nano()),
    metadata=models.metadata(models.nano()),
  )
  step = tmp_path / "run" / "snapshots" / "5"
  for path in step.joinpath("model").rglob("*"):
    if path.is_file():
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  done = sample("--prompt=a", f"--output={tmp_path / 'out'}", checkpoint=step)
  assert (done.code, done.err.count("\n")) == (1, 1)
  assert f"Could not read the checkpoint {step}" in done.err


def test_an_output_that_is_a_file_is_refused(sample, tmp_path):
  file = tmp_path / "notes.txt"
  file.write_text("kept")
  done = sample("--prompt=a", f"--output={file}")
  assert (done.code, done.err.count("\n")) == (1, 1)
  assert "notes.txt is a file: give a directory" in done.err
  assert file.read_text() == "kept"


def test_a_prompts_file_that_is_no_text_is_refused(sample, tmp_path):
  file = tmp_path / "prompts.txt"
  file.write_bytes(b"a one\n\xff\xfe")
  done = sample(f"--prompts_file={file}", f"--output={tmp_path / 'out'}")
  assert (done.code, done.err.count("\n")) == (1, 1)
  assert "prompts.txt is not a text file in UTF-8" in done.err
