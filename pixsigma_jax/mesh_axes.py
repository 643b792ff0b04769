"""Names of the mesh's axes, along which devices share arrays and work."""

from typing import Any

DATA = "data"  # replicas of the model
FSDP = "fsdp"  # shards of its parameters, which also split the batch
CONTEXT = "context"  # shards of the token axis, for 2K images and above
GUIDANCE = "guidance"  # branches of guidance, of an image that is drawn

AXES = (DATA, FSDP, CONTEXT)
ROWS = (DATA, FSDP)  # of a batch
SAMPLING_AXES = (DATA, FSDP, GUIDANCE, CONTEXT)


def network_rows(mesh: Any) -> tuple[str, ...]:
  """Axes that split the rows of a network's batch.

  Where branches of guidance have devices of their own, the rows of the first branch
  come before those of the second.
  """
  return (GUIDANCE, *ROWS) if GUIDANCE in mesh.shape else ROWS
