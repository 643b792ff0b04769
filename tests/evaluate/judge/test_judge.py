"""A judge behind a real HTTP server that answers, stalls, refuses and sends garbage."""

import base64
import collections
import email.utils
import http.server
import io
import json
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from pixsigma_jax.evaluate.judge import asking, client
from pixsigma_jax.evaluate.judge.budget import Budget, LimitReached
from pixsigma_jax.evaluate.judge.cache import Cache
from pixsigma_jax.evaluate.judge.client import Client, Unanswered
from tests import commands
from tests.evaluate import preference_world as world

KEY = "sk-test"
USAGE = {"prompt_tokens": 1000, "completion_tokens": 50}


def completion(content, **message):
  return {
    "choices": [{"message": {"content": content, **message}, "finish_reason": "stop"}],
    "usage": USAGE,
  }


def votes(quality, match, reason="so"):
  return completion(json.dumps({"reason": reason, "quality": quality, "match": match}))


def images_of(request):
  """The grey values of both images, and the largest side of the first."""
  content = request["messages"][1]["content"]
  urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
  greys, sides = [], []
  for url in urls:
    head, data = url.split(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
      assert image.info == {}  # nothing says whose it is
      greys.append(int(np.asarray(image)[0, 0, 0]))
      sides.append(max(image.size))
  return greys, sides


class Endpoint:
  """A server whose answers are `answer(request)`: JSON, or status, headers and body."""

  def __init__(self):
    self.requests, self.failures = [], []
    self.answer = self.lighter
    endpoint = self

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_POST(self):
        content = json.loads(self.rfile.read(int(self.headers["content-length"])))
        endpoint.requests.append((self.path, dict(self.headers), content))
        answer = endpoint.failures.pop(0) if endpoint.failures else None
        answer = (answer or endpoint.answer)(content)
        status, headers, body = (
          answer if isinstance(answer, tuple) else (200, {}, answer)
        )
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
          self.send_response(status)
          for name, value in headers.items():
            self.send_header(name, value)
          self.send_header("content-length", str(len(body)))
          self.end_headers()
          self.wfile.write(body)
        except OSError:
          pass  # the client waits no more

      def log_message(self, *_):
        pass

    self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

  @staticmethod
  def lighter(request):
    """Of quality the lighter image, of match neither."""
    (first, second), _ = images_of(request)
    return votes("first" if first > second else "second", "equal")


@pytest.fixture
def endpoint():
  endpoint = Endpoint()
  thread = threading.Thread(target=endpoint.server.serve_forever)
  thread.start()
  yield endpoint
  endpoint.server.shutdown()
  thread.join()
  endpoint.server.server_close()


@pytest.fixture
def waits(monkeypatch):
  """Seconds that clients would have waited."""
  waited = []
  monkeypatch.setattr(Client, "_wait", lambda _, seconds: waited.append(seconds))
  return waited


@pytest.fixture
def ask(endpoint, waits):
  """One question about two small images."""
  made = [world_png(value) for value in (10, 200)]

  def ask(budget=None, **options):
    budget = budget or Budget()
    with Client(endpoint.url, KEY, "judge-1", budget, **options) as asked:
      return asked.ask("two dogs", *made)

  return ask


def world_png(value):
  file = io.BytesIO()
  Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(file, "PNG")
  return file.getvalue()


def test_a_question_has_both_images_the_prompt_and_the_schema(ask, endpoint):
  reply = ask()
  assert reply == client.Reply(
    "voted", {"quality": "second", "match": "equal"}, "so", 1000, 50
  )
  [(path, headers, request)] = endpoint.requests
  assert path == "/v1/chat/completions"
  assert headers["authorization"] == f"Bearer {KEY}"
  assert request["model"] == "judge-1"
  assert "two dogs" in request["messages"][1]["content"][0]["text"]
  schema = request["response_format"]["json_schema"]
  assert schema["strict"] is True
  assert schema["schema"]["required"] == ["reason", "quality", "match"]


def test_what_fails_for_a_while_is_tried_again_later_and_later(ask, endpoint, waits):
  endpoint.failures = [
    lambda _: (500, {}, b"oops"),
    lambda _: (200, {}, b"<html>a proxy's words</html>"),
    lambda _: (200, {}, {"choices": []}),
    lambda _: (503, {}, {"error": {"message": "overloaded"}}),
  ]
  assert ask().status == "voted"
  assert len(endpoint.requests) == 5
  # Doubled each time, and spread downwards by up to a half.
  for n, wait in enumerate(waits):
    assert 2**n / 2 <= wait <= 2**n


def test_a_server_that_limits_its_rate_is_given_the_time_it_asks_for(
  ask, endpoint, waits
):
  def until(_):
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    return 429, {"Retry-After": date}, b""

  endpoint.failures = [lambda _: (429, {"Retry-After": "37"}, b""), until]
  assert ask().status == "voted"
  assert waits[0] == 37
  assert 90 < waits[1] <= 100


def test_a_server_that_stalls_is_left_and_asked_again(ask, endpoint, waits):
  stalled = threading.Event()

  def stall(_):
    stalled.wait(30)
    return votes("first", "first")

  endpoint.failures = [stall]
  assert ask(timeout=0.3).votes["quality"] == "second"
  stalled.set()
  assert len(endpoint.requests) == 2
  assert len(waits) == 1


def test_a_server_that_never_answers_ends_the_asking(ask, endpoint, waits):
  endpoint.answer = lambda _: (502, {}, b"bad gateway")
  with pytest.raises(
    Unanswered, match=r"completions did not answer in 3 attempts: .* 502: 'bad gate"
  ):
    ask(attempts=3)
  assert len(endpoint.requests) == 3
  assert len(waits) == 2


@pytest.mark.parametrize(
  ("status", "body", "message"),
  [
    (401, {"error": {"message": "no such key"}}, "401. See that OPENAI_API_KEY is its"),
    (404, b"", "404. See that OPENAI_BASE_URL ends in its version, and --judge"),
    (400, {"error": {"code": "bad_schema"}}, r"answers 400. It says: .*bad_schema"),
  ],
)
def test_what_will_not_change_is_not_tried_again(
  ask, endpoint, waits, status, body, message
):
  endpoint.answer = lambda _: (status, {}, body)
  with pytest.raises(Unanswered, match=message):
    ask()
  assert len(endpoint.requests) == 1
  assert waits == []


@pytest.mark.parametrize(
  "answer",
  [
    completion(None, refusal="I cannot look at this."),
    {"choices": [{"message": {"content": ""}, "finish_reason": "content_filter"}]},
    (400, {}, {"error": {"code": "content_filter", "message": "filtered"}}),
  ],
)
def test_a_refusal_is_one_and_is_not_tried_again(ask, endpoint, answer):
  endpoint.answer = lambda _: answer
  reply = ask()
  assert (reply.status, reply.votes) == ("refused", {})
  assert reply.text
  assert len(endpoint.requests) == 1


@pytest.mark.parametrize(
  "content",
  [
    "The first one.",
    "[]",
    "null",
    json.dumps({"reason": "", "quality": "first"}),
    json.dumps({"reason": "", "quality": "first", "match": "both"}),
    json.dumps({"reason": "", "quality": "first", "match": ["first"]}),
    None,
  ],
)
def test_answers_beside_the_schema_are_asked_for_three_times_and_told_apart(
  ask, endpoint, content
):
  endpoint.answer = lambda _: completion(content)
  reply = ask()
  assert (reply.status, reply.votes) == ("garbled", {})
  assert len(endpoint.requests) == 3
  assert reply.input_tokens == 3000
  endpoint.failures = [lambda _: completion(content)]
  endpoint.answer = endpoint.lighter
  assert ask().status == "voted"


# ---------------------------------------------------------------------------- the limit


def test_no_request_goes_beyond_the_limit_whatever_becomes_of_it(ask, endpoint):
  endpoint.answer = lambda _: (500, {}, b"")
  with pytest.raises(LimitReached, match="--max_requests=2 are sent"):
    ask(Budget(most_requests=2))
  assert len(endpoint.requests) == 2


def test_money_is_counted_by_tokens_and_never_overspent_by_many_at_once():
  # 1,000 tokens in and 50 out, at 2 and 10 a million: 0.0025 each.
  budget = Budget(most_cost=0.0126, prices=(2.0, 10.0))
  together, most = collections.Counter(), []

  def spend():
    while True:
      try:
        budget.take()
      except LimitReached:
        return
      together["now"] += 1
      most.append(together["now"])
      time.sleep(0.001)
      together["now"] -= 1
      budget.settle((1000, 50))

  threads = [threading.Thread(target=spend) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert budget.requests == 5
  assert budget.cost == pytest.approx(0.0125)
  assert most[0] == 1  # the first alone: nobody knows yet what one costs


def test_a_limit_of_cost_needs_prices_and_tokens(ask, endpoint):
  with pytest.raises(ValueError, match=r"--max_cost=1 needs --prices=INPUT,OUTPUT"):
    Budget(most_cost=1.0)
  endpoint.answer = lambda r: {
    k: v for k, v in endpoint.lighter(r).items() if k != "usage"
  }
  with pytest.raises(ValueError, match="does not say how many tokens"):
    ask(Budget(most_cost=1.0, prices=(1.0, 1.0)))


# -------------------------------------------------------------------------- the command


@pytest.fixture
def folder(tmp_path):
  return world.make(tmp_path / "folder", prompts=world.PROMPTS[:3]).path


@pytest.fixture
def judge(capsys, monkeypatch, folder, endpoint, waits):
  monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
  monkeypatch.setenv("OPENAI_API_KEY", KEY)

  def judge(*flags):
    arguments = [f"--folder={folder}", "--judge=org/judge-1", *flags]
    return commands.run(capsys, monkeypatch, "evaluate", "judge", *arguments)

  return judge


def report_of(folder):
  return json.loads((folder / "judges" / "org_judge-1" / "report.json").read_text())


def test_every_pair_is_asked_in_both_orders_and_reported_as_people_are(
  judge, folder, endpoint
):
  done = judge("--prices=2,10")
  assert done.code == 0, done.err
  # Three pairs of models, three prompts, two orders.
  shown = [tuple(images_of(request)[0]) for _, _, request in endpoint.requests]
  assert len(shown) == len(set(shown)) == 18
  assert {pair[::-1] for pair in shown} == set(shown)
  report = report_of(folder)
  quality = {
    (p["first"], p["second"]): (p["wins"], p["ties"], p["losses"])
    for p in report["criteria"]["quality"]["pairs"]
  }
  assert quality == dict.fromkeys(
    [("alpha", "beta"), ("alpha", "gamma"), ("beta", "gamma")], (0, 0, 3)
  )
  assert {p["ties"] for p in report["criteria"]["match"]["pairs"]} == {3}
  assert report["order"]["quality"] == {"contradicted": 0, "first_preferred": 0.5}
  assert report["order"]["match"] == {"contradicted": 0, "first_preferred": None}
  assert report["cost"] == pytest.approx(18 * 0.0025)
  assert report["questions"] == {
    "voted": 18,
    "refused": 0,
    "garbled": 0,
    "not asked": 0,
  }
  assert "| alpha | gamma | 0 | 0 | 3 |" in done.out
  assert (folder / "judges" / "org_judge-1" / "report.png").exists()


def test_no_pair_is_paid_for_twice_and_what_has_changed_is_asked_again(
  judge, folder, endpoint
):
  judge()
  assert judge().code == 0
  assert len(endpoint.requests) == 18
  assert report_of(folder)["from_cache"] == 18
  assert report_of(folder)["requests"] == 0
  judge("--max_side=20")
  assert len(endpoint.requests) == 36
  judge("--judge=org/judge-2")  # another judge has opinions of its own
  assert len(endpoint.requests) == 36 + 18
  image = folder / "models" / "beta" / "images" / "p1.png"
  Image.new("RGB", (16, 12), (99, 99, 99)).save(image)
  judge()
  assert len(endpoint.requests) == 54 + 4  # two pairs have it, in two orders


def test_equal_images_for_a_prompt_are_asked_once(folder, endpoint):
  path = folder / "models" / "gamma" / "images" / "p0.png"
  path.write_bytes((folder / "models" / "beta" / "images" / "p0.png").read_bytes())
  with (
    Cache(folder / "judges.db") as cache,
    Client(endpoint.url, None, "j", Budget()) as asked,
  ):
    questions = asking.questions(
      world.folder.open_folder(folder),
      world.MODELS,
      identity=asked.identity,
      max_side=64,
    )
    found = asking.ask_all(questions, asked, cache, name="j", max_side=64, threads=3)
  # alpha-beta and alpha-gamma are one; beta-gamma is one in both orders.
  assert len(endpoint.requests) == len(found.replies) == 18 - 2 - 1


def test_a_judge_that_prefers_a_place_is_found_out(judge, folder, endpoint):
  endpoint.answer = lambda _: votes("first", "second")
  assert judge().code == 0
  report = report_of(folder)
  assert report["order"] == {
    "quality": {"contradicted": 1, "first_preferred": 1},
    "match": {"contradicted": 1, "first_preferred": 0},
  }
  assert {p["ties"] for p in report["criteria"]["quality"]["pairs"]} == {3}


def test_refusals_are_counted_and_their_pairs_left_out(judge, folder, endpoint):
  def refuse(request):
    if "two dogs" in request["messages"][1]["content"][0]["text"]:
      return completion(None, refusal="No dogs.")
    return endpoint.lighter(request)

  endpoint.answer = refuse
  done = judge()
  report = report_of(folder)
  assert report["questions"]["refused"] == 6
  assert (report["pairs_voted"], report["pairs"]) == (6, 9)
  assert report["criteria"]["quality"]["comparisons"] == 6
  assert "12 voted, 6 refused, 0 garbled, 0 not asked" in done.out
  judge()
  assert len(endpoint.requests) == 18  # a refusal is paid for, too


def test_a_limit_ends_the_asking_and_the_next_run_goes_on(
  judge, folder, endpoint, caplog
):
  assert judge("--max_requests=7", "--threads=1").code == 0
  report = report_of(folder)
  assert len(endpoint.requests) == 7
  assert report["questions"]["not asked"] == 11
  assert report["pairs_voted"] == 3
  assert report["stopped"] == "--max_requests=7 are sent."
  assert "11 questions were not asked: --max_requests=7 are sent." in caplog.text
  judge()
  assert len(endpoint.requests) == 18
  assert report_of(folder)["stopped"] is None


def test_an_endpoint_that_dies_loses_no_answer(judge, folder, endpoint):
  left = threading.Semaphore(5)

  def dying(request):
    return endpoint.lighter(request) if left.acquire(blocking=False) else (500, {}, b"")

  endpoint.answer = dying
  done = judge("--attempts=2", "--threads=2")
  assert done.code == 1
  assert "did not answer in 2 attempts: It answers 500" in done.err
  endpoint.answer = endpoint.lighter
  asked = len(endpoint.requests)
  assert judge().code == 0
  assert len(endpoint.requests) == asked + 18 - 5


def test_large_images_are_reduced(judge, tmp_path, endpoint):
  made = world.make(tmp_path / "large", prompts=["a wall"], size=(300, 400))
  assert judge(f"--folder={made.path}", "--max_side=64").code == 0
  assert {max(images_of(r)[1]) for _, _, r in endpoint.requests} == {64}


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--models=alpha"], "1 models (alpha) cannot be compared"),
    (["--prompts=4"], "--prompts=4 must be from 1 to 3"),
    (["--max_cost=1"], "--max_cost=1 needs --prices"),
    (["--prices=1"], "--prices=1 must be two numbers"),
    (["--prices=1,-2"], "--prices=1,-2 must be two numbers"),
    (["--threads=0"], "--threads=0 must be at least 1"),
    (["--subject=delta"], "--subject=delta is not compared: choose one of alpha"),
    (["--folder=nowhere"], "There are no prompts in nowhere"),
  ],
)
def test_mistakes_are_told_before_anything_is_asked(judge, endpoint, flags, message):
  done = judge(*flags)
  assert done.code == 1
  assert message in done.err
  assert endpoint.requests == []


