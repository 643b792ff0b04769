"""From plain options to a service: what a process, or a replica of many, serves."""

import dataclasses
import functools
import math
import pathlib
import re
import time
from typing import Any

from pixsigma_jax import command
from pixsigma_jax.convert.model import Options as Source
from pixsigma_jax.data import buckets
from pixsigma_jax.sample.adapters import read_adapter
from pixsigma_jax.sample.pipeline import Pipeline
from pixsigma_jax.sample.program import compute_here
from pixsigma_jax.serve import logs
from pixsigma_jax.serve.access import Access, is_loopback
from pixsigma_jax.serve.app import Service
from pixsigma_jax.serve.engine import Engine, Limits
from pixsigma_jax.serve.fields import RequestLimits

_SHAPE = re.compile(r"([0-9]{1,6})x([0-9]{1,6})(?:@([0-9]{1,4})(?:@([a-z0-9+-]+))?)?")


_BETWEEN_LOOKS = 0.05  # seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """All that decides about a service; see the flags of the same names."""

  checkpoint: str
  source: Source
  frozen: str | None
  lora: tuple[str, ...]
  refiner: str | None
  switch_at: int | None
  autoguidance: str | None
  refiner_lora: tuple[str, ...]
  autoguidance_lora: tuple[str, ...]
  model: str
  dtype: str
  attention: str
  quantize: str
  batch_size: int
  mesh: str
  smaller_batches: tuple[str, ...]
  text_batch_size: int | None
  warm_up: tuple[str, ...]
  max_delay: float
  max_queue: int
  deadline: float
  max_programs: int
  max_n: int
  max_steps: int
  max_pixels: int | None
  max_prompt: int
  max_regions: int
  max_body: int
  max_upload: int
  tokens: str | None
  allow_anonymous: bool
  log_prompts: bool
  host: str
  port: int


def access_of(options: Options) -> Access:
  """Who may ask.

  Raises:
    OSError: the file of tokens cannot be read.
    ValueError: it has none, or everybody could ask without any.
  """
  if options.tokens is not None:
    return Access.read(pathlib.Path(options.tokens))
  if is_loopback(options.host):
    return Access()
  if options.allow_anonymous:
    return Access(any_host=True)
  raise ValueError(
    f"--host={options.host} lets others in, and there are no tokens: give "
    "--tokens=FILE, or --allow_anonymous if everybody who reaches it may draw."
  )


def build(options: Options) -> Service:
  """The service, its model loaded and its engine not started.

  Raises:
    FileNotFoundError: there is no checkpoint.
    OSError: a file cannot be read.
    ValueError: an option is out of its range, or a file is damaged.
  """
  limits = Limits(
    max_delay=options.max_delay,
    max_queue=options.max_queue,
    deadline=options.deadline,
    max_programs=options.max_programs,
  )
  access = access_of(options)
  command.keep_compiled()
  pipeline = _pipeline(options)
  return Service(
    engine=Engine(
      pipeline,
      limits=limits,
      smaller_batches=_numbers(options.smaller_batches),
      text_batch_size=options.text_batch_size,
      warm_up=_warm_up(pipeline, options.warm_up),
    ),
    model=options.model,
    limits=RequestLimits(
      max_n=min(options.max_n, options.max_queue),
      max_steps=options.max_steps,
      max_pixels=options.max_pixels or 4 * pipeline.resolution**2,
      max_prompt=options.max_prompt,
      max_regions=options.max_regions,
    ),
    access=access,
    log=logs.to_stderr(prompts=options.log_prompts),
    max_body=options.max_body,
    max_upload=options.max_upload,
  )


@functools.cache
def running(options: Options) -> Service:
  """The one service of these options in this process, once it is warm.

  Raises:
    RuntimeError: the warm-up has failed, as the log says.
  """
  service = build(options)
  service.engine.start()
  while not service.engine.ready:
    if not service.engine.alive:
      raise RuntimeError("The engine ended while it warmed up.")
    time.sleep(_BETWEEN_LOOKS)
  return service


def _pipeline(options: Options) -> Pipeline:
  # Devices share the rows of every batch that the engine will draw.
  rows = math.gcd(options.batch_size, *_numbers(options.smaller_batches))
  pipeline = Pipeline.from_checkpoint(
    options.checkpoint,
    frozen=options.frozen,
    compute=compute_here(options.dtype, options.attention),
    batch_size=rows,
    mesh=options.mesh,
    quantize=options.quantize,
    refiner=options.refiner,
    switch_at=options.switch_at,
    autoguidance=options.autoguidance,
    refiner_lora=options.refiner_lora,
    autoguidance_lora=options.autoguidance_lora,
    **dataclasses.asdict(options.source),
  )
  pipeline = pipeline.replace(batch_size=options.batch_size)
  pipeline = _without_paths(pipeline, options.model)
  return pipeline.with_adapters(
    {
      name: (dataclasses.replace(read_adapter(path, pipeline.config), path=name), 0.0)
      for name, path in _named_loras(options.lora).items()
    }
  )


def _without_paths(pipeline: Pipeline, name: str) -> Pipeline:
  """The pipeline, whose images do not tell clients where its models lie."""
  origin = {**pipeline.origin, "checkpoint": name}
  for word in ("refiner", "autoguidance"):
    if word in origin:
      origin[word] = pathlib.Path(origin[word]).name
  models = {"refiner": pipeline.refiner, "weak_model": pipeline.weak_model}
  fields = {
    field: further.replace(loras=further.loras.without_folders())
    for field, further in models.items()
    if further is not None
  }
  return pipeline.replace(origin=origin, **fields)


def _named_loras(texts: tuple[str, ...]) -> dict[str, str]:
  """Paths by name, of NAME=PATH each.

  Raises:
    ValueError: one has no name, or two have the same.
  """
  found: dict[str, str] = {}
  for text in texts:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
      raise ValueError(f"--lora={text} must be NAME=PATH: clients ask for the name.")
    if name in found:
      raise ValueError(f"Two LoRAs are called {name!r}: give each --lora its own name.")
    found[name] = path
  return found


def _numbers(smaller_batches: tuple[str, ...]) -> list[int]:
  try:
    return [int(size) for size in smaller_batches]
  except ValueError:
    raise ValueError(
      f"--smaller_batches={','.join(smaller_batches)} must be whole numbers, such as "
      "1,2."
    ) from None


def _warm_up(pipeline: Pipeline, names: tuple[str, ...]) -> list[dict[str, Any]]:
  """Settings to draw once before the server is ready.

  Raises:
    ValueError: --warm_up names something that cannot be drawn.
  """
  shapes: list[dict[str, Any]] = []
  for name in names:
    found = _SHAPE.fullmatch(name)
    if name == "none":
      continue
    if name == "auto":
      shapes.append({})
    elif name == "buckets" and pipeline.resolution in buckets.BUCKETS:
      sizes = buckets.sampling_buckets(pipeline.resolution).values()
      shapes += [{"height": size.height, "width": size.width} for size in sizes]
    elif found is None:
      raise ValueError(
        f"--warm_up={name} must be WIDTHxHEIGHT[@STEPS[@SAMPLER]], auto, none, or "
        "buckets where the model has a table of sizes."
      )
    else:
      width, height, steps, sampler = found.groups()
      shape: dict[str, Any] = {"height": int(height), "width": int(width)}
      shape |= {"num_inference_steps": int(steps)} if steps else {}
      shapes.append(shape | ({"sampler": sampler} if sampler else {}))
  for shape in shapes:
    pipeline.stream("", **shape)  # checks it, and draws nothing
  return shapes
