"""Saving and restoring; the only file that knows Orbax.

A *checkpoint* is everything a run needs to go on: train state, position in the data,
metadata. A *snapshot* is the model for use: EMA parameters, null caption, metadata.

  WORKDIR/checkpoints/STEP/{state, data, metadata}
  WORKDIR/snapshots/STEP/{model, metadata}

Copies of a checkpoint may lie in a second place, a bucket for one, and its shards on
each host's own disk, LOCAL/PROCESS/checkpoints/STEP.

A frozen network beside it, T5 or a VAE, is FOLDER/arrays and its own config.json.

Orbax writes a step under a temporary name and renames it when it is whole, so a run
that dies while saving leaves its earlier steps as they were.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import re
import shutil
import zlib
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.sharding import Mesh

from pixsigma_jax import disk, distributed, errors, sharding, tree
from pixsigma_jax.metadata import History, Metadata, software
from pixsigma_jax.models.pixart import PixArtConfig, abstract_params
from pixsigma_jax.wording import listed

_ARRAYS = "arrays"
# What a snapshot's arrays may take in memory, on their way, beside the model itself.
_CONCURRENT_GB = 1
_LOCAL_KEPT = 2  # the newest may be damaged by what ended the run
_OWNER = "run.json"  # whose checkpoints a directory on a host's own disk holds

CHECKPOINTS, SNAPSHOTS = "checkpoints", "snapshots"


class SavingError(OSError):
  """Something could not be saved; the message names the complete steps there."""


class _Manager(ocp.CheckpointManager):
  """Orbax's manager, which does not take part in stopping.

  Orbax asks JAX at each save whether the step saved is the one to stop after. JAX keeps
  only the number that it was asked last, and `distributed.Stop` asks by another count:
  processes that heard of a signal just after a save agreed on a number that had passed,
  and never stopped.
  """

  def reached_preemption(self, step: int) -> bool:
    """False, without asking JAX."""
    del step
    return False


Location: TypeAlias = Literal["local", "workdir", "remote"]


class Checkpoints:
  """The checkpoints of one run: in its workdir, on the hosts' own disks, elsewhere."""

  def __init__(
    self,
    workdir: str | pathlib.Path,
    *,
    mesh: Mesh,
    keep_last: int,
    keep_every: int,
    history: History,
    local: str = "",
    remote: str = "",
  ):
    """Opens or makes the directories; all processes must do it together.

    Args:
      mesh: whose shards `local` holds.
      keep_last: how many of the newest steps stay, at least 1.
      keep_every: steps divisible by this stay for good; 0 keeps none for good.
      history: run, and branch of it, whose checkpoints these are.
      local: a directory on each host's own disk, where each process keeps the shards
        that it holds, and the two newest steps stay; "" for none. It is one run's.
      remote: a directory or bucket (`gs://…`) for copies; "" for none.

    Raises:
      ValueError: none of the newest is to stay, or `local` or `remote` is another
        run's.
      SavingError: a directory cannot be made.
    """
    if keep_last < 1:  # Orbax would delete each step as soon as it is saved
      raise ValueError(f"keep_last={keep_last} must be at least 1.")
    workdir = pathlib.Path(workdir).absolute()
    self._managers: dict[Location, ocp.CheckpointManager] = {}  # the nearest first
    places: dict[Location, Any] = {"workdir": workdir}
    if remote:
      places["remote"] = epath.Path(remote)
      _check_remote(places["remote"], workdir, history)
    if local:
      directory = pathlib.Path(local).absolute()
      _take_local(directory, workdir, history)
      self._managers["local"] = _open_local(directory, mesh, history)
    for place, directory in places.items():
      with saving(directory / CHECKPOINTS):
        options = ocp.CheckpointManagerOptions(
          max_to_keep=keep_last,
          keep_period=keep_every or None,
          enable_async_checkpointing=True,
        )
        self._managers[place] = _Manager(directory / CHECKPOINTS, options=options)

  def latest_step(self) -> int | None:
    """The newest complete step, wherever it is; None before the first."""
    steps = [manager.latest_step() for manager in self._managers.values()]
    return max((step for step in steps if step is not None), default=None)

  def locations_of(self, step: int) -> list[Location]:
    """Locations that have a complete copy of a step."""
    return [p for p, manager in self._managers.items() if step in manager.all_steps()]

  def save(
    self,
    step: int,
    state: Any,
    position: Any,
    metadata: Metadata,
    *,
    place: Location = "workdir",
  ) -> None:
    """Starts saving a step in the background; a second save waits for the first.

    What goes to the local place is there when this returns.

    Args:
      state: the train state, of which a copy is taken before this returns.
      position: place in the data, as JSON.
      place: where to.

    Raises:
      SavingError: this save, or one that was still under way, failed.
    """
    manager = self._managers[place]
    if place == "local":
      state = jax.tree.map(_key_data, state)
    with saving(manager.directory):
      # Asked first: Orbax finds a disk full in the middle, and says so in pages.
      self._check_space(state, place)
      manager.save(
        step,
        force=True,  # else a step below the newest is passed over without a word
        args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(state),
          data=ocp.args.JsonSave(position),
          metadata=ocp.args.JsonSave(_signed(metadata)),
        ),
      )

  def check_space(self, state: Any) -> None:
    """Checks that the next checkpoint fits on the disks it will be written to.

    Args:
      state: the train state, or its shapes, dtypes and shardings.

    Raises:
      SavingError: there is too little; says how much there is, and is needed.
    """
    for place, manager in self._managers.items():
      with saving(manager.directory):
        self._check_space(state, place)

  def _check_space(self, state: Any, place: Location) -> None:
    if place == "remote":
      return  # buckets do not say
    whole, directory = place == "workdir", self._managers[place].directory
    needed = sum(_nbytes(leaf, whole) for leaf in jax.tree.leaves(state))
    free = shutil.disk_usage(directory).free
    if free < needed:
      raise OSError(f"a checkpoint takes {needed:,} bytes, the disk has {free:,} free")

  def is_saving(self, place: Location) -> bool:
    """Whether a save to a location is under way."""
    return self._managers[place].is_saving_in_progress()

  def directory(self, place: Location) -> Any:
    """Directory of a location's steps."""
    return self._managers[place].directory

  def wait(self) -> None:
    """Waits until everything being saved is on the disk.

    Raises:
      SavingError: it could not be saved.
    """
    for manager in self._managers.values():
      with saving(manager.directory):
        manager.wait_until_finished()

  def metadata(self, step: int) -> Metadata:
    """Metadata of the checkpoint of `step`."""
    return _metadata(self._holder(step), step)

  def restore(self, step: int, abstract_state: Any) -> tuple[Any, Any]:
    """Train state and position of `step`, onto the shardings of `abstract_state`.

    These may belong to another mesh or number of devices than the checkpoint's.

    Raises:
      ValueError: the files are damaged or of another tree, or the mesh does not divide
        an array.
      OSError: they cannot be reached, or may not be read.
      MemoryError: there is too little for them.
    """
    manager, item = self._holder(step), abstract_state
    _check_divisible(abstract_state)
    if manager is self._managers.get("local"):
      item = jax.tree.map(_key_data, abstract_state)
    with _reading(manager.directory / str(step)):
      restored: Any = manager.restore(
        step,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeRestore(
            item=item,
            restore_args=ocp.checkpoint_utils.construct_restore_args(item),
          ),
          data=ocp.args.JsonRestore(),
        ),
      )
    return jax.tree.map(_as_key, abstract_state, restored.state), restored.data

  def close(self) -> None:
    """Waits for saves under way and releases the directories."""
    for manager in self._managers.values():
      with saving(manager.directory):
        manager.close()

  def _holder(self, step: int) -> ocp.CheckpointManager:
    # If it is nowhere, the workdir's error says which steps there are.
    places = self.locations_of(step) or ["workdir"]
    return self._managers[places[0]]


