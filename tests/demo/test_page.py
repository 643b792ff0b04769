"""The demo page: what its button does, and that it does so in a browser."""

import asyncio
import inspect
import io
import json
import os
import pathlib
import shutil
import signal
import socket
import sys
import threading
import time
import urllib.parse

import gradio as gr
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from pixsigma_jax import checkpoint
from pixsigma_jax.convert.lora import write_lora
from pixsigma_jax.data import buckets
from pixsigma_jax.demo import fields, page
from pixsigma_jax.diffusion.solvers import SAMPLERS
from pixsigma_jax.sample import image_files
from pixsigma_jax.sample.pipeline import Pipeline
from pixsigma_jax.sample.settings import SETTINGS
from tests import commands
from tests.convert.test_lora import lora, random_adapter
from tests.demo.browser import Browser
from tests.sample import models
from tests.serve import worlds

PROMPT = "a <red> seven"
# What the fields show, and what the page asks for beside settings.
FIELDS = {name: fields.shown(name, one.default) for name, one in SETTINGS.items()}
del FIELDS["height"], FIELDS["width"]
FIELDS |= {"num_inference_steps": 2, "guidance_scale": 3, "seed": 5}


@pytest.fixture(scope="module")
def pipeline():
  return models.pipeline()


def draw(pipeline, size="8 × 8", prompt=PROMPT, **asked):
  """Draws with some fields changed, and with what else `page.draw` takes."""
  settings = {name: asked.pop(name) for name in list(asked) if name in FIELDS}
  return page.draw(pipeline, prompt, size, FIELDS | settings, **asked)


def drawn(pipeline, **asked):
  """All images that the page shows, one after the other, with the files' bytes."""
  shown = []
  for gallery, settings, seed, previews in draw(pipeline, **asked):
    files = [(pathlib.Path(path).read_bytes(), caption) for path, caption in gallery]
    if not previews:
      shown.append((files, settings, seed))
  return shown


def step_by_step(pipeline, prompt, **asked):
  """What the pipeline draws in the program that the page uses."""
  return pipeline(prompt, callback_on_step_end=lambda *_: None, **asked)


def as_png(output, folder):
  """The bytes of the file that the command `sample` would write."""
  path = folder / "expected.png"
  path.unlink(missing_ok=True)
  image_files.save(path, output.images[0], output.settings[0])
  return path.read_bytes()


def in_a_loop(make, *arguments):
  """What `make` returns; where no event loop runs, Gradio leaves several unclosed."""

  async def run():
    return make(*arguments)

  return asyncio.run(run())


def free_port():
  with socket.socket() as at:
    at.bind(("127.0.0.1", 0))
    return at.getsockname()[1]


# ------------------------------------------------------------------ behind the button


def test_the_gallery_holds_the_files_that_the_pipeline_draws(pipeline, tmp_path):
  wide = {"size": "8 × 16", "sampler": "ddim", "negative_prompt": "blue"}
  *_, (files, settings, seed) = drawn(pipeline, **wide)
  output = step_by_step(
    pipeline,
    PROMPT,
    negative_prompt="blue",
    height=8,
    width=16,
    num_inference_steps=2,
    guidance_scale=3.0,
    sampler="ddim",
    seed=5,
  )
  assert files == [(as_png(output, tmp_path), "seed 5")]
  assert (settings, seed) == (output.settings[0], 5)


def test_images_are_shown_as_they_are_ready_each_with_its_seed(pipeline):
  shown = drawn(pipeline, num_images_per_prompt=3)
  captions = [[caption for _, caption in files] for files, _, _ in shown]
  assert captions == [
    ["seed 5"],
    ["seed 5", "seed 6"],
    ["seed 5", "seed 6", "seed 7"],
  ]
  files = [content for content, _ in shown[-1][0]]
  assert len(set(files)) == 3
  assert {settings["seed"] for _, settings, _ in shown} == {5}  # of the first image


