"""Trains a small KL autoencoder, and holds it against no training and against JPEG.

The network is `models/vae.py`. Its loss is |x - x'| + (x - x')², a mean over values,
and the divergence of the posterior from a unit Gaussian (Kingma and Welling 2014,
appendix B). Rombach et al. 2022 add a perceptual and an adversarial term, for detail
that looks right where it cannot be right; there is neither here, as what counts is the
error.

FOLDER/vae         the autoencoder, as `convert` and `--frozen=FOLDER` read it
FOLDER/facts.json  what it was trained with, and what its latents are like
"""

import dataclasses
import functools
import io
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jaxtyping import Array, Float, Float32, UInt8
from PIL import Image
from sklearn.datasets import load_sample_image

from pixsigma_jax import command, disk
from pixsigma_jax.convert.vae import load_autoencoder, write_autoencoder
from pixsigma_jax.data import digits
from pixsigma_jax.data.digits import Item
from pixsigma_jax.models.vae import (
  Decoder,
  Encoder,
  KLAutoencoder,
  VAEConfig,
  abstract_params,
)
from pixsigma_jax.sample import image_files
from pixsigma_jax.wording import install

# Of scikit-image's wheel; scikit-learn has one of each split beside them.
_TRAINING = ("astronaut", "coffee", "rocket", "hubble_deep_field", "retina")
_HELD_OUT = ("chelsea",)
_CELL = 32  # pixels along a side of a digit
_DIGITS = 2048  # of them to train on

_SIZES = ("channels", "blocks_per_level", "latent_channels", "norm_groups")


def photographs(split: Literal["training", "held_out"]) -> list[Image.Image]:
  """Photographs in the wheels of scikit-learn and scikit-image, whole ones a split.

  Raises:
    ValueError: scikit-image is not installed.
  """
  try:
    from skimage import data
  except ModuleNotFoundError as error:
    if error.name != "skimage":
      raise
    raise ValueError(
      f"The photographs need scikit-image, which is not installed: {install('eval')}."
    ) from None
  names, own = {
    "training": (_TRAINING, "china.jpg"),
    "held_out": (_HELD_OUT, "flower.jpg"),
  }[split]
  arrays = [*(getattr(data, name)() for name in names), load_sample_image(own)]
  return [Image.fromarray(array) for array in arrays]


def digit_cells(
  split: digits.Split, count: int, seed: int
) -> Float32[np.ndarray, "n side side 3"]:
  """Single colored digits of `_CELL` pixels in [-1, 1], in a split's handwriting."""
  draw = np.random.default_rng(seed)
  cells = []
  for _ in range(count):
    color, digit = str(draw.choice(list(digits.COLORS))), int(draw.integers(10))
    glyph = int(draw.choice(digits.handwriting(split, digit)))
    cells.append(digits.render(digits.Scene((Item(color, digit),)), [glyph], _CELL))
  return np.stack(cells)


def composed(
  cells: Float32[np.ndarray, "n side side 3"], rows: int
) -> Float32[np.ndarray, "H W 3"]:
  """A square image of rows² cells."""
  grid = cells.reshape(rows, rows, _CELL, _CELL, 3).transpose(0, 2, 1, 3, 4)
  return grid.reshape(rows * _CELL, rows * _CELL, 3)


def init_params(config: VAEConfig, key: Array) -> Any:
  """Fresh parameters: kernels of variance 1 / fan-in, norms that only normalize."""
  leaves, structure = jax.tree_util.tree_flatten_with_path(abstract_params(config))
  keys = jax.random.split(key, len(leaves))

  def fresh(path: Any, shape: tuple[int, ...], key: Array) -> Array:
    if path[-1].key == "kernel":
      return jax.random.normal(key, shape) * np.prod(shape[:-1]) ** -0.5
    return jnp.ones(shape) if path[-1].key == "scale" else jnp.zeros(shape)

  return jax.tree_util.tree_unflatten(
    structure,
    [
      fresh(path, leaf.shape, key)
      for (path, leaf), key in zip(leaves, keys, strict=True)
    ],
  )


