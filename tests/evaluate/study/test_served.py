"""A study as commands create, serve and report it: to browsers, and through kills."""

import contextlib
import csv
import json
import pathlib
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading

import httpx
import pytest

from pixsigma_jax.evaluate.study import answers, command
from pixsigma_jax.evaluate.study.answers import Database
from tests import commands
from tests.demo.browser import Browser
from tests.evaluate import preference_world as world

ROOT = pathlib.Path(__file__).parents[3]
STUDY = "people"


@pytest.fixture
def evaluate(capsys, monkeypatch):
  def evaluate(*arguments):
    return commands.run(capsys, monkeypatch, "evaluate", *arguments)

  return evaluate


@pytest.fixture
def folder(tmp_path):
  return world.make(tmp_path / "folder", prompts=world.PROMPTS[:3]).path


def create(evaluate, folder, *flags, study=STUDY):
  return evaluate("study", "create", f"--folder={folder}", f"--study={study}", *flags)


def links(folder, study=STUDY):
  with (folder / "studies" / study / "links.csv").open(newline="") as file:
    return {row["rater"]: row["link"] for row in csv.DictReader(file)}


def free_port():
  with socket.socket() as at:
    at.bind(("127.0.0.1", 0))
    return at.getsockname()[1]


@contextlib.contextmanager
def served(folder, port, study=STUDY, stderr=None):
  """The website in a process of its own, which ends by SIGKILL."""
  # A suite in the background ignores Ctrl-C, and its children would inherit that.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  process = subprocess.Popen(
    [
      *(sys.executable, "-m", "pixsigma_jax.evaluate", "study", "serve"),
      *(f"--folder={folder}", f"--study={study}", f"--port={port}"),
    ],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=stderr,
    text=True,
  )
  signal.signal(signal.SIGINT, before)
  try:
    line = process.stdout.readline()
    assert line == (f"Serving {study} at http://127.0.0.1:{port}/   Ctrl-C ends it.\n")
    yield process
  finally:
    process.kill()
    process.wait()
    process.stdout.close()
    if stderr is not None:
      process.stderr.close()


def test_create_writes_a_link_for_each_rater_and_keeps_no_token(evaluate, folder):
  done = create(
    *(evaluate, folder, "--raters=ann,bob", "--per_rater=2", "--repeats=1"),
    "--address=https://study.example/",
  )
  file = folder / "studies" / STUDY / "links.csv"
  assert (done.code, done.out) == (
    0,
    f"people: 3 models, 3 prompts, 2 raters with 3 tasks each.\n{file}\n",
  )
  assert stat.S_IMODE(file.stat().st_mode) == 0o600
  given = links(folder)
  assert list(given) == ["ann", "bob"]
  stored = (folder / "studies.db").read_bytes()
  for link in given.values():
    start, token = link.rsplit("/", 1)
    assert start == "https://study.example/r"
    assert len(token) == 24
    assert token.encode() not in stored
  assert answers.hashed(token).encode() in stored


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--raters=0"], "--raters=0 must be from 1 to 1,000"),
    (["--raters=ann,,bob"], "--raters=ann,,bob must be a number, or names"),
    (["--raters="], "must be a number, or names with commas"),
    (["--raters=ann,ann"], "A rater comes twice among ann, ann"),
    (["--raters=2", "--study=a/b"], "A study cannot be called 'a/b'"),
    (["--raters=2", "--models=alpha"], "1 models (alpha) cannot be compared"),
    (["--raters=2", "--folder=nowhere"], "There are no prompts in nowhere"),
  ],
)
def test_create_refuses_in_one_line_and_leaves_nothing(
  evaluate, folder, flags, message
):
  done = create(evaluate, folder, *flags)
  assert done.code == 1
  assert done.err.startswith("Error: ")
  assert message in done.err
  assert not (folder / "studies").exists()


def test_a_second_study_of_the_name_is_refused_and_keeps_the_links(evaluate, folder):
  create(evaluate, folder, "--raters=1")
  before = links(folder)
  done = create(evaluate, folder, "--raters=1")
  assert "There is a study 'people' in sqlite" in done.err
  assert links(folder) == before


def test_unknown_words_and_missing_names_are_told(evaluate, folder):
  with pytest.raises(ValueError, match="does create, serve, report, not crate"):
    command.define("study", ["--folder=x", "crate"])
  done = evaluate("study", "serve", f"--folder={folder}")
  assert done.err == "Error: --study is missing: `study serve` needs it.\n"
  done = evaluate("study", "report", f"--folder={folder}", "--study=x")
  assert "There is no study 'x' in sqlite" in done.err


