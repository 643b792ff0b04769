"""What blocks and masks cost TPU's attention kernel, without a TPU.

  python -m benchmarks.splash_cycles --topology=v5e:2x2

Compiles JAX's splash attention ahead of time, for which the extra `plan` is enough, and
counts the instructions that libtpu schedules for one step of each kernel's grid: a
bundle is a cycle. The table stands in `pixsigma_jax/models/splash.py`,
whose block sizes it chose. A quarter of a minute a row.
"""

import os
import pathlib
import re
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from pixsigma_jax import command
from pixsigma_jax.models.splash import block_sizes
from pixsigma_jax.plan import topology

_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "Chips of a TPU slice.")

HEADS, LENGTH, WIDTH = 4, 4096, 72
# Queries, keys in memory, keys at a time; and what hides keys.
CASES = (
  (512, 512, 512, "feature"),
  (1024, 1024, 1024, "feature"),
  (1024, 2048, 1024, "feature"),
  (1024, 2048, 1024, "segment ids"),
)


def cycles(
  query: int, in_memory: int, at_a_time: int, mask: str, device: Any, dump: pathlib.Path
) -> dict[str, int]:
  """Cycles of one step by kernel: fwd, dq and dkv (which take `at_a_time` keys)."""
  kernel = splash.make_splash_mha(
    splash.MultiHeadMask([splash.FullMask((LENGTH, LENGTH))] * HEADS),
    block_sizes=block_sizes(query, in_memory, at_a_time),
    head_shards=1,
    q_seq_shards=1,
  )
  place = jax.sharding.SingleDeviceSharding(device)

  def array(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

  def loss(query, key, value, segments):
    options = (segments,) if mask == "segment ids" else ()
    out: Any = kernel(query, key, value, *options)
    return out.astype(jnp.float32).sum()

  wide = array(HEADS, LENGTH, WIDTH + (mask == "feature"))
  ids = array(LENGTH, dtype=jnp.int32)
  arguments = wide, wide, array(HEADS, LENGTH, WIDTH), splash.SegmentIds(ids, ids)
  before = set(dump.iterdir())
  jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arguments).compile()
  name = re.compile(r"splash_mha_(fwd|dq|dkv)_[a-z_]+\.\d+-\d+-final_bundles")
  bundle = re.compile(r"\s*(0x[0-9a-f]+|\d+)\s*:")
  counts = {}
  for path in set(dump.iterdir()) - before:
    if found := name.search(path.name):
      lines = path.read_text().splitlines()
      counts[found[1]] = sum(1 for line in lines if bundle.match(line))
  return counts


def main(_: list[str]) -> None:
  """Prints a row a case."""
  dump = pathlib.Path(tempfile.mkdtemp(prefix="splash_cycles_"))
  os.environ["LIBTPU_INIT_ARGS"] = (
    f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true "
    "--xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"
  )
  jax.config.update("jax_platforms", "cpu")
  device = topology.devices(topology.parse(_TOPOLOGY.value))[0]
  print(f"cycles of a step, {device.device_kind}, JAX {jax.__version__}")
  print("queries x keys / keys at a time | mask | fwd | dq | dkv")
  for query, in_memory, at_a_time, mask in CASES:
    found = cycles(query, in_memory, at_a_time, mask, device, dump)
    numbers = " | ".join(str(found[name]) for name in ("fwd", "dq", "dkv"))
    print(f"{query} x {in_memory} / {at_a_time} | {mask} | {numbers}", flush=True)


if __name__ == "__main__":
  command.run(main)
