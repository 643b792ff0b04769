"""The filter: one reason an image, in a known order; the same again does nothing."""

import json
import pathlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest

from pixsigma_jax.curate.filter import REASONS, Rules, filter_images
from pixsigma_jax.data.index import SCHEMAS, create_index
from pixsigma_jax.data.sources import Unit

FINE = {"height": 100, "width": 200, "score": 5.0, "captions": [("a b c", "short")]}


def make_index(directory, images, per_part=3, scores=True):
  """An index of made-up images: each a dict of what differs from `FINE`."""
  images = [{**FINE, **image} for image in images]
  parts = [
    images[start : start + per_part] for start in range(0, len(images), per_part)
  ]
  units = [Unit("folder", "", count=len(part)) for part in parts]
  index = create_index(str(directory / "index"), str(directory), units)
  for number, part in enumerate(parts):
    nothing = {name: [None] * len(part) for name in SCHEMAS["scan"].names}
    captions = [
      [{"text": text, "kind": kind} for text, kind in image["captions"]]
      for image in part
    ]
    fields = {
      name: [image.get(name) for image in part] for name in ("error", "height", "width")
    }
    fields["id"] = [f"{number}/{row}" for row in range(len(part))]
    table = {**nothing, **fields, "captions": captions}
    index.write("scan", number, pa.table(table, schema=SCHEMAS["scan"]))
    for step, column, field in [
      ("duplicates", "duplicate_of", "duplicate_of"),
      ("scores", "aesthetic", "score"),
    ]:
      if step == "duplicates" or scores:
        values = [image.get(field) for image in part]
        index.write(step, number, pa.table({column: values}, schema=SCHEMAS[step]))
  return index


def reasons(index, **rules):
  filter_images(index, Rules(**rules), beam_options=[])
  tables = [index.read(part, "kept") for part in range(index.num_parts)]
  found = [reason for table in tables for reason in table["reason"].to_pylist()]
  kept = [kept for table in tables for kept in table["kept"].to_pylist()]
  assert kept == [reason is None for reason in found]
  return found


@pytest.mark.parametrize(
  ("image", "rules", "reason"),
  [
    ({"error": "truncated", "height": None, "width": None}, {}, "error"),
    ({"duplicate_of": "0/0"}, {}, "duplicate"),
    ({"duplicate_of": "0/0"}, {"keep_duplicates": True}, None),
    ({}, {"min_side": 100}, None),
    ({}, {"min_side": 101}, "side"),
    ({}, {"min_area": 20_000}, None),
    ({}, {"min_area": 20_001}, "area"),
    ({"height": 60_000, "width": 60_000}, {"min_area": 2**31}, None),
    ({}, {"max_aspect": 2.0}, None),
    ({}, {"max_aspect": 1.99}, "aspect"),
    ({"height": 300, "width": 100}, {"max_aspect": 2.9}, "aspect"),
    ({"captions": []}, {"need_caption": "any"}, "no caption"),
    ({}, {"need_caption": "any"}, None),
    ({}, {"need_caption": "long"}, "no caption"),
    ({"captions": [("a", "long")]}, {"need_caption": "long"}, None),
    ({}, {"min_caption_words": 3}, None),
    ({}, {"min_caption_words": 4}, "captions too short"),
    ({"captions": []}, {"min_caption_words": 1}, "captions too short"),
    (
      {"captions": [("a", "long"), ("a b c", "short")]},
      {"need_caption": "long", "min_caption_words": 2},
      "captions too short",
    ),
    ({"score": None}, {"min_aesthetic": 1.0}, "no score"),
    ({"score": None}, {"keep_quantile": 1.0}, "no score"),
    ({}, {"min_aesthetic": 5.0}, None),
    ({}, {"min_aesthetic": 5.01}, "aesthetic"),
  ],
)
def test_a_rule_refuses_what_it_says(image, rules, reason, tmp_path):
  assert reasons(make_index(tmp_path, [image]), **rules) == [reason]


