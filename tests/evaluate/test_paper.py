"""The suite `paper` from an index to a report, interrupted on its way."""

import json

import numpy as np
import pytest
from PIL import Image

from pixsigma_jax import disk
from pixsigma_jax.data import buckets
from pixsigma_jax.evaluate import folder, items, report, scoring
from pixsigma_jax.evaluate.suites import Figure, Published, suite
from tests import commands
from tests.evaluate import networks
from tests.evaluate.test_make_set import TABLE, captions, finish
from tests.prepare import world
from tests.sample import models

COUNT = 6
small_inception = networks.small_inception


@pytest.fixture(autouse=True)
def small_world(monkeypatch):
  """Images of 8 pixels, and parts of three items."""
  monkeypatch.setitem(buckets.BUCKETS, 8, TABLE)
  monkeypatch.setattr(scoring, "ITEMS_PER_PART", 3)


@pytest.fixture
def evaluate(capsys, monkeypatch):
  def evaluate(*arguments):
    return commands.run(capsys, monkeypatch, "evaluate", *arguments)

  return evaluate


@pytest.fixture
def held_out(evaluate, tmp_path):
  """A set, made by the command."""
  images = world.make_folder(
    tmp_path / "world", [(12, 12 + 14 * (i % 2)) for i in range(30)]
  )
  finish(world.make_index(tmp_path / "index", images, captions=captions))
  done = evaluate(
    "make-set",
    tmp_path / "index",
    f"--output={tmp_path / 'set'}",
    f"--count={COUNT}",
    "--resolution=8",
    "--holdout=0.9",
  )
  assert done.code == 0, done.err
  assert done.out == f"{tmp_path / 'set' / 'manifest.json'}\n"
  return tmp_path / "set"


class Killed(BaseException):
  """What nothing catches, as if the process had ended."""


def kill_after(monkeypatch, writes):
  """Lets so many files be published, and then no more; returns what undoes it."""
  left = [writes]

  def killing(publish):
    def publish_or_die(partial, path):
      if not left[0]:
        # What a killed process of another machine, or an earlier one, leaves behind.
        path.with_name(f"{path.name}.00000000_1_00000000.partial").write_bytes(b"half")
        raise Killed
      left[0] -= 1
      publish(partial, path)

    return publish_or_die

  context = pytest.MonkeyPatch()
  for name in ("publish", "publish_new"):
    context.setattr(disk, name, killing(getattr(disk, name)))
  return context


def stamps(output):
  return {
    path: path.stat().st_mtime_ns
    for pattern in ("models/*/images/*.png", "**/scores/*/*.parquet")
    for path in output.glob(pattern)
  }


def test_from_an_index_to_a_report_killed_and_resumed(
  evaluate, held_out, small_inception, tmp_path, monkeypatch
):
  config = models.nano(caption_length=9)
  models.save_snapshot(tmp_path / "run", config, 3)
  clip = networks.write_clip(tmp_path / "clip")
  output = tmp_path / "evaluation"
  everything = [
    "paper",
    f"--set={held_out}",
    f"--output={output}",
    f"--checkpoints={tmp_path / 'run'},again={tmp_path / 'run'}",
    f"--images=real={held_out / 'images'}",
    f"--inception={networks.write_inception(tmp_path / 'inception.safetensors')}",
    f"--clip={clip}",
    f"--clip_cmmd={clip}",
    "--scorers=fid,cmmd,clip",
    "--num_inference_steps=2",
    "--dtype=float32",
    "--batch_size=3",
    "--resamples=20",
    "--distance_resamples=2",
  ]
  # prompts.jsonl, suite.json and model.json are files too.
  for writes in (6, 23):
    context = kill_after(monkeypatch, writes)
    before = stamps(output)
    with pytest.raises(Killed):
      evaluate(*everything)
    context.undo()
    # What was whole before stayed, and only whole files have names.
    assert {path: t for path, t in stamps(output).items() if path in before} == before
    for path in output.glob("models/*/images/*.png"):
      with Image.open(path) as image:
        image.load()
  assert list(output.glob("**/*.parquet"))
  before = stamps(output)
  done = evaluate(*everything)
  assert done.code == 0, done.err
  after = stamps(output)
  assert before.items() <= after.items()
  assert len(list(output.glob("models/*/images/*.png"))) == 3 * COUNT
  assert len(list(output.glob("**/*.parquet"))) == 2 * (3 * 3 + 2)

  content = json.loads((output / "report.json").read_text())
  figures = {
    model["name"]: {f["name"]: f for f in model["figures"]}
    for model in content["models"]
  }
  assert list(figures) == ["run", "again", "real"]
  values = {m: {n: f["value"] for n, f in of.items()} for m, of in figures.items()}
  # The set is itself; the same checkpoint drawn twice is itself, too.
  assert values["real"]["fid"] == pytest.approx(0, abs=1e-6)
  assert values["real"]["cmmd"] == pytest.approx(0, abs=1e-6)
  assert values["run"] == values["again"]
  assert values["run"]["fid"] > 1e-3
  assert figures["run"]["clip"]["low"] <= values["run"]["clip"]
  assert figures["run"]["fid"]["basis"]["references"] == str(COUNT)
  # The paper's own numbers stand beside ours, and the report says why they are others.
  text = (output / "report.md").read_text()
  assert "| fid | PixArt-Σ 512 px | 8.244 | PixArt-Σ, table 3 |" in text
  assert "images is 30000 there and 6 here" in text
  assert "was never published" in text

  # An image that was drawn alone is the one that was drawn in between.
  one = next(output.glob("models/run/images/*.png"))
  pixels = np.asarray(Image.open(one))
  one.unlink()
  done = evaluate("score", *[everything[0], everything[2], *everything[5:9]])
  assert (done.code, done.out) == (1, "")
  assert "run has 5 of 6 images, and lacks" in done.err
  done = evaluate(
    "sample", *[everything[0], everything[2], everything[3], *everything[9:12]]
  )
  assert done.code == 0, done.err
  assert (np.asarray(Image.open(one)) == pixels).all()

  # Other settings are another model's.
  done = evaluate(
    "sample", "paper", f"--output={output}", everything[3], "--num_inference_steps=3"
  )
  assert done.code == 1
  assert "holds images of another origin or other settings" in done.err

  # Weights of another seed: scores are made anew, and said so.
  other = networks.write_inception(tmp_path / "other.safetensors", seed=1)
  done = evaluate(
    "score", "paper", f"--output={output}", "--scorers=fid", f"--inception={other}"
  )
  assert done.code == 0, done.err
  changed = stamps(output)
  assert all(
    (changed[path] != t) == (path.parent.name == "fid")
    for path, t in after.items()
    if path.suffix == ".parquet"
  )


