"""What cannot work ends in one line that names the culprit, and loses nothing."""

import dataclasses
import gc
import json
import logging
import re
import shutil

import numpy as np
import pytest

from configs.quickstart import compressed, high
from pixsigma_jax import checkpoint
from pixsigma_jax.data import mixture
from pixsigma_jax.data.records import open_dataset
from pixsigma_jax.data.writing import RecordWriter
from pixsigma_jax.train import guards
from tests import commands
from tests.train import runs

pytestmark = [
  # A failed restore leaves Orbax's other reads unawaited; the collector complains.
  pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def collect_what_orbax_leaves():
  yield
  gc.collect()


@pytest.fixture
def command(capsys, monkeypatch):
  """Runs the command and gives its exit code and what it said but for the log."""

  def command(*arguments):
    with runs.first_devices():
      done = commands.run(capsys, monkeypatch, "train", *arguments)
    lines = done.err.splitlines()
    return done.code, [x for x in lines if not re.match(r"[IW]\d{4} ", x)]

  return command


@pytest.fixture
def workdir(done, tmp_path):
  """A copy of a run of six steps."""
  return shutil.copytree(done, tmp_path / "run")


@pytest.fixture
def copy(data, tmp_path):
  """A copy of the images, to be damaged."""
  return shutil.copytree(data, tmp_path / "copy")


@pytest.fixture(scope="module")
def finer(tmp_path_factory):
  return runs.prepare(tmp_path_factory.mktemp("data") / "16px", 16)


# ------------------------------------------------------------------------ the config


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (["--config.totl_steps=3"], r"totl_steps \(did you mean config\.total_steps\?"),
    (
      ["--config.model.variantt=Nano/2"],
      r"unknown config\.model\.variantt \(did you mean config\.model\.variant\?\)",
    ),
    (["--config.data.path=nowhere"], "There is no dataset at"),
    (["--config.model.variant=Nano/3"], "Unknown variant 'Nano/3'; choose one of"),
    (["--config.init.parent=nowhere"], "There is no checkpoint at .*nowhere"),
  ],
)
def test_the_command_says_in_one_line_what_is_wrong(
  command, data, tmp_path, changes, message
):
  code, lines = command(*runs.flags(data, tmp_path / "run"), *changes)
  assert code == 1
  assert len(lines) == 1
  assert re.match(f"Error: .*{message}", lines[0])


def test_a_missing_config_file_is_named(command, tmp_path):
  for arguments in ([], ["--config.seed=1"]):
    code, lines = command("--config=nowhere.py", f"--workdir={tmp_path}", *arguments)
    assert (code, len(lines)) == (1, 1)
    assert re.match("Error: .*nowhere.py", lines[0])


def test_a_config_file_that_fails_is_no_failure_of_ours(command, tmp_path):
  path = tmp_path / "mine.py"
  path.write_text("def get_config():\n  return {}['learning_rate']\n")
  code, lines = command(f"--config={path}", f"--workdir={tmp_path}")
  assert (code, len(lines)) == (1, 1)
  assert "KeyError: learning_rate" in lines[0]


