"""Autoencoder and text encoder: located, loaded, and released early.

A miniature's are made of its checkpoint's metadata alone. PixArt's own, a VAE and T5,
are files: a folder of diffusers with `vae/`, `text_encoder/` and `tokenizer/`.
"""

import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from absl import logging
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Bool, Float32

from pixsigma_jax.convert import files, t5, vae
from pixsigma_jax.models.autoencoders import autoencoder_from
from pixsigma_jax.models.text_encoders import text_encoder_from
from pixsigma_jax.wording import shortened

# What each release of PixArt was published with, on the hub.
HUB_IDS = {
  "sdxl-vae": "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers",
  "sd-vae": "PixArt-alpha/PixArt-XL-2-1024-MS",
}
_PARTS = ("vae", "text_encoder", "tokenizer")


@runtime_checkable  # the suite checks types as it runs
class Identities(Protocol):
  """Identities of the networks, in a checkpoint's metadata or a dataset's features."""

  @property
  def autoencoder(self) -> Mapping[str, Any]: ...

  @property
  def scaling_factor(self) -> float: ...

  @property
  def text_encoder(self) -> Mapping[str, Any]: ...


def load_autoencoder(
  metadata: Identities,
  source: str | os.PathLike[str] | None,
  *,
  dtype: DTypeLike,
  mesh: Mesh | None = None,
) -> Any:
  """Loads the autoencoder of a checkpoint's or of records' latents.

  Args:
    metadata: the checkpoint's metadata, or the features of the records.
    source: a folder or hub id as above; None for the release's own. Unused by models
      that need no files.

  Raises:
    FileNotFoundError: it is not there.
    ValueError: it is another autoencoder.
  """
  if not _has_files(metadata.autoencoder):
    return autoencoder_from(metadata.autoencoder, metadata.scaling_factor)
  autoencoder = vae.load_autoencoder(
    _folder(metadata, source) / "vae",
    dtype=dtype,
    mesh=mesh,
    scaling_factor=metadata.scaling_factor,
  )
  _refuse_another("VAE", autoencoder.identity, metadata.autoencoder)
  return autoencoder


def load_text_encoder(
  metadata: Identities,
  source: str | os.PathLike[str] | None,
  *,
  dtype: DTypeLike,
  mesh: Mesh | None = None,
) -> Any:
  """Loads the text encoder of their captions; arguments as above.

  Raises:
    FileNotFoundError: it is not there.
    ValueError: it is another text encoder.
  """
  if metadata.text_encoder.get("name") != "t5":
    return text_encoder_from(metadata.text_encoder)
  folder = _folder(metadata, source)
  logging.info("Loading T5 from %s.", folder / "text_encoder")
  encoder = t5.load_text_encoder(
    folder / "text_encoder", folder / "tokenizer", dtype=dtype, mesh=mesh
  )
  _refuse_another("text encoder", encoder.identity, metadata.text_encoder)
  return encoder


def _has_files(identity: Mapping[str, Any]) -> bool:
  return "downsampling" in identity


def _refuse_another(
  what: str, found: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
  if dict(found) != dict(wanted):
    raise ValueError(
      f"This needs the {what} {dict(wanted)}, and this one is "
      f"{dict(found)}: give its own with --frozen (when training config.frozen)."
    )


def _folder(
  metadata: Identities, source: str | os.PathLike[str] | None
) -> pathlib.Path:
  if source is None:
    name = metadata.autoencoder.get("name")
    if name not in HUB_IDS:
      raise ValueError(
        f"The model needs the autoencoder {metadata.autoencoder}, which is none of the "
        "published: say with --frozen (when training config.frozen) where it is."
      )
    source = HUB_IDS[name]
  return locate(source)


def locate(source: str | os.PathLike[str]) -> pathlib.Path:
  """The folder of the frozen networks: a local one, or the hub's copy in its cache.

  Raises:
    FileNotFoundError: it is neither a folder nor can it be fetched from the hub.
  """
  return files.hub_folder(
    source,
    [f"{part}/*" for part in _PARTS],
    "Give --frozen (when training config.frozen) a folder with "
    f"{', '.join(f'{part}/' for part in _PARTS)}.",
  )


class RememberedCaptions:
  """A text encoder with stored embeddings of some captions, without a network.

  With it T5 need not be in memory while images are drawn, nor on the machine at all.
  """

  def __init__(
    self,
    identity: Mapping[str, Any],
    texts: Sequence[str],
    embeddings: Float32[np.ndarray, "b t e"],
    mask: Bool[np.ndarray, "b t"],
  ):
    self.identity = dict(identity)
    self.width = embeddings.shape[-1]
    self._length = embeddings.shape[1]
    self._rows = {text: row for row, text in enumerate(texts)}
    self._embeddings, self._mask = embeddings, mask

  @classmethod
  def of(cls, encoder: Any, texts: Iterable[str], length: int) -> "RememberedCaptions":
    """Embeddings of `texts` and of the empty caption by `encoder`.

    Raises:
      ValueError: a text has more than `length` tokens.
    """
    texts = list(dict.fromkeys(["", *texts]))
    return cls(encoder.identity, texts, *encoder.encode(texts, length))

  @classmethod
  def load(cls, path: str | os.PathLike[str]) -> "RememberedCaptions":
    """Reads a file of `save`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged or something else.
    """
    weights = files.open_weights(path)
    note = files.note_in(pathlib.Path(path))
    if note is None or set(weights) != {"embeddings", "mask"}:
      raise ValueError(f"{path} does not hold captions that pixsigma_jax has saved.")
    embeddings = weights["embeddings"]
    return cls(note["identity"], note["texts"], embeddings, weights["mask"])

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes a safetensors file, whole or not at all."""
    note = {"identity": self.identity, "texts": list(self._rows)}
    arrays = {"embeddings": self._embeddings, "mask": self._mask}
    files.write_safetensors(pathlib.Path(path), arrays, note)

  def count(self, prompt: str) -> int:
    """Number of tokens of `prompt`, the end token included.

    Raises:
      ValueError: it is not among the remembered.
    """
    return int(self._mask[self._row(prompt)].sum())

  def encode(
    self, prompts: Sequence[str], length: int
  ) -> tuple[Float32[np.ndarray, "b t e"], Bool[np.ndarray, "b t"]]:
    """The remembered embeddings of each prompt, and their mask.

    Raises:
      ValueError: one is not among the remembered, or they are of another length.
    """
    if length != self._length:
      raise ValueError(
        f"These captions were remembered at {self._length} tokens, and {length} are "
        "asked for: encode them again for this model."
      )
    rows = [self._row(prompt) for prompt in prompts]
    return self._embeddings[rows], self._mask[rows]

  def _row(self, prompt: str) -> int:
    if prompt not in self._rows:
      raise ValueError(
        f"The caption {shortened(prompt)} is not among the {len(self._rows)} that were "
        "remembered: encode it too, or load the text encoder."
      )
    return self._rows[prompt]
