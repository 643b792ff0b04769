"""A config says what differs from the defaults, by file and by command line."""

import copy
import dataclasses
import inspect
import pathlib
import re
import sys

import pytest

from configs import paper, stage_512
from configs.quickstart import low
from pixsigma_jax.convert import mmcv
from pixsigma_jax.models.kv_compression import KVCompression
from pixsigma_jax.models.layers import Compute
from pixsigma_jax.models.pixart import VARIANTS, PixArtConfig
from pixsigma_jax.sharding import make_mesh_of_slices
from pixsigma_jax.train import fields
from pixsigma_jax.train.compatibility import check_config
from pixsigma_jax.train.config import (
  choose,
  complete,
  config_dict,
  default_config,
  use_optimizer,
)
from pixsigma_jax.train.ema import Ema
from pixsigma_jax.train.guards import Guards
from pixsigma_jax.train.loss import make_loss
from pixsigma_jax.train.optimizer import OPTIMIZERS, make_optimizer, make_schedule
from pixsigma_jax.transforms.lora import Lora
from tests import commands
from tests.train import config_tables
from tests.train.test_checks import flat

ROOT = pathlib.Path(__file__).parents[2]

# Every field, as files had to spell them out before there were defaults.
LONG = {
  "stage": "mine",
  "seed": 0,
  "total_steps": 10_000,
  "batch_size": 1024,
  "accumulation": 1,
  "model": {
    "variant": "XL/2",
    "base_size": 32,
    "pe_interpolation": 1.0,
    "mlp_ratio": 4.0,
    "in_channels": 4,
    "learn_variance": True,
    "caption_width": 4096,
    "caption_length": 300,
    "qk_norm": False,
    "size_conditions": False,
    "kv_compression": {"ratio": 1, "layers": (), "operator": "conv", "norm": True},
  },
  "compute": {
    "dtype": "bfloat16",
    "attention": "auto",
    "remat": "attention",
    "unroll": False,
  },
  "data": {
    "path": "runs/mine/data/512px",
    "weights": (),
    "holdout": 0.001,
    "hashes": {"autoencoder": "", "text_encoder": "", "crop_rule": ""},
    "long_caption_ratio": 0.6,
    "num_threads": 16,
    "num_workers": 0,
    "damaged": "replace",
  },
  "frozen": "weights/frozen",
  "loss": {
    "caption_dropout": 0.1,
    "snr_switch": False,
    "min_snr_gamma": None,
    "snr_shift": 1.0,
    "timestep_beta": None,
    "timestep_range": (0, 999),
    "frequency_weight": 0.0,
    "frequency_gamma": 1.0,
    "wavelet_offset": None,
  },
  "optimizer": {
    "name": "came",
    "learning_rate": 2e-5,
    "scale_rule": "none",
    "schedule": "constant",
    "warmup_steps": 100,
    "b1": 0.9,
    "b2": 0.999,
    "b3": 0.9999,
    "eps": (1e-30, 1e-16),
    "clip_threshold": 1.0,
    "momentum_dtype": "float32",
    "weight_decay": 0.0,
    "clip_norm": 0.01,
    "groups": (),
  },
  "ema": {
    "kind": "exponential",
    "values": (0.999,),
    "unit": "updates",
    "offload": False,
  },
  "adapter": {
    "rank": 0,
    "alpha": 16.0,
    "targets": ("attention/", "mlp/"),
    "dora": False,
  },
  "init": {"parent": "weights/sigma-512", "transforms": ()},
  "mesh": {"slices": 0, "data": 0, "fsdp": 0, "context": 0},
  "checkpoint": {
    "every": 500,
    "keep_last": 2,
    "keep_every": 0,
    "snapshot_every": 0,
    "local": "",
    "local_every": 0,
    "remote": "",
    "remote_every": 0,
  },
  "guards": {
    "bad_step": "skip",
    "spike_factor": 0.0,
    "max_bad_steps": 10,
    "hang_factor": 10.0,
  },
  "validation": {"every": 1000, "examples": 1024},
  "log": {
    "every": 20,
    "sample_every": 0,
    "prompts": (
      "dog",
      "portrait photo of a girl, photograph, highly detailed face, depth of field",
      "Self-portrait oil painting, a beautiful cyborg with golden hair, 8k",
      "Astronaut in a jungle, cold color palette, muted colors, detailed, 8k",
      "A photo of beautiful mountain with realistic sunset and blue lake, highly "
      "detailed, masterpiece",
    ),
    "sample_set": {"every": 0, "count": 0},
    "profile": (),
    "wandb": {"project": "", "entity": ""},
  },
}
NAMES = list(fields.fields(fields.Config()))


