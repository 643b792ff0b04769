"""A run from its first step to its last: what it writes, where, and from what."""

import functools
import logging
import re

import jax
import numpy as np
import pytest
from PIL import Image

from configs.quickstart import compressed, high, low
from pixsigma_jax import checkpoint, tree
from pixsigma_jax.models.text_encoders import text_encoder_from
from pixsigma_jax.prepare.digits import prepare_digits
from pixsigma_jax.train import loop, program, sample_grids
from pixsigma_jax.transforms import add_kv_compression
from tests.train import runs

# What stands in a line only where it applies: docs/training.md says so in its row.
SOMETIMES = {
  "mfu": "for chips in",
  "memory_peak_gib": "where it tells",
  "norm/usual": "where bad steps are skipped",
  "validation/loss": "if there was one",
  "validation/decile_loss": "if there was one",
  "validation/step": "if there was one",
}


def _documented():
  """The fields of the table of metrics, with what is said of them."""
  page = (runs.ROOT / "docs" / "training.md").read_text()
  section = page.split("### metrics.jsonl")[1].split("\n## ")[0]
  rows = [
    line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")
  ]
  return {
    name: said for names, said in rows for name in re.findall(r"`([^`]+)`", names)
  }


def test_every_logged_step_has_what_the_documentation_says(done):
  documented = _documented()
  for name, condition in SOMETIMES.items():
    assert condition in documented[name]
  lines = runs.metrics(done)
  assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
  for line in lines:
    assert set(line) == documented.keys() - SOMETIMES.keys()
    assert line["replaced_examples"] == line["bad_steps"] == line["rollbacks"] == 0
    assert len(line["decile_loss"]) == 10
    assert any(value is not None for value in line["decile_loss"])
    assert line["loss"] == pytest.approx(line["mse"] + line["vb"])
    assert line["norm/params"] > line["norm/gradients"] > 0
    assert 0 <= line["data_share"] <= 1
    assert 0 <= line["saving_share"] <= 1
    assert 0 < line["goodput"] <= 1
    assert line["tflops_per_device"] > 0
    assert line["images_per_second"] * line["step_time"] == pytest.approx(runs.BATCH)
    assert line["images_seen"] == line["step"] * runs.BATCH
    assert line["epochs"] == pytest.approx(line["images_seen"] / runs.RECORDS)
  productive = [line["productive_seconds"] for line in lines]
  assert productive[0] > 0
  assert productive == sorted(productive)
  # In a step's time nothing else is counted.
  spent = [a - b for a, b in zip(productive[1:], productive, strict=False)]
  assert all(s <= line["step_time"] for s, line in zip(spent, lines[1:], strict=True))


def test_what_only_some_runs_log_is_logged_by_them(data, tmp_path):
  changes = {
    "total_steps": 2,
    "data__holdout": 0.25,
    "validation__every": 2,
    "validation__examples": 8,
    "guards__bad_step": "skip",
  }
  runs.train(runs.low(data, **changes), tmp_path)
  first, second = runs.metrics(tmp_path)
  documented = _documented()
  of_chips = {"mfu", "memory_peak_gib"}  # see test_goodput
  assert set(second) == documented.keys() - of_chips
  validation = {name for name in documented if name.startswith("validation/")}
  assert set(first) == documented.keys() - of_chips - validation
  assert second["norm/usual"] == pytest.approx(first["norm/gradients"])
  # Those that are held out do not count.
  assert second["images_seen"] / second["epochs"] < runs.RECORDS


def test_the_logged_learning_rate_is_that_of_the_update_just_made(done):
  lines = runs.metrics(done)
  rate = low.get_config().optimizer.learning_rate
  rates = [line["learning_rate"] for line in lines]
  np.testing.assert_allclose(rates, [0, rate, rate, rate, rate, rate], rtol=1e-6)
  # With no rate there is no update.
  assert [line["norm/updates"] == 0 for line in lines] == [True] + 5 * [False]


def test_a_report_is_the_mean_of_the_steps_since_the_last_one(data, done, tmp_path):
  runs.train(runs.low(data, log__every=4), tmp_path)
  one, some = runs.metrics(done), runs.metrics(tmp_path)
  assert [line["step"] for line in some] == [4, 6]  # the last one always
  for line, part in zip(some, (one[:4], one[4:]), strict=True):
    assert line["loss"] == pytest.approx(np.mean([x["loss"] for x in part]))


def test_tensorboard_gets_the_same(done):
  assert list((done / "tensorboard").glob("events.out.tfevents.*"))


def test_checkpoints_come_at_their_intervals_and_the_newest_stay(data, done, tmp_path):
  assert runs.steps(done) == [2, 4, 6]
  config = runs.low(
    data, total_steps=5, checkpoint__keep_last=1, checkpoint__snapshot_every=3
  )
  runs.train(config, tmp_path)
  assert runs.steps(tmp_path) == [5]
  assert runs.steps(tmp_path, "snapshots") == [3, 5]


