"""The figures of `digits`: each task and novelty for itself, and the totals."""

import numpy as np
import pyarrow as pa
import pytest

from pixsigma_jax.evaluate.suites import ScoredModel
from pixsigma_jax.evaluate.suites.digits import SUITE

PER_TASK = 4


def figures(is_right):
  """Value by name, where the reader says `is_right` of an item's task and novelty."""
  items = SUITE.items({"per_task": PER_TASK, "prompts_seed": 1}).items
  right = [is_right(item.data["task"], item.data["novelty"]) for item in items]
  schema = pa.schema([("right", pa.bool_())], metadata={"identity": "{}"})
  table = pa.table([pa.array(right)], schema=schema)
  run = ScoredModel(
    name="model",
    items=items,
    images_per_item=1,
    options={},
    read=lambda scorer, of_references: table,
    resamples=0,
  )
  return {figure.name: figure.value for figure in SUITE.figures(run)}


def test_who_draws_what_is_asked_for_is_always_right():
  assert set(figures(lambda task, novelty: True).values()) == {100.0}


@pytest.mark.parametrize("task", ["single", "left_of", "above"])
@pytest.mark.parametrize("novelty", ["seen", "unseen"])
def test_each_task_is_counted_for_itself(task, novelty):
  found = figures(lambda *of: of == (task, novelty))
  total = "single" if task == "single" else "pairs"
  # Half of the single digits, a quarter of the pairs.
  expected = {f"{task} {novelty}": 100, total: 50 if task == "single" else 25}
  assert {name: value for name, value in found.items() if value} == expected
  assert list(found)[-2:] == ["single", "pairs"]
  assert len(found) == 8


def test_a_size_follows_from_the_task_and_the_models_resolution():
  sizes = {
    item.data["task"]: item.size(16)
    for item in SUITE.items({"per_task": 1, "prompts_seed": 0}).items
  }
  assert sizes == {"single": (16, 16), "left_of": (16, 32), "above": (32, 16)}


def test_every_prompt_has_a_seed_of_its_own_from_the_first_on():
  items = SUITE.items({"per_task": 2, "prompts_seed": 5}).items
  assert [item.seed for item in items] == list(np.arange(12) + 5)
