"""What a step of each kernel of attention takes of a TPU, without a TPU.

  python -m benchmarks.splash_cycles --topology=v5e:2x2 --dtype=bfloat16

Compiles attention with its gradient ahead of time, for which the extra `plan` is
enough, and counts the instructions that libtpu schedules for one step of each kernel's
grid: a bundle is a cycle. What is skipped but at the beginning and the end of a row of
steps is told apart. Prints a row a kernel, and puts them with libtpu's version into
`pixsigma_jax/plan/kernel_cycles.jsonl`, in place of what was counted of that chip and
dtype before. A quarter of a minute a row on a machine that does nothing else.
"""

import dataclasses
import os
import pathlib
import re
import tempfile
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from pixsigma_jax import command
from pixsigma_jax.models import splash, splash_kernels
from pixsigma_jax.plan import kernels, topology
from pixsigma_jax.plan.kernels import Counted, Step, scheduled

_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "Chips of a TPU slice.")
_DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", ["bfloat16", "float32"], "Of queries, keys and values."
)
_CYCLES = flags.DEFINE_string("cycles", str(kernels.CYCLES), "The file.")

HEADS, WIDTH = 4, 72
# Queries and keys: an even number of blocks, an odd one; and the keys of a caption.
LENGTHS = ((4096, 4096), (3072, 3072), (4096, 300))
_KERNEL = re.compile(
  rf"-\w*(?:splash_mha|{splash_kernels.NAME})_(fwd|dq|dkv|forward|backward)_\w+"
  r"\.\d+-\d+-final_bundles"
)


def steps(
  queries: int, keys: int, dtype: Any, device: Any, dump: pathlib.Path
) -> dict[str, Step]:
  """Of the kernels of attention of so many queries to so many keys."""
  place = jax.sharding.SingleDeviceSharding(device)

  def array(*shape: int, dtype: Any = dtype) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

  def loss(query, key, value, mask):
    options = {"residual_name": "kept", "device_kind": device.device_kind}
    return splash.attend(query, key, value, mask, **options).astype(jnp.float32).sum()

  query, key = array(1, queries, HEADS, WIDTH), array(1, keys, HEADS, WIDTH)
  before = set(dump.iterdir())
  mask = array(1, keys, dtype=jnp.bool_)
  jax.jit(jax.grad(loss, (0, 1, 2))).lower(query, key, key, mask).compile()
  return {
    found[1]: scheduled(path.read_text())
    for path in set(dump.iterdir()) - before
    if (found := _KERNEL.search(path.name))
  }


def main(_: list[str]) -> None:
  """Counts each kernel and size of its blocks."""
  dump = pathlib.Path(tempfile.mkdtemp(prefix="splash_cycles_"))
  os.environ["LIBTPU_INIT_ARGS"] = (
    f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true "
    "--xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"
  )
  jax.config.update("jax_platforms", "cpu")
  device = topology.devices(topology.parse(_TOPOLOGY.value))[0]
  dtype = jnp.dtype(_DTYPE.value)
  print(f"cycles of a step, {device.device_kind}, {dtype}, JAX {jax.__version__}")
  print("kernel | queries x keys | every step | a row beside")
  counted = {}
  for queries, keys in LENGTHS:
    for kernel, step in sorted(steps(queries, keys, dtype, device, dump).items()):
      sides = {"queries": queries, "keys": keys}
      block = {name: splash.block_size(side) for name, side in sides.items()}
      if name := {"forward": "queries", "fwd": "keys"}.get(kernel):
        block[name] = splash.at_once(sides[name], dtype.itemsize)
      size = " x ".join(map(str, block.values()))
      print(f"{kernel} | {size} | {step.each} | {step.row}", flush=True)
      counted[kernel, size] = Counted(
        libtpu=metadata.version("libtpu"),
        kind=device.device_kind,
        dtype=dtype.name,
        kernel=kernel,
        **block,
        **dataclasses.asdict(step),
      )
  kernels.keep(list(counted.values()), pathlib.Path(_CYCLES.value))


if __name__ == "__main__":
  command.run(main)
