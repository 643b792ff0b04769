"""What a run writes about itself: each step once, whatever happened in between."""

import gc
import json
import struct
import sys
import time
import types
import warnings

import numpy as np
import pytest

from pixsigma_jax.train import metrics
from pixsigma_jax.train.metrics import MetricWriter, Window


def lines_of(workdir):
  text = (workdir / "metrics.jsonl").read_text()
  assert text.endswith("\n")
  # Strict: NaN and Infinity are no JSON.
  return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def write(workdir, first_step, steps, **values):
  writer = MetricWriter(workdir, first_step)
  for step in steps:
    writer.write(step, {"loss": step / 8, **values})
  writer.close()


def test_a_line_is_on_the_disk_when_write_returns(tmp_path):
  writer = MetricWriter(tmp_path, 0)
  writer.write(3, {"loss": np.float32(0.5), "steps": np.int64(7)})
  assert lines_of(tmp_path) == [{"step": 3, "loss": 0.5, "steps": 7}]
  writer.close()


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
  write(tmp_path, 0, [10, 20, 30, 40])
  write(tmp_path, 20, [30])
  assert lines_of(tmp_path) == [
    {"step": 10, "loss": 1.25},
    {"step": 20, "loss": 2.5},
    {"step": 30, "loss": 3.75},
  ]


def test_a_last_line_that_a_kill_cut_short_is_dropped(tmp_path):
  write(tmp_path, 0, [10, 20])
  path = tmp_path / "metrics.jsonl"
  path.write_text(path.read_text()[:-5])
  write(tmp_path, 20, [30])
  assert [line["step"] for line in lines_of(tmp_path)] == [10, 30]


def test_what_is_not_finite_is_null(tmp_path):
  deciles = np.array([0.5, np.nan, np.inf])
  write(tmp_path, 0, [1], decile_loss=deciles, norm=float("nan"), top=np.float32("inf"))
  [line] = lines_of(tmp_path)
  assert line["decile_loss"] == [0.5, None, None]
  assert (line["norm"], line["top"]) == (None, None)


def test_without_tensorboardx_the_lines_are_written_all_the_same(tmp_path, monkeypatch):
  monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
  write(tmp_path, 0, [1])
  writer = MetricWriter(tmp_path, 1)
  writer.write_image(1, "samples", np.zeros((2, 2, 3), np.uint8))
  writer.close()
  assert lines_of(tmp_path) == [{"step": 1, "loss": 0.125}]
  assert not (tmp_path / "tensorboard").exists()


def events(workdir, run="."):
  """Every event of a run's files for TensorBoard, oldest first (TFRecord framing)."""
  event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
  for path in sorted((workdir / "tensorboard" / run).iterdir()):
    data = path.read_bytes()
    while data:
      (length,) = struct.unpack("<Q", data[:8])
      yield event_pb2.Event.FromString(data[12 : 12 + length])
      data = data[16 + length :]


def test_tensorboard_gets_scalars_lists_by_index_and_images(tmp_path):
  write(tmp_path, 0, [7], decile_loss=np.array([0.25, np.nan]))
  values = {
    (event.step, value.tag): value.simple_value
    for event in events(tmp_path)
    for value in event.summary.value
  }
  assert values == {(7, "loss"): 0.875, (7, "decile_loss/0"): 0.25}


def test_tensorboard_gets_images_as_they_are(tmp_path):
  writer = MetricWriter(tmp_path, 0)
  writer.write_image(5, "samples", np.zeros((2, 6, 3), np.uint8))
  writer.close()
  [value] = [value for event in events(tmp_path) for value in event.summary.value]
  assert (value.tag, value.image.height, value.image.width) == ("samples", 2, 6)


def test_tensorboard_is_told_to_forget_what_came_after_the_checkpoint(tmp_path):
  writer = MetricWriter(tmp_path, 20)
  writer.write(30, {"loss": 1.0})
  writer.close()
  starts = [event.step for event in events(tmp_path) if event.HasField("session_log")]
  assert starts == [21]


