"""Sample sets of a run, scored while they become whole."""

import dataclasses
import json
import logging
import types
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pixsigma_jax.evaluate import sample_sets, scoring, watch
from pixsigma_jax.evaluate.scorers import scorer_type
from pixsigma_jax.evaluate.scorers.texture import Texture
from tests import commands
from tests.evaluate import networks
from tests.sample import models
from tests.train.test_metrics import events

COUNT = 3
CAPTIONS = ("a cat", "a dog", "a cat and a dog")
small_inception = networks.small_inception


@pytest.fixture
def evaluate(capsys, monkeypatch):
  def evaluate(*arguments):
    return commands.run(capsys, monkeypatch, "evaluate", "watch", *arguments)

  return evaluate


@pytest.fixture
def workdir(tmp_path):
  """A run with one whole set, of step 10, and the images of another, of step 20."""
  draw(tmp_path / "run", 10)
  draw(tmp_path / "run", 20, whole=False)
  return tmp_path / "run"


def set_of(workdir, step):
  return workdir / "sample_sets" / f"{step:08d}"


def draw(workdir, step, *, seed=None, whole=True):
  """Draws a set as the trainer does."""
  folder = set_of(workdir, step)
  folder.mkdir(parents=True, exist_ok=True)
  random = np.random.default_rng(step if seed is None else seed)
  for i in range(COUNT):
    # Coarse, so that their bytes as PNG differ.
    pixels = random.integers(0, 256, (8, 8, 3), np.uint8)
    image = Image.fromarray(pixels).resize((72, 64), Image.Resampling.BICUBIC)
    image.save(folder / f"{i:06d}.png")
  if whole:
    finish(workdir, step)


def finish(workdir, step):
  lines = [
    json.dumps({"file": f"{i:06d}.png", "id": f"data/{i}", "caption": caption})
    for i, caption in enumerate(CAPTIONS)
  ]
  text = "".join(f"{line}\n" for line in lines)
  (set_of(workdir, step) / "captions.jsonl").write_text(text)


def scores(workdir, step) -> Any:
  """Figures of a set by name; None where it is not scored."""
  path = set_of(workdir, step) / "scores.json"
  if not path.exists():
    return None
  entries = json.loads(path.read_text())["scorers"]
  return {f["name"]: f for entry in entries.values() for f in entry["figures"]}


def shown(workdir):
  """What TensorBoard shows: a file that begins anew supersedes what came before."""
  values = {}
  for event in sorted(events(workdir, "evaluate"), key=lambda event: event.wall_time):
    if event.HasField("session_log"):
      values = {key: v for key, v in values.items() if key[0] < event.step}
    values |= {(event.step, v.tag): v.simple_value for v in event.summary.value}
  return values


def test_sets_are_scored_once_when_they_are_whole(
  evaluate, workdir, tmp_path, monkeypatch
):
  clip = networks.write_clip(tmp_path / "clip")
  asked = [workdir, "--once", "--scorers=clip", f"--clip={clip}"]
  done = evaluate(*asked)
  assert done.code == 0, done.err
  assert done.out.startswith("step 10: clip ")
  assert len(done.out.splitlines()) == 1
  figure = scores(workdir, 10)["clip"]
  assert scores(workdir, 20) is None

  # Another way to the same number.
  scorer: Any = scorer_type("clip").load({"clip": str(clip)})
  whole = sample_sets.read(set_of(workdir, 10))
  assert whole is not None
  rows = whole.rows
  assert [item.prompt for item, _, _ in rows] == list(CAPTIONS)
  images = [np.asarray(Image.open(path)) for _, _, path in rows]
  cosines = scorer(images, [item for item, _, _ in rows])["cosine"]
  assert figure["value"] == pytest.approx(cosines.mean(), abs=1e-5)
  assert cosines.min() - 1e-5 <= figure["low"] < figure["value"] < figure["high"]
  assert shown(workdir) == {
    (10, "clip"): pytest.approx(figure["value"]),
    (10, "clip/low"): pytest.approx(figure["low"]),
    (10, "clip/high"): pytest.approx(figure["high"]),
  }

  finish(workdir, 20)
  done = evaluate(*asked)
  assert done.out.startswith("step 20: clip ")
  assert len(done.out.splitlines()) == 1
  after = shown(workdir)
  assert after[20, "clip"] == pytest.approx(scores(workdir, 20)["clip"]["value"])
  assert after[10, "clip"] == pytest.approx(figure["value"])

  monkeypatch.setattr(scoring, "score_rows", pytest.fail)
  done = evaluate(*asked)
  assert (done.code, done.out) == (0, "")
  assert shown(workdir) == after