def _check_remote(remote: Any, workdir: pathlib.Path, history: History) -> None:
  """Refuses a remote location whose newest step is another run's."""
  steps = steps_in(remote / CHECKPOINTS)
  found = stored_history(remote, steps[-1]) if steps else None
  if found is not None and found.run != history.run:
    raise ValueError(
      f"config.checkpoint.remote={remote} holds checkpoints of the run {found.run}, "
      f"and {workdir} is the run {history.run}: give each run a place of its own."
    )


def _take_local(
  directory: pathlib.Path, workdir: pathlib.Path, history: History
) -> None:
  """Claims a directory on this host's disk for this run; refuses another run's."""
  path = directory / _OWNER
  way_out = "give each run a directory of its own, or delete that one"
  if (owner := _owner(directory)) is not None:
    if owner["run"] != history.run:
      raise ValueError(
        f"config.checkpoint.local={directory} on this host holds checkpoints of the "
        f"run {owner['run']} (in {owner['workdir']}), and {workdir} is the run "
        f"{history.run}: {way_out}."
      )
    return
  for step, place in local_steps(directory):
    # Written before runs had an identity.
    own = steps_in(workdir / CHECKPOINTS)
    before = _provenance(workdir, own[-1]) if own else None
    if before is None or before != _provenance(place, step):
      raise ValueError(
        f"config.checkpoint.local={directory} on this host holds checkpoints that do "
        f"not say of which run they are, as {place / CHECKPOINTS / str(step)}, and "
        f"that are not known to be of {workdir}: {way_out}."
      )
  owner = {"run": history.run, "workdir": str(workdir)}
  with saving(directory):
    directory.mkdir(parents=True, exist_ok=True)
    disk.write_text(path, json.dumps(owner))


