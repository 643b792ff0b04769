"""Studies, raters and their answers in a database: SQLite, or PostgreSQL by its URL.

An answer is never changed: a rater who goes back adds another, and the last one counts.
"""

import concurrent.futures
import dataclasses
import hashlib
import pathlib
import queue
import secrets
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa
import sqlalchemy.event
import sqlalchemy.exc
from sqlalchemy.dialects import postgresql, sqlite

from pixsigma_jax.evaluate.study.design import Design
from pixsigma_jax.wording import listed

_MOST_AT_ONCE = 500  # answers in a transaction
_INSERT = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}

_tables = sa.MetaData()
_studies = sa.Table(
  "studies",
  _tables,
  sa.Column("id", sa.Integer, primary_key=True),
  sa.Column("name", sa.Text, nullable=False, unique=True),
  sa.Column("design", sa.JSON, nullable=False),
  sa.Column("created", sa.Double, nullable=False),
)
_raters = sa.Table(
  "raters",
  _tables,
  sa.Column("id", sa.Integer, primary_key=True),
  sa.Column("study", sa.ForeignKey("studies.id"), nullable=False),
  sa.Column("number", sa.Integer, nullable=False),
  sa.Column("name", sa.Text, nullable=False),
  sa.Column("token_sha256", sa.Text, nullable=False, unique=True),
  sa.UniqueConstraint("study", "number"),
  sa.UniqueConstraint("study", "name"),
)
_answers = sa.Table(
  "answers",
  _tables,
  sa.Column("id", sa.Integer, primary_key=True),
  sa.Column("rater", sa.ForeignKey("raters.id"), nullable=False, index=True),
  sa.Column("task", sa.Integer, nullable=False),
  sa.Column("nonce", sa.Text, nullable=False),
  sa.Column("ranks", sa.JSON, nullable=False),
  sa.Column("note", sa.Text, nullable=False),
  sa.Column("seconds", sa.Double, nullable=False),
  sa.Column("screen", sa.JSON, nullable=False),
  sa.Column("created", sa.Double, nullable=False),
  sa.UniqueConstraint("rater", "nonce"),
)


@dataclasses.dataclass(frozen=True)
class Rater:
  """Somebody who was given a link.

  Attributes:
    id: in the database.
    number: within the study, from 0.
  """

  id: int
  number: int
  name: str


@dataclasses.dataclass(frozen=True)
class Answer:
  """What a rater said of a task.

  Attributes:
    rater: id in the database.
    task: number among the rater's tasks, from 0.
    nonce: chosen by the page: an answer that is sent again, because its
      acknowledgement was lost, is stored once.
    ranks: criterion → model → rank, 1 being the best; equal ranks are a tie.
    seconds: that the task was on the screen.
    screen: height and width in CSS pixels, device pixels for each, and whether an
      image was looked at pixel by pixel.
  """

  rater: int
  task: int
  nonce: str
  ranks: dict[str, dict[str, int]]
  note: str
  seconds: float
  screen: dict[str, Any]


class StoredStudy(NamedTuple):
  """A study in the database."""

  id: int
  design: Design


