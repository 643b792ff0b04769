"""The website of a study, asked as a browser asks it, and its database."""

import json
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import types

import numpy as np
import pytest
import sqlalchemy
from PIL import Image
from starlette.testclient import TestClient

from pixsigma_jax.evaluate.study import answers, design, report
from pixsigma_jax.evaluate.study.answers import Answer, Database
from pixsigma_jax.evaluate.study.site import Site
from tests.evaluate import preference_world as world


@pytest.fixture
def folder(tmp_path):
  return world.make(tmp_path / "folder")


@pytest.fixture
def database(folder):
  with Database(answers.default_url(folder.path)) as opened:
    yield opened


def create(folder, database, name="s", raters=("ann", "bob"), **options):
  drawn_up = design.draw_up(folder, name=name, secret="ab" * 32, **options)
  return database.create(drawn_up, raters)


@pytest.fixture
def world_of(folder, database):
  """A study of two raters that is served: their tokens, and a client."""
  other = create(folder, database, "other", raters=["ann"])["ann"]
  tokens = create(folder, database, repeats=1)
  site = Site.open(folder.path, database, "s")
  with TestClient(site.app()) as client:
    yield types.SimpleNamespace(
      site=site, client=client, of_another_study=other, **tokens
    )


def answer(ranks=((1, 2, 3), (1, 1, 2)), nonce="n0nce-12345", note="", **changes):
  quality, match = ranks
  return {
    "nonce": nonce,
    "ranks": {"quality": quality, "match": match},
    "note": note,
    "seconds": 12.5,
    "screen": {"height": 900, "width": 1600, "device_pixels": 2, "zoomed": True},
  } | changes


def post(client, token, number, content):
  return client.post(f"/r/{token}/tasks/{number}", content=json.dumps(content))


def test_a_page_has_its_task_and_may_load_nothing_else(world_of):
  client, token = world_of.client, world_of.ann
  page = client.get(f"/r/{token}")
  assert page.headers["content-type"] == "text/html; charset=utf-8"
  policy = page.headers["content-security-policy"]
  assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy
  assert "unsafe" not in policy
  assert page.headers["referrer-policy"] == "no-referrer"
  assert page.headers["cache-control"] == "no-store"
  for name, kind in (("page.js", "text/javascript"), ("page.css", "text/css")):
    assert client.get(f"/{name}").headers["content-type"] == f"{kind}; charset=utf-8"
  about = client.get(f"/r/{token}/tasks").json()
  assert (about["rater"], about["total"], about["answered"]) == ("ann", 6, [])


def test_images_are_those_of_the_task_and_do_not_say_whose(world_of, database):
  client, rater = world_of.client, next(iter(world_of.site.raters.values()))
  for number, task in enumerate(world_of.site.tasks[rater.id]):
    shown = client.get(f"/r/{world_of.ann}/tasks/{number}")
    assert shown.json()["prompt"] == task.subject.prompt
    assert not any(name in shown.text for name in world.MODELS)
    prompt = world.PROMPTS.index(task.subject.prompt)
    for model, image in zip(task.models, shown.json()["pictures"], strict=True):
      assert (image["height"], image["width"]) == (12, 16)
      got = client.get(f"/r/{image['address']}")
      said = str(got.headers) + got.text
      assert not any(name in said for name in world.MODELS)
      assert "last-modified" not in got.headers
      path = pathlib.Path(database.url.removeprefix("sqlite:///")).with_name("seen.png")
      path.write_bytes(got.content)
      with Image.open(path) as image:
        assert (np.asarray(image) == world.grey(model, prompt)).all()


def test_html_in_a_prompt_goes_out_as_json_and_never_as_a_page(world_of):
  tasks = [world_of.client.get(f"/r/{world_of.ann}/tasks/{n}") for n in range(6)]
  [shown, *_] = [task for task in tasks if task.json()["prompt"] == world.HTML]
  assert shown.headers["content-type"] == "application/json"
  assert shown.headers["x-content-type-options"] == "nosniff"
  assert "bold" not in world_of.client.get(f"/r/{world_of.ann}").text