def test_the_position_is_the_number_of_examples_that_were_used(done):
  for step in (2, 4, 6):
    assert runs.position(done, step)["examples"] == step * runs.BATCH


def test_a_checkpoint_holds_its_step_although_training_goes_on_meanwhile(
  data, done, tmp_path
):
  """The state is donated to the next step while it is still being written."""
  runs.train(runs.low(data, total_steps=2), tmp_path)
  runs.assert_same(runs.arrays(done, 2), runs.arrays(tmp_path, 2))


def test_a_snapshot_is_the_average_of_the_parameters(done):
  state = runs.arrays(done, 6)
  snapshot = runs.arrays(done, 6, "snapshots")
  runs.assert_same(runs.part(snapshot, "params"), runs.part(state, "ema_params/0"))
  np.testing.assert_array_equal(snapshot["null_caption"], state["null_caption"])
  moved = [
    (runs.part(state, "params")[name] != average).any()
    for name, average in runs.part(state, "ema_params/0").items()
  ]
  assert all(moved)


def test_the_null_caption_is_the_text_encoders(done):
  snapshot = checkpoint.read_snapshot(done)
  encoder = text_encoder_from(snapshot.metadata.text_encoder)
  length = snapshot.config.caption_length
  np.testing.assert_array_equal(
    snapshot.null_caption, encoder.encode([""], length)[0][0]
  )


def test_one_compilation_serves_every_aspect_ratio(data, tmp_path, monkeypatch):
  traces, grids = [], []
  make_loss, batches = program.make_loss, loop.data_pipeline.batches

  @functools.wraps(make_loss)  # the program looks at the names of its arguments
  def counted(*args, **fields):
    loss = make_loss(*args, **fields)

    def traced(*arguments):
      traces.append(arguments)
      return loss(*arguments)

    return traced

  def seen(*args, **fields):
    for batch in batches(*args, **fields):
      grids.append(tuple(map(tuple, batch["grid"].tolist())))
      yield batch

  monkeypatch.setattr(program, "make_loss", counted)
  monkeypatch.setattr(loop.data_pipeline, "batches", seen)
  runs.train(runs.low(data), tmp_path)
  assert len(grids) == 6
  assert len(set(grids)) == 6
  assert {grid for batch in grids for grid in batch} == {(4, 4), (4, 8), (8, 4)}
  assert len(traces) == 1


def test_a_run_moves_between_meshes_and_device_counts(data, done, tmp_path):
  """One device, eight on all axes, one: the losses are those of one device."""
  for total_steps, devices, mesh in (
    (2, 1, (1, 1, 1)),
    (4, 8, (2, 2, 2)),
    (6, 1, (1, 1, 1)),
  ):
    axes = dict(zip(("mesh__data", "mesh__fsdp", "mesh__context"), mesh, strict=True))
    runs.train(runs.low(data, total_steps=total_steps, **axes), tmp_path, devices)
  have, want = runs.metrics(tmp_path), runs.metrics(done)
  assert [line["step"] for line in have] == [1, 2, 3, 4, 5, 6]
  for name in ("loss", "norm/gradients", "norm/params"):
    np.testing.assert_allclose(
      [line[name] for line in have], [line[name] for line in want], rtol=1e-5
    )


def test_a_finished_run_says_so_and_makes_up_for_a_lost_snapshot(
  data, tmp_path, caplog
):
  config = runs.low(data, total_steps=2)
  runs.train(config, tmp_path)
  before = runs.arrays(tmp_path, 2, "snapshots")
  lines = (tmp_path / "metrics.jsonl").read_text()
  for path in sorted((tmp_path / "snapshots").rglob("*"), reverse=True):
    path.rmdir() if path.is_dir() else path.unlink()
  caplog.set_level(logging.INFO, logger="absl")
  caplog.clear()
  runs.train(config, tmp_path)
  assert "has ended" not in caplog.text
  assert f"{tmp_path} has all its 2 steps already." in caplog.messages
  assert "Compiling" not in caplog.text
  runs.assert_same(runs.arrays(tmp_path, 2, "snapshots"), before)
  assert (tmp_path / "metrics.jsonl").read_text() == lines

  caplog.clear()
  runs.train(runs.low(data, total_steps=1, optimizer__warmup_steps=0), tmp_path)
  assert f"{tmp_path} has all its 1 steps already." in caplog.messages
  assert runs.steps(tmp_path) == [2]


def test_a_changed_config_is_told_and_obeyed(data, tmp_path, caplog):
  runs.train(runs.low(data, total_steps=2), tmp_path)
  runs.train(runs.low(data, total_steps=3), tmp_path)
  assert "The config has changed since step 0: total_steps: 2 → 3." in caplog.text
  assert runs.steps(tmp_path) == [2, 3]


