"""Every config file: it loads, fits the trainer, and takes real steps when shrunk."""

import importlib
import inspect
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixsigma_jax.data import pipeline as data_pipeline
from pixsigma_jax.data.mixture import open_mixture
from pixsigma_jax.diffusion.schedule import linear_schedule
from pixsigma_jax.models.layers import Compute
from pixsigma_jax.models.pixart import PixArt, init_params
from pixsigma_jax.train.config import FIELDS, call, model_config
from pixsigma_jax.train.loss import make_loss
from pixsigma_jax.train.optimizer import make_optimizer, make_schedule
from pixsigma_jax.train.step import init_state, make_train_step
from pixsigma_jax.transforms import TRANSFORMS
from tests.train import runs

ROOT = pathlib.Path(__file__).parents[1]

# File → its arguments and the stage whose workdir it names as parent. A new file of
# configs/ fails below until it stands here.
STAGES = {
  "quickstart/low.py": ([None], None),
  "quickstart/high.py": (["interpolated", "extended"], "quickstart/low.py"),
  "quickstart/compressed.py": (["average", "random"], "quickstart/high.py"),
  "own_images.py": ([None], None),
}
# Stages whose parent is a published model, and where docs tell to put it.
PUBLISHED = {"own_images.py": "weights/sigma-512"}
SHARED = {"quickstart/base.py"}  # what stages are made of

ALL = [
  (file, argument) for file, (arguments, _) in STAGES.items() for argument in arguments
]


def load(file, argument=None):
  module = importlib.import_module(f"configs.{file[:-3].replace('/', '.')}")
  return module.get_config(*([] if argument is None else [argument]))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """The directory of the records that a stage asks for: of digits, or of noise."""
  directory, done = tmp_path_factory.mktemp("data"), {}

  def data(file, argument=None):
    config = load(file, argument)
    model = model_config(config.model.to_dict())
    name = f"{_resolution(config)}px"
    if name not in done:
      if file.startswith("quickstart/"):
        done[name] = runs.prepare(directory / name, _resolution(config))
      else:
        done[name] = runs.prepare_features(directory / name, model)
    return done[name]

  return data


@pytest.fixture(scope="module")
def workdirs(data, tmp_path_factory):
  """Trains a file's stage, and before it its parents, once."""
  directory, done = tmp_path_factory.mktemp("runs"), {}

  def workdir(file, argument=None):
    if (file, argument) not in done:
      config = load(file, argument)
      _, parent = STAGES[file]
      path = directory / str(len(done)) / file.replace("/", "_")
      parent = "" if parent is None else workdir(parent)
      runs.train(runs.shrink(config, data(file, argument), parent), path)
      done[file, argument] = path
    return done[file, argument]

  return workdir


def _resolution(config):
  # Tokens are 2×2 latents, and those of a miniature are pixels.
  return 2 * config.model.base_size * (8 if config.model.variant == "XL/2" else 1)


def test_every_file_is_known_with_its_arguments():
  files = {
    str(path.relative_to(ROOT / "configs"))
    for path in (ROOT / "configs").rglob("*.py")
    if "def get_config(" in path.read_text()
  }
  assert files == set(STAGES) | SHARED


@pytest.mark.parametrize(("file", "argument"), ALL)
def test_a_stage_has_exactly_the_fields_that_the_trainer_reads(file, argument):
  config = load(file, argument)
  assert set(config) == set(FIELDS)
  assert config.stage.startswith(file.removesuffix(".py"))
  assert config.data.path.endswith(f"{_resolution(config)}px")
  assert config.total_steps > config.optimizer.warmup_steps
  _, parent = STAGES[file]
  wanted = PUBLISHED.get(file, "")
  if parent is not None:
    wanted = f"runs/{parent.removesuffix('.py')}"
  assert config.init.parent == wanted
  for prompt in config.log.prompts:
    assert isinstance(prompt, str)


