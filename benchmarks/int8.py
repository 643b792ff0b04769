r"""What 8-bit integers do to a network's output, and to a miniature's images.

  python -m benchmarks.int8 --variant=XL/2
  python -m benchmarks.int8 --checkpoint=DIR

The first takes random weights, a latent of 256 pixels and a caption of 120 tokens, and
prints how far each block and the output are from float32, relative in root mean square.
The second draws the digits' evaluation prompts with and without, and prints how far the
images are apart, relative to their deviation, and how many show what they should.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.digit_images import draw, percent_apart, percent_right, prompts_of
from pixsigma_jax.models import int8
from pixsigma_jax.models.block import Block
from pixsigma_jax.models.layers import Compute
from pixsigma_jax.models.pixart import (
  PixArt,
  PixArtConfig,
  abstract_params,
  laid_out,
)
from pixsigma_jax.sample import Pipeline

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Of digits.")
_VARIANT = flags.DEFINE_string("variant", "XL/2", "Of random weights.")
_PER_TASK = flags.DEFINE_integer("per_task", 50, "As in `evaluate`.")


def main(_: list[str]) -> None:
  """Entry point; flags are parsed."""
  if _CHECKPOINT.value is None:
    _network(
      PixArtConfig.from_variant(_VARIANT.value, base_size=16, pe_interpolation=0.5)
    )
  else:
    _images(_CHECKPOINT.value)


def _network(config: PixArtConfig) -> None:
  draw = np.random.default_rng(0)

  def kernel(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    fan_in = leaf.shape[-2] if leaf.ndim > 1 else 100
    return draw.standard_normal(leaf.shape, np.float32) * fan_in**-0.5

  params = jax.tree.map(kernel, abstract_params(config))
  inputs = (
    jnp.asarray(draw.standard_normal((1, 32, 32, 4), np.float32)),
    jnp.full(1, 500.0),
    jnp.asarray(draw.standard_normal((1, 300, 4096), np.float32)),
    jnp.arange(300)[None] < 120,
  )
  model = PixArt(config, Compute(dtype=jnp.float32, unroll=True))

  def trace(params: dict) -> list[np.ndarray]:
    seen = []

    def record(call, arguments, keywords, context):
      result = call(*arguments, **keywords)
      if isinstance(context.module, Block):
        seen.append(np.asarray(result[0]))
      return result

    with nn.intercept_methods(record):
      output = model.apply({"params": laid_out(params, model.compute)}, *inputs)
    return [*seen, np.asarray(output)]

  exact, ours = trace(params), trace(int8.quantize(params))
  for place, (a, b) in enumerate(zip(ours, exact, strict=True)):
    name = f"block {place}" if place < config.depth else "output"
    print(f"{name:9}{100 * np.linalg.norm(a - b) / np.linalg.norm(b):6.2f}%")


def _images(checkpoint: str) -> None:
  prompts = prompts_of("single", _PER_TASK.value)
  print(f"{len(prompts)} images, 20 steps\nquantize  difference  right")
  exact = np.zeros(0)
  for quantize in ("none", "int8"):
    pipeline = Pipeline.from_checkpoint(
      checkpoint, compute=Compute(dtype=jnp.float32), batch_size=25, quantize=quantize
    )
    images, _ = draw(pipeline, prompts)
    exact = images if quantize == "none" else exact
    print(
      f"{quantize:9}{percent_apart(images, exact):10.1f}%"
      f"{percent_right(images, prompts):6.1f}%",
      flush=True,
    )


if __name__ == "__main__":
  app.run(main)
