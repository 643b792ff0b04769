"""The records of OpenMoji's scenes: drawn, encoded, and under their license.

By default latents are the pixels and captions hashed words, for models that are trained
on a laptop. With the folder of a VAE and T5 they are what PixArt's stages read, at any
resolution up to 4096 pixels: real drawings, not enlarged ones.
"""

import dataclasses
import pathlib
from collections.abc import Container, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32

from pixsigma_jax.convert import t5, vae
from pixsigma_jax.data import openmoji
from pixsigma_jax.data.openmoji import Boxes, Scene
from pixsigma_jax.data.records import Features, Record
from pixsigma_jax.models.hashed_words import HashedWordEncoder
from pixsigma_jax.models.pixels import PixelAutoencoder
from pixsigma_jax.prepare import load
from pixsigma_jax.prepare.drawn import (
  CROP_RULE,
  check_drawing,
  pixel_features,
  write_drawn,
)
from pixsigma_jax.prepare.settings import Settings

CAPTION_LENGTH = 32  # tokens; names have up to seven words
MOST_PIXELS = 4096  # along a side of the square that a resolution stands for

# Records by which a finished dataset is known again: few, as one of 4096 pixels takes
# seconds.
_COMPARED = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
  """What is drawn; see `openmoji.training_scenes`.

  Attributes:
    resolution: side in pixels of the square whose area images nearly have.
    count: records.
    seed: decides scenes, the same at every resolution.
    objects: different ones, the first of `openmoji.names`; 0 for all.
    pairs: share of scenes with two objects.
  """

  resolution: int
  count: int
  seed: int = 0
  objects: int = 0
  pairs: float = 0.75

  def __post_init__(self):
    openmoji.size("square", self.resolution)
    if self.resolution > MOST_PIXELS:
      raise ValueError(
        f"resolution {self.resolution} must be at most {MOST_PIXELS} pixels."
      )
    check_drawing(self.count, self.seed)

  def scenes(self) -> Iterator[tuple[Scene, Boxes]]:
    """Every scene in order, with the boxes of its objects."""
    return openmoji.training_scenes(
      self.seed, self.count, objects=self.objects, pairs=self.pairs
    )


def prepare_openmoji(
  directory: pathlib.Path,
  drawing: Drawing,
  *,
  scaling_factor: float = 1.0,
  settings: Settings | None = None,
  devices: Sequence[Any] | None = None,
) -> bool:
  """Writes scenes of OpenMoji with their captions and license.

  Args:
    directory: new, empty, or left behind by an interrupted run, which starts over.
    scaling_factor: what the trainer multiplies pixels with; the VAE has its own.
    settings: of the VAE and T5; None for pixels and hashed words.
    devices: that share the VAE and T5; this process's own if None.

  Returns:
    Whether anything was written; False if the very same dataset was there already.

  Raises:
    ValueError: an argument is out of its range, or a caption too long.
    ModuleNotFoundError: the extra `openmoji` is not installed.
    FileExistsError: the directory holds another dataset, or files of someone else.
    FileNotFoundError: a network's files are missing.
    OSError: a file cannot be written.
  """
  if settings is None:
    networks = _pixels(drawing, scaling_factor)
  else:
    networks = _frozen(drawing, settings, devices or jax.local_devices())
  next(drawing.scenes())  # refuses what cannot be drawn before a directory is there
  null_caption = None
  if networks.features.caption_storage == "embeddings":
    null_caption = networks.text_encoder.encode([""], networks.length)[0][0]
  return write_drawn(
    directory,
    networks.features,
    null_caption,
    lambda numbers: _records(drawing, networks, numbers),
    count=drawing.count,
    compared=_COMPARED,
  )


@dataclasses.dataclass(frozen=True)
class _Networks:
  """Autoencoder and text encoder, and the features that they make."""

  features: Features
  autoencoder: Any
  text_encoder: Any

  @property
  def length(self) -> int:
    return self.features.caption_length

  def latents(self, image: Float32[np.ndarray, "H W 3"]) -> dict[str, Any]:
    """The image's latents or their moments, by the name of the record's field."""
    if self.features.kind == "latents":
      return {"latents": self.autoencoder.encode(image[None])[0].astype(np.float16)}
    moments = np.concatenate(self.autoencoder.moments(image[None]), axis=-1)[0]
    return {"latent_moments": moments.astype(np.float16)}

  def captions(self, texts: Sequence[str]) -> dict[str, Any]:
    """Fields of the record that hold the captions' tokens."""
    if self.features.caption_storage == "text":
      lengths = [self.text_encoder.count(text) for text in texts]
      return {
        "caption_lengths": np.array(lengths, np.int32),
        "caption_embeddings": None,
      }
    embeddings, mask = self.text_encoder.encode(texts, self.length)
    return {
      "caption_lengths": mask.sum(axis=-1, dtype=np.int32),
      "caption_embeddings": embeddings[mask].astype(np.float16),
    }


def _license() -> str:
  about = openmoji.license()
  return f"{about['attribution']} ({about['url']}). {about['source']}"


def _pixels(drawing: Drawing, scaling_factor: float) -> _Networks:
  features = pixel_features(
    resolution=drawing.resolution,
    caption_length=CAPTION_LENGTH,
    scaling_factor=scaling_factor,
    license=_license(),
  )
  return _Networks(features, PixelAutoencoder(scaling_factor), HashedWordEncoder())


def _frozen(drawing: Drawing, settings: Settings, devices: Sequence[Any]) -> _Networks:
  folder = pathlib.Path(settings.frozen)
  mesh = load.mesh_of(devices, data=1)
  autoencoder = vae.load_autoencoder(folder / "vae", dtype=jnp.float32, mesh=mesh)
  sizes = [openmoji.size(shape, drawing.resolution) for shape in openmoji.SHAPES]
  t5_config = t5.text_encoder_config(folder / "text_encoder")
  features = load.features_of(
    settings,
    autoencoder,
    t5_config,
    resolution=drawing.resolution,
    crop_rule=CROP_RULE,
    license=_license(),
  )
  return _Networks(
    features,
    load.in_tiles(autoencoder, sizes, settings.tile_size),
    load.text_encoder(folder, settings, t5_config, devices),
  )


def _records(
  drawing: Drawing, networks: _Networks, numbers: Container[int]
) -> Iterator[Record]:
  """Yields those records whose number is among `numbers`."""
  for i, (scene, boxes) in enumerate(drawing.scenes()):
    if i in numbers:
      yield _record(f"openmoji-{drawing.seed}-{i:06d}", scene, boxes, drawing, networks)


def _record(
  name: str, scene: Scene, boxes: Boxes, drawing: Drawing, networks: _Networks
) -> Record:
  pixels = openmoji.render(scene, boxes, drawing.resolution)
  image: Float[np.ndarray, "H W 3"] = pixels.astype(np.float32)
  image /= 127.5
  image -= 1
  ways = openmoji.captions(scene)
  captions = [(text, kind) for kind, texts in ways.items() for text in texts]
  texts, kinds = zip(*captions, strict=True)
  return Record(
    id=name,
    captions=texts,
    caption_kinds=kinds,
    original_size=np.array(image.shape[:2], np.int32),
    crop=np.array([0, 0, *image.shape[:2]], np.float32),
    license=networks.features.license,
    **networks.captions(texts),
    **networks.latents(image),
  )
