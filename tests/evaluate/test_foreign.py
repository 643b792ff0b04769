"""Images that anybody made: how they are matched to prompts, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from pixsigma_jax.evaluate import folder, foreign, scoring
from pixsigma_jax.evaluate.items import Item, ItemSet

PROMPTS = ["a red dog", "a cat", "a photo"]


@pytest.fixture
def evaluation(tmp_path):
  def make(images_per_item=1, **fields):
    sizes = {"height": 8, "width": 16, **fields}
    items = [Item(id=f"item{i}", prompt=p, **sizes) for i, p in enumerate(PROMPTS)]
    return folder.create(
      tmp_path / "evaluation",
      suite="paper",
      version="1",
      options={},
      item_set=ItemSet(tuple(items), images_per_item),
    )

  return make


def write_image(path, number, size=(16, 8)):
  """An image of one grey level, which says who it is."""
  path.parent.mkdir(parents=True, exist_ok=True)
  # Smooth and level: JPEG keeps it.
  Image.new("RGB", size, (10 * number,) * 3).save(path)


def shown(model):
  """Grey levels of the images of a model, in order."""
  return [
    int(scoring.read_image(model.image_path(item, image)).mean().round()) // 10
    for item, image in model.images()
  ]


def add(evaluation, directory, any_size=False):
  return foreign.add_images(evaluation, "theirs", directory, any_size=any_size)


def test_files_named_by_id_are_matched_by_it_wherever_they_lie(evaluation, tmp_path):
  for i, name in enumerate(["b/item2.png", "a/item0.jpg", "item1.png", "grid.png"]):
    write_image(tmp_path / "theirs" / name, i + 1)
  model = add(evaluation(), tmp_path / "theirs")
  assert shown(model) == [2, 3, 1]
  assert model.about["settings"]["matched"] == "id"
  assert model.missing() == []


def test_others_are_matched_by_order_in_which_ten_follows_nine(evaluation, tmp_path):
  names = ["10/1.png", "2/1.png", "2/10.png", "2/9.png", "10/0.png", "1/0.png"]
  for i, name in enumerate(names):
    write_image(tmp_path / "theirs" / name, i)
  model = add(evaluation(images_per_item=2), tmp_path / "theirs")
  assert shown(model) == [5, 1, 3, 2, 4, 0]
  assert model.about["settings"]["matched"] == "order"
  assert model.image_path(model.items[0], 1).name == "item0_1.png"


def test_images_that_are_there_stay_and_others_are_refused(evaluation, tmp_path):
  made = evaluation()
  for i in range(3):
    write_image(tmp_path / "theirs" / f"item{i}.png", i)
  model = add(made, tmp_path / "theirs")
  path = model.image_path(model.items[1])
  stamp = path.stat().st_mtime_ns
  model.image_path(model.items[0]).unlink()
  add(made, tmp_path / "theirs")
  assert path.stat().st_mtime_ns == stamp
  assert shown(model) == [0, 1, 2]
  Image.effect_noise((16, 8), 50).convert("RGB").save(tmp_path / "theirs" / "item1.png")
  with pytest.raises(FileExistsError, match=r"of another origin or other settings"):
    add(made, tmp_path / "theirs")


def test_sizes_may_differ_only_if_asked_for(evaluation, tmp_path):
  made = evaluation()
  for i in range(3):
    write_image(tmp_path / "theirs" / f"item{i}.png", i, size=(16, 8) if i else (8, 8))
  with pytest.raises(ValueError, match=r"1 of 3 images are of another size.*8 x 16"):
    add(made, tmp_path / "theirs")
  assert made.models() == []
  assert add(made, tmp_path / "theirs", any_size=True).missing() == []


def test_an_aspect_is_asked_for_where_the_model_decides_the_size(evaluation, tmp_path):
  made = evaluation(height=None, width=None, cells=(1, 2))
  for i in range(3):
    write_image(tmp_path / "theirs" / f"item{i}.png", i, size=(32, 16))
  assert len(shown(add(made, tmp_path / "theirs"))) == 3
  write_image(tmp_path / "square" / "item0.png", 0, size=(16, 16))
  for i in (1, 2):
    write_image(tmp_path / "square" / f"item{i}.png", i, size=(32, 16))
  with pytest.raises(ValueError, match="1 to 2 is asked for"):
    foreign.add_images(made, "square", tmp_path / "square", any_size=False)


def twice_named(root):
  for i in range(3):
    write_image(root / f"item{i}.png", i)
  write_image(root / "more" / "item1.jpg", 5)


def same_image(root):
  for i in range(3):
    write_image(root / f"item{i}.png", min(i, 1))


def too_few_by_id(root):
  write_image(root / "item0.png", 0)
  write_image(root / "item2.png", 1)


def too_many_by_order(root):
  for i in range(4):
    write_image(root / f"{i}.png", i)


def broken(root):
  for i in range(3):
    write_image(root / f"item{i}.png", i)
  (root / "item1.png").write_bytes(b"no image")


def nothing(root):
  root.mkdir()
  (root / "readme.txt").touch()


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (twice_named, "are both named for the image item1: take one away"),
    (same_image, r"item1\.png and .*item2\.png are the same image"),
    (too_few_by_id, "has 2 of 3 images and lacks item1: each prompt needs one"),
    (too_many_by_order, "has 4 images, none of them named by the ids"),
    (broken, r"item1\.png is no image"),
    (nothing, "has no images in it"),
  ],
)
def test_what_cannot_be_matched_is_one_clear_error(make, message, evaluation, tmp_path):
  made = evaluation()
  make(tmp_path / "theirs")
  with pytest.raises(ValueError, match=message):
    add(made, tmp_path / "theirs")
  assert made.models() == []


def test_names_of_models_are_checked(evaluation, tmp_path):
  for name in ("a", "b=c"):
    (tmp_path / name).mkdir()
  assert foreign.find_images([f"x={tmp_path / 'a'}"]) == {"x": tmp_path / "a"}
  # Without a name it is the folder's own.
  given = [f"{tmp_path / 'a'}/", f"x={tmp_path / 'b=c'}"]
  assert list(foreign.find_images(given)) == ["a", "x"]
  assert list(foreign.find_images([str(tmp_path / "b=c")])) == ["b=c"]
  for words, message in [
    ([f"={tmp_path / 'a'}"], "does not name the model: give NAME=DIR"),
    ([str(tmp_path / "a")] * 2, "two models called a: tell them apart with NAME=DIR"),
  ]:
    with pytest.raises(ValueError, match=message):
      foreign.find_images(words)
  with pytest.raises(NotADirectoryError, match="is no folder"):
    foreign.find_images(["a=nowhere"])
  with pytest.raises(ValueError, match=r"cannot be called '\.\./b'"):
    evaluation().model("../b")


def test_identical_grey_levels_are_not_identical_images(evaluation, tmp_path):
  """Files of one size and other bytes are other images."""
  random = np.random.default_rng(0)
  for i in range(3):
    pixels = random.integers(0, 256, (8, 16, 3), dtype=np.uint8)
    path = tmp_path / "theirs" / f"item{i}.png"
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path, compress_level=0)
  sizes = {p.stat().st_size for p in (tmp_path / "theirs").iterdir()}
  assert len(sizes) == 1
  assert add(evaluation(), tmp_path / "theirs").missing() == []


@pytest.mark.parametrize(("side", "together"), [(512, 64), (2048, 16), (8192, 1)])
def test_fewer_large_images_are_decoded_together(side, together, tmp_path):
  item = Item(id="a", prompt="a", height=side, width=side)
  assert scoring.chunk_size([(item, 0, tmp_path)] * 99, 64) == together
