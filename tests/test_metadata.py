"""What a checkpoint says about itself comes back as it was, or is refused."""

import dataclasses
import json

import pytest

from pixsigma_jax.metadata import FORMAT, Metadata, disagreements

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


def test_every_field_stands_in_the_json():
  fields = {field.name for field in dataclasses.fields(Metadata)}
  assert set(ABOUT.to_json()) == fields | {"format"}


@pytest.mark.parametrize("found", [FORMAT + 1, None])
def test_another_format_is_refused_with_both_numbers(found):
  stored = {**ABOUT.to_json(), "format": found}
  with pytest.raises(ValueError, match=f"has format {found}; .* reads format {FORMAT}"):
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
