"""A model is asked once of every image, and a kill loses next to nothing of it."""

import hashlib
import pathlib

import pytest

from pixsigma_jax.curate import captioner
from pixsigma_jax.data.index import open_index
from tests.prepare import world

ASKED = {
  "model": "some/model",
  "instruction": "Look.",
  "kind": "long",
  "max_new_tokens": 9,
  "beam_options": [],
}


@pytest.fixture
def index(tmp_path):
  """Eight different images in parts of three."""
  return world.make_index(
    tmp_path / "index", world.make_folder(tmp_path / "images"), captions=lambda _: []
  )


def said(index):
  rows = [
    row
    for part in range(index.num_parts)
    for row in index.read(part, "scan", "captions").to_pylist()
  ]
  return {row["id"]: [c["text"] for c in row["captions"]] for row in rows}


def test_a_killed_captioner_is_asked_only_of_what_it_had_not_said(
  index, monkeypatch, tmp_path
):
  monkeypatch.setattr(captioner, "_BATCH", 1)
  monkeypatch.setattr(captioner, "_SECONDS_BETWEEN_DRAFTS", -1)  # after each
  asked = []

  def caption_images(images, **_):
    if len(asked) == 5:
      raise OSError("killed")
    asked.append(images[0].size)
    return [f"{images[0].width} x {images[0].height}"]

  monkeypatch.setattr(captioner, "caption_images", caption_images)
  with pytest.raises(OSError, match="killed"):
    captioner.write_captions(index, **ASKED)
  assert index.missing("captions") == [1, 2]  # the second part has two of three
  asked.clear()
  captioner.write_captions(index, **ASKED)
  assert len(asked) == 3
  texts = {f"{i:02d}": [f"{w} x {h}"] for i, (h, w) in enumerate(world.SIZES)}
  assert said(index) == texts
  assert not list(pathlib.Path(index.directory).rglob("*draft*"))


def test_a_draft_is_of_its_images_and_of_its_question(index, monkeypatch):
  monkeypatch.setattr(captioner, "_BATCH", 1)
  [first, _, _] = index.read(0, columns=["sha256"])["sha256"].to_pylist()

  def caption_images(images, instruction, **_):
    return [f"new: {instruction}"] * len(images)

  monkeypatch.setattr(captioner, "caption_images", caption_images)
  captioner.write_captions(index, **ASKED)
  [noted] = index.settings("captions")["from"]
  name = hashlib.sha256(noted.encode()).hexdigest()[:8]
  pathlib.Path(index.directory, "captions", "00000.parquet").unlink()
  index.write_json(
    f"captions/00000.{name}.draft.json", {first: "drafted", "another": "elsewhere"}
  )
  captioner.write_captions(index, **ASKED | {"instruction": "Other."})
  assert said(index)["00"] == ["new: Other."]
  captioner.write_captions(index, **ASKED)
  assert said(index)["00"] == ["new: Other.", "drafted"]
  assert said(index)["01"] == ["new: Other.", "new: Look."]


def test_an_image_that_has_changed_since_the_scan_is_not_captioned(
  index, monkeypatch, tmp_path
):
  world.photograph(40, 44, seed=99).save(tmp_path / "images" / "00.png")
  monkeypatch.setattr(
    captioner, "caption_images", lambda images, **_: ["a photo"] * len(images)
  )
  captioner.write_captions(index, **ASKED)
  assert said(open_index(index.directory))["00"] == []
  assert said(index)["01"] == ["a photo"]


def test_progress_is_told_by_the_image(index, monkeypatch, caplog):
  caplog.set_level("INFO", logger="absl")
  monkeypatch.setattr(
    captioner, "caption_images", lambda images, **_: [""] * len(images)
  )
  captioner.write_captions(index, **ASKED)
  assert "Captioned images: 8 of 8" in caplog.text
