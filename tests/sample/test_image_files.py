"""Images: eight bits, PNG files that remember, and sheets of many."""

import io
import json
import os
import threading

import numpy as np
import pytest
from PIL import Image

from pixsigma_jax.sample import image_files

SETTINGS = {
  "prompt": "a réd सात\nleft of 二 🐶",
  "seed": 7,
  "guidance_scale": 4.5,
  "height": 8,
}


def plain(color, size=(8, 8)):
  return Image.new("RGB", size, color)


def test_black_grey_and_white_are_the_ends_and_the_middle_and_beyond_is_clipped():
  image = np.array([[[-1, 0, 1], [-1.5, 0.997, 80]]], np.float32)
  assert np.asarray(image_files.to_image(image)).tolist() == [
    [[0, 128, 255], [0, 255, 255]]
  ]


def test_every_level_survives_the_way_back_and_forth():
  levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=-1)
  image = image_files.from_image(Image.fromarray(levels))
  assert (image.min(), image.max()) == (-1, 1)
  np.testing.assert_array_equal(np.asarray(image_files.to_image(image)), levels)


def test_a_png_remembers_pixels_prompt_seed_and_settings_in_any_script(tmp_path):
  image = image_files.to_image(
    np.random.default_rng(0).uniform(-1, 1, (4, 6, 3)).astype(np.float32)
  )
  image_files.save(tmp_path / "a.png", image, SETTINGS)
  with Image.open(tmp_path / "a.png") as read:
    assert np.array_equal(np.asarray(read), np.asarray(image))
    text = read.text
  assert text["prompt"] == SETTINGS["prompt"]
  assert text["seed"] == "7"
  assert json.loads(text["settings"]) == SETTINGS


def test_a_file_that_is_there_is_never_overwritten(tmp_path):
  path = tmp_path / "00000.png"
  image_files.save(path, plain("red"), SETTINGS)
  before = path.read_bytes()
  with pytest.raises(FileExistsError, match=r"00000\.png exists already"):
    image_files.save(path, plain("blue"), SETTINGS)
  assert path.read_bytes() == before
  assert list(tmp_path.iterdir()) == [path]


def test_an_image_that_cannot_be_written_leaves_no_file(tmp_path, monkeypatch):
  def full(self, path, **_):
    path.write_bytes(b"half an image")
    raise OSError("No space left on device")

  monkeypatch.setattr(Image.Image, "save", full)
  with pytest.raises(OSError, match="No space left"):
    image_files.save(tmp_path / "00000.png", plain("red"), SETTINGS)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", list(image_files.FORMATS))
