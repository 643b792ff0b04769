"""Serves a trained model over OpenAI's Images API.

  python -m pixsigma_jax.serve --checkpoint=DIR --port=8000

It needs the extra `serve`. Only this machine can ask, unless --host says otherwise.
SIGTERM and Ctrl-C let it finish what was begun; a second one ends it at once.
"""

import pathlib
import re
from typing import Any

import jax
from absl import flags, logging

from pixsigma_jax import command, sharding
from pixsigma_jax.data import buckets
from pixsigma_jax.models import attention
from pixsigma_jax.sample.pipeline import QUANTIZATIONS, Pipeline
from pixsigma_jax.sample.program import compute_here
from pixsigma_jax.wording import install

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "A run's workdir, or one of its snapshots.", required=True
)
_FROZEN = flags.DEFINE_string(
  "frozen",
  None,
  "Folder with vae/, text_encoder/ and tokenizer/ as diffusers saves them, or the id "
  "of one on the hub. By default what the model was published with, from the hub.",
)
_MODEL = flags.DEFINE_string(
  "model", "pixart-sigma", "What clients call the model; images say it too."
)
_DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", ["bfloat16", "float32"], "Precision of the networks."
)
_ATTENTION = flags.DEFINE_enum(
  "attention",
  "auto",
  list(attention.CHOICES),
  "Its implementation; auto takes what suits the devices and the image's size.",
)
_QUANTIZE = flags.DEFINE_enum(
  "quantize",
  "none",
  list(QUANTIZATIONS),
  "Weights and activations of the transformer's blocks as 8-bit integers.",
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 4, "Images drawn at once; fewer are filled up and cost as much."
)
_SMALLER_BATCHES = flags.DEFINE_list(
  "smaller_batches",
  [],
  "Also compile programs of fewer rows, such as 1,2, and draw few images with those "
  "that the warm-up has shown to draw the same bits.",
)
_TEXT_BATCH_SIZE = flags.DEFINE_integer(
  "text_batch_size",
  None,
  "Captions that the text encoder takes at once; as many as --batch_size by default.",
)
_WARM_UP = flags.DEFINE_list(
  "warm_up",
  ["auto"],
  "Shapes to compile before the server is ready, WIDTHxHEIGHT[@STEPS[@SAMPLER]]; auto "
  "is the training's own, buckets all of its sizes, and none compiles nothing.",
)
_MAX_DELAY = flags.DEFINE_float(
  "max_delay", 0.01, "Seconds that an image waits for others to fill its batch."
)
_MAX_QUEUE = flags.DEFINE_integer(
  "max_queue", 128, "Images that may wait; what comes after them is told 429."
)
_DEADLINE = flags.DEFINE_float(
  "deadline", 600, "Seconds after which a request that is not drawn is given up."
)
_MAX_PROGRAMS = flags.DEFINE_integer(
  "max_programs", 128, "Kinds and sizes of images whose programs stay in memory."
)
_MAX_N = flags.DEFINE_integer("max_n", 10, "Images of a request, at most.")
_MAX_STEPS = flags.DEFINE_integer("max_steps", 100, "Steps of an image, at most.")
_MAX_PIXELS = flags.DEFINE_integer(
  "max_pixels", None, "Pixels of an image, at most; 4 times the training's by default."
)
_MAX_PROMPT = flags.DEFINE_integer(
  "max_prompt", 4000, "Characters of a prompt, at most; the model has its own limit."
)
_MAX_BODY = flags.DEFINE_integer("max_body", 1 << 20, "Bytes of a request, at most.")
_TOKENS = flags.DEFINE_string(
  "tokens", None, "File with a token on each line, one of which a client must give."
)
_ALLOW_ANONYMOUS = flags.DEFINE_bool(
  "allow_anonymous", False, "Let everybody in at an address that others can reach."
)
_LOG_PROMPTS = flags.DEFINE_bool("log_prompts", False, "Write prompts into the log.")
_DRAIN_DELAY = flags.DEFINE_float(
  "drain_delay",
  0,
  "Seconds for which requests are still refused, not left unanswered, after SIGTERM.",
)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen at.")
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen at; 0 takes a free one.")

_SHAPE = re.compile(r"([0-9]{1,6})x([0-9]{1,6})(?:@([0-9]{1,4})(?:@([a-z0-9+-]+))?)?")


