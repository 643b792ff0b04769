"""Draws prompts with a trained model, as images that say how they were made.

  python -m pixsigma_jax.sample --checkpoint=DIR --prompt=TEXT --output=DIR

Files are numbered on from the highest number that is there, also where several such
commands write to one folder. Each carries its prompt, seed and all settings: in text
chunks of a PNG, in the EXIF comment of a WebP or JPEG. After Ctrl-C the images that
are written stay, and the last line is the command that draws the others.
"""

import contextlib
import dataclasses
import itertools
import json
import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import flags, logging
from jax.sharding import Mesh
from PIL import Image

from pixsigma_jax import checkpoint, command, disk
from pixsigma_jax.convert.source_flags import (
  CHECKPOINT_HELP,
  FROZEN_HELP,
  SourceFlags,
)
from pixsigma_jax.models import attention
from pixsigma_jax.models.layers import Compute
from pixsigma_jax.models.pixart import PixArtConfig
from pixsigma_jax.sample import (
  companions,
  devices,
  editing,
  image_files,
  weighting,
  weights,
)
from pixsigma_jax.sample.encoders import RememberedCaptions, load_text_encoder
from pixsigma_jax.sample.model_flags import ModelFlags
from pixsigma_jax.sample.pipeline import QUANTIZATIONS, Output, Pipeline
from pixsigma_jax.sample.previews import PreviewFiles
from pixsigma_jax.sample.program import compute_here
from pixsigma_jax.sample.requests import steps_of, strength_of
from pixsigma_jax.sample.setting_flags import SettingFlags
from pixsigma_jax.sample.settings import SETTINGS, Settings, check_prompts
from pixsigma_jax.sample.timing import Timing

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint",
  None,
  CHECKPOINT_HELP,
  required=True,
)
_SOURCE = SourceFlags()
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write to.", required=True)
_FROZEN = flags.DEFINE_string(
  "frozen",
  None,
  FROZEN_HELP,
)
_OWN_SETTINGS = [name for name, setting in SETTINGS.items() if setting.of_a_prompt]
_PROMPT = flags.DEFINE_multi_string("prompt", [], "What to draw; may be repeated.")
_PROMPTS_FILE = flags.DEFINE_string(
  "prompts_file",
  None,
  "Prompts after those of --prompt, one a line; - for standard input. In a .jsonl file "
  f"a line is an object: prompt, and of its own {', '.join(_OWN_SETTINGS)}, image, "
  "mask_image, regions.",
)
_SETTINGS = SettingFlags()
_IMAGE = flags.DEFINE_multi_string(
  "image", [], "File of an image to edit; once for all prompts, or once for each."
)
_MASK_IMAGE = flags.DEFINE_multi_string(
  "mask_image", [], "File that is white where the image is drawn anew; as --image."
)
_OWN_ARGUMENTS = ("image", "mask_image", "regions")
_PREVIEWS = flags.DEFINE_string(
  "previews",
  None,
  "Directory for a small image of each step, written over by the next.",
)
_SAVE_CAPTIONS = flags.DEFINE_string(
  "save_captions", None, "Also write the prompts' embeddings to this .safetensors file."
)
_CAPTIONS = flags.DEFINE_string(
  "captions", None, "Embeddings that --save_captions wrote: no text encoder is needed."
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 1, "Images drawn at once; more are faster if they are small."
)
_MODELS = ModelFlags()
_MESH = flags.DEFINE_string("mesh", "auto", devices.MESH_HELP)
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
  "Its implementation; auto takes what suits the devices and the image's size.",
)
_FORMAT = flags.DEFINE_enum(
  "format", "png", list(image_files.FORMATS), "Of the images' files."
)
_GRID = flags.DEFINE_bool("grid", False, "Also write all images in one, grid.*.")


def main(_: list[str]) -> None:
  """Entry point; flags are parsed."""
  requests = [{"prompt": prompt} for prompt in _PROMPT.value]
  if _PROMPTS_FILE.value is not None:
    requests += _read_prompts(_PROMPTS_FILE.value)
  if not requests:
    raise ValueError("Give --prompt=TEXT, once or more, or --prompts_file=FILE.")
  prompts = check_prompts([request["prompt"] for request in requests])
  _give_files(requests)
  settings = Settings.of(_settings(requests))
  own = settings.of_prompts(len(prompts))
  arguments = _arguments(requests)
  sources = editing.sources(
    arguments["image"], arguments["mask_image"], len(prompts), settings.outpaint
  )
  for i, (about, source) in enumerate(zip(own, sources, strict=True)):
    sides = (about["height"] or 0, about["width"] or 0)
    image_files.check_sides(_FORMAT.value, *(source.size if source else sides))
    steps_of(settings.num_inference_steps, strength_of(i, about["strength"], source))
  companions.check_scale(_MODELS.values()["autoguidance"], settings.autoguidance_scale)
  devices.check(
    _MESH.value,
    jax.device_count(),
    batch_size=_BATCH_SIZE.value,
    branches=settings.branches,
  )
  directory = pathlib.Path(_OUTPUT.value)
  disk.check_writable(directory)
  if _SAVE_CAPTIONS.value is not None:
    if _CAPTIONS.value is not None:
      raise ValueError(
        f"--captions={_CAPTIONS.value} has the prompts' embeddings already, and none "
        "are made that could be saved: leave out --captions or --save_captions."
      )
    disk.check_writable(pathlib.Path(_SAVE_CAPTIONS.value).parent)

  rest = [
    {
      "prompt": prompt,
      **about,
      **{name: request.get(name) for name in _OWN_ARGUMENTS},
      "seed": about["seed"] + copy,
    }
    for request, prompt, about in zip(requests, prompts, own, strict=True)
    for copy in range(settings.num_images_per_prompt)
  ]
  written: dict[int, pathlib.Path] = {}
  try:
    _draw(prompts, settings, arguments, directory, written)
  except KeyboardInterrupt:
    raise command.Interrupted(_way_on(rest, written, directory)) from None