def _owner(directory: pathlib.Path) -> dict[str, Any] | None:
  """Returns the run that owns a directory on a host's own disk, None without one."""
  path = directory / _OWNER
  if not path.exists():
    return None
  try:
    owner = json.loads(path.read_text())
    return {name: str(owner[name]) for name in ("run", "workdir")}
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f"{path} does not say whose checkpoints are beside it ({error}): it is damaged. "
      f"Delete {directory}."
    ) from error


def local_steps(
  directory: pathlib.Path, run: str | None = None
) -> list[tuple[int, pathlib.Path]]:
  """Newest step of each process that has kept its shards on this host, and where.

  Args:
    run: whose they must be; None for anybody's.
  """
  if run and (_owner(directory) or {}).get("run") != run:
    return []
  found = {p: steps_in(p / CHECKPOINTS) for p in sorted(directory.glob("*_of_*"))}
  return [(steps[-1], place) for place, steps in found.items() if steps]


def stored_history(place: Any, step: int) -> History | None:
  """History of the run that made PLACE/checkpoints/STEP; None if it has none."""
  history = (_stored(place, step) or {}).get("history")
  return history and History.from_json(history)


def _provenance(place: Any, step: int) -> Any:
  return (_stored(place, step) or {}).get("provenance")


def _stored(place: Any, step: int) -> dict[str, Any] | None:
  """Metadata of a checkpoint as JSON; None if damaged, which restoring it will name.

  Raises:
    OSError: the place cannot be reached, or may not be read.
  """
  path = place / CHECKPOINTS / str(step) / "metadata" / "metadata"  # as Orbax names it
  try:
    fields = json.loads(path.read_text())
  except (FileNotFoundError, NotADirectoryError, ValueError):
    return None
  return fields if isinstance(fields, dict) else None