def test_two_that_write_to_one_folder_lose_no_image(tmp_path, form):
  folders = [image_files.ImageFolder(tmp_path / "new", form) for _ in range(2)]
  together, written = threading.Barrier(2), []

  def write(who):
    for number in range(10):
      together.wait()
      about = SETTINGS | {"who": who, "number": number}
      path = folders[who].save(number, plain("red"), about)
      written.append((path, who, number))

  threads = [threading.Thread(target=write, args=(who,)) for who in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(written) == 20
  names = [path.name for path, _, _ in written]
  assert sorted(names) == sorted(p.name for p in (tmp_path / "new").iterdir())
  assert sorted(names) == [f"{i:05d}.{form}" for i in range(20)]
  for path, who, number in written:
    said = image_files.settings_of(path)
    assert (said["who"], said["number"]) == (who, number)


def test_a_folder_is_looked_through_once_however_many_images_are_saved(
  tmp_path, monkeypatch
):
  abandoned = tmp_path / "picture.png.01234567.partial"
  abandoned.touch()
  os.utime(abandoned, (0, 0))
  folder = image_files.ImageFolder(tmp_path)
  assert list(tmp_path.iterdir()) == []

  def listed(*_):
    raise AssertionError("listed")

  monkeypatch.setattr(os, "scandir", listed)
  monkeypatch.setattr(os, "listdir", listed)
  for number in range(2):
    folder.save(number, plain("red"), SETTINGS)
  monkeypatch.undo()
  assert sorted(p.name for p in tmp_path.iterdir()) == ["00000.png", "00001.png"]


def test_images_go_on_behind_all_that_others_wrote_meanwhile(tmp_path):
  folder = image_files.ImageFolder(tmp_path)
  for i in range(5):
    (tmp_path / f"{i:05d}.png").write_text("another's")
  names = [folder.save(i, plain("red"), SETTINGS).name for i in range(3)]
  assert names == ["00005.png", "00006.png", "00007.png"]
  assert (tmp_path / "00004.png").read_text() == "another's"


def test_alone_images_have_their_calls_order_in_whatever_order_they_come(tmp_path):
  (tmp_path / "00006.webp").touch()
  folder = image_files.ImageFolder(tmp_path)
  names = [folder.save(i, plain("red"), SETTINGS).name for i in (2, 0, 1)]
  assert names == ["00009.png", "00007.png", "00008.png"]


def test_an_image_that_a_format_cannot_hold_is_refused():
  image_files.check_sides("png", 20000, 70000)
  image_files.check_sides("webp", 16383, 16383)
  with pytest.raises(ValueError, match=r"webp holds no .* 16384 x 8 .* end at 16383"):
    image_files.check_sides("webp", 16384, 8)
  with pytest.raises(ValueError, match=r"jpeg holds no .* 8 x 65501"):
    image_files.check_sides("jpeg", 8, 65501)


def test_numbers_go_on_after_the_highest(tmp_path):
  assert image_files.next_number(tmp_path) == 0
  for name in ("00002.png", "100000.png", "grid.png", "7.png", "200000.png.partial"):
    (tmp_path / name).touch()
  assert image_files.next_number(tmp_path) == 100001


def test_a_grid_shows_every_image_in_its_place_enlarged_without_a_blur():
  colors = ["red", "lime", "blue", "white", "yellow"]
  sheet = image_files.grid([plain(color) for color in colors], columns=2)
  assert sheet.size == (2 * 96 + 2, 3 * 96 + 4)  # 8 pixels, twelve times as large
  for i, color in enumerate(colors):
    x, y = i % 2 * 98, i // 2 * 98
    cell = np.asarray(sheet.crop((x, y, x + 96, y + 96)))
    assert (cell == plain(color).getpixel((0, 0))).all()
  assert not np.asarray(sheet)[:, 96:98].any()  # the gap is black
  assert not np.asarray(sheet)[196:, 98:].any()  # so is a place that is left over


def test_images_of_several_sizes_keep_their_shape_in_a_grid():
  sheet = image_files.grid([plain("red", (16, 8)), plain("blue", (8, 16))])
  pixels = np.asarray(sheet)
  assert sheet.size == (2 * 96 + 2, 96)  # the longest side becomes 96
  rows, columns = np.nonzero(pixels[..., 0])
  assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (48, 96)
  rows, columns = np.nonzero(pixels[..., 2])
  assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (96, 48)


def test_a_label_stands_under_its_image_and_touches_no_other():
  labels = ["a red seven to the left of a blue two", "", "incomprehensibilities" * 9]
  sheet = image_files.grid([plain("black")] * 3, columns=3, labels=labels)
  pixels = np.asarray(sheet)
  assert not pixels[:96].any()
  written = [pixels[96:, x : x + 96].any() for x in (0, 98, 196)]
  assert written == [True, False, True]
  assert not pixels[:, 96:98].any()


def test_large_images_are_not_enlarged():
  assert image_files.grid([plain("red", (128, 64))]).size == (128, 64)


def test_a_grid_that_makes_no_sense_is_refused():
  with pytest.raises(ValueError, match="at least one image"):
    image_files.grid([])
  with pytest.raises(ValueError, match="at least 1 column, not 0"):
    image_files.grid([plain("red")], columns=0)
  with pytest.raises(ValueError, match="2 labels cannot stand under 1 images"):
    image_files.grid([plain("red")], labels=["a", "b"])


@pytest.mark.parametrize("form", image_files.FORMATS)
def test_bytes_are_those_of_the_file(tmp_path, form):
  image = Image.new("RGB", (5, 7), (200, 30, 10))
  settings = {"prompt": "a \N{SNOWMAN}", "seed": 3}
  path = tmp_path / f"picture.{form}"
  image_files.save(path, image, settings)
  content = image_files.to_bytes(image, settings, form)
  assert content == path.read_bytes()
  assert image_files.settings_of(io.BytesIO(content)) == settings