def _with(name, value):
  def change(config):
    *sections, field = name.split(".")
    for section in sections:
      config = config[section]
    with config.unlocked():
      config[field] = value

  return change


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (_with("seeed", 1), r"unknown config\.seeed \(did you mean config\.seed\?\)"),
    (_with("model.widthh", 1), r"unknown config\.model\.widthh"),
    (_with("loss.dropout", 1), r"unknown config\.loss\.dropout \(did you mean "),
    (_with("optimizer.b3", 0.9), r"unknown config\.optimizer\.b3"),
    (_with("data.paths", 1), r"unknown config\.data\.paths \(did you mean "),
    (_with("mesh.model", 1), r"unknown config\.mesh\.model"),
    (_with("log.everyy", 1), r"unknown config\.log\.everyy"),
    (_with("checkpoint.everyy", 1), r"unknown config\.checkpoint\.everyy"),
    (_with("compute.float", 1), r"unknown config\.compute\.float"),
    (_with("init.parents", ""), r"unknown config\.init\.parents"),
    (_with("optimizer.name", "sgd"), r"Unknown optimizer\.name 'sgd'"),
    (_with("optimizer.schedule", "linear"), r"Unknown optimizer\.schedule 'linear'"),
    (_with("optimizer.warmup_steps", 6), r"warmup_steps=6 .* total_steps=6"),
    (_with("total_steps", 0), r"config\.total_steps=0 must be at least 1"),
    (_with("checkpoint.keep_last", 0), r"config\.checkpoint\.keep_last=0 must be at"),
    (_with("ema.values", (1.5,)), r"ema\.values: the decay 1\.5 must be"),
    (_with("log.every", 0), r"config\.log\.every=0 must be at least 1"),
    (_with("compute.attention", "flash"), "'flash'"),
    (_with("batch_size", 0), r"config\.batch_size=0 must be at least 1"),
    (_with("mesh.data", 3), r"Mesh .*'data': 3.* does not cover 1 devices"),
    (_with("model.in_channels", 4), r"config\.model\.in_channels=4, .* with 3"),
    (_with("model.caption_width", 9), r"config\.model\.caption_width=9, .* with 64"),
    (
      _with("model.base_size", 8),
      r"config\.model\.base_size=8, but .* of 8 pixels, 4 tokens a side: set base_size"
      "=4 .* interpolate_pe",
    ),
    (
      _with("model.caption_length", 3),
      r"captions in .* have more than 3 tokens, .* raise the caption length",
    ),
    (_with("init.transforms", ({"name": "extend_pe"},)), "are for a parent"),
  ],
)
def test_a_config_that_does_not_fit_is_refused_before_anything_is_saved(
  data, tmp_path, change, message
):
  config = runs.low(data)
  change(config)
  with pytest.raises(ValueError, match=message):
    runs.train(config, tmp_path / "run")
  assert not list((tmp_path / "run").rglob("[0-9]*"))


def test_a_batch_that_the_mesh_cannot_split_is_refused(data, tmp_path):
  config = runs.low(data, batch_size=6, mesh__fsdp=4, mesh__data=2)
  with pytest.raises(
    ValueError, match=r"config.batch_size=6 must be a multiple of data × fsdp = 8"
  ):
    runs.train(config, tmp_path, devices=8)


# ---------------------------------------------------------------- parents, workdirs


def _high(finer, parent, **changes):
  changes = {name.replace("__", "."): value for name, value in changes.items()}
  return runs.shrink(high.get_config(), finer, parent, changes)


def test_a_parent_that_is_none_is_named(finer, tmp_path, done):
  def refused(parent, kind, message):
    with pytest.raises(kind, match=message):
      runs.train(_high(finer, parent), tmp_path / "run")
    assert not list((tmp_path / "run").rglob("[0-9]*"))

  refused(
    tmp_path / "no", FileNotFoundError, "There is no checkpoint at .*/no: no such"
  )
  (tmp_path / "foreign").mkdir()
  (tmp_path / "foreign" / "photo.png").touch()
  refused(
    tmp_path / "foreign",
    FileNotFoundError,
    "foreign is not a checkpoint of pixsigma_jax: it holds photo.png",
  )
  refused(finer, FileNotFoundError, "is not a checkpoint of pixsigma_jax: it holds")
  unfinished = shutil.copytree(done, tmp_path / "unfinished")
  shutil.rmtree(unfinished / "snapshots")
  refused(unfinished, FileNotFoundError, "has no snapshot yet: .* --workdir=")
  broken = shutil.copytree(done, tmp_path / "broken")
  shutil.rmtree(broken / "snapshots" / "6" / "metadata")
  refused(broken, ValueError, "Could not read the checkpoint .*/6: ")