def test_an_address_that_is_none_is_told(judge, monkeypatch):
  monkeypatch.setenv("OPENAI_BASE_URL", "nowhere")
  assert "OPENAI_BASE_URL='nowhere' is no address: give one as https:" in judge().err
  monkeypatch.setenv("OPENAI_BASE_URL", "http://[::1")
  assert "OPENAI_BASE_URL='http://[::1' is no addr" in judge().err
  monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1")
  monkeypatch.setenv("OPENAI_API_KEY", "sk-te\nst")
  assert "OPENAI_API_KEY has letters that no key has" in judge().err


def test_without_its_packages_a_judge_says_what_to_install(judge, monkeypatch):
  for module in ("client", "asking", "report"):
    monkeypatch.delitem(sys.modules, f"pixsigma_jax.evaluate.judge.{module}")
    monkeypatch.delattr(f"pixsigma_jax.evaluate.judge.{module}")
  monkeypatch.setitem(sys.modules, "httpx", None)
  assert judge().err.startswith("Error: A judge needs httpx: in the repository's root")


def test_people_and_judges_stand_in_one_plot(judge, folder, tmp_path, monkeypatch):
  judge()
  from pixsigma_jax.evaluate.study import presentation

  report = report_of(folder)
  people = report | {"kind": "study", "name": "people"}
  figure = presentation.plot([people, report], "gamma")
  labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
  assert labels == [
    "people: quality",
    "people: match",
    "org/judge-1: quality",
    "org/judge-1: match",
  ]
  heights = [bar.get_height() for bar in figure.axes[0].patches]
  assert heights[:4] == [100, 100, 50, 50]
  other = folder / "other.json"
  other.write_text(json.dumps(report | {"models": ["alpha", "beta"]}))
  with pytest.raises(ValueError, match=r"other\.json is about alpha, beta, and this"):
    presentation.write(tmp_path, report, [], "gamma", [other])
  other.write_text("{}")
  with pytest.raises(ValueError, match=r"other\.json is no report of preferences"):
    presentation.write(tmp_path, report, [], "gamma", [other])
