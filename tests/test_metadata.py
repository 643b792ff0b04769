"""What a checkpoint says about itself comes back as it was, or is refused."""

import dataclasses
import json
import shutil

import pytest

from pixsigma_jax import metadata
from pixsigma_jax.metadata import FORMAT, History, Metadata, disagreements, software

ABOUT = Metadata(
  stage="low",
  model={"depth": 2, "kv_compression": {"layers": [1]}},
  autoencoder={"name": "pixels"},
  scaling_factor=0.5,
  text_encoder={"name": "hashed-words", "width": 64},
  resolution=32,
  provenance=({"stage": "low", "parent": None},),
)


def test_metadata_survive_json():
  assert Metadata.from_json(json.loads(json.dumps(ABOUT.to_json()))) == ABOUT


def test_metadata_of_the_first_format_are_read_as_they_were():
  stored = ABOUT.to_json()
  stored |= {"format": 1}
  del stored["history"], stored["software"]
  assert Metadata.from_json(stored) == ABOUT
  stored["history"] = None
  with pytest.raises(ValueError, match=r"unknown \['history'\]"):
    Metadata.from_json(stored)


def test_a_history_survives_json():
  history = History.new().branch_after(4).branch_after(6)
  about = dataclasses.replace(ABOUT, history=history, software=software())
  read = Metadata.from_json(json.loads(json.dumps(about.to_json())))
  assert read == about
  assert read.software == software()


def test_what_a_branch_has_made_is_what_came_before_it_and_what_it_made_itself():
  first = History.new()
  again = first.branch_after(4)
  for step in (0, 3, 4):
    assert again.has_made(first, step)
  for step in (5, 8):
    assert not again.has_made(first, step)
    assert again.has_made(again, step)
  # Back to before the branch: it is no part of what follows.
  third = again.branch_after(2)
  assert [after for _, after in third.branches] == [2]
  assert not third.has_made(again, 3)
  assert not History.new().has_made(first, 0)
  # Twice back to the same step.
  assert not again.branch_after(4).has_made(again, 5)


def test_the_code_is_known_by_its_files(tmp_path, monkeypatch):
  def code_of(**files):
    package = tmp_path / "pixsigma_jax"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir()
    for name, text in files.items():
      (package / f"{name}.py").write_text(text)
    monkeypatch.setattr(metadata, "__file__", str(package / "metadata.py"))
    return software.__wrapped__()["code"]

  first = code_of(a="x = 1", b="")
  assert code_of(a="x = 1", b="") == first
  others = [code_of(a="x = 2", b=""), code_of(a="x = 1"), code_of(a="", b="x = 1")]
  assert len({first, *others}) == 4
  assert software.__wrapped__()["commit"] is None  # no repository


def test_every_field_stands_in_the_json():
  fields = {field.name for field in dataclasses.fields(Metadata)}
  assert set(ABOUT.to_json()) == fields | {"format"}


@pytest.mark.parametrize("found", [FORMAT + 1, None])
def test_another_format_is_refused_with_both_numbers(found):
  stored = {**ABOUT.to_json(), "format": found}
  with pytest.raises(
    ValueError, match=f"has format {found}; .* reads format 1 and {FORMAT}"
  ):
    Metadata.from_json(stored)


def test_reading_leaves_the_json_as_it_was():
  stored = ABOUT.to_json()
  Metadata.from_json(stored)
  assert stored == ABOUT.to_json()


def test_fields_that_are_not_the_formats_are_named():
  stored = ABOUT.to_json()
  stored["colour"] = stored.pop("resolution")
  with pytest.raises(
    ValueError, match=r"missing \['resolution'\], unknown \['colour'\]"
  ):
    Metadata.from_json(stored)


def test_a_disagreement_names_the_field_and_both_values():
  have = {"width": 48, "kv_compression": {"ratio": 1, "layers": ()}}
  want = {"width": 48, "kv_compression": {"ratio": 4, "layers": [1]}}
  assert disagreements(have, want) == [
    "kv_compression.ratio: 1 → 4",
    "kv_compression.layers: [] → [1]",
  ]


def test_a_field_on_one_side_alone_disagrees():
  assert disagreements({"a": 1}, {"b": 2}) == ["a: 1 → None", "b: None → 2"]


def test_a_list_is_its_tuple_and_nothing_else():
  assert disagreements({"layers": (1, 2)}, {"layers": [1, 2]}) == []
  assert disagreements({"layers": (1, 2)}, {"layers": [2, 1]}) == [
    "layers: [1, 2] → [2, 1]"
  ]
