"""Status of a run, from its workdir; nothing is loaded or built."""

import pathlib
from collections.abc import Mapping
from typing import Any

from pixsigma_jax import checkpoint
from pixsigma_jax.train import compatibility, run_directory
from pixsigma_jax.train.config import complete

DONE, OPEN = "done", "open"


def status(config: Mapping[str, Any], workdir: str | pathlib.Path) -> str:
  """Status line: `done` or `open`, and what `train` would do.

  A stage is done when its last snapshot is there and no checkpoint says that the run
  has gone back since: that snapshot is written after everything else.

  Checkpoints on hosts' own disks count where all processes have theirs, on the mesh
  that they were made on. Of these, what this host has is told beside the rest.

  Raises:
    ValueError: the config has values without sense or unknown fields, or the workdir
      is another stage's.
  """
  compatibility.check_config(config)
  config = complete(config)
  workdir, total = pathlib.Path(workdir), config["total_steps"]
  _check_stage(config, workdir)
  saved, local = _steps(config, workdir)
  start = saved[-1] if saved else 0
  newest = local or start
  if _has_last(config, workdir) and (not newest or newest >= total):
    return f"{DONE}: {workdir} has all its {total} steps"
  if later := run_directory.models_after(workdir, newest):
    names = ", ".join(str(path.relative_to(workdir)) for path in later)
    aside = f"; {names}, of another history, move to {run_directory.ABANDONED}/"
  else:
    aside = ""
  nearer = f", or from step {local} if all hosts have it as this one" if local else ""
  if saved:
    return f"{OPEN}: {workdir} goes on from step {start} of {total}{nearer}{aside}"
  parent = config["init"]["parent"]
  if not parent:
    return f"{OPEN}: {workdir} starts from fresh parameters{nearer}{aside}"
  try:
    parent = checkpoint.find_snapshot(parent)
  except FileNotFoundError:
    parent = f"{parent}, which is not there yet,"
  names = [transform["name"] for transform in config["init"]["transforms"]]
  through = f" through {', '.join(names)}" if names else ""
  parent = f"{parent}{through}".removesuffix(",")
  return f"{OPEN}: {workdir} starts from {parent}{nearer}{aside}"


def is_cleared(config: Mapping[str, Any], workdir: pathlib.Path) -> bool:
  """Whether a stage is done, and nothing but its models was kept.

  Of checkpoints on hosts' own disks, this host's are looked for.

  Raises:
    ValueError: the models are another stage's.
  """
  saved, local = _steps(config, workdir)
  cleared = _has_last(config, workdir) and not saved and local is None
  if cleared:  # what else tells a stage from another are its checkpoints
    _check_stage(config, workdir)
  return cleared


def _has_last(config: Mapping[str, Any], workdir: pathlib.Path) -> bool:
  """Whether the snapshot of a stage's last step, or of a later one, is there."""
  snapshots = checkpoint.steps_in(workdir / checkpoint.SNAPSHOTS)
  return bool(snapshots) and snapshots[-1] >= config["total_steps"]


def _check_stage(config: Mapping[str, Any], workdir: pathlib.Path) -> None:
  snapshots = checkpoint.steps_in(workdir / checkpoint.SNAPSHOTS)
  if snapshots:
    last = workdir / checkpoint.SNAPSHOTS / str(snapshots[-1])
    stage = checkpoint.read_metadata(last).stage
    if stage != config["stage"]:
      raise ValueError(
        f"{workdir} is a run of the stage {stage!r}, and this is {config['stage']!r}: "
        "give it a --workdir of its own."
      )


def _steps(
  config: Mapping[str, Any], workdir: pathlib.Path
) -> tuple[list[int], int | None]:
  """Steps to go on from; and a newer one that lies on this host's own disk."""
  places = config["checkpoint"]
  saved = checkpoint.saved_steps(workdir, places["remote"])
  history = run_directory.known(workdir, places["remote"])
  if not places["local"] or history is None:
    return saved, None
  directory = pathlib.Path(places["local"]).absolute()
  newest = [step for step, _ in checkpoint.local_steps(directory, history.run)]
  local = max(newest, default=0)
  return saved, local if local > (saved[-1] if saved else 0) else None
