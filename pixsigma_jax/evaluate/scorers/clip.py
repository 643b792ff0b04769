"""CLIP as a scorer: cosines of images and prompts, and the embeddings of CMMD."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import pyarrow as pa
from jaxtyping import UInt8
from PIL import Image

from pixsigma_jax import sharding
from pixsigma_jax.convert.clip import Tower, load_clip
from pixsigma_jax.evaluate.items import Item
from pixsigma_jax.evaluate.options import Option
from pixsigma_jax.evaluate.scorers import ScorerType, features, shared
from pixsigma_jax.models.clip import Clip, Truncation

_SOURCE = Option(
  "clip",
  "openai/clip-vit-large-patch14",
  "CLIP of the CLIP score: a folder or hub id. Papers differ in it.",
)
_CMMD_SOURCE = Option(
  "clip_cmmd",
  "openai/clip-vit-large-patch14-336",
  "CLIP of CMMD: a folder or hub id; published values are of the default.",
)
_TEXTATLAS_SOURCE = Option(
  "clip_textatlas",
  "openai/clip-vit-base-patch32",
  "CLIP of TextAtlasEval: a folder or hub id; published values are of the default.",
)


def load(source: str, towers: Sequence[Tower]) -> Clip:
  """CLIP on this process's devices, which share each batch.

  A tower is loaded once for all scorers that take it.
  """
  parts = [_tower(source, which) for which in towers]
  return dataclasses.replace(
    parts[0],
    params={which: x for part in parts for which, x in part.params.items()},
    tokenizer=next((p.tokenizer for p in parts if p.tokenizer is not None), None),
    identity=parts[0].identity
    | {"hash": " ".join(str(part.identity["hash"]) for part in parts)},
  )


@shared
def _tower(source: str, which: Tower) -> Clip:
  devices = jax.local_devices()
  mesh = sharding.make_mesh(data=-1, fsdp=1, context=1, devices=devices)
  return load_clip(source, towers=(which,), mesh=mesh)


def identity(clip: Clip, resize: str) -> dict[str, str]:
  """Identity of a scorer that takes this CLIP."""
  size = clip.config.image_size
  return {
    # A folder's path says nothing to others: the hash is what counts.
    "weights": f"CLIP, {clip.config.patch_size} x {clip.config.patch_size} patches",
    "hash": str(clip.identity["hash"]),
    "dtype": np.dtype(clip.dtype).name,
    "resize": f"{resize} to {size}",
    "version": "1",
  }


@dataclasses.dataclass(frozen=True, eq=False)
class ClipScore:
  """Cosine of an image's and its prompt's embedding, neither scaled nor cut at zero.

  Attributes:
    clip: with both towers.
    truncate: of long prompts, see `Clip.embed_texts`.
    batch_size: images decoded together.
  """

  clip: Clip
  truncate: Truncation = "end"
  batch_size: int = 64

  def identity(self) -> dict[str, str]:
    return identity(self.clip, "shorter side") | {"truncate": self.truncate}

  def schema(self) -> pa.Schema:
    return pa.schema([("cosine", pa.float32())])

  def __call__(
    self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], items: Sequence[Item]
  ) -> Mapping[str, Any]:
    ours = self.clip.embed_images([Image.fromarray(image) for image in images])
    prompts = [item.prompt for item in items]
    theirs = self.clip.embed_texts(prompts, truncate=self.truncate)
    return {"cosine": np.sum(_unit(ours) * _unit(theirs), axis=-1)}


@dataclasses.dataclass(frozen=True, eq=False)
class CmmdFeatures:
  """Embeddings of CMMD: the middle square, by Pillow's bicubic filter to CLIP's size.

  Source: google-research/cmmd, `io_util.py`. The order matters: CLIP's own
  preprocessing resizes before it crops.

  Attributes:
    clip: with the image tower.
    batch_size: images decoded together.
  """

  clip: Clip
  batch_size: int = 64

  def identity(self) -> dict[str, str]:
    return identity(self.clip, "middle square")

  def schema(self) -> pa.Schema:
    return pa.schema([("features", features(self.clip.config.projection))])

  def __call__(
    self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], items: Sequence[Item]
  ) -> Mapping[str, Any]:
    size = self.clip.config.image_size
    pixels = [middle_square(Image.fromarray(image), size) for image in images]
    return {"features": self.clip.embed_pixels(pixels)}


def middle_square(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
  """The largest square in the middle, resized by Pillow's bicubic filter."""
  width, height = image.size
  side = min(width, height)
  left, top = (width - side) // 2, (height - side) // 2
  image = image.crop((left, top, left + side, top + side))
  return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def _unit(x: np.ndarray) -> np.ndarray:
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


SCORERS = {
  "clip": ScorerType(
    options=(_SOURCE,),
    load=lambda options: ClipScore(load(options["clip"], ("image", "text"))),
  ),
  "clip-textatlas": ScorerType(
    options=(_TEXTATLAS_SOURCE,),
    load=lambda options: ClipScore(
      load(options["clip_textatlas"], ("image", "text")), truncate="slice"
    ),
  ),
  "cmmd": ScorerType(
    options=(_CMMD_SOURCE,),
    load=lambda options: CmmdFeatures(load(options["clip_cmmd"], ("image",))),
  ),
}
