"""Names of the mesh's axes, along which devices share arrays and work."""

DATA = "data"  # replicas of the model
FSDP = "fsdp"  # shards of its parameters, which also split the batch
CONTEXT = "context"  # shards of the token axis, for 2K images and above

AXES = (DATA, FSDP, CONTEXT)
ROWS = (DATA, FSDP)  # of a batch
