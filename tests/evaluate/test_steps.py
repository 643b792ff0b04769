"""The four steps of a suite, from checkpoints to a report, whole and interrupted."""

import json
import sys

import pytest
from PIL import Image

from pixsigma_jax.data import digits
from pixsigma_jax.evaluate import folder
from pixsigma_jax.sample import pictures
from tests import commands
from tests.sample import models

PER_TASK = 2
SAMPLE = ["--num_inference_steps=2", "--dtype=float32", "--batch_size=6"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Two runs of one architecture, untrained."""
  config = models.nano(caption_length=12)
  directory = tmp_path_factory.mktemp("runs")
  for step, name in enumerate(("low", "high"), 10):
    models.save_snapshot(
      directory / name, config, step, seed=step, stage=f"stage/{name}"
    )
  return directory


@pytest.fixture
def evaluate(capsys, monkeypatch):
  def evaluate(*arguments):
    return commands.run(capsys, monkeypatch, "evaluate", *arguments)

  return evaluate


def renders(items, directory):
  """Pictures that follow every prompt, named by id."""
  directory.mkdir()
  for item in items:
    scene = digits.parse(item.prompt)
    glyphs = [digits.handwriting("reader", each.digit)[0] for each in scene.items]
    picture = pictures.to_picture(digits.render(scene, glyphs, 8))
    picture.save(directory / f"{item.id}.png")
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
