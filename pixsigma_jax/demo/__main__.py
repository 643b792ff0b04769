"""Serves a page on which a trained model draws prompts.

  python -m pixsigma_jax.demo --checkpoint=DIR

It needs the extra `demo`. Only this machine can see it, unless --host says otherwise.
"""

import dataclasses

from absl import flags

from pixsigma_jax import command
from pixsigma_jax.convert.source_flags import (
  CHECKPOINT_HELP,
  FROZEN_HELP,
  SourceFlags,
)
from pixsigma_jax.models import attention
from pixsigma_jax.sample import devices
from pixsigma_jax.sample.model_flags import ModelFlags
from pixsigma_jax.sample.pipeline import Pipeline
from pixsigma_jax.sample.program import compute_here
from pixsigma_jax.wording import install

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint",
  None,
  CHECKPOINT_HELP,
  required=True,
)
_SOURCE = SourceFlags()
_FROZEN = flags.DEFINE_string(
  "frozen",
  None,
  FROZEN_HELP,
)
_MODELS = ModelFlags()
_DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", ["bfloat16", "float32"], "Precision of the networks."
)
_ATTENTION = flags.DEFINE_enum(
  "attention",
  "auto",
  list(attention.CHOICES),
  "Its implementation; auto takes what suits the devices and the image's size.",
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 1, "Images drawn at once; more are faster if they are small."
)
_MESH = flags.DEFINE_string("mesh", "auto", devices.MESH_HELP)
_MAX_N = flags.DEFINE_integer("max_n", 16, "Images of a request, at most.")
_MAX_STEPS = flags.DEFINE_integer("max_steps", 100, "Steps of an image, at most.")
_MAX_PIXELS = flags.DEFINE_integer(
  "max_pixels",
  None,
  "Pixels of an image, at most; 4 times the training's by default.",
)
_MAX_UPLOAD = flags.DEFINE_integer(
  "max_upload", 20 << 20, "Bytes of an image or a mask to edit, at most."
)
_MAX_QUEUE = flags.DEFINE_integer(
  "max_queue", 128, "Requests that may wait; what comes after them is refused."
)
_HOST = flags.DEFINE_string(
  "host", "127.0.0.1", "Address to listen at; 0.0.0.0 lets the network in."
)
_PORT = flags.DEFINE_integer("port", 7860, "Port to listen at.")


def main(_: list[str]) -> None:
  """Entry point; flags are parsed."""
  try:
    from pixsigma_jax.demo import page
  except ModuleNotFoundError as error:
    if error.name != "gradio":
      raise
    raise ValueError(f"The page needs Gradio: {install('demo')}.") from error

  limits = page.Limits(
    max_n=_MAX_N.value,
    max_steps=_MAX_STEPS.value,
    max_pixels=_MAX_PIXELS.value,
    max_upload=_MAX_UPLOAD.value,
    max_queue=_MAX_QUEUE.value,
  )
  command.keep_compiled()
  pipeline = Pipeline.from_checkpoint(
    _CHECKPOINT.value,
    frozen=_FROZEN.value,
    compute=compute_here(_DTYPE.value, _ATTENTION.value),
    batch_size=_BATCH_SIZE.value,
    mesh=_MESH.value,
    **_MODELS.values(),
    **dataclasses.asdict(_SOURCE.values()),
  )
  server = page.serve(pipeline, _HOST.value, _PORT.value, limits)
  print(f"Open {server.local_url}   Ctrl-C ends it.", flush=True)
  page.wait(server)


if __name__ == "__main__":
  command.run(main)
