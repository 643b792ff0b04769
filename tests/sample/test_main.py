"""The command: files that say how they were made, and messages that say what to do."""

import io
import json
import os
import re
import shlex

import numpy as np
import pytest
from PIL import Image

from pixsigma_jax.sample import image_files
from pixsigma_jax.sample.pipeline import Pipeline
from tests import commands
from tests.sample import models

STEPS = 2


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A run with two snapshots of different parameters."""
  directory, config = tmp_path_factory.mktemp("run"), models.nano()
  for step in (3, 12):
    models.save_snapshot(directory, config, step, seed=step)
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
  drawn = [settings.pop(f"drawn_{side}") for side in ("height", "width")]
  assert drawn == [16, 8]
  assert how["guidance_passes"] == 2
  assert settings.pop("quantize") == "none"
  for name in ("step", "stage", "pixsigma_jax"):
    del settings[name]
  pipeline = Pipeline.from_checkpoint(workdir, compute=models.FLOAT32, **how)
  (again,) = pipeline(**settings).images  # its keys are the arguments' own names
  with Image.open(paths[3]) as image:
    np.testing.assert_array_equal(image, again)


def test_images_are_numbered_on_and_never_overwritten(sample, tmp_path):
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
  # The same seed, the same image.
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


def test_a_grid_has_the_order_of_the_prompts_whatever_is_ready_first(
  sample, monkeypatch, tmp_path
):
  gridded = []
  grid = image_files.grid
  monkeypatch.setattr(
    image_files, "grid", lambda images, *more: gridded.extend(images) or grid(images)
  )
  sides = [f"--height={side}" for side in (8, 16, 8)]
  prompts = [f"--prompt={prompt}" for prompt in "abc"]
  done = sample(*prompts, *sides, "--grid", f"--output={tmp_path}")
  assert done.code == 0, done.err
  assert [image.height for image in gridded] == [8, 16, 8]
  paths = [tmp_path / f"0000{i}.png" for i in range(3)]
  assert [settings_of(path)["prompt"] for path in paths] == ["a", "b", "c"]
  # The one of another size was drawn last.
  assert done.out.splitlines()[:3] == [str(paths[i]) for i in (0, 2, 1)]


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
  models.save_snapshot(tmp_path / "run", models.nano(), 5)
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


@pytest.mark.parametrize(
  "content",
  [
    b"\xef\xbb\xbfa one\na two\n",
    b"a one\r\na two\r\n\r\n",
    b"\n  a one \n\ta two",
  ],
  ids=["byte order mark", "CRLF", "blanks"],
)
def test_prompts_are_the_lines_of_a_file_without_what_editors_add(
  sample, tmp_path, monkeypatch, content
):
  (tmp_path / "prompts.txt").write_bytes(content)
  stdin = io.TextIOWrapper(io.BytesIO(content), encoding="ascii")
  monkeypatch.setattr("sys.stdin", stdin)
  for name in (tmp_path / "prompts.txt", "-"):
    out = tmp_path / f"out{name == '-'}"
    done = sample(f"--prompts_file={name}", f"--output={out}")
    assert done.code == 0, done.err
    said = [settings_of(path)["prompt"] for path in sorted(out.iterdir())]
    assert said == ["a one", "a two"]


def test_characters_that_are_no_line_feed_stay_in_their_prompt(sample, tmp_path):
  prompts = ["a one\u2028a two", "a\x85b", "a\x0bb\x1cc"]
  text, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
  text.write_bytes("\n".join(prompts).encode())
  lines.write_bytes(
    "\n".join(json.dumps({"prompt": p}, ensure_ascii=False) for p in prompts).encode(
      "utf-8-sig"
    )
  )
  for file in (text, lines):
    out = tmp_path / file.suffix
    done = sample(f"--prompts_file={file}", f"--output={out}")
    assert done.code == 0, done.err
    assert [settings_of(path)["prompt"] for path in sorted(out.iterdir())] == prompts


def test_a_lines_own_settings_stand_in_for_the_flags(sample, tmp_path):
  lines = [
    {"prompt": "a", "height": 16, "seed": 7.0},
    {"prompt": "b", "negative_prompt": None, "height": None},
    {"prompt": "c", "negative_prompt": "grey"},
  ]
  (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
  out = tmp_path / "out"
  done = sample(f"--prompts_file={tmp_path / 'p.jsonl'}", f"--output={out}")
  assert done.code == 0, done.err
  said = [settings_of(path) for path in sorted(out.iterdir())]
  names = ("negative_prompt", "height", "width", "seed")
  assert [tuple(about[name] for name in names) for about in said] == [
    ("", 16, 8, 7),
    ("", 8, 8, 1),
    ("grey", 8, 8, 2),
  ]


@pytest.mark.parametrize(
  ("line", "arguments", "message"),
  [
    ({"seed": "7"}, (), "p.jsonl:1: seed must be a whole number, not '7'"),
    ({"height": 8.5}, (), "p.jsonl:1: height must be a whole number, not 8.5"),
    ({"steps": 8}, (), "'steps', which is no setting .* known are prompt, negative_pr"),
    ({"height": 8}, ("--height=8", "--height=16"), "height of their own: give --heigh"),
    ({}, ("--height=8", "--height=16"), "height has 2 values for 1 prompts"),
    ({}, ("--guidance_scale=-1",), "guidance_scale=-1.0 must be 0 or more"),
    ({}, ("--timesteps=999,x",), "--timesteps=999,x must be whole numbers, such as"),
    ({}, ("--guidance_interval=0,x",), "--guidance_interval=0,x must be two numbers"),
    ({}, ("--format=webp", "--height=20000"), "A webp holds no image of 20000 x 0"),
  ],
)
def test_a_wrong_setting_is_named_before_weights_are_looked_for(
  sample, tmp_path, line, arguments, message
):
  (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a"} | line))
  done = sample(
    f"--prompts_file={tmp_path / 'p.jsonl'}",
    f"--output={tmp_path / 'out'}",
    *arguments,
    checkpoint=tmp_path / "nowhere",
  )
  assert (done.code, done.err.count("\n")) == (1, 1)
  assert re.search(message, done.err), done.err


# ------------------------------------------------------- what is written, stays written


def test_a_number_that_another_process_took_meanwhile_costs_no_image(
  sample, tmp_path, monkeypatch
):
  write = image_files._write

  def beaten(*arguments):
    write(*arguments)
    for name in ("00000.png", "grid.png"):  # after the numbers were looked up
      if not (tmp_path / name).exists():
        (tmp_path / name).write_text("another's")

  monkeypatch.setattr(image_files, "_write", beaten)
  done = sample("--prompt=a", "--prompt=b", "--grid", f"--output={tmp_path}")
  assert done.code == 0, done.err
  wanted = ["00001.png", "00002.png", "grid-00001.png"]
  assert done.out.splitlines() == [str(tmp_path / name) for name in wanted]
  assert names(tmp_path) == sorted(["00000.png", *wanted, "grid.png"])
  assert [settings_of(tmp_path / n)["prompt"] for n in wanted[:2]] == ["a", "b"]
  assert settings_of(tmp_path / wanted[2])["first"] == wanted[0]
  for name in ("00000.png", "grid.png"):
    assert (tmp_path / name).read_text() == "another's"


def test_an_output_that_takes_no_files_is_named_before_weights_are_looked_for(
  sample, tmp_path, monkeypatch
):
  nowhere = tmp_path / "nowhere"
  done = sample("--prompt=a", "--output=/proc/pictures", checkpoint=nowhere)
  assert (done.code, done.err.count("\n")) == (1, 1)
  assert "Nothing can be written to /proc" in done.err
  done = sample(
    *("--prompt=a", f"--output={tmp_path}", "--save_captions=/proc/a.safetensors"),
    checkpoint=nowhere,
  )
  assert "Nothing can be written to /proc" in done.err

  def full(_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "fsync", full)
  done = sample("--prompt=a", f"--output={tmp_path / 'out'}", checkpoint=nowhere)
  assert (done.code, done.err.count("\n")) == (1, 1)
  assert "No space left on device" in done.err
  assert not (tmp_path / "out").exists()


def test_captions_that_are_not_encoded_are_not_promised_to_be_saved(sample, tmp_path):
  done = sample(
    *("--prompt=a", f"--output={tmp_path / 'out'}", "--captions=a.safetensors"),
    f"--save_captions={tmp_path / 'b.safetensors'}",
    checkpoint=tmp_path / "nowhere",
  )
  assert (done.code, done.err.count("\n")) == (1, 1)
  assert "leave out --captions or --save_captions" in done.err


def test_after_ctrl_c_images_stay_and_the_line_draws_the_others(
  sample, capsys, monkeypatch, tmp_path
):
  arguments = (
    *("--prompt=a one", "--prompt=it's a \u2028 two", "--num_images_per_prompt=2"),
    *("--height=8", "--height=16", "--seed=40", "--negative_prompt=grey"),
    *("--guidance_scale=3", "--nouse_resolution_binning"),
  )
  assert sample(*arguments, f"--output={tmp_path / 'whole'}").code == 0
  whole = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}

  save, out = image_files.ImageFolder.save, tmp_path / "a folder"

  def interrupt(folder, number, *more):
    if number == 3:
      raise KeyboardInterrupt
    return save(folder, number, *more)

  with monkeypatch.context() as patch:
    patch.setattr(image_files.ImageFolder, "save", interrupt)
    done = sample(*arguments, f"--output={out}")
  assert done.code == 130
  assert names(out) == ["00000.png", "00001.png", "00002.png", "rest-00000.jsonl"]
  (line,) = [x for x in done.err.splitlines() if x.startswith("Interrupted: ")]
  assert done.err.endswith(f"{line}\n")
  assert "Traceback" not in done.err
  said, _, way_on = line.partition(" This draws the others: ")
  assert said == f"Interrupted: 3 of 4 images are written to {out}."

  python, dash_m, module, *words = shlex.split(way_on)
  assert (python, dash_m, module) == ("python", "-m", "pixsigma_jax.sample")
  done = commands.run(capsys, monkeypatch, "sample", *words)
  assert done.code == 0, done.err
  assert {p.name: p.read_bytes() for p in out.glob("*.png")} == whole


def test_after_ctrl_c_before_the_first_image_the_same_command_draws_them(
  sample, monkeypatch, tmp_path
):
  def interrupt(*_, **__):
    raise KeyboardInterrupt

  monkeypatch.setattr(Pipeline, "from_checkpoint", interrupt)
  done = sample("--prompt=a", f"--output={tmp_path / 'out'}")
  assert (done.code, done.out) == (130, "")
  assert done.err.endswith(
    f"Interrupted: 0 of 1 images are written to {tmp_path / 'out'}. The same command "
    "draws them.\n"
  )
  assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------ editing


@pytest.fixture
def photograph(tmp_path):
  """A file, and a mask beside it whose right half is white."""
  draw = np.random.default_rng(0)
  image = Image.fromarray(draw.integers(0, 256, (8, 8, 3)).astype(np.uint8))
  image.save(tmp_path / "photograph.png")
  mask = Image.new("L", (8, 8))
  mask.paste(255, (4, 0, 8, 8))
  mask.save(tmp_path / "mask.png")
  return tmp_path / "photograph.png", tmp_path / "mask.png"


def test_an_image_is_painted_inside_of_a_mask_and_previews_show_how(
  sample, photograph, tmp_path
):
  image, mask = photograph
  done = sample(
    *(f"--image={image}", f"--mask_image={mask}", "--prompt=a one"),
    *(f"--output={tmp_path / 'out'}", f"--previews={tmp_path / 'previews'}"),
  )
  assert done.code == 0, done.err
  with Image.open(image) as before, Image.open(tmp_path / "out/00000.png") as after:
    ours, theirs = np.asarray(after), np.asarray(before)
  np.testing.assert_array_equal(ours[:, :4], theirs[:, :4])
  assert (ours[:, 4:] != theirs[:, 4:]).any()
  about = settings_of(tmp_path / "out/00000.png")
  assert (about["image_name"], about["strength"]) == ("photograph.png", 1.0)
  with Image.open(tmp_path / "previews/00000.png") as preview:
    assert preview.size == (8, 8)


def test_lines_of_json_have_images_masks_strengths_and_regions(
  sample, photograph, tmp_path
):
  image, mask = map(str, photograph)
  lines = [
    {"prompt": "a one", "image": image, "strength": 0.5},
    {"prompt": "a two", "image": image, "mask_image": mask},
    {"prompt": "(a:1.2) b", "regions": [{"prompt": "a blue", "box": [0, 0, 4, 8]}]},
  ]
  (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
  done = sample(
    f"--prompts_file={tmp_path / 'lines.jsonl'}",
    *("--prompt_weighting", f"--output={tmp_path / 'out'}"),
  )
  assert done.code == 0, done.err
  about = [settings_of(tmp_path / f"out/0000{i}.png") for i in range(3)]
  assert [one.get("strength") for one in about] == [0.5, 1.0, None]
  assert about[2]["regions"] == [
    {"prompt": "a blue", "weight": 1.0, "box": [0, 0, 4, 8]}
  ]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--mask_image={mask}"], "mask_image is of an image, and prompt 0 has none"),
    (["--image={mask}", "--image={mask}"], "--image is given 2 times for 1 prompts"),
    (["--image={mask}.png"], "image: there is no file"),
    (["--image={mask}", "--strength=0.1"], "strength=0.1 of num_inference_steps=2 is"),
    (["--outpaint=1,2", "--image={mask}"], "outpaint must be four whole numbers"),
    (["--outpaint=a", "--image={mask}"], "--outpaint=a must be four whole numbers, LE"),
  ],
)
def test_edits_that_cannot_be_are_refused_before_weights_are_read(
  sample, photograph, tmp_path, arguments, message
):
  given = [argument.format(mask=photograph[1]) for argument in arguments]
  done = sample(
    *given, "--prompt=a", f"--output={tmp_path / 'out'}", checkpoint="nowhere"
  )
  assert (done.code, message in done.err) == (1, True), done.err


def test_a_lines_image_must_be_a_path(sample, tmp_path):
  (tmp_path / "a.jsonl").write_text('{"prompt": "a", "image": 3}')
  done = sample(
    f"--prompts_file={tmp_path / 'a.jsonl'}", f"--output={tmp_path / 'out'}"
  )
  assert "a.jsonl:1: image must be a file's path, not 3" in done.err
