"""Encodes images and captions: through VAE and T5 into records."""

import collections
import concurrent.futures
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Float16, Float32

from pixsigma_jax.data.records import Record
from pixsigma_jax.models.t5 import T5TextEncoder
from pixsigma_jax.models.vae import KLAutoencoder
from pixsigma_jax.prepare.cropped_images import CroppedImage, CroppedImages, Refusal
from pixsigma_jax.prepare.reuse import Previous
from pixsigma_jax.prepare.settings import Settings
from pixsigma_jax.sample import image_files

# A caption that is on its way into a record: text, kind, tokens.
Caption: TypeAlias = tuple[str, str, int]

# What one device encodes at once unless told otherwise: the pixels of one 1024² image,
# and no more than so many images.
_PIXELS_AT_ONCE, _IMAGES_AT_ONCE = 1024**2, 16
# Images whose captions are embedded together, at least: T5 takes 16 at a time.
_IMAGES_AT_ONCE = 8


class Encode:
  """The records of a shard of cropped images, by its number."""

  def __init__(
    self,
    images: CroppedImages,
    settings: Settings,
    autoencoder: KLAutoencoder,
    encoder: T5TextEncoder,
    num_devices: int,
    previous: Previous,
  ):
    self._images, self._settings, self._previous = images, settings, previous
    self._autoencoder, self._encoder = autoencoder, encoder
    fitting = _PIXELS_AT_ONCE // images.resolution**2
    each = min(max(1, fitting), _IMAGES_AT_ONCE)
    self._batch = settings.batch_size or num_devices * each

  def __call__(self, shard: int) -> Iterator[Record | Refusal]:
    # By size, so that a program of one shape is run on full batches; within a size, in
    # the index's order.
    positions: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
    for position, size in enumerate(self._images.sizes(shard)):
      positions[size].append(position)
    at_once = self._batch * -(-_IMAGES_AT_ONCE // self._batch)
    chunks = [
      positions[size][start : start + at_once]
      for size in positions
      for start in range(0, len(positions[size]), at_once)
    ]
    for loaded in _ahead(self._images, shard, chunks):
      yield from self._encoded(loaded)

  def _encoded(
    self, loaded: Sequence[tuple[CroppedImage, Float32[np.ndarray, "H W 3"]]]
  ) -> Iterator[Record | Refusal]:
    captions: list[list[Caption]] = []
    kept = []
    for cropped, image in loaded:
      fitting, refusals = _fitting(cropped, self._encoder, self._settings)
      yield from refusals
      if fitting:
        kept.append((cropped, image))
        captions.append(fitting)
      else:
        yield Refusal(id=cropped.id, reason="has no caption that fits")
    if not kept:
      return
    before = [self._previous.record(cropped.id) for cropped, _ in kept]
    moments = self._moments([image for _, image in kept], before)
    embeddings = self._embeddings(captions, before)
    for i, (cropped, _) in enumerate(kept):
      texts, kinds, lengths = zip(*captions[i], strict=True)
      yield Record(
        id=cropped.id,
        captions=texts,
        caption_kinds=kinds,
        caption_lengths=np.array(lengths, np.int32),
        caption_embeddings=embeddings[i],
        original_size=cropped.original_size,
        crop=cropped.crop,
        aesthetic_score=cropped.aesthetic_score,
        latent_moments=moments[i],
      )

  def _moments(
    self,
    images: Sequence[Float32[np.ndarray, "H W 3"]],
    before: Sequence[Record | None],
  ) -> list[Float16[np.ndarray, "h w m"]]:
    """Mean and log-variance; computed in float32, in batches of one shape."""
    moments = [self._previous.moments(record) for record in before]
    asked = [i for i, there in enumerate(moments) if there is None]
    for start in range(0, len(asked), self._batch):
      numbers = asked[start : start + self._batch]
      batch = np.stack([images[i] for i in numbers])
      missing = self._batch - len(batch)
      filled = np.concatenate([batch, batch[:1].repeat(missing, axis=0)])
      both = np.concatenate(self._autoencoder.moments(filled), axis=-1)
      with np.errstate(over="ignore"):  # infinity is found where records are checked
        for i, row in zip(numbers, both.astype(np.float16), strict=False):
          moments[i] = row
    return [row for row in moments if row is not None]

  def _embeddings(
    self, captions: Sequence[Sequence[Caption]], before: Sequence[Record | None]
  ) -> list[Float16[np.ndarray, "n e"]] | list[None]:
    """Token embeddings of each image's captions, one caption after the other."""
    if self._settings.captions == "text":
      return [None] * len(captions)
    known = [self._previous.embeddings(record) for record in before]
    asked = [
      (i, text)
      for i, own in enumerate(captions)
      for text, _, _ in own
      if text not in known[i]
    ]
    if asked:
      texts = [text for _, text in asked]
      embeddings, mask = self._encoder.encode(texts, self._settings.caption_length)
      with np.errstate(over="ignore"):
        for (i, text), row, valid in zip(asked, embeddings, mask, strict=True):
          known[i][text] = row[valid].astype(np.float16)
    return [
      np.concatenate([known[i][text] for text, _, _ in own])
      for i, own in enumerate(captions)
    ]


def _fitting(
  cropped: CroppedImage, encoder: T5TextEncoder, settings: Settings
) -> tuple[list[Caption], list[Refusal]]:
  """The captions of an image that get into its record, and those that do not."""
  limit, captions, refusals = settings.caption_length, [], []

  def refuse(reason: str, text: str, what: str = "caption") -> None:
    refusals.append(Refusal(id=cropped.id, reason=reason, detail=text[:200], what=what))

  for text, kind in cropped.captions:
    text = text.strip()  # all that the reference does to captions before it embeds them
    count = encoder.count(text)
    if count > limit and text and settings.truncate_captions:
      text, end = encoder.truncated(text, limit)
      refuse(f"was cut at {limit} tokens", end, "caption end")
      count = encoder.count(text)
    if not text:
      refuse("is empty", text)
    elif count > limit:
      refuse(f"has more than {limit} tokens", f"{count} tokens: {text}")
    else:
      captions.append((text, kind, count))
  return captions, refusals


def _ahead(
  images: CroppedImages, shard: int, chunks: Sequence[Sequence[int]]
) -> Iterator[list[tuple[CroppedImage, Float32[np.ndarray, "H W 3"]]]]:
  """Chunks of cropped images with pixels, the next decoded while one is in use."""

  def decode(cropped: CroppedImage) -> tuple[CroppedImage, np.ndarray]:
    return cropped, image_files.from_image(cropped.image())

  with concurrent.futures.ThreadPoolExecutor() as pool:
    waiting = collections.deque()
    for chunk in chunks:
      read = images.read(shard, chunk)
      waiting.append([pool.submit(decode, cropped) for cropped in read])
      if len(waiting) > 1:
        yield [future.result() for future in waiting.popleft()]
    for futures in waiting:
      yield [future.result() for future in futures]