def test_a_port_that_is_taken_is_named(evaluate, folder):
  create(evaluate, folder, "--raters=1")
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    flags = [f"--folder={folder}", f"--study={STUDY}", f"--port={port}"]
    done = evaluate("study", "serve", *flags)
  assert done.code == 1
  assert f"Cannot listen at 127.0.0.1:{port}: " in done.err


def test_ctrl_c_ends_the_website_in_one_line(evaluate, folder):
  create(evaluate, folder, "--raters=1")
  port = free_port()
  with served(folder, port, stderr=subprocess.PIPE) as process:
    assert httpx.get(f"http://127.0.0.1:{port}/page.js").status_code == 200
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert process.stderr.read() == "Interrupted: by Ctrl-C.\n"


def test_without_its_packages_a_study_says_what_to_install(
  evaluate, folder, monkeypatch
):
  monkeypatch.setitem(sys.modules, "uvicorn", None)
  done = create(evaluate, folder, "--raters=1")
  assert done.err == (
    "Error: A study needs uvicorn: in the repository's root, pip install -e "
    '".[eval]".\n'
  )


# ----------------------------------------------------------------- the server is killed


def answer(nonce, count=3):
  ranks = list(range(1, count + 1))
  return {
    "nonce": nonce,
    "ranks": {"quality": ranks, "match": ranks[::-1]},
    "note": nonce,
    "seconds": 1,
    "screen": {"height": 1, "width": 1, "device_pixels": 1, "zoomed": False},
  }


def test_what_was_acknowledged_before_a_kill_is_there_after_it(evaluate, folder):
  create(evaluate, folder, "--raters=8")
  acknowledged, port = [], free_port()
  enough = threading.Event()

  def rate(number, link):
    with httpx.Client() as client:
      for i in range(1000):
        nonce = f"rater-{number}-answer-{i}"
        try:
          got = client.post(f"{link}/tasks/{i % 3}", content=json.dumps(answer(nonce)))
        except httpx.TransportError:
          return  # killed
        assert got.json() == {"stored": nonce}
        acknowledged.append(nonce)
        if len(acknowledged) > 100:
          enough.set()

  addresses = [link.replace(":8000", f":{port}") for link in links(folder).values()]
  with served(folder, port) as process:
    threads = [
      threading.Thread(target=rate, args=each) for each in enumerate(addresses)
    ]
    for thread in threads:
      thread.start()
    assert enough.wait(120)
    process.kill()  # with answers on their way
    for thread in threads:
      thread.join(120)
  with Database(answers.default_url(folder)) as database:
    stored = {
      row[0]
      for row in database._engine.connect().exec_driver_sql("SELECT nonce FROM answers")
    }
  assert set(acknowledged) <= stored
  assert len(stored) - len(acknowledged) <= len(threads)  # nobody waited for these


# ------------------------------------------------------------------------ two browsers


@pytest.fixture
def browsers(tmp_path):
  executable = shutil.which("chromium")
  if executable is None:
    pytest.skip("There is no chromium on the PATH (Debian: apt install chromium).")
  with (
    Browser(executable, tmp_path / "one") as one,
    Browser(executable, tmp_path / "other") as other,
  ):
    yield one, other


def middle(browser, selector):
  browser.wait(f"!!document.querySelector({json.dumps(selector)})")
  return browser.run(
    f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])("
    f"document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
  )


def chip(criterion, i):
  return f".chip[data-criterion={criterion}][data-picture='{i}']"


def place(criterion, rank):
  return f"[data-criterion={criterion}] .place[data-rank='{rank}']"


def drag(browser, criterion, i, rank):
  browser.run(
    f"document.querySelector({json.dumps(place(criterion, rank))})"
    ".scrollIntoView({block: 'center'})"
  )
  start, end = (
    middle(browser, chip(criterion, i)),
    middle(browser, place(criterion, rank)),
  )
  between = [(a + b) / 2 for a, b in zip(start, end, strict=True)]
  for kind, (x, y) in (
    ("mousePressed", start),
    ("mouseMoved", between),
    ("mouseMoved", end),
    ("mouseReleased", end),
  ):
    at = {"x": x, "y": y, "button": "left", "buttons": 1, "clickCount": 1}
    browser.do("Input.dispatchMouseEvent", type=kind, **at)


