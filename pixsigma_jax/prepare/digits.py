"""The records of the miniature: captioned images of handwritten digits."""

import pathlib
from collections.abc import Container, Iterator

import numpy as np

from pixsigma_jax.data import digits
from pixsigma_jax.data.digits import Scene
from pixsigma_jax.data.records import Record
from pixsigma_jax.models.hashed_words import HashedWordEncoder
from pixsigma_jax.models.pixels import PixelAutoencoder
from pixsigma_jax.prepare.drawn import check_drawing, pixel_features, write_drawn

# Pairs are harder to draw than single digits, and there are 63 times as many of them.
WEIGHTS = {"single": 0.2, "left_of": 0.4, "above": 0.4}
CAPTION_LENGTH = 16  # tokens; the longest phrase of the miniature has 11


def prepare_digits(
  directory: pathlib.Path,
  *,
  resolution: int,
  count: int,
  seed: int,
  scaling_factor: float,
) -> bool:
  """Writes `count` images with all their captions.

  Args:
    directory: new, empty, or left behind by an interrupted run, which starts over.
    resolution: pixels along a side of one digit's cell; a multiple of 8.
    count: records.
    seed: which scenes and handwriting; the same at every resolution.
    scaling_factor: what the trainer multiplies latents with.

  Returns:
    Whether anything was written; False if the very same dataset was there already.

  Raises:
    ValueError: an argument is out of its range.
    FileExistsError: the directory holds another dataset, or files of someone else.
    OSError: a file cannot be written.
  """
  if resolution < digits.CELL or resolution % digits.CELL:
    raise ValueError(
      f"resolution {resolution} must be a multiple of {digits.CELL}, the side of a "
      "scanned digit in pixels."
    )
  check_drawing(count, seed)
  features = pixel_features(
    resolution=resolution,
    caption_length=CAPTION_LENGTH,
    scaling_factor=scaling_factor,
  )
  null_captions, _ = HashedWordEncoder().encode([""], CAPTION_LENGTH)
  return write_drawn(
    directory,
    features,
    null_captions[0],
    lambda numbers: _records(resolution, count, seed, numbers),
    count=count,
  )


def _records(
  resolution: int, count: int, seed: int, numbers: Container[int]
) -> Iterator[Record]:
  """Yields those of the `count` records whose number is among `numbers`."""
  scenes = digits.training_scenes(seed, count, WEIGHTS)
  for i, (scene, glyphs) in enumerate(scenes):
    if i in numbers:
      yield _record(f"digits-{seed}-{i:06d}", scene, glyphs, resolution)


def _record(
  name: str, scene: Scene, glyphs: tuple[int, ...], resolution: int
) -> Record:
  """One image and all the ways to ask for it."""
  image = digits.render(scene, glyphs, resolution)
  captions = [
    (caption, kind)
    for kind, texts in digits.captions(scene).items()
    for caption in texts
  ]
  texts, kinds = zip(*captions, strict=True)
  embeddings, mask = HashedWordEncoder().encode(texts, CAPTION_LENGTH)
  return Record(
    id=name,
    captions=texts,
    caption_kinds=kinds,
    caption_lengths=mask.sum(axis=-1, dtype=np.int32),
    caption_embeddings=embeddings[mask].astype(np.float16),
    original_size=np.array(image.shape[:2], np.int32),
    crop=np.array([0, 0, *image.shape[:2]], np.float32),
    latents=PixelAutoencoder().encode(image[None])[0].astype(np.float16),
  )
