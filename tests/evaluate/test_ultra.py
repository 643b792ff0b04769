"""The suite `4k`, on images that are large beside their patches."""

import json

import numpy as np
import pytest
from PIL import Image

from pixsigma_jax.evaluate import items
from pixsigma_jax.evaluate.metrics import compression_ratio, glcm_score
from pixsigma_jax.evaluate.options import resolve
from pixsigma_jax.evaluate.suites import suite
from tests import commands
from tests.evaluate import networks

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