def touch(browser, criterion, i, rank):
  """A finger drags."""
  browser.run(
    f"document.querySelector({json.dumps(place(criterion, rank))})"
    ".scrollIntoView({block: 'center'})"
  )
  start, end = (
    middle(browser, chip(criterion, i)),
    middle(browser, place(criterion, rank)),
  )
  for kind, points in (("touchStart", [start]), ("touchMove", [end]), ("touchEnd", [])):
    points = [{"x": x, "y": y} for x, y in points]
    browser.do("Input.dispatchTouchEvent", type=kind, touchPoints=points)


def press(browser, key):
  about = {"key": key, "text": key if len(key) == 1 else ""}
  if key == "Enter":
    about = {"key": key, "text": "\r", "windowsVirtualKeyCode": 13}
  browser.do("Input.dispatchKeyEvent", type="keyDown", **about)
  browser.do("Input.dispatchKeyEvent", type="keyUp", key=key)


def tap(browser, criterion, i, rank):
  browser.click(chip(criterion, i))
  browser.click(f"{place(criterion, rank)} small")


def shows(browser, number):
  browser.wait(
    f"document.querySelector('#position')?.innerText.startsWith('Task {number + 1} of')"
    " && !document.querySelector('#task').hidden && "
    "[...document.querySelectorAll('#pictures img')].every(i => i.complete)"
  )


def reload(browser):
  browser.run("window.before = true")
  browser.do("Page.reload")
  browser.wait("!window.before && document.readyState == 'complete'")


def order_of(number, rater, folder):
  with Database(answers.default_url(folder)) as database:
    return database.study(STUDY).design.tasks(rater)[number]


def ranks_of(opinion, task, criterion):
  return [opinion(task.subject.id, criterion)[model] for model in task.models]


def ann(item, criterion):
  """Alpha, then the others, equal; but for one prompt all fit equally well."""
  if (item, criterion) == ("p0", "match"):
    return dict.fromkeys(world.MODELS, 1)
  return {"alpha": 1, "beta": 2, "gamma": 2}


def bob(item, criterion):
  """Gamma, beta, alpha; by match of one prompt the reverse."""
  if (item, criterion) == ("p1", "match"):
    return {"alpha": 1, "beta": 2, "gamma": 3}
  return {"alpha": 3, "beta": 2, "gamma": 1}


def test_two_raters_rank_reload_and_finish_and_the_report_has_their_answers(
  evaluate, folder, browsers, tmp_path
):
  port = free_port()
  create(
    *(evaluate, folder, "--raters=ann,bob", f"--address=http://127.0.0.1:{port}"),
    "--repeats=1",
  )
  one, other = browsers
  other.do("Emulation.setTouchEmulationEnabled", enabled=True)
  with served(folder, port):
    for browser, link in zip(browsers, links(folder).values(), strict=True):
      browser.do("Page.navigate", url=link)
    for number in range(4):
      tasks = [order_of(number, rater, folder) for rater in (0, 1)]
      for browser, task in zip(browsers, tasks, strict=True):
        shows(browser, number)
        # A caption with HTML is letters, and makes no element.
        assert (
          browser.run("document.querySelector('#prompt').textContent")
          == task.subject.prompt
        )
        assert browser.run("document.querySelector('#prompt').children.length") == 0
        assert browser.run("document.title") == "Which picture is better?"
        assert browser.run("document.querySelector('#submit').disabled")
      place_by = (drag, tap)[number % 2]
      for criterion in ("quality", "match"):
        for i, rank in enumerate(ranks_of(ann, tasks[0], criterion)):
          place_by(one, criterion, i, rank)
      if number == 0:  # what is not saved yet outlives a reload
        one.type("#note", "with <i>care</i>")
        one.screenshot(tmp_path / "page.png")
        reload(one)
        shows(one, 0)
        one.wait("document.querySelector('#note').value == 'with <i>care</i>'")
      if number % 2:
        for criterion in ("quality", "match"):
          for i, rank in enumerate(ranks_of(bob, tasks[1], criterion)):
            touch(other, criterion, i, rank)
      else:
        for criterion in ("quality", "match"):
          for rank in ranks_of(bob, tasks[1], criterion):
            press(other, str(rank))
      one.click("#submit")
      if number % 2:
        other.click("#submit")
      else:
        press(other, "Enter")
      if number == 1:
        shows(one, 2)
        one.click("#forward")
        shows(one, 3)
        one.click("#forward")  # not the end: a task is open
        shows(one, 2)
        # What is saved outlives a reload, too.
        for browser in browsers:
          shows(browser, 2)
          reload(browser)
    for browser in browsers:
      browser.wait("!document.querySelector('#finished').hidden")
      hosts = {url.split("/")[2] for url in browser.requests() if "//" in url}
      assert hosts == {f"127.0.0.1:{port}"}

  done = evaluate("study", "report", f"--folder={folder}", f"--study={STUDY}")
  assert done.code == 0
  report = json.loads((folder / "studies" / STUDY / "report.json").read_text())
  counts = {
    criterion: {
      (p["first"], p["second"]): (p["wins"], p["ties"], p["losses"])
      for p in found["pairs"]
    }
    for criterion, found in report["criteria"].items()
  }
  assert counts == {
    "quality": {
      ("alpha", "beta"): (3, 0, 3),
      ("alpha", "gamma"): (3, 0, 3),
      ("beta", "gamma"): (0, 3, 3),
    },
    "match": {
      ("alpha", "beta"): (2 + 1, 1, 2),
      ("alpha", "gamma"): (2 + 1, 1, 2),
      ("beta", "gamma"): (1, 3, 2),
    },
  }
  assert report["answers"] == 8
  assert report["consistency"] == 1
  assert [n["note"] for n in report["notes"]] == ["with <i>care</i>"]
  assert "with &lt;i>care&lt;/i>" in done.out
  plot = (folder / "studies" / STUDY / "report.png").read_bytes()
  assert plot.startswith(b"\x89PNG")


