"""Replies of judges on the disk, so that no question is paid for twice."""

import hashlib
import json
import pathlib
import time

import sqlalchemy as sa
import sqlalchemy.event
import sqlalchemy.exc
from sqlalchemy.dialects import sqlite

from pixsigma_jax.evaluate.judge.client import Reply
from pixsigma_jax.evaluate.study.answers import make_durable

_tables = sa.MetaData()
_replies = sa.Table(
  "replies",
  _tables,
  sa.Column("key", sa.Text, primary_key=True),
  sa.Column("model", sa.Text, nullable=False),
  sa.Column("status", sa.Text, nullable=False),
  sa.Column("votes", sa.JSON, nullable=False),
  sa.Column("text", sa.Text, nullable=False),
  sa.Column("input_tokens", sa.Integer, nullable=False),
  sa.Column("output_tokens", sa.Integer, nullable=False),
  sa.Column("created", sa.Double, nullable=False),
)


class Cache:
  """Replies by the hash of all that was asked. Used as a context, which closes it.

  A reply is on the disk when `put` returns.

  Raises:
    OSError: nothing can be opened there.
  """

  def __init__(self, path: pathlib.Path):
    self._engine = sa.create_engine(sa.URL.create("sqlite", database=str(path)))
    sqlalchemy.event.listen(self._engine, "connect", make_durable)
    try:
      _tables.create_all(self._engine)
    except sqlalchemy.exc.DatabaseError as error:
      self._engine.dispose()
      raise OSError(f"Cannot open the judge's cache {path}: {error.orig}.") from error

  def __enter__(self) -> "Cache":
    return self

  def __exit__(self, *_: object) -> None:
    self._engine.dispose()

  def get(self, key: str) -> Reply | None:
    """The reply to a question; None if it was never asked."""
    columns = [_replies.c[name] for name in Reply._fields]
    with self._engine.connect() as connection:
      row = connection.execute(
        sa.select(*columns).where(_replies.c.key == key)
      ).one_or_none()
    return None if row is None else Reply(*row)

  def put(self, key: str, model: str, reply: Reply) -> None:
    """Keeps a reply; one that is there already stays."""
    row = {"key": key, "model": model, "created": time.time(), **reply._asdict()}
    with self._engine.begin() as connection:
      connection.execute(sqlite.insert(_replies).on_conflict_do_nothing(), row)


def key_of(identity: str, prompt: str, first: str, second: str, max_side: int) -> str:
  """Hash of a question.

  Args:
    identity: the judge's.
    first, second: SHA-256 of the images' files, in the order that they are shown.
    max_side: pixels that they are reduced to.
  """
  question = [identity, prompt, first, second, max_side]
  return hashlib.sha256(json.dumps(question).encode()).hexdigest()