def test_an_answer_comes_back_in_the_order_in_which_it_was_given(world_of, database):
  sent = answer(((3, 1, 1), (2, 3, 1)), note=" hands <b> ")
  assert post(world_of.client, world_of.ann, 2, sent).json() == {
    "stored": "n0nce-12345"
  }
  again = world_of.client.get(f"/r/{world_of.ann}/tasks/2").json()["answer"]
  # 3, 1, 1 leaves a place empty: it is second.
  assert again == {
    "ranks": {"quality": [2, 1, 1], "match": [2, 3, 1]},
    "note": "hands <b>",
  }
  rater = next(r for r in world_of.site.raters.values() if r.name == "ann")
  [stored] = database.answers(rater).values()
  task = world_of.site.tasks[rater.id][2]
  assert stored.ranks["match"] == dict(zip(task.models, (2, 3, 1), strict=True))
  assert stored.seconds == 12.5
  assert stored.screen["zoomed"] is True
  assert world_of.client.get(f"/r/{world_of.ann}/tasks").json()["answered"] == [2]
  assert world_of.client.get(f"/r/{world_of.bob}/tasks").json()["answered"] == []


def rows(database):
  engine = sqlalchemy.create_engine(database.url)
  with engine.connect() as connection:
    count = connection.execute(sqlalchemy.text("SELECT count(*) FROM answers")).scalar()
  engine.dispose()
  return count


def test_an_answer_sent_twice_is_stored_once_and_a_changed_one_counts(
  world_of, database
):
  for _ in range(2):
    assert post(world_of.client, world_of.ann, 0, answer()).status_code == 200
  assert rows(database) == 1
  changed = answer(((3, 2, 1), (1, 1, 1)), nonce="another-nonce")
  assert post(world_of.client, world_of.ann, 0, changed).status_code == 200
  assert rows(database) == 2  # nothing that was acknowledged is overwritten
  got = world_of.client.get(f"/r/{world_of.ann}/tasks/0").json()["answer"]
  assert got["ranks"]["quality"] == [3, 2, 1]


def test_a_token_of_another_study_is_refused(world_of, database):
  client, other = world_of.client, world_of.of_another_study
  for token in (other, "made-up", world_of.ann[:-1]):
    for path in ("", "/tasks", "/tasks/0"):
      got = client.get(f"/r/{token}{path}")
      assert (got.status_code, got.text) == (
        403,
        "This link is of no rater of this study.",
      )
    assert post(client, token, 0, answer()).status_code == 403
    image = client.get(f"/r/{world_of.ann}/tasks/0").json()["pictures"][0]["address"]
    stolen = image.replace(world_of.ann, token)
    assert client.get(f"/r/{stolen}").status_code == 403
  assert rows(database) == 0


def without(key):
  return {name: value for name, value in answer().items() if name != key}


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("{", "is not of its form"),
    ("[]", "lacks something"),
    (json.dumps(without("ranks")), "lacks something: 'ranks'"),
    (json.dumps(answer(((1, 2), (1, 2, 3)))), "quality must rank 3 images from 1 to"),
    (json.dumps(answer(((1, 2, 3), (1, 2, 4)))), "match must rank 3 images"),
    (json.dumps(answer(((1, 2, 3), (1, 2, 0)))), "match must rank"),
    (json.dumps(answer(((1, 2, True), (1, 2, 3)))), "quality must rank"),
    (json.dumps(answer(nonce="short")), "its nonce is none"),
    (json.dumps(answer(note="x" * 4001)), "up to 4000 characters"),
    (json.dumps(answer(note="\ud800")), "surrogates"),
    (json.dumps(answer(seconds=float("nan"))), "its seconds are no number"),
    (json.dumps(answer(seconds=10**400)), "its seconds are no number"),
    (json.dumps(answer(screen={"height": 1, "width": "2"})), "lacks something"),
  ],
)
def test_what_is_no_answer_is_refused_and_not_stored(
  world_of, database, content, message
):
  got = world_of.client.post(f"/r/{world_of.ann}/tasks/0", content=content)
  assert got.status_code == 400
  assert message in got.text
  assert rows(database) == 0


def test_an_answer_that_is_too_long_or_to_no_task_is_refused(world_of):
  long = answer(note="x" * 70_000)
  assert post(world_of.client, world_of.ann, 0, long).status_code == 413
  assert post(world_of.client, world_of.ann, 6, answer()).status_code == 404
  assert world_of.client.get(f"/r/{world_of.ann}/tasks/6").status_code == 404


