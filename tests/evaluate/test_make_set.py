"""Held-out sets: which images they have, whom they never meet, and what is refused."""

import json

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pixsigma_jax.data import buckets
from pixsigma_jax.data.buckets import Bucket
from pixsigma_jax.data.index import SCHEMAS
from pixsigma_jax.data.records import id_hash
from pixsigma_jax.evaluate import items, make_set
from pixsigma_jax.evaluate.suites import suite
from tests import commands
from tests.data import test_mixture
from tests.prepare import world

TABLE = {0.5: Bucket(8, 16), 1.0: Bucket(8, 8)}
COUNT = 40
RULES = {
  "count": 6,
  "resolution": 8,
  "holdout": 0.5,
  "keep_quantile": 1.0,
  "caption": "long",
  "min_caption_words": 1,
  "max_caption_words": None,
  "aspect_mix": "natural",
}


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
  monkeypatch.setitem(buckets.BUCKETS, 8, TABLE)


def finish(index, scores=True):
  """The steps of curation that follow the scan."""
  for part in range(index.num_parts):
    rows = index.rows(part)
    nothing = pa.nulls(rows, pa.string())
    index.write("duplicates", part, pa.table({"duplicate_of": nothing}))
    if scores:
      values = [10 * part + i for i in range(rows)]
      table = pa.table({"aesthetic": values}, schema=SCHEMAS["scores"])
      index.write("scores", part, table)
  return index


def captions(id):
  """Each image's own, of 2 to 5 words."""
  words = ["photo", "red", "dog", "cat"][: int(id[:2]) % 4 + 1]
  return [(f"{' '.join(words)} {id[:2]}", "long")]


@pytest.fixture(scope="module")
def index(tmp_path_factory):
  directory = tmp_path_factory.mktemp("world")
  sizes = [(12, 26) if i % 3 == 0 else (12 + i % 2, 12) for i in range(COUNT)]
  folder = world.make_folder(directory / "images", sizes)
  return finish(
    world.make_index(directory / "index", folder, captions=captions, per_unit=8)
  )


def made(index, output, **fields):
  rules = make_set.Rules(**{**RULES, **fields})
  make_set.make_set(index.directory, output, rules, training=[])
  return items.read(output / "prompts.jsonl")


def sources(found):
  return [item.data["source"] for item in found]


def test_a_set_holds_held_out_images_at_their_sizes(index, tmp_path):
  found = made(index, tmp_path / "set")
  assert len(found) == RULES["count"]
  for item in found:
    assert id_hash(item.data["source"]) < 0.5 * 2**64
    with Image.open(tmp_path / "set" / item.reference) as image:
      assert (image.height, image.width) == (item.height, item.width)
      assert Bucket(item.height, item.width) in TABLE.values()
    assert item.prompt == captions(item.data["source"])[0][0]
  manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
  assert manifest["count"] == RULES["count"]
  assert manifest["left_out"]["not held out"] + manifest["candidates"] == COUNT
  assert sum(manifest["sizes"].values()) == RULES["count"]


def test_a_larger_set_begins_with_the_smaller_one(index, tmp_path):
  small = made(index, tmp_path / "small", count=4)
  large = sources(made(index, tmp_path / "large", count=8))
  assert large[:4] == sources(small)
  # Nor does the order follow the hashes by which training shuffles and holds out.
  assert large != sorted(large, key=id_hash)
  assert large != sorted(large)  # nor that of the index