def test_a_random_seed_is_another_each_time_and_is_told(pipeline):
  first, second = (drawn(pipeline, random_seed=True, seed=None)[-1] for _ in range(2))
  assert first[2] != second[2]
  again = drawn(pipeline, seed=first[2])[-1]
  assert again == first


def test_a_random_seed_leaves_room_for_the_images_after_it(pipeline, monkeypatch):
  monkeypatch.setattr(page.secrets, "randbelow", lambda bound: bound - 1)
  *_, (files, _, _) = drawn(pipeline, random_seed=True, num_images_per_prompt=2)
  assert files[-1][1] == f"seed {2**32 - 1}"


@pytest.mark.parametrize(
  ("asked", "message"),
  [
    ({"prompt": "a b c d e f g <h>"}, "The caption 'a b c d e f g &lt;h&gt;' has"),
    ({"seed": -1}, "has seed -1: seeds must lie in"),
    ({"seed": 2**32 - 1, "num_images_per_prompt": 2}, "has seed 4294967296"),
    ({"seed": None}, "There is no seed"),
    ({"seed": 1.5}, "seed must be a whole number, not 1.5"),
    (
      {"num_inference_steps": None},
      "num_inference_steps must be a whole number, not None",
    ),
    ({"guidance_scale": None, "sampler": "magic"}, "Unknown sampler 'magic'"),
    ({"guidance_scale": -1}, "guidance_scale=-1.0 must be 0 or more"),
    ({"num_images_per_prompt": None}, "num_images_per_prompt must be a whole number"),
    (
      {"num_images_per_prompt": None, "random_seed": True},
      "num_images_per_prompt must be a whole",
    ),
    ({"sampler": "dmd"}, "A DMD student takes 1 step, not num_steps=2."),
  ],
)
def test_what_the_pipeline_refuses_is_told_in_its_own_words(pipeline, asked, message):
  with pytest.raises(gr.Error) as error:
    drawn(pipeline, **asked)
  assert message in error.value.message
  assert error.value.duration is None  # it stays until it is read


def test_an_image_that_cannot_be_written_is_told_too(pipeline, monkeypatch):
  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(page.image_files, "save", full)
  with pytest.raises(gr.Error, match="No space left on device"):
    drawn(pipeline)


def test_pixels_that_went_wrong_are_told_too(pipeline):
  class Damaged(models.Tracing):
    def decode(self, latents):
      return latents * np.nan

  with pytest.raises(gr.Error, match=r"seed 5\), is not made of finite numbers once"):
    drawn(pipeline.replace(autoencoder=Damaged()))


def test_an_image_that_went_wrong_is_told_too(pipeline):
  params = jax.tree.map(lambda leaf: leaf * jnp.nan, pipeline.params)
  with pytest.raises(gr.Error, match=r"seed 5\), is not made of finite numbers:"):
    drawn(pipeline.replace(params=params))


def test_no_file_is_left_once_the_page_has_shown_it(pipeline):
  showing = draw(pipeline)
  ((path, _),), _, _, _ = next(found for found in showing if found[0])
  assert pathlib.Path(path).exists()
  assert list(showing) == []
  assert not pathlib.Path(path).exists()


def test_a_click_on_an_image_shows_what_its_file_says(pipeline):
  for gallery, *_ in draw(pipeline, num_images_per_prompt=2):
    if len(gallery) == 2:
      event = gr.SelectData(None, {"index": 1, "value": None})
      assert page.settings_of(gallery, event)["seed"] == 6


@pytest.mark.parametrize("resolution", list(buckets.BUCKETS))
def test_the_sizes_on_offer_are_those_of_the_training(resolution):
  offered = page.sizes(resolution)
  assert list(offered.values()) == list(buckets.sampling_buckets(resolution).values())
  assert f"{resolution} × {resolution}" in offered
  assert all(label == f"{h} × {w}" for label, (h, w) in offered.items())


def test_a_miniature_offers_a_square_and_twice_each_side():
  assert page.sizes(16) == {
    "16 × 32": (16, 32),
    "16 × 16": (16, 16),
    "32 × 16": (32, 16),
  }


