"""OpenAI's Images API over an engine, as an ASGI application.

  POST /v1/images/generations   GET /v1/models   GET /v1/models/NAME
  POST /v1/images/edits         GET /health/live, /health/ready, /metrics, /

Texts of clients go out as JSON and are shown as text; no field names a file.
"""

import asyncio
import base64
import contextlib
import dataclasses
import functools
import json
import time
import traceback
import uuid
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pixsigma_jax import static_pages
from pixsigma_jax.sample import image_files
from pixsigma_jax.sample.settings import Settings
from pixsigma_jax.serve import forms
from pixsigma_jax.serve.access import Access
from pixsigma_jax.serve.engine import (
  Busy,
  DeadlineExceeded,
  Draining,
  Drawn,
  Engine,
  Event,
  Failed,
  Preview,
  Ticket,
)
from pixsigma_jax.serve.engine import Request as Checked
from pixsigma_jax.serve.fields import Refusal, RequestLimits, Wanted, read_fields
from pixsigma_jax.serve.logs import Log

# Images of answers are data.
_HEADERS = static_pages.headers("'self' data:")
_RETRY_DRAINING = 5  # seconds; another replica has taken over by then
_WRITE_SECONDS = 60.0  # within which a client has to take what it is sent
_HEARTBEAT = 15.0  # seconds; proxies close streams that say nothing
_LOG = "pixsigma_jax.serve.log"  # key of a scope: what its line in the log will say


class ClientGone(Exception):
  """Nobody waits for the answer any longer."""


