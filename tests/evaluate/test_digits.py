"""The exact reader: how far its word can be trusted, measured on real renders."""

import numpy as np
import pytest

from pixsigma_jax.data import digits
from pixsigma_jax.data.digits import COLORS, TASKS, Item, Scene
from pixsigma_jax.evaluate.digits import (
  evaluation_prompts,
  prompt_accuracy,
  read,
  read_batch,
)

WEIGHTS = {"single": 0.2, "left_of": 0.4, "above": 0.4}


def handwritten(split):
  """Every glyph of a split once, in colors that take turns."""
  glyphs = [(i, d) for d in range(10) for i in digits.handwriting(split, d)]
  colors = list(COLORS)
  return [
    (Scene((Item(colors[n % len(colors)], digit),)), (index,))
    for n, (index, digit) in enumerate(glyphs)
  ]


def rendered(pairs, cell=8):
  return [digits.render(scene, glyphs, cell) for scene, glyphs in pairs]


@pytest.fixture(scope="module")
def world():
  """Training images of all tasks, and their scenes."""
  pairs = list(digits.training_scenes(1, 1000, WEIGHTS))
  return rendered(pairs), [scene for scene, _ in pairs]


@pytest.mark.parametrize("cell", [8, 16])
def test_reads_all_colors_and_995_in_1000_digits_it_was_not_taught(cell):
  pairs = handwritten("training")
  readings = read_batch(np.stack(rendered(pairs, cell)), (1, 1))
  truth = [scene.items for scene, _ in pairs]
  assert [items[0].color for items in readings] == [items[0].color for items in truth]
  right = [a[0].digit == b[0].digit for a, b in zip(readings, truth, strict=True)]
  assert np.mean(right) >= 0.995


def test_knows_the_handwriting_it_was_taught_by_heart():
  pairs = handwritten("reader")
  assert prompt_accuracy(rendered(pairs), [scene for scene, _ in pairs]).all()


def test_a_faint_image_reads_like_a_bold_one(world):
  bold = np.stack([image for image in world[0] if image.shape == (8, 16, 3)])
  faint = bold / 2 - 0.5  # half the light
  assert read_batch(faint, (1, 2)) == read_batch(bold, (1, 2))


def test_moderate_noise_is_read_through(world):
  images, scenes = world
  noise = np.random.default_rng(0)
  noisy = [
    image + noise.normal(0, 0.2, image.shape).astype(np.float32) for image in images
  ]
  assert np.mean(prompt_accuracy(noisy, scenes)) > 0.95


def test_whole_prompts_of_every_task_are_read(world):
  right = prompt_accuracy(*world)
  for task in TASKS:
    of_task = [scene.task == task for scene in world[1]]
    assert np.mean(right[of_task]) >= 0.98  # two digits at 0.995 each, and luck


def test_shuffled_captions_score_by_chance():
  pairs = handwritten("training")
  shuffled = np.random.default_rng(0).permutation(len(pairs))
  scenes = [pairs[i][0] for i in shuffled]
  # One in seventy, and five standard errors.
  assert np.mean(prompt_accuracy(rendered(pairs), scenes)) < 1 / 70 + 0.02


def test_pure_noise_scores_by_chance():
  noise = np.random.default_rng(0).uniform(-1, 1, (700, 8, 8, 3)).astype(np.float32)
  scenes = digits.scenes("single", seen=True) + digits.scenes("single", seen=False)
  assert np.mean(prompt_accuracy(list(noise), scenes * 10)) < 1 / 70 + 0.0225


@pytest.mark.parametrize("relation", ["left_of", "above"])
def test_a_prompt_is_right_only_if_every_item_is_in_its_place(relation):
  red, blue = Item("red", 7), Item("blue", 2)
  scene = Scene((red, blue), relation)
  glyphs = [digits.handwriting("reader", item.digit)[0] for item in scene.items]
  image = digits.render(scene, glyphs, 16)
  claims = [(red, blue), (blue, red), (red, Item("blue", 3)), (Item("cyan", 7), blue)]
  scenes = [Scene(items, relation) for items in claims]
  assert prompt_accuracy([image] * 4, scenes).tolist() == [True, False, False, False]


def test_cells_are_read_in_rows_whatever_their_number():
  items = [Item(color, digit) for digit, color in enumerate(list(COLORS)[:6])]
  cells = [
    digits.render(Scene((item,)), digits.handwriting("reader", item.digit)[:1], 8)
    for item in items
  ]
  rows = [np.concatenate(cells[i : i + 3], axis=1) for i in (0, 3)]
  assert read(np.concatenate(rows, axis=0), (2, 3)) == tuple(items)


def test_one_image_reads_as_it_does_in_a_batch(world):
  images = [image for image in world[0] if image.shape == (16, 8, 3)][:5]
  assert read_batch(np.stack(images), (2, 1)) == [
    read(image, (2, 1)) for image in images
  ]


@pytest.mark.parametrize("size", [(8, 12), (12, 24), (0, 0)])
def test_an_image_that_does_not_divide_into_cells_is_refused(size):
  with pytest.raises(
    ValueError, match=f"{size[0]}x{size[1]} image does not divide into"
  ):
    read(np.zeros((*size, 3), np.float32), (1, 2))


def test_an_image_of_the_wrong_shape_for_its_scene_is_refused(world):
  single = digits.scenes("single", seen=True)[0]
  with pytest.raises(ValueError, match="8x16 image does not divide into 1x1 cells"):
    prompt_accuracy([np.zeros((8, 16, 3), np.float32)], [single])
  with pytest.raises(ValueError, match="1 images cannot be held against 2 scenes"):
    prompt_accuracy([np.zeros((8, 8, 3), np.float32)], [single, single])


def test_evaluation_asks_as_much_of_every_task_seen_and_unseen():
  prompts = evaluation_prompts(0, 9)
  assert len(prompts) == 9 * 3 * 2
  for task in TASKS:
    for novelty in ("seen", "unseen"):
      asked = [p for p in prompts if (p.task, p.novelty) == (task, novelty)]
      assert len(asked) == 9
      assert {p.scene for p in asked} <= set(
        digits.scenes(task, seen=novelty == "seen")
      )
      # There are seven unseen single digits: all of them, then the first two again.
      only_seven = (task, novelty) == ("single", "unseen")
      assert len({p.scene for p in asked}) == (7 if only_seven else 9)


def test_an_evaluation_prompt_asks_for_its_scene_in_a_sentence():
  for prompt in evaluation_prompts(3, 20):
    assert digits.parse(prompt.prompt) == prompt.scene
    assert prompt.prompt.startswith("a ")


def test_the_seed_decides_the_evaluation_prompts():
  prompts = evaluation_prompts(1, 5)
  assert evaluation_prompts(1, 5) == prompts
  assert evaluation_prompts(2, 5) != prompts
