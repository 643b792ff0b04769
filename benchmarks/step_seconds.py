"""A stage's train step, timed on the accelerators of this machine.

  python -m benchmarks.step_seconds --config=configs/stage_1k.py --config.batch_size=64

Runs the program that `python -m pixsigma_jax.train` runs, from fresh parameters and on
square images and captions of noise, as long as they may be: it needs no data. Prints
the median of its steps and, behind ±, half of the distance between the quartiles,
beside what `plan` says of it; and adds it to `pixsigma_jax/plan/measured.jsonl`, by
which `plan` then calibrates its model of such devices. Minutes, most of them for
compiling.
"""

import datetime
import math
import pathlib
import statistics
import time
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from ml_collections import config_flags

from pixsigma_jax import sharding
from pixsigma_jax.models import tokens
from pixsigma_jax.plan import calibration, topology
from pixsigma_jax.plan.plan import make_plan
from pixsigma_jax.plan.stage import SCALING_FACTOR, Stage, stage_on
from pixsigma_jax.train.config_flag import run_with_config
from pixsigma_jax.train.program import lower_step, make_program

config_flags.DEFINE_config_file("config", help_string="A config file; FILE:ARGUMENT.")
_STEPS = flags.DEFINE_integer("steps", 10, "That are timed.", lower_bound=2)
_MEASURED = flags.DEFINE_string("measured", str(calibration.MEASURED), "The file.")


def noise(stage: Stage) -> dict[str, np.ndarray]:
  """A batch of square images, with captions that fill their places."""
  draw, model = np.random.default_rng(0), stage.model
  side = model.base_size
  batch = {
    name: draw.normal(0, 0.5, leaf.shape).astype(leaf.dtype)
    if leaf.dtype == np.float16
    else np.ones(leaf.shape, leaf.dtype)
    for name, leaf in stage.batch.items()
  }
  batch["grid"] *= side
  batch["coordinates"][:, : side**2] = tokens.coordinates((side, side), model.window)
  return batch


def seconds_of(stage: Stage, devices: Any, steps: int) -> list[float]:
  """Of so many steps, after one that is not counted."""
  mesh = sharding.make_mesh_of_slices(
    slices=stage.topology.slices,
    **stage.sizes,
    devices=devices,
    batch_size=stage.config["batch_size"],
    width=stage.model.width,
  )
  program = make_program(stage.config, mesh=mesh, scaling_factor=SCALING_FACTOR)
  places = program.ema.places(stage.state.shardings(mesh))
  logging.info("Compiling for %s: minutes.", stage.topology)
  step = lower_step(program, stage.state, stage.batch, places, mesh).compile()

  key = jax.random.key(0)
  null_caption = jnp.zeros((stage.model.caption_length, stage.model.caption_width))
  fresh = jax.jit(program.fresh_state, out_shardings=places)
  state: Any = fresh(key, null_caption, key)
  batch_places = sharding.batch_shardings(stage.batch, mesh)
  batch = jax.device_put(noise(stage), batch_places)
  state, metrics = jax.block_until_ready(step(state, batch))
  if not math.isfinite(loss := float(metrics["loss"])):
    raise ValueError(f"The loss is {loss}: this step is not what training does.")
  taken = []
  for _ in range(steps):
    began = time.perf_counter()
    state, _ = jax.block_until_ready(step(state, batch))
    taken.append(time.perf_counter() - began)
  return taken


def main(config: dict[str, Any]) -> None:
  """Measures, prints and keeps."""
  logging.set_verbosity(logging.INFO)
  stage = stage_on(config, topology.here(jax.devices()))
  plan = make_plan(stage, compiles=False)
  taken = seconds_of(stage, jax.devices(), _STEPS.value)
  low, median, high = statistics.quantiles(taken, n=4)
  peak = stage.topology.count * stage.topology.chip.peak(stage.dtype)
  print(
    f"{config['stage']} on {stage.topology}, batch {config['batch_size']}: "
    f"{median:.4g} ± {(high - low) / 2:.2g} s a step, MFU "
    f"{plan.time.needed / median / peak:.1%}; roofline {plan.time.seconds:.4g} s"
  )
  measured = calibration.Measurement(
    config=config,
    topology=stage.topology.name,
    slices=1,
    seconds=median,
    date=datetime.date.today().isoformat(),
    versions={name: metadata.version(name) for name in ("jax", "jaxlib")},
  )
  calibration.add(measured, pathlib.Path(_MEASURED.value))


if __name__ == "__main__":
  run_with_config(main)
