"""Loads the frozen networks for preparing, and tells what they make."""

import dataclasses
import hashlib
import math
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh

from pixsigma_jax import sharding
from pixsigma_jax.convert import files, t5
from pixsigma_jax.data.crops import identity_hash
from pixsigma_jax.data.records import Features
from pixsigma_jax.models.t5 import T5Config, T5TextEncoder
from pixsigma_jax.models.vae import KLAutoencoder
from pixsigma_jax.prepare.settings import Settings

_WEIGHTS = re.compile(r"(diffusion_pytorch_)?model(-\d+-of-\d+)?\.safetensors")


def features_of(
  settings: Settings,
  autoencoder: KLAutoencoder,
  t5_config: T5Config,
  *,
  resolution: int,
  crop_rule: Mapping[str, Any],
  license: str = "",
) -> Features:
  """Features that the records will have; see `records.Features`."""
  folder = pathlib.Path(settings.frozen)
  hashes = {
    "autoencoder": weights_hash(folder / "vae"),
    "crop_rule": identity_hash(crop_rule),
  }
  if settings.captions == "embeddings":
    hashes["text_encoder"] = weights_hash(folder / "text_encoder")
  return Features(
    kind="latent_moments",
    channels=autoencoder.channels,
    resolution=resolution,
    autoencoder=autoencoder.identity,
    scaling_factor=autoencoder.scaling_factor,
    text_encoder={"name": "t5", "width": t5_config.width},
    caption_storage=settings.captions,
    caption_length=settings.caption_length,
    caption_width=t5_config.width,
    crop_rule=crop_rule,
    hashes=hashes,
    license=license,
  )


def weights_hash(folder: pathlib.Path) -> str:
  """SHA-256 of a network's files of weights, in the order of their names, in hex.

  Raises:
    FileNotFoundError: there are none.
  """
  found = sorted(folder.iterdir()) if folder.is_dir() else []
  paths = [path for path in found if _WEIGHTS.fullmatch(path.name)]
  if not paths:  # under any other name
    kinds = (".safetensors", *files.PICKLES)
    paths = [path for path in found if path.suffix in kinds]
  if not paths:  # arrays of our own: many small files in folders
    inside = [path for path in found if path.is_dir()]
    paths = sorted(path for top in inside for path in top.rglob("*") if path.is_file())
  if not paths:
    raise FileNotFoundError(f"There are no weights in {folder}.")
  logging.info("Hashing %d file(s) of %s.", len(paths), folder)
  digest = hashlib.sha256()
  for path in paths:
    with open(path, "rb") as file:
      while block := file.read(1 << 22):
        digest.update(block)
  return digest.hexdigest()


def mesh_of(devices: Sequence[Any], *, data: int) -> Mesh:
  """The devices, `data` groups of them with a copy of a network each."""
  return sharding.make_mesh(data=data, fsdp=-1, context=1, devices=devices)


def in_tiles(
  autoencoder: KLAutoencoder, sizes: Iterable[tuple[int, int]], tile_size: int | None
) -> KLAutoencoder:
  """The VAE with tiles of that size, or as large as the largest image if None.

  Args:
    sizes: height and width of the images in pixels.
  """
  if tile_size is None:
    unit = 2 * autoencoder.downsampling  # the smallest tile that there is
    tile_size = max([max(size) for size in sizes], default=unit)
    tile_size = max(unit, -(-tile_size // unit) * unit)
  return dataclasses.replace(autoencoder, tile_size=tile_size)


def text_encoder(
  folder: pathlib.Path, settings: Settings, config: T5Config, devices: Sequence[Any]
) -> T5TextEncoder:
  """T5, its layers split over the devices; or only what counts tokens."""
  if settings.captions == "text":
    return T5TextEncoder(
      config=config,
      params={},
      tokenizer=t5.load_tokenizer(folder / "tokenizer"),
      dtype=jnp.float32,
      mesh=mesh_of(devices[:1], data=1),
    )
  inner = config.num_heads * config.head_width
  split = math.gcd(len(devices), config.width, inner, config.hidden)
  return t5.load_text_encoder(
    folder / "text_encoder",
    folder / "tokenizer",
    dtype=settings.text_dtype,
    mesh=mesh_of(devices, data=len(devices) // split),
  )
