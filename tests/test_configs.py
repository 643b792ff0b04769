"""Every config file: it loads, fits the trainer, and takes real steps when shrunk."""

import functools
import importlib
import inspect
import itertools
import json
import logging
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pixsigma_jax import checkpoint, sharding
from pixsigma_jax.chips import CHIPS
from pixsigma_jax.convert.released import RELEASES
from pixsigma_jax.data import pipeline as data_pipeline
from pixsigma_jax.data.buckets import BUCKETS
from pixsigma_jax.data.mixture import open_mixture
from pixsigma_jax.metadata import Metadata
from pixsigma_jax.models.autoencoders import vae_identity
from pixsigma_jax.models.flops import TRAINING, forward_flops
from pixsigma_jax.models.pixart import PixArtConfig, init_params
from pixsigma_jax.train.compatibility import check_config
from pixsigma_jax.train.config import complete, model_config
from pixsigma_jax.train.program import abstract_batch, make_program
from pixsigma_jax.transforms import TRANSFORMS
from tests.train import runs

ROOT = pathlib.Path(__file__).parents[1]

# File and argument → its parent: another stage, a published model, or none. A new file
# of configs/ fails below until it stands here; its first argument is its default.
STAGES = {
  ("quickstart/low.py", None): None,
  ("quickstart/high.py", "interpolated"): ("quickstart/low.py", None),
  ("quickstart/high.py", "extended"): ("quickstart/low.py", None),
  ("quickstart/compressed.py", "average"): ("quickstart/high.py", "interpolated"),
  ("quickstart/compressed.py", "random"): ("quickstart/high.py", "interpolated"),
  ("own_images.py", None): "sigma-512",
  ("lora.py", None): "sigma-512",
  ("dreambooth.py", None): "sigma-512",
  ("stage_256_vae.py", None): "alpha-256",
  ("stage_256_align.py", None): ("stage_256_vae.py", None),
  ("stage_512.py", None): ("stage_256_align.py", None),
  ("stage_1k.py", "compressed"): ("stage_512.py", None),
  ("stage_1k.py", "full"): ("stage_512.py", None),
  ("stage_2k.py", "compressed"): ("stage_1k.py", "compressed"),
  ("stage_2k.py", "full"): ("stage_1k.py", "full"),
  ("stage_4k.py", "compressed"): ("stage_2k.py", "compressed"),
  ("stage_4k.py", "full"): ("stage_2k.py", "full"),
  ("stage_4k.py", "uhd"): ("stage_2k.py", "compressed"),
  ("stage_4k.py", "uhd_full"): ("stage_2k.py", "full"),
}
# What stages are made of, and an autoencoder, which is no stage.
SHARED = {"quickstart/base.py", "vae_tiny.py"}
PAPER = [stage for stage in STAGES if stage[0].startswith("stage_")]

FSDP = {"data": 1, "fsdp": 8, "context": 1}
CONTEXT = {"data": 1, "fsdp": 1, "context": 8}
BOTH = {"data": 1, "fsdp": 2, "context": 4}

every_stage = pytest.mark.parametrize("stage", STAGES, ids=str)


@functools.cache
def load(stage):
  file, argument = stage
  module = importlib.import_module(f"configs.{file[:-3].replace('/', '.')}")
  return module.get_config(*([] if argument is None else [argument]))


def workdir_of(stage):
  """Where the docs put a stage's run."""
  file, _ = stage
  if stage in PAPER:
    return f"runs/weak_to_strong/{load(stage).stage}"
  return f"runs/{file.removesuffix('.py')}"


def published(name, **size):
  """The hyper-parameters of a released model, or of one in its likeness."""
  release = RELEASES[name]
  fields = {"variant": "XL/2", "caption_length": release.caption_length} | size
  return PixArtConfig.from_variant(
    fields.pop("variant"),
    base_size=release.base_size,
    pe_interpolation=release.pe_interpolation,
    **fields,
  )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """The directory of the records that a stage asks for: of digits, or of noise."""
  directory, done = tmp_path_factory.mktemp("data"), {}

  def data(stage):
    resolution = _resolution(load(stage))
    if resolution not in done:
      path = directory / f"{resolution}px"
      if stage[0].startswith("quickstart/"):
        done[resolution] = runs.prepare(path, resolution)
      else:
        model = model_config(runs.shrink(load(stage), "").model.to_dict())
        sizes = ((16, 16), (8, 20))
        done[resolution] = runs.prepare_features(path, model, sizes)
    return done[resolution]

  return data


