"""Answers a second that a study's website stores, and whether a kill loses any.

  python -m benchmarks.study [--connections=50] [--seconds=20]

Each connection sends one answer after the other. The server is a process of its own,
ended by SIGKILL while answers are on their way; then those that it had acknowledged are
looked for in the database.
"""

import http.client
import json
import pathlib
import secrets
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import sqlalchemy
from absl import flags
from PIL import Image

from pixsigma_jax import command
from pixsigma_jax.evaluate import folder, items
from pixsigma_jax.evaluate.study import answers, design

_CONNECTIONS = flags.DEFINE_integer("connections", 50, "Raters, a connection each.")
_SECONDS = flags.DEFINE_integer("seconds", 20, "Until the server is killed.")

PROMPTS, SIDE = 20, 16
MODELS = ("one", "other", "third")


def make(path: pathlib.Path) -> folder.EvaluationFolder:
  """An evaluation with small images of three models."""
  made = folder.create(
    path,
    suite="benchmark",
    version="1",
    options={},
    item_set=items.ItemSet(
      tuple(items.Item(f"p{i}", f"prompt {i}") for i in range(PROMPTS))
    ),
  )
  for grey, name in enumerate(MODELS):
    model = made.begin_model(name, path="", origin={"benchmark": name}, settings={})
    for item in made.items:
      file = model.image_path(item)
      file.parent.mkdir(parents=True, exist_ok=True)
      Image.new("L", (SIDE, SIDE), 60 * grey).save(file)
  return made


def rate(port: int, token: str, taken: list[tuple[str, float]]) -> None:
  """Answers until the server is gone; `taken` gets acknowledged nonces and seconds."""
  ranks = list(range(1, len(MODELS) + 1))
  connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
  number = 0
  while True:
    nonce = secrets.token_hex(16)
    body = {
      "nonce": nonce,
      "ranks": {"quality": ranks, "match": ranks[::-1]},
      "note": "hands are better in the second image",
      "seconds": 12.5,
      "screen": {"height": 900, "width": 1600, "device_pixels": 1, "zoomed": False},
    }
    start = time.perf_counter()
    try:
      connection.request(
        "POST", f"/r/{token}/tasks/{number % PROMPTS}", json.dumps(body)
      )
      response = connection.getresponse()
      content = response.read()
    except (http.client.HTTPException, OSError):
      return
    if response.status != 200:
      raise RuntimeError(f"The server answers {response.status}: {content!r}")
    taken.append((nonce, time.perf_counter() - start))
    number += 1


def stored_in(url: str) -> set[str]:
  """Nonces of all answers in a database."""
  engine = sqlalchemy.create_engine(url)
  with engine.connect() as connection:
    rows = connection.execute(sqlalchemy.text("SELECT nonce FROM answers"))
    found = {row.nonce for row in rows}
  engine.dispose()
  return found


def main(_: list[str]) -> None:
  """Entry point; flags are parsed."""
  with tempfile.TemporaryDirectory() as directory:
    evaluation = make(pathlib.Path(directory, "folder"))
    url = answers.default_url(evaluation.path)
    with answers.Database(url) as database:
      drawn_up = design.draw_up(evaluation, name="s", secret=secrets.token_hex(32))
      names = [f"rater-{i}" for i in range(_CONNECTIONS.value)]
      tokens = database.create(drawn_up, names)
    serve = ["study", "serve", f"--folder={evaluation.path}", "--study=s", "--port=0"]
    server = subprocess.Popen(
      [sys.executable, "-m", "pixsigma_jax.evaluate", *serve],
      stdout=subprocess.PIPE,
      text=True,
    )
    assert server.stdout is not None
    port = int(server.stdout.readline().split()[3].rstrip("/").rpartition(":")[2])
    taken: list[list[tuple[str, float]]] = [[] for _ in tokens]
    threads = [
      threading.Thread(target=rate, args=(port, token, mine))
      for token, mine in zip(tokens.values(), taken, strict=True)
    ]
    start = time.perf_counter()
    for thread in threads:
      thread.start()
    time.sleep(_SECONDS.value)
    server.kill()
    seconds = time.perf_counter() - start
    for thread in threads:
      thread.join()
    server.wait()
    server.stdout.close()
    acknowledged = [each for mine in taken for each in mine]
    lost = {nonce for nonce, _ in acknowledged} - stored_in(url)
  waited = 1000 * np.array([took for _, took in acknowledged])
  middle, late, latest = np.percentile(waited, [50, 99, 100])
  print(
    f"{len(tokens)} connections, {seconds:.1f} s: {len(acknowledged)} answers "
    f"acknowledged, {len(acknowledged) / seconds:.0f} a second, {len(lost)} lost."
  )
  print(
    f"An answer took {middle:.0f} ms (median), {late:.0f} ms (99 of 100), {latest:.0f} "
    "ms (longest)."
  )
  if lost:
    raise RuntimeError(f"{len(lost)} acknowledged answers are not in the database.")


if __name__ == "__main__":
  command.run(main)
