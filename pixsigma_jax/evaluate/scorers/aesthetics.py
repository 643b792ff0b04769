"""LAION's aesthetic score of images, about from 1 to 10."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jaxtyping import UInt8
from PIL import Image

from pixsigma_jax import disk
from pixsigma_jax.convert.aesthetic_head import load_head
from pixsigma_jax.evaluate.items import Item
from pixsigma_jax.evaluate.options import Option
from pixsigma_jax.evaluate.scorers import ScorerType
from pixsigma_jax.evaluate.scorers import clip as clip_
from pixsigma_jax.models import aesthetic_head
from pixsigma_jax.models.clip import Clip

_OPTIONS = (
  Option(
    "aesthetic_clip",
    "openai/clip-vit-large-patch14",
    "CLIP of the aesthetic score: a folder or hub id.",
  ),
  Option("aesthetic_head", None, "File of the head, sac+logos+ava1-l14-linearMSE.pth."),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Aesthetic:
  """The head on CLIP's embeddings.

  Attributes:
    clip: with the image tower.
    head: see `models.aesthetic_head`.
    hash: SHA-256 of the head's file.
    batch_size: images decoded together.
  """

  clip: Clip
  head: aesthetic_head.Head
  hash: str
  batch_size: int = 64

  def identity(self) -> dict[str, str]:
    return clip_.identity(self.clip, "shorter side") | {"head": self.hash}

  def schema(self) -> pa.Schema:
    return pa.schema([("aesthetic", pa.float32())])

  def __call__(
    self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], items: Sequence[Item]
  ) -> Mapping[str, Any]:
    embedded = self.clip.embed_images([Image.fromarray(image) for image in images])
    scores = aesthetic_head.scores(self.head, jnp.asarray(embedded))
    return {"aesthetic": np.asarray(scores)}


def _load(options: Mapping[str, Any]) -> Aesthetic:
  path = options["aesthetic_head"]
  if path is None:
    raise ValueError(
      "Give --aesthetic_head=FILE, sac+logos+ava1-l14-linearMSE.pth as published."
    )
  head = load_head(path)
  clip = clip_.load(options["aesthetic_clip"], ("image",))
  if clip.config.projection != aesthetic_head.WIDTH:
    raise ValueError(
      f"--aesthetic_clip={options['aesthetic_clip']} makes embeddings of "
      f"{clip.config.projection} numbers and the head rates {aesthetic_head.WIDTH}: "
      "give CLIP ViT-L/14, openai/clip-vit-large-patch14."
    )
  return Aesthetic(clip, head, disk.file_hash(path))


SCORERS = {"aesthetic": ScorerType(options=_OPTIONS, load=_load)}