def test_the_page_offers_all_samplers_and_starts_at_the_pipelines_defaults(pipeline):
  config = in_a_loop(page.build, pipeline).get_config_file()
  shown = {
    component["props"]["label"]: component["props"]
    for component in config["components"]
    if component["props"].get("label")
  }
  known = list(SAMPLERS)
  assert [value for _, value in shown["Sampler"]["choices"]] == known
  assert shown["Size (height × width)"]["value"] == "8 × 8"
  defaults = {name: shown[name]["value"] for name in ("Steps", "Guidance", "Seed")}
  assert defaults == {"Steps": 20, "Guidance": 4.5, "Seed": 0}
  hints = {name: shown[name]["info"] for name in ("Guidance", "Negative prompt")}
  assert hints == {
    "Guidance": SETTINGS["guidance_scale"].help,
    "Negative prompt": SETTINGS["negative_prompt"].help,
  }


def test_samplers_of_few_steps_set_the_field_to_no_guidance(pipeline):
  assert [page.guidance_of(name) for name in ("lcm", "tcd", "ddim")] == [1, 1, 4.5]
  config = in_a_loop(page.build, pipeline).get_config_file()
  ids = {c["props"].get("label"): c["id"] for c in config["components"]}
  (chosen,) = (
    dependency
    for dependency in config["dependencies"]
    if (ids["Sampler"], "input") in map(tuple, dependency["targets"])
  )
  assert chosen["inputs"] == [ids["Sampler"]]
  assert chosen["outputs"] == [ids["Guidance"]]


def test_the_page_has_a_field_for_every_setting(pipeline):
  config = in_a_loop(page.build, pipeline).get_config_file()
  (drawing,) = (d for d in config["dependencies"] if d["types"]["generator"])
  labels = [
    component["props"].get("label")
    for component in config["components"]
    if component["id"] in drawing["inputs"]
  ]
  elsewhere = {  # names that the page's main fields have
    "height": "Size (height × width)",
    "width": "Size (height × width)",
    "num_inference_steps": "Steps",
    "guidance_scale": "Guidance",
    "num_images_per_prompt": "Images",
  }
  expected = {elsewhere.get(name, fields.label(name)) for name in SETTINGS}
  assert expected <= set(labels)


@pytest.mark.parametrize("name", list(FIELDS))
def test_an_untouched_field_is_its_settings_default(name):
  setting = SETTINGS[name]
  shown = fields.shown(name, setting.default)
  if setting.default is not None or setting.optional:
    expected = setting.check(setting.default)
    assert setting.check(fields.value_of(name, shown)) == expected


def test_numbers_between_commas_are_a_list():
  assert fields.value_of("pag_applied_layers", " 1,0 ") == (1, 0)
  assert fields.value_of("guidance_interval", "0.25, 1") == (0.25, 1.0)
  assert fields.shown("outpaint", (0, 2, 4, 6)) == "0, 2, 4, 6"


def test_steps_are_previewed_until_the_image_is_there():
  autoencoder = worlds.Gate()
  pipeline = models.pipeline(autoencoder=autoencoder)
  autoencoder.opened.set()
  pipeline.preview(np.zeros((4, 4, pipeline.config.in_channels), np.float32))
  autoencoder.opened.clear()  # nothing more until the last step has been seen
  shown = []
  for gallery, _, _, previews in draw(pipeline):
    shown.append((gallery and gallery[0][1], previews and previews[0][1]))
    if previews and previews[0][1] == "seed 5, step 2 of 2":
      autoencoder.opened.set()
  assert shown[-2:] == [([], "seed 5, step 2 of 2"), ("seed 5", [])]


class OneByOne(worlds.Gate):
  """Decodes one image each time it is opened."""

  def decode(self, latents):
    image = super().decode(latents)
    self.opened.clear()
    return image


