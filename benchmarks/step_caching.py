r"""What step caching spares a trained miniature, and what it does to its pictures.

  python -m benchmarks.step_caching --checkpoint=DIR

Draws the digits' evaluation prompts once without and once at each threshold. A row says
which share of the blocks the pictures asked for, how far they are from those without
(root mean square over all pixels, relative to these pixels' deviation), and in percent
how many show what their prompt says.
"""

import jax.numpy as jnp
import numpy as np
from absl import app, flags

from pixsigma_jax.data.digits import CELLS
from pixsigma_jax.evaluate.digits import evaluation_prompts, prompt_accuracy
from pixsigma_jax.models.layers import Compute
from pixsigma_jax.sample import Pipeline, pictures

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Of digits.", required=True)
_THRESHOLDS = flags.DEFINE_list(
  "thresholds", ["0", "0.05", "0.1", "0.15", "0.2", "0.3", "0.5"], "The first is 0."
)
_STEPS = flags.DEFINE_integer("num_inference_steps", 20, "Calls of the network.")
_SAMPLER = flags.DEFINE_string("sampler", "dpm++", "Solver.")
_PER_TASK = flags.DEFINE_integer("per_task", 50, "As in `evaluate`.")
_TASK = flags.DEFINE_string("task", "single", "Whose prompts, as in `evaluate`.")


def main(_: list[str]) -> None:
  """Entry point; flags are parsed."""
  pipeline = Pipeline.from_checkpoint(
    _CHECKPOINT.value, compute=Compute(dtype=jnp.float32), batch_size=25
  )
  prompts = [p for p in evaluation_prompts(0, _PER_TASK.value) if p.task == _TASK.value]
  rows, columns = CELLS[prompts[0].task]
  depth, exact = pipeline.config.depth, np.zeros(0)
  print(f"{len(prompts)} pictures, {_STEPS.value} steps of {_SAMPLER.value}")
  print("threshold  steps  blocks  difference  right")
  for threshold in map(float, _THRESHOLDS.value):
    output = pipeline(
      [p.prompt for p in prompts],
      height=rows * pipeline.resolution,
      width=columns * pipeline.resolution,
      num_inference_steps=_STEPS.value,
      sampler=_SAMPLER.value,
      step_caching=threshold,
    )
    images = [pictures.from_picture(image) for image in output.images]
    if not threshold:
      exact = np.stack(images)
    steps = np.mean([s.get("computed_steps", _STEPS.value) for s in output.settings])
    blocks = (steps * (depth - 1) / _STEPS.value + 1) / depth
    error = np.sqrt(np.mean((np.stack(images) - exact) ** 2)) / exact.std()
    right = np.mean(prompt_accuracy(images, [p.scene for p in prompts]))
    print(
      f"{threshold:9}{steps:7.1f}{100 * blocks:7.0f}%{100 * error:11.1f}%"
      f"{100 * right:6.1f}%",
      flush=True,
    )


if __name__ == "__main__":
  app.run(main)