def test_an_answer_that_cannot_be_stored_is_not_acknowledged(
  world_of, database, monkeypatch
):
  def full(_):
    raise sqlalchemy.exc.OperationalError("INSERT", {}, Exception("disk is full"))

  with monkeypatch.context() as patch:
    patch.setattr(database, "save", full)
    assert post(world_of.client, world_of.ann, 0, answer()).status_code == 503
  assert post(world_of.client, world_of.ann, 0, answer()).status_code == 200


def test_an_image_that_has_changed_since_is_not_shown(world_of, folder):
  for path in folder.path.glob("models/*/images/*.png"):
    path.write_bytes(path.read_bytes() + b"\0")
  image = world_of.client.get(f"/r/{world_of.ann}/tasks/0").json()["pictures"][0]
  got = world_of.client.get(f"/r/{image['address']}")
  assert (got.status_code, got.text) == (500, "This image cannot be shown.")
  made_up = f"/r/{world_of.ann}/pictures/{'0' * 32}.png"
  assert world_of.client.get(made_up).status_code == 404


def test_an_image_that_is_gone_is_named_before_the_study_is_served(folder, database):
  create(folder, database)
  folder.model("beta").image_path(folder.items[1]).unlink()
  with pytest.raises(ValueError, match=r"models/beta/images/p1\.png .* is gone"):
    Site.open(folder.path, database, "s")


# ----------------------------------------------------------------------- what they said


def fill(site, opinion, nonce="nonce"):
  """Has every rater rank by `opinion(rater, item, criterion)`: model → rank."""
  for rater in site.raters.values():
    for number, task in enumerate(site.tasks[rater.id]):
      ranks = {
        criterion: opinion(rater.name, task.subject.id, criterion)
        for criterion in design.CRITERIA
      }
      note = f"{rater.name} | <b>&" if number == 0 else ""
      given = Answer(rater.id, number, f"{nonce}-{number}", ranks, note, 4.0, {})
      site.database.save([given])


def test_the_report_holds_exactly_what_the_raters_said(world_of, database):
  def opinion(rater, item, criterion):
    best = "beta" if rater == "ann" and criterion == "quality" else "gamma"
    return {model: 1 if model == best else 2 for model in world.MODELS}

  fill(world_of.site, opinion)
  content, lines = report.of_study(database, "s")
  pairs = {
    criterion: {
      (p["first"], p["second"]): (p["wins"], p["ties"], p["losses"])
      for p in found["pairs"]
    }
    for criterion, found in content["criteria"].items()
  }
  # Five prompts a rater; the one that came twice counts once.
  assert pairs["quality"] == {
    ("alpha", "beta"): (0, 5, 5),
    ("alpha", "gamma"): (0, 5, 5),
    ("beta", "gamma"): (5, 0, 5),
  }
  assert pairs["match"] == {
    ("alpha", "beta"): (0, 10, 0),
    ("alpha", "gamma"): (0, 0, 10),
    ("beta", "gamma"): (0, 0, 10),
  }
  assert content["answers"] == 12
  assert content["consistency"] == 1
  assert content["criteria"]["match"]["alpha"] == 1
  assert content["criteria"]["quality"]["agreement"] == 0
  assert [r["answered"] for r in content["raters"]] == [6, 6]
  text = "\n".join(lines)
  assert "| beta | gamma | 5 | 0 | 5 |" in text
  assert r"| ann | ann \| &lt;b>&amp; |" in text


def test_raters_who_judge_otherwise_the_second_time_are_seen(world_of, database):
  fill(world_of.site, lambda *_: dict(zip(world.MODELS, (1, 2, 3), strict=True)))
  rater = next(r for r in world_of.site.raters.values() if r.name == "bob")
  tasks = world_of.site.tasks[rater.id]
  [number] = [n for n, task in enumerate(tasks) if task.repeated]
  turned = dict(zip(world.MODELS, (1, 3, 2), strict=True))
  ranks = {"quality": turned, "match": turned}
  database.save([Answer(rater.id, number, "later-nonce", ranks, "", 1.0, {})])
  content, _ = report.of_study(database, "s")
  ann, bob = content["raters"]
  assert (ann["same_twice"], ann["compared_twice"]) == (6, 6)
  assert (bob["same_twice"], bob["compared_twice"]) == (4, 6)
  assert content["consistency"] == pytest.approx(10 / 12)
  # Nor does the second time count.
  pairs = content["criteria"]["quality"]["pairs"]
  assert {(p["wins"], p["losses"]) for p in pairs} == {(10, 0)}
  assert content["criteria"]["quality"]["comparisons"] == 30