class JSON(Response):
  """JSON in ASCII, which also holds the halves of characters that clients send."""

  media_type = "application/json"

  def render(self, content: Any) -> bytes:
    return json.dumps(content, allow_nan=False).encode()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Service:
  """An engine that answers over HTTP.

  Attributes:
    engine: started by whoever makes the service.
    model: its name for clients.
    limits: of a request.
    access: who may ask.
    log: where a line for each request goes.
    max_body: bytes of a request in JSON.
    max_upload: bytes of one with images.
    body_seconds: within which a request's body has to come.
  """

  engine: Engine
  model: str
  limits: RequestLimits
  access: Access = dataclasses.field(default_factory=Access)
  log: Log = dataclasses.field(default_factory=Log)
  max_body: int = 1 << 20
  max_upload: int = 20 << 20
  body_seconds: float = 30.0
  started: int = dataclasses.field(default_factory=lambda: int(time.time()))

  def app(self) -> ASGIApp:
    """The application."""

    async def file(request: Request) -> Response:
      name = request.url.path.removeprefix("/") or "page.html"
      content, kind = static_pages.read("pixsigma_jax.serve", name)
      return Response(content, media_type=kind)

    routes = [
      Route("/", file),
      Route("/page.js", file),
      Route("/page.css", file),
      Route("/health/live", self._live),
      Route("/health/ready", self._ready),
      Route("/metrics", self._metrics),
      Route("/v1/models", self._models),
      Route("/v1/models/{name:path}", self._model),
      Route("/v1/images/generations", self._generations, methods=["POST"]),
      Route("/v1/images/edits", self._edits, methods=["POST"]),
    ]
    starlette = Starlette(
      routes=routes,
      exception_handlers={HTTPException: _http_refusal, Refusal: _refusal},
      # Inside of Starlette's own, which would answer failures by a text.
      middleware=[Middleware(_Edge, service=self)],
    )
    starlette.router.redirect_slashes = False
    return starlette

  # ------------------------------------------------------------------- what is asked

  async def _live(self, _: Request) -> Response:
    return JSON({"alive": self.engine.alive}, 200 if self.engine.alive else 500)

  async def _ready(self, _: Request) -> Response:
    ready = self.engine.ready
    return JSON({"ready": ready}, 200 if ready else 503)

  async def _metrics(self, _: Request) -> Response:
    text = await asyncio.to_thread(self.engine.metrics.text)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

  async def _models(self, _: Request) -> Response:
    return JSON({"object": "list", "data": [self._about_model()]})

  async def _model(self, request: Request) -> Response:
    name = request.path_params["name"]
    if name != self.model:
      raise Refusal(
        404,
        f"There is no model of this name: this server has {self.model!r}.",
        code="model_not_found",
        param="model",
      )
    return JSON(self._about_model())

  def _about_model(self) -> dict[str, Any]:
    return {
      "id": self.model,
      "object": "model",
      "created": self.started,
      "owned_by": "pixsigma_jax",
    }

  async def _generations(self, request: Request) -> Response:
    _require_type(request, "application/json")
    fields = _json_object(await self._body(request, self.max_body))
    return await self._answer(request, fields, "image_generation")

  async def _edits(self, request: Request) -> Response:
    _require_type(request, "multipart/form-data")
    form = await forms.read(request.headers, await self._body(request, self.max_upload))
    most = self.limits.max_pixels
    image, mask = await asyncio.to_thread(forms.images, form.files, most)
    return await self._answer(request, form.fields, "image_edit", image, mask)

  async def _body(self, request: Request, most: int) -> bytes:
    """The body of a request, if it is neither too long nor too slow.

    Raises:
      Refusal: it is.
    """
    content = bytearray()
    try:
      async with asyncio.timeout(self.body_seconds):
        async for part in request.stream():
          content += part
          if len(content) > most:
            raise Refusal(
              413,
              f"Such a request has at most {most:,} bytes here.",
              code="request_too_large",
              headers={"connection": "close"},
            )
    except TimeoutError:
      raise Refusal(
        408,
        f"The request did not come within {self.body_seconds:g} seconds.",
        code="request_timeout",
        headers={"connection": "close"},
      ) from None
    return bytes(content)

  async def _answer(
    self,
    request: Request,
    fields: Mapping[str, Any],
    event: str,
    image: UInt8[np.ndarray, "H W 3"] | None = None,
    mask: Bool[np.ndarray, "H2 W2"] | None = None,
  ) -> Response:
    engine, note = self.engine, request.scope[_LOG]
    side = engine.pipeline.resolution
    size = (side, side) if image is None else (image.shape[0], image.shape[1])
    loras = engine.pipeline.loras.loaded
    try:
      wanted = read_fields(fields, self.limits, self.model, size, loras)
    except RecursionError as error:  # what JSON's reader could still take
      raise Refusal(
        400, "Its lists lie too deep in each other.", code="invalid_value"
      ) from error
    try:
      checked = await asyncio.to_thread(
        engine.check,
        wanted.prompt,
        wanted.settings,
        image,
        mask,
        wanted.loras,
        wanted.regions,
      )
    except ValueError as error:
      raise Refusal(400, str(error), code="invalid_value") from error
    note |= _noted(wanted, checked.settings)
    events: asyncio.Queue[Event] = asyncio.Queue()
    hand_over = functools.partial(_hand_over, asyncio.get_running_loop(), events)
    try:
      ticket = await asyncio.to_thread(
        engine.submit, checked, hand_over, wanted.partial_images
      )
    except Busy as error:
      raise Refusal(
        429,
        f"{error} Ask again in {error.retry_after} seconds.",
        code="rate_limit_exceeded",
        headers={"retry-after": str(error.retry_after)},
      ) from error
    except Draining as error:
      raise Refusal(
        503,
        f"{error} Ask again.",
        code="shutting_down",
        headers={"retry-after": str(_RETRY_DRAINING)},
      ) from error
    answer = _Answer(self, wanted, checked, ticket, events, event, note)
    if wanted.stream:
      return _Stream(answer)
    return await answer.whole(request.receive)