@pytest.mark.parametrize(
  ("file", "transforms", "message"),
  [
    (high, (), r"base_size: 4 → 8.*\(interpolate_pe would bridge it\)"),
    (
      high,
      ({"name": "extend_pe", "base_size": 8},),
      r"pe_interpolation: 1.0 → 2.0 \(interpolate_pe would bridge it\)",
    ),
    (
      compressed,
      ({"name": "interpolate_pe", "base_size": 8},),
      r"kv_compression.layers: .*\(add_kv_compression would bridge it\)",
    ),
    (
      high,
      ({"name": "interpolate"},),
      r"Unknown transform 'interpolate' .*choose from",
    ),
    (high, ({"base_size": 8},), r"each must be a dict with a name"),
    (
      high,
      ({"name": "interpolate_pe", "size": 8},),
      r"The transform interpolate_pe .*'?(base_)?size.* Its arguments are base_size",
    ),
    (
      high,
      ({"name": "interpolate_pe", "base_size": 0},),
      r"base_size 0 must be at least 1",
    ),
  ],
)
def test_transforms_that_do_not_lead_to_the_model_are_refused(
  finer, done, tmp_path, file, transforms, message
):
  config = runs.shrink(file.get_config(), finer, done)
  config.init.transforms = transforms
  with pytest.raises(ValueError, match=message):
    runs.train(config, tmp_path / "run")
  assert not list((tmp_path / "run").rglob("[0-9]*"))


def test_a_parent_of_another_variant_or_other_features_is_refused(
  finer, done, tmp_path
):
  with pytest.raises(
    ValueError, match=r"depth: 2 → 4; width: 48 → .* Change config.model"
  ):
    runs.train(_high(finer, done, model__variant="Mini/2"), tmp_path / "run")
  other = shutil.copytree(finer, tmp_path / "other")
  path = other / "manifest.json"
  fields = json.loads(path.read_text())
  fields["scaling_factor"] = 0.5
  path.write_text(json.dumps(fields))
  with pytest.raises(
    ValueError, match=r"The parent .* was trained on other features .*scaling_factor"
  ):
    runs.train(_high(other, done), tmp_path / "run")


def test_the_workdir_of_another_model_is_refused_and_left_alone(data, workdir):
  before = _files(workdir)
  for field, value in (("variant", "Mini/2"), ("qk_norm", True)):
    config = runs.low(data, total_steps=8, **{f"model__{field}": value})
    with pytest.raises(ValueError, match=r"of this workdir has another .* --workdir"):
      runs.train(config, workdir)
  assert _files(workdir) == before


def test_another_seed_or_other_images_cannot_go_on_with_a_run(data, workdir, finer):
  before = _files(workdir)
  with pytest.raises(ValueError, match="is of seed 0, this run has seed 1"):
    runs.train(runs.low(data, total_steps=8, seed=1), workdir)
  manifest = data / "manifest.json"
  other = shutil.copytree(data, workdir.parent / "other")
  (other / "manifest.json").write_text(manifest.read_text() + " ")
  with pytest.raises(ValueError, match=r"position is in a dataset .* fingerprint"):
    runs.train(runs.low(other, total_steps=8), workdir)
  assert _files(workdir) == before


def test_a_checkpoint_that_is_none_or_damaged_is_named(data, done, workdir):
  config = runs.low(data, total_steps=8)
  before = _files(workdir)
  state = workdir / "checkpoints" / "6" / "state"
  shutil.move(state, workdir.parent / "state")
  with pytest.raises(
    ValueError,
    match=r"Could not read the checkpoint .*/6: .* beside it: \[2, 4\]\. Move it away",
  ):
    runs.train(config, workdir)
  shutil.move(workdir.parent / "state", state)
  assert _files(workdir) == before

  # The way out that it names.
  shutil.move(workdir / "checkpoints" / "6", workdir.parent / "6")
  runs.train(config, workdir)
  assert runs.steps(workdir) == [2, 4, 6, 8]
  runs.assert_same(runs.arrays(workdir, 6), runs.arrays(done, 6))