def test_the_page_sends_again_what_a_dead_server_did_not_store(
  evaluate, folder, browsers
):
  port = free_port()
  create(
    *(evaluate, folder, "--raters=ann", "--models=alpha,beta"),
    f"--address=http://127.0.0.1:{port}",
  )
  [link] = links(folder).values()
  browser, _ = browsers
  with served(folder, port):
    browser.do("Page.navigate", url=link)
    shows(browser, 0)
  press(browser, "e")
  press(browser, "2")
  press(browser, "1")
  browser.click("#submit")
  browser.wait(
    "document.querySelector('#status').innerText.startsWith('Not saved yet')"
  )
  with served(folder, port):
    shows(browser, 1)
    assert browser.run("document.querySelector('#status').innerText") == ""
    task = order_of(0, 0, folder)
    with Database(answers.default_url(folder)) as database:
      [rater] = database.raters(database.study(STUDY)).values()
      [stored] = database.answers(rater).values()
    assert stored.ranks == {
      "quality": dict.fromkeys(task.models, 1),
      "match": dict(zip(task.models, (2, 1), strict=True)),
    }


def test_zoom_shows_a_pixel_on_each_pixel_of_the_screen(evaluate, tmp_path, browsers):
  made = world.make(tmp_path / "large", prompts=["a wall"], size=(3000, 4000))
  port = free_port()
  create(
    *(evaluate, made.path, "--raters=ann"),
    f"--address=http://127.0.0.1:{port}",
  )
  [link] = links(made.path).values()
  browser, _ = browsers
  browser.do(
    "Emulation.setDeviceMetricsOverride",
    **{"width": 1200, "height": 900, "deviceScaleFactor": 2, "mobile": False},
    **{"screenWidth": 1200, "screenHeight": 900},
  )
  with served(made.path, port):
    browser.do("Page.navigate", url=link)
    shows(browser, 0)
    hint = browser.run("document.querySelector('#hint').innerText")
    assert "up to 4000 × 3000 pixels and your screen has 2400 × 1800" in hint
    browser.click("#pictures img")
    size = "[enlarged.getBoundingClientRect().width, enlarged.naturalWidth]"
    browser.wait("document.querySelector('#zoom').open && enlarged.complete")
    assert browser.run(size) == [2000, 4000]  # CSS pixels, two of the screen each
    before = browser.run("[pane.scrollLeft, pane.scrollTop, enlarged.src]")
    assert before[0] > 0
    assert before[1] > 0
    press(browser, "ArrowRight")
    after = browser.run("[pane.scrollLeft, pane.scrollTop, enlarged.src]")
    assert after[:2] == before[:2]
    assert after[2] != before[2]
