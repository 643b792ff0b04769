"""The command `curate`: every step from the shell, in order, twice."""

import importlib
import json
import shutil

import numpy as np
import pytest
import skimage.data
from PIL import Image

from pixsigma_jax.data.index import open_index
from tests import commands


@pytest.fixture
def curate(capsys, monkeypatch):
  return lambda *arguments: commands.run(capsys, monkeypatch, "curate", *arguments)


@pytest.fixture
def images(tmp_path):
  folder = tmp_path / "images"
  folder.mkdir()
  for name in ("astronaut", "coffee", "chelsea"):
    image = Image.fromarray(getattr(skimage.data, name)())
    image.resize((image.width // 4, image.height // 4)).save(folder / f"{name}.png")
  shutil.copy(folder / "coffee.png", folder / "espresso.png")
  (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff")
  return folder


@pytest.fixture
def models(monkeypatch):
  """Stand-ins for the networks: a brighter image scores higher, and is said to be."""

  class Scorer:
    def __init__(self, clip, head):
      assert clip == "some/clip"

    def score(self, images):
      return np.array([np.asarray(image).mean() for image in images], np.float32)

  def caption_images(images, *, model, instruction, max_new_tokens):
    return [f"{instruction} {image.width}" for image in images]

  for name, stand_in in [("aesthetics", Scorer), ("captioner", caption_images)]:
    module = importlib.import_module(f"pixsigma_jax.curate.{name}")
    monkeypatch.setattr(module, stand_in.__name__, stand_in)


def test_a_heap_becomes_training_data(curate, images, models, tmp_path):
  index, head = tmp_path / "index", tmp_path / "head.pth"
  head.write_bytes(b"weights")
  lines = [{"id": "coffee", "caption_long": "a cup"}, {"id": "tea", "caption": "none"}]
  (tmp_path / "more.jsonl").write_text("\n".join(map(json.dumps, lines)))
  commands_ = [
    ["scan", index, f"--images={images}", "--per_part=2"],
    ["score", index, "--clip=some/clip", f"--head={head}"],
    ["caption", index, f"--import={tmp_path / 'more.jsonl'}"],
    ["caption", index, "--captioner=some/model", "--instruction=Width:"],
    ["filter", index, "--min_side=60", "--keep_quantile=0.5", "--need_caption=any"],
  ]
  outputs = []
  for arguments in commands_:
    done = curate(*arguments)
    assert (done.code, done.err.count("Error")) == (0, 0), done.err
    outputs.append(done.out)
  scan, score, imported, captioned, kept = map(json.loads, outputs)
  assert (scan["images"], scan["duplicates"]) == (5, 1)
  assert scan["errors"] == {"not an image": 1}
  assert (score["images"], score["without_score"]) == (5, 2)
  assert (imported["added"], imported["first_unknown"]) == (1, ["tea"])
  assert (captioned["images"], captioned["images_without_caption"]) == (4, 1)
  # Of astronaut, coffee and chelsea the better two.
  assert kept["kept"] == 2
  assert kept["refused"] == {"error": 1, "duplicate": 1, "aesthetic": 1}
  opened = open_index(str(index))
  rows = [
    row
    for part in range(opened.num_parts)
    for row in opened.read(part, "scan", "captions", "kept").to_pylist()
  ]
  coffee = next(row for row in rows if row["id"] == "coffee")
  assert coffee["captions"] == [
    {"text": "a cup", "kind": "long"},
    {"text": "Width: 150", "kind": "long"},
  ]
  stamps = {path: path.stat().st_mtime_ns for path in index.rglob("*.*")}
  again = [curate(*arguments).out for arguments in commands_]
  assert again[1:4] == [
    f"{index} has these scores already.\n",
    *[f"{index} has these captions already.\n"] * 2,
  ]
  assert (again[0], again[4]) == (outputs[0], outputs[4])
  assert {path: path.stat().st_mtime_ns for path in index.rglob("*.*")} == stamps


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["scann", "x"], "scann is no step of curation, only scan, score, caption, filter"),
    (["scan", "x"], "`curate scan` needs --images."),
    (["score", "x"], "`curate score` needs --clip."),
    (["caption", "x"], "takes captions from --import or from --captioner: give one."),
    (
      ["scan", "x", "--images=y", "--min_side=3"],
      "`curate scan` has no flag --min_side, only --beam, --caption_field, ",
    ),
    (["filter", "x"], "x is not an index: it has no index.json."),
    (["scan", "x", "--images=there/is/none"], "There is no there/is/none."),
    (["contact-sheet", "x"], "`curate contact-sheet` needs --resolution."),
    (["buckets", "x.json"], "`curate buckets` needs --resolution."),
    (["scan", "x", "--images=gs://b/p"], "gs://b/p cannot be reached: Please install"),
    (
      ["scan", "gs://b/x", "--images=y"],
      "gs://b/x/index.json cannot be reached: Please install",
    ),
    (
      ["filter", "gs://b/x"],
      "gs://b/x/index.json cannot be reached: Please install gcsfs",
    ),
    (
      ["scan", "x", "--images=foo://b"],
      "foo://b cannot be reached: Protocol not known",
    ),
    (
      ["scan", "x", "--images=y", "--beam=--runner=Nope"],
      "--beam: the runner Nope cannot be used: Unexpected pipeline runner: Nope.",
    ),
    (
      ["scan", "x", "--images=y", "--beam=--direct_num_worker=3"],
      "--beam: Beam has no --direct_num_worker=3.",
    ),
    (
      ["scan", "x", "--images=y", "--beam=direct_num_workers=3"],
      "--beam: Beam has no direct_num_workers=3.",
    ),
    (
      ["scan", "x", "--images=y", "--beam=--direct_num_workers=three"],
      "--beam: argument --direct_num_workers: invalid int value: 'three'.",
    ),
    (["scan", "x", "--images=y", "--beam='--a"], "--beam='--a is not understood: No"),
    (["scan", "x", "--images=y", "--caption_field=a,"], "are names of fields, not ''."),
  ],
)
def test_a_mistake_ends_in_one_line(curate, arguments, message, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  done = curate(*arguments)
  assert done.code == 1
  assert done.err.startswith("Error: ")
  assert message in done.err
  assert done.err.count("\n") == 1


@pytest.mark.parametrize(
  ("module", "arguments", "given", "passed"),
  [
    (
      "statistics",
      ["stats", "x", "--tagger=nltk", "--output=d", "--beam=--a=1 --b='2 3'"],
      ("x",),
      {"tagger": "nltk", "output": "d", "beam_options": ["--a=1", "--b=2 3"]},
    ),
    (
      "contact_sheet",
      ["contact-sheet", "x", "--resolution=512", "--output=s.png", "--count=3"],
      ("x",),
      {"resolution": 512, "table": None, "output": "s.png", "count": 3},
    ),
    (
      "buckets",
      ["buckets", "t.json", "--resolution=512", "--step=32"],
      ("t.json",),
      {"resolution": 512, "step": 32},
    ),
  ],
)
def test_steps_of_other_files_get_their_flags(
  curate, monkeypatch, module, arguments, given, passed
):
  calls = []
  module = importlib.import_module(f"pixsigma_jax.curate.{module}")
  monkeypatch.setattr(module, "run", lambda *a, **k: calls.append((a, k)))
  assert curate(*arguments).code == 0
  assert calls == [(given, passed)]