def _draw(
  prompts: list[str],
  settings: Settings,
  arguments: dict[str, Any],
  directory: pathlib.Path,
  written: dict[int, pathlib.Path],
) -> None:
  """Draws and writes all images; `written` has, at any time, those that are there."""
  command.keep_compiled()
  compute = compute_here(_DTYPE.value, _ATTENTION.value)
  timing = Timing()
  asked = dataclasses.asdict(settings)
  # Before T5 is read, which takes minutes.
  located = weights.locate(_CHECKPOINT.value, _SOURCE.values())
  metadata = checkpoint.read_metadata(located.checkpoint)
  mesh = devices.mesh_of(
    _MESH.value,
    batch_size=_BATCH_SIZE.value,
    tokens=PixArtConfig.from_dict(metadata.model).base_size ** 2,
    branches=settings.branches,
  )
  further = _MODELS.values()
  companions.locate(metadata, **further, options=_SOURCE.values())
  texts = prompts + [
    about["negative_prompt"] for about in settings.of_prompts(len(prompts))
  ]
  for regions in filter(None, arguments["regions"]):
    texts += [region["prompt"] for region in regions if "prompt" in region]
  pipeline = Pipeline.from_checkpoint(
    _CHECKPOINT.value,
    frozen=_FROZEN.value,
    text_encoder=_remembered(texts, settings, located, compute, mesh, timing),
    compute=compute,
    batch_size=_BATCH_SIZE.value,
    mesh=mesh,
    guidance_passes=_GUIDANCE_PASSES.value,
    quantize=_QUANTIZE.value,
    timing=timing,
    **further,
    **dataclasses.asdict(_SOURCE.values()),
  )
  total = len(prompts) * settings.num_images_per_prompt
  if _PREVIEWS.value is not None:
    previewed = PreviewFiles(pathlib.Path(_PREVIEWS.value), total)
    arguments = {**arguments, "callback_on_step_end": previewed}
  drawn = pipeline.stream(prompts, **asked, **arguments)
  folder = image_files.ImageFolder(directory, _FORMAT.value)
  for_grid: dict[int, tuple[Image.Image, dict[str, Any]]] = {}
  for number, image, about in command.progress(drawn, total, "Images"):
    written[number] = path = folder.save(number, image, about)
    print(path, flush=True)
    if _GRID.value:
      for_grid[number] = image, about
  print(f"Spent: {timing}.", file=sys.stderr)
  if _GRID.value:
    images, abouts = zip(*(for_grid[i] for i in range(total)), strict=True)
    print(_save_grid(Output(list(images), list(abouts)), prompts, written[0]))


def _save_grid(output: Output, prompts: list[str], first: pathlib.Path) -> pathlib.Path:
  grid, about = output.grid(), {"prompts": prompts, "first": first.name}
  path = first.with_stem("grid")
  try:
    image_files.save(path, grid, about)
  except FileExistsError:
    path = first.with_stem(f"grid-{first.stem}")
    logging.info("The grid of earlier images stays; this one is %s.", path.name)
    image_files.save(path, grid, about)
  return path


def _way_on(
  rest: Sequence[dict[str, Any]], written: Mapping[int, Any], directory: pathlib.Path
) -> str:
  """Message: how many images are written, and the command that draws the others."""
  count = f"{len(written)} of {len(rest)} images are written to {directory}."
  if not written:
    return f"{count} The same command draws them."
  lines = [
    json.dumps({k: v for k, v in about.items() if v is not None}, ensure_ascii=False)
    for number, about in enumerate(rest)
    if number not in written
  ]
  if not lines:
    return count
  path = _save_rest("".join(f"{line}\n" for line in lines), directory)
  # Captions are saved before the first image, and would be written over by fewer.
  replaced = {"prompt", "prompts_file", "num_images_per_prompt", "save_captions"}
  replaced |= {*_OWN_SETTINGS, *_OWN_ARGUMENTS}
  given = [
    word
    for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])
    if flag.present and flag.name not in replaced
    for word in flag.serialize().splitlines()  # one for each time it was given
  ]
  words = ["python", "-m", "pixsigma_jax.sample", *given, f"--prompts_file={path}"]
  return f"{count} This draws the others: {shlex.join(words)}"