class Database:
  """Studies at an URL. Used as a context, which closes the connections.

  On SQLite a transaction is on the disk before it is acknowledged (WAL with
  synchronous=FULL), as PostgreSQL has it by default.

  Args:
    url: `sqlite:///FILE`, or `postgresql://USER:PASSWORD@HOST/NAME`.

  Raises:
    ValueError: the URL is none of these.
    OSError: nothing can be opened there.
  """

  def __init__(self, url: str):
    try:
      parsed = sa.make_url(url)
    except sqlalchemy.exc.ArgumentError as error:
      raise ValueError(
        f"--database={url!r} is no URL of a database: {_FORMS}"
      ) from error
    kind = parsed.get_backend_name()
    if kind not in _INSERT:
      raise ValueError(f"--database is of {kind}, which is not known here: {_FORMS}")
    if kind == "postgresql":
      parsed = parsed.set(drivername="postgresql+psycopg")
    self.url = parsed.render_as_string(hide_password=True)
    self._insert = _INSERT[kind]
    self._engine = sa.create_engine(parsed, pool_pre_ping=True)
    if kind == "sqlite":
      sqlalchemy.event.listen(self._engine, "connect", make_durable)
    try:
      self._engine.connect().close()
    except sqlalchemy.exc.OperationalError as error:
      self._engine.dispose()
      raise OSError(
        f"Cannot open the database {self.url}: {_first_line(error)}. See that it is "
        "there and may be written to, or give another --database."
      ) from error

  def __enter__(self) -> "Database":
    return self

  def __exit__(self, *_: object) -> None:
    self._engine.dispose()

  def create(self, design: Design, raters: Sequence[str]) -> dict[str, str]:
    """Stores a new study with its raters.

    Args:
      raters: a name each.

    Returns:
      Name → token. Only their hashes are stored: a token cannot be read again.

    Raises:
      ValueError: there is a study of that name, or a rater comes twice.
    """
    if len(set(raters)) < len(raters):
      raise ValueError(f"A rater comes twice among {listed(raters, 20)}.")
    _tables.create_all(self._engine)
    tokens = {name: secrets.token_urlsafe(18) for name in raters}
    row = {"name": design.name, "design": design.to_json(), "created": time.time()}
    with self._engine.begin() as connection:
      try:
        study = connection.execute(
          _studies.insert().returning(_studies.c.id), row
        ).scalar_one()
      except sqlalchemy.exc.IntegrityError as error:
        raise ValueError(
          f"There is a study {design.name!r} in {self.url} already, perhaps with "
          "answers: give another --study."
        ) from error
      connection.execute(
        _raters.insert(),
        [
          {"study": study, "number": n, "name": name, "token_sha256": hashed(token)}
          for n, (name, token) in enumerate(tokens.items())
        ],
      )
    return tokens

  def study(self, name: str) -> StoredStudy:
    """A study.

    Raises:
      ValueError: there is none of that name.
    """
    names: list[str] = []
    if sa.inspect(self._engine).has_table(_studies.name):
      with self._engine.connect() as connection:
        query = sa.select(_studies.c.id, _studies.c.design)
        row = connection.execute(query.where(_studies.c.name == name)).one_or_none()
        if row is not None:
          return StoredStudy(row.id, Design.from_json(row.design))
        names += connection.scalars(sa.select(_studies.c.name))
    raise ValueError(
      f"There is no study {name!r} in {self.url}, only {listed(names)}: `evaluate "
      "study create` makes one."
    )

  def raters(self, study: StoredStudy) -> dict[str, Rater]:
    """Raters of a study, by the hash of their token."""
    query = sa.select(_raters).where(_raters.c.study == study.id)
    with self._engine.connect() as connection:
      rows = connection.execute(query.order_by(_raters.c.number)).all()
    return {row.token_sha256: Rater(row.id, row.number, row.name) for row in rows}

  def save(self, answers: Iterable[Answer]) -> None:
    """Stores answers in one transaction; those that are there already are left."""
    rows = [dataclasses.asdict(answer) | {"created": time.time()} for answer in answers]
    with self._engine.begin() as connection:
      connection.execute(self._insert(_answers).on_conflict_do_nothing(), rows)

  def answers(self, rater: Rater) -> dict[int, Answer]:
    """A rater's last answer to each task that has one."""
    columns = [_answers.c[field.name] for field in dataclasses.fields(Answer)]
    query = sa.select(*columns).where(_answers.c.rater == rater.id)
    with self._engine.connect() as connection:
      rows = connection.execute(query.order_by(_answers.c.id)).all()
    return {row.task: Answer(**row._mapping) for row in rows}


class Writer:
  """Stores answers from many requests, those that wait together in one transaction.

  A commit waits for the disk. Were each answer to have its own, they would queue there.
  """

  def __init__(self, database: Database):
    self._database = database
    self._waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    self._thread = threading.Thread(target=self._write, name="answers", daemon=True)

  def __enter__(self) -> "Writer":
    self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._waiting.put(None)
    self._thread.join()

  def save(self, answer: Answer) -> concurrent.futures.Future[None]:
    """Done once the answer is on the disk; has the database's error if it is not."""
    done: concurrent.futures.Future[None] = concurrent.futures.Future()
    self._waiting.put((answer, done))
    return done

  def _write(self) -> None:
    ended = False
    while not ended:
      batch = [self._waiting.get()]
      while len(batch) < _MOST_AT_ONCE and not self._waiting.empty():
        batch.append(self._waiting.get())
      ended = None in batch
      batch = [each for each in batch if each is not None]
      if batch:
        self._save(batch)

  def _save(self, batch: list[tuple[Answer, concurrent.futures.Future[None]]]) -> None:
    try:
      self._database.save(answer for answer, _ in batch)
    except Exception as error:  # whatever it is: somebody waits for each answer
      for _, done in batch:
        done.set_exception(error)
    else:
      for _, done in batch:
        done.set_result(None)


def default_url(folder: pathlib.Path) -> str:
  """A database beside an evaluation's images."""
  return f"sqlite:///{folder.absolute() / 'studies.db'}"


def hashed(token: str) -> str:
  """What is stored of a token."""
  return hashlib.sha256(token.encode()).hexdigest()


_FORMS = "give sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME."


def make_durable(connection: Any, _: object) -> None:
  """Has SQLite acknowledge what is on the disk; to be called on each connection."""
  cursor = connection.cursor()
  cursor.execute("PRAGMA journal_mode=WAL")
  cursor.execute("PRAGMA synchronous=FULL")
  cursor.execute("PRAGMA foreign_keys=ON")
  cursor.close()


def _first_line(error: sqlalchemy.exc.DBAPIError) -> str:
  return str(error.orig).partition("\n")[0].rstrip(".")
