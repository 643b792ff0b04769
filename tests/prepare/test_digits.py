"""Preparing the miniature: what the records hold, and what a second run does."""

import shutil

import numpy as np
import pytest

from pixsigma_jax.data import digits
from pixsigma_jax.data.records import open_dataset
from pixsigma_jax.models.hashed_words import HashedWordEncoder
from pixsigma_jax.prepare.digits import CAPTION_LENGTH, prepare_digits
from tests import commands

COUNT = 24


def arguments(directory, **changes):
  fields = {"resolution": 8, "count": COUNT, "seed": 3} | changes
  named = [f"--{name}={value}" for name, value in fields.items()]
  return ["--dataset=digits", f"--output={directory}", *named]


@pytest.fixture
def prepare(capsys, monkeypatch):
  return lambda *args, **changes: commands.run(
    capsys, monkeypatch, "prepare", *arguments(*args, **changes)
  )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  directory = tmp_path_factory.mktemp("digits") / "8px"
  prepare_digits(directory, resolution=8, count=COUNT, seed=3, scaling_factor=1.5)
  return directory


def snapshot_of(directory):
  return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_every_record_is_a_drawn_scene_with_all_the_ways_to_ask_for_it(finished):
  dataset = open_dataset(finished)
  assert len(dataset) == COUNT
  shapes = set()
  for record in dataset.read(range(COUNT)):
    (scene,) = {digits.parse(caption) for caption in record.captions}
    assert digits.HELD_OUT.isdisjoint(scene.items)
    ways = digits.captions(scene)
    assert list(record.captions) == ways["long"] + ways["short"]
    assert record.caption_kinds.count("short") == len(ways["short"])
    rows, columns = digits.CELLS[scene.task]
    assert record.latents.shape == (8 * rows, 8 * columns, 3)
    assert record.original_size.tolist() == [8 * rows, 8 * columns]
    shapes.add(record.latents.shape)
    assert (record.latents.min(), record.latents.max()) == (-1, 1)
  assert shapes == {(8, 8, 3), (8, 16, 3), (16, 8, 3)}


def test_images_are_the_renders_of_their_scenes(finished):
  records = open_dataset(finished).read(range(COUNT))
  weights = {"single": 0.2, "left_of": 0.4, "above": 0.4}
  scenes = digits.training_scenes(3, COUNT, weights)
  for record, (scene, glyphs) in zip(records, scenes, strict=True):
    # Sixteenths of ink: float16 holds them exactly.
    np.testing.assert_array_equal(record.latents, digits.render(scene, glyphs, 8))


def test_caption_embeddings_are_the_encoders_one_after_the_other(finished):
  record = open_dataset(finished)[5]
  encoder = HashedWordEncoder()
  ends = np.cumsum(record.caption_lengths)
  parts = np.split(record.caption_embeddings, ends[:-1])
  for caption, part in zip(record.captions, parts, strict=True):
    embeddings, mask = encoder.encode([caption], CAPTION_LENGTH)
    np.testing.assert_array_equal(part, embeddings[mask].astype(np.float16))


def test_the_manifest_says_what_made_the_features(finished):
  dataset = open_dataset(finished)
  assert dataset.manifest.resolution == 8
  assert dataset.manifest.autoencoder == {"name": "pixels", "version": 1}
  assert dataset.manifest.scaling_factor == 1.5
  assert dataset.manifest.text_encoder == HashedWordEncoder().identity
  np.testing.assert_array_equal(
    dataset.null_caption, HashedWordEncoder().encode([""], CAPTION_LENGTH)[0][0]
  )


def test_another_resolution_shows_the_same_scenes_larger(prepare, finished, tmp_path):
  assert prepare(tmp_path / "16px", resolution=16).code == 0
  coarse, fine = open_dataset(finished), open_dataset(tmp_path / "16px")
  assert fine.manifest.resolution == 16
  for i in (0, COUNT - 1):
    assert fine[i].captions == coarse[i].captions
    h, w, _ = coarse[i].latents.shape
    blocks = fine[i].latents.astype(np.float32).reshape(h, 2, w, 2, 3)
    # float16 keeps numbers up to 1 to half of 2^-11.
    np.testing.assert_allclose(
      blocks.mean(axis=(1, 3)), coarse[i].latents, rtol=0, atol=2**-12
    )


def test_the_same_command_again_says_so_and_touches_nothing(prepare, tmp_path):
  directory = tmp_path / "new" / "8px"
  first = prepare(directory)
  assert (first.code, first.out) == (0, f"{directory} holds 24 records.\n")
  before = snapshot_of(directory)
  again = prepare(directory)
  assert (again.code, again.out) == (
    0,
    f"{directory} already holds these 24 records.\n",
  )
  assert snapshot_of(directory) == before


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"seed": 4}, "record digits-3-000000 → digits-4-000000"),
    ({"count": 23}, "count: 24 → 23"),
    ({"resolution": 16}, "resolution: 8 → 16"),
    ({"scaling_factor": 1.0}, "scaling_factor: 1.5 → 1.0"),
  ],
)
def test_a_finished_dataset_is_not_taken_for_another(
  prepare, finished, changes, message
):
  before = snapshot_of(finished)
  done = prepare(finished, **({"scaling_factor": 1.5} | changes))
  assert (done.code, done.err.count("\n")) == (1, 1)
  assert "already holds another finished dataset" in done.err
  assert message in done.err
  assert snapshot_of(finished) == before


def test_a_changed_renderer_is_noticed(finished, monkeypatch):
  render = digits.render
  monkeypatch.setattr(digits, "render", lambda *args: -render(*args))
  with pytest.raises(FileExistsError, match="of another seed or version"):
    prepare_digits(finished, resolution=8, count=COUNT, seed=3, scaling_factor=1.5)


def test_an_interrupted_run_is_started_over(prepare, finished, tmp_path):
  directory = tmp_path / "8px"
  shutil.copytree(finished, directory)
  (directory / "manifest.json").unlink()
  (directory / "index.npz").write_bytes(b"half")
  assert prepare(directory, scaling_factor=1.5).code == 0
  assert snapshot_of(directory) == snapshot_of(finished)


def test_somebody_elses_directory_is_left_alone(prepare, tmp_path):
  (tmp_path / "thesis.tex").write_text("years")
  done = prepare(tmp_path)
  assert (done.code, done.err.count("\n")) == (1, 1)
  assert "thesis.tex, which is no part of a dataset" in done.err
  assert (tmp_path / "thesis.tex").read_text() == "years"


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"resolution": 12}, "resolution 12 must be a multiple of 8"),
    ({"resolution": 0}, "resolution 0 must be a multiple of 8"),
    ({"count": 0}, "count 0 must be at least 1"),
    ({"seed": -1}, "seed -1 must not be negative"),
    ({"scaling_factor": 0}, "scaling_factor 0.0 must be positive"),
  ],
)
def test_what_cannot_be_prepared_is_refused(prepare, tmp_path, changes, message):
  done = prepare(tmp_path / "new", **changes)
  assert (done.code, done.err.count("\n")) == (1, 1)
  assert message in done.err
  assert not (tmp_path / "new").exists()