def test_tensorboard_shows_the_config_as_text(done):
  [text] = [
    value.tensor.string_val[0].decode()
    for event in events(done)
    for value in event.summary.value
    if value.tag.startswith("config")
  ]
  shown = json.loads(text.removeprefix("```json\n").removesuffix("\n```"))
  assert shown["optimizer"]["name"] == "adamw"
  assert shown["total_steps"] == 6


def test_two_files_that_are_begun_in_one_second_are_two(tmp_path, monkeypatch):
  monkeypatch.setattr(metrics.time, "time", lambda: 1_000_000_000.0)
  writer = MetricWriter(tmp_path, 0)
  writer.write(1, {"loss": 1.0})
  writer.rewind(0)
  writer.write(1, {"loss": 2.0})
  writer.close()
  losses = [value.simple_value for e in events(tmp_path) for value in e.summary.value]
  assert sorted(losses) == [1.0, 2.0]


# tensorboardX leaves a file open that it cannot write to.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("which", ["metrics.jsonl", "tensorboard"])
def test_a_full_disk_is_said_with_the_files_name(tmp_path, which):
  writer = MetricWriter(tmp_path, 0)
  full = open("/dev/full", "a" if which == "metrics.jsonl" else "ab")  # noqa: SIM115
  if which == "metrics.jsonl":
    writer._file.close()
    writer._file = full
  else:
    records = writer._board._events._py_recordio_writer
    records._writer.close()
    records._writer = full
    del records
  message = rf"Could not write metrics: No space left on device: '{tmp_path}/{which}"
  with pytest.raises(OSError, match=message):
    writer.write(1, {"loss": 0.5})
  # Closing fails once more, and closes the rest.
  with pytest.raises(OSError, match=message):
    writer.close()
  writer.close()
  del writer, full
  gc.collect()


# ------------------------------------------------------------------ Weights & Biases

WANDB = {"project": "tests", "entity": ""}


def config_with(**section):
  return {"stage": "low", "log": {"wandb": WANDB | section}}


def test_wandb_is_not_touched_unless_it_is_asked_for(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
  writer = MetricWriter(tmp_path, 0, config=config_with(project=""))
  writer.write(1, {"loss": 0.5})
  writer.close()
  assert not (tmp_path / "wandb").exists()


@pytest.mark.parametrize(
  ("section", "message"),
  [
    (
      {"project": "p"},
      r"config\.log\.wandb\.project='p' needs .*\[wandb\]",
    ),
    ({"project": "", "entity": "us"}, r"config\.log\.wandb\.entity='us' says whose"),
  ],
)
def test_wandb_that_cannot_be_is_refused(section, message, monkeypatch):
  monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=message):
    metrics.check_wandb(WANDB | section)


class FakeWandb(types.ModuleType):
  """Takes what a writer gives it."""

  def __init__(self):
    super().__init__("wandb")
    self.started, self.logged, self.defined, self.ended = [], [], [], 0
    self.Image = lambda array: ("image", array.shape)

  def init(self, **fields):
    self.started.append(fields)
    return self

  def define_metric(self, name, **fields):
    self.defined.append((name, fields))

  def log(self, values):
    self.logged.append(values)

  def finish(self):
    self.ended += 1


def test_wandb_gets_the_same_and_a_workdir_is_one_run_there(tmp_path, monkeypatch):
  fake = FakeWandb()
  monkeypatch.setitem(sys.modules, "wandb", fake)
  config = config_with()
  for first in (0, 7):
    writer = MetricWriter(tmp_path, first, config=config)
    writer.write(first + 7, {"loss": 0.5, "decile_loss": np.array([0.25, np.nan])})
    writer.rewind(first)
    writer.write_image(first + 7, "samples", np.zeros((2, 6, 3), np.uint8))
    writer.close()
    writer.close()
  one, two = fake.started
  assert one == two  # the same id, too
  assert len(one.pop("id")) == 12
  assert one == {
    "project": "tests",
    "entity": None,
    "resume": "allow",
    "name": tmp_path.name,
    "dir": str(tmp_path),
    "config": config,
  }
  assert fake.logged == [
    {"step": 7, "loss": 0.5, "decile_loss/0": 0.25},
    {"step": 7, "samples": ("image", (2, 6, 3))},
    {"step": 14, "loss": 0.5, "decile_loss/0": 0.25},
    {"step": 14, "samples": ("image", (2, 6, 3))},
  ]
  # A step that is made anew after a rollback is no error there.
  assert ("*", {"step_metric": "step"}) in fake.defined
  assert fake.ended == 2


