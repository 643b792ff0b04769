"""The paper's stages as benchmarks name them, which a flag chooses from."""

from collections.abc import Callable, Sequence
from typing import Any

from configs import stage_1k, stage_2k, stage_4k, stage_256_vae, stage_512
from pixsigma_jax.plan.stage import Stage, stage_on
from pixsigma_jax.plan.topology import Topology

CONFIGS: dict[str, Callable[[], Any]] = {
  "256": stage_256_vae.get_config,
  "512": stage_512.get_config,
  "1k": stage_1k.get_config,
  "2k": stage_2k.get_config,
  "uhd": lambda: stage_4k.get_config("uhd"),
  "4k": stage_4k.get_config,
}


def chosen(names: Sequence[str]) -> dict[str, Any]:
  """A config for each name.

  Raises:
    ValueError: there is no such stage.
  """
  if unknown := [name for name in names if name not in CONFIGS]:
    raise ValueError(f"--stages: no {', '.join(unknown)} in {', '.join(CONFIGS)}.")
  return {name: CONFIGS[name]() for name in names}


def compressed(config: Any, ratio: int, attention: str, machines: Topology) -> Stage:
  """A stage with compression in half of its layers, or with ratio 1 in none."""
  config.model.kv_compression.ratio = ratio
  config.model.kv_compression.layers = tuple(range(14, 28)) if ratio > 1 else ()
  config.compute.attention = attention
  config.init.transforms = ()
  return stage_on(config.to_dict(), machines)