def test_rules_choose_by_score_caption_and_size(index, tmp_path):
  everything = {"holdout": 0.999999, "count": 10}
  best = made(index, tmp_path / "best", keep_quantile=0.25, **everything)
  scores = [item.data["aesthetic"] for item in best]
  assert len(best) == 10
  assert min(scores) >= np.quantile([10 * (i // 8) + i % 8 for i in range(COUNT)], 0.75)
  worded = made(
    index,
    tmp_path / "words",
    min_caption_words=3,
    max_caption_words=4,
    **everything,
  )
  assert {len(item.prompt.split()) for item in worded} == {3, 4}
  square = made(index, tmp_path / "square", aspect_mix="square", **everything)
  assert {(item.height, item.width) for item in square} == {(8, 8)}
  even = made(index, tmp_path / "even", aspect_mix="even", **everything)
  assert sum(item.width == 16 for item in even) == 5


def test_the_same_command_makes_only_what_is_missing(index, tmp_path):
  output = tmp_path / "set"
  found = made(index, output)
  paths = [output / item.reference for item in found]
  before = {path: path.stat().st_mtime_ns for path in paths}
  content = paths[2].read_bytes()
  paths[2].unlink()
  (output / "manifest.json").unlink()
  with pytest.raises(FileNotFoundError, match=r"is not finished: it has no manifest"):
    suite("paper").items({"set": str(output)})
  assert made(index, output) == found
  assert paths[2].read_bytes() == content
  assert {p: p.stat().st_mtime_ns for p in paths if p != paths[2]} == {
    p: t for p, t in before.items() if p != paths[2]
  }
  with pytest.raises(FileExistsError, match="holds another set: rules is"):
    made(index, output, count=5)


def test_an_index_that_training_has_seen_is_refused(index, tmp_path):
  rules = make_set.Rules(**{**RULES, "holdout": 0.0})
  with pytest.raises(ValueError, match=r"overlaps the training data: 40 of 40 images"):
    make_set.make_set(
      index.directory, tmp_path / "set", rules, training=[index.directory]
    )
  assert not (tmp_path / "set").exists()
  # What it held out may be taken.
  rules = make_set.Rules(**RULES)
  make_set.make_set(
    index.directory, tmp_path / "set", rules, training=[index.directory]
  )


def test_of_a_dataset_only_what_training_saw_is_refused(index, tmp_path):
  ids = sources(made(index, tmp_path / "all", holdout=0.999999, count=COUNT))
  training = [str(test_mixture.write(tmp_path / "dataset", ids))]

  def make(holdout):
    rules = make_set.Rules(**{**RULES, "holdout": holdout})
    make_set.make_set(index.directory, tmp_path / "set", rules, training=training)

  with pytest.raises(ValueError, match=r"overlaps the training data: 40 of 40 images"):
    make(0.0)
  make(0.5)


def test_copies_under_other_names_are_found(index, tmp_path):
  folder = tmp_path / "copies"
  folder.mkdir()
  names = (f"copy{i}" for i in range(99))
  trained = next(name for name in names if id_hash(name) >= 0.5 * 2**64)
  [original, *_] = made(index, tmp_path / "set")
  path = f"{index.source}/{original.data['source']}.png"
  with open(path, "rb") as file:
    (folder / f"{trained}.png").write_bytes(file.read())
  copies = finish(
    world.make_index(tmp_path / "index", folder, captions=lambda _: [("a", "long")])
  )
  with pytest.raises(ValueError, match=rf"such as {original.data['source']}\."):
    make_set.make_set(
      index.directory,
      tmp_path / "other",
      make_set.Rules(**RULES),
      training=[copies.directory],
    )


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "Give --output=SET"),
    (["--output={}", "--resolution=8"], "A set must not meet training data"),
    (["--output={}", "--holdout=0.5"], "--count=30000 asks for more"),
    (["--output={}", "--holdout=1"], "--holdout=1.0 must be at least 0 and less"),
    (["--output={}", "--resolution=9", "--holdout=0.5"], "has no table of sizes"),
    (["--output={}", "--count=0"], "--count=0 must be at least 1"),
    (
      ["--output={}", "--min_caption_words=5", "--max_caption_words=4"],
      "allow no caption",
    ),
  ],
)
def test_what_cannot_be_chosen_is_refused_in_one_line(
  arguments, message, index, tmp_path, capsys, monkeypatch
):
  output = tmp_path / "set"
  given = [argument.format(output) for argument in arguments]
  given = [*given, *([] if "--resolution" in str(given) else ["--resolution=8"])]
  done = commands.run(
    capsys, monkeypatch, "evaluate", "make-set", index.directory, *given
  )
  assert (done.code, done.out) == (1, "")
  assert done.err.count("\n") == 1
  assert message in done.err
  assert not output.exists()
