"""Where a run stands, from what lies in its workdir; nothing is loaded or built."""

import pathlib
from collections.abc import Mapping
from typing import Any

from pixsigma_jax import checkpoint
from pixsigma_jax.train import agreement

DONE, OPEN = "done", "open"


def standing(config: Mapping[str, Any], workdir: str | pathlib.Path) -> str:
  """A line that begins with `done` or with `open`, and what `train` would do.

  A stage is done when its last snapshot is there: that is written after everything
  else.

  Raises:
    ValueError: the config lacks fields, or the workdir is another stage's.
  """
  agreement.check_config(config)
  workdir, total = pathlib.Path(workdir), config["total_steps"]
  snapshots = checkpoint.steps_in(workdir / checkpoint.SNAPSHOTS)
  if snapshots:
    last = workdir / checkpoint.SNAPSHOTS / str(snapshots[-1])
    stage = checkpoint.read_metadata(last).stage
    if stage != config["stage"]:
      raise ValueError(
        f"{workdir} is a run of the stage {stage!r}, and this is {config['stage']!r}: "
        "give it a --workdir of its own."
      )
  if snapshots and snapshots[-1] >= total:
    return f"{DONE}: {workdir} has all its {total} steps"
  if steps := checkpoint.saved_steps(workdir, config["checkpoint"]["remote"]):
    return f"{OPEN}: {workdir} goes on from step {steps[-1]} of {total}"
  parent = config["init"]["parent"]
  if not parent:
    return f"{OPEN}: {workdir} starts from fresh parameters"
  try:
    parent = checkpoint.find_snapshot(parent)
  except FileNotFoundError:
    parent = f"{parent}, which is not there yet"
  return f"{OPEN}: {workdir} starts from {parent}"
