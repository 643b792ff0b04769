"""The sheet: which images are on it, what it shows of them, and any caption at all."""

import hypothesis
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from pixsigma_jax.curate import contact_sheet
from pixsigma_jax.data.buckets import BUCKETS
from pixsigma_jax.data.crops import CropRule, filter_at
from pixsigma_jax.data.index import SCHEMAS, create_index
from pixsigma_jax.data.sources import Unit

RED, GREEN, BLUE = (200, 10, 10), (10, 180, 20), (20, 30, 220)
SIDE, MARGIN = contact_sheet._SIDE, contact_sheet._MARGIN


def striped(width=900, height=300):
  """Red, green, blue, from left to right."""
  original = Image.new("RGB", (width, height), GREEN)
  original.paste(RED, (0, 0, width // 3, height))
  original.paste(BLUE, (2 * width // 3, 0, width, height))
  return original


def write_index(folder, images, *, per_part=2, kept=None, captions=(), errors=()):
  """An index of files in `folder`; `pictures`: name → image, or None for no file."""
  source, names = folder / "images", list(images)
  source.mkdir(parents=True)
  for name, original in images.items():
    if original is not None:
      original.save(source / f"{name}.png")
  runs = [names[i : i + per_part] for i in range(0, len(names), per_part)]
  units = [Unit("folder", "", len(run), 0, run[0], run[-1]) for run in runs]
  index = create_index(str(folder / "index"), str(source), units)
  for part, run in enumerate(runs):
    rows = [
      {
        "id": name,
        "location": f"{name}.png",
        "error": "truncated" if name in errors else None,
        "captions": [{"text": text, "kind": kind} for text, kind in captions],
      }
      for name in run
    ]
    index.write("scan", part, pa.Table.from_pylist(rows, SCHEMAS["scan"]))
    if kept is not None:
      chosen = [name in kept for name in run]
      columns = {"kept": chosen, "reason": [None if k else "small" for k in chosen]}
      index.write("kept", part, pa.table(columns, SCHEMAS["kept"]))
  return index.directory


def run(index, output, resolution=256, table=None, count=20):
  contact_sheet.run(
    index, resolution=resolution, table=table, output=str(output), count=count
  )
  with Image.open(output) as sheet:
    return sheet.convert("RGB")


@pytest.fixture
def drawn(monkeypatch):
  """Every text that is drawn."""
  texts, draw_text = [], ImageDraw.ImageDraw.text

  def text(self, xy, text, *arguments, **options):
    texts.append(text)
    draw_text(self, xy, text, *arguments, **options)

  monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
  return texts


def share(original, color, tolerance=12):
  """How much of an image has a color."""
  difference = np.abs(np.asarray(original).astype(int) - color).max(axis=-1)
  return (difference < tolerance).mean()


def test_the_right_image_is_what_the_crop_rule_makes(tmp_path):
  image = striped(600, 500)
  sheet = run(write_index(tmp_path, {"a": image}), tmp_path / "sheet.png")
  rule = CropRule(BUCKETS[256], filter_at(256))
  seen = rule.apply(image)
  left = MARGIN + SIDE + contact_sheet._GAP + (SIDE - seen.width) // 2
  rows = np.asarray(sheet).astype(int)
  height = rows.shape[0]
  # Where on the sheet it is, found by its first row.
  wanted = np.asarray(seen).astype(int)
  band = rows[:, left : left + seen.width]
  tops = [y for y in range(height - seen.height) if (band[y] == wanted[0]).all()]
  assert any((band[y : y + seen.height] == wanted).all() for y in tops)


def test_the_left_image_is_dark_outside_of_the_crop(tmp_path):
  # 4 to 1 is the widest size: of 900 x 100 pixels 250 on each side are cut off.
  image, rule = striped(900, 100), CropRule(BUCKETS[256], filter_at(256))
  crop = rule.plan(image.height, image.width)
  original = contact_sheet._original(image, crop)
  assert original.size == (320, 36)
  columns = np.asarray(original)[original.height // 2].astype(int)
  edges = [round(x * 320 / 900) for x in (crop.box[1], crop.box[3])]
  dimmed = [round(contact_sheet._DIMMED * level) for level in RED]
  assert np.abs(columns[4 : edges[0] - 2] - dimmed).max() < 8
  assert np.abs(columns[edges[0] + 4 : 104] - RED).max() < 8
  assert columns[edges[0]].tolist() == list(contact_sheet._FRAME)
  assert columns[edges[1] - 1].tolist() == list(contact_sheet._FRAME)


def test_images_are_spread_evenly_over_the_kept(tmp_path, drawn):
  names = [f"n{i:02d}" for i in range(20)]
  images = {name: Image.new("RGB", (64, 64), GREEN) for name in names}
  kept = [name for name in names if name != "n03"]
  index = write_index(tmp_path, images, per_part=3, kept=kept)
  run(index, tmp_path / "sheet.png", count=4)
  shown = [text for text in drawn if text in names]
  # The middles of four quarters of the 19.
  assert shown == [kept[i] for i in (2, 7, 11, 16)]


def test_all_are_shown_where_there_are_no_more(tmp_path, drawn):
  images = {name: striped(90, 60) for name in ("a", "b", "c", "d", "e")}
  run(write_index(tmp_path, images, errors=["b"]), tmp_path / "sheet.png", count=9)
  assert [text for text in drawn if text in images] == ["a", "c", "d", "e"]


def test_sizes_scale_and_loss_stand_below(tmp_path, drawn):
  images = {"large": striped(2048, 512), "small": striped(100, 100)}
  run(write_index(tmp_path, images), tmp_path / "sheet.png")
  assert "512 x 2048 to 128 x 512, scaled by 0.25, 0% cut off" in drawn
  small = next(text for text in drawn if text.startswith("100 x 100"))
  assert small.startswith(
    "100 x 100 to 256 x 256, scaled by 2.56, 0% cut off. Too small"
  )
  assert "--allow_upscaling" in " ".join(drawn)


def test_a_table_of_ones_own_is_used(tmp_path, drawn):
  (tmp_path / "table.json").write_text('{"1.0": [64, 64]}')
  index = write_index(tmp_path, {"wide": striped(300, 100)})
  table = str(tmp_path / "table.json")
  sheet = run(index, tmp_path / "sheet.png", resolution=64, table=table)
  assert "100 x 300 to 64 x 64, scaled by 0.64, 67% cut off" in drawn
  right = sheet.crop((MARGIN + SIDE, 0, sheet.width, sheet.height))
  assert share(right, GREEN) > 0.2
  assert share(right, RED) < 0.02


def test_the_first_caption_of_each_kind_is_shown_and_how_many_there_are(
  tmp_path, drawn
):
  captions = [("short one", "short"), ("word " * 300, "long"), ("another", "short")]
  index = write_index(tmp_path, {"a": striped()}, captions=captions)
  run(index, tmp_path / "sheet.png")
  assert "short: short one" in drawn
  lines = [text for text in drawn if "word word" in text]
  assert lines[0].startswith("long: word")
  assert lines[-1].endswith(" …")
  assert len(lines) == contact_sheet._MOST_LINES - 1
  assert "3 captions in all" in drawn
  assert "another" not in " ".join(drawn)


@hypothesis.given(st.text(), st.integers(1, 5))
@hypothesis.example("一只狗坐在雪地里" * 20, 3)
@hypothesis.example("كلب \u202e שלום\u0000\n\t हिन्दी 🐶\u200d🐶 " + "W" * 3000, 2)
def test_lines_of_any_script_fit_and_can_be_drawn(text, most):
  lines = contact_sheet._wrapped(text, most, RED)
  assert len(lines) <= most
  draw = ImageDraw.Draw(Image.new("RGB", (8, 8)))
  for line, _ in lines:
    assert line.isprintable()  # no control characters, nothing that turns it around
    draw.text((0, 0), line, font=contact_sheet._font())
    width = contact_sheet._font().getlength(line)
    # A character is wider than no line, and three dots come after a cut.
    assert width <= 2 * SIDE + contact_sheet._GAP or len(line) <= 3


@hypothesis.given(st.lists(st.text("ab \n", max_size=50), max_size=20))
def test_a_text_that_is_short_enough_is_kept_whole(words):
  text = " ".join(words)[:400]
  lines = contact_sheet._wrapped(text, 99, RED)
  whole = "".join(line for line, _ in lines)
  assert whole.replace(" ", "") == "".join(text.split())
  assert all(line == line.strip() != "" for line, _ in lines)


def test_an_image_that_is_gone_leaves_a_gap_with_its_reason(tmp_path, drawn):
  index = write_index(tmp_path, {"there": striped(), "gone": None})
  (tmp_path / "images" / "gone.png").write_bytes(b"\x89PNG\r\n")
  run(index, tmp_path / "sheet.png")
  assert "Cannot be shown: not an image" in drawn


def test_what_cannot_be_done_is_refused_and_leaves_no_file(tmp_path):
  index = write_index(tmp_path, {"a": striped(90, 30)}, kept=[])
  output = tmp_path / "sheet.png"
  with pytest.raises(ValueError, match="no image to show: `curate filter` kept none"):
    run(index, output)
  with pytest.raises(ValueError, match=r"no published table of sizes for 300 pixels"):
    run(index, output, resolution=300)
  with pytest.raises(ValueError, match=r"--output=.*sheet\.jpg must end in \.png"):
    run(index, tmp_path / "sheet.jpg")
  with pytest.raises(ValueError, match="--count=0 must be at least 1"):
    run(index, output, count=0)
  with pytest.raises(FileNotFoundError, match=r"no table of sizes at .*none\.json"):
    run(index, output, table=str(tmp_path / "none.json"))
  assert not list(tmp_path.glob("sheet*"))