def _open_local(
  directory: pathlib.Path, mesh: Mesh, history: History
) -> ocp.CheckpointManager:
  """The manager of this process's own shards.

  Shards are of use to a process that holds the same ones again. So the directory has
  the process and its part of the mesh in its name; on another mesh, or when hosts have
  changed places, a process finds its own empty.
  """
  me, count = jax.process_index(), jax.process_count()
  held = [n for n, d in enumerate(mesh.devices.flat) if d.process_index == me]
  part = zlib.crc32(json.dumps([dict(mesh.shape), held]).encode())
  directory = directory / f"{me}_of_{count}_{part:08x}" / CHECKPOINTS
  with saving(directory):
    directory.mkdir(parents=True, exist_ok=True)
    # Not what some processes had saved, and others not yet, when the job ended; nor
    # what the run has gone back from since, on another mesh.
    have = steps_in(directory)
    made = {step: stored_history(directory.parent, step) for step in have}
    own = [s for s in have if (h := made[s]) is None or history.has_made(h, s)]
    for step in set(have) - set(distributed.in_all(own)):
      shutil.rmtree(directory / str(step))
    everyone = ocp.options.MultiprocessingOptions(
      primary_host=None,  # each its own
      barrier_sync_key_prefix="local",
    )
    arrays = ocp.type_handlers.ArrayHandler(
      primary_host=None, replica_id=None, use_replica_parallel=False
    )
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    json_handler = ocp.JsonCheckpointHandler(multiprocessing_options=everyone)
    return _Manager(
      directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=_LOCAL_KEPT,
        create=False,
        cleanup_tmp_directories=True,
        multiprocessing_options=everyone,
        # In the background, Orbax tells a process that its directory is there when
        # another's is.
        enable_async_checkpointing=False,
      ),
      item_handlers={
        "state": ocp.PyTreeCheckpointHandler(
          multiprocessing_options=everyone, type_handler_registry=registry
        ),
        "data": json_handler,
        "metadata": json_handler,
      },
    )


def _check_divisible(abstract: Any) -> None:
  """Refuses shardings that do not divide their arrays: no file is to blame."""
  for name, leaf in tree.named_leaves(abstract).items():
    if leaf.sharding is None:
      continue
    try:
      leaf.sharding.shard_shape(leaf.shape)
    except ValueError as error:
      raise ValueError(
        f"The leaf {name!r} of shape {leaf.shape} cannot be split over the mesh: "
        f"{_first_line(error)}"
      ) from error


def _is_key(leaf: Any) -> bool:
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_data(leaf: Any) -> Any:
  """A random key as numbers: Orbax forgets its kind in what each host saves itself."""
  if not _is_key(leaf):
    return leaf
  if isinstance(leaf, jax.Array):
    return jax.random.key_data(leaf)
  data = jax.eval_shape(jax.random.key_data, leaf)
  return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)


def _as_key(abstract: Any, leaf: Any) -> Any:
  known = not _is_key(abstract) or _is_key(leaf)
  return leaf if known else jax.random.wrap_key_data(leaf)


def _nbytes(leaf: Any, whole: bool) -> int:
  """Size in bytes of an array, or of this process's part of it."""
  each = math.prod(leaf.shape) * leaf.dtype.itemsize
  if whole or getattr(leaf, "sharding", None) is None:
    return each
  part = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
  return part * len(leaf.sharding.addressable_devices)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
  """A model for use.

  Attributes:
    path: the directory it was read from.
    step: optimizer updates done in its stage.
    metadata: what it says about itself.
    config: hyper-parameters, out of the metadata.
    params: EMA parameters, float32.
    null_caption: `[t e]`, what a dropped caption is replaced with; None in a converted
      model whose source does not hold it.
    fingerprint: of the parameters that were read, see `with_fingerprint`; "" if nobody
      has asked for it.
  """

  path: pathlib.Path
  step: int
  metadata: Metadata
  config: PixArtConfig
  params: Any
  null_caption: Any
  fingerprint: str = ""

  @property
  def origin(self) -> dict[str, Any]:
    """Provenance entry that a child stores about this snapshot as its parent."""
    told = {"params": self.fingerprint} if self.fingerprint else {}
    return {
      "path": str(self.path),
      "stage": self.metadata.stage,
      "step": self.step,
      **told,
    }

  def with_fingerprint(self) -> "Snapshot":
    """This snapshot with a hash of its parameters (`tree.fingerprint`)."""
    return dataclasses.replace(self, fingerprint=tree.fingerprint(self.params))


