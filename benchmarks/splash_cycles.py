"""What a step of each kernel of attention takes of a TPU, without a TPU.

  python -m benchmarks.splash_cycles --topology=v5e:2x2

Compiles attention with its gradient ahead of time, for which the extra `plan` is
enough, and counts the instructions that libtpu schedules for one step of each kernel's
grid: a bundle is a cycle. What is skipped but at the beginning and the end of a row of
steps is told apart. Prints rows for the table of `pixsigma_jax/plan/kernels.py`. A
quarter of a minute a row on a machine that does nothing else.
"""

import os
import pathlib
import re
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from pixsigma_jax import command
from pixsigma_jax.models import splash, splash_backward
from pixsigma_jax.plan import topology
from pixsigma_jax.plan.kernels import Step, scheduled

_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "Chips of a TPU slice.")

HEADS, LENGTH, WIDTH = 4, 4096, 72
KEYS = (4096, 3072, 300)  # fetched by 2048, by 1024; and those of a caption
_KERNEL = re.compile(
  rf"-(?:splash_mha_(fwd|dq|dkv)_\w+|\w*{splash_backward.NAME}_\w+)\.\d+-\d+-final_bundles"
)


def steps(keys: int, device: Any, dump: pathlib.Path) -> dict[str, Step]:
  """Of the kernels of attention to so many keys."""
  place = jax.sharding.SingleDeviceSharding(device)

  def array(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

  def loss(query, key, value, mask):
    options = {"residual_name": "kept", "device_kind": device.device_kind}
    return splash.attend(query, key, value, mask, **options).astype(jnp.float32).sum()

  query, key = array(1, LENGTH, HEADS, WIDTH), array(1, keys, HEADS, WIDTH)
  before = set(dump.iterdir())
  mask = array(1, keys, dtype=jnp.bool_)
  jax.jit(jax.grad(loss, (0, 1, 2))).lower(query, key, key, mask).compile()
  return {
    found[1] or "backward": scheduled(path.read_text())
    for path in set(dump.iterdir()) - before
    if (found := _KERNEL.search(path.name))
  }


def main(_: list[str]) -> None:
  """Prints a row a kernel and size of its blocks."""
  dump = pathlib.Path(tempfile.mkdtemp(prefix="splash_cycles_"))
  os.environ["LIBTPU_INIT_ARGS"] = (
    f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true "
    "--xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"
  )
  jax.config.update("jax_platforms", "cpu")
  device = topology.devices(topology.parse(_TOPOLOGY.value))[0]
  print(f"cycles of a step, {device.device_kind}, JAX {jax.__version__}")
  print("kernel | queries x keys | every step | a row beside")
  for keys in KEYS:
    for kernel, step in sorted(steps(keys, device, dump).items()):
      block = splash.block_size(keys)
      at_once = splash.fetched(keys, itemsize=2) if kernel == "fwd" else block
      size = f"{splash.block_size(LENGTH)} x {at_once}"
      print(f"{kernel} | {size} | {step.each} | {step.row}", flush=True)


if __name__ == "__main__":
  command.run(main)
