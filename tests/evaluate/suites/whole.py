"""Whole suites: a tiny checkpoint to evaluate, and an interruption half way."""

from pixsigma_jax.evaluate import folder, scoring
from tests.sample import models


def write_checkpoint(directory, name="untrained"):
  """An untrained model of 8 x 8 pixels."""
  models.save_snapshot(directory / name, models.nano(caption_length=12), 10, seed=1)
  return directory / name


def interrupt(monkeypatch, owner, name, after):
  """Presses Ctrl-C when a function of `owner` is called the next time but `after`."""
  function, calls = getattr(owner, name), []

  def called(*arguments, **options):
    calls.append(name)
    if len(calls) > after:
      monkeypatch.setattr(owner, name, function)
      raise KeyboardInterrupt
    return function(*arguments, **options)

  monkeypatch.setattr(owner, name, called)


def images(path, model):
  """Content of a model's images by name."""
  found = (path / "models" / model / "images").glob("*.png")
  return {image.name: image.read_bytes() for image in found}


def scores(path, model, *scorers):
  """Rows of a model by scorer."""
  there = folder.open_folder(path)
  return {
    scorer: scoring.read_scores(there, there.model(model), scorer) for scorer in scorers
  }
