"""The stages of table 4 as this repository's configs have them."""

import dataclasses
import importlib
from typing import Any

from pixsigma_jax.models.flops import TRAINING
from pixsigma_jax.models.pixart import PixArtConfig
from pixsigma_jax.plan import roofline
from pixsigma_jax.train.config import model_config


@dataclasses.dataclass(frozen=True)
class PaperStage:
  """A row of PixArt-Σ's table 4, and the config that is it.

  Attributes:
    config: module and argument, "stage_1k:full".
    row: the paper's name of it.
    pixels: side of its square image.
    days: GPU-days that the paper counts; None for a stage that is not in its table.
    gpu: which GPU, a key of `GPUS`.
  """

  config: str
  row: str
  pixels: int
  days: float | int | None
  gpu: str | None


# What the paper trained on → `chips.CHIPS`. It says V100 and A800 in table 4.
GPUS = {"V100": "Tesla V100-SXM2-32GB", "A800": "NVIDIA A800-SXM4-80GB"}

_AESTHETICS, _COMPRESSION = "higher aesthetics", "KV token compression"

STAGES = (
  PaperStage("stage_256_vae", "VAE adaption", 256, 5, "V100"),
  PaperStage("stage_256_align", "better text-image align", 256, 50, "V100"),
  PaperStage("stage_512", _AESTHETICS, 512, 30, "V100"),
  PaperStage("stage_1k", _COMPRESSION, 1024, 20, "V100"),
  PaperStage("stage_1k:full", _AESTHETICS, 1024, 50, "V100"),
  PaperStage("stage_2k", _COMPRESSION, 2048, 7, "A800"),
  PaperStage("stage_2k:full", _AESTHETICS, 2048, 10, "A800"),
  PaperStage("stage_4k", _COMPRESSION, 4096, 12, "A800"),
  PaperStage("stage_4k:full", _AESTHETICS, 4096, 16, "A800"),
  PaperStage("stage_4k:uhd", "", 2880, None, None),
  PaperStage("stage_4k:uhd_full", "", 2880, None, None),
)
# The six that follow each other from PixArt-α to 4K, see docs/stages.md.
CHAIN = (
  *("stage_256_vae", "stage_256_align", "stage_512"),
  *("stage_1k", "stage_2k", "stage_4k"),
)


def config_of(name: str) -> dict[str, Any]:
  """The config of a stage, "stage_4k:uhd", as a plain dict.

  Raises:
    FileNotFoundError: the repository's configs are not there.
  """
  module, _, argument = name.partition(":")
  try:
    found = importlib.import_module(f"configs.{module}")
  except ModuleNotFoundError as error:
    if error.name not in ("configs", f"configs.{module}"):
      raise
    raise FileNotFoundError(
      f"There is no configs/{module}.py here: run this in the repository's root."
    ) from error
  return found.get_config(*([argument] if argument else [])).to_dict()


def file_of(name: str) -> str:
  """The config as documentation names it: `stage_4k.py:uhd`."""
  module, _, argument = name.partition(":")
  return f"{module}.py" + (f":{argument}" if argument else "")


@dataclasses.dataclass(frozen=True)
class Operations:
  """Operations of a stage.

  Attributes:
    forward: of one image, square and with a caption of 300 tokens.
    step: of a batch, forward and backward.
    total: of all steps.
  """

  forward: float
  step: float
  total: float


def operations(config: dict[str, Any]) -> Operations:
  """Counts the operations of a stage, recomputation not among them."""
  model: PixArtConfig = model_config(config["model"])
  forward = sum(roofline.needed(model).values())
  step = TRAINING * forward * config["batch_size"]
  return Operations(forward, step, step * config["total_steps"])
