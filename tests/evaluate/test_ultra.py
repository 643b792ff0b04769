"""The suite `4k`, on images that are large beside their patches."""

import dataclasses
import json
import tracemalloc

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from pixsigma_jax.evaluate import items, scoring
from pixsigma_jax.evaluate.items import Item
from pixsigma_jax.evaluate.metrics import compression_ratio, glcm_score
from pixsigma_jax.evaluate.options import resolve
from pixsigma_jax.evaluate.scorers import scorer_type, texture
from pixsigma_jax.evaluate.scorers.inception import PatchFeatures
from pixsigma_jax.evaluate.scorers.texture import Texture
from pixsigma_jax.evaluate.suites import suite
from pixsigma_jax.sample import image_files
from pixsigma_jax.sample.pipeline import Pipeline
from tests import commands
from tests.evaluate import networks
from tests.evaluate.suites import whole
from tests.sample import models

SIDES = (300, 320)  # height, width
small_inception = networks.small_inception


def scene(seed, rough):
  """Waves, with noise where detail is wanted."""
  random = np.random.default_rng(seed)
  rows, columns = np.mgrid[: SIDES[0], : SIDES[1]] / 40
  waves = np.sin(rows * (1 + seed)) + np.cos(columns)
  noise = rough * random.normal(size=(*SIDES, 3))
  return np.clip(128 + 40 * waves[..., None] + noise, 0, 255).astype(np.uint8)


def write(directory, rough, seeds=range(2)):
  directory.mkdir()
  for i, seed in enumerate(seeds):
    Image.fromarray(scene(seed, rough)).save(directory / f"{i:05d}.png")
  return directory


@pytest.fixture
def prompts(tmp_path):
  write(tmp_path / "real", 12)
  path = tmp_path / "prompts.jsonl"
  lines = [{"prompt": f"waves {i}", "reference": f"real/{i:05d}.png"} for i in range(2)]
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return path


def test_detail_is_told_from_blur(
  prompts, small_inception, tmp_path, capsys, monkeypatch
):
  inception = networks.write_inception(tmp_path / "inception.safetensors")
  done = commands.run(
    capsys,
    monkeypatch,
    "evaluate",
    "prompts",
    "4k",
    f"--prompts_file={prompts}",
    f"--output={tmp_path / 'evaluation'}",
    f"--height={SIDES[0]}",
    f"--width={SIDES[1]}",
  )
  assert done.code == 0, done.err
  sharp, soft = write(tmp_path / "sharp", 13), write(tmp_path / "soft", 1)
  images = f"sharp={sharp},soft={soft},real={tmp_path / 'real'}"
  for step, flags in [
    (
      "score",
      [
        f"--images={images}",
        "--scorers=texture,fid-patch",
        f"--inception={inception}",
        "--seam_period=64",
      ],
    ),
    ("report", ["--resamples=20", "--distance_resamples=0"]),
  ]:
    done = commands.run(
      capsys,
      monkeypatch,
      "evaluate",
      step,
      "4k",
      f"--output={tmp_path / 'evaluation'}",
      *flags,
    )
    assert done.code == 0, done.err
  report = json.loads((tmp_path / "evaluation" / "report.json").read_text())
  found = {
    m["name"]: {f["name"]: f["value"] for f in m["figures"]} for m in report["models"]
  }
  # Equal positions: the references' own patches are at no distance.
  assert found["real"]["fid-patch"] == pytest.approx(0, abs=1e-6)
  assert found["sharp"]["fid-patch"] < found["soft"]["fid-patch"]
  ours = [scene(seed, 13) for seed in range(2)]
  assert found["sharp"]["glcm-score"] == pytest.approx(
    np.mean([glcm_score(image) for image in ours])
  )
  assert found["sharp"]["compression-ratio"] == pytest.approx(
    compression_ratio(ours), rel=1e-6
  )
  for figure in ("glcm-entropy", "high-frequency-share"):
    assert found["sharp"][figure] > found["soft"][figure]
  assert abs(found["sharp"]["seam-score"] - 1) < 0.1


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ({"prompt": "a", "size": 3}, "prompt 1 has 'size': known are"),
    ({"text": "a"}, "has 'text': known are"),
    ({"prompt": 3}, "has no prompt"),
    ({"prompt": "a", "height": 200}, "is 200 x 4096 .*at least 299"),
    ({"prompt": "a", "reference": "gone.png"}, "The reference .*gone.png is not there"),
    ({"prompt": "a", "reference": "small.png"}, "small.png is 8 x 8: no patch"),
  ],
)
def test_prompts_that_cannot_be_drawn_or_compared_are_refused(line, message, tmp_path):
  Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
  path = tmp_path / "prompts.jsonl"
  path.write_text(json.dumps(line))
  of = suite("4k")
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    of.items(resolve(of.options, {"prompts_file": str(path)}))


def test_duplicate_prompts_are_refused(tmp_path):
  path = tmp_path / "prompts.jsonl"
  path.write_text('{"prompt": "a", "seed": 3}\n{"prompt": "a", "seed": 3}\n')
  of = suite("4k")
  found = of.items(resolve(of.options, {"prompts_file": str(path)}))
  with pytest.raises(ValueError, match="00000 and 00001 are the same prompt 'a'"):
    items.check(found)


