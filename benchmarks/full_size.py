"""XL/2 of the published size beside diffusers, and one image through the pipeline.

  python -m benchmarks.full_size --directory=DIR

Random weights at full size: transformer (0.6 B) and SDXL's autoencoder; T5 as wide as
XXL but two layers deep, since 4.8 B of random numbers show nothing more. Compares one
forward pass at 256 pixels with diffusers', in float32, then draws at 512 pixels.
"""

import pathlib
import time

import jax.numpy as jnp
import numpy as np
import torch
from absl import app, flags
from diffusers.models.transformers.pixart_transformer_2d import (
  PixArtTransformer2DModel,
)

from pixsigma_jax.convert import model, pixart, verify
from pixsigma_jax.models.layers import Compute
from pixsigma_jax.models.pixart import PixArtConfig
from pixsigma_jax.sample import Pipeline
from tests.convert.published import write_t5, write_tokenizer
from tests.convert.published_vae import make_vae

_DIRECTORY = flags.DEFINE_string("directory", None, "Where to write.", required=True)
_STEPS = flags.DEFINE_integer("num_inference_steps", 4, "Of the image.")

CONFIG = PixArtConfig.from_variant("XL/2", base_size=32, pe_interpolation=1.0)


def main(_: list[str]) -> None:
  """Entry point; flags are parsed."""
  directory = pathlib.Path(_DIRECTORY.value)
  _write_folder(directory)
  given = model.Given(caption_length=300, scaling_factor=0.13025)
  converted = model.read(directory / "transformer", "diffusers", given)
  inputs = _inputs_at_256()
  theirs = model.run(
    directory / "transformer", "diffusers", converted, inputs, ema=False
  )
  ours = verify.run_ours(converted.config, converted.params, inputs)
  worst = max(verify.compare(theirs, ours), key=lambda found: found.relative)
  output = verify.compare(theirs, ours)[-1]
  print(f"256 px, float32: the output differs by {output.absolute:.1e} at most,")
  print(f"{output.relative:.1e} of the largest number; the worst is {worst}")

  model.write(directory / "run", "orbax", converted)
  del converted, theirs, ours
  pipeline = Pipeline.from_checkpoint(
    directory / "run",
    frozen=directory,
    compute=Compute(dtype=jnp.float32, attention="chunked"),
  )
  began = time.perf_counter()
  draw = {"height": 512, "width": 512, "num_inference_steps": _STEPS.value}
  image = pipeline("a red fox in the snow", **draw).images[0]
  seconds = time.perf_counter() - began
  image.save(directory / "fox.png")
  print(f"{image.size} in {seconds:.0f} s, {_STEPS.value} guided steps, compiling too")


def _write_folder(directory: pathlib.Path) -> None:
  """A folder as diffusers saves it, of the published sizes but for T5's depth."""
  torch.manual_seed(0)
  transformer: torch.nn.Module = PixArtTransformer2DModel.from_config(  # pyright: ignore
    pixart.diffusers_config(CONFIG)
  )
  with torch.no_grad():
    for parameter in transformer.parameters():
      fan_in = parameter.shape[-1] if parameter.ndim > 1 else 100
      parameter.normal_(0, min(1.0, fan_in**-0.5))
  transformer.save_pretrained(directory / "transformer")  # pyright: ignore
  make_vae((128, 256, 512, 512), 32).save_pretrained(directory / "vae")
  write_t5(directory / "text_encoder", width=4096)
  write_tokenizer(directory / "tokenizer")


def _inputs_at_256() -> verify.Inputs:
  draw = np.random.default_rng(0)
  mask = np.arange(300)[None] < np.array([[120]])
  return verify.Inputs(
    latents=draw.standard_normal((1, 32, 32, 4), np.float32),
    timesteps=np.array([500], np.float32),
    caption_embeddings=draw.standard_normal((1, 300, 4096), np.float32),
    caption_mask=mask,
    image_size=np.array([[256, 256]], np.float32),
    aspect_ratio=np.ones(1, np.float32),
  )


if __name__ == "__main__":
  app.run(main)