def test_the_first_reason_counts(tmp_path):
  every_rule = {
    "min_side": 1000,
    "min_area": 10**7,
    "max_aspect": 1.5,
    "need_caption": "long",
    "min_caption_words": 9,
    "min_aesthetic": 7.0,
  }
  cures = [
    {"error": None},
    {"duplicate_of": None},
    {"height": 1000, "width": 2000},
    {"height": 3000, "width": 6000},
    {"height": 5000, "width": 6000},
    {"captions": [("a", "long")]},
    {"captions": [("a " * 9, "long")]},
    {"score": 6.0},
    {"score": 7.0},
  ]
  image = {"error": "x", "duplicate_of": "y", "score": None}
  images = [image] + [image := {**image, **cure} for cure in cures]
  assert reasons(make_index(tmp_path, images), **every_rule) == [*REASONS, None]


def test_a_quantile_is_of_those_that_pass_the_other_rules(tmp_path):
  images = [{"score": float(i)} for i in range(10)]
  images += [{"score": 100.0, "height": 10}, {"score": 100.0, "error": "truncated"}]
  found = reasons(make_index(tmp_path, images), keep_quantile=0.3, min_side=50)
  assert found == ["aesthetic"] * 7 + [None] * 3 + ["side", "error"]


def test_equal_scores_are_treated_alike(tmp_path):
  index = make_index(tmp_path, [{"score": s} for s in (1.0, 2.0, 2.0, 2.0, 3.0)])
  assert reasons(index, keep_quantile=0.4) == ["aesthetic", None, None, None, None]


@hypothesis.given(
  st.lists(st.floats(0, 10, width=32), min_size=1, max_size=12),
  st.floats(0.01, 1),
)
@hypothesis.settings(max_examples=6)
def test_a_quantile_keeps_the_best_part(tmp_path_factory, scores, quantile):
  index = make_index(tmp_path_factory.mktemp("q"), [{"score": s} for s in scores])
  found = reasons(index, keep_quantile=quantile)
  kept = [s for s, reason in zip(scores, found, strict=True) if reason is None]
  refused = [s for s, reason in zip(scores, found, strict=True) if reason]
  assert len(kept) >= quantile * len(scores)  # ties may make it more
  assert sum(s > min(kept) for s in kept) < quantile * len(scores)
  assert max(refused, default=-1) < min(kept)


def test_nothing_that_passes_has_no_best_part(tmp_path):
  index = make_index(tmp_path, [{"error": "x"}])
  assert reasons(index, keep_quantile=0.5) == ["error"]


def stamps(index):
  folder = pathlib.Path(index.directory, "kept")
  return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_the_same_rules_again_do_nothing_and_others_write_all_anew(tmp_path):
  index = make_index(tmp_path, [{"score": float(i)} for i in range(7)])
  reasons(index, keep_quantile=0.5)
  before = stamps(index)
  reasons(index, keep_quantile=0.5)
  assert stamps(index) == before
  settings = json.loads(pathlib.Path(index.directory, "kept/filter.json").read_text())
  assert settings["rules"]["keep_quantile"] == 0.5
  assert settings["threshold"] == 3.0
  assert reasons(index, min_aesthetic=6.0) == ["aesthetic"] * 6 + [None]
  assert all(before[name] != stamp for name, stamp in stamps(index).items())


def test_new_captions_and_scores_are_looked_at_again(tmp_path):
  index = make_index(tmp_path, [{"captions": []}])
  assert reasons(index, need_caption="any") == ["no caption"]
  captions = [[{"text": "a", "kind": "short"}]]
  index.write("captions", 0, pa.table({"captions": captions}))
  index.note("captions", {"from": ["somebody"]})
  assert reasons(index, need_caption="any") == [None]
  assert reasons(index, min_aesthetic=5.5) == ["aesthetic"]
  index.begin("scores", {"head": "another"})
  scores = pa.table({"aesthetic": [6.0]}, schema=SCHEMAS["scores"])
  index.write("scores", 0, scores)
  assert reasons(index, min_aesthetic=5.5) == [None]


def test_a_filter_goes_on_after_its_finished_parts(tmp_path):
  index = make_index(tmp_path, [{"score": float(i)} for i in range(7)])
  wanted = reasons(index, keep_quantile=0.5)
  before = stamps(index)
  pathlib.Path(index.directory, "kept", "00001.parquet").unlink()
  assert reasons(index, keep_quantile=0.5) == wanted
  unchanged = {name for name, stamp in stamps(index).items() if stamp == before[name]}
  assert unchanged == {"00000.parquet", "00002.parquet", "filter.json"}


