"""Saving and restoring: what a month-long run and a stranger's checkpoint rely on."""

import contextlib
import dataclasses
import gc
import json
import pathlib
import resource
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import multihost_utils

from pixsigma_jax import checkpoint, sharding, tree
from pixsigma_jax.metadata import History, Metadata
from pixsigma_jax.train.ema import Ema
from pixsigma_jax.train.optimizer import make_optimizer
from pixsigma_jax.train.step import init_state
from tests.sample import models

CONFIG = models.nano()
_MADE = models.metadata(CONFIG, provenance=({"stage": "test", "parent": None},))
# JSON has lists where a config has tuples.
ABOUT = Metadata.from_json(json.loads(json.dumps(_MADE.to_json())))
TX = make_optimizer(
  optax.constant_schedule(1e-3),
  name="adamw",
  b1=0.9,
  b2=0.999,
  eps=1e-8,
  weight_decay=0.0,
  clip_norm=1.0,
  groups=(),
)
EMA = Ema(
  kind="exponential", values=(0.9, 0.5), unit="updates", offload=False, batch_size=1
)
HISTORY = History("a-run")
TINY = {"w": np.arange(6, dtype=np.float32)}


# A failed restore leaves Orbax's other reads unawaited, for the collector to complain.
pytestmark = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True)
def collect_what_orbax_leaves():
  yield
  gc.collect()


def train_state():
  """A state in which no two leaves are equal, as after some steps of training."""
  null_caption = jnp.asarray(models.null_caption(CONFIG))
  params, key = models.random_params(CONFIG), jax.random.key(7)
  state = init_state(params, null_caption, TX, EMA, key)
  draw = np.random.default_rng(1)

  def disturb(leaf):
    if jnp.issubdtype(leaf.dtype, jnp.floating):
      return jnp.asarray(draw.normal(0, 1, leaf.shape), leaf.dtype)
    return leaf if leaf.shape or leaf.dtype != jnp.int32 else leaf + 41

  return jax.tree.map(disturb, state)


@pytest.fixture(scope="module")
def state():
  return train_state()


def abstract(state, mesh):
  places = state.shardings(mesh)
  return jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
    state,
    places,
  )


def assert_equal_to_the_bit(have, want):
  assert tree.differences(have, want) == []
  wanted = tree.named_leaves(want)
  for name, leaf in tree.named_leaves(have).items():
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      assert jax.random.key_impl(leaf) == jax.random.key_impl(wanted[name])
      leaf, wanted[name] = (jax.random.key_data(k) for k in (leaf, wanted[name]))
    np.testing.assert_array_equal(leaf, wanted[name], err_msg=name, strict=True)


def open_run(workdir, keep_last=3, keep_every=0, local=""):
  return checkpoint.Checkpoints(
    workdir,
    mesh=sharding.single_device_mesh(),
    keep_last=keep_last,
    keep_every=keep_every,
    history=HISTORY,
    local=str(local),
  )


def steps_in(directory):
  return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())


def save_all(workdir, steps, **keep):
  """Saves TINY, plus the step, at each of `steps`."""
  run = open_run(workdir, **keep)
  for step in steps:
    run.save(step, {"w": TINY["w"] + step}, {"next": step}, ABOUT)
  run.close()


def restore_tiny(run, step):
  mesh = sharding.single_device_mesh()
  want = {
    "w": jax.ShapeDtypeStruct((6,), np.float32, sharding=sharding.replicated(mesh))
  }
  return run.restore(step, want)


def save_snapshot(workdir, step, params=None, about=ABOUT):
  params = models.random_params(CONFIG, seed=step) if params is None else params
  checkpoint.save_snapshot(
    workdir,
    step,
    params=params,
    null_caption=models.null_caption(CONFIG),
    metadata=about,
  )
  return params


def save_and_wait(run, step, state):
  run.save(step, state, {"next": step}, ABOUT)
  run.wait()


