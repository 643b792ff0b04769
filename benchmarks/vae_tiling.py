"""How far decoding in blended tiles is from decoding the whole image.

  python -m benchmarks.vae_tiling --weights=FOLDER --side=2048 --tiles=1024
  python -m benchmarks.vae_tiling

The first takes a trained autoencoder in diffusers' layout and prints what counts. The
second takes random weights at a quarter of SDXL's widths; these have learned nothing of
how images continue past a border, so it shows the size of the effect, not its measure.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from pixsigma_jax.convert.vae import load_autoencoder
from pixsigma_jax.models.vae import KLAutoencoder, VAEConfig, abstract_params

FLAGS = flags.FLAGS
flags.DEFINE_string("weights", None, "folder of an AutoencoderKL; None: random weights")
flags.DEFINE_integer("side", 768, "of the image, in pixels")
flags.DEFINE_multi_integer("tiles", [256, 384, 512], "sides of tiles, in pixels")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of activations")


def random_autoencoder(dtype: str) -> KLAutoencoder:
  """A quarter of SDXL's widths; kernels keep a signal's size, norms are fresh."""
  config = VAEConfig(channels=(32, 64, 128, 128), norm_groups=8)
  random = np.random.default_rng(0)

  def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    name = path[-1].key
    if name != "kernel":
      return np.full(leaf.shape, name == "scale", np.float32)
    spread = np.prod(leaf.shape[:-1]) ** -0.5
    return (random.normal(size=leaf.shape) * spread).astype(np.float32)

  params = jax.tree_util.tree_map_with_path(draw, abstract_params(config))
  return KLAutoencoder(
    config=config, params=params, scaling_factor=0.13025, dtype=jnp.dtype(dtype)
  )


def images(side: int) -> dict[str, np.ndarray]:
  """Latents `[1 h h 4]` of unit variance: noise, and forms as wide as the image."""
  random = np.random.default_rng(1)
  noise = random.normal(size=(1, side, side, 4)).astype(np.float32)
  coarse = jnp.asarray(random.normal(size=(1, 4, 4, 4)), jnp.float32)
  forms = np.asarray(jax.image.resize(coarse, noise.shape, "cubic"))
  forms = (forms - forms.mean()) / forms.std()
  return {"noise": noise, "forms": 0.9 * forms + 0.436 * noise}


def main(argv: list[str]) -> None:
  """Prints a row for each image and size of tile."""
  del argv
  if FLAGS.weights:
    whole = load_autoencoder(FLAGS.weights, dtype=FLAGS.dtype)
  else:
    whole = random_autoencoder(FLAGS.dtype)
  whole = dataclasses.replace(whole, tile_size=FLAGS.side)
  print("latents  tile   rms difference  grey levels (mean, 99.9 %)")
  for name, latents in images(FLAGS.side // whole.downsampling).items():
    expected = whole.decode(latents)
    for tile in FLAGS.tiles:
      ours = dataclasses.replace(whole, tile_size=tile).decode(latents)
      error = np.abs(ours - expected)
      relative = np.sqrt(np.mean(error**2)) / expected.std()
      grey = 127.5 * error
      print(
        f"{name:8}{tile:5}{100 * relative:15.1f} %{grey.mean():11.2f}"
        f"{np.quantile(grey, 0.999):9.2f}",
        flush=True,
      )


if __name__ == "__main__":
  app.run(main)