def test_every_image_is_counted_once(tmp_path):
  images = [{}, {"error": "x"}, {"height": 9}, {"duplicate_of": "0/0"}, {"score": 1.0}]
  index = make_index(tmp_path, images)
  rules = Rules(min_side=10, min_aesthetic=2.0)
  report = filter_images(index, rules, beam_options=[])
  assert report == {
    "images": 5,
    "kept": 1,
    "refused": {"error": 1, "duplicate": 1, "side": 1, "aesthetic": 1},
    "threshold": 2.0,
  }
  written = pathlib.Path(index.directory, "kept", "report.json").read_text()
  assert json.loads(written) == report


def test_rules_about_scores_need_scores(tmp_path):
  index = make_index(tmp_path, [{}], scores=False)
  with pytest.raises(
    ValueError, match=r"no part 0 of scores: run `curate score` first"
  ):
    reasons(index, min_aesthetic=1.0)
  assert index.missing("kept") == [0]
  assert reasons(index) == [None]


@pytest.mark.parametrize(
  ("rules", "message"),
  [
    ({"min_aesthetic": 5.0, "keep_quantile": 0.5}, "both say which scores to keep"),
    ({"min_side": 0}, "--min_side=0 refuses nothing"),
    ({"max_aspect": 0.5}, r"--max_aspect=0.5 refuses everything"),
    ({"max_aspect": np.nan}, r"--max_aspect=nan refuses everything"),
    ({"keep_quantile": 0.0}, r"--keep_quantile=0.0 is not above 0"),
    ({"keep_quantile": 25.0}, r"at most 1: 0.25 keeps the best quarter"),
    ({"need_caption": "middling"}, "is not one of any, long, short"),
  ],
)
def test_rules_without_a_meaning_are_refused(rules, message):
  with pytest.raises(ValueError, match=message):
    Rules(**rules)


ORIGINAL = {"height": 200, "width": 400, "captions": []}
COPY = {"duplicate_of": "0/0", "score": None}


@pytest.mark.parametrize("rules", [{}, {"min_aesthetic": 5.0}, {"keep_quantile": 1.0}])
def test_a_captioned_copy_stands_in_for_an_original_without_captions(tmp_path, rules):
  other = {"height": 110, "duplicate_of": "0/0", "score": None}
  images = [ORIGINAL, COPY, {}, {**other, "captions": []}, other, COPY]
  index = make_index(tmp_path, images)
  found = reasons(index, need_caption="any", **rules)
  # Of three copies with captions the largest, in another part, with the original's
  # score; the others are its duplicates.
  assert found == ["no caption", "duplicate", None, "duplicate", None, "duplicate"]
  assert reasons(index, **rules)[:2] == [None, "duplicate"]  # where it passes itself


def test_a_copy_does_not_stand_in_where_it_passes_no_more_than_the_original(tmp_path):
  index = make_index(tmp_path, [ORIGINAL, {**COPY, "captions": []}])
  assert reasons(index, need_caption="any") == ["no caption", "duplicate"]
  low = {**ORIGINAL, "captions": [("a", "short")], "score": 1.0}
  index = make_index(tmp_path / "low", [low, COPY])
  assert reasons(index, min_aesthetic=2.0) == ["aesthetic", "duplicate"]


def test_likeness_of_a_copys_copy_is_of_one_group(tmp_path):
  images = [ORIGINAL, {**COPY, "captions": []}, {**COPY, "duplicate_of": "0/1"}]
  assert reasons(make_index(tmp_path, images), need_caption="any") == [
    *("no caption", "duplicate", None)
  ]


def test_what_an_earlier_version_filtered_is_filtered_anew(tmp_path):
  index = make_index(tmp_path, [ORIGINAL, COPY])
  reasons(index, need_caption="any")
  before = index.settings("kept")
  del before["of_duplicates"]
  index.note("kept", before)
  for part in range(index.num_parts):
    lost = {"kept": [False] * 2, "reason": ["no caption", "duplicate"]}
    index.write("kept", part, pa.table(lost))
  assert reasons(index, need_caption="any") == ["no caption", None]
