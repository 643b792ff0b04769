"""Draws prompts with a trained model, as pictures that say how they were made.

  python -m pixsigma_jax.sample --checkpoint=DIR --prompt=TEXT --output=DIR

Files are numbered on from the highest number that is there. Each carries its prompt,
seed and all settings: in text chunks of a PNG, in the EXIF comment of a WebP or JPEG.
"""

import json
import pathlib
import sys
from typing import Any

import jax
from absl import flags, logging
from jax.sharding import Mesh

from pixsigma_jax import checkpoint, command, sharding
from pixsigma_jax.diffusion.solvers import SAMPLERS
from pixsigma_jax.models import attention
from pixsigma_jax.models.layers import Compute
from pixsigma_jax.sample import captions, pictures
from pixsigma_jax.sample.frozen import RememberedCaptions, load_text_encoder
from pixsigma_jax.sample.pipeline import (
  QUANTIZATIONS,
  UNCONDITIONAL_MASKS,
  Output,
  Pipeline,
)
from pixsigma_jax.sample.program import compute_here
from pixsigma_jax.sample.timing import Timing
from pixsigma_jax.wording import shortened

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "A run's workdir, or one of its snapshots.", required=True
)
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write to.", required=True)
_FROZEN = flags.DEFINE_string(
  "frozen",
  None,
  "Folder with vae/, text_encoder/ and tokenizer/ as diffusers saves them, or the id "
  "of one on the hub. By default what the model was published with, from the hub.",
)
_PROMPT = flags.DEFINE_multi_string("prompt", [], "What to draw; may be repeated.")
_PROMPTS_FILE = flags.DEFINE_string(
  "prompts_file",
  None,
  "Prompts after those of --prompt, one a line; - for standard input. In a .jsonl file "
  "a line is an object: prompt, and its own negative_prompt, height, width or seed.",
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
  "guidance_scale", 4.5, "How far guidance goes; 1 draws without (lcm, dmd)."
)
_GUIDANCE_RESCALE = flags.DEFINE_float(
  "guidance_rescale", 0.0, "Share of guidance's added contrast to take back."
)
_GUIDANCE_INTERVAL = flags.DEFINE_list(
  "guidance_interval", ["0", "1"], "LOW,HIGH: where guidance acts; 1 is pure noise."
)
_STEP_CACHING = flags.DEFINE_float(
  "step_caching",
  0.0,
  "Relative change of the first block below which a step reuses the others' results of "
  "an earlier one; 0 computes every step.",
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the first picture; the next has one more.")
_SAMPLER = flags.DEFINE_enum("sampler", "dpm++", list(SAMPLERS), "Solver.")
_NUM_IMAGES_PER_PROMPT = flags.DEFINE_integer(
  "num_images_per_prompt", 1, "Pictures of each prompt."
)
_USE_RESOLUTION_BINNING = flags.DEFINE_bool(
  "use_resolution_binning",
  True,
  "Draw at the nearest size of the training, then resize and crop.",
)
_UNCONDITIONAL_MASK = flags.DEFINE_enum(
  "unconditional_mask",
  "caption",
  list(UNCONDITIONAL_MASKS),
  "Tokens that the empty negative prompt shows: as the official code, or as diffusers.",
)
_CAPTION_CLEANING = flags.DEFINE_enum(
  "caption_cleaning", "raw", list(captions.MODES), "What is done to prompts."
)
_SAVE_CAPTIONS = flags.DEFINE_string(
  "save_captions", None, "Also write the prompts' embeddings to this .safetensors file."
)
_CAPTIONS = flags.DEFINE_string(
  "captions", None, "Embeddings that --save_captions wrote: no text encoder is needed."
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 1, "Pictures drawn at once; more are faster if they are small."
)
_GUIDANCE_PASSES = flags.DEFINE_integer(
  "guidance_passes",
  None,
  "1 takes both halves of guidance as one batch, 2 one after the other in about half "
  "the memory; by size if it is not given.",
)
_DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", ["bfloat16", "float32"], "Precision of the networks."
)
_QUANTIZE = flags.DEFINE_enum(
  "quantize",
  "none",
  list(QUANTIZATIONS),
  "Weights and activations of the transformer's blocks as 8-bit integers.",
)
_ATTENTION = flags.DEFINE_enum(
  "attention",
  "auto",
  list(attention.CHOICES),
  "Its implementation; auto takes what suits the devices and the picture's size.",
)
_FORMAT = flags.DEFINE_enum(
  "format", "png", list(pictures.FORMATS), "Of the pictures' files."
)
_GRID = flags.DEFINE_bool("grid", False, "Also write all pictures in one, grid.*.")

