"""The website of a study: a page, its tasks, and the answers to them.

Who has a rater's link is that rater. A link of another study is refused. What the page
is sent says nothing of the models: images have addresses without meaning, and files
without the notes in them. Texts go as JSON and are shown as text.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any

import sqlalchemy.exc
from absl import logging
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pixsigma_jax import static_pages
from pixsigma_jax.evaluate.study import png
from pixsigma_jax.evaluate.study.answers import (
  Answer,
  Database,
  Rater,
  StoredStudy,
  Writer,
  hashed,
)
from pixsigma_jax.evaluate.study.design import CRITERIA, ShownImage, Task

_MOST_BYTES = 64 * 1024  # of an answer
MOST_NOTE = 4000  # characters
_MOST = 1e9  # seconds, pixels
_NONCE = re.compile(r"[0-9a-zA-Z-]{8,64}")
_HEADERS = static_pages.headers("'self'")


@dataclasses.dataclass(frozen=True)
class Site:
  """A study that is served.

  Attributes:
    folder: that the images' paths are relative to.
  """

  folder: pathlib.Path
  database: Database
  study: StoredStudy
  raters: Mapping[str, Rater]
  tasks: Mapping[int, list[Task]]
  images: Mapping[str, ShownImage]
  writer: Writer

  @classmethod
  def open(cls, folder: pathlib.Path, database: Database, name: str) -> "Site":
    """A study, ready to be served.

    Raises:
      ValueError: there is no such study, or an image of it is gone.
    """
    study = database.study(name)
    design = study.design
    raters = database.raters(study)
    images = {
      design.address(subject, model): image
      for subject in design.subjects
      for model, image in subject.images.items()
    }
    for image in images.values():
      if not (folder / image.path).is_file():
        raise ValueError(
          f"The image {folder / image.path} of the study {name} is gone: put it "
          "back, or give the --folder that the study was created of."
        )
    tasks = {rater.id: design.tasks(rater.number) for rater in raters.values()}
    return cls(folder, database, study, raters, tasks, images, Writer(database))

  def app(self) -> ASGIApp:
    """The website."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
      with self.writer:
        yield

    async def file(request: Request) -> Response:
      return _file(request.url.path.rpartition("/")[2])

    routes = [
      Route("/page.js", file),
      Route("/page.css", file),
      Route("/r/{token}", self._page),
      Route("/r/{token}/tasks", self._overview),
      Route("/r/{token}/tasks/{number:int}", self._task),
      Route("/r/{token}/tasks/{number:int}", self._answer, methods=["POST"]),
      Route("/r/{token}/pictures/{address}.png", self._image),
    ]
    return _WithHeaders(
      Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={HTTPException: _refusal},
      )
    )

  # ---------------------------------------------------------------------- what is asked

  async def _page(self, request: Request) -> Response:
    self._rater(request)
    return _file("page.html")

  async def _overview(self, request: Request) -> Response:
    rater = self._rater(request)
    answers = await run_in_threadpool(self.database.answers, rater)
    return JSONResponse(
      {
        "study": self.study.design.name,
        "rater": rater.name,
        "total": len(self.tasks[rater.id]),
        "answered": sorted(answers),
        "criteria": CRITERIA,
        "most_note": MOST_NOTE,
      }
    )

  async def _task(self, request: Request) -> Response:
    rater = self._rater(request)
    number, task = self._task_of(request, rater)
    answers = await run_in_threadpool(self.database.answers, rater)
    answer = answers.get(number)
    shown = [
      (task.subject.images[model], self.study.design.address(task.subject, model))
      for model in task.models
    ]
    return JSONResponse(
      {
        "prompt": task.subject.prompt,
        "pictures": [
          {
            "address": f"{request.path_params['token']}/pictures/{address}.png",
            "height": image.height,
            "width": image.width,
          }
          for image, address in shown
        ],
        "answer": answer
        and {
          "ranks": {
            criterion: [ranks[model] for model in task.models]
            for criterion, ranks in answer.ranks.items()
          },
          "note": answer.note,
        },
      }
    )

  async def _answer(self, request: Request) -> Response:
    rater = self._rater(request)
    number, task = self._task_of(request, rater)
    length = request.headers.get("content-length", "")
    if not length.isdecimal() or int(length) > _MOST_BYTES:
      raise HTTPException(413, f"An answer has at most {_MOST_BYTES} bytes.")
    try:
      answer = read_answer(await request.body(), rater, number, task)
    except ValueError as error:
      raise HTTPException(400, str(error)) from error
    try:
      await asyncio.wrap_future(self.writer.save(answer))
    except sqlalchemy.exc.SQLAlchemyError as error:
      logging.error("An answer of %s could not be stored: %s", rater.name, error)
      raise HTTPException(503, "The answer could not be stored.") from error
    return JSONResponse({"stored": answer.nonce})

  async def _image(self, request: Request) -> Response:
    self._rater(request)
    image = self.images.get(request.path_params["address"])
    if image is None:
      raise HTTPException(404, "There is no such image.")
    try:
      content = await run_in_threadpool(self._read, image)
    except (OSError, ValueError) as error:
      logging.error("%s", error)
      raise HTTPException(500, "This image cannot be shown.") from error
    caching = {"cache-control": "private, max-age=86400, immutable"}
    return Response(content, media_type="image/png", headers=caching)

  # ------------------------------------------------------------------------------ parts

  def _rater(self, request: Request) -> Rater:
    rater = self.raters.get(hashed(request.path_params["token"]))
    if rater is None:
      raise HTTPException(403, "This link is of no rater of this study.")
    return rater

  def _task_of(self, request: Request, rater: Rater) -> tuple[int, Task]:
    number, tasks = request.path_params["number"], self.tasks[rater.id]
    if number >= len(tasks):
      raise HTTPException(404, f"There are {len(tasks)} tasks, from 0.")
    return number, tasks[number]

  def _read(self, image: ShownImage) -> bytes:
    path = self.folder / image.path
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != image.sha256:
      raise ValueError(f"{path} is not the image that the study was created with.")
    return png.without_notes(content)


