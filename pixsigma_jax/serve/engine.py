"""A queue in front of a pipeline: images that share a program are drawn as one batch.

One thread owns the devices. It takes the oldest waiting image whose batch is full or
whose patience has ended, and with it, in the order of their arrival, those that agree
in all shared settings and in padded length. The pipeline's programs have a fixed number
of rows, so neighbours change no bit of an image: an image of the server equals that of
`Pipeline` with the same `batch_size` and a callback, which takes it step by step. Few
images may go through a program of fewer rows where that was seen to draw the same bits.

Nothing here knows HTTP. Methods may be called from any thread; events are handed over
in the engine's.
"""

import collections
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from absl import logging
from jaxtyping import Bool, UInt8
from PIL import Image

from pixsigma_jax.sample import image_files
from pixsigma_jax.sample.call_arguments import StopDrawing
from pixsigma_jax.sample.pipeline import Pipeline, Planned
from pixsigma_jax.sample.settings import SETTINGS, Settings
from pixsigma_jax.serve.caption_stage import CaptionStage
from pixsigma_jax.serve.metrics import Metrics
from pixsigma_jax.wording import listed

_SHARE_OF_NEW_BATCH = 0.2  # in the running mean of a batch's seconds


class Busy(Exception):
  """The queue is full.

  Attributes:
    retry_after: seconds until there should be room.
  """

  def __init__(self, message: str, retry_after: int):
    super().__init__(message)
    self.retry_after = retry_after


class Draining(Exception):
  """The engine finishes what it has begun, and takes nothing new."""


class DeadlineExceeded(Exception):
  """An image was not drawn within its time."""


@dataclasses.dataclass(frozen=True)
class Drawn:
  """An image of a request is ready.

  Attributes:
    number: of the image in its request, from 0.
    settings: that reproduce it, as `Pipeline` says them.
  """

  number: int
  image: Image.Image
  settings: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Preview:
  """What an image of a request looks like after some of its steps, at its size."""

  number: int
  image: Image.Image


@dataclasses.dataclass(frozen=True)
class Failed:
  """A request has ended without all of its images."""

  error: Exception


Event: TypeAlias = Drawn | Preview | Failed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """How long and how much may wait.

  Attributes:
    max_delay: seconds that an image waits for others to fill its batch.
    max_queue: images that may wait at once; one request more is `Busy`.
    deadline: seconds from a request to its last image.
    max_programs: kinds and sizes of images whose compiled programs are kept in memory;
      one more, and all are dropped. Those on the disk stay.

  Raises:
    ValueError: a limit is out of its range.
  """

  max_delay: float = 0.01
  max_queue: int = 128
  deadline: float = 600.0
  max_programs: int = 128

  def __post_init__(self):
    if self.max_delay < 0:
      raise ValueError(f"--max_delay={self.max_delay:g} must be 0 or more.")
    for name in ("max_queue", "max_programs"):
      if getattr(self, name) < 1:
        raise ValueError(f"--{name}={getattr(self, name)} must be at least 1.")
    if self.deadline <= 0:
      raise ValueError(f"--deadline={self.deadline:g} must be more than 0.")