def test_a_stop_leaves_what_is_ready_and_draws_no_further():
  autoencoder, stop, shown = OneByOne(), threading.Event(), []
  pipeline = models.pipeline(autoencoder=autoencoder)
  autoencoder.opened.set()
  pipeline.preview(np.zeros((4, 4, pipeline.config.in_channels), np.float32))
  autoencoder.opened.set()
  for gallery, _, _, _ in draw(pipeline, num_images_per_prompt=3, stop=stop):
    shown.append(len(gallery))
    if gallery:
      stop.set()
      autoencoder.opened.set()
  assert shown[-1] in (1, 2)  # the second may have been at its decoding


def test_earlier_images_stay_behind_the_new_ones(pipeline):
  before = [("earlier.png", "seed 1")]
  *_, (gallery, _, _, _) = draw(pipeline, earlier=before)
  assert [caption for _, caption in gallery] == ["seed 5", "seed 1"]


@pytest.fixture
def uploads(tmp_path):
  """Files of an image and of a mask over its left half."""
  draw = np.random.default_rng(0)
  image = draw.integers(0, 256, (8, 8, 3), np.uint8)
  mask = np.zeros((8, 8), np.uint8)
  mask[:, :4] = 255
  paths = tmp_path / "image.png", tmp_path / "mask.png"
  for path, array in zip(paths, (image, mask), strict=True):
    Image.fromarray(array).save(path)
  return tuple(map(str, paths))


def test_an_image_is_drawn_anew_where_its_mask_is_white(pipeline, uploads, tmp_path):
  image, mask = uploads
  asked = {"image": image, "mask_image": mask}
  *_, (files, settings, _) = drawn(pipeline, size=page.IMAGES_OWN, **asked)
  output = step_by_step(
    pipeline, PROMPT, num_inference_steps=2, guidance_scale=3.0, seed=5, **asked
  )
  assert files[0][0] == as_png(output, tmp_path)
  before, after = np.asarray(Image.open(image)), np.asarray(output.images[0])
  assert (before[:, 4:] == after[:, 4:]).all()
  assert (before[:, :4] != after[:, :4]).any()
  _, size, values, _ = page.settings_to_fields(pipeline, settings)
  assert (size, values["strength"]) == (page.IMAGES_OWN, "1")


def test_settings_of_an_image_draw_it_again(pipeline):
  asked = {
    "size": "8 × 16",
    "sampler": "euler",
    "pag_scale": 2.0,
    "pag_applied_layers": "1, 0",
    "guidance_interval": "0.25, 1",
    "negative_prompt": "blue",
  }
  *_, (_, settings, _) = drawn(pipeline, **asked)
  settings = json.loads(json.dumps(settings))  # as the page and a file have them
  prompt, size, values, _ = page.settings_to_fields(pipeline, settings)
  *_, (gallery, again, _, _) = page.draw(pipeline, prompt, size, values)
  assert again == settings
  assert prompt == PROMPT
  assert len(gallery) == 1


def test_a_lora_counts_as_much_as_its_field_says(tmp_path):
  pipeline = models.pipeline()
  spec = lora(("qkv",))
  change = random_adapter(spec, pipeline.params)
  write_lora(tmp_path / "style", pipeline.config, change, spec)
  with_lora = pipeline.load_lora_weights(tmp_path / "style", "style")
  assert drawn(with_lora, lora_scales=[0])[-1][0] == drawn(pipeline)[-1][0]
  half = drawn(with_lora, lora_scales=[0.5])[-1]
  assert half[0] != drawn(pipeline)[-1][0]
  *_, scales = page.settings_to_fields(with_lora, half[1])
  assert scales == [0.5]
  with pytest.raises(gr.Error, match="does not have: start it with another --lora"):
    page.settings_to_fields(pipeline, half[1])
  with pytest.raises(gr.Error, match="LoRA style has no scale: give 0"):
    drawn(with_lora, lora_scales=[None])


