"""The suite `geneval`: its prompts, its scores by hand, and all steps to a report."""

import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pixsigma_jax.evaluate import scoring
from pixsigma_jax.evaluate.geneval import PROMPTS, TASKS
from pixsigma_jax.evaluate.items import Item
from pixsigma_jax.evaluate.scorers import mask2former
from pixsigma_jax.evaluate.scorers.detectors import DetectionScorer
from pixsigma_jax.evaluate.suites import ScoredModel
from pixsigma_jax.evaluate.suites.geneval import SUITE
from pixsigma_jax.sample import image_files
from tests import commands
from tests.evaluate import networks
from tests.evaluate.scorers.test_mask2former import write_mask2former
from tests.evaluate.suites import whole


def clause(name, count=1, **more):
  return {"class": name, "count": count, **more}


# A prompt of each task, in the form of evaluation_metadata.jsonl.
METADATA = [
  {
    "tag": "single_object",
    "include": [clause("bench")],
    "prompt": "a photo of a bench",
  },
  {
    "tag": "two_object",
    "include": [clause("cat"), clause("tv remote")],
    "prompt": "a photo of a cat and a tv remote",
  },
  {
    "tag": "counting",
    "include": [clause("clock", 2)],
    "exclude": [clause("clock", 3)],
    "prompt": "a photo of two clocks",
  },
  {
    "tag": "colors",
    "include": [clause("car", color="pink")],
    "prompt": "a photo of a pink car",
  },
  {
    "tag": "position",
    "include": [clause("dog"), clause("tie", position=["right of", 0])],
    "prompt": "a photo of a tie right of a dog",
  },
  {
    "tag": "color_attr",
    "include": [clause("cup", color="red"), clause("bowl", color="blue")],
    "prompt": "a photo of a red cup and a blue bowl",
  },
]


def thing(name, x=50, *, confidence=0.95, color=None):
  return {
    "name": name,
    "box": [x - 10, 40, x + 10, 60],
    "confidence": confidence,
    "color": color,
  }


RIGHT = {
  "single_object": [thing("bench")],
  "two_object": [thing("cat"), thing("tv remote", 90)],
  "counting": [thing("clock"), thing("clock", 90)],
  "colors": [thing("car", color="pink")],
  "position": [thing("dog"), thing("tie", 120)],
  "color_attr": [thing("cup", color="red"), thing("bowl", 90, color="blue")],
}
# One rule of each task broken.
WRONG = {
  "single_object": [thing("bench", confidence=0.29)],
  "two_object": [thing("cat")],
  "counting": [thing("clock"), thing("clock", 90), thing("clock", 130)],
  "colors": [thing("car", color="red")],
  "position": [thing("dog", 120), thing("tie")],
  "color_attr": [thing("cup", color="blue"), thing("bowl", 90, color="red")],
}


def write_lines(path, lines):
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return path


@pytest.fixture
def metadata(tmp_path):
  return write_lines(tmp_path / "evaluation_metadata.jsonl", METADATA)


def options(path, **values):
  return {"metadata": str(path), "images_per_prompt": 4, "first_seed": 0} | values


def scored(items, right_of_task, copies=4):
  """A model of which so many images of each prompt of a task are right."""
  rows = []
  for item in items:
    task = item.data["tag"]
    for image in range(copies):
      found = RIGHT if image < right_of_task[task] else WRONG
      rows.append({"id": item.id, "image": image, "detections": found[task]})
  identity = {b"identity": json.dumps({"detector": "hand"}).encode()}
  table = pa.Table.from_pylist(rows).replace_schema_metadata(identity)
  return ScoredModel(
    name="ours",
    items=tuple(items),
    images_per_item=copies,
    options={},
    read=lambda _scorer, _references: table,
    resamples=100,
  )


def test_prompts_are_the_lines_with_seeds_of_their_own(metadata):
  found = SUITE.items(options(metadata, first_seed=7))
  assert found.images_per_item == 4
  assert [item.id for item in found.items] == [f"0000{i}" for i in range(6)]
  assert [item.prompt for item in found.items] == [line["prompt"] for line in METADATA]
  assert [dict(item.data) for item in found.items] == METADATA
  drawn = [item.seed + j for item in found.items for j in range(4)]
  assert drawn == list(range(7, 7 + 24))
  assert list(found.sources) == [str(metadata)]