def kinds(config):
  return {name: (value, type(value)) for name, value in flat(config).items()}


def without(config, name):
  config = copy.deepcopy(config)
  *sections, field = name.split(".")
  within = config
  for section in sections:
    within = within[section]
  del within[field]
  return config


@pytest.fixture
def ten_lines():
  """The first config that docs/training.md shows."""
  text = config_tables.PAGE.read_text(encoding="utf-8")
  return re.search(r"```python\n(def get_config.*?)```", text, re.DOTALL)[1]


@pytest.fixture
def train(capsys, monkeypatch):
  """`train`, as if there were no clone: no package `configs` can be imported."""
  monkeypatch.setitem(sys.modules, "configs", None)
  return lambda *arguments: commands.run(capsys, monkeypatch, "train", *arguments)


@pytest.fixture
def printed(train, tmp_path):
  """What --print_config says of a file's text: field → its value and origin."""

  def printed(text, *arguments, argument=""):
    path = tmp_path / "mine.py"
    path.write_text(text)
    done = train(f"--config={path}{argument}", "--print_config", *arguments)
    assert done.code == 0, done.err
    lines = [re.fullmatch(r"(.{12})  (\S+) = (.*)", x) for x in done.out.splitlines()]
    return {line[2]: (line[3], line[1].strip()) for line in lines}

  return printed


# ---------------------------------------------------------------------- the defaults


def test_ten_lines_train_what_a_hundred_lines_trained(ten_lines):
  scope = {}
  exec(ten_lines, scope)
  short = scope["get_config"]()
  assert len(ten_lines.splitlines()) <= 10
  assert len(flat(LONG)) > 80
  assert kinds(complete(short)) == kinds(LONG)
  check_config(short)


def test_a_file_that_spells_out_every_field_is_what_it_was():
  assert kinds(complete(LONG)) == kinds(LONG)
  assert kinds(complete(config_dict(LONG))) == kinds(LONG)
  config = low.get_config().to_dict()
  assert kinds(complete(config)) == kinds(config)


@pytest.mark.parametrize("name", NAMES)
def test_a_field_that_a_file_does_not_have_yet_breaks_it_not(name):
  filled = flat(complete(without(LONG, name)))
  assert filled == flat(LONG) | {name: fields.fields(fields.Config())[name].default}


def test_a_new_field_reaches_every_file_with_its_default(monkeypatch):
  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Later(fields.Config):
    novel: float = dataclasses.field(
      default=3.0, metadata={"check": lambda _: None, "does": ""}
    )

  monkeypatch.setattr(fields, "Config", Later)
  assert complete(LONG) == LONG | {"novel": 3.0}


def test_every_default_is_a_value_that_its_check_takes():
  for optimizer in fields.OPTIMIZERS.values():
    found = fields.fields(fields.Config(optimizer=optimizer()))
    refused = {
      name for name, field in found.items() if field.metadata["check"](field.default)
    }
    assert refused == {"total_steps", "batch_size"}  # which a stage must say


