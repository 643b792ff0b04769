"""Table 1 and figure 6: counts that add up, the paper's definitions, and the step."""

import itertools
import json
import os
import random

import hypothesis
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import strategies as st
from PIL import Image

from pixsigma_jax.curate import statistics
from pixsigma_jax.curate.nouns import load_tagger
from pixsigma_jax.curate.statistics import Counts, Statistics
from pixsigma_jax.data.index import SCHEMAS, create_index
from pixsigma_jax.data.sources import Unit

RULES = load_tagger("rules")
WORDS = st.sampled_from(["dog", "dogs", "tree", "red", "runs", "the", "狗", "כלב"])
TEXTS = st.lists(WORDS, max_size=6).map(" ".join)
IMAGES = st.lists(
  st.lists(st.tuples(TEXTS, st.sampled_from(["long", "short"])), max_size=3),
  max_size=12,
)


@hypothesis.given(IMAGES, st.lists(st.integers(0, 12)), st.randoms())
def test_parts_in_any_order_and_grouping_add_up_to_one_pass(images, cuts, shuffled):
  whole = statistics.count(images, RULES)
  edges = sorted({0, len(images), *(min(cut, len(images)) for cut in cuts)})
  parts = [images[a:b] for a, b in itertools.pairwise(edges)] or [images]
  counted = [statistics.count(part, RULES) for part in parts]
  shuffled.shuffle(counted)
  middle = shuffled.randint(0, len(counted))
  groups = [group for group in (counted[:middle], counted[middle:]) if group]
  assert statistics.merge(counted) == whole
  assert statistics.merge(map(statistics.merge, groups)) == whole


def test_the_figures_are_those_that_the_paper_defines():
  images = [
    [("A dog and a cat.", "short"), ("The dog, the cat and the tree.", "long")],
    [("the dog\n of  Paris", "short"), ("a dog", "short")],
    [],
  ]
  found = statistics.count(images, RULES)
  assert (found.tagger, found.images) == ("rules", 3)
  short = found.kinds["short"]
  assert short == Counts(
    images=2,
    captions=3,
    lengths={5: 1, 4: 1, 2: 1},
    nouns={"dog": 3, "cat": 1, "paris": 1},
  )
  assert short.average_length == 11 / 3
  assert (short.total_nouns, short.distinct_nouns) == (5, 3)
  assert short.nouns_per_image == 2.5
  assert found.kinds["long"].nouns_per_image == 3


def test_a_noun_is_valid_if_it_occurs_more_than_ten_times():
  counts = Counts(1, 1, {1: 1}, {"once": 1, "ten": 10, "eleven": 11, "often": 999})
  assert (counts.valid_nouns, counts.distinct_nouns) == (2, 4)


def test_nouns_of_two_taggers_are_not_added_up():
  parts = [Statistics("rules", 1, {}), Statistics("nltk", 1, {})]
  with pytest.raises(ValueError, match="of the taggers nltk, rules cannot be added up"):
    statistics.merge(parts)


def test_the_table_stands_beside_the_papers_and_names_its_tagger():
  nouns = {f"noun{i}": 11 if i < 187_000 else 1 for i in range(931_000)}
  counts = Counts(14_000_000, 14_000_000, {24: 7_000_000, 26: 7_000_000}, nouns)
  lines = statistics.table(
    Statistics("spacy:some", 14_000_000, {"short": counts}), "mine"
  ).splitlines()
  assert lines[2].split() == [
    "mine",
    "14M",
    "short",
    "187K/931K",
    "2801K",
    "25.0",
    "0.2/Img",
  ]
  assert lines[4].split() == [
    *("Internal-α", "14M", "Raw", "187K/931K", "175M", "25", "11.7/Img")
  ]
  assert len({line.index("/Img") for line in lines if "/Img" in line}) == 1
  assert "tagger: spacy:some" in "".join(lines)


# ---- figure 6 ----


def bars(image, color):
  """Columns of the frame in which a bar of a kind stands on the axis."""
  left, _, right, bottom = statistics._FRAME
  row = np.asarray(image)[bottom - 4, left : right + 1].astype(int)
  pale = 255 + (np.array(color) - 255) * 120 / 255  # its color on white
  return np.abs(row - pale).max(axis=-1) < 3


def lengths_only(**lengths):
  kinds = {
    kind: Counts(sum(of.values()), sum(of.values()), of, {})
    for kind, of in lengths.items()
  }
  return Statistics("rules", 1, kinds)


