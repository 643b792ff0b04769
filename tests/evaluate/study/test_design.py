"""What a study shows to whom, and that nobody can tell whose image is whose."""

import collections
import io
import itertools

import numpy as np
import pytest
from PIL import Image

from pixsigma_jax.evaluate.study import design, png
from pixsigma_jax.evaluate.study.design import Design, ShownImage, Subject
from tests.evaluate import preference_world as world

IMAGE = ShownImage("x.png", "0" * 64, 8, 8)


def study(prompts=40, models="abc", per_rater=40, repeats=0, secret="5a" * 32):
  subjects = tuple(
    Subject(f"p{i}", f"prompt {i}", dict.fromkeys(models, IMAGE))
    for i in range(prompts)
  )
  return Design("s", secret, tuple(models), subjects, per_rater, repeats)


def test_an_order_is_a_matter_of_study_rater_and_prompt_alone():
  one = study(repeats=5)
  assert one.tasks(3) == Design.from_json(one.to_json()).tasks(3)
  assert one.tasks(3) != one.tasks(4)
  assert one.tasks(3) != study(repeats=5, secret="5b" * 32).tasks(3)


def test_raters_see_the_images_of_a_prompt_in_different_orders():
  orders = {
    task.models
    for rater in range(12)
    for task in study(prompts=1, per_rater=1).tasks(rater)
  }
  assert len(orders) > 2


def test_every_order_of_the_models_is_equally_likely():
  seen = collections.Counter(
    task.models for rater in range(12) for task in study().tasks(rater)
  )
  assert set(seen) == set(itertools.permutations("abc"))
  expected = 12 * 40 / 6
  # Chi-squared with five degrees of freedom: 20.5 in one of a thousand.
  assert sum((n - expected) ** 2 / expected for n in seen.values()) < 20.5


@pytest.mark.parametrize(("prompts", "per_rater", "raters"), [(10, 4, 7), (9, 3, 6)])
def test_prompts_come_to_equally_many_raters(prompts, per_rater, raters):
  dealt = study(prompts, per_rater=per_rater)
  seen = collections.Counter(
    task.subject.id for rater in range(raters) for task in dealt.tasks(rater)
  )
  assert sum(seen.values()) == per_rater * raters
  assert max(seen.values()) - min(seen.values()) <= 1
  assert len(seen) == prompts
  for rater in range(raters):
    assert len({task.subject.id for task in dealt.tasks(rater)}) == per_rater


@pytest.mark.parametrize("models", ["ab", "abcd"])
def test_what_comes_twice_comes_later_and_in_another_order(models):
  for rater in range(6):
    tasks = study(11, models, per_rater=11, repeats=6).tasks(rater)
    assert len(tasks) == 17
    again = [(at, task) for at, task in enumerate(tasks) if task.repeated]
    assert len({task.subject.id for _, task in again}) == 6
    for at, task in again:
      [before] = [
        (i, other)
        for i, other in enumerate(tasks)
        if other.subject == task.subject and not other.repeated
      ]
      assert before[0] < 6 <= at
      assert before[1].models != task.models


def test_addresses_of_images_differ_and_say_nothing():
  one, other = study(), study(secret="5b" * 32)
  addresses = {one.address(s, model) for s in one.subjects for model in "abc"}
  assert len(addresses) == 120
  assert all(len(address) == 32 and int(address, 16) for address in addresses)
  assert addresses.isdisjoint(other.address(s, m) for s in one.subjects for m in "abc")


def test_a_study_is_drawn_up_from_the_images_that_are_there(tmp_path):
  folder = world.make(tmp_path)
  drawn_up = design.draw_up(folder, name="s", secret="ab" * 32, repeats=2)
  assert drawn_up.models == world.MODELS
  assert [s.prompt for s in drawn_up.subjects] == list(world.PROMPTS)
  image = drawn_up.subjects[1].images["beta"]
  assert (image.path, image.height, image.width) == (
    "models/beta/images/p1.png",
    12,
    16,
  )


@pytest.mark.parametrize(
  ("asked", "message"),
  [
    ({"models": ["alpha"]}, r"^1 models \(alpha\) cannot be compared: choose 2 to 8"),
    ({"models": ["alpha", "delta"]}, "has no images of delta: it has those of alpha"),
    ({"models": ["alpha", "alpha"]}, "--models names one twice: alpha, alpha"),
    ({"per_rater": 6}, "cannot see 6 prompts of 5: give --per_rater from 1 to 5"),
    ({"repeats": 4}, "4 prompts cannot come twice: .* 5 can, .* --repeats from 0 to 3"),
  ],
)
def test_what_cannot_be_a_study_is_refused(tmp_path, asked, message):
  folder = world.make(tmp_path)
  with pytest.raises(ValueError, match=message):
    design.draw_up(folder, name="s", secret="ab" * 32, **asked)


def test_images_that_are_missing_or_damaged_are_named(tmp_path):
  folder = world.make(tmp_path)
  path = folder.model("beta").image_path(folder.items[3])
  path.write_bytes(b"no image")
  with pytest.raises(ValueError, match=r"p3\.png cannot be read as an image"):
    design.draw_up(folder, name="s", secret="ab" * 32)
  path.unlink()
  with pytest.raises(ValueError, match=r"beta has no image for 1 of 5 prompts \(p3\)"):
    design.draw_up(folder, name="s", secret="ab" * 32)


def test_an_image_without_notes_has_the_same_pixels(tmp_path):
  folder = world.make(tmp_path)
  content = folder.model("beta").image_path(folder.items[2]).read_bytes()
  assert b"checkpoint of beta" in content
  bare = png.without_notes(content + b"and more behind its end")
  with (
    Image.open(io.BytesIO(bare)) as shown,
    Image.open(io.BytesIO(content)) as original,
  ):
    assert shown.info == {}
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(original))


@pytest.mark.parametrize("cut", [0, 4, 20, 60, -1])
def test_bytes_that_are_no_whole_png_are_refused(tmp_path, cut):
  folder = world.make(tmp_path)
  content = folder.model("beta").image_path(folder.items[2]).read_bytes()
  with pytest.raises(ValueError, match=r"are no PNG|ends early"):
    png.without_notes(content[:cut])