def save_snapshot(
  workdir: str | pathlib.Path,
  step: int,
  *,
  params: Any,
  null_caption: Any,
  metadata: Metadata,
) -> None:
  """Writes WORKDIR/snapshots/STEP and returns when it is on the disk.

  The same snapshot, by its metadata, is left as it is. One of another run, of other
  settings or of a branch that the run has gone back from is replaced, and the log says
  so: a workdir that never got as far as a checkpoint may be started over.

  Raises:
    SavingError: it could not be saved.
  """
  directory = pathlib.Path(workdir).absolute() / SNAPSHOTS
  model = {"params": params}
  if null_caption is not None:
    model["null_caption"] = null_caption
  # In the foreground, a few arrays at a time: no copy of the model is made for it.
  options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
  with (
    saving(directory),
    _Manager(directory, options=options, item_handlers=_snapshot_handlers()) as manager,
  ):
    if step in manager.all_steps():
      if _is_same(_metadata(manager, step), metadata, step):
        return
      logging.info(
        "Replacing %s, which is of another history of this run.", directory / str(step)
      )
      manager.delete(step)
    manager.save(
      step,
      force=True,  # as above
      args=ocp.args.Composite(
        model=ocp.args.PyTreeSave(model),
        metadata=ocp.args.JsonSave(_signed(metadata)),
      ),
    )
    manager.wait_until_finished()


def find_snapshot(path: str | pathlib.Path) -> pathlib.Path:
  """WORKDIR/snapshots/STEP for a workdir (its newest), its snapshots, or one of them.

  Raises:
    FileNotFoundError: there is none; says what is there instead.
  """
  path = pathlib.Path(path).absolute()
  if not path.is_dir():
    raise FileNotFoundError(f"There is no checkpoint at {path}: no such directory.")
  for directory in (path / SNAPSHOTS, path):
    steps = [int(p.name) for p in directory.glob("[0-9]*") if _is_snapshot(p)]
    # Step 0 of a run is its parent before any training: nobody means that by the run's
    # name. Step 0 where nothing was ever trained is a converted model.
    if any(steps) or (steps and not (directory.parent / CHECKPOINTS).exists()):
      return directory / str(max(steps))
  if _is_snapshot(path):
    return path
  if (path / CHECKPOINTS).is_dir():
    raise FileNotFoundError(
      f"The run in {path} has no snapshot yet: its stage has not ended. Train on with "
      f"--workdir={path}, or set config.checkpoint.snapshot_every."
    )
  found = listed(sorted(p.name for p in path.iterdir()))
  raise FileNotFoundError(
    f"{path} is not a checkpoint of pixsigma_jax: it holds {found}. Give a run's "
    f"--workdir, its {SNAPSHOTS}/ or {SNAPSHOTS}/STEP."
  )


def read_metadata(path: str | pathlib.Path) -> Metadata:
  """Reads a snapshot's metadata without its parameters; see `read_snapshot`."""
  path = find_snapshot(path)
  with ocp.CheckpointManager(path.parent) as manager:
    return _metadata(manager, int(path.name))


def read_snapshot(path: str | pathlib.Path, mesh: Mesh | None = None) -> Snapshot:
  """Reads a model for use, straight into its shards when a mesh is given.

  Args:
    path: see `find_snapshot`.
    mesh: where the parameters go; None puts them on the first device.

  Raises:
    FileNotFoundError: see `find_snapshot`.
    ValueError: the files are damaged or of another format, or the mesh does not divide
      an array.
    OSError: they cannot be reached, or may not be read.
    MemoryError: there is too little for them.
  """
  path = find_snapshot(path)
  step, mesh = int(path.name), mesh or sharding.single_device_mesh()
  with ocp.CheckpointManager(
    path.parent, item_handlers=_snapshot_handlers()
  ) as manager:
    metadata = _metadata(manager, step)
    try:
      config = PixArtConfig.from_dict(metadata.model)
    except (KeyError, TypeError) as error:
      raise ValueError(
        f"The checkpoint {path} is of a model that this version of pixsigma_jax does "
        f"not know ({error}): use the version that wrote it, or convert it anew."
      ) from error
    item = {"params": abstract_params(config)}
    with _reading(path):
      stored = manager.item_metadata(step).model.tree
    if "null_caption" in stored:
      item["null_caption"] = jax.ShapeDtypeStruct(
        (config.caption_length, config.caption_width), np.float32
      )
    places = sharding.state_shardings(item, mesh, item["params"])
    item = sharding.placed(item, places)
    restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args)
    with _reading(path):
      model = manager.restore(step, args=ocp.args.Composite(model=args)).model
  return Snapshot(
    path=path,
    step=step,
    metadata=metadata,
    config=config,
    params=model["params"],
    null_caption=model.get("null_caption"),
  )