def test_the_overall_score_is_the_mean_of_tasks_not_of_images(tmp_path):
  # Three prompts of one task weigh no more than one of another.
  path = write_lines(tmp_path / "more.jsonl", [METADATA[0], METADATA[0], *METADATA])
  items = SUITE.items(options(path)).items
  right = dict(zip(TASKS, (4, 3, 2, 1, 0, 4), strict=True))
  figures = {f.name: f for f in SUITE.figures(scored(items, right))}
  assert list(figures) == ["overall", *TASKS]
  for task, count in right.items():
    assert figures[task].value == count / 4
  assert figures["overall"].value == pytest.approx((4 + 3 + 2 + 1 + 0 + 4) / 24)
  assert figures["overall"].low <= figures["overall"].value <= figures["overall"].high
  assert "3 of 80 single_object, 1 of 99 two_object" in figures["overall"].note


def test_the_published_set_bears_no_note_and_stands_beside_published_numbers():
  lines = {line["tag"]: line for line in METADATA}
  items = [
    Item(f"{task}{i}", lines[task]["prompt"], seed=4 * i, data=lines[task])
    for task, count in PROMPTS.items()
    for i in range(count)
  ]
  figures = SUITE.figures(scored(items, dict.fromkeys(TASKS, 4)))
  assert {figure.note for figure in figures} == {""}
  assert figures[0].basis["prompts"] == "553"
  assert figures[0].basis["images"] == "2212"
  [ours] = [p for p in SUITE.published if p.model == "PixArt-Σ"]
  assert (ours.figure, ours.value) == ("overall", 0.53)
  # Whoever publishes six tasks publishes their mean.
  for model in {p.model for p in SUITE.published if p.figure == "colors"}:
    values = {p.figure: p.value for p in SUITE.published if p.model == model}
    mean = np.mean([values[task] for task in TASKS])
    assert values["overall"] == pytest.approx(mean, abs=0.01)  # both are rounded


LINES_WITHOUT_SENSE = {
  "tag": ({"tag": "texture"}, r"its tag is 'texture', none of single_object, two_obj"),
  "prompt": ({"prompt": " "}, r"it has no text `prompt`"),
  "nothing": ({"include": []}, r"it has no list `include`"),
  "class": ({"include": [clause("mouse")]}, r"no class of COCO's 80, by GenEval's n"),
  "count": ({"include": [clause("cat", 0)]}, r"no count of at least 1"),
  "color": ({"include": [clause("cat", color="mauve")]}, r"a color that is none of re"),
  "relation": (
    {"include": [clause("cat"), clause("dog", position=["near", 0])]},
    r"the position \['near', 0\]: a relation \(left of, ",
  ),
  "target": (
    {"include": [clause("dog", position=["above", 0])]},
    r"the number of an earlier clause",
  ),
}


@pytest.mark.parametrize("case", LINES_WITHOUT_SENSE)
def test_a_line_without_sense_is_named(tmp_path, case):
  fields, message = LINES_WITHOUT_SENSE[case]
  path = write_lines(tmp_path / "bad.jsonl", [METADATA[0], METADATA[1] | fields])
  with pytest.raises(ValueError, match=rf"bad\.jsonl:2 is no prompt .*{message}"):
    SUITE.items(options(path))


def test_says_where_prompts_come_from(tmp_path):
  with pytest.raises(
    ValueError, match=r"give --metadata=FILE, the prompts/evaluation_"
  ):
    SUITE.items(options("x", metadata=None))
  with pytest.raises(FileNotFoundError, match="no GenEval metadata at "):
    SUITE.items(options(tmp_path / "none.jsonl"))
  with pytest.raises(ValueError, match="--images_per_prompt=0 must be at least 1"):
    SUITE.items(options("x", images_per_prompt=0))


# From here on, the command.


@pytest.fixture
def evaluate(capsys, monkeypatch):
  def evaluate(*arguments):
    return commands.run(capsys, monkeypatch, "evaluate", *arguments)

  return evaluate


