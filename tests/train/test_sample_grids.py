"""Sets of samples are written at a cost that does not grow with their number."""

import os

import pytest
from PIL import Image

from pixsigma_jax import disk
from pixsigma_jax.sample.pipeline import Pipeline
from pixsigma_jax.train import sample_grids


class Sampler(Pipeline):
  """Images without a model."""

  def __init__(self):
    pass

  def stream(self, prompt, **settings):
    return iter([(number, Image.new("RGB", (8, 8)), {}) for number in (0, 2, 1)])


@pytest.fixture
def sample_set():
  made = object.__new__(sample_grids.SampleSet)
  made._prompts, made._ids = ["a", "b", "c"], ["1", "2", "3"]
  made._sizes = [(8, 8)] * 3
  return made


def test_a_folder_of_samples_is_looked_through_once_and_not_for_each(
  sample_set, tmp_path, monkeypatch
):
  left = tmp_path / "000001.png.0a1b2c3d.partial"  # of a process of long ago
  left.write_text("half")
  os.utime(left, (0, 0))
  looks = []
  look = disk.remove_abandoned
  monkeypatch.setattr(
    disk, "remove_abandoned", lambda *given: looks.append(given) or look(*given)
  )
  sample_set._write(Sampler(), tmp_path)
  assert looks == [(tmp_path,), (tmp_path, "captions.jsonl")]
  names = [f"{number:06d}.png" for number in range(3)]
  assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "captions.jsonl"]