def has_arrays(folder: pathlib.Path) -> bool:
  """Whether `save_arrays` has written there."""
  return (folder / _ARRAYS).is_dir()


def save_arrays(folder: pathlib.Path, arrays: Any) -> None:
  """Writes a frozen network's parameters to FOLDER/arrays, whole or not at all.

  Raises:
    SavingError: they could not be saved.
  """
  handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=_CONCURRENT_GB)
  with saving(folder), ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(folder.absolute() / _ARRAYS, args=ocp.args.PyTreeSave(arrays))


def read_arrays(folder: pathlib.Path, abstract: Any) -> Any:
  """Reads what `save_arrays` wrote, onto the shardings and dtypes of `abstract`.

  Raises:
    ValueError: the files are damaged or of another tree.
  """
  path = folder.absolute() / _ARRAYS
  handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=_CONCURRENT_GB)
  restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
  args = ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args)
  with _reading(path), ocp.Checkpointer(handler) as checkpointer:
    return checkpointer.restore(path, args=args)


def _snapshot_handlers() -> dict[str, ocp.CheckpointHandler]:
  return {
    "model": ocp.PyTreeCheckpointHandler(
      save_concurrent_gb=_CONCURRENT_GB, restore_concurrent_gb=_CONCURRENT_GB
    ),
    "metadata": ocp.JsonCheckpointHandler(),
  }


def _metadata(manager: ocp.CheckpointManager, step: int) -> Metadata:
  path = manager.directory / str(step)
  with _reading(path):
    args = ocp.args.Composite(metadata=ocp.args.JsonRestore())
    restored: Any = manager.restore(step, args=args)
  try:
    return Metadata.from_json(restored.metadata)
  except ValueError as error:  # of another version's format, not damaged
    raise ValueError(f"The checkpoint {path} cannot be used: {error}") from error
  except (KeyError, TypeError) as error:
    raise ValueError(
      f"Could not read the checkpoint {path}: its metadata are damaged ({error!r}); "
      f"{_beside(path)}"
    ) from error


def _signed(metadata: Metadata) -> dict[str, Any]:
  """Metadata as JSON, with the software that writes them."""
  return dataclasses.replace(metadata, software=software()).to_json()


def _is_same(have: Metadata, want: Metadata, step: int) -> bool:
  """Whether a stored snapshot equals the one that would replace it."""
  if have.history is None or want.history is None:
    # An older version's, or no run's: what is there is of the first branch.
    branched = [h for h in (have.history, want.history) if h and h.branches]
    same = all(h.has_made(History(h.run), step) for h in branched)
  else:
    same = want.history.has_made(have.history, step)
  have, want = (dataclasses.replace(m, history=None) for m in (have, want))
  return same and have == want


def _is_snapshot(path: pathlib.Path) -> bool:
  return path.name.isdigit() and (path / "model").is_dir()


def saved_steps(workdir: str | pathlib.Path, remote: str = "") -> list[int]:
  """Steps that a run can resume from, in order, without those on hosts' own disks."""
  places = [pathlib.Path(workdir), *([epath.Path(remote)] if remote else [])]
  return sorted({step for place in places for step in steps_in(place / CHECKPOINTS)})