class Ticket:
  """A request's place in the queue; `cancel` gives it back."""

  def __init__(self, count: int, deadline: float, on_event: Callable[[Event], None]):
    self.count, self.deadline = count, deadline
    self.queue_seconds = 0.0
    self._on_event = on_event
    self._open = count
    self._lock = threading.Lock()

  @property
  def is_open(self) -> bool:
    """Whether somebody still waits for an image of it."""
    return self._open > 0

  def cancel(self) -> None:
    """Nobody waits any longer: no event follows."""
    with self._lock:
      self._open = 0

  def preview(self, event: Preview) -> None:
    """Hands over a preview, unless nobody waits for it."""
    if self.is_open:
      self._on_event(event)

  def drawn(self, event: Drawn) -> None:
    """Hands over an image, unless nobody waits for it."""
    with self._lock:
      if not self._open:
        return
      self._open -= 1
    self._on_event(event)

  def fail(self, error: Exception) -> None:
    """Ends the request by an error, unless it has ended."""
    with self._lock:
      if not self._open:
        return
      self._open = 0
    self._on_event(Failed(error))


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
  """What `Engine.check` has found to be drawable.

  Attributes:
    sources: arguments of `Pipeline.stream` for an image to edit; None for none.
    regions: parts that have prompts of their own; None for none.
    planned: its first image; the others differ in their seeds alone.
    loras: names and scales of the pipeline's LoRAs that act, by name.
  """

  prompt: str
  settings: Settings
  sources: Mapping[str, Any]
  regions: Sequence[Mapping[str, Any]] | None
  planned: Planned
  loras: tuple[tuple[str, float], ...] = ()


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _Waiting:
  """One image that waits to be drawn.

  Attributes:
    own, shared: its settings, those that a batch may have several of and others.
    program: which compiled program draws it, but for its rows.
    key: what a batch has to agree in.
    previews: steps after which it is shown, counted from 1.
  """

  ticket: Ticket
  request: Request
  number: int
  own: Mapping[str, Any]
  shared: Mapping[str, Any]
  program: tuple[Any, ...]
  key: tuple[Any, ...]
  arrived: float
  previews: frozenset[int]


