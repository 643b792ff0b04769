"""Training runs as small as they come, and what they leave on the disk."""

import copy
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp

from pixsigma_jax.data import order
from pixsigma_jax.data.records import Dataset, Features, Record
from pixsigma_jax.data.writing import RecordWriter
from pixsigma_jax.models.autoencoders import SDXL_SCALING_FACTOR, vae_identity
from pixsigma_jax.prepare.digits import prepare_digits
from pixsigma_jax.train import loop
from tests import compilation
from tests.train import weak_stage

ROOT = pathlib.Path(__file__).parents[2]
RECORDS, BATCH = 48, 8  # an epoch is six steps

# The low stage of most tests. Its program does not depend on the number of steps.
LOW = {
  "model.variant": "Nano/2",
  "total_steps": 6,
  "batch_size": BATCH,
  "optimizer.schedule": "constant",
  "optimizer.warmup_steps": 1,
  "checkpoint.every": 2,
  "checkpoint.keep_last": 10,
  "log.every": 1,
  "log.prompts": (),
}


def prepare(directory, resolution=8):
  """Images in three aspect ratios, with captions of nine words at most."""
  prepare_digits(
    directory, resolution=resolution, count=RECORDS, seed=1, scaling_factor=2.0
  )
  return directory


def prepare_features(directory, model, sizes=((64, 64), (32, 64))):
  """Records as a VAE and T5 make them, of random numbers, for a config's model."""
  resolution = 8 * model.patch_size * model.base_size
  features = Features(
    kind="latent_moments",
    channels=model.in_channels,
    resolution=resolution,
    autoencoder=vae_identity(SDXL_SCALING_FACTOR, model.in_channels, 8),
    scaling_factor=SDXL_SCALING_FACTOR,
    text_encoder={"name": "t5", "width": model.caption_width},
    caption_storage="embeddings",
    caption_length=model.caption_length,
    caption_width=model.caption_width,
    crop_rule={"name": "none"},
    hashes={},
  )
  draw = np.random.default_rng(0)

  def normal(*shape):
    return draw.normal(size=shape).astype(np.float16)

  null_caption = normal(model.caption_length, model.caption_width)
  with RecordWriter(directory, features, null_caption.astype(np.float32)) as writer:
    for number in range(BATCH):
      height, width = sizes[number % len(sizes)]
      pixels = [8 * height, 8 * width]
      writer.write(
        Record(
          id=str(number),
          captions=("a long caption", "short"),
          caption_kinds=("long", "short"),
          caption_lengths=np.array([5, 2], np.int32),
          caption_embeddings=normal(7, model.caption_width),
          original_size=np.array(pixels, np.int32),
          crop=np.array([0, 0, *pixels], np.float32),
          latent_moments=normal(height, width, 2 * model.in_channels),
        )
      )
  return directory


def shrink(config, data, parent="", changes=()):
  """A stage as its file has it, in everything but size: two steps of a nano model.

  Base size and scale of the positions stay: it is its records that are small.
  """
  config = copy.deepcopy(config)
  small = {}
  if config.model.kv_compression.layers:
    config.model.kv_compression.layers = small["layers"] = (1,)
  if config.model.variant == "XL/2":  # as the miniatures have it
    config.model.caption_width = 64
    config.model.caption_length = small["caption_length"] = 12
    # Over as few steps as there are; and stages that differ by nothing else are one
    # program, which is compiled once.
    config.ema["values"] = (0.9,) * len(config.ema["values"])
  config.model.variant = "Nano/2"
  config.init.transforms = tuple(
    {name: small.get(name, value) for name, value in transform.items()}
    for transform in config.init.transforms
  )
  fields = {
    "total_steps": 2,
    "batch_size": BATCH,
    # One for each weight, where a stage mixes datasets.
    "data.path": ",".join([str(data)] * max(len(config.data.weights), 1)),
    "data.num_threads": 1,
    "init.parent": str(parent),
    "optimizer.warmup_steps": 1,
    "mesh.data": -1,
    "mesh.fsdp": 1,
    "mesh.context": 1,
    "validation.every": 0,
    "log.every": 1,
    "log.sample_every": 0,
    "log.prompts": (),
  }
  config.update_from_flattened_dict(fields | dict(changes))
  return config


def low(data, **changes):
  """The run of most tests; `checkpoint__every=1` sets `config.checkpoint.every`."""
  changes = {name.replace("__", "."): value for name, value in changes.items()}
  return shrink(weak_stage.get_config(), data, changes=LOW | changes)