def write_images(folder, copies=2):
  folder.mkdir()
  for i in range(len(METADATA)):
    for j in range(copies):
      color = (40 * i, 100 * j, 90)
      Image.new("RGB", (32, 24), color).save(folder / f"0000{i}_{j}.png")
  return folder


def detection_lines(right, copies=2):
  """Lines in which the first `right` images of each prompt are right."""
  return [
    {
      "id": f"0000{i}",
      "image": j,
      "detections": (RIGHT if j < right else WRONG)[line["tag"]],
    }
    for i, line in enumerate(METADATA)
    for j in range(copies)
  ]


@pytest.fixture
def step(evaluate, metadata, tmp_path):
  """`evaluate STEP geneval` with everything but the detections."""
  images = write_images(tmp_path / "drawn")
  output = tmp_path / "evaluation"

  def step(name, *arguments):
    common = [f"--output={output}"]
    if name == "prompts":
      common += [f"--metadata={metadata}", "--images_per_prompt=2"]
    if name == "score":
      common += [f"--images=a={images},b={images}", "--any_size"]
    return evaluate(name, "geneval", *common, *arguments)

  assert step("prompts").code == 0
  return step


def test_detections_of_files_are_judged_by_model(step, tmp_path):
  a = write_lines(tmp_path / "a.jsonl", detection_lines(2))
  b = write_lines(tmp_path / "b.jsonl", detection_lines(1)[::-1])  # in any order
  done = step("score", f"--detections=a={a},b={b}")
  assert done.code == 0, done.err
  done = step("report", "--resamples=20")
  assert done.code == 0, done.err
  report = json.loads((tmp_path / "evaluation" / "report.json").read_text())
  values = {
    model["name"]: {f["name"]: f["value"] for f in model["figures"]}
    for model in report["models"]
  }
  assert values["a"] == dict.fromkeys(["overall", *TASKS], 1.0)
  assert values["b"] == dict.fromkeys(["overall", *TASKS], 0.5)
  assert any("leaderboard of GenEval" in remark for remark in report["remarks"])
  assert "0.53" in (tmp_path / "evaluation" / "report.md").read_text()

  # Other detections of a model take the place of those before.
  write_lines(b, detection_lines(0))
  assert step("score", f"--detections=a={a},b={b}").code == 0
  assert step("report", "--resamples=0").code == 0
  report = json.loads((tmp_path / "evaluation" / "report.json").read_text())
  assert report["models"][1]["figures"][0]["value"] == 0