@pytest.mark.parametrize(
  ("limits", "asked", "message"),
  [
    ({"max_n": 2}, {"num_images_per_prompt": 3}, "3 images are .* 2 at most.* --max_n"),
    (
      {"max_n": 2},
      {"num_images_per_prompt": 2**33, "random_seed": True},
      "images are asked for",
    ),
    ({"max_steps": 1}, {}, "2 steps are asked for, .* 1 at most: .* --max_steps"),
    ({"max_steps": 2}, {"timesteps": "9, 5, 1"}, "3 steps are asked for"),
    ({"max_pixels": 64}, {"size": "8 × 16"}, "128 pixels are .* 64 .* --max_pixels"),
  ],
)
def test_what_is_beyond_a_limit_is_refused_with_its_flag(
  pipeline, limits, asked, message
):
  with pytest.raises(gr.Error, match=message):
    drawn(pipeline, limits=page.Limits(**limits), **asked)


@pytest.mark.parametrize(
  ("asked", "message"),
  [
    ({"size": "large"}, "The size 'large' must be HEIGHT × WIDTH"),
    ({"strength": "much"}, "Strength 'much' must be a number"),
    ({"pag_applied_layers": "all"}, "PAG applied layers 'all' must be whole numbers"),
    ({"strength": "0.5"}, "strength=0.5 is of an image, and prompt 0 has none"),
    ({"mask_image": "mask.png"}, "mask_image is of an image"),
  ],
)
def test_what_does_not_go_together_is_told(pipeline, asked, message):
  with pytest.raises(gr.Error, match=message):
    drawn(pipeline, **asked)


def test_a_limit_below_1_is_refused():
  with pytest.raises(ValueError, match="max_n=0 must be at least 1"):
    page.Limits(max_n=0)


def test_an_image_that_says_nothing_has_no_settings_to_reuse(pipeline):
  with pytest.raises(gr.Error, match="There are no settings yet"):
    page.settings_to_fields(pipeline, {})


# ---------------------------------------------------------------------- as it is served


LOCAL = {"127.0.0.1", "localhost"}


@pytest.fixture
def serve(pipeline, monkeypatch, tmp_path):
  """Serves a page, at a free port if none is given, and ends it after the test."""
  monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
  served = []

  def serve(pipeline=pipeline, port=None):
    port = free_port() if port is None else port
    served.append(in_a_loop(page.serve, pipeline, "127.0.0.1", port))
    return served[-1].local_url

  yield serve
  for one in served:
    one.close(verbose=False)


def test_nothing_but_this_machine_is_asked_for_anything(serve, monkeypatch):
  asked = set()
  ask = socket.getaddrinfo

  def spy(host, *arguments, **keywords):
    asked.add(host)
    return ask(host if host in LOCAL else "127.0.0.1", *arguments, **keywords)

  monkeypatch.setattr(socket, "getaddrinfo", spy)
  serve()
  assert asked
  assert asked <= LOCAL


def test_a_port_that_is_taken_is_named(serve):
  with socket.socket() as at:
    at.bind(("127.0.0.1", 0))
    at.listen()
    port = at.getsockname()[1]
    with pytest.raises(
      OSError, match=f"Cannot listen at 127.0.0.1:{port}: .*in use.* --port"
    ):
      serve(port=port)


@pytest.fixture
def browser(tmp_path):
  executable = shutil.which("chromium")
  if executable is None:
    pytest.skip("There is no chromium on the PATH (Debian: apt install chromium).")
  with Browser(executable, tmp_path / "profile") as browser:
    yield browser


def open_page(browser, address):
  browser.do("Page.navigate", url=address)
  browser.wait("document.querySelector('#draw')?.innerText == 'Draw'")
  browser.wait("!!document.querySelector('#prompt textarea')")


SHOWN = "document.querySelector('#pictures .thumbnail-lg img')"