_OWN_SETTINGS = ("negative_prompt", "height", "width", "seed")


def main(_: list[str]) -> None:
  """Entry point; flags are parsed."""
  requests = [{"prompt": prompt} for prompt in _PROMPT.value]
  if _PROMPTS_FILE.value is not None:
    requests += _read_prompts(_PROMPTS_FILE.value)
  if not requests:
    raise ValueError("Give --prompt=TEXT, once or more, or --prompts_file=FILE.")
  directory = pathlib.Path(_OUTPUT.value)
  if directory.exists() and not directory.is_dir():
    raise NotADirectoryError(f"--output={directory} is a file: give a directory.")

  command.keep_compiled()
  prompts, settings = _settings(requests)
  compute = compute_here(_DTYPE.value, _ATTENTION.value)
  mesh, timing = _mesh(), Timing()
  texts = prompts + settings["negative_prompt"]
  pipeline = Pipeline.from_checkpoint(
    _CHECKPOINT.value,
    frozen=_FROZEN.value,
    text_encoder=_remembered(texts, compute, mesh, timing),
    compute=compute,
    batch_size=_BATCH_SIZE.value,
    mesh=mesh,
    guidance_passes=_GUIDANCE_PASSES.value,
    quantize=_QUANTIZE.value,
    timing=timing,
  )
  drawn = pipeline.stream(prompts, **settings)
  directory.mkdir(parents=True, exist_ok=True)
  first = pictures.next_number(directory)
  output = Output([], [])
  total = len(prompts) * _NUM_IMAGES_PER_PROMPT.value
  for number, picture, about in command.progress(drawn, total, "Pictures"):
    path = directory / f"{first + number:05d}.{_FORMAT.value}"
    pictures.save(path, picture, about)
    print(path, flush=True)
    if _GRID.value:
      output.images.append(picture)
      output.settings.append(about)
  print(f"Spent: {timing}.", file=sys.stderr)
  if _GRID.value:
    path = directory / f"grid.{_FORMAT.value}"
    if path.exists():
      path = directory / f"grid-{first:05d}.{_FORMAT.value}"
      logging.info("The grid of earlier pictures stays; this one is %s.", path.name)
    name = f"{first:05d}.{_FORMAT.value}"
    pictures.save(path, output.grid(), {"prompts": prompts, "first": name})
    print(path)


def _settings(requests: list[dict[str, Any]]) -> tuple[list[str], dict[str, Any]]:
  """Prompts, and the arguments of `Pipeline.stream`: flags, or what a line has."""
  count, copies = len(requests), _NUM_IMAGES_PER_PROMPT.value

  def each(name: str, values: list[Any]) -> list[Any]:
    return [
      request.get(name, value) for request, value in zip(requests, values, strict=True)
    ]

  settings = {
    "negative_prompt": each("negative_prompt", [_NEGATIVE_PROMPT.value] * count),
    "seed": each("seed", [_SEED.value + i * copies for i in range(count)]),
    "num_inference_steps": _NUM_INFERENCE_STEPS.value,
    "guidance_scale": _GUIDANCE_SCALE.value,
    "guidance_rescale": _GUIDANCE_RESCALE.value,
    "guidance_interval": _interval(_GUIDANCE_INTERVAL.value),
    "step_caching": _STEP_CACHING.value,
    "sampler": _SAMPLER.value,
    "num_images_per_prompt": copies,
    "use_resolution_binning": _USE_RESOLUTION_BINNING.value,
    "unconditional_mask": _UNCONDITIONAL_MASK.value,
    "caption_cleaning": _CAPTION_CLEANING.value,
  }
  for name, flag in (("height", _HEIGHT.value), ("width", _WIDTH.value)):
    if any(name in request for request in requests):
      if flag is None or len(flag) != 1:
        missing = [r["prompt"] for r in requests if name not in r]
        if flag is not None or missing:
          raise ValueError(
            f"Some prompts have a {name} of their own: give --{name} once, for the "
            f"others{f' such as {shortened(missing[0])}' if missing else ''}."
          )
        flag = [0]
      settings[name] = each(name, flag * count)
    else:
      settings[name] = flag[0] if flag is not None and len(flag) == 1 else flag
  return [request["prompt"] for request in requests], settings


