"""The command `serve` with the miniature: its flags, its end, and its page."""

import base64
import concurrent.futures
import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys

import httpx
import openai
import pytest

import pixsigma_jax.serve
from tests import commands, compilation
from tests.demo.browser import Browser
from tests.serve.worlds import PATIENCE, as_image

ROOT = pathlib.Path(__file__).parents[2]
MINIATURE = ROOT / "weights/miniature"


@contextlib.contextmanager
def serving(*flags):
  """The command in a process of its own: its address, and the process."""
  # A suite in the background ignores Ctrl-C, and its children would inherit that.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  process = subprocess.Popen(
    [
      *(sys.executable, "-m", "pixsigma_jax.serve", f"--checkpoint={MINIATURE}"),
      *("--port=0", "--dtype=float32", *flags),
    ],
    cwd=ROOT,
    env={**os.environ, **compilation.environment()},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  signal.signal(signal.SIGINT, before)
  try:
    line = process.stdout.readline()
    assert line.startswith("Serving pixart-sigma at http://127.0.0.1:"), line
    yield line.split()[-1], process
  finally:
    process.kill()
    process.communicate()


def made_client(address):
  return openai.OpenAI(base_url=f"{address}v1", api_key="none", max_retries=0)


def test_sigterm_in_the_middle_finishes_what_was_begun_and_ends_well():
  with serving("--max_delay=0", "--warm_up=none") as (address, process):
    with (
      made_client(address) as client,
      concurrent.futures.ThreadPoolExecutor() as pool,
    ):
      # A program that must be compiled first: the signal comes while they are drawn.
      asked = [
        pool.submit(
          client.images.generate, prompt="a red three", extra_body={"seed": seed}
        )
        for seed in range(6)
      ]
      with client.images.generate(
        prompt="a blue five", stream=True, partial_images=1, extra_body={"seed": 9}
      ) as stream:
        next(iter(stream))  # a preview
        process.send_signal(signal.SIGTERM)
        *_, last = stream
      assert last.type == "image_generation.completed"
      for seed, future in enumerate(asked):
        [item] = future.result(PATIENCE).data
        _, about = as_image(base64.b64decode(item.b64_json))
        assert (about["seed"], about["checkpoint"]) == (seed, "pixart-sigma")
    _, log = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
  lines = [json.loads(line) for line in log.splitlines()]
  assert [line["event"] for line in lines].count("request") == 7
  assert {"draining", "ended"} <= {line["event"] for line in lines}
  assert not any(word in log for word in ("three", "five", str(ROOT)))


def test_further_models_draw_along_and_clients_are_not_told_where_they_lie():
  flags = f"--refiner={MINIATURE}", "--switch_at=400", f"--autoguidance={MINIATURE}"
  with (
    serving(*flags, "--warm_up=none", "--batch_size=1") as (address, _),
    made_client(address) as client,
  ):
    body = {"seed": 1, "num_inference_steps": 2, "autoguidance_scale": 2}
    [item] = client.images.generate(prompt="a red three", extra_body=body).data
  _, about = as_image(base64.b64decode(item.b64_json))
  assert (about["switch_at"], about["autoguidance_scale"]) == (400, 2)
  assert (about["refiner"], about["autoguidance"]) == ("miniature", "miniature")
  assert str(ROOT) not in json.dumps(about)


def test_ctrl_c_ends_an_idle_server_in_one_line():
  with serving("--warm_up=none") as (address, process):
    assert httpx.get(f"{address}health/live").status_code == 200
    process.send_signal(signal.SIGINT)
    _, log = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert log.splitlines()[-1] == "Interrupted: by Ctrl-C."