class _Poisoned(Dataset):
  """Gives some records infinite latents, as no writer would take them."""

  bad: frozenset[int] = frozenset()

  def read(self, numbers):
    records = super().read(numbers)
    return [
      dataclasses.replace(record, latents=np.full_like(record.latents, np.inf))
      if number in self.bad
      else record
      for number, record in zip(numbers, records, strict=True)
    ]


def poisoned(dataset, numbers):
  """A dataset of which these records make every number of a step infinite."""
  fields = {f.name: getattr(dataset, f.name) for f in dataclasses.fields(Dataset)}
  poisoned = _Poisoned(**fields)
  object.__setattr__(poisoned, "bad", frozenset(numbers))
  return poisoned


def example_of(step):
  """A record that a run of seed 0 first meets at this step."""
  positions = np.arange((step - 1) * BATCH, step * BATCH)
  _, examples = order.permuted(positions, seed=(order.RECORDS, 0), n=RECORDS)
  return int(examples[BATCH // 2])


def first_devices(count=1):
  """Lets a run believe that the process has no more devices than these."""
  chosen = jax.devices()[:count]
  return mock.patch.object(jax, "devices", return_value=chosen)


def train(config, workdir, devices=1):
  """Trains in this process, on its first few devices."""
  with first_devices(devices):
    loop.train(config.to_dict(), workdir)


def flags(data, workdir, **changes):
  """The command line of `low(data, **changes)`."""
  changes = {name.replace("__", "."): value for name, value in changes.items()}
  fields = LOW | {"data.path": data} | changes
  return [
    f"--config={ROOT / 'tests/train/weak_stage.py'}",
    f"--workdir={workdir}",
    *(f"--config.{name}={value}" for name, value in fields.items()),
  ]


def start(arguments, log, *, prefix=("-m", "pixsigma_jax.train"), own_group=False):
  """Trains in a process of its own, which writes into the file `log`.

  With a group of its own, too, signals reach it and its children alone.
  """
  with log.open("w") as stderr:
    return subprocess.Popen(
      [sys.executable, *prefix, *arguments],
      cwd=ROOT,
      env=os.environ | compilation.environment(),
      stdout=subprocess.DEVNULL,
      stderr=stderr,
      start_new_session=own_group,
    )


def steps(workdir, what="checkpoints"):
  """The complete ones."""
  return sorted(int(p.name) for p in (workdir / what).glob("*") if p.name.isdigit())


def arrays(workdir, step, what="checkpoints"):
  """Every array of a checkpoint or a snapshot, by name."""
  item = {"checkpoints": "state", "snapshots": "model"}[what]
  path = pathlib.Path(workdir) / what / str(step) / item
  path = path.absolute()
  # Onto the host: the devices that it came from may be another process's.
  with ocp.PyTreeCheckpointer() as checkpointer:
    saved = checkpointer.metadata(path).item_metadata.tree
    host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
    return named(checkpointer.restore(path, restore_args=host))


def named(tree):
  """The leaves of a tree by name, on the host."""
  return {
    jax.tree_util.keystr(name, simple=True, separator="/"): _numbers(leaf)
    for name, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _numbers(leaf):
  if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(
    leaf.dtype, jax.dtypes.prng_key
  ):
    leaf = jax.random.key_data(leaf)
  return np.asarray(leaf)


def part(arrays, name):
  """Those of a subtree."""
  return {
    key.removeprefix(f"{name}/"): array
    for key, array in arrays.items()
    if key.startswith(f"{name}/")
  }


def position(workdir, step):
  """The place in the data that a checkpoint holds."""
  path = workdir / "checkpoints" / str(step) / "data" / "metadata"
  return json.loads(path.read_text())


def assert_same(have, want):
  """Equal to the bit."""
  assert have.keys() == want.keys()
  for name, array in want.items():
    np.testing.assert_array_equal(have[name], array, err_msg=name)


def metrics(workdir):
  """The lines of metrics.jsonl."""
  text = (workdir / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def measured(workdir):
  """What of them is not a matter of time."""
  timed = (
    "step_time",
    "images_per_second",
    "data_share",
    "saving_share",
    "productive_seconds",
    "goodput",
    "tflops_per_device",
  )
  return [
    {name: value for name, value in line.items() if name not in timed}
    for line in metrics(workdir)
  ]
