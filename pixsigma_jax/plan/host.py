"""Input that hosts must deliver for steps not to wait."""

import dataclasses
import math

from pixsigma_jax.models.pixart import PixArtConfig
from pixsigma_jax.plan.stage import Stage
from pixsigma_jax.plan.topology import GPUS_A_BOX

CHIPS_A_HOST = 4  # of a TPU; a box of GPUs is one host
STORED_TOKENS = 240 + 48  # a long and a short caption of a record: docs/data.md
_HALF = 2


@dataclasses.dataclass(frozen=True)
class Host:
  """The input of one host; bytes with captions as embeddings, and as text."""

  hosts: int
  images_a_second: float
  bytes_a_second: float
  bytes_a_second_text: float


def moments_bytes(model: PixArtConfig, tokens: int) -> int:
  """Bytes of a record's autoencoder moments: mean and log-variance in float16."""
  return tokens * model.patch_size**2 * model.in_channels * 2 * _HALF


def captions_bytes(model: PixArtConfig) -> int:
  """Bytes of a record's captions as embeddings in float16."""
  return STORED_TOKENS * model.caption_width * _HALF


def host_input(stage: Stage, seconds: float) -> Host:
  """Input of each host for steps of so many seconds."""
  topology = stage.topology
  each = CHIPS_A_HOST if topology.platform == "tpu" else GPUS_A_BOX
  hosts = topology.slices * math.ceil(topology.chips / topology.slices / each)
  rate = stage.config["batch_size"] / seconds / hosts
  moments = moments_bytes(stage.model, stage.tokens)
  return Host(
    hosts=hosts,
    images_a_second=rate,
    bytes_a_second=rate * (moments + captions_bytes(stage.model)),
    bytes_a_second_text=rate * moments,
  )