@pytest.fixture(scope="module")
def workdirs(data, tmp_path_factory):
  """Trains a stage, and before it its parents, once; the paper's on eight devices."""
  directory, done = tmp_path_factory.mktemp("runs"), {}
  meshes = itertools.cycle([FSDP, CONTEXT, BOTH])
  logger = logging.getLogger("absl")

  def workdir(stage):
    if stage in done:
      return done[stage]
    if stage is None:
      return ""
    path = directory / str(len(done))
    done[stage] = path
    if isinstance(stage, str):
      _write_published(stage, path)
      return path
    devices, changes = 1, {}
    if stage in PAPER:
      devices, mesh = 8, next(meshes)
      changes = {f"mesh.{axis}": size for axis, size in mesh.items()}
    parent = workdir(STAGES[stage])
    config = runs.shrink(load(stage), data(stage), parent, changes)
    log = logging.FileHandler(path.with_suffix(".log"), encoding="utf-8")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(log)
    try:
      runs.train(config, path, devices)
    finally:
      logger.removeHandler(log)
      logger.setLevel(level)
      log.close()
    return path

  return workdir


def _write_published(name, path):
  """A converted model as `convert` leaves it, of a nano's random numbers."""
  release = RELEASES[name]
  config = published(
    name,
    variant="Nano/2",
    caption_width=64,
    caption_length=12 * release.caption_length // 300,
  )
  checkpoint.save_snapshot(
    path,
    0,
    params=jax.jit(init_params, static_argnums=0)(config, jax.random.key(1)),
    null_caption=np.zeros((config.caption_length, 64), np.float32),
    metadata=Metadata(
      stage=name,
      model={**config.to_dict()},
      autoencoder=vae_identity(release.scaling_factor, 4, 8),
      scaling_factor=release.scaling_factor,
      text_encoder={"name": "t5", "width": 64},
      resolution=release.resolution,
      provenance=({"stage": name},),
    ),
  )


def _resolution(config):
  # Tokens are 2×2 latents, and those of a miniature are pixels.
  return 2 * config.model.base_size * (8 if config.model.variant == "XL/2" else 1)


def test_every_file_is_known_with_its_arguments():
  files = {
    str(path.relative_to(ROOT / "configs"))
    for path in (ROOT / "configs").rglob("*.py")
    if "def get_config(" in path.read_text()
  }
  assert files == {file for file, _ in STAGES} | SHARED


@every_stage
def test_a_stage_has_exactly_the_fields_that_the_trainer_reads(stage):
  config = load(stage)
  assert complete(config) == config.to_dict()
  check_config(config.to_dict())
  assert config.stage.startswith(stage[0].removesuffix(".py"))
  assert config.data.path.endswith(f"{_resolution(config)}px")
  assert config.total_steps > config.optimizer.warmup_steps
  parent = STAGES[stage]
  if parent is None:
    assert config.init.parent == ""
  elif isinstance(parent, str):
    assert config.init.parent == f"weights/{parent}"
  else:
    assert config.init.parent == workdir_of(parent)
  for prompt in config.log.prompts:
    assert isinstance(prompt, str)


@pytest.mark.parametrize("file", dict.fromkeys(file for file, _ in STAGES))
def test_the_first_argument_is_what_a_file_means_without_one(file):
  arguments = [argument for name, argument in STAGES if name == file]
  assert load((file, None)).to_dict() == load((file, arguments[0])).to_dict()
  names = [load((file, argument)).stage for argument in arguments]
  assert len(set(names)) == len(names)
  parameters = inspect.signature(
    importlib.import_module(f"configs.{file[:-3].replace('/', '.')}").get_config
  ).parameters
  assert len(parameters) == (arguments != [None])


