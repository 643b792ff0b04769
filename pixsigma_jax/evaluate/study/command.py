r"""The commands of a study.

  python -m pixsigma_jax.evaluate study create --folder=FOLDER --study=NAME --raters=10
  python -m pixsigma_jax.evaluate study serve --folder=FOLDER --study=NAME
  python -m pixsigma_jax.evaluate study report --folder=FOLDER --study=NAME

They need the extra `eval`.
"""

import csv
import os
import pathlib
import re
import secrets
import socket
from collections.abc import Sequence
from typing import Any

from pixsigma_jax import disk
from pixsigma_jax.evaluate.commands import Command
from pixsigma_jax.evaluate.folder import open_folder
from pixsigma_jax.evaluate.options import Option, OptionFlags
from pixsigma_jax.wording import install

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MOST_RATERS = 1000


_COMMON = (
  Option("folder", None, "What `evaluate sample` filled: its --output. Required."),
  Option("study", None, "Name of the study. Required."),
  Option(
    "database",
    None,
    "Where studies and answers are: sqlite:///FILE, or "
    "postgresql://USER:PASSWORD@HOST/NAME. By default studies.db in --folder.",
  ),
)
_CREATE = (
  Option("models", [], "Two to eight, separated by commas; by default all.", list),
  Option("raters", [], "How many, or their names with commas. Required.", list),
  Option("per_rater", None, "Prompts a rater sees; by default all.", int),
  Option(
    "repeats",
    0,
    "Prompts of these that come twice, to see how consistent a rater is.",
    int,
  ),
  Option("address", "http://127.0.0.1:8000", "Where raters find the website."),
)
_SERVE = (
  Option("host", "127.0.0.1", "Address to listen at; 0.0.0.0 lets the network in."),
  Option("port", 8000, "Port to listen at; 0 takes a free one.", int),
)
_REPORT = (
  Option("subject", None, "Model the plot is about; by default the strongest."),
  Option(
    "beside",
    [],
    "report.json of `judge` or of other studies, to plot beside this one.",
    list,
  ),
)


def define(name: str, arguments: Sequence[str]) -> Command:
  """Defines the flags of `study create`, `serve` or `report`.

  Raises:
    ValueError: the word after `study` is none of these.
  """
  word = next((each for each in arguments if not each.startswith("-")), "nothing")
  known = {
    "create": (_create, _CREATE),
    "serve": (_serve, _SERVE),
    "report": (_report, _REPORT),
  }
  if word not in known:
    raise ValueError(f"`evaluate {name}` does {', '.join(known)}, not {word}.")
  run, own = known[word]
  asked = OptionFlags((*_COMMON, *own))

  def run_with_values(_: list[str]) -> None:
    values = asked.values()
    for required in ("folder", "study"):
      if values[required] is None:
        raise ValueError(f"--{required} is missing: `study {word}` needs it.")
    run(**values)

  return Command(run_with_values, ("/".join(known),))


def _create(
  folder: str,
  study: str,
  database: str | None,
  models: Sequence[str],
  raters: Sequence[str],
  per_rater: int | None,
  repeats: int,
  address: str,
) -> None:
  evaluation = open_folder(folder)
  if not _NAME.fullmatch(study):
    raise ValueError(
      f"A study cannot be called {study!r}: use letters, digits, '.', '_' and '-'."
    )
  names = _rater_names(raters)
  links = evaluation.path / "studies" / study / "links.csv"
  disk.check_writable(links.parent)
  answers = _answers()
  from pixsigma_jax.evaluate.study import design

  with answers.Database(database or answers.default_url(evaluation.path)) as opened:
    drawn_up = design.draw_up(
      evaluation,
      name=study,
      secret=secrets.token_hex(32),
      models=models,
      per_rater=per_rater,
      repeats=repeats,
    )
    tokens = opened.create(drawn_up, names)
  rows = [(name, f"{address.rstrip('/')}/r/{token}") for name, token in tokens.items()]

  def write(part: pathlib.Path) -> None:
    # Who can read a link can answer as its rater.
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
      csv.writer(file).writerows([("rater", "link"), *rows])

  disk.write_whole(links, write)
  count = drawn_up.per_rater + drawn_up.repeats
  print(
    f"{study}: {len(drawn_up.models)} models, {len(drawn_up.subjects)} prompts, "
    f"{len(rows)} raters with {count} tasks each."
  )
  print(links)


def _serve(folder: str, study: str, database: str | None, host: str, port: int) -> None:
  path = open_folder(folder).path
  answers = _answers()
  import uvicorn

  from pixsigma_jax.evaluate.study.site import Site

  with answers.Database(database or answers.default_url(path)) as opened:
    site = Site.open(path, opened, study)
    try:
      listener = socket.create_server((host, port), backlog=2048)
    except OSError as error:
      raise OSError(
        f"Cannot listen at {host}:{port}: {error}. Give others with --host and --port."
      ) from error
    with listener:
      host, port = listener.getsockname()[:2]
      print(f"Serving {study} at http://{host}:{port}/   Ctrl-C ends it.", flush=True)
      # No log of requests: their addresses hold the raters' tokens.
      config = uvicorn.Config(
        site.app(), log_level="warning", access_log=False, server_header=False
      )
      uvicorn.Server(config).run(sockets=[listener])


def _report(
  folder: str,
  study: str,
  database: str | None,
  subject: str | None,
  beside: Sequence[str],
) -> None:
  path = open_folder(folder).path
  answers = _answers()
  from pixsigma_jax.evaluate.study import presentation, report

  with answers.Database(database or answers.default_url(path)) as opened:
    content, markdown = report.of_study(opened, study)
  if subject is None:
    subject = str(content["criteria"]["quality"]["models"][0]["name"])
  elif subject not in content["models"]:
    raise ValueError(
      f"--subject={subject} is not in the study: choose one of "
      f"{', '.join(content['models'])}."
    )
  written = presentation.write(
    path / "studies" / study,
    content,
    markdown,
    subject,
    [pathlib.Path(each) for each in beside],
  )
  print("\n".join(markdown))
  for each in written:
    print(each)


def _rater_names(raters: Sequence[str]) -> list[str]:
  """Names as given, or rater-1 … of a number."""
  if len(raters) == 1 and raters[0].isdecimal():
    count = int(raters[0])
    if not 1 <= count <= _MOST_RATERS:
      raise ValueError(f"--raters={count} must be from 1 to {_MOST_RATERS:,}.")
    return [f"rater-{i + 1}" for i in range(count)]
  if not raters or not all(name.strip() for name in raters):
    raise ValueError(
      f"--raters={','.join(raters)} must be a number, or names with commas between."
    )
  return [name.strip() for name in raters]


def _answers() -> Any:
  """The module `answers`, once it is known that what it needs is installed."""
  try:
    import matplotlib  # noqa: F401
    import starlette  # noqa: F401
    import uvicorn  # noqa: F401

    from pixsigma_jax.evaluate.study import answers
  except ModuleNotFoundError as error:
    if error.name not in {"sqlalchemy", "starlette", "uvicorn", "matplotlib"}:
      raise
    raise ValueError(f"A study needs {error.name}: {install('eval')}.") from error
  return answers
