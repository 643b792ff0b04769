"""Reuses what an update leaves as it was: records of images that have not changed."""

import pathlib

import numpy as np
from jaxtyping import Float16

from pixsigma_jax.data import records
from pixsigma_jax.data.records import Features, Record, open_dataset
from pixsigma_jax.prepare import contents
from pixsigma_jax.prepare.compare import as_json
from pixsigma_jax.prepare.contents import Contents


class Previous:
  """Records from before an update, of images that have not changed."""

  def __init__(
    self, directory: pathlib.Path, features: Features, made_of: Contents | None
  ):
    self.moments_hold = self.embeddings_hold = False
    self._numbers: dict[int, int] = {}  # hash of the id → record
    self._unchanged: frozenset[str] = frozenset()
    there = contents.previous_of(directory)
    if made_of is None or not (there / records.MANIFEST).exists():
      return
    self._dataset = open_dataset(there)
    before, was = contents.read(there), self._dataset.manifest.features
    if before is None:
      return
    self.moments_hold = before.settings["tile_size"] == made_of.settings[
      "tile_size"
    ] and _equal(was, features, "autoencoder", "crop_rule", "resolution", "kind")
    self.embeddings_hold = (
      features.caption_storage == was.caption_storage == "embeddings"
      and before.settings["text_dtype"] == made_of.settings["text_dtype"]
      and _equal(was, features, "text_encoder", "caption_width", "caption_length")
    )
    hashes = self._dataset.index["id_hash"].tolist()
    self._numbers = {name: number for number, name in enumerate(hashes)}
    if len(self._numbers) < len(hashes):  # ids that come twice
      self._numbers = {}
    self._unchanged = before.unchanged_images(made_of)

  def record(self, id: str) -> Record | None:
    """The record of an image as it was before."""
    number = self._numbers.get(records.id_hash(id))
    if number is None or not (self.moments_hold or self.embeddings_hold):
      return None
    return self._dataset[number]

  def moments(self, before: Record | None) -> Float16[np.ndarray, "h w m"] | None:
    """Moments of an image's earlier record, if its cropped image is unchanged."""
    if before is None or not self.moments_hold or before.id not in self._unchanged:
      return None
    return before.latent_moments

  def embeddings(self, before: Record | None) -> dict[str, Float16[np.ndarray, "t e"]]:
    """Embeddings of the captions in an earlier record."""
    if before is None or not self.embeddings_hold:
      return {}
    return {text: before.embeddings(i) for i, text in enumerate(before.captions)}


def _equal(one: Features, other: Features, *names: str) -> bool:
  """Whether fields, and hashes of these names, are the same."""
  return all(
    as_json(one).get(name) == as_json(other).get(name)
    and one.hashes.get(name) == other.hashes.get(name)
    for name in names
  )