def test_the_real_wandb_takes_it_without_a_network(tmp_path, monkeypatch):
  pytest.importorskip("wandb")
  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("WANDB_SILENT", "true")
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    writer = MetricWriter(tmp_path, 0, config=config_with())
    writer.write(1, {"loss": 0.5})
    writer.write_image(1, "samples", np.zeros((2, 6, 3), np.uint8))
    writer.close()
  run_id = (tmp_path / "wandb" / "run_id.txt").read_text()
  [record] = tmp_path.glob(f"wandb/offline-run-*/run-{run_id}.wandb")
  # A process of its own writes it, on a busy machine a while after it was told to.
  wanted, deadline = (b"loss", b"tests", b"samples"), time.monotonic() + 60
  while not all(written in record.read_bytes() for written in wanted):
    assert time.monotonic() < deadline, record.read_bytes()
    time.sleep(0.1)


@pytest.fixture
def clock(monkeypatch):
  now = [50.0]
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
  return now


def step_metrics(loss, decile, examples=4):
  losses, counts = np.zeros(10), np.zeros(10)
  losses[decile], counts[decile] = examples * loss, examples
  return {
    "loss": np.float32(loss),
    "decile_loss": losses,
    "decile_count": counts,
    "example_loss": np.full(examples, loss),
    "replaced_examples": np.int32(loss),
  }


def test_a_window_means_over_steps_and_over_the_examples_of_each_tenth(clock):
  window = Window(batch_size=4)
  window.add(step_metrics(1.0, 0))
  window.add(step_metrics(3.0, 0, examples=12))
  window.add(step_metrics(8.0, 9))
  clock[0] += 6.0
  report, _, _ = window.close()
  assert report["loss"] == 4.0
  assert report["decile_loss"][[0, 9]].tolist() == [2.5, 8.0]
  assert np.isnan(report["decile_loss"][1:9]).all()
  assert report["replaced_examples"] == 12  # in all, not a step
  assert "example_loss" not in report
  assert "decile_count" not in report


def test_a_window_counts_waiting_as_its_own_and_pauses_as_nobodys(clock):
  window = Window(batch_size=4)
  for _ in range(2):
    window.add(step_metrics(1.0, 0))
  clock[0] += 3.0
  with window.spent("data"):
    clock[0] += 1.0
  with window.spent("saving"):
    clock[0] += 4.0
  with window.paused():
    clock[0] += 100.0
  report, seconds, productive = window.close()
  assert report["step_time"] == 4.0
  assert report["images_per_second"] == 1.0
  assert (report["data_share"], report["saving_share"]) == (0.125, 0.5)
  assert (seconds, productive) == (8.0, 3.0)


def test_bad_steps_take_time_and_teach_nothing(clock):
  window = Window(batch_size=4)
  window.add(step_metrics(1.0, 0))
  window.add_bad()
  clock[0] += 6.0
  report, seconds, productive = window.close()
  assert (report["loss"], report["bad_steps"], report["step_time"]) == (1.0, 1, 3.0)
  assert (seconds, productive) == (6.0, 3.0)
  window.add_bad()
  clock[0] += 2.0
  report, _, productive = window.close()
  assert "loss" not in report
  assert (report["bad_steps"], productive) == (1, 0.0)


def test_a_closed_window_starts_anew(clock):
  window = Window(batch_size=4)
  window.add(step_metrics(1.0, 0))
  with window.spent("data"):
    clock[0] += 1.0
  window.close()
  clock[0] += 2.0
  window.add(step_metrics(5.0, 3))
  report, _, _ = window.close()
  assert (report["loss"], report["step_time"], report["data_share"]) == (5.0, 2.0, 0.0)