def test_a_set_is_at_no_distance_from_itself(
  evaluate, workdir, tmp_path, small_inception
):
  clip = networks.write_clip(tmp_path / "clip")
  asked = [
    workdir,
    "--once",
    "--scorers=fid,cmmd",
    f"--inception={networks.write_inception(tmp_path / 'inception.safetensors')}",
    f"--clip_cmmd={clip}",
    f"--references={set_of(workdir, 10)}",
  ]
  done = evaluate(*asked)
  assert done.code == 0, done.err
  kept = {
    path: path.stat().st_mtime_ns
    for path in (workdir / "sample_sets" / "references").iterdir()
  }
  assert sorted(path.name for path in kept) == ["cmmd.parquet", "fid.parquet"]
  own = scores(workdir, 10)
  assert own["fid"]["value"] == pytest.approx(0, abs=1e-3)
  assert own["cmmd"]["value"] == pytest.approx(0, abs=1e-6)

  finish(workdir, 20)
  done = evaluate(*asked)
  assert done.code == 0, done.err
  other = scores(workdir, 20)
  assert other["fid"]["value"] > 0.1
  assert other["cmmd"]["value"] > 1e-3
  assert shown(workdir)[20, "fid"] == pytest.approx(other["fid"]["value"])
  assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_it_waits_for_the_next_set_until_it_is_interrupted(
  evaluate, workdir, monkeypatch, caplog
):
  caplog.set_level(logging.INFO, logger="absl")
  slept = []

  def sleep(seconds):
    slept.append(seconds)
    if len(slept) == 2:
      finish(workdir, 20)
    if len(slept) == 4:
      raise KeyboardInterrupt

  monkeypatch.setattr(watch, "time", types.SimpleNamespace(sleep=sleep))
  done = evaluate(workdir, "--scorers=texture", "--poll_seconds=7")
  assert done.code == 130
  assert slept == [7.0] * 4
  assert [line.split(":")[0] for line in done.out.splitlines()] == [
    "step 10",
    "step 20",
  ]
  waiting = [message for message in caplog.messages if "waiting" in message]
  assert len(waiting) == 2  # each said once
  assert "waiting for 00000020 to be whole" in waiting[0]
  assert "2 sets" in waiting[1]
  assert done.err.splitlines()[-1].startswith(f"Interrupted: 2 sets of {workdir} are")


def test_another_scorer_joins_and_another_identity_replaces(workdir, caplog):
  def look(**scorers):
    watching = watch.Watch(workdir, scorers, [])
    watching.look()
    watching.close()

  look(texture=Texture(32))
  first = scores(workdir, 10)
  assert "seam-score" in first
  look(clip=ConstantCosine())
  assert scores(workdir, 10) == first | {"clip": scores(workdir, 10)["clip"]}
  assert "scored anew" not in caplog.text
  look(texture=Texture(16))
  assert "has texture of other weights" in caplog.text
  assert scores(workdir, 10)["seam-score"]["value"] != first["seam-score"]["value"]
  assert shown(workdir)[10, "clip"] == 0.5


@dataclasses.dataclass
class ConstantCosine:
  """A scorer whose numbers are known; it can do something meanwhile."""

  meanwhile: Any = None
  batch_size: int = 2

  def identity(self):
    return {"weights": "none"}

  def schema(self):
    return pa.schema([("cosine", pa.float32())])

  def __call__(self, images, items):
    if self.meanwhile is not None:
      self.meanwhile()
    return {"cosine": np.full(len(images), 0.5, np.float32)}


def test_sets_of_steps_that_a_run_goes_back_from_are_forgotten(workdir):
  finish(workdir, 20)
  watching = watch.Watch(workdir, {"texture": Texture(32)}, [])
  watching.look()
  before = shown(workdir)
  assert {step for step, _ in before} == {10, 20}
  (set_of(workdir, 20) / "captions.jsonl").unlink()
  watching.look()
  assert {step for step, _ in shown(workdir)} == {10}
  draw(workdir, 20, seed=5)
  watching.look()
  watching.close()
  after = shown(workdir)
  assert after[20, "glcm-score"] == pytest.approx(
    scores(workdir, 20)["glcm-score"]["value"]
  )
  assert after[20, "glcm-score"] != before[20, "glcm-score"]
  assert after[10, "glcm-score"] == before[10, "glcm-score"]


