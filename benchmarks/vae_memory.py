"""What decoding and encoding 4096² pixels takes on 16 GiB chips, without a chip.

  python -m benchmarks.vae_memory

Compiles SDXL's autoencoder in bfloat16 ahead of time for TPU v5e, for which libtpu
(the extra `plan`) is enough, and prints the compiler's own account of a chip's
memory: a tile on one chip, and the whole image, exactly, with its rows on four.
"""

import os
import time
from collections.abc import Sequence
from typing import Any

# Another process may hold libtpu's lock: nothing here touches a TPU.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from pixsigma_jax.models import vae

SIDE = 4096
GIB = 2**30
TOPOLOGY = "v5e:2x2"
CHIP_GIB = 15.75  # what a v5e lets a program have

_HALVES = {"decode": vae.Decoder, "encode": vae.Encoder}


def memory_of(half: str, side: int, devices: Sequence[Any]) -> dict[str, float]:
  """GiB a device that one half's program takes for one square image.

  Args:
    half: a key of `_HALVES`.
    side: of the image, in pixels.
    devices: one, or several that share the rows.
  """
  config = vae.VAEConfig()
  mesh = None
  place = everywhere = SingleDeviceSharding(devices[0])
  if len(devices) > 1:
    mesh = Mesh(np.array(devices).reshape(1, -1, 1), vae.AXES)
    place, everywhere = NamedSharding(mesh, vae.ROWS), NamedSharding(mesh, P())
  latents = side // config.downsampling
  shape = {
    "encode": (1, side, side, 3),
    "decode": (1, latents, latents, config.latent_channels),
  }[half]
  params = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
    vae.abstract_params(config)[f"{half}r"],
  )
  x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
  network = _HALVES[half](config, jnp.dtype(jnp.bfloat16), mesh)
  compiled = vae.run.lower(params, x, network=network).compile()
  memory: Any = compiled.memory_analysis()
  return {
    "arguments": memory.argument_size_in_bytes / GIB,
    "output": memory.output_size_in_bytes / GIB,
    "temporary": memory.temp_size_in_bytes / GIB,
  }


def main() -> None:
  """Prints a row a program."""
  chips = topologies.get_topology_desc(TOPOLOGY, "tpu").devices
  print(f"GiB a chip, of the {CHIP_GIB} that a TPU v5e lets a program have; bfloat16")
  print(
    "                               arguments  output  temporary    sum  compiled in"
  )
  for half in _HALVES:
    for side, devices in ((vae.TILE_SIZE, chips[:1]), (SIDE, chips)):
      start = time.perf_counter()
      memory = memory_of(half, side, devices)
      seconds = time.perf_counter() - start
      print(
        f"{half} {side} x {side} on {len(devices)} chip(s)".ljust(32)
        + "{arguments:8.2f}{output:8.2f}{temporary:11.2f}".format(**memory)
        + f"{sum(memory.values()):7.2f}{seconds:11.0f} s",
        flush=True,
      )


if __name__ == "__main__":
  main()
