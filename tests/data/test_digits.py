"""The miniature's world: images, prompts, and what is kept from training."""

import itertools
import zlib
from collections import Counter

import numpy as np
import pytest

from pixsigma_jax.data import digits
from pixsigma_jax.data.digits import HELD_OUT, TASKS, Item, Scene

WEIGHTS = {"single": 0.2, "left_of": 0.4, "above": 0.4}
EVERY_SCENE = [
  scene
  for task, seen in itertools.product(TASKS, (True, False))
  for scene in digits.scenes(task, seen=seen)
]


def scene_of(*names, relation=None):
  items = [name.split() for name in names]
  return Scene(
    tuple(Item(color, digits.DIGITS.index(digit)) for color, digit in items), relation
  )


def first_glyphs(scene, split="training"):
  return [digits.handwriting(split, item.digit)[0] for item in scene.items]


def draw(scene, cell=8):
  return digits.render(scene, first_glyphs(scene), cell)


def averaged(image, times):
  h, w, c = image.shape
  return image.reshape(h // times, times, w // times, times, c).mean(axis=(1, 3))


def all_captions(scene):
  return list(itertools.chain.from_iterable(digits.captions(scene).values()))


def test_reading_undoes_captioning_for_every_scene():
  for i, scene in enumerate(EVERY_SCENE):
    ways = all_captions(scene)
    assert digits.parse(ways[i % len(ways)]) == scene  # phrases take turns


def test_reading_undoes_every_way_of_captioning():
  for scene in EVERY_SCENE[::47]:
    assert {digits.parse(caption) for caption in all_captions(scene)} == {scene}


def test_canonical_captions_read_like_the_prompts_of_the_documentation():
  left = digits.captions(scene_of("red seven", "blue two", relation="left_of"))
  above = digits.captions(scene_of("green three", "white eight", relation="above"))
  assert left["long"][0] == "a red seven left of a blue two"
  assert left["short"][0] == "red seven left of blue two"
  assert above["long"][0] == "a green three above a white eight"


def test_captions_have_at_most_ten_words():
  captions = itertools.chain.from_iterable(map(all_captions, EVERY_SCENE[::47]))
  assert max(len(caption.split()) for caption in captions) == 10


def test_capitals_and_punctuation_do_not_change_a_prompt():
  expected = scene_of("red seven", "blue two", relation="left_of")
  assert digits.parse("  A RED seven,  left of a Blue two. ") == expected


def test_an_unreadable_prompt_is_refused_by_its_unknown_words():
  with pytest.raises(ValueError, match=r"'a purple seven' \(unknown: 'purple'\).*red"):
    digits.parse("a purple seven")
  with pytest.raises(ValueError, match="Cannot read the prompt 'red left': write it"):
    digits.parse("red left")


def test_held_out_are_a_tenth_with_every_color_once_and_no_digit_twice():
  assert len(HELD_OUT) * 10 == len(digits.COLORS) * len(digits.DIGITS)
  assert sorted(item.color for item in HELD_OUT) == sorted(digits.COLORS)
  assert max(Counter(item.digit for item in HELD_OUT).values()) == 1


def test_seen_and_unseen_scenes_are_all_scenes_and_share_none():
  assert len(EVERY_SCENE) == len(set(EVERY_SCENE)) == 70 + 2 * 70**2
  for task in TASKS:
    for scene in digits.scenes(task, seen=False):
      assert scene.task == task
      assert HELD_OUT & set(scene.items)


def test_training_never_shows_what_is_held_out_nor_the_readers_handwriting():
  shown, glyphs = set(), set()
  for seed in range(3):
    for scene, indices in digits.training_scenes(seed, 2000, WEIGHTS):
      shown.update(scene.items)
      glyphs.update(indices)
  assert len(shown) == 63  # all that is allowed
  assert not shown & HELD_OUT
  for digit in range(10):
    assert glyphs.isdisjoint(digits.handwriting("reader", digit))


def test_each_training_scene_is_a_function_of_seed_and_place_alone():
  few = list(digits.training_scenes(5, 20, WEIGHTS))
  backwards = dict(reversed(WEIGHTS.items()))
  assert list(digits.training_scenes(5, 50, backwards))[:20] == few
  assert list(digits.training_scenes(6, 20, WEIGHTS)) != few
  assert len(set(few)) > 15  # they differ among themselves


def test_tasks_come_as_often_as_they_weigh():
  weights = {"above": 3.0, "single": 1.0}
  counts = Counter(scene.task for scene, _ in digits.training_scenes(0, 4000, weights))
  assert counts["left_of"] == 0
  assert counts["single"] == pytest.approx(1000, abs=5 * np.sqrt(4000 * 3 / 16))


@pytest.mark.parametrize(
  "weights", [{"below": 1.0}, {"single": 0.0}, {"single": -1.0, "above": 2.0}, {}]
)
def test_weights_that_mix_nothing_are_refused(weights):
  with pytest.raises(ValueError, match=r"weights \{.*\} do not mix tasks: .* above a"):
    next(digits.training_scenes(0, 1, weights))


def test_the_two_splits_share_no_handwriting_and_leave_none_out():
  splits = [
    {i for digit in range(10) for i in digits.handwriting(split, digit)}
    for split in ("training", "reader")
  ]
  assert splits[0].isdisjoint(splits[1])
  assert splits[0] | splits[1] == set(range(1797))
  assert min(len(digits.handwriting("reader", digit)) for digit in range(10)) > 70


@pytest.mark.parametrize(
  ("relation", "axis"), [("left_of", 1), ("above", 0)], ids=["left_of", "above"]
)
def test_a_pair_is_its_two_items_in_their_places(relation, axis):
  one, other = scene_of("red seven"), scene_of("blue two")
  pair = scene_of("red seven", "blue two", relation=relation)
  expected = np.concatenate([draw(one), draw(other)], axis=axis)
  np.testing.assert_array_equal(draw(pair), expected)


def test_ink_has_the_color_of_the_item_on_black():
  light = {color: (draw(scene_of(f"{color} five")) + 1) / 2 for color in digits.COLORS}
  ink = light["white"][..., 0]
  assert ink.min() == 0  # black between the strokes
  assert ink.max() == 1  # and full color in them
  for color, rgb in digits.COLORS.items():
    np.testing.assert_array_equal(light[color], ink[..., None] * np.array(rgb))


@pytest.mark.parametrize("cell", [16, 24, 32])
def test_averaging_a_large_image_gives_the_small_one(cell):
  for scene, glyphs in digits.training_scenes(0, 50, WEIGHTS):
    large, small = (digits.render(scene, glyphs, side) for side in (cell, 8))
    assert np.abs(large).max() <= 1
    # Ink comes in sixteenths and halves of them: exact unless thirds come in.
    tolerance = 0 if cell != 24 else 1e-6
    np.testing.assert_allclose(
      averaged(large, cell // 8), small, rtol=0, atol=tolerance
    )


def test_a_large_image_is_smoother_than_blocks_of_pixels():
  def roughness(image):
    return sum(np.square(np.diff(image, axis=axis)).sum() for axis in (0, 1))

  for digit in range(10):
    scene = Scene((Item("white", digit),))
    blocks = draw(scene).repeat(2, axis=0).repeat(2, axis=1)
    assert roughness(draw(scene, cell=16)) < 0.9 * roughness(blocks)


def test_a_glyph_of_another_digit_is_refused():
  scene = scene_of("red seven", "blue two", relation="above")
  two, seven = (digits.handwriting("training", digit)[0] for digit in (2, 7))
  with pytest.raises(
    ValueError, match=r"digits \[2, 7\], and the scene 'red seven abo"
  ):
    digits.render(scene, (two, seven), 8)


@pytest.mark.parametrize("cell", [0, 4, 12])
def test_a_cell_that_is_no_multiple_of_a_glyph_is_refused(cell):
  with pytest.raises(ValueError, match=f"{cell} pixels cannot be drawn: .* of 8"):
    draw(scene_of("red seven"), cell)


def test_colors_digits_and_relations_that_do_not_exist_are_refused():
  with pytest.raises(ValueError, match="no color 'pink': use red, "):
    Item("pink", 3)
  with pytest.raises(ValueError, match="no digit 10: use 0 to 9"):
    Item("red", 10)
  with pytest.raises(ValueError, match="not 2 with None"):
    Scene((Item("red", 3), Item("blue", 2)))
  with pytest.raises(ValueError, match="not 1 with 'above'"):
    Scene((Item("red", 3),), "above")


def test_the_same_scenes_and_pixels_on_every_machine():
  scenes = list(digits.training_scenes(0, 100, WEIGHTS))
  pixels = [digits.render(scene, glyphs, 16) for scene, glyphs in scenes]
  assert zlib.crc32(repr(scenes).encode()) == 2897804126
  assert (
    zlib.crc32(b"".join(image.astype("<f4").tobytes() for image in pixels))
    == 1382337587
  )


def test_a_drawn_image_cannot_spoil_the_next():
  draw(scene_of("red seven"))[:] = 0
  assert draw(scene_of("red seven")).min() == -1