BAD_FILES = {
  "an image short": (
    lambda lines: lines[:-1],
    r"of 11 of 12 images of a: it lacks 000",
  ),
  "an image too many": (
    lambda lines: [*lines, {"id": "00009", "image": 0, "detections": []}],
    r"images that a does not have: 00009 image 0",
  ),
  "an image twice": (lambda lines: [*lines, lines[0]], r"two lines of 00000 image 0"),
  "no image number": (
    lambda lines: [{"id": "00000", "detections": []}],
    r"line 1: give id, image \(a number\) and a list of detections",
  ),
  "a field too few": (
    lambda lines: [lines[0] | {"detections": [{"name": "cat"}]}],
    r"00000 image 0: \{'name': 'cat'\} must have name, box and confidence",
  ),
  "COCO's own name": (
    lambda lines: [lines[0] | {"detections": [thing("remote")]}],
    r"no class 'remote': it knows 'tv remote'",
  ),
  "half a box": (
    lambda lines: [lines[0] | {"detections": [thing("cat") | {"box": [1, 2]}]}],
    r"the box of a cat must be left, top, right and bottom, not \[1, 2\]",
  ),
  "per cent": (
    lambda lines: [lines[0] | {"detections": [thing("cat", confidence=95)]}],
    r"the confidence of a cat must lie in 0 … 1, not be 95",
  ),
  "a color of its own": (
    lambda lines: [lines[0] | {"detections": [thing("cat", color="mauve")]}],
    r"GenEval has no color 'mauve': red, orange",
  ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_does_not_fit_is_refused(step, tmp_path, case):
  change, message = BAD_FILES[case]
  path = write_lines(tmp_path / "bad.jsonl", change(detection_lines(2)))
  done = step("score", f"--detections=a={path},b={path}")
  assert done.code == 1
  assert re.search(message, done.err), done.err
  assert not list((tmp_path / "evaluation").rglob("*.parquet"))


def test_every_model_needs_its_detections(step, tmp_path):
  path = write_lines(tmp_path / "a.jsonl", detection_lines(2))
  done = step("score", f"--detections=a={path}")
  assert done.code == 1
  assert "no detections of b, only of a: give --detections=b=FILE too" in done.err
  done = step("score", f"--detections={path}")
  assert done.code == 1
  assert "give NAME=FILE" in done.err
  done = step("score", "--detections=a=no/such")
  assert done.code == 1
  assert "There is no file of detections at no/such" in done.err


def test_images_in_genevals_own_folders_go_to_their_prompts(evaluate, step, tmp_path):
  own, output = tmp_path / "own", tmp_path / "evaluation"
  for i in range(6):
    (own / f"{i:05d}" / "samples").mkdir(parents=True)
    for j in range(2):
      image = Image.new("RGB", (32, 24), (i, j, 0))
      image.save(own / f"{i:05d}" / "samples" / f"{j:04d}.png")
  path = write_lines(tmp_path / "a.jsonl", detection_lines(2))
  done = evaluate(
    *("score", "geneval", f"--output={output}", "--any_size"),
    *(f"--images=own={own}", f"--detections=own={path}"),
  )
  assert done.code == 0, done.err
  for i in range(6):
    for j in range(2):
      with Image.open(output / "models/own/images" / f"0000{i}_{j}.png") as image:
        assert image.getpixel((0, 0)) == (i, j, 0)


def test_colors_that_nobody_looked_at_are_missed_with_their_image(step, tmp_path):
  lines = detection_lines(2)
  for line in lines:
    line["detections"] = [each | {"color": None} for each in line["detections"]]
  path = write_lines(tmp_path / "a.jsonl", lines)
  assert step("score", f"--detections=a={path},b={path}").code == 0
  done = step("report")
  assert done.code == 1
  assert "Image 0 of prompt 00003 (a): The prompt asks for a pink car" in done.err


def test_from_a_checkpoint_to_a_report_killed_and_resumed(
  evaluate, monkeypatch, metadata, tmp_path
):
  pytest.importorskip("torch")
  monkeypatch.setattr(scoring, "ITEMS_PER_PART", 2)
  monkeypatch.setattr(mask2former, "_SHORT", 64)
  detector = write_mask2former(tmp_path / "mask2former")
  clip = networks.write_clip(tmp_path / "clip")
  run = whole.write_checkpoint(tmp_path)
  sample = [
    *(f"--checkpoints={run}", "--num_inference_steps=2", "--dtype=float32"),
    "--batch_size=4",
  ]
  score = [f"--detector={detector}", f"--color_clip={clip}"]
  output = tmp_path / "evaluation"

  def run_to(code, name, *words, output=output):
    done = evaluate(name, "geneval", *words, f"--output={output}")
    assert done.code == code, done.err

  run_to(0, "prompts", f"--metadata={metadata}", "--images_per_prompt=2")
  whole.interrupt(monkeypatch, image_files, "save", after=5)
  run_to(130, "sample", *sample)
  begun = whole.images(output, "untrained")
  assert len(begun) == 5
  run_to(0, "sample", *sample)
  images = whole.images(output, "untrained")
  assert len(set(images.values())) == 12  # a seed of its own for each
  assert begun.items() < images.items()

  other = shutil.copytree(output, tmp_path / "uninterrupted")
  whole.interrupt(monkeypatch, DetectionScorer, "__call__", after=6)
  run_to(130, "score", *score)
  [part] = output.rglob("detections/*.parquet")
  before = part.stat().st_mtime_ns
  run_to(0, "score", *score)
  assert part.stat().st_mtime_ns == before
  run_to(0, "score", *score, output=other)
  [ours, theirs] = (
    whole.scores(path, "untrained", "detections")["detections"]
    for path in (output, other)
  )
  assert ours.equals(theirs)
  assert any(ours["detections"].to_pylist())  # the untrained detector sees things

  run_to(0, "report", "--resamples=20")
  [model] = json.loads((output / "report.json").read_text())["models"]
  assert [figure["name"] for figure in model["figures"]] == ["overall", *TASKS]