def read_answer(content: bytes, rater: Rater, number: int, task: Task) -> Answer:
  """The answer that a page has sent.

  Ranks may leave places empty: 1, 3, 3 is stored as 1, 2, 2.

  Raises:
    ValueError: it is not of the form that page.js sends, or says too much.
  """
  try:
    sent = json.loads(content)
    nonce, note = sent["nonce"], sent["note"]
    seconds, screen = sent["seconds"], sent["screen"]
    if not isinstance(nonce, str) or not _NONCE.fullmatch(nonce):
      raise ValueError("its nonce is none")
    if not isinstance(note, str) or len(note) > MOST_NOTE:
      raise ValueError(f"its note is not a text of up to {MOST_NOTE} characters")
    note.encode()  # half a surrogate pair is no text
    if not _is_number(seconds):
      raise ValueError("its seconds are no number")
    sizes = {key: screen[key] for key in ("height", "width", "device_pixels")}
    if not all(map(_is_number, sizes.values())):
      raise ValueError("its screen has no size")
    if not isinstance(screen["zoomed"], bool):
      raise ValueError("it does not say whether an image was enlarged")
    ranks = {
      criterion: _ranks(sent["ranks"][criterion], criterion, task)
      for criterion in CRITERIA
    }
  except (KeyError, TypeError) as error:
    raise ValueError(f"The answer lacks something: {error}.") from error
  except ValueError as error:
    raise ValueError(f"The answer is not of its form: {error}.") from error
  # A database's texts may not hold a zero.
  note = note.replace("\0", "").strip()
  return Answer(
    rater.id,
    number,
    nonce,
    ranks,
    note,
    float(seconds),
    sizes | {"zoomed": screen["zoomed"]},
  )


def _ranks(sent: Any, criterion: str, task: Task) -> dict[str, int]:
  count = len(task.models)
  if (
    not isinstance(sent, list)
    or len(sent) != count
    or not all(type(rank) is int and 1 <= rank <= count for rank in sent)
  ):
    raise ValueError(f"{criterion} must rank {count} images from 1 to {count}")
  places = sorted(set(sent))
  return {m: places.index(r) + 1 for m, r in zip(task.models, sent, strict=True)}


def _is_number(value: Any) -> bool:
  return type(value) in (int, float) and 0 <= value < _MOST


def _file(name: str) -> Response:
  content, kind = static_pages.read("pixsigma_jax.evaluate.study", name)
  return Response(content, media_type=kind)


async def _refusal(_: Request, error: Exception) -> Response:
  assert isinstance(error, HTTPException)
  return Response(error.detail, error.status_code, media_type="text/plain")


class _WithHeaders:
  """Puts what keeps a page to itself on every response."""

  def __init__(self, app: ASGIApp):
    self._app = app

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    async def send_with_headers(message: Message) -> None:
      if message["type"] == "http.response.start":
        have = {name.lower() for name, _ in message["headers"]}
        message["headers"] = [
          *message["headers"],
          *(
            (name.encode(), value.encode())
            for name, value in _HEADERS.items()
            if name.encode() not in have
          ),
        ]
      await send(message)

    await self._app(scope, receive, send_with_headers)