def test_a_look_reads_only_what_changed_since_the_last_one(workdir, monkeypatch):
  read, asked = sample_sets.read, []

  def counted(path):
    asked.append(int(path.name))
    return read(path)

  monkeypatch.setattr(sample_sets, "read", counted)
  watching = watch.Watch(workdir, {"texture": Texture(32)}, [])
  watching.look()
  watching.look()  # its own scores.json is new to it
  asked.clear()
  watching.look()
  assert asked == [20]  # it is not whole
  finish(workdir, 20)
  watching.look()
  assert set(watching.scored) == {10, 20}
  watching.look()
  asked.clear()
  watching.look()
  assert asked == []
  # As a run that goes back: the same folder, other images.
  before = scores(workdir, 10)
  (set_of(workdir, 10) / "captions.jsonl").unlink()
  watching.look()
  assert set(watching.scored) == {20}
  draw(workdir, 10, seed=99)
  watching.look()
  watching.close()
  assert set(watching.scored) == {10, 20}
  assert scores(workdir, 10) != before


def test_a_set_that_changes_while_it_is_scored_keeps_no_scores(workdir, caplog):
  captions = set_of(workdir, 10) / "captions.jsonl"
  watching = watch.Watch(
    workdir, {"clip": ConstantCosine(lambda: captions.unlink(missing_ok=True))}, []
  )
  watching.look()
  assert "its run went back" in caplog.text
  assert scores(workdir, 10) is None
  assert watching.scored == {}
  watching.close()


def test_a_set_that_lacks_an_image_is_refused(evaluate, workdir):
  (set_of(workdir, 10) / "000001.png").unlink()
  done = evaluate(workdir, "--once", "--scorers=texture")
  assert done.code == 1
  assert "lacks 1 of 3 images (000001.png)" in done.err


def test_damaged_scores_are_refused(evaluate, workdir):
  path = set_of(workdir, 10) / "scores.json"
  path.write_text('{"scorers": {"clip": 3}}')
  done = evaluate(workdir, "--once", "--scorers=texture")
  assert done.code == 1
  assert f"{path} is damaged" in done.err


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--scorers=clap"], "there is no 'clap' here, only clip, texture"),
    (["--scorers=texture,fid"], "fid compares with other images: give --references"),
    (["--scorers=texture", "--references=."], "--references=. is for fid, fid-clean"),
    (["--scorers=fid", "--references=nowhere"], "--references=nowhere is no folder"),
    (["--scorers=fid", "--references=DIR"], "Give --inception=FILE"),
    (["--scorers=clip", "--clip=nowhere/at/all"], "nowhere/at/all"),
    (["--scorers=texture", "--poll_seconds=0"], "--poll_seconds=0.0 must be more"),
  ],
)
def test_what_cannot_be_is_refused_before_any_work(evaluate, workdir, flags, message):
  flags = [flag.replace("DIR", str(set_of(workdir, 10))) for flag in flags]
  done = evaluate(workdir, *flags)
  assert done.code == 1
  assert message in done.err
  assert len(done.err.splitlines()) == 1
  assert scores(workdir, 10) is None
  assert not (workdir / "tensorboard").exists()


def test_a_place_without_sets_is_refused(evaluate, tmp_path):
  done = evaluate(tmp_path / "gone", "--scorers=texture")
  assert (done.code, "is no directory" in done.err) == (1, True)
  done = evaluate(tmp_path, "--scorers=texture")
  assert (done.code, "neither sample_sets/ nor run.json" in done.err) == (1, True)
  (tmp_path / "run.json").write_text("{}")
  done = evaluate(tmp_path, "--scorers=texture", "--once")
  assert (done.code, "is whole yet" in done.err) == (1, True)


def test_a_run_that_draws_no_sets_is_refused(evaluate, tmp_path):
  config = models.nano(caption_length=9)
  entry = {"config": {"log": {"sample_set": {"every": 0, "count": 0}}}}
  models.save_snapshot(tmp_path, config, 3, provenance=(entry,))
  (tmp_path / "run.json").write_text("{}")
  done = evaluate(tmp_path, "--scorers=texture")
  assert done.code == 1
  assert "draws no sample sets: train it with config.log.sample_set.every" in done.err