def test_a_prompt_that_is_typed_becomes_its_image(serve, browser, pipeline, tmp_path):
  open_page(browser, serve())
  browser.type("#prompt textarea", "a red seven")
  browser.type("#seed input", "41")
  browser.click("#draw")
  browser.wait(f"{SHOWN}?.complete")
  browser.wait("document.querySelector('#settings').innerText.includes('a red seven')")
  browser.screenshot(tmp_path / "page.png")

  # To the byte what the pipeline draws: the image, and what is written in its file.
  output = step_by_step(pipeline, "a red seven", seed=41)
  expected = as_png(output, tmp_path)
  assert browser.fetch(browser.run(f"{SHOWN}.src")) == expected
  assert browser.run(f"{SHOWN}.naturalWidth") == 8
  assert "seed 41" in browser.run("document.querySelector('#pictures').innerText")

  # And so is the file that the button above the enlarged image saves.
  downloads = tmp_path / "downloads"
  browser.download_to(downloads)
  browser.click("#pictures .thumbnail-lg")
  browser.click("#pictures button[aria-label=Download]")
  saved = browser.downloaded(downloads / "seed-41.png")
  assert saved == expected
  assert image_files.settings_of(downloads / "seed-41.png") == output.settings[0]

  hosts = {urllib.parse.urlsplit(url).hostname for url in browser.requests()}
  assert hosts - {None} == {"127.0.0.1"}


def test_a_mistake_is_written_on_the_page_letter_by_letter(serve, browser):
  open_page(browser, serve())
  browser.type("#prompt textarea", "a b c d e f g <b>h</b>")
  browser.click("#draw")
  browser.wait(
    "document.body.innerText.includes(\"The caption 'a b c d e f g <b>h</b>' has \")"
  )
  assert not browser.run(f"!!{SHOWN}")


class Gate:
  """Holds a pipeline at its steps' previews until it is opened."""

  def __init__(self, monkeypatch):
    self.steps, self.opened, preview = 0, threading.Event(), Pipeline.preview

    def held(pipeline, latents):
      self.steps += 1
      self.opened.wait(60)
      return preview(pipeline, latents)

    monkeypatch.setattr(Pipeline, "preview", held)


@pytest.fixture
def gate(monkeypatch):
  gate = Gate(monkeypatch)
  yield gate
  gate.opened.set()


def until(true):
  end = time.monotonic() + 60
  while not true():
    assert time.monotonic() < end
    time.sleep(0.05)


def test_cancel_and_reload_in_the_middle_leave_the_page_ready(serve, browser, gate):
  address = serve()
  for leave in ("cancel", "reload"):
    gate.steps = 0
    gate.opened.clear()
    open_page(browser, address)
    browser.type("#prompt textarea", "a red seven")
    browser.click("#draw")
    until(lambda: gate.steps == 1)
    if leave == "cancel":
      browser.click("#cancel")
      time.sleep(1)
    else:
      open_page(browser, address)
      time.sleep(3)
    gate.opened.set()
    until(lambda: not any(t.name == page.WORKER for t in threading.enumerate()))
    assert gate.steps < 20, leave
    assert not browser.run(f"!!{SHOWN}"), leave
    browser.type("#prompt textarea", "a red seven")
    browser.click("#draw")
    browser.wait(f"{SHOWN}?.complete")


def test_of_two_users_one_waits_for_the_other_and_each_has_its_own(
  serve, browser, gate, tmp_path
):
  address = serve()
  with Browser(shutil.which("chromium"), tmp_path / "other") as other:
    for number, one in enumerate((browser, other)):
      open_page(one, address)
      one.type("#prompt textarea", f"a red seven {number}")
      one.type("#seed input", str(number))
      one.click("#draw")
      until(lambda: gate.steps == 1)
    # Who waits takes the request back, and gives it again: the other draws on.
    other.click("#cancel")
    time.sleep(1)
    other.click("#draw")
    gate.opened.set()
    for number, one in enumerate((browser, other)):
      one.wait(f"{SHOWN}?.complete")
      shown = "document.querySelector('#settings').innerText"
      one.wait(f"{shown}.includes('a red seven {number}')")