@dataclasses.dataclass(frozen=True)
class Trained:
  """A trained autoencoder.

  Attributes:
    folder: where it lies, for `--frozen`.
    autoencoder: the network.
    mean, std: of each channel of its latents of digits, unscaled.
  """

  folder: pathlib.Path
  autoencoder: KLAutoencoder
  mean: Sequence[float]
  std: Sequence[float]

  @classmethod
  def read(cls, folder: pathlib.Path) -> "Trained":
    """Reads what `train` wrote."""
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    found = load_autoencoder(folder / "vae", dtype=jnp.float32)
    return cls(folder, found, facts["mean"], facts["std"])


def train(config: Mapping[str, Any], folder: pathlib.Path) -> Trained:
  """Trains an autoencoder, unless it is there already.

  Args:
    config: of `configs/vae_tiny.py`.
    folder: of this one config alone; interrupted, it starts over.

  Raises:
    ValueError: scikit-image is not installed.
  """
  if (folder / "facts.json").exists():
    return Trained.read(folder)
  sizes = VAEConfig(**{name: config[name] for name in _SIZES})
  params = init_params(sizes, jax.random.key(config["seed"]))
  tx = optax.adamw(
    optax.cosine_decay_schedule(config["learning_rate"], config["total_steps"]),
    weight_decay=0.0,
  )
  step = jax.jit(
    functools.partial(_step, tx=tx, config=sizes, kl_weight=config["kl_weight"])
  )
  photos = [np.asarray(photo) for photo in photographs("training")]
  cells = digit_cells("training", _DIGITS, seed=config["seed"])
  state, began = tx.init(params), time.monotonic()
  numbers = command.progress(
    range(config["total_steps"]), config["total_steps"], f"Autoencoder {folder.name}"
  )
  loss: Any = float("nan")
  for number in numbers:
    draw = np.random.default_rng([config["seed"], number])
    side = config["crops"][number % len(config["crops"])]
    batch = _batch(draw, photos, cells, side, config)
    key = jax.random.fold_in(jax.random.key(config["seed"]), number)
    params, state, loss = step(params, state, batch, key)
  logging.info("Loss %.4f after %.0f s.", loss, time.monotonic() - began)
  return _write(folder, params, sizes, config, cells)


def _step(
  params: Any,
  state: Any,
  images: Float[Array, "b H W 3"],
  key: Array,
  *,
  tx: optax.GradientTransformation,
  config: VAEConfig,
  kl_weight: float,
) -> tuple[Any, Any, Array]:
  """One update; returns parameters, the optimizer's state and the loss before."""

  def loss_of(params: Any) -> Array:
    encoder, decoder = Encoder(config, jnp.float32), Decoder(config, jnp.float32)
    moments: Any = encoder.apply({"params": params["encoder"]}, images)
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    noise = jax.random.normal(key, mean.shape)
    latents = mean + jnp.exp(log_variance / 2) * noise
    found: Any = decoder.apply({"params": params["decoder"]}, latents)
    error = found - images
    divergence = (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance) / 2
    kl = divergence.sum(axis=(1, 2, 3)).mean() / (images.shape[1] * images.shape[2])
    return (jnp.abs(error) + jnp.square(error)).mean() + kl_weight * kl

  loss, gradients = jax.value_and_grad(loss_of)(params)
  updates, state = tx.update(gradients, state, params)
  return optax.apply_updates(params, updates), state, loss


def _batch(
  draw: np.random.Generator,
  photos: Sequence[UInt8[np.ndarray, "_ _ 3"]],
  cells: Float32[np.ndarray, "n side side 3"],
  side: int,
  config: Mapping[str, Any],
) -> Float32[np.ndarray, "b side2 side2 3"]:
  """Crops of photographs, mirrored as often as not, and composed digits."""
  count, rows = config["batch_pixels"] // side**2, side // _CELL
  images = []
  for _ in range(round(config["photographs"] * count)):
    photo = photos[int(draw.integers(len(photos)))]
    top, left = (int(draw.integers(n - side + 1)) for n in photo.shape[:2])
    crop = photo[top : top + side, left : left + side].astype(np.float32) / 127.5 - 1
    images.append(crop[:, :: draw.choice([-1, 1])])
  while len(images) < count:
    images.append(composed(cells[draw.integers(len(cells), size=rows**2)], rows))
  return np.stack(images)


