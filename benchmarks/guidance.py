r"""What each guidance does to a trained miniature's images, as numbers and an image.

  python -m benchmarks.guidance --checkpoint=weights/miniature --image=FILE.png

Draws the digits' evaluation prompts with each. A row says how far the images are from
those of the first row (root mean square over all pixels, relative to these pixels'
deviation), their own deviation, and in percent how many show what their prompt says. A
row of the image has the first prompts, from the same noise.
"""

import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.digit_images import draw, percent_apart, percent_right, prompts_of
from pixsigma_jax.models.layers import Compute
from pixsigma_jax.sample import Pipeline, image_files

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Of digits.", required=True)
_WEAKER = flags.DEFINE_string("autoguidance", None, "A weaker one; none draws without.")
_IMAGE = flags.DEFINE_string("image", None, "PNG to write; none by default.")
_PER_TASK = flags.DEFINE_integer("per_task", 50, "As in `evaluate`.")
_TASK = flags.DEFINE_string("task", "left_of", "Whose prompts, as in `evaluate`.")
_STEPS = flags.DEFINE_integer("num_inference_steps", 20, "Calls of the network.")

_COLUMNS = 8
# Name → settings; the first row is what the others are compared with.
_ROWS: dict[str, dict[str, Any]] = {
  "cfg 4.5": {},
  "none": {"guidance_scale": 1.0},
  "cfg 9": {"guidance_scale": 9.0},
  "cfg 9, rescale 0.7": {"guidance_scale": 9.0, "guidance_rescale": 0.7},
  "cfg 9, interval 0.2-0.8": {"guidance_scale": 9.0, "guidance_interval": (0.2, 0.8)},
  "apg 9": {"guidance_scale": 9.0, "guidance_method": "apg"},
  "cfg-zero 4.5": {"guidance_method": "cfg-zero"},
  "pag 3": {"pag_scale": 3.0, "guidance_scale": 1.0},
  "cfg 4.5, pag 3": {"pag_scale": 3.0},
  "skip layer 1": {"skip_layer_guidance_scale": 1.0, "guidance_scale": 1.0},
  "cfg 4.5, skip layer 1": {"skip_layer_guidance_scale": 1.0},
}
_OF_THE_WEAKER: dict[str, dict[str, Any]] = {
  "autoguidance 2": {"autoguidance_scale": 2.0, "guidance_scale": 1.0},
  "cfg 4.5, autoguidance 2": {"autoguidance_scale": 2.0},
}


def main(_: list[str]) -> None:
  """Entry point; flags are parsed."""
  pipeline = Pipeline.from_checkpoint(
    _CHECKPOINT.value,
    compute=Compute(dtype=jnp.float32),
    batch_size=25,
    autoguidance=_WEAKER.value,
  )
  prompts = prompts_of(_TASK.value, _PER_TASK.value)
  rows = _ROWS | (_OF_THE_WEAKER if _WEAKER.value else {})
  exact, shown, labels = np.zeros(0), [], []
  print(f"{len(prompts)} images, {_STEPS.value} steps")
  print(f"{'guidance':26}difference  deviation   right")
  for name, settings in rows.items():
    images = draw(
      pipeline, prompts, num_inference_steps=_STEPS.value, seed=1, **settings
    )[0]
    exact = exact if len(exact) else images
    print(
      f"{name:26}{percent_apart(images, exact):9.1f}%{images.std():11.3f}"
      f"{percent_right(images, prompts):7.1f}%",
      flush=True,
    )
    shown += map(image_files.to_image, images[:_COLUMNS])
    labels += [name, *[""] * (_COLUMNS - 1)]
  if _IMAGE.value is not None:
    image_files.grid(shown, _COLUMNS, labels).save(pathlib.Path(_IMAGE.value))


if __name__ == "__main__":
  app.run(main)
