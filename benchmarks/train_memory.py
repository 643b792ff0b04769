"""What a training step of a stage takes of each chip's memory, without a chip.

  python -m benchmarks.train_memory --stages=stage_1k,stage_4k --remats=block,attention

Compiles the stages' real step ahead of time for a slice of TPUs, on the mesh that its
config chooses there, for which libtpu (`pip install libtpu`) is enough; prints the
compiler's own account of one chip's memory, a row a stage and policy. A minute or
more each. `--attentions`, `--batch_size` and `--topology` change what is compiled.
"""

import importlib
import os
import time
from typing import Any

# Another process may hold libtpu's lock: nothing here touches a TPU.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import numpy as np
from absl import app, flags
from jax.experimental import topologies

from pixsigma_jax import sharding
from pixsigma_jax.data.buckets import BUCKETS
from pixsigma_jax.train.batches import split_length
from pixsigma_jax.train.config import model_config
from pixsigma_jax.train.program import abstract_batch, make_program

GIB = 2**30

_STAGES = flags.DEFINE_list("stages", ["stage_1k", "stage_2k", "stage_4k"], "Configs.")
_REMATS = flags.DEFINE_list("remats", ["block", "attention"], "Policies.")
_ATTENTIONS = flags.DEFINE_list("attentions", ["auto"], "Implementations.")
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:8x8", "As libtpu calls it.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 0, "In place of the stages' own.")


def compile_step(
  config: Any, devices: list[Any]
) -> tuple[dict[str, int], jax.stages.Compiled]:
  """The mesh and the compiled step of a stage, as `train/loop.py` compiles it."""
  mesh = sharding.make_mesh_of_slices(
    **config["mesh"],
    devices=devices,
    batch_size=config["batch_size"] // config["accumulation"],
    width=model_config(config["model"]).width,
  )
  program = make_program(config, mesh=mesh, scaling_factor=0.13025)
  model = program.model.config
  sizes = BUCKETS[16 * model.base_size].values()
  longest = max(height * width for height, width in sizes) // 256
  batch = abstract_batch(
    model,
    batch_size=config["batch_size"],
    sequence_length=split_length(longest, mesh.shape["context"], model.window),
  )
  state = program.abstract_state()
  places = program.ema.places(sharding.shardings(state, mesh))
  batch_places = sharding.batch_shardings(batch, mesh)
  step = jax.jit(
    program.train_step,
    in_shardings=(places, batch_places),
    out_shardings=(places, sharding.replicated(mesh)),
    donate_argnums=0,
  )
  return dict(mesh.shape), step.lower(state, batch).compile()


def main(_: list[str]) -> None:
  """Prints a row a program."""
  jax.config.update("jax_platforms", "cpu")
  topology = topologies.get_topology_desc(_TOPOLOGY.value, "tpu")
  devices = list(np.ravel(topology.devices))
  print(f"GiB a chip, {_TOPOLOGY.value}, JAX {jax.__version__}")
  print("stage | batch | mesh | attention | remat | state | temporary | sum | compiled")
  for stage in _STAGES.value:
    for attention in _ATTENTIONS.value:
      for remat in _REMATS.value:
        config = importlib.import_module(f"configs.{stage}").get_config()
        config.compute.attention, config.compute.remat = attention, remat
        config.batch_size = _BATCH_SIZE.value or config.batch_size
        start = time.perf_counter()
        try:
          mesh, compiled = compile_step(config.to_dict(), devices)
        except jax.errors.JaxRuntimeError as error:
          print(f"{stage} | {attention} | {remat} | {str(error)[:6000]}", flush=True)
          continue
        memory: Any = compiled.memory_analysis()
        state = memory.argument_size_in_bytes / GIB
        temporary = memory.temp_size_in_bytes / GIB
        print(
          f"{stage} | {config.batch_size} | {'x'.join(map(str, mesh.values()))}"
          f" | {attention} | {remat} | {state:.2f} | {temporary:.2f}"
          f" | {state + temporary:.2f} | {time.perf_counter() - start:.0f} s",
          flush=True,
        )


if __name__ == "__main__":
  app.run(main)