def test_a_bar_stands_where_its_length_is():
  image = statistics.draw_lengths(lengths_only(short={2: 1, 9: 3}, long={5: 1}))
  orange = bars(image, statistics._COLORS["short"])
  blue = bars(image, statistics._COLORS["long"])
  tenth = len(orange) / 10  # lengths 0 to 9
  centers = [round((length + 0.3) * tenth) for length in range(10)]
  assert [length for length in range(10) if orange[centers[length]]] == [2, 9]
  assert [length for length in range(10) if blue[centers[length]]] == [5]


@hypothesis.given(
  st.dictionaries(
    st.sampled_from(["short", "long", "another kind 狗"]),
    st.dictionaries(
      st.integers(0, 3000), st.integers(1, 10**9), min_size=1, max_size=5
    ),
    min_size=1,
  )
)
@hypothesis.settings(max_examples=25)
def test_any_lengths_can_be_drawn(lengths):
  image = statistics.draw_lengths(lengths_only(**lengths))
  assert image.size == statistics._SIZE
  assert image.getextrema() != ((255, 255),) * 3


def test_one_caption_of_a_thousand_words_does_not_squeeze_the_others():
  lengths = {20: 500, 21: 500, 1000: 1}
  image = statistics.draw_lengths(lengths_only(short=lengths))
  orange = bars(image, statistics._COLORS["short"])
  assert orange.sum() > len(orange) / 15  # two of 22 bars, but for their edges


# ---- the step ----


def write_index(directory, parts, *, kept=None, captions=None, errors=()):
  """An index of captions alone; `parts` as `count` takes them, one list a part."""
  units = [Unit("folder", "", first=str(i), last=str(i)) for i in range(len(parts))]
  index = create_index(str(directory), str(directory), units)
  for number, images in enumerate(parts):
    rows = [
      {
        "id": f"{number}/{row}",
        "location": f"{number}/{row}.png",
        "error": "truncated" if (number, row) in errors else None,
        "captions": as_rows(texts),
      }
      for row, texts in enumerate(images)
    ]
    index.write("scan", number, pa.Table.from_pylist(rows, SCHEMAS["scan"]))
    if captions is not None:
      columns = {"captions": [as_rows(texts) for texts in captions[number]]}
      table = pa.table(columns, SCHEMAS["captions"])
      index.write("captions", number, table)
    if kept is not None:
      write_kept(index, number, kept[number])
  return str(directory)


def as_rows(texts):
  return [{"text": text, "kind": kind} for text, kind in texts]


def write_kept(index, part, kept):
  columns = {"kept": kept, "reason": [None if k else "too small" for k in kept]}
  index.write("kept", part, pa.table(columns, SCHEMAS["kept"]))


PARTS = [
  [[("A dog and a cat.", "short")], [("A tree in the snow", "long")]],
  [[("the dog of Paris", "short"), ("dogs", "short")], [], [("one cat", "short")]],
]


def run(index, output=None, tagger="rules"):
  output = None if output is None else str(output)
  statistics.run(index, tagger=tagger, output=output, beam_options=[])


def test_an_index_is_counted_in_parts_as_in_one_pass(tmp_path, capsys):
  index = write_index(tmp_path / "index", PARTS)
  run(index, tmp_path / "out")
  whole = statistics.count([image for part in PARTS for image in part], RULES)
  report = json.loads((tmp_path / "out" / "statistics.json").read_text())
  assert (report["tagger"], report["images"], report["only_kept"]) == (
    "rules",
    5,
    False,
  )
  assert list(report["kinds"]) == ["long", "short"]
  short, expected = report["kinds"]["short"], whole.kinds["short"]
  assert short == {
    "images": expected.images,
    "captions": expected.captions,
    "average_caption_length": expected.average_length,
    "valid_nouns": 0,
    "distinct_nouns": expected.distinct_nouns,
    "total_nouns": expected.total_nouns,
    "nouns_per_image": expected.nouns_per_image,
    "most_common_nouns": {"cat": 2, "dog": 2, "dogs": 1, "paris": 1},
    "captions_by_length": {"1": 1, "2": 1, "4": 1, "5": 1},
  }
  assert capsys.readouterr().out == statistics.table(whole, "index") + "\n"
  with Image.open(tmp_path / "out" / "caption_lengths.png") as image:
    assert np.array_equal(np.asarray(image), np.asarray(statistics.draw_lengths(whole)))