@pytest.mark.parametrize("stage", PAPER, ids=str)
def test_a_docstring_names_the_command_the_workdirs_and_the_data(stage):
  file, argument = stage
  text, root = _docstring(file), "runs/weak_to_strong"
  name = file.removesuffix(".py")
  assert f"--config=configs/{file} --workdir={root}/{name}\n" in text
  assert argument in (None, "compressed") or f":{argument}" in text
  config = load(stage)
  # The first stage of a resolution tells how its data are made.
  prepared = " ".join(_docstring(name) for name, _ in PAPER)
  assert f"--resolution={_resolution(config)}" in prepared
  if argument in (None, "compressed"):
    assert f" --output={config.data.path}\n" in prepared


def _docstring(file):
  return importlib.import_module(f"configs.{file.removesuffix('.py')}").__doc__


@every_stage
def test_the_transforms_lead_from_the_parents_model_to_the_stages(stage):
  config, parent = load(stage), STAGES[stage]
  if parent is None:
    assert config.init.transforms == ()
    return
  if isinstance(parent, str):
    have = published(parent)
  else:
    have = model_config(load(parent).model.to_dict())
  params = _abstract_params(have)
  for transform in config.init.transforms:
    arguments = dict(transform)
    name = arguments.pop("name")
    have, params = abstractly(TRANSFORMS[name], have, params, arguments)
  want = model_config(config.model.to_dict())
  assert have == want
  assert jax.tree.map(_kind, params) == jax.tree.map(_kind, _abstract_params(want))


@functools.cache
def _abstract_params(config):
  return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def abstractly(transform, config, params, arguments):
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


@functools.cache
def _program(stage):
  return make_program(load(stage).to_dict(), mesh=None, scaling_factor=0.13025)


@functools.cache
def _abstract_state(stage):
  return _program(stage).abstract_state()


def _abstract_batch(stage):
  config = load(stage)
  # Digits in pairs, where there is no table.
  sizes = BUCKETS.get(_resolution(config), {2.0: (16 * config.model.base_size,) * 2})
  return abstract_batch(
    _program(stage).model.config,
    batch_size=config.batch_size,
    sequence_length=max(height * width for height, width in sizes.values()) // 256,
  )


@every_stage
def test_a_stage_of_full_size_takes_an_abstract_step(stage):
  state, batch = _abstract_state(stage), _abstract_batch(stage)
  after, metrics = jax.eval_shape(_program(stage).train_step, state, batch)
  assert jax.tree.map(_kind, after) == jax.tree.map(_kind, state)
  assert metrics["loss"].shape == ()
  assert metrics["example_loss"].shape == (load(stage).batch_size,)


# What the trainer chooses, as docstrings have it: parts of each image's tokens.
CONTEXT_OF_256 = {"stage_1k": 4, "stage_1k_full": 2}