def test_sample_grids_of_the_average_are_drawn_at_intervals_and_change_nothing(
  data, done, tmp_path, monkeypatch
):
  drawn, asked = [], []
  replace, call = sample_grids.Pipeline.replace, sample_grids.Pipeline.__call__

  def replaced(self, **fields):
    drawn.append(jax.tree.map(np.array, fields["params"]))
    return replace(self, **fields)

  def called(self, prompts, **fields):
    asked.append((prompts, fields))
    return call(self, prompts, **fields)

  monkeypatch.setattr(sample_grids.Pipeline, "replace", replaced)
  monkeypatch.setattr(sample_grids.Pipeline, "__call__", called)
  prompts = ("a red seven", "a white three")
  runs.train(runs.low(data, log__sample_every=3, log__prompts=prompts), tmp_path)

  images = sorted((tmp_path / "samples").iterdir())
  assert [path.name for path in images] == ["00000003.png", "00000006.png"]
  assert asked == 2 * [(list(prompts), {"seed": 0})]
  for path in images:
    with Image.open(path) as image:
      assert np.ptp(np.asarray(image)) > 0
  state = runs.arrays(tmp_path, 6)
  runs.assert_same(runs.named(drawn[1]), runs.part(state, "ema_params/0"))
  runs.assert_same(state, runs.arrays(done, 6))


def test_the_chain_hands_parameters_and_history_from_stage_to_stage(
  data, tmp_path, tmp_path_factory
):
  finer = runs.prepare(tmp_path_factory.mktemp("data") / "16px", 16)
  stages = {
    "low": (low, data),
    "high": (high, finer),
    "compressed": (compressed, finer),
  }
  parent = ""
  for name, (file, images) in stages.items():
    config = runs.shrink(file.get_config(), images, parent)
    runs.train(config, tmp_path / name)
    parent = tmp_path / name

  first, second, third = (checkpoint.read_snapshot(tmp_path / name) for name in stages)
  starts = [
    checkpoint.read_snapshot(tmp_path / name / "snapshots" / "0")
    for name in ("high", "compressed")
  ]
  # Interpolation hands every parameter on as it is; compression adds and regroups.
  _assert_same_trees(starts[0].params, first.params)
  assert starts[0].config == second.config
  _, transformed = add_kv_compression(
    second.config,
    second.params,
    ratio=4,
    layers=(1,),
    norm=False,
    initialization="average",
  )
  _assert_same_trees(starts[1].params, transformed)
  assert starts[1].config == third.config
  for snapshot in (second, third):
    assert snapshot.step == 2
    assert snapshot.metadata.resolution == 16

  history = third.metadata.provenance
  assert [entry["stage"] for entry in history] == [
    "quickstart/low",
    "quickstart/high_interpolated",
    "quickstart/compressed_average",
  ]
  assert [
    [transform["name"] for transform in entry["transforms"]] for entry in history
  ] == [[], ["interpolate_pe"], ["add_kv_compression"]]
  assert [entry["parent"] for entry in history] == [
    None,
    {
      "path": str(tmp_path / "low" / "snapshots" / "2"),
      "stage": "quickstart/low",
      "step": 2,
      "params": tree.fingerprint(first.params),
    },
    {
      "path": str(tmp_path / "high" / "snapshots" / "2"),
      "stage": "quickstart/high_interpolated",
      "step": 2,
      "params": tree.fingerprint(second.params),
    },
  ]
  rates = [entry["config"]["optimizer"]["learning_rate"] for entry in history]
  assert rates == [
    file.get_config().optimizer.learning_rate for file, _ in stages.values()
  ]
  # A child is a run of its own: its optimizer and its data begin anew.
  state = runs.arrays(tmp_path / "high", 2)
  assert state["step"] == 2
  assert runs.position(tmp_path / "high", 2)["examples"] == 2 * runs.BATCH


def _assert_same_trees(have, want):
  assert jax.tree.structure(have) == jax.tree.structure(want)
  jax.tree.map(np.testing.assert_array_equal, have, want)


def test_a_swapped_vae_and_an_average_lead_to_data_of_other_latents(
  data, done, tmp_path
):
  prepare_digits(tmp_path / "data", resolution=8, count=48, seed=1, scaling_factor=0.5)
  config = runs.shrink(low.get_config(), tmp_path / "data", done)
  config.init.transforms = (
    {"name": "average", "others": (str(done),), "weights": (0.5, 0.5)},
    {"name": "swap_vae", "scaling_factor": 0.5},
  )
  runs.train(config, tmp_path / "run")
  first = checkpoint.read_snapshot(tmp_path / "run" / "snapshots" / "0")
  assert first.metadata.scaling_factor == 0.5
  parent = checkpoint.read_snapshot(done)
  jax.tree.map(np.testing.assert_array_equal, first.params, parent.params)