def test_a_truncated_checkpoint_is_named(data, workdir):
  files = [p for p in (workdir / "checkpoints" / "6").rglob("d/*") if p.is_file()]
  path = max(files, key=lambda p: p.stat().st_size)
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  with pytest.raises(ValueError, match=r"Could not read the checkpoint .*/6: "):
    runs.train(runs.low(data, total_steps=8), workdir)
  assert runs.steps(workdir) == [2, 4, 6]


def test_a_workdir_that_cannot_be_written_is_named(data, tmp_path):
  # A file where a directory should be: permissions do not stop root.
  (tmp_path / "file").touch()
  with pytest.raises(checkpoint.SavingError, match=r"Could not save to .*/file/run: "):
    runs.train(runs.low(data), tmp_path / "file" / "run")


# -------------------------------------------------------------------- the records


def test_a_truncated_shard_is_named(command, copy, tmp_path):
  shard = next(copy.glob("*.array_record"))
  shard.write_bytes(shard.read_bytes()[:-1])
  code, lines = command(*runs.flags(copy, tmp_path / "run"))
  assert (code, len(lines)) == (1, 1)
  assert re.match(rf"Error: .*{shard.name} has .* bytes, .* truncated", lines[0])


def test_a_flipped_record_ends_the_run_and_costs_nothing(command, copy, data, tmp_path):
  dataset = open_dataset(copy)
  number = runs.example_of(6)
  shard = next(copy.glob("*.array_record"))
  whole = shard.read_bytes()
  at = whole.index(dataset[number].latents.tobytes())
  shard.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
  code, lines = command(*runs.flags(copy, tmp_path / "run"))
  assert (code, len(lines)) == (1, 1)
  assert re.match(rf"Error: Record {number} of .*copy is damaged", lines[0])
  assert runs.steps(tmp_path / "run") == [2, 4, 5]  # the last that is sound

  # Repaired, the same command goes on.
  shard.write_bytes(whole)
  runs.train(runs.low(copy), tmp_path / "run")
  assert runs.steps(tmp_path / "run") == [2, 4, 5, 6]


def test_a_caption_longer_than_the_limit_is_refused_where_it_is_written(data, tmp_path):
  dataset = open_dataset(data)
  record = dataset[0]
  long = len(dataset.null_caption) + 1
  record = dataclasses.replace(
    record,
    captions=("word " * long,),
    caption_kinds=("long",),
    caption_lengths=np.array([long], np.int32),
    caption_embeddings=np.ones((long, 64), np.float16),
  )
  features = dataset.manifest.features
  writer = RecordWriter(tmp_path / "long", features, dataset.null_caption)
  message = rf"'word .*' \(\d+ characters\) has {long} tokens, .* shorten it"
  with pytest.raises(ValueError, match=message), writer:
    writer.write(record)


# ---------------------------------------------------------- numbers, room on the disk


# Logging reads every step's loss; where it is rare, saving has to look for itself.
@pytest.mark.parametrize(("every", "log_every"), [(1, 6), (2, 1), (0, 1)])
def test_a_loss_that_is_not_finite_ends_the_run_before_anything_is_saved(
  data, done, tmp_path, monkeypatch, every, log_every
):
  dataset = open_dataset(data)
  number = runs.example_of(4)
  poisoned = runs.poisoned(dataset, {number})
  config = runs.low(data, checkpoint__every=every, log__every=log_every)
  message = rf"at step 4, from the examples {dataset[number].id} \(record {number}\) of"
  with monkeypatch.context() as patch:
    patch.setattr(mixture, "open_dataset", lambda _: poisoned)
    with pytest.raises(guards.BadStepError, match=message):
      runs.train(config, tmp_path)
    saved = {1: [1, 2, 3], 2: [2], 0: []}[every]
    assert runs.steps(tmp_path) == saved
    assert not (tmp_path / "snapshots").exists()
    logged = [line["step"] for line in runs.metrics(tmp_path)]
    assert logged == ([1, 2, 3] if log_every == 1 else [])
    if saved:  # nothing of the bad step is in the last good one; again it ends there
      with pytest.raises(guards.BadStepError, match=message):
        runs.train(config, tmp_path)
      assert runs.steps(tmp_path) == saved
  runs.train(config, tmp_path)  # the image has been repaired
  runs.assert_same(runs.arrays(tmp_path, 6), runs.arrays(done, 6))