@pytest.mark.parametrize("devices", [8, 256])
@pytest.mark.parametrize("stage", PAPER, ids=str)
def test_state_and_batch_of_full_size_lie_evenly_on_its_mesh(stage, devices):
  config = load(stage)
  sizes, _ = sharding.sizes_over_slices(
    devices,
    batch_size=config.batch_size,
    width=_program(stage).model.config.width,
    **config.mesh.to_dict() | {"slices": 1},
  )
  context = 1
  if devices == 256 and config.batch_size < 1024:
    context = CONTEXT_OF_256.get(config.stage, 8)
  assert sizes == {"data": devices // 8 // context, "fsdp": 8, "context": context}
  mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
  state = _abstract_state(stage)
  places = state.shardings(mesh)
  # `shard_shape` raises where a part would be larger than another.
  parts = jax.tree.map(lambda leaf, place: place.shard_shape(leaf.shape), state, places)
  whole = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  part = jax.tree.leaves(parts.params, is_leaf=lambda x: isinstance(x, tuple))
  assert sum(map(math.prod, part)) < whole / 7.5  # kernels in eighths, the rest whole
  longest = _abstract_batch(stage)["coordinates"].shape[1]
  length = sharding.split_length(longest, context, _program(stage).model.config.window)
  assert longest <= length < 1.001 * longest  # no more than a few of padding
  latents = NamedSharding(mesh, P(("data", "fsdp"), "context"))
  rows, tokens, _ = latents.shard_shape((config.batch_size, length, 32))
  assert rows * devices == config.batch_size * context
  # Windows stay whole, so that each part compresses its own.
  assert tokens % math.prod(_program(stage).model.config.window) == 0


# Those with other arguments are these programs with other numbers in them.
@pytest.mark.parametrize(
  "stage",
  [s for s in STAGES if s not in PAPER or s[1] in (None, "compressed")],
  ids=str,
)
def test_a_shrunk_stage_takes_real_steps_from_its_parent(stage, workdirs):
  workdir = workdirs(stage)
  lines = runs.metrics(workdir)
  assert [line["step"] for line in lines] == [1, 2]
  assert all(np.isfinite(line["loss"]) for line in lines)
  assert runs.steps(workdir, "snapshots") == ([2] if STAGES[stage] is None else [0, 2])


# What is not a matter of the mesh, and would only make a program of each stage: how far
# its positions lie apart, its name, and what looks at the run.
PLAIN = {
  "compute.dtype": "float32",
  "model.base_size": 16,
  "model.pe_interpolation": 1.0,
}


@pytest.fixture(scope="module")
def measured(data):
  """Loss and gradients of a shrunk stage on a mesh, once for each program."""
  done = {}

  def measured(stage, mesh):
    config = runs.shrink(load(stage), "", changes=PLAIN).to_dict()
    sections = ("model", "compute", "loss", "batch_size", "accumulation", "adapter")
    program = [config[name] for name in sections] + [config["data"], mesh]
    name = json.dumps(program, sort_keys=True, default=str)
    if name not in done:
      config["data"]["path"] = str(data(stage))
      done[name] = _measured(config, mesh)
    return done[name]

  return measured


@pytest.mark.parametrize("mesh", [FSDP, CONTEXT, BOTH], ids=str)
@pytest.mark.parametrize("stage", PAPER, ids=str)
def test_a_mesh_changes_neither_loss_nor_gradients(stage, mesh, measured):
  loss, gradients = measured(stage, {"data": 1, "fsdp": 1, "context": 1})
  have_loss, have = measured(stage, mesh)
  assert all(array.any() for array in gradients.values())
  largest = max(np.abs(array).max() for array in gradients.values())
  # Sums of float32 in another order: some hundred terms, an ulp or a few.
  assert have_loss == pytest.approx(loss, rel=1e-5)
  for leaf, array in gradients.items():
    np.testing.assert_allclose(
      have[leaf], array, rtol=0, atol=1e-5 * largest, err_msg=leaf
    )


def _measured(config, mesh):
  mixture = open_mixture(
    [config["data"]["path"]], weights=(), holdout=0.0, split="train"
  )
  model = model_config(config["model"])
  arguments = {name: config["data"][name] for name in ("long_caption_ratio", "damaged")}
  batch = next(
    data_pipeline.batches(
      mixture,
      batch_size=config["batch_size"],
      seed=0,
      start_example=0,
      patch_size=model.patch_size,
      window=model.window,
      caption_length=model.caption_length,
      process_index=0,
      process_count=1,
      num_threads=0,
      num_workers=0,
      **arguments,
    )
  )
  key = jax.random.key(0)
  # Nothing is zero that a fresh model has at zero, or half of the gradients would be.
  params = jax.jit(lambda: jax.tree.map(_noisy, init_params(model, key)))()
  null_caption = jnp.zeros((model.caption_length, model.caption_width))
  mesh = sharding.make_mesh(**mesh, devices=jax.devices()[: math.prod(mesh.values())])
  program = make_program(config, mesh=mesh, scaling_factor=0.13)
  places = sharding.shardings(params, mesh)
  whole = sharding.replicated(mesh)
  step = jax.jit(
    jax.value_and_grad(program.validation_loss, has_aux=True),
    in_shardings=(places, whole, sharding.batch_shardings(batch, mesh), whole),
    out_shardings=((whole, whole), places),
  )
  (loss, _), gradients = step(params, null_caption, batch, key)
  return float(loss), runs.named(gradients)


def _noisy(leaf):
  return leaf + 0.02 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)