@dataclasses.dataclass(frozen=True, eq=False)
class _Answer:
  """A queued request, and the ways to answer it."""

  service: Service
  wanted: Wanted
  checked: Checked
  ticket: Ticket
  queue: asyncio.Queue[Event]
  event: str
  note: dict[str, Any]

  async def whole(self, receive: Receive) -> Response:
    """All images in one answer."""
    images: list[dict[str, Any]] = [{}] * self.ticket.count
    try:
      async with contextlib.aclosing(self._events(receive)) as events:
        async for event in events:
          if isinstance(event, Drawn):
            images[event.number] = await self._item(event)
    except ClientGone:
      return Response(status_code=499)  # which nobody receives
    return JSON(
      self._about("created")
      | {"background": "opaque", "data": images, "usage": self._usage()}
    )

  async def _item(self, event: Drawn) -> dict[str, Any]:
    content, form = await self._encoded(event), self.wanted.output_format
    if self.wanted.as_url:
      item = {"url": f"data:image/{form};base64,{content}"}
    else:
      item = {"b64_json": content}
    return {**item, "seed": event.settings["seed"]}

  async def events(self, receive: Receive) -> AsyncGenerator[bytes]:
    """Previews and images as server-sent events, each when it is ready."""
    previews = [0] * self.ticket.count
    try:
      async with contextlib.aclosing(self._events(receive, _HEARTBEAT)) as events:
        async for event in events:
          match event:
            case None:
              yield b": waiting\n\n"
            case Preview(number):
              content = await self._encoded(event)
              more = {"partial_image_index": previews[number]}
              previews[number] += 1
              yield self._event("partial_image", content, number, **more)
            case Drawn(number, settings=settings):
              content = await self._encoded(event)
              more = {"usage": self._usage(images=1), "seed": settings["seed"]}
              yield self._event("completed", content, number, **more)
    except Refusal as error:  # the status has been sent
      self.note["error"] = error.code
      yield _sse("error", error.body())
    else:
      yield b"data: [DONE]\n\n"

  async def _events(
    self, receive: Receive, heartbeat: float | None = None
  ) -> AsyncGenerator[Any]:
    """The engine's events, until all images are drawn; None after each `heartbeat`.

    Raises:
      ClientGone: nobody waits any longer. The ticket is given back.
      Refusal: the images could not be drawn.
    """
    gone = asyncio.ensure_future(_until_gone(receive))
    following = asyncio.ensure_future(self.queue.get())
    left = self.ticket.count
    try:
      while left:
        done, _ = await asyncio.wait(
          {gone, following},
          timeout=heartbeat,
          return_when=asyncio.FIRST_COMPLETED,
        )
        if gone in done:
          self.service.engine.metrics.cancelled.inc()
          self.note["cancelled"] = True
          raise ClientGone
        if not done:
          yield None
          continue
        event = following.result()
        if isinstance(event, Failed):
          raise self._refused(event.error)
        left -= isinstance(event, Drawn)
        following = asyncio.ensure_future(self.queue.get())
        yield event
    finally:
      self.ticket.cancel()
      self.note["queue_seconds"] = round(self.ticket.queue_seconds, 4)
      gone.cancel()
      following.cancel()

  def _refused(self, error: Exception) -> Refusal:
    if isinstance(error, DeadlineExceeded):
      return Refusal(504, str(error), code="deadline_exceeded")
    # It speaks of this request alone: the engine has drawn it without neighbours.
    said = str(error) if isinstance(error, ValueError) else "It could not be drawn."
    return Refusal(500, said, code="drawing_failed")

  async def _encoded(self, event: Drawn | Preview) -> str:
    about = event.settings if isinstance(event, Drawn) else {}
    content = await asyncio.to_thread(
      image_files.to_bytes,
      event.image,
      about,
      self.wanted.output_format,
      self.wanted.output_compression,
    )
    return base64.b64encode(content).decode()

  def _event(self, kind: str, content: str, number: int, **more: Any) -> bytes:
    name = f"{self.event}.{kind}"
    return _sse(
      name,
      {"type": name, "b64_json": content, "image_index": number}
      | self._about("created_at")
      | {"background": "opaque"}
      | more,
    )

  def _about(self, created: str) -> dict[str, Any]:
    about = {
      created: int(time.time()),
      "output_format": self.wanted.output_format,
      "quality": "auto",
      "size": self.wanted.size,
    }
    if self.wanted.safety_identifier:
      about["safety_identifier"] = self.wanted.safety_identifier
    return about

  def _usage(self, images: int | None = None) -> dict[str, Any]:
    planned = self.checked.planned
    texts = [self.wanted.prompt, *(r["prompt"] for r in self.wanted.regions or ())]
    text = sum(map(self.service.engine.pipeline.text_encoder.count, texts))
    of_source = 0 if self.checked.sources["image"] is None else planned.num_tokens
    drawn = planned.num_tokens * (self.ticket.count if images is None else images)
    return {
      "input_tokens": text + of_source,
      "input_tokens_details": {"text_tokens": text, "image_tokens": of_source},
      "output_tokens": drawn,
      "total_tokens": text + of_source + drawn,
    }


class _Stream(Response):
  """Server-sent events of an answer."""

  def __init__(self, answer: _Answer):
    super().__init__(
      media_type="text/event-stream", headers={"x-accel-buffering": "no"}
    )
    self._answer = answer

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    headers = [item for item in self.raw_headers if item[0] != b"content-length"]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    with contextlib.suppress(ClientGone):
      async with contextlib.aclosing(self._answer.events(receive)) as events:
        async for content in events:
          await send({"type": "http.response.body", "body": content, "more_body": True})
      await send({"type": "http.response.body", "body": b""})