@pytest.mark.parametrize("file", STAGES)
def test_the_first_argument_is_what_a_file_means_without_one(file):
  arguments, _ = STAGES[file]
  assert load(file).to_dict() == load(file, arguments[0]).to_dict()
  names = [load(file, argument).stage for argument in arguments]
  assert len(set(names)) == len(names)
  parameters = inspect.signature(
    importlib.import_module(f"configs.{file[:-3].replace('/', '.')}").get_config
  ).parameters
  assert len(parameters) == (arguments != [None])


@pytest.mark.parametrize(("file", "argument"), ALL)
def test_the_transforms_lead_from_the_parents_model_to_the_stages(file, argument):
  config = load(file, argument)
  _, parent = STAGES[file]
  if parent is None:
    assert config.init.transforms == ()
    return
  have = model_config(load(parent).model.to_dict())
  key = jax.random.key(0)
  params = jax.eval_shape(lambda: init_params(have, key))
  for transform in config.to_dict()["init"]["transforms"]:
    name = transform.pop("name")
    have, params = _abstractly(TRANSFORMS[name], have, params, transform)
  want = model_config(config.model.to_dict())
  assert have == want
  abstract = jax.eval_shape(lambda: init_params(want, key))
  assert jax.tree.map(_kind, params) == jax.tree.map(_kind, abstract)


def _abstractly(transform, config, params, arguments):
  """A transform on shapes alone."""
  configs = []

  def apply(params):
    config_, params = transform(config, params, **arguments)
    configs.append(config_)
    return params

  params = jax.eval_shape(apply, params)
  return configs[0], params


def _kind(leaf):
  return leaf.shape, leaf.dtype


@pytest.mark.parametrize(("file", "argument"), ALL)
def test_a_stage_of_full_size_takes_an_abstract_step(file, argument, data):
  config = load(file, argument).to_dict()
  model = model_config(config["model"])
  schedule = linear_schedule()
  path, section = data(file, argument), config["data"]
  mixture = open_mixture(
    [path], weights=section["weights"], holdout=section["holdout"], split="train"
  )
  compute = call(Compute, "compute", config["compute"], merge_rows=True)
  loss = call(
    make_loss,
    "loss",
    config["loss"],
    PixArt(model, compute),
    schedule,
    scaling_factor=mixture.features.scaling_factor,
  )
  rates = ("learning_rate", "schedule", "warmup_steps")
  rate = make_schedule(
    **{name: config["optimizer"].pop(name) for name in rates},
    total_steps=config["total_steps"],
  )
  tx = call(make_optimizer, "optimizer", config["optimizer"], rate)
  step = make_train_step(
    loss, tx, ema_decay=config["ema_decay"], num_timesteps=schedule.num_timesteps
  )
  batch = next(
    data_pipeline.batches(
      mixture,
      batch_size=config["batch_size"],
      seed=config["seed"],
      start_example=0,
      patch_size=model.patch_size,
      window=model.window,
      caption_length=model.caption_length,
      long_caption_ratio=section["long_caption_ratio"],
      process_index=0,
      process_count=1,
      num_threads=0,
      num_workers=0,
      damaged=section["damaged"],
    )
  )

  key = jax.random.key(0)
  state = jax.eval_shape(
    lambda: init_state(
      init_params(model, key),
      jnp.zeros((model.caption_length, model.caption_width)),
      tx,
      key,
    )
  )
  after, metrics = jax.eval_shape(step, state, batch)
  assert jax.tree.map(_kind, after) == jax.tree.map(_kind, state)
  assert metrics["loss"].shape == ()
  assert metrics["example_loss"].shape == (config["batch_size"],)


@pytest.mark.parametrize(("file", "argument"), ALL)
def test_a_shrunk_stage_takes_real_steps_from_its_parent(file, argument, workdirs):
  workdir = workdirs(file, argument)
  lines = runs.metrics(workdir)
  assert [line["step"] for line in lines] == [1, 2]
  assert all(np.isfinite(line["loss"]) for line in lines)
  child = STAGES[file][1] is not None
  assert runs.steps(workdir, "snapshots") == ([0, 2] if child else [2])