def test_the_last_checkpoint_of_the_chain_names_every_step(workdirs):
  last = workdirs(("stage_4k.py", "compressed"))
  about = checkpoint.read_metadata(last)
  names = ["256_vae", "256_align", "512", "1k", "2k", "4k"]
  assert [entry["stage"] for entry in about.provenance] == [
    "alpha-256",
    *(f"stage_{name}" for name in names),
  ]
  assert [
    [transform["name"] for transform in entry["transforms"]]
    for entry in about.provenance[1:]
  ] == [
    ["alpha_to_sigma", "swap_vae"],
    [],
    ["interpolate_pe"],
    ["interpolate_pe", "add_kv_compression"],
    ["interpolate_pe"],
    ["interpolate_pe"],
  ]
  for entry, parent in zip(about.provenance[1:], about.provenance, strict=False):
    steps = 0 if parent["stage"] == "alpha-256" else 2
    assert entry["parent"]["stage"] == parent["stage"]
    assert entry["parent"]["step"] == steps
  assert about.resolution == 4096
  assert about.model["pe_interpolation"] == 8.0
  assert about.model["kv_compression"]["ratio"] == 4
  assert about.autoencoder["name"] == "sdxl-vae"


def test_what_each_transform_does_is_told_before_any_training(workdirs):
  for stage, transforms in {
    ("stage_256_vae.py", None): [
      r"alpha_to_sigma: pe_interpolation: 1.0 → 0.5; caption_length: 4 → 12; \d+ of",
      r"swap_vae: autoencoder.name: 'sd-vae' → 'sdxl-vae'; scaling_factor: 0.18215 → 0",
    ],
    ("stage_1k.py", "compressed"): [
      r"interpolate_pe: base_size: 32 → 64; pe_interpolation: 1.0 → 2.0; (\d+) of \1 ",
      r"add_kv_compression: kv_compression.ratio: 1 → 4; .*layers: .* parameters\.",
    ],
  }.items():
    workdir = workdirs(stage)
    log = workdir.with_suffix(".log").read_text()
    first = runs.metrics(workdir)[0]
    before = f"Before any training, on the first batch: loss {first['loss']:.4f} "
    places = [re.search(line, log) for line in transforms]
    assert all(places), log
    assert log.count(before) == 1
    assert places[0].start() < places[1].start() < log.index(before)


def test_the_docs_have_the_paper_s_table_and_the_hours_that_follow_from_it():
  text = (ROOT / "docs" / "stages.md").read_text()
  rows = [
    [cell.strip(" `") for cell in line.strip("|").split("|")]
    for line in text.splitlines()
    if line.startswith("| `stage_")
  ]
  # Table 4 has batches of images × GPUs; the other table's last column is the bound
  # that tests/reproduce compares.
  both = [cells for cells in rows if len(cells) == 8]
  table_4 = {cells[0]: cells[1:] for cells in both if "×" in cells[5]}
  hours = {cells[0]: cells[1:-1] for cells in both if "×" not in cells[5]}
  total = 0.0
  for stage in PAPER:
    file, argument = stage
    name = file if argument in (None, "compressed") else f"{file}:{argument}"
    config, model = load(stage), model_config(load(stage).model.to_dict())
    if argument not in ("uhd", "uhd_full"):
      _, pixels, _, steps, batch, rate, _ = table_4.pop(name)
      each, gpus = map(int, batch.split("×"))
      assert int(pixels) == _resolution(config)
      assert int(steps.replace(",", "")) == config.total_steps
      assert each * gpus == config.batch_size
      assert float(rate) == config.optimizer.learning_rate
    forward = sum(forward_flops(model, (model.base_size,) * 2, 300).values())
    step = TRAINING * forward * config.batch_size
    seconds = step / (8 * 0.3 * CHIPS["NVIDIA H100"].flops)
    spent = 8 * seconds * config.total_steps / 3600
    assert hours.pop(name) == [
      f"{forward / 1e12:.3f}",
      f"{step * config.total_steps / 1e18:.1f}",
      f"{seconds:.2f}",
      f"{spent / 8:.1f}",
      f"{spent:.0f}",
      f"${2.5 * spent:.0f}",
    ]
    if argument in (None, "compressed"):
      total += spent
    assert f"{spent / 8:.1f}" in _docstring(file)
    assert f"${2.5 * spent:.0f}" in _docstring(file)
  assert not table_4
  assert not hours
  assert f"The chain of six is {total / 8:.0f} hours and ${2.5 * total:.0f}." in text
