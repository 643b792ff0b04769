"""Images a second of each part of `prepare`, one after the other.

  python -m benchmarks.prepare --resolutions=256,512,1024

The image side on one core: a JPEG of a photograph of twice the size is decoded,
cropped and written as PNG. The accelerator side on what there is: SDXL's VAE at its
full size, and a T5 of XXL's width with `--t5_layers` of its 24 layers, random weights.
"""

import io
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from PIL import Image

from pixsigma_jax import command, sharding
from pixsigma_jax.data.buckets import BUCKETS
from pixsigma_jax.data.crops import CropRule, filter_at
from pixsigma_jax.data.image_bytes import open_image
from pixsigma_jax.models import t5, vae

_RESOLUTIONS = flags.DEFINE_list("resolutions", ["256", "512", "1024"], "Of images.")
_T5_LAYERS = flags.DEFINE_integer("t5_layers", 2, "Of T5; XXL has 24.")
_CAPTION_LENGTH = 300


def seconds(run: Callable[[], object], times: int) -> float:
  """The least time of a few."""
  taken = []
  for _ in range(times):
    began = time.perf_counter()
    run()
    taken.append(time.perf_counter() - began)
  return min(taken)


def random_params(abstract: object) -> object:
  """Small random weights of these shapes."""
  draw = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: jnp.asarray(draw.normal(0, 0.02, leaf.shape), leaf.dtype), abstract
  )


def image_side(resolution: int) -> dict[str, float]:
  """Seconds of decoding, cropping, writing a PNG and reading it."""
  import skimage.data

  photograph = Image.fromarray(skimage.data.astronaut())
  side = 2 * resolution
  file = io.BytesIO()
  photograph.resize((side * 3 // 2, side)).save(file, "jpeg", quality=90)
  rule = CropRule(BUCKETS[resolution], filter_at(resolution))
  image = open_image(file.getvalue())
  cropped = rule.apply(image)
  png = io.BytesIO()
  cropped.save(png, "png", compress_level=1)
  return {
    "decode": seconds(lambda: open_image(file.getvalue()), 5),
    "crop": seconds(lambda: rule.apply(image), 5),
    "write PNG": seconds(
      lambda: cropped.save(io.BytesIO(), "png", compress_level=1), 5
    ),
    "read PNG": seconds(lambda: Image.open(io.BytesIO(png.getvalue())).load(), 5),
  }


def encode_images(resolution: int) -> float:
  """Seconds of the VAE for one image."""
  config = vae.VAEConfig()
  autoencoder = vae.KLAutoencoder(
    config=config,
    params=random_params(vae.abstract_params(config)),
    scaling_factor=0.13025,
    dtype=jnp.float32,
    mesh=sharding.single_device_mesh(),
    tile_size=resolution,
  )
  image = np.zeros((1, resolution, resolution, 3), np.float32)
  autoencoder.moments(image)
  return seconds(lambda: autoencoder.moments(image), 2)


def encode_captions(layers: int) -> float:
  """Seconds of T5 for one caption of 300 tokens."""
  config = t5.T5Config(
    width=4096,
    num_layers=layers,
    num_heads=64,
    head_width=64,
    hidden=10240,
    vocabulary=32128,
  )
  encoder = t5.T5Encoder(config, jnp.bfloat16)
  params = random_params(t5.abstract_t5_params(config))
  ids = jnp.ones((1, _CAPTION_LENGTH), jnp.int32)
  mask = jnp.ones((1, _CAPTION_LENGTH), bool)
  run = jax.jit(lambda params: encoder.apply({"params": params}, ids, mask))
  jax.block_until_ready(run(params))
  return seconds(lambda: jax.block_until_ready(run(params)), 2)


def main(_: list[str]) -> None:
  """Entry point; flags are parsed."""
  devices = ", ".join(sorted({device.device_kind for device in jax.devices()}))
  print(f"Images a second; the VAE and T5 on {len(jax.devices())} x {devices}")
  print("| resolution | decode | crop | write PNG | read PNG | VAE |")
  print("|---|---|---|---|---|---|")
  for resolution in map(int, _RESOLUTIONS.value):
    parts = [*image_side(resolution).values(), encode_images(resolution)]
    cells = " | ".join(f"{1 / part:.3g}" for part in parts)
    print(f"| {resolution} | {cells} |", flush=True)
  rate = 1 / encode_captions(_T5_LAYERS.value)
  print(
    f"T5 of XXL's width, {_T5_LAYERS.value} of 24 layers: {rate:.3g} captions of "
    f"{_CAPTION_LENGTH} tokens a second"
  )


if __name__ == "__main__":
  command.run(main)
