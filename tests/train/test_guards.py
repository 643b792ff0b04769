"""A bad step changes nothing, a leap is told from the usual, and too many end a run."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixsigma_jax.data import mixture
from pixsigma_jax.data.records import open_dataset
from pixsigma_jax.train import guards
from pixsigma_jax.train.guards import SETTLED, Guards, guarded
from pixsigma_jax.train.step import GuardState, TrainState
from tests.train import runs

FIELDS = {
  "bad_step": "skip",
  "spike_factor": 0.0,
  "max_bad_steps": 3,
  "hang_factor": 0.0,
}


def state():
  return TrainState(
    step=jnp.int32(0),
    params={"w": jnp.zeros(3)},
    ema_params={"w": jnp.zeros(3)},
    opt_state=(jnp.zeros(3),),
    null_caption=jnp.zeros(2),
    guard=GuardState(jnp.float32(0), jnp.int32(0), jnp.int32(0)),
    key=jax.random.key(0),
  )


def plus_one(state, batch):
  """A step that adds one to everything, and measures what the batch says."""
  moved = jax.tree.map(
    lambda x: x + 1, (state.params, state.ema_params, state.opt_state)
  )
  state = state.replace(
    step=state.step + 1,
    params=moved[0],
    ema_params=moved[1],
    opt_state=moved[2],
  )
  loss, norm = batch
  return state, {"loss": loss, "norm/gradients": norm, "norm/params": jnp.float32(1)}


def take(numbers, **changes):
  """The state and `bad` after each (loss, norm)."""
  step = jax.jit(guarded(plus_one, Guards(**FIELDS | changes)))
  current, bad = state(), []
  for loss, norm in numbers:
    current, metrics = step(current, (jnp.float32(loss), jnp.float32(norm)))
    bad.append(int(metrics["bad"]))
  return current, bad


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_not_finite_moves_no_array_but_counts(number, place):
  bad_step = [1.0, 1.0]
  bad_step[place] = number
  after, bad = take([(1, 1), bad_step, bad_step, (1, 1), bad_step])
  assert bad == [0, 1, 2, 0, 1]
  assert int(after.step) == 5
  for leaf in jax.tree.leaves((after.params, after.ema_params, after.opt_state)):
    np.testing.assert_array_equal(leaf, 2.0)
  assert int(after.guard.good) == 2
  assert float(after.guard.norm) == 1.0


def test_a_norm_leaps_against_its_running_mean_once_that_is_settled():
  norms = np.random.default_rng(0).uniform(0.5, 1.5, SETTLED)
  # Before, a leap is none: the first steps of a run are wild.
  early, bad = take([(1, 100)] + [(1, 1)] * 3, spike_factor=5.0)
  assert bad == [0, 0, 0, 0]
  assert float(early.guard.norm) == pytest.approx((100 + 3) / 4)
  steps = [(1, norm) for norm in norms]
  after, bad = take([*steps, (1, 4.5), (1, 5.5), (1, 1), (9e9, 1)], spike_factor=5.0)
  assert bad == [0] * SETTLED + [0, 1, 0, 0]
  assert int(after.guard.good) == SETTLED + 3


def test_the_mean_is_plain_at_first_and_forgets_later():
  after, _ = take([(1, n) for n in range(50)])
  assert float(after.guard.norm) == pytest.approx(np.mean(range(50)), rel=1e-5)
  settled, _ = take([(1, 0)] * 50 + [(1, 1)] * 200)
  # 1 - 0.98^200 of the new level.
  assert float(settled.guard.norm) == pytest.approx(1 - 0.98**200, rel=1e-3)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"bad_step": "ignore"}, "Unknown config.guards.bad_step 'ignore'; choose one of"),
    ({"spike_factor": 0.5}, r"config.guards.spike_factor=0.5 must be above 1, or 0"),
    ({"hang_factor": -1.0}, r"config.guards.hang_factor=-1.0 must be above 1, or 0"),
    ({"max_bad_steps": 0}, r"config.guards.max_bad_steps=0 must be at least 1"),
  ],
)
def test_numbers_that_make_no_sense_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    guards.Guards(**FIELDS | changes)


# ------------------------------------------------------------------------ whole runs


def train(data, numbers, workdir, monkeypatch, **changes):
  dataset = runs.poisoned(open_dataset(data), numbers)
  with monkeypatch.context() as patch:
    patch.setattr(mixture, "open_dataset", lambda _: dataset)
    runs.train(runs.low(data, **changes), workdir)


def test_skipped_a_bad_step_leaves_the_run_where_it_was(data, tmp_path, monkeypatch):
  bad = {runs.example_of(4)}
  changes = {"checkpoint__every": 1, "guards__bad_step": "skip"}
  train(data, bad, tmp_path, monkeypatch, **changes)
  before, after = (runs.arrays(tmp_path, step) for step in (3, 4))
  for name in ("params", "ema_params", "opt_state"):
    runs.assert_same(runs.part(after, name), runs.part(before, name))
  lines = runs.metrics(tmp_path)
  assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
  assert [line["bad_steps"] for line in lines] == [0, 0, 0, 1, 0, 0]
  assert "loss" not in lines[3]
  assert all(np.isfinite(line["loss"]) for line in lines if line["step"] != 4)
  # The time of a step that taught nothing was not productive.
  seconds = [line["productive_seconds"] for line in lines]
  assert seconds[3] == seconds[2] < seconds[4]


def test_too_many_bad_steps_in_a_row_end_the_run(data, tmp_path, monkeypatch):
  changes = {"guards__bad_step": "skip", "guards__max_bad_steps": 2}
  message = r"at step 2, from the examples .* 2 bad steps in a row"
  with pytest.raises(guards.BadStepError, match=message):
    train(data, range(runs.RECORDS), tmp_path, monkeypatch, **changes)
  assert runs.steps(tmp_path) == []


def test_rolled_back_a_run_goes_on_after_the_bad_batch(data, tmp_path, monkeypatch):
  run, again = tmp_path / "run", tmp_path / "again"
  changes = {"guards__bad_step": "rollback"}
  train(data, {runs.example_of(4)}, run, monkeypatch, **changes)
  assert runs.steps(run) == [2, 4, 6]
  # Back to step 2, and four further batches after the fourth.
  assert runs.position(run, 6)["examples"] == (4 + 4) * runs.BATCH
  lines = runs.metrics(run)
  assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
  assert [line["rollbacks"] for line in lines] == [0, 0, 1, 1, 1, 1]

  # By hand: a run at step 2 that is told it has seen four batches.
  shutil.copytree(run, again)
  for step in (4, 6):
    shutil.rmtree(again / "checkpoints" / str(step))
  shutil.rmtree(again / "snapshots")
  path = again / "checkpoints" / "2" / "data" / "metadata"
  path.write_text(json.dumps(runs.position(again, 2) | {"examples": 4 * runs.BATCH}))
  runs.train(runs.low(data, **changes), again)
  runs.assert_same(runs.arrays(again, 6), runs.arrays(run, 6))


def test_without_a_checkpoint_there_is_nowhere_to_roll_back_to(
  data, tmp_path, monkeypatch
):
  changes = {"guards__bad_step": "rollback"}
  message = "at step 1, .* The checkpoint to roll back to was not there yet"
  with pytest.raises(guards.BadStepError, match=message):
    train(data, {runs.example_of(1)}, tmp_path, monkeypatch, **changes)