def test_a_section_is_the_call_that_it_stands_for():
  def names(section):
    return {field.name for field in dataclasses.fields(section)}

  def asks(function, *given):
    parameters = inspect.signature(function).parameters.values()
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    return set(keywords) - set(given)

  rates = asks(make_schedule, "total_steps", "batch_size")
  assert names(fields.Optimizer) == rates | asks(make_optimizer)
  for name, section in fields.OPTIMIZERS.items():
    assert section().name == name
    assert names(section) - names(fields.Optimizer) == asks(OPTIMIZERS[name])
  assert set(fields.OPTIMIZERS) == set(OPTIMIZERS)
  assert names(fields.Compute) == asks(Compute, "merge_rows", "mesh")
  assert names(fields.Loss) == asks(make_loss, "scaling_factor")
  assert names(fields.Ema) == asks(Ema, "batch_size")
  assert names(fields.Guards) == asks(Guards)
  assert names(fields.Adapter) == asks(Lora)
  assert names(fields.KVCompression) == asks(KVCompression)
  devices = ("devices", "batch_size", "width")
  assert names(fields.MeshAxes) == asks(make_mesh_of_slices, *devices)
  assert names(fields.Model) - {"variant"} == asks(PixArtConfig, *VARIANTS["XL/2"])


def test_another_optimizer_brings_its_own_fields():
  assert complete({"optimizer": {"name": "lion", "b1": 0.8}})["optimizer"] == {
    **{field.name: field.default for field in dataclasses.fields(fields.Lion)},
    "b1": 0.8,
  }
  config = default_config()
  config.optimizer.learning_rate = 1e-4
  use_optimizer(config, name="adamw", eps=1e-10)
  assert config.optimizer.to_dict() == {
    **{field.name: field.default for field in dataclasses.fields(fields.AdamW)},
    "learning_rate": 1e-4,
    "eps": 1e-10,
  }


def test_numbers_of_a_config_keep_their_kind():
  config = config_dict({"optimizer": {"learning_rate": 1}, "log": {"every": 3}})
  assert repr(config.optimizer.learning_rate) == "1.0"
  assert repr(config.log.every) == "3"
  config.loss.min_snr_gamma = 5.0
  config.loss.min_snr_gamma = None
  assert config.to_dict()["loss"]["min_snr_gamma"] is None


# ------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"seeed": 1}, r"unknown config\.seeed \(did you mean config\.seed\?\)"),
    (
      {"model": {"kv_compression": {"layer": ()}}},
      r"config\.model\.kv_compression\.layer \(did you mean .*kv_compression\.layers",
    ),
    ({"lerning_rate": 1}, r"\(did you mean config\.optimizer\.learning_rate\?\)"),
    ({"ema": {"xyz": 1}}, r"config\.ema\.xyz\. Its fields here are kind, values, unit"),
    (
      {"optimizer": {"name": "adamw", "beta": 0.9}},
      r"config\.optimizer\.beta \(a field of muon: in a file use_optimizer, or a flag",
    ),
    ({"optimizer": {"name": "mun"}}, r"Unknown optimizer\.name 'mun'; .* 'muon'"),
    ({"log": {"wandb": "me"}}, r"config\.log\.wandb='me' must be a section of fields"),
  ],
)
def test_an_unknown_field_names_the_nearest(given, message):
  with pytest.raises(ValueError, match=message):
    complete(given)


def test_a_name_set_without_the_fields_that_go_with_it_is_refused():
  config = default_config()
  config.optimizer.name = "adamw"
  with pytest.raises(ValueError, match=r"optimizer\.b3 .*use_optimizer, or"):
    complete(config)


def test_an_unknown_argument_lists_the_known():
  assert choose("full", {"compressed": 1, "full": 2}) == 2
  with pytest.raises(
    ValueError, match=r"'ful' \(did you mean 'full'\?\); known are 'compressed', 'full'"
  ):
    choose("ful", {"compressed": 1, "full": 2})