LARGE = 320  # pixels a side, of which a token of `large_tokens` has 16


@pytest.fixture
def run(tmp_path):
  """An untrained model whose few tokens make an image of 320 x 320."""
  config = dataclasses.replace(
    models.nano(caption_length=12), patch_size=16, base_size=LARGE // 16
  )
  models.save_snapshot(tmp_path / "run", config, 10, seed=1, resolution=LARGE)
  return tmp_path / "run"


@pytest.fixture
def step(prompts, tmp_path, capsys, monkeypatch):
  def step(code, *arguments):
    output = f"--output={tmp_path / 'evaluation'}"
    done = commands.run(capsys, monkeypatch, "evaluate", *arguments, output)
    assert done.code == code, done.err
    return done.err

  return step


def test_from_a_checkpoint_to_a_report_killed_and_resumed(
  prompts, run, step, small_inception, tmp_path, monkeypatch
):
  inception = networks.write_inception(tmp_path / "inception.safetensors")
  everything = [
    *("4k", f"--prompts_file={prompts}", f"--height={LARGE}", f"--width={LARGE}"),
    *(f"--checkpoints={run}", "--num_inference_steps=2", "--dtype=float32"),
    *("--scorers=texture,fid-patch,fid", f"--inception={inception}"),
    *("--seam_period=64", "--resamples=20", "--distance_resamples=2"),
  ]
  monkeypatch.setattr(scoring, "ITEMS_PER_PART", 1)
  output = tmp_path / "evaluation"
  whole.interrupt(monkeypatch, image_files, "save", after=1)
  step(130, *everything)
  begun = whole.images(output, "run")
  assert len(begun) == 1
  # One of texture; then the first of a model's patches, behind the references' two.
  for owner, done in ((Texture, 1), (PatchFeatures, 2)):
    whole.interrupt(monkeypatch, owner, "__call__", after=done)
    step(130, *everything)
  scored = {path: path.stat().st_mtime_ns for path in output.rglob("*.parquet")}
  assert len(scored) == 2 + 2
  assert not (output / "report.json").exists()
  step(0, *everything)
  assert begun.items() < whole.images(output, "run").items()
  after = {path: path.stat().st_mtime_ns for path in output.rglob("*.parquet")}
  assert scored.items() < after.items()
  [model] = json.loads((output / "report.json").read_text())["models"]
  values = {figure["name"]: figure["value"] for figure in model["figures"]}
  assert list(values) == [
    *("fid-patch", "fid", "glcm-score", "glcm-entropy", "compression-ratio"),
    *("high-frequency-share", "seam-score"),
  ]
  assert values["fid-patch"] > 1e-3
  assert {figure["basis"]["images"] for figure in model["figures"]} == {"2"}


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ([], "Give --inception=FILE"),
    (["--inception={}/nowhere.pth"], "nowhere.pth: no such file"),
    (["--inception={}/foreign.safetensors"], "These are not the weights of Inception"),
    (["--inception={}/good.safetensors", "--images=theirs={}/real"], "another size"),
    (["--inception={}/good.safetensors", "--images=theirs={}/one"], "lacks 00001"),
    (["--inception={}/good.safetensors", "--scorers=fid,none"], "there is no 'none'"),
  ],
)
def test_what_cannot_be_scored_is_told_before_anything_is_drawn(
  flags, message, prompts, run, step, small_inception, tmp_path, monkeypatch
):
  networks.write_inception(tmp_path / "good.safetensors")
  save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "foreign.safetensors")
  write(tmp_path / "one", 12, seeds=range(1))
  monkeypatch.setattr(Pipeline, "from_checkpoint", None)
  said = step(
    *(1, "4k", f"--prompts_file={prompts}", f"--height={LARGE}", f"--width={LARGE}"),
    *("--scorers=fid", f"--checkpoints={run}"),
    *(flag.format(tmp_path) for flag in flags),
  )
  assert said.count("\n") == 1
  assert message in said


def test_memory_does_not_grow_with_the_number_of_large_images(
  small_inception, tmp_path, monkeypatch
):
  for name in ("glcm_score", "glcm_entropy"):  # a patch at a time, for seconds
    monkeypatch.setattr(texture, name, lambda _: 0.0)
  side = 1024
  random = np.random.default_rng(0)
  rows = []
  for i in range(13):
    pixels = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"{i}.png", compress_level=0)
    item = Item(id=str(i), prompt="a", height=side, width=side)
    rows.append((item, 0, tmp_path / f"{i}.png"))
  path = networks.write_inception(tmp_path / "inception.safetensors")
  options = {"inception": str(path), "seam_period": 512}
  for name in ("texture", "fid-patch"):
    scorer = scorer_type(name).load(options)
    schema = scoring.schema_of(scorer, {})
    scoring.score_rows(rows[:1], scorer, schema)  # compiled
    most = []
    for count in (3, 13):
      tracemalloc.start()
      scoring.score_rows(rows[:count], scorer, schema)
      most.append(tracemalloc.get_traced_memory()[1])
      tracemalloc.stop()
    # The next is read while one is scored: chance decides which of their arrays meet.
    assert most[1] < most[0] + 3 * (3 * side * side)