def main(_: list[str]) -> None:
  """Entry point; flags are parsed."""
  try:
    from pixsigma_jax.serve import app, logs, server
    from pixsigma_jax.serve.access import Access, is_loopback
    from pixsigma_jax.serve.engine import Engine, Limits
    from pixsigma_jax.serve.fields import RequestLimits
  except ModuleNotFoundError as error:
    if error.name not in {"starlette", "uvicorn", "prometheus_client"}:
      raise
    raise ValueError(f"A server needs {error.name}: {install('serve')}.") from error

  limits = Limits(
    max_delay=_MAX_DELAY.value,
    max_queue=_MAX_QUEUE.value,
    deadline=_DEADLINE.value,
    max_programs=_MAX_PROGRAMS.value,
  )
  if _TOKENS.value is not None:
    access = Access.read(pathlib.Path(_TOKENS.value))
  elif is_loopback(_HOST.value):
    access = Access()
  elif _ALLOW_ANONYMOUS.value:
    access = Access(any_host=True)
  else:
    raise ValueError(
      f"--host={_HOST.value} lets others in, and there are no tokens: give "
      "--tokens=FILE, or --allow_anonymous if everybody who reaches it may draw."
    )
  with server.listen(_HOST.value, _PORT.value) as listener:
    log = logs.to_stderr(prompts=_LOG_PROMPTS.value)
    handler = logging.get_absl_handler()
    if handler is not None:
      handler.setFormatter(logs.JsonFormatter())
    command.keep_compiled()
    pipeline = _pipeline()
    request_limits = RequestLimits(
      max_n=min(_MAX_N.value, limits.max_queue),
      max_steps=_MAX_STEPS.value,
      max_pixels=_MAX_PIXELS.value or 4 * pipeline.resolution**2,
      max_prompt=_MAX_PROMPT.value,
    )
    warm_up = _warm_up(pipeline)
    engine = Engine(
      pipeline,
      limits=limits,
      smaller_batches=_smaller_batches(),
      text_batch_size=_TEXT_BATCH_SIZE.value,
    )
    service = app.Service(
      engine=engine,
      model=_MODEL.value,
      limits=request_limits,
      access=access,
      log=log,
      max_body=_MAX_BODY.value,
    )
    serving = server.Server(service, drain_delay=_DRAIN_DELAY.value)
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    print(f"Serving {_MODEL.value} at http://{host}:{port}/", flush=True)
    engine.start(warm_up)
    serving.run(sockets=[listener])
  if serving.interrupted:
    raise KeyboardInterrupt


def _pipeline() -> Pipeline:
  shared = jax.device_count() > 1 and not _BATCH_SIZE.value % jax.device_count()
  pipeline = Pipeline.from_checkpoint(
    _CHECKPOINT.value,
    frozen=_FROZEN.value,
    compute=compute_here(_DTYPE.value, _ATTENTION.value),
    batch_size=_BATCH_SIZE.value,
    # All devices, if they can share a batch evenly.
    mesh=sharding.make_mesh(data=-1, fsdp=1, context=1) if shared else None,
    quantize=_QUANTIZE.value,
  )
  # Clients are not told where it lies.
  return pipeline.replace(origin={**pipeline.origin, "checkpoint": _MODEL.value})


def _smaller_batches() -> list[int]:
  try:
    return [int(size) for size in _SMALLER_BATCHES.value]
  except ValueError:
    raise ValueError(
      f"--smaller_batches={','.join(_SMALLER_BATCHES.value)} must be whole numbers, "
      "such as 1,2."
    ) from None


def _warm_up(pipeline: Pipeline) -> list[dict[str, Any]]:
  """Settings to draw once before the server is ready.

  Raises:
    ValueError: --warm_up names something that cannot be drawn.
  """
  shapes: list[dict[str, Any]] = []
  for name in _WARM_UP.value:
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
      shape = {"height": int(height), "width": int(width)}
      shape |= {"num_inference_steps": int(steps)} if steps else {}
      shapes.append(shape | ({"sampler": sampler} if sampler else {}))
  for shape in shapes:
    pipeline.stream("", **shape)  # checks it, and draws nothing
  return shapes


if __name__ == "__main__":
  command.run(main)
