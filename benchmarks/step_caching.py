r"""What step caching spares a trained miniature, and what it does to its images.

  python -m benchmarks.step_caching --checkpoint=DIR

Draws the digits' evaluation prompts once without and once at each threshold. A row says
which share of the blocks the images asked for, how far they are from those without
(root mean square over all pixels, relative to these pixels' deviation), and in percent
how many show what their prompt says.
"""

import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.digit_images import draw, percent_apart, percent_right, prompts_of
from pixsigma_jax.models.layers import Compute
from pixsigma_jax.sample import Pipeline

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
  prompts = prompts_of(_TASK.value, _PER_TASK.value)
  depth, exact = pipeline.config.depth, np.zeros(0)
  print(f"{len(prompts)} images, {_STEPS.value} steps of {_SAMPLER.value}")
  print("threshold  steps  blocks  difference  right")
  for threshold in map(float, _THRESHOLDS.value):
    images, settings = draw(
      pipeline,
      prompts,
      num_inference_steps=_STEPS.value,
      sampler=_SAMPLER.value,
      step_caching=threshold,
    )
    exact = exact if threshold else images
    steps = np.mean([s.get("computed_steps", _STEPS.value) for s in settings])
    blocks = (steps * (depth - 1) / _STEPS.value + 1) / depth
    print(
      f"{threshold:9}{steps:7.1f}{100 * blocks:7.0f}%"
      f"{percent_apart(images, exact):11.1f}%{percent_right(images, prompts):6.1f}%",
      flush=True,
    )


if __name__ == "__main__":
  app.run(main)