def steps_in(directory: Any) -> list[int]:
  """Complete steps, in order; a step that is being written has another name."""
  return sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit())


# Orbax's words for a tree other than the one that is asked for.
_OTHER_TREE = re.compile(
  "tree structures do not match|is not compatible with the stored shape"
)
# TensorStore raises ValueError for everything. These status codes of its say nothing of
# what a file holds.
_NO_ACCESS = re.compile(
  "PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED"
  "|ABORTED|CANCELLED"
)


@contextlib.contextmanager
def saving(directory: Any) -> Iterator[None]:
  """Turns errors of storing in the block into a `SavingError` with a way out.

  It names the complete steps in `directory`, asked of the disk.
  """
  try:
    yield
  except SavingError:
    raise
  except Exception as error:
    cause = _cause(error)
    if not isinstance(cause, OSError | ValueError):
      raise
    raise SavingError(
      f"Could not save to {directory}: {_first_line(cause)} {_after_error(directory)}, "
      "and start the same command again."
    ) from error


def _after_error(directory: Any) -> str:
  """The complete steps in a directory that could not be written to, and a way out."""
  try:
    # Asked of the disk: Orbax counts a step in from the moment its saving starts.
    steps, advice = steps_in(directory), disk.way_out(directory, "--workdir")
  except Exception as another:  # whatever a bucket's client raises; the first counts
    return (
      f"Nor can it be listed ({type(another).__name__}): see that {directory} can be "
      "reached, or choose another --workdir"
    )
  return f"Complete steps there: {steps}. {advice}" if steps else advice


@contextlib.contextmanager
def _reading(path: Any) -> Iterator[None]:
  """Says of a checkpoint that cannot be read why: what else is raised passes.

  Raises:
    ValueError: its files are damaged, or its arrays are others than those asked for.
    OSError: a store that holds it cannot be reached, or may not be read.
    MemoryError: there is too little for it.
  """
  try:
    yield
  except Exception as error:
    cause = _cause(error)
    reason, begin = _first_line(cause), f"Could not read the checkpoint {path}"
    if errors.of_memory(cause):
      raise MemoryError(
        f"{begin}: there is too little memory for it ({reason.rstrip('.')}). Its files "
        "are not to blame: free some memory, or spread it over more devices."
      ) from error
    if _OTHER_TREE.search(str(cause)):
      raise ValueError(
        f"{begin}: its arrays are not those of the model and optimizer asked for. "
        f"{_first_line(cause, lines=8)} Give the config that wrote it, or another "
        "checkpoint."
      ) from error
    if isinstance(cause, ValueError) and _NO_ACCESS.match(str(cause)):
      raise OSError(
        f"{begin}: {reason} Its files may be sound: see that they can be reached and "
        "read."
      ) from error
    if not isinstance(cause, FileNotFoundError | ValueError | KeyError):
      raise
    raise ValueError(
      f"{begin}: {reason} Its files are damaged or not of pixsigma_jax; {_beside(path)}"
    ) from error


def _beside(path: Any) -> str:
  """The other steps beside a damaged one, and what to do."""
  try:
    others = [step for step in steps_in(path.parent) if str(step) != path.name]
  except Exception as another:  # as in `_after_error`
    return f"what lies beside it cannot be listed ({type(another).__name__})."
  if not others:
    return "no other step lies beside it."
  return (
    f"other steps beside it: {others}. Move it away to go on from the newest of those."
  )


def _cause(error: Exception) -> BaseException:
  """The error itself, or what Orbax has wrapped into an Exception without a type."""
  return error.__cause__ or error if type(error) is Exception else error


def _first_line(error: BaseException, lines: int = 1) -> str:
  said = str(error).strip().splitlines()[:lines] or [type(error).__name__]
  line = " ".join(text.strip() for text in said).rstrip(".")
  # TensorStore says at the end of a long line what the system answered.
  return (line if len(line) <= 400 else f"{line[:150]} … {line[-250:]}") + "."