@pytest.mark.parametrize(
  ("text", "arguments", "message"),
  [
    (
      "from pixsigma_jax.train.config import choose\n"
      "def get_config(kind='a'):\n  return choose(kind, {'aa': {}, 'b': {}})\n",
      [":c"],
      r":c: Unknown argument 'c'; known are 'aa', 'b'\.",
    ),
    ("def get_config():\n  return {}\n", [":full"], "it takes no argument, .*'full'"),
    ("def get_config():\n  return None\n", [""], "get_config returned NoneType: it mu"),
    ("def get_config():\n  return 1 + ''\n", [""], "TypeError: unsupported operand"),
    (
      "def get_config():\n  return {'seeed': 1}\n",
      [""],
      r"did you mean config\.seed\?",
    ),
    ("get_config = 3\n", [""], "it has no function get_config"),
    ("import nowhere_at_all\n", [""], "ModuleNotFoundError: No module named 'nowhere_"),
    (
      "def get_config():\n  return {}\n",
      ["", "--config.loss.snr_shft=2"],
      r"unknown config\.loss\.snr_shft \(did you mean config\.loss\.snr_shift\?\)",
    ),
    (
      "def get_config():\n  return {}\n",
      ["", "--config.learning_rate", "2"],
      r"config\.learning_rate \(did you mean config\.optimizer\.learning_rate\?\)",
    ),
    (
      "def get_config():\n  return {}\n",
      ["", "--noconfig.ema.offlod"],
      r"config\.ema\.offlod \(did you mean config\.ema\.offload\?\)",
    ),
  ],
)
def test_a_config_that_cannot_be_read_is_one_line(
  train, tmp_path, text, arguments, message
):
  path = tmp_path / "mine.py"
  path.write_text(text)
  argument, *more = arguments
  done = train(f"--config={path}{argument}", "--print_config", *more)
  lines = done.err.splitlines()
  assert (done.code, done.out, len(lines)) == (1, "", 1)
  assert re.match(f"Error: --config={path}.*{message}", lines[0])


# ------------------------------------------------------------------ the command line


def test_each_field_is_printed_with_where_it_came_from(printed, ten_lines):
  have = printed(ten_lines, "--config.batch_size=8", "--config.model.base_size=16")
  assert set(have) == set(NAMES)
  of_file = {"stage", "total_steps", "model.pe_interpolation", "data.path"}
  of_file |= {"init.parent"}
  for name, (shown, origin) in have.items():
    if name in ("batch_size", "model.base_size"):
      assert (shown, origin) == ("8" if name == "batch_size" else "16", "command line")
    else:
      assert shown == repr(flat(LONG)[name])
      assert origin == ("file" if name in of_file else "default"), name


def test_what_is_printed_is_checked_as_well(train, tmp_path):
  path = tmp_path / "mine.py"
  path.write_text("def get_config():\n  return {'batch_size': 8}\n")
  done = train(f"--config={path}", "--print_config")
  assert done.code == 1
  assert len(done.out.splitlines()) == len(NAMES)
  assert "config.total_steps=0 must be at least 1" in done.err


def test_a_run_needs_its_workdir(train, tmp_path):
  path = tmp_path / "mine.py"
  path.write_text("def get_config():\n  return {}\n")
  done = train(f"--config={path}")
  assert done.code == 1
  assert "--workdir, the directory of the run, must be given" in done.err


STARTS = "def get_config():\n  return {'batch_size': 8, 'total_steps': 200}\n"


def test_none_and_numbers_take_each_others_place_on_the_command_line(printed):
  have = printed(STARTS, "--config.loss.min_snr_gamma=5")
  assert have["loss.min_snr_gamma"] == ("5.0", "command line")
  have = printed(
    STARTS.replace("'total_steps'", "'loss': {'min_snr_gamma': 5.0}, 'total_steps'"),
    "--config.loss.min_snr_gamma=None",
  )
  assert have["loss.min_snr_gamma"] == ("None", "command line")
  have = printed(
    STARTS, "--config.optimizer.name=muon", "--config.optimizer.consistent_rms=None"
  )
  assert have["optimizer.consistent_rms"] == ("None", "command line")


