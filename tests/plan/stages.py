"""Stages for the tests: the paper's at full size, and one as small as they come."""

import importlib
import json

from pixsigma_jax.plan import topology
from pixsigma_jax.plan.stage import stage_on


def config_of(name, **changes):
  """A config's fields; `compute__remat="none"` changes one of a section."""
  config = importlib.import_module(f"configs.{name}").get_config().to_dict()
  for path, value in changes.items():
    *sections, field = path.split("__")
    section = config
    for each in sections:
      section = section[each]
    assert field in section
    section[field] = value
  return config


_STATES = {}  # by the sections that they depend on


def stage(name, machines, slices=1, **changes):
  """A stage on machines."""
  config = config_of(name, **changes)
  sections = [config[each] for each in ("model", "optimizer", "ema", "adapter")]
  key = json.dumps(sections)
  planned = stage_on(config, topology.parse(machines, slices), _STATES.get(key))
  _STATES[key] = planned.state
  return planned
