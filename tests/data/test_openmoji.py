"""OpenMoji's scenes: what captions say is what is drawn, at every resolution."""

import collections
import itertools

import numpy as np
import pytest
from PIL import Image

from pixsigma_jax.data import openmoji
from pixsigma_jax.data.openmoji import Scene

DOG, CAT = 0x1F436, 0x1F431
BOX = (0.5, 0.5, 3.0)


def some(count=60, seed=3, objects=0, pairs=0.75):
  return list(openmoji.training_scenes(seed, count, objects=objects, pairs=pairs))


def ground_of(scene):
  return np.array(
    [int(openmoji.GROUNDS[scene.ground][i : i + 2], 16) for i in (1, 3, 5)]
  )


def test_names_are_unicodes_own_and_no_two_are_one():
  names = openmoji.names()
  assert (names[DOG], names[CAT]) == ("dog face", "cat face")
  assert len(set(names.values())) == len(names) > 1000


def test_every_caption_is_read_back_as_its_scene():
  names = openmoji.names()
  for scene, _ in some(300):
    objects = tuple(names[code] for code in scene.objects)
    for text in itertools.chain(*openmoji.captions(scene).values()):
      assert openmoji.parse(text.upper()) == (objects, scene.relation, scene.ground)


@pytest.mark.parametrize(
  "prompt", ["", "dog face", "dog face, pink ground", "unicorn poster, blue ground"]
)
def test_what_is_none_of_these_captions_is_refused(prompt):
  with pytest.raises(ValueError, match="Cannot read the prompt"):
    openmoji.parse(prompt)


def test_scenes_depend_on_seed_and_number_alone():
  assert some(20) == some(40)[:20]
  assert some(20) != some(20, seed=4)


def test_no_pair_that_is_held_out_is_ever_drawn_and_one_in_ten_is():
  drawn = [scene.objects for scene, _ in some(400, objects=20)]
  pairs = {objects for objects in drawn if len(objects) == 2}
  assert not any(openmoji.is_held_out(*pair) for pair in pairs)
  assert {code for pair in pairs for code in pair} == set(list(openmoji.names())[:20])
  codes = list(openmoji.names())[:200]
  all_pairs = list(itertools.combinations(codes, 2))
  share = np.mean([openmoji.is_held_out(*pair) for pair in all_pairs])
  # Five standard errors of a share of a tenth.
  assert abs(share - 0.1) < 5 * np.sqrt(0.09 / len(all_pairs))
  assert all(
    openmoji.is_held_out(a, b) == openmoji.is_held_out(b, a) for a, b in all_pairs[:50]
  )


def test_every_relation_shape_and_ground_comes_up():
  scenes = [scene for scene, _ in some(400)]
  assert {s.relation for s in scenes} == {None, *openmoji.RELATIONS}
  assert {s.shape for s in scenes} == set(openmoji.SHAPES)
  assert {s.ground for s in scenes} == set(openmoji.GROUNDS)
  pairs = collections.Counter(s.relation is not None for s in scenes)[True] / 400
  assert abs(pairs - 0.75) < 5 * np.sqrt(0.75 * 0.25 / 400)  # five standard errors


def test_objects_stand_as_the_relation_says_and_inside_the_image():
  for scene, boxes in some(200):
    rows, columns = openmoji.SHAPES[scene.shape]
    for left, top, side in boxes:
      assert min(left, top) >= 0
      assert left + side <= columns
      assert top + side <= rows
    if scene.relation:
      (x0, y0, side0), (x1, y1, side1) = boxes
      apart = {
        "left_of": x0 + side0 <= x1,
        "right_of": x1 + side1 <= x0,
        "above": y0 + side0 <= y1,
        "below": y1 + side1 <= y0,
      }
      assert apart[scene.relation]


def test_pixels_outside_all_boxes_are_the_ground_and_each_box_holds_ink():
  for scene, boxes in some(12):
    image = openmoji.render(scene, boxes, 128).astype(int)
    assert image.shape == (*openmoji.size(scene.shape, 128), 3)
    other = np.abs(image - ground_of(scene)).max(axis=-1) > 0
    outside = other.copy()
    for left, top, side in boxes:
      # A box of quarters in pixels, and one pixel of antialiasing around it.
      y0, x0 = (int(np.floor(32 * at)) - 1 for at in (top, left))
      y1, x1 = (int(np.ceil(32 * (at + side))) + 1 for at in (top, left))
      box = np.s_[max(y0, 0) : y1, max(x0, 0) : x1]
      assert other[box].any(), openmoji.captions(scene)
      outside[box] = False
    assert not outside.any()


def test_a_larger_image_shows_the_same_scene_with_more_in_it():
  scene = Scene((DOG,), "white", "square")
  small, large = (openmoji.render(scene, (BOX,), side) for side in (64, 512))
  shrunk = np.asarray(Image.fromarray(large).resize((64, 64), Image.Resampling.BOX))
  # Two ways to average an edge: the same scene, and no more than a twentieth off.
  assert np.abs(shrunk.astype(float) - small).mean() < 255 / 20
  # Sharp, as an enlarged one is not: hardly a pixel lies between two of its colors.
  enlarged = np.asarray(Image.fromarray(small).resize((512, 512)))
  colors = [len(np.unique(image.reshape(-1, 3), axis=0)) for image in (large, enlarged)]
  assert colors[0] < colors[1] / 4


def test_the_license_names_openmoji_its_version_and_cc_by_sa():
  license = openmoji.license()
  assert license["name"] == "CC BY-SA 4.0"
  assert "OpenMoji" in license["attribution"]
  assert license["url"].startswith("https://creativecommons.org/licenses/by-sa/4.0")


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"relation": "above"}, "two with one of"),
    ({"objects": (DOG, CAT), "relation": "above", "shape": "wide"}, "square or tall"),
  ],
)
def test_a_scene_that_cannot_be_drawn_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    Scene(**{"objects": (DOG,), "ground": "red", "shape": "square"} | fields)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"objects": 99_999}, "objects=99999: OpenMoji has"),
    ({"objects": 1}, "objects=1 leaves no pair"),
    ({"pairs": 1.5}, "pairs=1.5 must be a share"),
  ],
)
def test_scenes_that_there_are_none_of_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    some(**fields)


def test_a_resolution_that_leaves_no_whole_tokens_is_refused():
  with pytest.raises(ValueError, match="resolution 100 must be a multiple of 64"):
    openmoji.size("wide", 100)