def test_captions_of_images_that_filter_refused_are_left_out(tmp_path, capsys):
  kept = [[True, False], [False, True, True]]
  index = write_index(tmp_path / "index", PARTS, kept=kept)
  run(index)
  images = [PARTS[0][0], PARTS[1][1], PARTS[1][2]]
  expected = statistics.table(statistics.count(images, RULES), "index")
  assert capsys.readouterr().out == expected + "\n"


def test_without_a_filter_captions_of_images_that_cannot_be_read_are_left_out(
  tmp_path, capsys
):
  index = write_index(tmp_path / "index", PARTS, errors=[(1, 0)])
  run(index)
  images = [*PARTS[0], PARTS[1][1], PARTS[1][2]]
  expected = statistics.table(statistics.count(images, RULES), "index")
  assert capsys.readouterr().out == expected + "\n"


def test_captions_that_came_later_take_the_place_of_scans(tmp_path, capsys):
  later = [[[("A fox", "long")], []], [[], [], []]]
  index = write_index(tmp_path / "index", PARTS, captions=later)
  run(index)
  expected = statistics.count([image for part in later for image in part], RULES)
  assert capsys.readouterr().out == statistics.table(expected, "index") + "\n"


def part_times(index):
  folder = os.path.join(index, "stats")
  return {
    name: os.stat(os.path.join(folder, name)).st_mtime_ns for name in os.listdir(folder)
  }


def test_only_what_has_changed_is_counted_again(tmp_path, capsys):
  index = write_index(tmp_path / "index", PARTS)
  run(index)
  first, before = capsys.readouterr().out, part_times(index)
  run(index)
  assert capsys.readouterr().out == first
  assert part_times(index) == before
  write_index(tmp_path / "index", PARTS, kept=[[True, True], [True, False, True]])
  run(index)
  # Of part 1 a row without captions is gone; part 0 is what it was.
  after = part_times(index)
  assert {name for name in after if after[name] != before[name]} == {"00001.json"}


class EveryWord:
  name = "every word"

  def nouns(self, text):
    return text.split()


def test_counts_of_another_tagger_are_made_anew(tmp_path, capsys, monkeypatch):
  index = write_index(tmp_path / "index", PARTS)
  run(index)
  capsys.readouterr()
  monkeypatch.setattr(statistics, "load_tagger", {"every word": EveryWord()}.get)
  run(index, tagger="every word")
  images = [image for part in PARTS for image in part]
  expected = statistics.table(statistics.count(images, EveryWord()), "index")
  assert capsys.readouterr().out == expected + "\n"


def test_a_count_that_was_damaged_is_made_again(tmp_path, capsys):
  index = write_index(tmp_path / "index", PARTS)
  run(index)
  first = capsys.readouterr().out
  (tmp_path / "index" / "stats" / "00001.json").write_text('{"of": ')
  run(index)
  assert capsys.readouterr().out == first


def test_an_unknown_tagger_is_refused_before_anything_is_counted(tmp_path):
  index = write_index(tmp_path / "index", PARTS)
  with pytest.raises(ValueError, match="no noun tagger 'guess'"):
    run(index, tagger="guess")
  assert not (tmp_path / "index" / "stats").exists()


def test_an_index_without_captions_is_refused(tmp_path):
  index = write_index(tmp_path / "index", [[[], []]])
  with pytest.raises(
    ValueError, match="no captions to count in 2 images: run `curate c"
  ):
    run(index, tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_counts_of_a_thousand_captions_are_the_same_from_two_worker_processes(
  tmp_path, capsys
):
  draw = random.Random(0)
  words = ["dog", "cat", "tree", "the", "of", "red", "runs", "house"]
  parts = [
    [
      [(" ".join(draw.choices(words, k=draw.randint(1, 9))), "short")]
      for _ in range(250)
    ]
    for _ in range(4)
  ]
  index = write_index(tmp_path / "index", parts)
  statistics.run(
    index,
    tagger="rules",
    output=None,
    beam_options=[
      "--direct_running_mode=multi_processing",
      "--direct_num_workers=2",
    ],
  )
  expected = statistics.count([image for part in parts for image in part], RULES)
  assert capsys.readouterr().out.startswith(statistics.table(expected, "index"))
  assert sorted(part_times(index)) == [f"{part:05d}.json" for part in range(4)]
