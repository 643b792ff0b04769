"""No value without sense gets as far as a run: each is refused by its field's name."""

import copy
import math

import pytest

from configs import stage_4k
from configs.quickstart import low
from pixsigma_jax.train import fields
from pixsigma_jax.train.compatibility import check_config
from pixsigma_jax.train.config import defaults_of
from pixsigma_jax.train.optimizer import OPTIMIZERS
from tests.train import runs, weak_stage

# Of each optimizer that no file of configs/ has, fields as the docs name them.
OTHERS = {
  "adafactor": {
    "b1": 0.0,
    "decay_rate": 0.8,
    "eps": 1e-30,
    "clip_threshold": 1.0,
    "min_size_to_factor": 128,
    "scale_by_parameter": True,
  },
  "lion": {"b1": 0.9, "b2": 0.99},
}


def flat(fields, section=""):
  """Dotted names and values of everything in a config."""
  found = {}
  for name, value in fields.items():
    if isinstance(value, dict):
      found |= flat(value, f"{section}{name}.")
    else:
      found[f"{section}{name}"] = value
  return found


def changed(config, name, value):
  config = copy.deepcopy(config)
  *sections, field = name.split(".")
  within = config
  for section in sections:
    within = within[section]
  within[field] = value
  return config


def configs():
  """One with each optimizer."""
  stages = [weak_stage.get_config(), low.get_config(), stage_4k.get_config()]
  found = [runs.shrink(stage, "data", "parent").to_dict() for stage in stages]
  for name, own in OTHERS.items():
    config = copy.deepcopy(found[0])
    for field in ("b1", "b2", "eps"):
      del config["optimizer"][field]
    config["optimizer"] |= {"name": name, **own}
    found.append(config)
  assert {config["optimizer"]["name"] for config in found} == set(OPTIMIZERS)
  return found


CONFIGS = configs()
FIELDS = {
  name: (config, value) for config in CONFIGS for name, value in flat(config).items()
}
NUMBERS = [
  name
  for name, (_, value) in FIELDS.items()
  if isinstance(value, int | float) and not isinstance(value, bool)
]


def refuse(config, name, value):
  with pytest.raises(ValueError, match="config makes no sense") as error:
    check_config(changed(config, name, value))
  assert f"config.{name}={value!r} must be" in str(error.value)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c["optimizer"]["name"])
def test_what_the_stages_have_makes_sense(config):
  check_config(config)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c["optimizer"]["name"])
def test_every_field_of_every_section_is_looked_at(config):
  assert set(flat(config)) == set(fields.checks(defaults_of(config)))


@pytest.mark.parametrize("value", [1e-8, (1e-8,), (1e-8, 0.0), (1e-8, 1e-8, 1e-8)])
def test_what_came_adds_is_a_pair(value):
  [came] = [config for config in CONFIGS if config["optimizer"]["name"] == "came"]
  refuse(came, "optimizer.eps", value)


@pytest.mark.parametrize("name", FIELDS)
def test_what_is_of_another_kind_is_refused(name):
  config, value = FIELDS[name]
  for other in (object, "0.1", (object,), None, {"name": 1}):
    kinds = (str, bool, tuple, dict, type(None))
    alike = any(isinstance(value, k) and isinstance(other, k) for k in kinds)
    # An empty tuple holds nothing that could be of another kind than its elements.
    if alike and other != (object,):
      continue
    if other is None and name in ("loss.min_snr_gamma", "optimizer.consistent_rms"):
      continue
    refuse(config, name, other)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_are_none_and_negative_ones_are_refused(name):
  config, _ = FIELDS[name]
  for value in (math.nan, -math.inf, "3", True, -2):
    refuse(config, name, value)


@pytest.mark.parametrize("name", [n for n in NUMBERS if isinstance(FIELDS[n][1], int)])
def test_what_is_counted_is_counted_in_whole_numbers(name):
  refuse(FIELDS[name][0], name, 2.5)


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("total_steps", 0),
    ("batch_size", 0),
    ("accumulation", 0),
    ("seed", 2**32),
    ("model.base_size", 0),
    ("model.pe_interpolation", 0.0),
    ("compute.dtype", "int8"),
    ("data.holdout", 1.0),
    ("data.weights", (1.0, 0.0)),
    ("data.weights", (1.0, math.nan)),
    ("data.long_caption_ratio", 1.01),
    ("data.damaged", "ignore"),
    ("loss.caption_dropout", 1.5),
    ("loss.min_snr_gamma", 0.0),
    ("loss.snr_shift", 0.0),
    ("loss.timestep_beta", (2.0, 0.0)),
    ("loss.timestep_range", (-1, 999)),
    ("loss.frequency_weight", -1.0),
    ("loss.frequency_gamma", 0.0),
    ("loss.wavelet_offset", -0.1),
    ("optimizer.learning_rate", math.inf),
    ("optimizer.clip_norm", 0.0),
    ("optimizer.b1", 1.0),
    ("optimizer.b2", 1.5),
    ("optimizer.eps", 0.0),
    ("optimizer.groups", (("attention", -1.0),)),
    ("optimizer.groups", (("attention",),)),
    ("optimizer.groups", (("attention", math.nan),)),
    ("ema.values", 0.9),
    ("ema.values", ("0.9",)),
    ("adapter.alpha", 0.0),
    ("adapter.targets", "attention/"),
    ("init.transforms", ({"base_size": 8},)),
    ("checkpoint.keep_last", 0),
    ("guards.spike_factor", 0.5),
    ("guards.hang_factor", 1.0),
    ("guards.max_bad_steps", 0),
    ("log.every", 0),
    ("log.prompts", "a red seven"),
    ("log.profile", (0, 3)),
    ("log.profile", (3,)),
    ("log.profile", (3, 2)),
  ],
)
def test_what_lies_beyond_the_bounds_is_refused(name, value):
  refuse(FIELDS[name][0], name, value)


@pytest.mark.parametrize("value", [1.0, 1.5, -0.1, math.nan])
def test_a_decay_is_a_share(value):
  config = changed(CONFIGS[0], "ema.values", (0.9, value))
  with pytest.raises(ValueError, match=r"ema\.values"):
    check_config(config)


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("checkpoint.every", 0),
    ("checkpoint.keep_every", 0),
    ("checkpoint.snapshot_every", 0),
    ("log.sample_every", 0),
    ("data.num_threads", 0),
    ("data.num_workers", 0),
    ("guards.hang_factor", 0.0),
    ("mesh.data", 0),
    ("mesh.context", -1),
    ("optimizer.clip_norm", math.inf),
    ("optimizer.learning_rate", 1),
    ("data.long_caption_ratio", 1),
    ("seed", 2**32 - 1),
    ("log.profile", (2, 2)),
    ("log.profile", []),
  ],
)
def test_what_means_off_or_stands_on_a_bound_is_taken(name, value):
  check_config(changed(FIELDS[name][0], name, value))


def test_all_that_is_wrong_is_said_at_once():
  config = changed(CONFIGS[0], "batch_size", 0)
  config = changed(config, "checkpoint.keep_last", 0)
  with pytest.raises(
    ValueError, match=r"batch_size=0 must .*; .*keep_last=0 must .*keep_every=1"
  ):
    check_config(config)


@pytest.mark.parametrize("section", ["loss", "checkpoint", "log.sample_set"])
def test_a_value_in_the_place_of_a_section_is_refused(section):
  refuse(CONFIGS[0], section, 3)
