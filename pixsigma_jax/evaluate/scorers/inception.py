"""Features of Inception-v3: of whole images by each published resize, of patches."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import pyarrow as pa
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float32, UInt8
from PIL import Image

from pixsigma_jax import sharding
from pixsigma_jax.convert.inception import load_inception
from pixsigma_jax.evaluate.items import Item
from pixsigma_jax.evaluate.metrics import patch_positions, patches
from pixsigma_jax.evaluate.options import Option
from pixsigma_jax.evaluate.scorers import Scorer, ScorerType, features, shared
from pixsigma_jax.models.inception import (
  CLASSES,
  FEATURES,
  SIZE,
  Inception,
  Variant,
  normalized,
  resize_clean,
  resize_tensorflow,
  resize_textatlas,
)

_PER_DEVICE = 16  # images of 299 x 299 that a device computes together
_PATCHES = 20  # of an image, as UltraHR-100K cuts them
_PATCH_SEED = 42

_FID_FILE = Option(
  "inception", None, "Weights of FID's Inception-v3, pt_inception-2015-12-05-*.pth."
)
_TORCHVISION_FILE = Option(
  "inception_torchvision",
  None,
  "Weights of torchvision's Inception-v3, inception_v3_google-*.pth.",
)

Resize = Callable[[UInt8[np.ndarray, "_ _ 3"]], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
  """Inception-v3 on this process's devices, with batches of one size.

  Attributes:
    variant: see `models.inception`.
    params: whole on each device.
    hash: SHA-256 of the weights' file.
    mesh: devices that share a batch.
  """

  variant: Variant
  params: Any
  hash: str
  mesh: Mesh

  @property
  def batch_size(self) -> int:
    return _PER_DEVICE * self.mesh.size

  def __call__(
    self, pixels: Float32[np.ndarray, "n 299 299 3"]
  ) -> tuple[Float32[np.ndarray, "n 2048"], Float32[np.ndarray, "n k"]]:
    """Features and class probabilities of pixels in [0, 255]."""
    found: list[np.ndarray] = []
    probabilities: list[np.ndarray] = []
    place = NamedSharding(self.mesh, P(self.mesh.axis_names))
    for start in range(0, len(pixels), self.batch_size):
      part = pixels[start : start + self.batch_size]
      rest = self.batch_size - len(part)
      batch = jax.device_put(np.pad(part, [(0, rest)] + [(0, 0)] * 3), place)
      outputs = _features(self.params, batch, variant=self.variant)
      for kept, output in zip((found, probabilities), outputs, strict=True):
        kept.append(np.asarray(output)[: len(part)])
    return np.concatenate(found), np.concatenate(probabilities)


@functools.partial(jax.jit, static_argnames=("variant",))
def _features(
  params: Any, pixels: Float32[Array, "b 299 299 3"], *, variant: Variant
) -> tuple[Float32[Array, "b 2048"], Float32[Array, "b k"]]:
  with jax.default_matmul_precision("highest"):
    network: Any = Inception(variant)
    found, logits = network.apply({"params": params}, normalized(pixels, variant))
  return found, jax.nn.softmax(logits)


@shared
def _network(path: str, variant: Variant) -> Network:
  """The network of a file, one for all scorers that take it."""
  params, digest = load_inception(path, variant)
  devices = jax.local_devices()
  mesh = sharding.make_mesh(data=-1, fsdp=1, context=1, devices=devices)
  params = jax.device_put(params, NamedSharding(mesh, P()))
  return Network(variant, params, digest, mesh)


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFeatures:
  """Features and class probabilities of whole images.

  Attributes:
    network: that makes them.
    resize: name of the resize, part of the identity.
    to_pixels: the resize itself.
  """

  network: Network
  resize: str
  to_pixels: Resize

  @property
  def batch_size(self) -> int:
    return self.network.batch_size

  def identity(self) -> dict[str, str]:
    return _identity(self.network) | {"resize": self.resize}

  def schema(self) -> pa.Schema:
    classes = CLASSES[self.network.variant]
    return pa.schema(
      [("features", features(FEATURES)), ("probabilities", features(classes))]
    )

  def __call__(
    self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], items: Sequence[Item]
  ) -> Mapping[str, Any]:
    pixels = np.stack([self.to_pixels(image) for image in images])
    found, probabilities = self.network(pixels.astype(np.float32))
    return {"features": found, "probabilities": probabilities}


@dataclasses.dataclass(frozen=True, eq=False)
class PatchFeatures:
  """Features of patches at an image's own resolution, equal places for equal sizes.

  Attributes:
    network: that makes them.
    batch_size: large images are held one at a time.
  """

  network: Network
  batch_size: int = 1

  def identity(self) -> dict[str, str]:
    cut = f"{_PATCHES} of {SIZE} x {SIZE}, seed {_PATCH_SEED}"
    return _identity(self.network) | {"resize": "none", "patches": cut}

  def schema(self) -> pa.Schema:
    return pa.schema([("features", features(_PATCHES * FEATURES))])

  def __call__(
    self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], items: Sequence[Item]
  ) -> Mapping[str, Any]:
    rows = []
    for image in images:
      height, width = image.shape[:2]
      positions = patch_positions(
        height, width, size=SIZE, count=_PATCHES, seed=_PATCH_SEED
      )
      found, _ = self.network(patches(image, positions, SIZE).astype(np.float32))
      rows.append(found.reshape(-1))
    return {"features": np.stack(rows)}


def _identity(network: Network) -> dict[str, str]:
  return {
    "weights": f"Inception-v3, {network.variant}",
    "sha256": network.hash,
    "version": "1",
  }


def _textatlas(image: UInt8[np.ndarray, "_ _ 3"]) -> np.ndarray:
  return resize_textatlas(Image.fromarray(image))


def _loader(
  option: Option, variant: Variant, make: Callable[[Network], Scorer]
) -> ScorerType:
  def load(options: Mapping[str, Any]) -> Scorer:
    path = options[option.name]
    if path is None:
      raise ValueError(
        f"Give --{option.name}=FILE: {option.help[0].lower()}{option.help[1:]}"
      )
    return make(_network(path, variant))

  return ScorerType(options=(option,), load=load)


SCORERS = {
  "fid": _loader(
    _FID_FILE, "fid", lambda n: ImageFeatures(n, "tensorflow", resize_tensorflow)
  ),
  "fid-clean": _loader(
    _FID_FILE, "fid", lambda n: ImageFeatures(n, "clean", resize_clean)
  ),
  "fid-textatlas": _loader(
    _TORCHVISION_FILE,
    "torchvision",
    lambda n: ImageFeatures(n, "textatlas", _textatlas),
  ),
  "fid-patch": _loader(_FID_FILE, "fid", PatchFeatures),
}
