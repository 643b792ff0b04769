"""All pairs of models' images put to a judge, each in both orders."""

import concurrent.futures
import hashlib
import io
import itertools
import pathlib
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from PIL import Image

from pixsigma_jax import command, disk
from pixsigma_jax.evaluate.folder import EvaluationFolder
from pixsigma_jax.evaluate.judge.budget import LimitReached
from pixsigma_jax.evaluate.judge.cache import Cache, key_of
from pixsigma_jax.evaluate.judge.client import Reply
from pixsigma_jax.evaluate.study import png


@runtime_checkable
class Judge(Protocol):
  """Whoever votes on two images.

  Attributes:
    identity: what a reply depends on besides prompt and images.
    ended: set when nobody waits for answers any more.
  """

  identity: str
  ended: threading.Event

  def ask(self, prompt: str, first: bytes, second: bytes) -> Reply: ...


class Question(NamedTuple):
  """Two models' images for a prompt, in an order.

  Attributes:
    paths: of the images.
    key: in the cache.
  """

  item: str
  prompt: str
  first: str
  second: str
  paths: tuple[pathlib.Path, pathlib.Path]
  key: str


class Asked(NamedTuple):
  """Replies to questions.

  Attributes:
    replies: by the question's key.
    from_cache: of these, how many were known before.
    stopped: why some were not asked; None if all were.
  """

  replies: dict[str, Reply]
  from_cache: int
  stopped: str | None


def questions(
  folder: EvaluationFolder,
  models: Sequence[str],
  *,
  identity: str,
  max_side: int,
  prompts: int | None = None,
) -> list[Question]:
  """Every pair of models for every prompt, in both orders.

  Prompts come in an order of their hashes: the first of them, where a limit ends the
  asking or `prompts` does, are a sample that is the same each time.

  Args:
    identity: of the judge.
    prompts: how many of them; None for all.

  Raises:
    ValueError: there are not so many prompts.
  """
  count = len(folder.items)
  if prompts is not None and not 1 <= prompts <= count:
    raise ValueError(
      f"--prompts={prompts} must be from 1 to {count}, which the suite has."
    )
  items = sorted(folder.items, key=lambda i: hashlib.sha256(i.id.encode()).digest())
  made = []
  for item in command.progress(items[:prompts], prompts or count, "Prompts read"):
    paths = {name: folder.model(name).image_path(item) for name in models}
    hashes = {name: disk.file_hash(path) for name, path in paths.items()}
    for pair in itertools.combinations(sorted(models), 2):
      for first, second in (pair, pair[::-1]):
        key = key_of(identity, item.prompt, hashes[first], hashes[second], max_side)
        made.append(
          Question(
            item.id, item.prompt, first, second, (paths[first], paths[second]), key
          )
        )
  return made


def ask_all(
  asked: Sequence[Question],
  judge: Judge,
  cache: Cache,
  *,
  name: str,
  max_side: int,
  threads: int,
) -> Asked:
  """Replies to all questions, from the cache where it has them.

  Args:
    name: of the judge, for the cache's readers.
    threads: questions on their way at once.

  Raises:
    Unanswered: the endpoint does not answer; replies until then are in the cache.
    Interrupted: by Ctrl-C; likewise.
  """
  by_key = {question.key: question for question in asked}  # equal images: asked once
  replies = {key: reply for key in by_key if (reply := cache.get(key)) is not None}
  from_cache, stopped = len(replies), None
  open_ = [question for key, question in by_key.items() if key not in replies]

  def answer(question: Question) -> Reply | None:
    if judge.ended.is_set():
      return None
    images = [png_of(path, max_side) for path in question.paths]
    reply = judge.ask(question.prompt, images[0], images[1])
    cache.put(question.key, name, reply)
    return reply

  with concurrent.futures.ThreadPoolExecutor(threads, "judge") as pool:
    futures = {pool.submit(answer, question): question.key for question in open_}
    try:
      done = concurrent.futures.as_completed(futures)
      for future in command.progress(done, len(futures), "Questions asked"):
        try:
          reply = future.result()
        except LimitReached as limit:
          judge.ended.set()
          stopped = stopped or str(limit)
        else:
          if reply is not None:
            replies[futures[future]] = reply
    except KeyboardInterrupt:
      raise command.Interrupted(
        f"{len(replies)} of {len(by_key)} questions are answered and in the cache. The "
        "same command goes on from there."
      ) from None
    finally:
      judge.ended.set()  # what has not begun does not begin; what is paid for is kept
  return Asked(replies, from_cache, stopped)


def png_of(path: pathlib.Path, max_side: int) -> bytes:
  """An image as PNG without notes, reduced to `max_side` where it is larger."""
  content = path.read_bytes()
  with Image.open(io.BytesIO(content)) as image:
    if max(image.size) <= max_side:
      return png.without_notes(content)
    reduced = image.convert("RGB")
  reduced.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
  file = io.BytesIO()
  reduced.save(file, "PNG")
  return file.getvalue()


def in_pairs(asked: Sequence[Question]) -> Iterator[tuple[Question, Question]]:
  """The two orders of each pair, as `questions` lists them."""
  yield from zip(asked[::2], asked[1::2], strict=True)