def _write(
  folder: pathlib.Path,
  params: Any,
  sizes: VAEConfig,
  config: Mapping[str, Any],
  cells: Float32[np.ndarray, "n side side 3"],
) -> Trained:
  params = jax.device_get(params)
  raw = KLAutoencoder(
    config=sizes, params=params, scaling_factor=1.0, dtype=jnp.float32
  )
  latents = np.concatenate([raw.encode(part) for part in np.split(cells[:512], 8)])
  # As Rombach et al. 2022, appendix G, for latents of about unit variance.
  factor = round(1 / float(latents.std()), 5)
  facts = {
    "config": dict(config),
    "mean": latents.mean(axis=(0, 1, 2)).tolist(),
    "std": latents.std(axis=(0, 1, 2)).tolist(),
  }
  if not (folder / "vae").exists():
    write_autoencoder(
      folder / "vae", params, sizes, layout="diffusers", scaling_factor=factor
    )
  # The facts last: they say that all of it is there.
  disk.write_text(folder / "facts.json", json.dumps(facts, indent=2) + "\n")
  return Trained.read(folder)


def held_out_images(side: int) -> dict[str, list[Image.Image]]:
  """Square images that no autoencoder was trained on: photographs and digits.

  Args:
    side: in pixels, a multiple of 32.
  """
  photos = [image_files.fit(photo, side, side) for photo in photographs("held_out")]
  rows = side // _CELL
  sheet = composed(digit_cells("reader", rows**2, seed=3), rows)
  return {"photographs": photos, "digits": [image_files.to_image(sheet)]}


def psnr(a: Image.Image, b: Image.Image) -> float:
  """Peak signal-to-noise ratio of two images of eight bits, in dB."""
  error = np.asarray(a, np.float64) - np.asarray(b, np.float64)
  return float(20 * np.log10(255) - 10 * np.log10(np.mean(error**2)))


def through(autoencoder: KLAutoencoder, image: Image.Image) -> tuple[Image.Image, int]:
  """An image through its latents at eight bits each, and how many bytes these are."""
  latents = autoencoder.encode(np.asarray(image_files.from_image(image))[None])
  low, high = (f(latents, axis=(0, 1, 2), keepdims=True) for f in (np.min, np.max))
  step = np.maximum(high - low, 1e-12) / 255
  levels = np.round((latents - low) / step)
  found = autoencoder.decode((levels * step + low).astype(np.float32))
  return image_files.to_image(found[0]), latents.size


def jpeg(image: Image.Image, most: int) -> Image.Image:
  """The image as the best JPEG of at most so many bytes.

  Raises:
    ValueError: not even the worst is as small.
  """
  for quality in range(95, 0, -1):
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=quality, optimize=True)
    if buffer.tell() <= most:
      with Image.open(buffer) as found:
        return found.convert("RGB")
  raise ValueError(
    f"No JPEG of {image.width} x {image.height} has {most} bytes or less."
  )


def compared(models: Mapping[str, KLAutoencoder], side: int) -> dict[str, Any]:
  """PSNR of held-out images through autoencoders, and through JPEG of as many bytes.

  Args:
    models: by name, with latents of the same size.
    side: of the images in pixels.

  Returns:
    `psnr`, name → kind of image → mean in dB, JPEG among the names; and `bytes` of an
    image's latents.
  """
  found: dict[str, dict[str, float]] = {}
  sizes = set()
  for kind, images in held_out_images(side).items():
    for name, model in models.items():
      values = []
      for image in images:
        reconstructed, size = through(model, image)
        sizes.add(size)
        values.append(psnr(image, reconstructed))
      found.setdefault(name, {})[kind] = float(np.mean(values))
    [size] = sizes
    values = [psnr(image, jpeg(image, size)) for image in images]
    found.setdefault("JPEG", {})[kind] = float(np.mean(values))
  return {"psnr": found, "bytes": sizes.pop(), "side": side}


def untrained(config: Mapping[str, Any]) -> KLAutoencoder:
  """The network of a config before any step."""
  sizes = VAEConfig(**{name: config[name] for name in _SIZES})
  params = init_params(sizes, jax.random.key(config["seed"]))
  return KLAutoencoder(
    config=sizes, params=params, scaling_factor=1.0, dtype=jnp.float32
  )