def _remembered(
  texts: list[str], compute: Compute, mesh: Mesh | None, timing: Timing
) -> Any:
  """The captions by heart, where the text encoder is too large to stay in memory.

  None where the pipeline had better load it itself.
  """
  if _CAPTIONS.value is not None:
    return RememberedCaptions.load(_CAPTIONS.value)
  metadata = checkpoint.read_metadata(_CHECKPOINT.value)
  encoder = load_text_encoder(metadata, _FROZEN.value, dtype=compute.dtype, mesh=mesh)
  length = metadata.model["caption_length"]
  cleaned = [captions.clean_caption(text, _CAPTION_CLEANING.value) for text in texts]
  with timing.part("text encoder"):
    known = RememberedCaptions.of(encoder, cleaned, length)
  if _SAVE_CAPTIONS.value is not None:
    known.save(_SAVE_CAPTIONS.value)
    logging.info("Saved %d captions to %s.", len(cleaned), _SAVE_CAPTIONS.value)
  return known


def _mesh() -> Mesh | None:
  """All devices, if they can share a batch evenly."""
  devices = jax.device_count()
  if devices == 1 or _BATCH_SIZE.value % devices:
    return None
  return sharding.make_mesh(data=-1, fsdp=1, context=1)


def _interval(values: list[str]) -> tuple[float, float]:
  try:
    low, high = map(float, values)
  except ValueError:
    raise ValueError(
      f"--guidance_interval={','.join(values)} must be two numbers, LOW,HIGH."
    ) from None
  return low, high


def _read_prompts(name: str) -> list[dict[str, Any]]:
  path = pathlib.Path(name)
  try:
    text = sys.stdin.read() if name == "-" else path.read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} is not a text file in UTF-8: {error}.") from error
  lines = [(i, line.strip()) for i, line in enumerate(text.splitlines(), 1)]
  lines = [(i, line) for i, line in lines if line]
  if not lines:
    raise ValueError(f"--prompts_file={name} has no prompt in it.")
  if path.suffix != ".jsonl":
    return [{"prompt": line} for _, line in lines]
  return [_request(f"{name}:{i}", line) for i, line in lines]


def _request(where: str, line: str) -> dict[str, Any]:
  """A line of JSON as a prompt with settings of its own."""
  try:
    request = json.loads(line)
  except ValueError as error:
    raise ValueError(f"{where} is not JSON: {error}.") from error
  if not isinstance(request, dict) or not isinstance(request.get("prompt"), str):
    raise ValueError(f'{where} is not an object with a "prompt".')
  kinds = dict(zip(_OWN_SETTINGS, (str, int, int, int), strict=True))
  for name, value in request.items():
    if name != "prompt" and name not in kinds:
      raise ValueError(
        f"{where} has {name!r}, which is no setting of a prompt: known are prompt, "
        f"{', '.join(_OWN_SETTINGS)}."
      )
    if name in kinds and (not isinstance(value, kinds[name]) or value is True):
      raise ValueError(f"{where}: {name} is {value!r}, not {kinds[name].__name__}.")
  return request


if __name__ == "__main__":
  command.run(main)