def test_a_study_without_an_answer_has_no_report(world_of, database):
  with pytest.raises(
    ValueError, match="Nobody has answered anything in the study s yet"
  ):
    report.of_study(database, "s")


# ------------------------------------------------------------------------- the database


@pytest.fixture(scope="module")
def postgresql():
  """The URL of a PostgreSQL server that is started here."""
  if shutil.which("initdb") is None:
    pytest.skip("There is no initdb on the PATH (Debian: apt install postgresql).")
  # The server does not run as root.
  owner = {}
  folder = pathlib.Path(tempfile.mkdtemp(prefix="postgresql"))
  if not pathlib.Path("/proc/self").exists() or folder.stat().st_uid == 0:
    shutil.chown(folder, "postgres")
    owner = {"user": "postgres", "cwd": "/"}
  with socket.socket() as at:
    at.bind(("127.0.0.1", 0))
    port = at.getsockname()[1]
  quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
  initdb = ["initdb", "-D", folder / "data", "-A", "trust", "-U", "postgres", "-N"]
  subprocess.run(initdb, check=True, **owner, **quiet)
  options = ["-p", str(port), "-k", folder, "-h", "127.0.0.1"]
  server = subprocess.Popen(
    ["postgres", "-D", folder / "data", *options], **owner, **quiet
  )
  try:
    yield f"postgresql://postgres@127.0.0.1:{port}/postgres"
  finally:
    server.send_signal(signal.SIGINT)
    server.wait(60)
    shutil.rmtree(folder)


def patiently(url):
  until = time.monotonic() + 60
  while True:
    try:
      return Database(url)
    except OSError:
      if time.monotonic() > until:
        raise
      time.sleep(0.2)


def test_on_postgresql_a_study_is_the_same(folder, postgresql):
  with patiently(postgresql) as database:
    tokens = create(folder, database, repeats=1)
    site = Site.open(folder.path, database, "s")
    with TestClient(site.app()) as client:
      for _ in range(2):
        sent = answer(((3, 1, 2), (1, 1, 1)), note="ü\0")
        assert post(client, tokens["ann"], 1, sent).status_code == 200
      got = client.get(f"/r/{tokens['ann']}/tasks/1").json()["answer"]
      assert got == {
        "ranks": {"quality": [3, 1, 2], "match": [1, 1, 1]},
        "note": "ü",
      }
    with pytest.raises(ValueError, match="There is a study 's' in postgresql"):
      create(folder, database)
    content, _ = report.of_study(database, "s")
    assert content["answers"] == 1


def test_sqlite_waits_for_the_disk_before_it_acknowledges(database):
  with database._engine.connect() as connection:
    mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar()
    level = connection.exec_driver_sql("PRAGMA synchronous").scalar()
  assert mode == "wal"
  assert level == 2  # FULL: a commit is synced, not only a checkpoint


@pytest.mark.parametrize(
  ("url", "kind", "message"),
  [
    ("studies.db", ValueError, "is no URL of a database: give sqlite:///FILE or"),
    ("mysql://h/d", ValueError, "of mysql, which is not known here"),
    ("sqlite:////proc/no/such.db", OSError, "Cannot open the database sqlite:////proc"),
    ("postgresql://u:secret@127.0.0.1:1/d", OSError, r"u:\*\*\*@127.0.0.1:1/d: conn"),
  ],
)
def test_a_database_that_cannot_be_is_refused(url, kind, message):
  with pytest.raises(kind, match=message):
    Database(url)


def test_a_study_that_is_not_there_is_named_beside_those_that_are(folder, database):
  with pytest.raises(
    ValueError, match=r"There is no study 'x' in sqlite.*only nothing"
  ):
    database.study("x")
  create(folder, database, "first")
  with pytest.raises(ValueError, match=r"There is no study 'x' in sqlite.*only first"):
    database.study("x")
  with pytest.raises(ValueError, match="There is a study 'first' in sqlite"):
    create(folder, database, "first")