def test_parameters_that_overflow_end_the_run_before_they_are_saved(data, tmp_path):
  config = runs.low(data, optimizer__learning_rate=1e30, checkpoint__every=1)
  with pytest.raises(
    guards.BadStepError, match=r"norm/params inf at step 2, .* lower config.optimizer"
  ):
    runs.train(config, tmp_path)
  assert runs.steps(tmp_path) == [1]  # the warm-up's step without an update


def test_a_full_disk_is_said_before_anything_is_compiled_or_written(
  data, workdir, monkeypatch, caplog
):
  caplog.set_level(logging.INFO, logger="absl")
  before = _files(workdir / "checkpoints")
  usage = shutil.disk_usage(workdir)._replace(free=1000)
  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
      checkpoint.SavingError,
      match=r"takes [\d,]+ bytes, the disk has 1,000 free\. .*: \[2, 4, 6\]\. ",
    ):
      runs.train(runs.low(data, total_steps=8), workdir)
  assert "Resuming" not in caplog.text
  assert "Compiling" not in caplog.text
  assert _files(workdir / "checkpoints") == before
  runs.train(runs.low(data, total_steps=8), workdir)
  assert runs.steps(workdir) == [2, 4, 6, 8]


def test_a_disk_that_fills_while_a_run_trains_is_said_before_a_save(
  data, workdir, monkeypatch, caplog
):
  caplog.set_level(logging.INFO, logger="absl")
  usage, asked = shutil.disk_usage(workdir), []

  def filling(_):
    asked.append(usage)
    return usage._replace(free=10**12 if len(asked) == 1 else 1000)

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.shutil, "disk_usage", filling)
    with pytest.raises(checkpoint.SavingError, match=r"the disk has 1,000 free"):
      runs.train(runs.low(data, total_steps=8), workdir)
  assert "Compiled in" in caplog.text
  assert runs.steps(workdir) == [2, 4, 6]


def test_the_answer_of_the_system_is_in_the_message_however_long_it_is(
  data, workdir, monkeypatch
):
  def fail(*_, **__):
    raise ValueError(f"Error writing {'a/long/path/' * 99}: Disk quota exceeded\nmore")

  monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", fail)
  with pytest.raises(
    checkpoint.SavingError,
    match=r"Could not save to .*/checkpoints: Error writing a/.{,500}: Disk quota "
    r"exceeded\. Complete steps there: \[2, 4, 6\]\. Make room",
  ):
    runs.train(runs.low(data, total_steps=8), workdir)
  assert runs.steps(workdir) == [2, 4, 6]


_LIMITED = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
runpy.run_module("pixsigma_jax.train", run_name="__main__", alter_sys=True)
"""


def test_a_write_that_fails_halfway_loses_nothing(data, workdir, done, tmp_path):
  log = tmp_path / "log"
  arguments = runs.flags(data, workdir, total_steps=8)
  process = runs.start(arguments, log, prefix=("-c", _LIMITED))
  assert process.wait(120) == 1, log.read_text()
  # TensorStore's threads print tracebacks around that line, and into it.
  assert "Error: Could not save to " in log.read_text()
  assert runs.steps(workdir) == [2, 4, 6]
  for step in (2, 4, 6):
    runs.assert_same(runs.arrays(workdir, step), runs.arrays(done, step))
  runs.train(runs.low(data, total_steps=8), workdir)
  assert runs.steps(workdir) == [2, 4, 6, 8]


def _files(directory):
  """Every file's content, but for what each start writes anew."""
  return {
    path.relative_to(directory): path.read_bytes()
    for path in directory.rglob("*")
    if path.is_file() and "tensorboard" not in path.parts
  }