def test_an_optimizer_named_on_the_command_line_brings_its_fields(printed):
  have = printed(
    STARTS,
    *("--config.optimizer.name", "muon", "--config.optimizer.beta=0.9"),
    "--config.optimizer.learning_rate=1e-3",
  )
  assert have["optimizer.name"] == ("'muon'", "command line")
  assert have["optimizer.beta"] == ("0.9", "command line")
  assert have["optimizer.learning_rate"] == ("0.001", "command line")
  assert have["optimizer.nesterov"] == ("True", "default")
  assert "optimizer.b3" not in have


def test_overrides_are_those_of_ml_collections(printed):
  transforms = "({'name': 'interpolate_pe', 'base_size': 8},)"
  init = f"'init': {{'parent': 'p', 'transforms': {transforms}}}"
  have = printed(
    STARTS.replace("'total_steps'", f"{init}, 'total_steps'"),
    *("--config.optimizer.learning_rate", "1e-3"),
    "-config.seed=3",
    "--config.ema.values=(0.9, 0.99)",
    "--config.log.prompts=('a cat', 'a dog')",
    "--config.adapter.targets=mlp/",
    "--config.adapter.targets=attention/",
    "--config.compute.unroll",
    "--noconfig.model.learn_variance",
    "--config.data.hashes={'crop_rule': 'abc'}",
    "--config.init.transforms[0].base_size=16",
  )
  given = {name: shown for name, (shown, origin) in have.items() if "line" in origin}
  assert given == {
    "optimizer.learning_rate": "0.001",
    "seed": "3",
    "ema.values": "(0.9, 0.99)",
    "log.prompts": "('a cat', 'a dog')",
    "adapter.targets": "('mlp/', 'attention/')",
    "compute.unroll": "True",
    "model.learn_variance": "False",
    "data.hashes.autoencoder": "''",
    "data.hashes.text_encoder": "''",
    "data.hashes.crop_rule": "'abc'",
    "init.transforms": transforms.replace("8", "16"),
  }


def test_a_file_runs_outside_of_a_clone(printed, tmp_path):
  source = tmp_path / "theirs.py"
  source.write_text(
    "image_size = 512\npe_interpolation = 1.0\nmodel_max_length = 300\n"
    "optimizer = dict(type='AdamW', lr=1e-4)\n"
  )
  written = tmp_path / "ours.py"
  mmcv.convert_config(source, written, gpus=1, images=100_000)
  have = printed(written.read_text())
  assert have["model.base_size"] == ("32", "file")
  assert have["optimizer.name"] == ("'adamw'", "file")
  assert have["optimizer.learning_rate"] == ("0.0001", "file")
  assert have["guards.bad_step"] == ("'skip'", "default")


def test_what_an_earlier_version_wrote_is_read_as_before():
  config = paper.get_config()
  config.stage = "imported"
  paper.use_optimizer(config, name="adamw", b1=0.9, b2=0.999, eps=1e-10)
  config.optimizer.weight_decay = 3e-2
  assert config.optimizer.eps == 1e-10
  assert complete(config) == config.to_dict()


# --------------------------------------------------------------------------- the docs


def test_the_docs_have_the_tables_that_follow_from_the_fields():
  page = config_tables.PAGE.read_text(encoding="utf-8")
  assert config_tables.written(page) == page
  shown = "".join([*config_tables.tables().values(), config_tables.own_table()])
  for name in NAMES:
    assert f"`{name.partition('.')[2] or name}`" in shown


def test_the_stage_of_the_docs_is_the_papers():
  theirs = flat(stage_512.get_config().to_dict())
  differs = {name for name, value in flat(LONG).items() if theirs[name] != value}
  assert differs == {
    *("stage", "data.path", "init.parent", "init.transforms", "log.sample_every")
  }