@contextlib.contextmanager
def full_disk():
  """No file may grow any more: what a full disk looks like to a program."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ------------------------------------------------------------------------- checkpoints


def test_a_train_state_moves_between_1_and_8_devices_and_stays_the_same_to_the_bit(
  state, tmp_path
):
  one = sharding.single_device_mesh()
  eight = sharding.make_mesh(data=1, fsdp=8, context=1)
  first, position = open_run(tmp_path / "one"), {"next_example": 3, "seed": 5}
  first.save(42, state, position, ABOUT)
  first.close()

  again = open_run(tmp_path / "one")
  assert again.latest_step() == 42
  assert again.metadata(42) == ABOUT
  spread, found = again.restore(42, abstract(state, eight))
  again.close()
  assert found == position
  assert_equal_to_the_bit(spread, state)
  kernel = spread.opt_state[1].mu["blocks_00_00"]["mlp"]["in"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (1, 48 // 8, 192)

  second = open_run(tmp_path / "eight")
  second.save(42, spread, position, ABOUT)
  back, _ = second.restore(42, abstract(state, one))
  second.close()
  assert_equal_to_the_bit(back, state)
  assert all(len(leaf.sharding.device_set) == 1 for leaf in jax.tree.leaves(back))
  # A restored key draws what the saved one drew.
  assert jax.random.bits(back.key) == jax.random.bits(state.key)


def test_what_is_saved_is_the_state_at_the_call_although_the_next_step_donates_it(
  tmp_path,
):
  step = jax.jit(lambda w: w + 1, donate_argnums=0)
  w = jnp.zeros(1_000_000)
  run = open_run(tmp_path)
  run.save(1, {"w": w}, {}, ABOUT)
  for _ in range(5):
    w = step(w)
  run.wait()
  place = sharding.replicated(sharding.single_device_mesh())
  saved, _ = run.restore(
    1, {"w": jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=place)}
  )
  run.close()
  assert not saved["w"].any()


def test_the_newest_steps_stay_and_every_nth_for_good(tmp_path):
  save_all(tmp_path, [2, 4, 5, 6, 7], keep_last=2, keep_every=4)
  assert steps_in(tmp_path / "checkpoints") == [4, 6, 7]
  run = open_run(tmp_path, keep_last=2, keep_every=4)
  restored, position = restore_tiny(run, 4)
  run.close()
  np.testing.assert_array_equal(restored["w"], TINY["w"] + 4)
  assert position == {"next": 4}


def test_without_keep_every_only_the_newest_steps_stay(tmp_path):
  save_all(tmp_path, [10, 20, 30], keep_last=1, keep_every=0)
  assert steps_in(tmp_path / "checkpoints") == [30]


@pytest.mark.parametrize("keep_last", [0, -1])
def test_a_run_that_would_keep_no_step_is_refused(tmp_path, keep_last):
  save_all(tmp_path, [10, 20])
  with pytest.raises(ValueError, match=f"keep_last={keep_last} must be at least 1"):
    open_run(tmp_path, keep_last=keep_last)
  assert steps_in(tmp_path / "checkpoints") == [10, 20]


def test_saving_leaves_the_count_alone_by_which_processes_agree_to_stop(
  tmp_path, monkeypatch
):
  asked = []
  monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
  run = open_run(tmp_path, local=tmp_path / "local")
  state = jax.tree.map(jnp.asarray, TINY)
  for place in ("workdir", "local"):
    run.save(1, state, {"next": 1}, ABOUT, place=place)
  run.close()
  save_snapshot(tmp_path / "snapshots", 1)
  assert steps_in(tmp_path / "checkpoints") == [1]
  assert not asked


def test_before_the_first_step_there_is_no_latest(tmp_path):
  run = open_run(tmp_path)
  assert run.latest_step() is None
  run.close()


def test_a_step_below_the_newest_is_saved_too_and_a_step_twice_is_an_error(tmp_path):
  save_all(tmp_path, [5, 3])
  assert steps_in(tmp_path / "checkpoints") == [3, 5]
  run = open_run(tmp_path)
  message = r"Could not save .* step 5 already exists.*steps there: \[3, 5\]"
  with pytest.raises(checkpoint.SavingError, match=message):
    run.save(5, TINY, {}, ABOUT)
  run.close()


def test_a_step_that_was_being_written_when_the_run_died_counts_for_nothing(tmp_path):
  save_all(tmp_path, [1, 2])
  directory = tmp_path / "checkpoints"
  # What Orbax leaves behind: the step under its temporary name, with parts missing.
  half = directory / "3.orbax-checkpoint-tmp"
  shutil.copytree(directory / "2", half)
  shutil.rmtree(half / "state")

  run = open_run(tmp_path)
  assert run.latest_step() == 2
  np.testing.assert_array_equal(restore_tiny(run, 2)[0]["w"], TINY["w"] + 2)
  run.save(3, TINY, {}, ABOUT)
  run.wait()
  assert run.latest_step() == 3
  np.testing.assert_array_equal(restore_tiny(run, 3)[0]["w"], TINY["w"])
  run.close()


@pytest.mark.parametrize("part", ["state", "data", "metadata"])
def test_a_damaged_step_is_named_with_those_beside_it_and_they_are_still_there(
  tmp_path, part
):
  save_all(tmp_path, [1, 2])
  for path in (tmp_path / "checkpoints" / "2" / part).rglob("*"):
    if path.is_file():
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  run = open_run(tmp_path)
  read = run.metadata if part == "metadata" else lambda s: restore_tiny(run, s)
  message = r"Could not read the checkpoint .*checkpoints/2: .*damaged.*: \[1\]\. Move"
  with pytest.raises(ValueError, match=message):
    read(2)
  np.testing.assert_array_equal(restore_tiny(run, 1)[0]["w"], TINY["w"] + 1)
  run.close()


@pytest.mark.parametrize(
  "other", [{"w": (7,)}, {"v": (6,)}, {"w": (6,), "v": (6,)}, {"w": (2, 3)}]
)
def test_a_checkpoint_of_another_tree_is_refused(tmp_path, other):
  save_all(tmp_path, [1])
  run = open_run(tmp_path)
  place = sharding.replicated(sharding.single_device_mesh())
  want = {
    name: jax.ShapeDtypeStruct(shape, np.float32, sharding=place)
    for name, shape in other.items()
  }
  with pytest.raises(ValueError, match=r"/1: its arrays are not those of") as refused:
    run.restore(1, want)
  run.close()
  assert "files are damaged" not in str(refused.value)


def test_a_mesh_that_does_not_divide_an_array_is_named_and_no_file_blamed(tmp_path):
  save_all(tmp_path, [1])
  run = open_run(tmp_path)
  mesh = sharding.make_mesh(data=1, fsdp=8, context=1)
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
  want = {"w": jax.ShapeDtypeStruct((6,), np.float32, sharding=split)}
  message = r"leaf 'w' of shape \(6,\) cannot be split over the mesh.*partitioned 8"
  with pytest.raises(ValueError, match=message) as refused:
    run.restore(1, want)
  run.close()
  assert "files are damaged" not in str(refused.value)


def test_a_snapshot_on_a_mesh_that_does_not_divide_it_is_not_called_damaged(tmp_path):
  save_snapshot(tmp_path, 1)
  mesh = sharding.make_mesh(data=1, fsdp=7, context=1, devices=jax.devices()[:7])
  with pytest.raises(ValueError, match=r"mesh axis fsdp=7 does not divide") as refused:
    checkpoint.read_snapshot(tmp_path, mesh)
  assert "Could not read" not in str(refused.value)


def failing(error):
  def fail(*_, **__):
    raise error

  return fail


def wrapped(cause):
  """As Orbax raises what it meets while it reads an array."""
  error = Exception("Encountered error while reading array index: (slice(0, 6, 1),).")
  error.__cause__ = cause
  return error


@pytest.mark.parametrize(
  ("error", "kind", "message"),
  [
    (MemoryError(), MemoryError, "too little memory for it .*not to blame"),
    (wrapped(MemoryError("3 GiB")), MemoryError, r"for it \(3 GiB\)"),
    (
      jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9"),
      MemoryError,
      "too little memory",
    ),
    (
      wrapped(ValueError("PERMISSION_DENIED: Error reading local file")),
      OSError,
      "PERMISSION_DENIED: .* may be sound",
    ),
    (ValueError("UNAVAILABLE: no route"), OSError, "may be sound"),
    (wrapped(ValueError("DATA_LOSS: CRC-32C")), ValueError, "DATA_LOSS.* damaged"),
  ],
)
def test_a_step_is_called_damaged_only_if_its_files_are(
  tmp_path, monkeypatch, error, kind, message
):
  save_all(tmp_path, [1, 2])
  run = open_run(tmp_path)
  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.ocp.CheckpointManager, "restore", failing(error))
    with pytest.raises(kind, match=f"the checkpoint .*/2: .*{message}") as refused:
      restore_tiny(run, 2)
  run.close()
  assert ("files are damaged" in str(refused.value)) == (kind is ValueError)


@pytest.mark.parametrize(
  "error", [PermissionError(13, "Permission denied", "/a/file"), TypeError("a bug")]
)
def test_what_says_nothing_of_a_step_passes_as_it_is(tmp_path, monkeypatch, error):
  save_all(tmp_path, [1])
  run = open_run(tmp_path)
  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.ocp.CheckpointManager, "restore", failing(error))
    with pytest.raises(type(error)) as passed:
      restore_tiny(run, 1)
  assert passed.value is error
  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.ocp.CheckpointManager, "save", failing(error))
    kind = checkpoint.SavingError if isinstance(error, OSError) else TypeError
    with pytest.raises(kind):
      run.save(2, TINY, {}, ABOUT)
  run.close()


def test_a_place_that_cannot_be_listed_does_not_hide_why_it_could_not_be_saved_to(
  tmp_path, monkeypatch
):
  run = open_run(tmp_path)
  with monkeypatch.context() as patch:
    away = OSError("no route to the bucket")
    patch.setattr(checkpoint.ocp.CheckpointManager, "save", failing(away))
    patch.setattr(checkpoint, "steps_in", failing(RuntimeError("no token")))
    message = r"no route to the bucket\. Nor can it be listed \(RuntimeError\): see"
    with pytest.raises(checkpoint.SavingError, match=message):
      run.save(1, TINY, {}, ABOUT)
    patch.setattr(checkpoint.ocp.CheckpointManager, "restore", failing(ValueError("x")))
    message = r"x\. .*damaged.*cannot be listed \(RuntimeError\)"
    with pytest.raises(ValueError, match=message):
      restore_tiny(run, 1)
  run.close()


def test_a_remote_that_may_not_be_read_is_not_taken_for_one_of_no_run(
  tmp_path, monkeypatch
):
  save_all(tmp_path / "other", [1])
  denied = failing(PermissionError(13, "Permission denied"))
  monkeypatch.setattr(checkpoint.epath.Path(tmp_path).__class__, "read_text", denied)
  with pytest.raises(PermissionError):
    checkpoint.Checkpoints(
      tmp_path / "run",
      mesh=sharding.single_device_mesh(),
      keep_last=1,
      keep_every=0,
      history=HISTORY,
      remote=str(tmp_path / "other"),
    )


def test_a_full_disk_is_a_clear_error_and_the_step_before_it_is_untouched(
  state, tmp_path
):
  run = open_run(tmp_path, keep_last=1)
  save_and_wait(run, 1, state)
  message = rf"Could not save to {tmp_path}/checkpoints: .*there: \[1\]\. Make"
  with full_disk(), pytest.raises(checkpoint.SavingError, match=message):
    save_and_wait(run, 2, state)

  again = open_run(tmp_path, keep_last=1)
  assert again.latest_step() == 1
  restored, position = again.restore(1, abstract(state, sharding.single_device_mesh()))
  assert_equal_to_the_bit(restored, state)
  assert position == {"next": 1}
  # There is room again: the same command goes on.
  again.save(2, state, {"next": 2}, ABOUT)
  again.close()
  assert steps_in(tmp_path / "checkpoints") == [2]


def test_a_disk_without_room_for_a_step_is_found_before_it_is_begun(
  tmp_path, monkeypatch
):
  run = open_run(tmp_path)
  room = types.SimpleNamespace(free=23)
  monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: room)
  message = r"a checkpoint takes 24 bytes, the disk has 23 free\. Make room there"
  with pytest.raises(checkpoint.SavingError, match=message):
    run.save(1, TINY, {}, ABOUT)
  run.close()
  assert steps_in(tmp_path / "checkpoints") == []


def test_a_workdir_that_cannot_be_made_is_a_saving_error(tmp_path):
  (tmp_path / "run").write_text("a file")
  with pytest.raises(checkpoint.SavingError, match=r"Could not save to .*run/checkp"):
    open_run(tmp_path / "run")


# --------------------------------------------------------------------------- snapshots


def test_a_snapshot_comes_back_to_the_bit_with_its_config_null_caption_and_step(
  tmp_path,
):
  params = save_snapshot(tmp_path, 30)
  snapshot = checkpoint.read_snapshot(tmp_path)
  assert_equal_to_the_bit(snapshot.params, params)
  np.testing.assert_array_equal(snapshot.null_caption, models.null_caption(CONFIG))
  assert (snapshot.step, snapshot.config) == (30, CONFIG)
  assert snapshot.metadata == ABOUT
  assert snapshot.path == tmp_path / "snapshots" / "30"


def test_a_snapshot_is_read_straight_into_the_shards_of_a_mesh(tmp_path):
  params = save_snapshot(tmp_path, 1)
  mesh = sharding.make_mesh(data=2, fsdp=4, context=1)
  snapshot = checkpoint.read_snapshot(tmp_path, mesh)
  assert_equal_to_the_bit(snapshot.params, params)
  kernel = snapshot.params["caption_projection"]["in"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (CONFIG.caption_width // 4, 48)
  assert len(snapshot.null_caption.sharding.device_set) == 8


def test_a_snapshot_is_found_by_its_run_its_directory_and_itself(tmp_path, monkeypatch):
  for step in (9, 10):
    (tmp_path / "snapshots" / str(step) / "model").mkdir(parents=True)
  # Neither a half-written step nor anything else that lies there is a snapshot.
  (tmp_path / "snapshots" / "11.orbax-checkpoint-tmp" / "model").mkdir(parents=True)
  (tmp_path / "snapshots" / "12").mkdir()
  newest = tmp_path / "snapshots" / "10"
  assert checkpoint.find_snapshot(tmp_path) == newest
  assert checkpoint.find_snapshot(tmp_path / "snapshots") == newest
  assert checkpoint.find_snapshot(str(newest)) == newest
  assert checkpoint.find_snapshot(newest.parent / "9") == newest.parent / "9"
  monkeypatch.chdir(tmp_path)
  assert checkpoint.find_snapshot("snapshots/9") == newest.parent / "9"


def test_a_snapshot_that_is_there_stays_as_it_is_and_an_older_step_is_written(tmp_path):
  first = save_snapshot(tmp_path, 5)
  save_snapshot(tmp_path, 5, params=models.random_params(CONFIG, seed=77))
  assert_equal_to_the_bit(checkpoint.read_snapshot(tmp_path).params, first)
  save_snapshot(tmp_path, 4)
  assert steps_in(tmp_path / "snapshots") == [4, 5]


def test_a_snapshot_of_other_settings_makes_place(tmp_path):
  save_snapshot(tmp_path, 5)
  other = dataclasses.replace(ABOUT, stage="another")
  params = models.random_params(CONFIG, seed=77)
  save_snapshot(tmp_path, 5, params=params, about=other)
  snapshot = checkpoint.read_snapshot(tmp_path)
  assert snapshot.metadata == other
  assert_equal_to_the_bit(snapshot.params, params)


def test_a_parent_before_any_training_is_only_meant_by_its_own_path(tmp_path):
  save_snapshot(tmp_path, 0)
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(FileNotFoundError, match="has no snapshot yet: its stage has not"):
    checkpoint.find_snapshot(tmp_path)
  assert checkpoint.find_snapshot(tmp_path / "snapshots" / "0").name == "0"


def test_a_path_that_is_not_there_is_named(tmp_path):
  with pytest.raises(
    FileNotFoundError, match=f"no checkpoint at {tmp_path}/no: no such"
  ):
    checkpoint.find_snapshot(tmp_path / "no")


def test_a_run_without_a_snapshot_says_how_to_get_one(tmp_path):
  (tmp_path / "checkpoints" / "5").mkdir(parents=True)
  with pytest.raises(FileNotFoundError, match=f"no snapshot yet.*--workdir={tmp_path}"):
    checkpoint.read_snapshot(tmp_path)


def test_a_foreign_directory_is_told_by_what_it_holds(tmp_path):
  (tmp_path / "model.safetensors").touch()
  with pytest.raises(
    FileNotFoundError, match=r"not a .*: it holds model\.safetensors\."
  ):
    checkpoint.read_snapshot(tmp_path)


def test_of_many_files_in_a_foreign_directory_the_rest_is_counted(tmp_path):
  for number in range(8):
    (tmp_path / f"{number}.txt").touch()
  with pytest.raises(FileNotFoundError, match=r"holds 0\.txt, .* 5\.txt, and 2 more\."):
    checkpoint.find_snapshot(tmp_path)


def test_an_empty_directory_holds_nothing(tmp_path):
  with pytest.raises(FileNotFoundError, match="it holds nothing"):
    checkpoint.find_snapshot(tmp_path)


def test_a_truncated_snapshot_is_named_and_the_one_before_it_can_be_read(tmp_path):
  before = save_snapshot(tmp_path, 1)
  save_snapshot(tmp_path, 2)
  largest = max(
    (tmp_path / "snapshots" / "2" / "model").rglob("*"), key=lambda p: p.stat().st_size
  )
  largest.write_bytes(largest.read_bytes()[:100])
  message = (
    r"Could not read the checkpoint .*snapshots/2: .*other steps beside it: \[1\]"
  )
  with pytest.raises(ValueError, match=message):
    checkpoint.read_snapshot(tmp_path)
  found = checkpoint.read_snapshot(pathlib.Path(tmp_path, "snapshots", "1"))
  assert_equal_to_the_bit(found.params, before)


def test_a_snapshot_of_a_later_format_is_refused_with_both_numbers(tmp_path):
  save_snapshot(tmp_path, 1)
  [path] = (tmp_path / "snapshots" / "1" / "metadata").glob("metadata")
  path.write_text(path.read_text().replace('"format": 2', '"format": 3'))
  message = r"/1 cannot be used: .*has format 3; this version .* format 1 and 2"
  for read in (checkpoint.read_snapshot, checkpoint.read_metadata):
    with pytest.raises(ValueError, match=message) as refused:
      read(tmp_path)
    assert "files are damaged" not in str(refused.value)


@pytest.mark.parametrize("text", ["[1, 2]", '{"format": 2, "history": {"run": "a"}}'])
def test_metadata_that_are_json_and_none_of_ours_are_named(tmp_path, text):
  save_snapshot(tmp_path, 1)
  [path] = (tmp_path / "snapshots" / "1" / "metadata").glob("metadata")
  if "history" in text:
    text = json.dumps({**json.loads(path.read_text()), "history": {"run": "a"}})
  path.write_text(text)
  with pytest.raises(ValueError, match=r"snapshots/1: its metadata are damaged"):
    checkpoint.read_metadata(tmp_path)


def test_a_snapshot_of_a_model_that_a_later_version_knows_is_not_called_damaged(
  tmp_path,
):
  save_snapshot(tmp_path, 1)
  [path] = (tmp_path / "snapshots" / "1" / "metadata").glob("metadata")
  fields = json.loads(path.read_text())
  fields["model"]["new_field"] = 1
  path.write_text(json.dumps(fields))
  with pytest.raises(ValueError, match=r"does not know .*new_field.*version that"):
    checkpoint.read_snapshot(tmp_path)


def test_a_snapshot_whose_arrays_are_not_of_its_config_is_refused(tmp_path):
  wider = models.metadata(models.nano(caption_width=24))
  save_snapshot(tmp_path, 1, about=wider)
  with pytest.raises(ValueError, match=r"snapshots/1: its arrays are not those of"):
    checkpoint.read_snapshot(tmp_path)


def test_a_full_disk_names_the_snapshots_that_are_there(tmp_path):
  save_snapshot(tmp_path, 1)
  message = r"snapshots: .* there: \[1\]\. Make"
  with full_disk(), pytest.raises(checkpoint.SavingError, match=message):
    save_snapshot(tmp_path, 2)
  assert checkpoint.find_snapshot(tmp_path).name == "1"