class Engine:
  """Draws requests in batches. Used as a context, which starts and ends its thread."""

  def __init__(
    self,
    pipeline: Pipeline,
    *,
    limits: Limits | None = None,
    smaller_batches: Sequence[int] = (),
    text_batch_size: int | None = None,
    warm_up: Iterable[Mapping[str, Any]] = (),
    metrics: Metrics | None = None,
  ):
    """Takes over a pipeline.

    Args:
      pipeline: how, and how many rows at a time, images are drawn; its LoRAs act where
        a request asks for them.
      limits: how long and how much may wait.
      smaller_batches: numbers of rows for few images, of programs that are used for
        what a warm-up has shown them to draw with the same bits.
      text_batch_size: captions that the text encoder takes at once; None for the
        pipeline's `batch_size`.
      warm_up: settings to draw before it is `ready`, one image each.
      metrics: counts what happens; None for a new one.
    """
    self.limits = limits or Limits()
    self.metrics = metrics or Metrics()
    rows = int(pipeline.batch_size) if text_batch_size is None else text_batch_size
    self._captions = CaptionStage(pipeline.text_encoder, rows)
    own = pipeline.set_adapters([]) if pipeline.loras.loaded else pipeline
    self.pipeline = own.replace(text_encoder=self._captions)
    for size in smaller_batches:
      if not 0 < size < self.pipeline.batch_size:
        raise ValueError(
          f"--smaller_batches has {size}, which does not lie between 0 and "
          f"--batch_size={self.pipeline.batch_size}."
        )
    self._smaller = {
      size: self.pipeline.replace(batch_size=size) for size in sorted(smaller_batches)
    }
    self._equal: dict[tuple[Any, ...], list[Pipeline]] = {}  # by program
    self._kinds: set[tuple[Any, ...]] = set()  # whose programs are in memory
    self._merged: tuple[tuple[tuple[str, float], ...], Pipeline] | None = None
    self._changed = threading.Condition()
    self._queue: collections.deque[_Waiting] = collections.deque()
    self._drawing: list[_Waiting] = []
    self._draining = self._ready = False
    self._batch_seconds = 0.0
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
    self._warm_up = list(warm_up)
    for name, help_, value in (
      ("queue_images", "Images that wait.", lambda: len(self._queue)),
      (
        "drawing_images",
        "Images of the batch being drawn.",
        lambda: len(self._drawing),
      ),
      ("device_bytes", "In use on the fullest device; 0 if unknown.", _device_bytes),
    ):
      self.metrics.watch(name, help_, value)

  def __enter__(self) -> "Engine":
    self.start()
    return self

  def __exit__(self, *_: object) -> None:
    self.drain()
    self.join()

  # ------------------------------------------------------------------- what is asked

  def start(self) -> None:
    """Begins to warm up, and then to draw."""
    self._thread.start()

  @property
  def ready(self) -> bool:
    """Whether requests are answered without waiting for a warm-up or for an end."""
    return self._ready and not self._draining and self.alive

  @property
  def alive(self) -> bool:
    """Whether the engine's thread runs."""
    return self._thread.is_alive()

  @property
  def idle(self) -> bool:
    """Whether nothing waits and nothing is drawn."""
    with self._changed:
      return not self._queue and not self._drawing

  @property
  def draining(self) -> bool:
    """Whether new requests are refused for good."""
    return self._draining

  def drain(self) -> None:
    """Refuses new requests from now on; what waits is still drawn."""
    with self._changed:
      self._draining = True
      self._changed.notify_all()

  def join(self, timeout: float | None = None) -> bool:
    """Waits for the end of a drained engine; whether it has come."""
    if self._thread.ident is not None:
      self._thread.join(timeout)
    return not self.alive

  def check(
    self,
    prompt: str,
    settings: Mapping[str, Any],
    image: UInt8[np.ndarray, "H W 3"] | None = None,
    mask_image: Bool[np.ndarray, "H2 W2"] | None = None,
    loras: Mapping[str, float] | None = None,
    regions: Sequence[Mapping[str, Any]] | None = None,
  ) -> Request:
    """A request, checked like a call of `Pipeline.stream`.

    Args:
      image: to edit.
      mask_image: where to edit it alone.
      loras: scales of those of the pipeline's LoRAs that are to act, by name.
      regions: see `Pipeline.stream`.

    Raises:
      TypeError: there is no setting of a name.
      ValueError: a value, a size or the prompt is none that the model can draw, or
        there is no LoRA of a name.
    """
    checked = Settings.of(settings)
    acting = {name: scale for name, scale in sorted((loras or {}).items()) if scale}
    self.pipeline.loras.scaled(list(acting), list(acting.values()))
    sources = {"image": image, "mask_image": mask_image}
    [planned, *_] = self.pipeline.plan(
      prompt, **dataclasses.asdict(checked), **sources, regions=[regions]
    )
    return Request(prompt, checked, sources, regions, planned, tuple(acting.items()))

  def submit(
    self,
    request: Request,
    on_event: Callable[[Event], None],
    previews: int = 0,
  ) -> Ticket:
    """Queues the `num_images_per_prompt` images of a request.

    Args:
      on_event: called in the engine's thread, with a `Drawn` for each image, in any
        order, or `Failed`, after which nothing comes. It must not block.
      previews: of each image, evenly among its steps; fewer if there are fewer steps.

    Raises:
      Busy: the queue has no room for all of them.
      Draining: the engine is ending.
    """
    settings, now = request.settings, time.monotonic()
    [own], shared = settings.of_prompts(1), settings.of_all()
    count = settings.num_images_per_prompt
    values = (_hashable(value) for value in shared.values())
    key = (request.planned.kind, request.loras, *values)
    shown = _preview_steps(request.planned.kind.steps, previews)
    ticket = Ticket(count, now + self.limits.deadline, on_event)
    images = [
      _Waiting(
        ticket=ticket,
        request=request,
        number=number,
        own=own | {"seed": own["seed"] + number},
        shared=shared,
        program=_program(settings, request.planned),
        key=key,
        arrived=now,
        previews=shown,
      )
      for number in range(count)
    ]
    with self._changed:
      if self._draining or not self.alive:
        raise Draining("This server is being shut down.")
      if len(self._queue) + count > self.limits.max_queue:
        self.metrics.refused.inc()
        raise Busy(
          f"{len(self._queue)} images wait already, and at most "
          f"{self.limits.max_queue} may.",
          self._retry_after(),
        )
      self._captions.expect(request.planned.captions)
      self._queue.extend(images)
      self._changed.notify_all()
    return ticket

  def _retry_after(self) -> int:
    batches = -(-len(self._queue) // int(self.pipeline.batch_size))
    return max(1, round(batches * self._batch_seconds))

  # ------------------------------------------------------------------- the own thread

  def _run(self) -> None:
    for settings in self._warm_up:
      self._warm(settings)
    self._ready = True
    while (batch := self._next_batch()) is not None:
      began = time.monotonic()
      for image in batch:
        image.ticket.queue_seconds = max(
          image.ticket.queue_seconds, began - image.arrived
        )
        self.metrics.queue_seconds.observe(began - image.arrived)
      with self._timed():
        self._draw(batch)
      spent = time.monotonic() - began
      share = _SHARE_OF_NEW_BATCH if self._batch_seconds else 1.0
      self._batch_seconds += share * (spent - self._batch_seconds)
      with self._changed:
        self._drawing = []
        self._changed.notify_all()

  def _warm(self, settings: Mapping[str, Any]) -> None:
    """Compiles what these settings need, and compares programs of fewer rows."""
    began = time.monotonic()
    request = self.check("", settings)
    program = _program(request.settings, request.planned)
    with self._timed():
      self.pipeline("", **settings, callback_on_step_end=_preview_each)
      whole = self._latents(self.pipeline, settings) if self._smaller else []
      self._equal[program] = equal = [
        pipeline
        for pipeline in self._smaller.values()
        if all(map(np.array_equal, self._latents(pipeline, settings), whole))
      ]
    logging.info(
      "Warm: %s, in %.1f s.%s",
      ", ".join(f"{name} {value}" for name, value in settings.items()) or "defaults",
      time.monotonic() - began,
      f" With equal bits: batches of {listed([p.batch_size for p in equal])}."
      if self._smaller
      else "",
    )

  def _latents(
    self, pipeline: Pipeline, settings: Mapping[str, Any]
  ) -> list[np.ndarray]:
    """Latents of a whole batch of images, each of another prompt and seed."""
    prompts = [f"{number}" for number in range(int(self.pipeline.batch_size))]
    return pipeline(
      prompts,
      **settings,
      output_type="latent",
      callback_on_step_end=lambda *_: None,
    ).images

  def _next_batch(self) -> list[_Waiting] | None:
    """Waits for a batch that is due; None once the engine is drained."""
    with self._changed:
      while True:
        now = time.monotonic()
        self._remove_closed(now)
        due, wake = self._due(now)
        if due is not None:
          size = int(self.pipeline.batch_size)
          batch = [image for image in self._queue if image.key == due][:size]
          chosen = set(map(id, batch))
          self._queue = collections.deque(
            image for image in self._queue if id(image) not in chosen
          )
          self._drawing = batch
          return batch
        if self._draining and not self._queue:
          return None
        self._changed.wait(wake)

  def _remove_closed(self, now: float) -> None:
    late = [image for image in self._queue if image.ticket.deadline <= now]
    for image in late:
      image.ticket.fail(_too_late(self.limits))
    if any(not image.ticket.is_open for image in self._queue):
      self._queue = collections.deque(
        image for image in self._queue if image.ticket.is_open
      )

  def _due(self, now: float) -> tuple[tuple[Any, ...] | None, float | None]:
    """The batch to draw now, by its key; or how long to sleep, None until woken."""
    counts = collections.Counter(image.key for image in self._queue)
    size, wake = int(self.pipeline.batch_size), None
    for image in self._queue:
      left = image.arrived + self.limits.max_delay - now
      if left <= 0 or counts[image.key] >= size or self._draining:
        return image.key, None
      wake = left if wake is None else min(wake, left)
    return None, wake

  def _draw(self, batch: list[_Waiting]) -> None:
    """Draws a batch; if that fails, each of its images alone, so that one fails."""
    self.metrics.batch_size.observe(len(batch))
    self._bound_programs(batch)
    undrawn = list(batch)
    try:
      for number, image, settings in self._stream(batch):
        undrawn.remove(batch[number])
        self.metrics.images.inc()
        batch[number].ticket.drawn(Drawn(batch[number].number, image, settings))
    except Exception as error:  # whatever it was, the others have to go on
      logging.error(
        "A batch of %d failed: %s.",
        len(batch),
        f"{type(error).__module__}.{type(error).__name__}",
      )
      self.metrics.failures.labels(type(error).__name__).inc()
      if len(batch) == 1:
        batch[0].ticket.fail(error)
        return
    for image in undrawn:
      if image.ticket.is_open:
        self._draw([image])

  def _stream(
    self, batch: Sequence[_Waiting]
  ) -> Iterator[tuple[int, Image.Image, dict[str, Any]]]:
    own = {
      name: [image.own[name] for image in batch]
      for name in SETTINGS
      if SETTINGS[name].of_a_prompt
    }
    prompts = [image.request.prompt for image in batch]
    # One kind has an image to edit, and perhaps a mask, or none has.
    sources = {
      name: [image.request.sources[name] for image in batch]
      for name, value in batch[0].request.sources.items()
      if value is not None
    }

    def on_step_end(
      _: Pipeline, step: int, __: float, known: Mapping[str, Any]
    ) -> None:
      now = time.monotonic()
      for image in batch:
        if image.ticket.deadline <= now:
          image.ticket.fail(_too_late(self.limits))
      if not any(image.ticket.is_open for image in batch):
        raise StopDrawing
      for number, latents in zip(known["images"], known["clean_latents"], strict=True):
        image = batch[number]
        if step + 1 in image.previews:
          planned = image.request.planned
          shown = image_files.fit(
            self.pipeline.preview(latents), planned.height, planned.width
          )
          image.ticket.preview(Preview(image.number, shown))

    pipeline = self.pipeline
    for smaller in self._equal.get(batch[0].program, []):
      if len(batch) <= smaller.batch_size:
        pipeline = smaller
        break
    acting = self._with_loras(batch[0].request.loras)
    return pipeline.replace(params=acting.params, loras=acting.loras).stream(
      prompts,
      **batch[0].shared,
      **own,
      **sources,
      # Which of one kind may have or not: those that weigh nothing are no captions.
      regions=[image.request.regions for image in batch],
      callback_on_step_end=on_step_end,
    )

  def _with_loras(self, loras: tuple[tuple[str, float], ...]) -> Pipeline:
    """The pipeline with these LoRAs; the last ones that were asked for stay merged."""
    if not loras:
      return self.pipeline
    if self._merged is None or self._merged[0] != loras:
      self._merged = None  # its memory first
      names, scales = zip(*loras, strict=True)
      self._merged = loras, self.pipeline.set_adapters(names, scales)
    return self._merged[1]

  def _bound_programs(self, batch: Sequence[_Waiting]) -> None:
    """Forgets all compiled programs before there are too many: JAX forgets none."""
    self._kinds |= {
      (image.program, image.request.planned.height, image.request.planned.width)
      for image in batch
    }
    if len(self._kinds) > self.limits.max_programs:
      logging.info("Forgetting the programs of %d kinds.", len(self._kinds))
      jax.clear_caches()
      self._kinds.clear()

  @contextlib.contextmanager
  def _timed(self) -> Iterator[None]:
    """Adds to the metrics the seconds that each part of the pipeline takes inside."""
    before = dict(self.pipeline.timing.seconds)
    try:
      yield
    finally:
      for stage, seconds in self.pipeline.timing.seconds.items():
        self.metrics.stage_seconds.labels(stage).inc(seconds - before.get(stage, 0.0))


def _device_bytes() -> int:
  stats = [device.memory_stats() for device in jax.local_devices()]
  return max(each["bytes_in_use"] if each else 0 for each in stats)


def _preview_each(
  pipeline: Pipeline, _step: int, _timestep: float, known: Mapping[str, Any]
) -> None:
  pipeline.preview(known["clean_latents"][0])


def _too_late(limits: Limits) -> DeadlineExceeded:
  return DeadlineExceeded(
    f"The image was not drawn within {limits.deadline:g} seconds."
  )


def _program(asked: Settings, planned: Planned) -> tuple[Any, ...]:
  """What tells one compiled program from another, but for its rows, or more."""
  return (
    planned.kind,
    asked.sampler,
    asked.num_inference_steps,
    asked.use_karras_sigmas,
    asked.timesteps is None,
    asked.guided,
    asked.guidance_method,
    asked.pag_scale > 0,
    asked.skip_layer_guidance_scale > 0,
    asked.step_caching > 0,
  )


def _preview_steps(num_steps: int, count: int) -> frozenset[int]:
  """After which steps, counted from 1, `count` previews lie evenly; never the last."""
  steps = {round(num_steps * (i + 1) / (count + 1)) for i in range(count)}
  return frozenset(steps & set(range(1, num_steps)))


def _hashable(value: Any) -> Any:
  return tuple(value) if isinstance(value, list) else value