def test_a_set_that_was_changed_is_refused(held_out):
  options = {"set": str(held_out)}
  item_set = suite("paper").items(options)
  assert len(item_set.items) == COUNT
  assert item_set.sources["prompts.jsonl"] == disk.file_hash(held_out / "prompts.jsonl")
  path = held_out / item_set.items[3].reference
  path.rename(tmp := path.with_suffix(".gone"))
  with pytest.raises(
    FileNotFoundError, match=r"lacks 1 of 6 images, images/00003\.png"
  ):
    suite("paper").items(options)
  tmp.rename(path)
  found = list(item_set.items)
  items.write(held_out / "prompts.jsonl", found[1:])
  with pytest.raises(ValueError, match="was changed: it has 5 prompts"):
    suite("paper").items(options)
  with pytest.raises(FileNotFoundError, match=r"is no set: it has no manifest\.json"):
    suite("paper").items({"set": str(held_out / "images")})
  with pytest.raises(ValueError, match="Give --set=DIR"):
    suite("paper").items({"set": None})


def figure(name="fid", value=1.0, **basis):
  return Figure(name=name, value=value, basis={"images": "10", **basis})


def test_numbers_of_different_bases_are_told_apart():
  same = {"a": [figure()], "b": [figure(value=2.0)]}
  assert report.differences(same, ()) == []
  other = {
    "a": [figure(), figure("kid")],
    "b": [figure(resize="clean"), figure("kid", resize="clean")],
  }
  [line] = report.differences(other, ())
  assert line == "Not comparable in fid, kid, a and b: resize is none and clean"
  number = Published(
    figure="fid", model="Σ", value=3.0, source="here", basis={"images": "30000"}
  )
  [line] = report.differences(same, (number,))
  assert (
    line == "Not comparable in fid, ours and here: images is 30000 there and 10 here"
  )
  assert report.differences({"a": [figure("clip")]}, (number,)) == []


def test_a_folder_of_other_prompts_is_not_written_into(tmp_path):
  item = items.Item(id="a", prompt="a red dog", height=8, width=8)
  about = {"suite": "paper", "version": "1", "options": {}}
  path = tmp_path / "evaluation"
  made = folder.create(path, item_set=items.ItemSet((item,)), **about)
  again = folder.create(path, item_set=items.ItemSet((item,)), **about)
  assert made == again
  other = items.ItemSet((items.Item(id="a", prompt="a cat", height=8, width=8),))
  with pytest.raises(FileExistsError, match="holds other prompts: items is"):
    folder.create(path, item_set=other, **about)
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "thesis.tex").touch()
  with pytest.raises(FileExistsError, match=r"it holds thesis\.tex"):
    folder.create(tmp_path / "mine", item_set=other, **about)
  (path / "prompts.jsonl").write_text((path / "prompts.jsonl").read_text() * 2)
  with pytest.raises(ValueError, match=r"prompts\.jsonl was changed: its 2 items"):
    folder.open_folder(path)
