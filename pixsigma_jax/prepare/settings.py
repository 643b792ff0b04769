"""Settings of the features that are made of cropped images and captions."""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

from pixsigma_jax.data.records import CaptionStorage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """Settings that turn cropped images and captions into features.

  Attributes:
    frozen: folder with vae/, text_encoder/ and tokenizer/ as diffusers saves them. For
      captions as text, text_encoder/ needs only its config.json.
    captions: whether records hold captions' embeddings or only their text.
    caption_length: tokens that a caption may have.
    truncate_captions: whether longer ones are cut, instead of dropped.
    text_dtype: of T5: bfloat16 or float32.
    batch_size: images that the VAE encodes at once; None for as many as have the
      pixels of one 1024² image on each device, 16 at most.
    tile_size: side in pixels of the VAE's tiles, for a device without the memory for
      whole images; None for whole ones, which alone equal the reference.
  """

  frozen: str
  captions: CaptionStorage = "embeddings"
  caption_length: int = 300
  truncate_captions: bool = False
  text_dtype: DTypeLike = jnp.bfloat16
  batch_size: int | None = None
  tile_size: int | None = None

  def __post_init__(self):
    if self.caption_length < 1:
      raise ValueError(f"caption_length {self.caption_length} must be at least 1.")
    if self.batch_size is not None and self.batch_size < 1:
      raise ValueError(f"batch_size {self.batch_size} must be at least 1.")