@pytest.fixture
def serve(capsys, monkeypatch):
  def serve(*flags):
    return commands.run(
      capsys, monkeypatch, "serve", f"--checkpoint={MINIATURE}", *flags
    )

  return serve


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--host=0.0.0.0"], "--host=0.0.0.0 lets others in, and there are no tokens"),
    (["--tokens=nowhere"], "No such file or directory: 'nowhere'"),
    (["--port=0", "--warm_up=16"], "--warm_up=16 must be WIDTHxHEIGHT[@STEPS"),
    (["--port=0", "--warm_up=buckets"], "buckets where the model has a table"),
    (["--port=0", "--warm_up=17x16"], "both sides must be multiples of 2"),
    (["--port=0", "--warm_up=16x16@4@magic"], "choose one of"),
    (["--port=0", "--smaller_batches=x"], "--smaller_batches=x must be whole numbers"),
    (["--port=0", "--smaller_batches=4"], "does not lie between 0 and --batch_size=4"),
    (["--port=0", "--lora=style"], "--lora=style must be NAME=PATH"),
    (["--port=0", "--lora=a=x", "--lora=a=y"], "Two LoRAs are called 'a'"),
    (["--port=0", "--lora=a=/none"], "There is no adapter at /none"),
    (
      ["--port=0", "--release=sigma-512"],
      "says itself what it is: leave out --release",
    ),
    (["--port=0", f"--refiner={MINIATURE}"], "switch_at=None go together"),
    (
      ["--port=0", "--refiner_lora=x"],
      "refiner_lora=x is for a model that there is not",
    ),
    (["--port=0", "--max_queue=0"], "--max_queue=0 must be at least 1"),
    (["--port=0", "--max_steps=0"], "--max_steps=0 must be at least 1"),
  ],
)
def test_flags_that_cannot_be_meant_are_refused_in_one_line(serve, flags, message):
  done = serve(*flags)
  assert done.code == 1
  assert done.err.startswith("Error: ")
  assert message in done.err


def test_a_port_that_is_taken_is_named(serve):
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    done = serve(f"--port={port}")
  assert f"Cannot listen at 127.0.0.1:{port}: " in done.err


def test_without_its_packages_it_says_what_to_install(serve, monkeypatch):
  monkeypatch.setitem(sys.modules, "prometheus_client", None)
  prefix = "pixsigma_jax.serve."
  for name in [name for name in sys.modules if name.startswith(prefix)]:
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(pixsigma_jax.serve, name.removeprefix(prefix), raising=False)
  done = serve()
  assert done.err == (
    "Error: A server needs prometheus_client: in the repository's root, pip install "
    '-e ".[serve]".\n'
  )


def test_the_page_shows_previews_and_images_and_talks_to_nobody_else(tmp_path):
  executable = shutil.which("chromium")
  if executable is None:
    pytest.skip("There is no chromium on the PATH (Debian: apt install chromium).")
  tokens = tmp_path / "tokens"
  tokens.write_text("a-token-for-the-page\n")
  with (
    serving(f"--tokens={tokens}", "--warm_up=none") as (address, _),
    Browser(executable, tmp_path / "profile") as browser,
  ):
    browser.do("Page.navigate", url=address)
    browser.wait("!!document.querySelector('#prompt')")
    browser.type("#prompt", "a green three above a white eight")
    browser.click("#draw")
    browser.wait("document.querySelector('#status').innerText.startsWith('A token')")
    for name, value in {
      "width": "16",
      "height": "32",
      "seed": "7",
      "n": "2",
      "token": "a-token-for-the-page",
    }.items():
      browser.run(f"document.querySelector('#{name}').value = '{value}'")
    browser.click("#draw")
    images = "Array.from(document.querySelectorAll('#images img'))"
    browser.wait("document.querySelector('#status').innerText == 'Done.'")
    browser.wait(f"{images}.every(image => image.complete)")
    assert (
      browser.run(
        f"{images}.map(i => [i.className, i.naturalWidth, i.naturalHeight, "
        "i.dataset.previews])"
      )
      == [["done small", 16, 32, "3"]] * 2
    )
    assert "seed 7" in browser.text()
    assert "seed 8" in browser.text()
    assert browser.run(f"{images}[0].alt") == "a green three above a white eight"
    # What the server refuses is said as text.
    browser.run("document.querySelector('#seed').value = '-1'")
    browser.run("document.querySelector('#prompt').value = '<b id=bold>'")
    browser.run("document.querySelector('#seed').removeAttribute('min')")
    browser.click("#draw")
    browser.wait("document.querySelector('#status').innerText.includes('seeds must')")
    assert not browser.run("document.querySelector('#bold')")
    hosts = {url.split("/")[2] for url in browser.requests() if url.startswith("http")}
    assert hosts == {address.split("/")[2]}
    browser.screenshot(tmp_path / "page.png")