# Gradio leaves the file open that it reads.
@pytest.mark.filterwarnings(
  "ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning"
)
def test_an_uploaded_image_is_drawn_anew_under_its_mask(serve, browser, uploads):
  open_page(browser, serve())
  browser.type("#prompt textarea", "a red seven")
  browser.click("#edit button")
  for name, path in zip(("image", "mask_image"), uploads, strict=True):
    browser.upload(f"#{name} input[type=file]", path)
    browser.wait(f"document.querySelector('#{name} img')?.complete")
  browser.wait(f"document.querySelector('#size input').value == '{page.IMAGES_OWN}'")
  browser.click("#draw")
  browser.wait("document.querySelector('#settings').innerText.includes('mask_image')")
  address = browser.wait(f"{SHOWN}?.src")
  after = np.asarray(Image.open(io.BytesIO(browser.fetch(address))))
  before = np.asarray(Image.open(uploads[0]))
  assert (before[:, 4:] == after[:, 4:]).all()
  assert (before[:, :4] != after[:, :4]).any()


# ------------------------------------------------------------------------- the command


@pytest.fixture
def workdir(tmp_path):
  config = models.nano()
  checkpoint.save_snapshot(
    *(tmp_path, 3),
    params=models.random_params(config),
    null_caption=models.null_caption(config),
    metadata=models.metadata(config),
  )
  return tmp_path


@pytest.fixture
def interrupt():
  """Ctrl-C in a moment, even in a suite that a shell has in the background."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
  yield timer.start
  timer.cancel()
  signal.signal(signal.SIGINT, before)


class Server:
  """Stands for a page that is served."""

  local_url = "http://somewhere/"

  def __init__(self):
    self.closed = []

  def close(self, verbose=True):
    self.closed.append(verbose)


def test_the_command_serves_the_model_of_the_checkpoint_until_ctrl_c(
  capsys, monkeypatch, workdir, interrupt
):
  served, server = [], Server()

  def serve(*arguments):
    served.extend(arguments)
    interrupt()
    return server

  monkeypatch.setattr(page, "serve", serve)
  monkeypatch.setattr(page, "wait", inspect.unwrap(page.wait))  # of a stand-in
  done = commands.run(
    *(capsys, monkeypatch, "demo", f"--checkpoint={workdir}", "--host=0.0.0.0"),
    *(
      "--port=80",
      "--max_steps=7",
      "--batch_size=2",
      "--dtype=float32",
      "--attention=chunked",
      f"--refiner={workdir}",
      "--switch_at=300",
      f"--autoguidance={workdir}",
    ),
  )
  assert done.code == 130
  assert done.out == "Open http://somewhere/   Ctrl-C ends it.\n"
  assert done.err == "Interrupted: by Ctrl-C.\n"
  assert server.closed == [False]  # which would print a line of its own
  pipeline, *others = served
  assert others == ["0.0.0.0", 80, page.Limits(max_steps=7)]
  assert pipeline.origin["checkpoint"] == str(workdir / "snapshots" / "3")
  assert (pipeline.batch_size, pipeline.compute.attention) == (2, "chunked")
  assert pipeline.compute.dtype == jnp.float32
  assert pipeline.refiner.switch_at == 300
  assert pipeline.weak_model is not None


def test_ctrl_c_closes_a_page_that_is_served(interrupt):
  page_, closed = in_a_loop(page.build, models.pipeline()), []
  page_.close = lambda verbose: closed.append(verbose)
  interrupt()
  with pytest.raises(KeyboardInterrupt):
    page.wait(page_)
  assert closed == [False]


def test_without_gradio_the_command_says_what_to_install(capsys, monkeypatch, workdir):
  monkeypatch.setitem(sys.modules, "gradio", None)
  monkeypatch.delitem(sys.modules, "pixsigma_jax.demo.page")
  monkeypatch.delattr("pixsigma_jax.demo.page")
  done = commands.run(capsys, monkeypatch, "demo", f"--checkpoint={workdir}")
  assert (done.code, done.err) == (
    1,
    "Error: The page needs Gradio: in the repository's root, pip install -e "
    '".[demo]".\n',
  )