def _save_rest(text: str, directory: pathlib.Path) -> pathlib.Path:
  """Writes the remaining prompts into a new file."""
  partial = disk.partial_path(directory / "rest.jsonl")
  try:
    partial.write_text(text, encoding="utf-8")
    for i in itertools.count():
      path = directory / f"rest-{i:05d}.jsonl"
      with contextlib.suppress(FileExistsError):
        disk.publish_new(partial, path)
        return path
  finally:
    partial.unlink(missing_ok=True)
  raise AssertionError("numbers do not end")


def _give_files(requests: list[dict[str, Any]]) -> None:
  """Gives requests the images of the flags, where they have none of their own."""
  for name, given in (("image", _IMAGE.value), ("mask_image", _MASK_IMAGE.value)):
    without = [request for request in requests if name not in request]
    if len(given) > 1 and len(given) != len(without):
      raise ValueError(
        f"--{name} is given {len(given)} times for {len(without)} prompts without one: "
        "give it once, or once for each."
      )
    for i, request in enumerate(without if given else []):
      request[name] = given[i % len(given)]


def _arguments(requests: list[dict[str, Any]]) -> dict[str, list[Any]]:
  """Images and regions of the prompts."""
  return {name: [r.get(name) for r in requests] for name in _OWN_ARGUMENTS}


def _settings(requests: list[dict[str, Any]]) -> dict[str, Any]:
  """Settings from the flags and from lines of the prompts' file."""
  values = _SETTINGS.values()
  for name in _OWN_SETTINGS:
    flag = values[name]
    if isinstance(flag, list) and len(flag) == 1:
      values[name] = flag = flag[0]
    if not any(name in request for request in requests):
      continue
    if isinstance(flag, list):
      raise ValueError(
        f"Some prompts have a {name} of their own: give --{name} once, for the others."
      )
    step = values["num_images_per_prompt"] if name == "seed" else 0
    values[name] = [
      request.get(name, flag + i * step if step else flag)
      for i, request in enumerate(requests)
    ]
  # The flag is of the prompts that have an image.
  strengths = values["strength"]
  values["strength"] = [
    None
    if request.get("image") is None and "strength" not in request
    else (strengths[i] if isinstance(strengths, list) else strengths)
    for i, request in enumerate(requests)
  ]
  return values


def _remembered(
  texts: list[str],
  settings: Settings,
  located: weights.Located,
  compute: Compute,
  mesh: Mesh | None,
  timing: Timing,
) -> Any:
  """Remembered captions, where the text encoder is too large to stay in memory.

  None where the pipeline had better load it itself.
  """
  if _CAPTIONS.value is not None:
    return RememberedCaptions.load(_CAPTIONS.value)
  metadata = checkpoint.read_metadata(located.checkpoint)
  frozen = located.encoders if _FROZEN.value is None else _FROZEN.value
  encoder = load_text_encoder(metadata, frozen, dtype=compute.dtype, mesh=mesh)
  length = metadata.model["caption_length"]
  cleaned = weighting.encoded_texts(texts, settings)
  with timing.part("text encoder"):
    known = RememberedCaptions.of(encoder, cleaned, length)
  if _SAVE_CAPTIONS.value is not None:
    known.save(_SAVE_CAPTIONS.value)
    logging.info("Saved %d captions to %s.", len(cleaned), _SAVE_CAPTIONS.value)
  return known


def _read_prompts(name: str) -> list[dict[str, Any]]:
  path = pathlib.Path(name)
  content = sys.stdin.buffer.read() if name == "-" else path.read_bytes()
  try:
    text = content.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} is not a text file in UTF-8: {error}.") from error
  # Not `splitlines`, which ends lines at characters that a prompt may have in it.
  lines = [(i, line.strip()) for i, line in enumerate(text.split("\n"), 1)]
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
  for name, value in request.items():
    if name == "prompt":
      continue
    if name in _OWN_ARGUMENTS:
      kind, what = (list, "a list") if name == "regions" else (str, "a file's path")
      if not isinstance(value, kind):
        raise ValueError(f"{where}: {name} must be {what}, not {value!r}.")
      continue
    if name not in _OWN_SETTINGS:
      raise ValueError(
        f"{where} has {name!r}, which is no setting of a prompt: known are prompt, "
        f"{', '.join((*_OWN_SETTINGS, *_OWN_ARGUMENTS))}."
      )
    try:
      request[name] = SETTINGS[name].check_one(value)
    except ValueError as error:
      raise ValueError(f"{where}: {error}") from error
  return request


if __name__ == "__main__":
  command.run(main)
