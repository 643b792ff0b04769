"""The four steps of a suite, from checkpoints to a report, whole and interrupted."""

import json
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from pixsigma_jax.convert.lora import write_lora
from pixsigma_jax.data import digits
from pixsigma_jax.evaluate import folder, report, suites
from pixsigma_jax.sample import image_files
from pixsigma_jax.sample.pipeline import Pipeline
from tests import commands
from tests.convert.test_lora import lora, random_adapter
from tests.sample import models
from tests.test_house import ROOT

PER_TASK = 2
SAMPLE = ["--num_inference_steps=2", "--dtype=float32", "--batch_size=6"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Two runs of one architecture, untrained."""
  directory = tmp_path_factory.mktemp("runs")
  for step, name in enumerate(("low", "high"), 10):
    save(directory / name, step)
  return directory


def save(workdir, seed):
  config = models.nano(caption_length=12)
  models.save_snapshot(workdir, config, seed, seed=seed, stage=f"stage/{workdir.name}")


@pytest.fixture
def evaluate(capsys, monkeypatch):
  def evaluate(*arguments):
    return commands.run(capsys, monkeypatch, "evaluate", *arguments)

  return evaluate


def renders(items, directory):
  """Images that follow every prompt, named by id."""
  directory.mkdir()
  for item in items:
    scene = digits.parse(item.prompt)
    glyphs = [digits.handwriting("reader", each.digit)[0] for each in scene.items]
    image = image_files.to_image(digits.render(scene, glyphs, 8))
    image.save(directory / f"{item.id}.png")
  return directory


def test_from_checkpoints_and_a_folder_to_a_report(
  evaluate, runs, tmp_path, monkeypatch
):
  output = tmp_path / "evaluation"
  done = evaluate("prompts", "digits", f"--output={output}", f"--per_task={PER_TASK}")
  assert done.code == 0, done.err
  items = folder.open_folder(output).items
  drawn = renders(items, tmp_path / "drawn")

  done = evaluate(
    "digits",
    f"--output={output}",
    f"--per_task={PER_TASK}",
    f"--checkpoints={runs / 'low'},other={runs / 'high'}",
    f"--images=perfect={drawn}",
    "--resamples=50",
    *SAMPLE,
  )
  assert done.code == 0, done.err
  report = json.loads((output / "report.json").read_text())
  assert [model["name"] for model in report["models"]] == ["low", "other", "perfect"]
  assert report["models"][0]["origin"]["step"] == 10
  perfect = {f["name"]: f["value"] for f in report["models"][2]["figures"]}
  assert perfect["single"] == perfect["pairs"] == 100
  assert report["remarks"] == []
  text = (output / "report.md").read_text()
  assert text in done.out
  assert "| single (%) ↑ |" in text
  for name in ("report.png", "contact_sheet.jpg"):
    with Image.open(output / name) as image:
      assert min(image.size) > 100

  # Plots alone need matplotlib, and are not missed after hours of drawing.
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  done = evaluate("report", "digits", f"--output={output}", "--resamples=50")
  assert done.code == 0, done.err
  assert "There is no report.png: matplotlib is missing" in done.out
  assert not (output / "report.png").exists()


def test_the_docs_table_of_the_quickstarts_models_is_the_reports():
  docs = ROOT / "docs"
  kept = json.loads((docs / "results" / "quickstart_models.json").read_text())
  figures = {
    model["name"]: [suites.Figure(**figure) for figure in model["figures"]]
    for model in kept["models"]
  }
  text = report.markdown(kept["suite"], figures, [], kept["remarks"])
  table = "\n".join(line for line in text.splitlines() if line.startswith("|"))
  assert set(figures) == {"low", "high", "compressed", "compressed_random"}
  assert table in (docs / "evaluation.md").read_text()


def images_of(output, name):
  """Every image of a model by its name, as bytes."""
  return {
    path.name: path.read_bytes()
    for path in (output / "models" / name / "images").iterdir()
  }


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
  return tmp_path_factory.mktemp("drawn")


@pytest.fixture
def drawn_twice(evaluate, shared, tmp_path):
  """Two runs that have drawn and are scored; then one of them is trained again."""

  def command(directory):
    return (
      *("digits", f"--output={directory / 'evaluation'}", f"--per_task={PER_TASK}"),
      f"--checkpoints={directory / 'kept'},{directory / 'again'}",
      *("--resamples=0", *SAMPLE),
    )

  if not (shared / "evaluation").exists():
    save(shared / "kept", 20)
    save(shared / "again", 21)
    done = evaluate(*command(shared))
    assert done.code == 0, done.err
  directory = tmp_path / "drawn"
  shutil.copytree(shared, directory)
  shutil.rmtree(directory / "again")
  save(directory / "again", 22)
  return directory / "evaluation", command(directory)


def test_images_of_a_checkpoint_that_was_trained_again_are_refused(
  evaluate, drawn_twice
):
  output, command = drawn_twice
  before = images_of(output, "again")
  done = evaluate(*command)
  assert done.code == 1
  assert "holds images of another origin or other settings: origin.step is 21" in (
    done.err
  )
  assert "--redraw=stale" in done.err
  assert images_of(output, "again") == before


def test_stale_images_are_drawn_and_scored_again_and_no_others(
  evaluate, drawn_twice, tmp_path, caplog
):
  output, command = drawn_twice
  before = {name: images_of(output, name) for name in ("kept", "again")}
  done = evaluate(*command, "--redraw=stale")
  assert done.code == 0, done.err
  [said] = [m for m in caplog.messages if "are deleted and made anew" in m]
  assert f"Images of {output / 'models' / 'again'} are deleted" in said
  assert "origin.step is 21 there and 22 here" in said
  # Fresh is what a folder of its own would hold.
  fresh = tmp_path / "fresh"
  done = evaluate(*command, f"--output={fresh}")
  assert done.code == 0, done.err
  assert images_of(output, "kept") == before["kept"]
  assert images_of(output, "again") == images_of(fresh, "again")
  assert set(images_of(output, "again").values()).isdisjoint(before["again"].values())
  assert (output / "report.md").read_text() == (fresh / "report.md").read_text()
  # What is up to date is not drawn again.
  stat = (output / "models" / "again" / "images" / "00000.png").stat()
  done = evaluate(*command, "--redraw=stale")
  assert done.code == 0, done.err
  after = (output / "models" / "again" / "images" / "00000.png").stat()
  assert (after.st_ino, after.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)


def test_loras_and_further_models_decide_whether_images_are_drawn_again(
  evaluate, runs, tmp_path
):
  config = models.nano(caption_length=12)
  spec = lora(("qkv",))
  adapter = tmp_path / "style"
  write_lora(adapter, config, random_adapter(spec, models.random_params(config)), spec)
  output = tmp_path / "evaluation"
  done = evaluate("prompts", "digits", f"--output={output}", "--per_task=1")
  assert done.code == 0, done.err

  def draw(*more):
    return evaluate(
      *("sample", "digits", f"--output={output}", *SAMPLE, *more),
      f"--checkpoints=it={runs / 'low'}",
    )

  assert draw().code == 0
  plain = images_of(output, "it")
  refined = f"--refiner={runs / 'high'}", "--switch_at=500"
  weak = f"--autoguidance={runs / 'high'}", "--autoguidance_scale=2"
  seen = [plain]
  for more in (
    (f"--lora={adapter}:0.5",),
    (f"--lora={adapter}:0.6",),
    refined,
    (*refined, f"--refiner_lora={adapter}"),
    weak,
  ):
    done = draw(*more)
    assert done.code == 1
    assert "holds images of another origin or other settings: settings." in done.err
    assert draw("--redraw=stale", *more).code == 0
    drawn = images_of(output, "it")
    assert all(drawn != other for other in seen), more
    seen.append(drawn)
  # A LoRA that does not count is none.
  assert draw("--redraw=stale", f"--lora={adapter}:0").code == 0
  assert images_of(output, "it") == plain
  about = folder.open_folder(output).model("it").about["settings"]
  assert not {"loras", "refiner", "switch_at", "autoguidance"} & set(about)


def test_a_kill_amid_the_deletion_leaves_no_image_beside_anothers_name(
  evaluate, drawn_twice, monkeypatch
):
  output, command = drawn_twice
  about = output / "models" / "again" / "model.json"
  before = about.read_bytes()

  def kill(path, content):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(folder, "_write_json", kill)
    assert evaluate(*command, "--redraw=stale").code == 130
  assert about.read_bytes() == before
  assert folder.open_folder(output).model("again").missing()
  assert not (about.parent / "scores").exists()
  assert evaluate(*command).code == 1
  done = evaluate(*command, "--redraw=stale")
  assert done.code == 0, done.err
  assert json.loads(about.read_text())["origin"]["step"] == 22


def test_images_that_nobody_can_draw_again_are_never_deleted(evaluate, runs, tmp_path):
  output = tmp_path / "evaluation"
  done = evaluate("prompts", "digits", f"--output={output}", f"--per_task={PER_TASK}")
  drawn = renders(folder.open_folder(output).items, tmp_path / "drawn")
  done = evaluate("score", "digits", f"--output={output}", f"--images=low={drawn}")
  assert done.code == 0, done.err
  before = images_of(output, "low")
  done = evaluate(
    *("sample", "digits", f"--output={output}", f"--checkpoints={runs / 'low'}"),
    *("--redraw=stale", *SAMPLE),
  )
  assert done.code == 1
  assert "holds images of another origin" in done.err
  assert images_of(output, "low") == before


def test_checkpoints_of_one_architecture_share_their_programs(
  evaluate, runs, tmp_path, caplog
):
  caplog.set_level("INFO", logger="absl")
  # A batch that no other test here has: its programs are none of theirs.
  done = evaluate(
    *("digits", f"--output={tmp_path / 'evaluation'}", f"--per_task={PER_TASK}"),
    f"--checkpoints={runs / 'low'},{runs / 'high'}",
    *("--num_inference_steps=2", "--dtype=float32", "--batch_size=5"),
  )
  assert done.code == 0, done.err
  # One program for single digits, one for pairs of either shape: none for a checkpoint.
  assert len([m for m in caplog.messages if "Compiling the sampler" in m]) == 2


@pytest.mark.parametrize(
  ("checkpoints", "arguments", "message"),
  [
    ("low,nowhere", [], "There is no checkpoint at"),
    ("a=low,a=high", [], "two models called a"),
    ("low", ["--per_task=0"], "--per_task=0 must be at least 1"),
    ("low", ["--guidance_scale=-1"], "guidance_scale=-1.0 must be 0 or more"),
    ("low", ["--num_inference_steps=0"], "num_inference_steps=0 must be at least 1"),
    ("low", ["--batch_size=0"], "--batch_size=0 must be at least 1"),
    ("low", ["--lora=nowhere:2"], "There is no adapter at nowhere"),
    ("low", ["--refiner=high"], "switch_at=None go together"),
    ("low", ["--autoguidance_scale=2"], "give a weaker model and a scale above 1"),
  ],
)
def test_what_cannot_be_drawn_is_refused_before_weights_are_read(
  evaluate, runs, tmp_path, monkeypatch, checkpoints, arguments, message
):
  monkeypatch.setattr(Pipeline, "from_checkpoint", None)
  monkeypatch.chdir(runs)
  done = evaluate(
    *("digits", f"--output={tmp_path / 'new'}", f"--checkpoints={checkpoints}"),
    *arguments,
  )
  assert (done.code, done.out) == (1, "")
  assert done.err.count("\n") == 1
  assert message in done.err


def test_ctrl_c_says_how_far_it_came_and_the_same_command_draws_the_rest(
  evaluate, runs, tmp_path, monkeypatch
):
  output = tmp_path / "evaluation"
  command = (
    *("digits", f"--output={output}", f"--per_task={PER_TASK}", "--resamples=0"),
    f"--checkpoints={runs / 'low'}",
    *SAMPLE,
  )
  save_image, saved = image_files.save, []

  def interrupt(*arguments, **more):
    if len(saved) == 3:
      raise KeyboardInterrupt
    saved.append(arguments)
    save_image(*arguments, **more)

  with monkeypatch.context() as patch:
    patch.setattr(image_files, "save", interrupt)
    done = evaluate(*command)
  assert done.code == 130
  assert f"3 of {6 * PER_TASK} images of low are written" in done.err
  first = images_of(output, "low")
  assert len(first) == 3
  done = evaluate(*command)
  assert done.code == 0, done.err
  whole = images_of(output, "low")
  assert len(whole) == 6 * PER_TASK
  assert first.items() <= whole.items()


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (
      ["--checkpoints=a,b", "--task=digits", "--output=a.json"],
      "A task is a suite now: `evaluate digits --checkpoints=… --output=FOLDER`",
    ),
    ([], "Begin with a command or a suite: commands are prompts, "),
    (["digit"], "There is no command or suite 'digit'"),
  ],
)
def test_a_command_that_is_none_is_told_what_there_is(arguments, message):
  done = subprocess.run(
    [sys.executable, "-m", "pixsigma_jax.evaluate", *arguments],
    capture_output=True,
    text=True,
  )
  assert (done.returncode, done.stdout) == (1, "")
  assert done.stderr.count("\n") == 1
  assert message in done.stderr
