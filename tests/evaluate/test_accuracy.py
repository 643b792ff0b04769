"""Prompt accuracy: models that draw as they are told, and models that do not."""

import dataclasses

import pytest

from pixsigma_jax.data import digits
from pixsigma_jax.data.digits import Scene
from pixsigma_jax.evaluate import accuracy
from pixsigma_jax.evaluate.digits import evaluation_prompts
from pixsigma_jax.sample import pictures
from pixsigma_jax.sample.pipeline import Pipeline

PER_TASK = 4


class Draughtsman(Pipeline):
  """Without a network: draws the scene that `misread` makes of the prompt's."""

  def __init__(self, misread, resolution=8):
    fields = {"resolution": resolution, "calls": [], "_misread": misread}
    for name, value in fields.items():
      object.__setattr__(self, name, value)  # the class is frozen

  def stream(self, prompts, *, height, width, **arguments):
    self.calls.append((prompts, arguments))
    order = list(range(len(prompts)))[::-1]  # a stream need not come in order
    for i in order:
      scene = self._misread(digits.parse(prompts[i]))
      glyphs = [digits.handwriting("reader", item.digit)[0] for item in scene.items]
      image = digits.render(scene, glyphs, self.resolution)
      assert image.shape[:2] == (height[i], width[i])
      yield i, pictures.to_picture(image), {}


def measured(misread, **fields):
  subject = Draughtsman(misread, **fields)
  prompts = evaluation_prompts(1, PER_TASK)
  counts = accuracy.count_right(
    subject, prompts, num_inference_steps=3, guidance_scale=2.0, seed=7
  )
  return subject, prompts, counts


def recolored(scene):
  """Swaps the items of a pair, and colors a single one anew."""
  if len(scene.items) == 2:
    return Scene(scene.items[::-1], scene.relation)
  (item,) = scene.items
  color = "red" if item.color != "red" else "blue"
  return Scene((dataclasses.replace(item, color=color),))


@pytest.mark.parametrize("resolution", [8, 16])
def test_who_draws_what_is_asked_for_is_always_right(resolution):
  subject, prompts, counts = measured(lambda scene: scene, resolution=resolution)
  for task in digits.TASKS:
    for novelty in ("seen", "unseen"):
      assert counts[task][novelty] == {"right": PER_TASK, "asked": PER_TASK}
  assert accuracy.totals(counts) == {"single": 1.0, "pairs": 1.0}
  ((asked, arguments),) = subject.calls
  assert asked == [prompt.prompt for prompt in prompts]
  assert arguments == {
    "negative_prompt": "",
    "num_inference_steps": 3,
    "guidance_scale": 2.0,
    "seed": 7,
    "sampler": "dpm++",
    "num_images_per_prompt": 1,
  }


def test_colors_and_places_count_as_much_as_digits():
  _, _, counts = measured(recolored)
  assert accuracy.totals(counts)["single"] == 0
  # A pair of two equal items is the same the other way round.
  assert accuracy.totals(counts)["pairs"] < 0.2


def test_each_task_is_counted_for_itself():
  def only_above(scene):
    return scene if scene.task == "above" else recolored(scene)

  _, _, counts = measured(only_above)
  assert counts["above"]["seen"] == {"right": PER_TASK, "asked": PER_TASK}
  assert counts["single"]["seen"] == {"right": 0, "asked": PER_TASK}


def counts(*right):
  """Counts of ten for each task, seen and unseen."""
  pairs = iter(right)
  return {
    task: {n: {"right": next(pairs), "asked": 10} for n in ("seen", "unseen")}
    for task in ("single", "left_of", "above")
  }


def test_the_table_has_a_row_a_checkpoint_and_the_totals_at_its_end():
  table = accuracy.table(
    {"low": counts(1, 2, 3, 4, 5, 6), "compressed": counts(10, 10, 9, 8, 7, 6)}
  )
  header, *rows = table.splitlines()
  assert header.split()[-2:] == ["single", "pairs"]
  assert [row.split() for row in rows] == [
    ["low", "10.0", "20.0", "30.0", "40.0", "50.0", "60.0", "15.0", "45.0"],
    ["compressed", "100.0", "100.0", "90.0", "80.0", "70.0", "60.0", "100.0", "75.0"],
  ]
  assert {len(line) for line in rows} == {len(header)}  # columns stand under each other
  for column in ("single seen", "left_of unseen", "above seen"):
    assert column in header
