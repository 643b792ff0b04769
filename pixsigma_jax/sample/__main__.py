"""Draws prompts with a trained model, as PNG files that say how they were made.

  python -m pixsigma_jax.sample --checkpoint=DIR --prompt=TEXT --output=DIR

Files are numbered on from the highest number that is there. Each carries its prompt,
seed and all settings in text chunks of the PNG.
"""

import pathlib

import jax.numpy as jnp
from absl import flags, logging

from pixsigma_jax import command
from pixsigma_jax.models.layers import Compute
from pixsigma_jax.sample import pictures
from pixsigma_jax.sample.pipeline import SAMPLERS, Output, Pipeline

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "A run's workdir, or one of its snapshots.", required=True
)
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write to.", required=True)
_PROMPT = flags.DEFINE_multi_string("prompt", [], "What to draw; may be repeated.")
_PROMPTS_FILE = flags.DEFINE_string(
  "prompts_file", None, "Text file with a prompt a line, after those of --prompt."
)
_NEGATIVE_PROMPT = flags.DEFINE_string(
  "negative_prompt", "", "What guidance leads away from."
)
_HEIGHT = flags.DEFINE_multi_integer(
  "height", None, "Pixels: once for all prompts, or once for each; the training's else."
)
_WIDTH = flags.DEFINE_multi_integer("width", None, "As --height.")
_NUM_INFERENCE_STEPS = flags.DEFINE_integer(
  "num_inference_steps", 20, "Calls of the network."
)
_GUIDANCE_SCALE = flags.DEFINE_float(
  "guidance_scale", 4.5, "How far guidance goes; 1 draws without."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the first picture; the next has one more.")
_SAMPLER = flags.DEFINE_enum("sampler", "dpm++", list(SAMPLERS), "Solver.")
_NUM_IMAGES_PER_PROMPT = flags.DEFINE_integer(
  "num_images_per_prompt", 1, "Pictures of each prompt."
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 1, "Pictures drawn at once; more are faster if they are small."
)
_DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", ["bfloat16", "float32"], "Precision of the network."
)
_GRID = flags.DEFINE_bool("grid", False, "Also write all pictures in one, grid.png.")


def main(_: list[str]) -> None:
  """Entry point; flags are parsed."""
  prompts = list(_PROMPT.value)
  if _PROMPTS_FILE.value is not None:
    prompts += _read_prompts(pathlib.Path(_PROMPTS_FILE.value))
  if not prompts:
    raise ValueError("Give --prompt=TEXT, once or more, or --prompts_file=FILE.")
  directory = pathlib.Path(_OUTPUT.value)
  if directory.exists() and not directory.is_dir():
    raise NotADirectoryError(f"--output={directory} is a file: give a directory.")

  pipeline = Pipeline.from_checkpoint(
    _CHECKPOINT.value,
    compute=Compute(dtype=jnp.dtype(_DTYPE.value)),
    batch_size=_BATCH_SIZE.value,
  )
  drawn = pipeline.stream(
    prompts,
    negative_prompt=_NEGATIVE_PROMPT.value,
    height=_side(_HEIGHT.value),
    width=_side(_WIDTH.value),
    num_inference_steps=_NUM_INFERENCE_STEPS.value,
    guidance_scale=_GUIDANCE_SCALE.value,
    seed=_SEED.value,
    sampler=_SAMPLER.value,
    num_images_per_prompt=_NUM_IMAGES_PER_PROMPT.value,
  )
  directory.mkdir(parents=True, exist_ok=True)
  first = pictures.next_number(directory)
  output = Output([], [])
  total = len(prompts) * _NUM_IMAGES_PER_PROMPT.value
  for number, picture, settings in command.progress(drawn, total, "Pictures"):
    path = directory / f"{first + number:05d}.png"
    pictures.save(path, picture, settings)
    print(path, flush=True)
    if _GRID.value:
      output.images.append(picture)
      output.settings.append(settings)
  if _GRID.value:
    path = directory / "grid.png"
    if path.exists():
      path = directory / f"grid-{first:05d}.png"
      logging.info("grid.png is of earlier pictures; these are in %s.", path.name)
    about = {"prompts": prompts, "first": f"{first:05d}.png"}
    pictures.save(path, output.grid(), about)
    print(path)


def _side(values: list[int] | None) -> int | list[int] | None:
  return values[0] if values is not None and len(values) == 1 else values


def _read_prompts(path: pathlib.Path) -> list[str]:
  try:
    lines = path.read_text(encoding="utf-8").splitlines()
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} is not a text file in UTF-8: {error}.") from error
  return [line.strip() for line in lines if line.strip()]


if __name__ == "__main__":
  command.run(main)