class _Edge:
  """The outermost layer: who may ask, request ids, headers, the log, metrics."""

  def __init__(self, app: ASGIApp, service: Service):
    self._app, self._service = app, service

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return
    request = Request(scope)
    given = request.headers.get("x-request-id", "")
    name = given if _is_plain(given) else uuid.uuid4().hex
    note = scope[_LOG] = {"request_id": name}
    began, status = time.monotonic(), 0

    async def send_noting(message: Message) -> None:
      nonlocal status
      if message["type"] == "http.response.start":
        status = message["status"]
        headers = {**_HEADERS, "x-request-id": name}
        message["headers"] = [
          *message["headers"],
          *((key.encode(), value.encode()) for key, value in headers.items()),
        ]
      async with asyncio.timeout(_WRITE_SECONDS):
        await send(message)

    try:
      refusal = self._service.access.refusal(request)
      if refusal is not None:
        await _as_response(refusal)(scope, receive, send_noting)
      else:
        await self._app(scope, receive, send_noting)
    except Exception as error:
      # Its message may hold a prompt.
      frames = traceback.format_tb(error.__traceback__)
      note |= {"error": type(error).__name__, "traceback": frames}
      if status:
        raise
      failure = Refusal(500, f"This server failed; see {name} in its log.", code="bug")
      await _as_response(failure)(scope, receive, send_noting)
    finally:
      spent = time.monotonic() - began
      self._count(scope, status, spent)
      self._service.log.request(scope, status, spent, note)

  def _count(self, scope: Scope, status: int, seconds: float) -> None:
    metrics = self._service.engine.metrics
    route = scope.get("route")
    path = route.path if isinstance(route, Route) else "other"
    metrics.requests.labels(path, str(status)).inc()
    if path.startswith("/v1/images"):
      metrics.request_seconds.observe(seconds)


async def _until_gone(receive: Receive) -> None:
  while (await receive())["type"] != "http.disconnect":
    pass


def _hand_over(
  loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event], event: Event
) -> None:
  with contextlib.suppress(RuntimeError):  # the loop has ended, and its clients with it
    loop.call_soon_threadsafe(events.put_nowait, event)


def _noted(wanted: Wanted, settings: Settings) -> dict[str, Any]:
  names = ("num_inference_steps", "sampler", "guidance_scale", "seed")
  return {
    "prompt": wanted.prompt,
    "n": settings.num_images_per_prompt,
    "size": wanted.size,
    "stream": wanted.stream,
  } | {name: getattr(settings, name) for name in names}


def _require_type(request: Request, wanted: str) -> None:
  given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
  if given != wanted:
    raise Refusal(
      415, f"The content-type must be {wanted}.", code="unsupported_media_type"
    )


def _json_object(content: bytes) -> dict[str, Any]:
  try:
    fields = json.loads(content.decode())
  except (ValueError, RecursionError) as error:
    raise Refusal(400, "The body is not JSON in UTF-8.", code="invalid_json") from error
  if not isinstance(fields, dict):
    raise Refusal(400, "The body is not a JSON object.", code="invalid_json")
  return fields


def _sse(name: str, content: Mapping[str, Any]) -> bytes:
  return f"event: {name}\ndata: {json.dumps(content)}\n\n".encode()


def _is_plain(name: str) -> bool:
  allowed = "-_.:"
  return 0 < len(name) <= 128 and all(
    character.isascii() and (character.isalnum() or character in allowed)
    for character in name
  )


def _as_response(refusal: Refusal) -> Response:
  return JSON(refusal.body(), refusal.status, refusal.headers)


async def _refusal(request: Request, error: Exception) -> Response:
  assert isinstance(error, Refusal)
  request.scope[_LOG]["error"] = error.code
  return _as_response(error)


async def _http_refusal(request: Request, error: Exception) -> Response:
  assert isinstance(error, HTTPException)
  said = {404: "There is nothing at this address.", 405: "Not by this method."}
  code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "refused")
  message = said.get(error.status_code, error.detail)
  return await _refusal(
    request, Refusal(error.status_code, message, code=code, headers=error.headers)
  )
