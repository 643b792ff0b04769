"""The server as its clients meet it: OpenAI's own, curl's kind, and hostile ones."""

import asyncio
import base64
import concurrent.futures
import contextlib
import io
import json
import socket
import threading
import time

import httpx
import numpy as np
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pixsigma_jax.sample import image_files
from pixsigma_jax.sample.settings import SETTINGS
from pixsigma_jax.serve.access import Access, is_loopback
from pixsigma_jax.serve.app import Service
from pixsigma_jax.serve.fields import RequestLimits
from pixsigma_jax.serve.logs import Log
from tests.serve import worlds
from tests.serve.worlds import as_image, engine, pipeline, served

PROMPT = "a <red> seven"
FEW = {"num_inference_steps": worlds.STEPS}
TOKEN = "a-token-of-many-characters"
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def lines():
  return io.StringIO()


@pytest.fixture(scope="module")
def address(lines):
  with served(engine(pipeline()), log=Log(lines)) as (address, _):
    yield address


@pytest.fixture(scope="module")
def client(address):
  with made_client(address) as client:
    yield client


def made_client(address, **options):
  defaults = {"base_url": f"{address}/v1", "api_key": "none", "max_retries": 0}
  return openai.OpenAI(**(defaults | options))


def generate(client, prompt=PROMPT, **fields):
  own = {"num_inference_steps": worlds.STEPS} | fields.pop("extra_body", {})
  return client.images.generate(prompt=prompt, extra_body=own, **fields)


def expected(prompt=PROMPT, **asked):
  """The image of a call of `Pipeline` of its own."""
  output = pipeline()(prompt, **(FEW | asked), callback_on_step_end=lambda *_: None)
  return output.images[0]


def same(image, other):
  return np.array_equal(np.asarray(image), np.asarray(other))


# ------------------------------------------------------------------- OpenAI's client


def test_the_openai_client_generates_images_that_say_how_they_were_made(client):
  response = generate(
    client, model=worlds.MODEL, n=2, size="8x16", extra_body={"seed": 3}
  )
  assert (response.size, response.output_format) == ("8x16", "png")
  assert (response.background, response.quality) == ("opaque", "auto")
  assert response.usage.total_tokens == response.usage.input_tokens + 2 * 8 * 4
  for number, item in enumerate(response.data):
    image, about = as_image(base64.b64decode(item.b64_json))
    assert same(image, expected(seed=3 + number, width=8, height=16))
    assert (about["prompt"], about["seed"]) == (PROMPT, 3 + number)
    assert about["num_inference_steps"] == worlds.STEPS
    assert item.seed == 3 + number


REGIONS = [
  {"prompt": "a <b>blue", "box": [0, 0, 4, 8]},
  {"prompt": "a green nine", "box": [2, 0, 8, 4], "weight": 0.5},
]


def of_regions(**fields):
  """Fields of a request with a region that is fine but for these."""
  return {"extra_body": {"regions": [REGIONS[0] | fields]}}


def test_each_request_without_a_seed_draws_another_image(client):
  first, second = (generate(client).data[0].seed for _ in range(2))
  assert first != second


def test_the_openai_client_draws_regions_with_prompts_of_their_own(client):
  fields = {"seed": 3, "regions": REGIONS}
  response = generate(client, n=2, extra_body=fields)
  for number, item in enumerate(response.data):
    image, about = as_image(base64.b64decode(item.b64_json))
    assert same(image, expected(seed=3 + number, regions=REGIONS))
    assert not same(image, expected(seed=3 + number))
    assert about["prompt"] == PROMPT
    assert about["regions"] == [{"weight": 1.0} | region for region in REGIONS]
  texts = [PROMPT, *(region["prompt"] for region in REGIONS)]
  assert response.usage.input_tokens == sum(map(worlds.models.ENCODER.count, texts))
  [item] = generate(client, extra_body={"seed": 3, "regions": []}).data
  assert same(as_image(base64.b64decode(item.b64_json))[0], expected(seed=3))


def test_no_region_is_allowed_where_the_server_says_so():
  limits = {"max_regions": 0}
  with (
    served(engine(pipeline()), request_limits=limits) as (address, _),
    made_client(address) as client,
    pytest.raises(openai.BadRequestError, match="regions lists 1, and at most 0 are"),
  ):
    generate(client, **of_regions())
  with pytest.raises(ValueError, match="--max_regions=-1 must be at least 0"):
    RequestLimits(max_pixels=1, max_regions=-1)


def test_regions_of_an_image_that_is_edited_come_as_json_in_its_form(client):
  regions = [{"prompt": "a blue two", "box": [0, 0, 16, 4]}]
  fields = {"seed": 3, "strength": 0.7, "regions": json.dumps(regions)}
  [item] = edit(client, extra_body=fields).data
  image, _ = as_image(base64.b64decode(item.b64_json))
  assert same(image, expected(image=SOURCE, strength=0.7, seed=3, regions=regions))


@pytest.mark.parametrize("form", image_files.FORMATS)
def test_every_format_has_its_settings_inside(client, form):
  fields = {"output_format": form, "response_format": "url"}
  [item] = generate(client, **fields, extra_body={"seed": 1}).data
  head, content = item.url.split(",")
  assert head == f"data:image/{form};base64"
  image, about = as_image(base64.b64decode(content))
  assert (image.format.lower(), about["seed"]) == (form, 1)


def test_output_compression_is_the_quality_of_a_lossy_file(client):
  sizes = [
    len(generate(client, **fields, extra_body={"seed": 1}).data[0].b64_json)
    for fields in (
      {"output_format": "jpeg", "output_compression": 5},
      {"output_format": "jpeg"},
    )
  ]
  assert sizes[0] < sizes[1]


def test_the_openai_client_streams_previews_and_the_image(client):
  events = list(
    generate(
      client,
      stream=True,
      partial_images=3,
      extra_body={"seed": 4, "num_inference_steps": 8},
    )
  )
  *partial, completed = events
  assert [event.type for event in partial] == ["image_generation.partial_image"] * 3
  assert [event.partial_image_index for event in partial] == [0, 1, 2]
  assert completed.type == "image_generation.completed"
  assert completed.usage.output_tokens == 16
  assert (completed.size, completed.output_format) == ("8x8", "png")
  image, about = as_image(base64.b64decode(completed.b64_json))
  assert same(image, expected(seed=4, num_inference_steps=8))
  assert about["seed"] == completed.seed == 4
  for event in partial:
    assert base64.b64decode(event.b64_json).startswith(b"\x89PNG")


def test_the_client_lists_the_model(client):
  [listed] = client.models.list().data
  assert client.models.retrieve(worlds.MODEL) == listed
  assert listed.id == worlds.MODEL
  with pytest.raises(openai.NotFoundError, match="There is no model of this name"):
    client.models.retrieve("../etc/passwd")


@pytest.mark.parametrize(
  ("fields", "param", "message"),
  [
    ({"extra_body": {"stepps": 3}}, "stepps", "Unknown parameter 'stepps': known are"),
    ({"extra_body": {"num_images_per_prompt": 2}}, "num_images_per_prompt", "give n"),
    ({"extra_body": {"lora": {"name": "x"}}}, "lora", "Unknown parameter 'lora'"),
    ({"extra_body": {"loras": {"x": 1}}}, "loras", "no LoRA 'x': this server has none"),
    ({"extra_body": {"loras": "x"}}, "loras", "must be an object of scales"),
    ({"style": "vivid"}, "style", "describe it in the prompt"),
    ({"quality": "hd"}, "quality", "give num_inference_steps"),
    ({"background": "transparent"}, "background", "must be auto or opaque"),
    ({"output_format": "gif"}, "output_format", "must be one of png, webp, jpeg"),
    ({"output_compression": 5}, "output_compression", "loses nothing"),
    ({"partial_images": 2}, "partial_images", "need stream to be true"),
    ({"stream": True, "partial_images": 4}, "partial_images", "must lie in 0 … 3"),
    ({"n": 11}, "n", "n=11 must lie in 1 … 10"),
    ({"n": 0}, "n", "n=0 must lie in 1 … 10"),
    ({"size": "8 x 8"}, "size", 'must be "WIDTHxHEIGHT" or "auto"'),
    ({"size": "0x8"}, "size", "at least one and at most 1,024"),
    ({"size": "64x64"}, "size", "at least one and at most 1,024"),
    ({"size": "8x8", "extra_body": {"width": 9}}, "size", "size says width 8"),
    ({"size": "7x8"}, None, "both sides must be multiples of 2"),
    ({"extra_body": {"num_inference_steps": 21}}, "num_inference_steps", "at most 20"),
    ({"extra_body": {"num_inference_steps": 0}}, "num_inference_steps", "at least 1"),
    ({"extra_body": {"timesteps": list(range(21))}}, "timesteps", "at most 20"),
    ({"extra_body": {"guidance_scale": 1e300}}, "guidance_scale", "at most 1000"),
    ({"extra_body": {"seed": -1}}, None, "seeds must lie in 0"),
    ({"extra_body": {"sampler": "magic"}}, "sampler", "choose one of"),
    ({"extra_body": {"negative_prompt": "x" * 4001}}, "negative_prompt", "4,001"),
    ({"prompt": "x" * 4001}, "prompt", "4,001 characters, and at most 4,000"),
    ({"prompt": "a " * 40}, None, "has 41 tokens"),
    (of_regions(prompt="a " * 40), None, "has 41 tokens"),
    (of_regions(prompt="x" * 4001), "regions", "Region 0's prompt has 4,001 char"),
    (of_regions(prompt=None), "regions", "Region 0's prompt must be a text, not None"),
    (of_regions(box=[0, 0, 9, 8]), "regions", "(0, 0, 9, 8) (left, top, right, bottom"),
    (of_regions(box=[4, 0, 4, 8]), "regions", "and have an inside"),
    (of_regions(box=[-1, 0, 4, 8]), "regions", "must lie inside the image, of 8 x 8"),
    (of_regions(box=[0, 0, 8]), "regions", "must be left, top, right, bottom, not [0,"),
    (of_regions(box="0088"), "regions", "must be left, top, right, bottom, not '0088'"),
    (of_regions(box=[0, 0, 1.5, 8]), "regions", "must be a whole number, not 1.5"),
    (of_regions(box=[False, 0, 4, 8]), "regions", "must be a whole number, not False"),
    (of_regions(weight=1.5), "regions", "Region 0's weight=1.5 must lie in 0 … 1"),
    (of_regions(weight="1"), "regions", "must be a finite number, not '1'"),
    (of_regions(mask="/etc/passwd"), "regions", "Region 0's mask would be a file"),
    (of_regions(colour="red"), "regions", "prompt, box, mask, weight and no more"),
    ({"extra_body": {"regions": [{"prompt": "a"}]}}, "regions", "either a box or a ma"),
    (
      {"extra_body": {"regions": REGIONS * 5}},
      "regions",
      "lists 10, and at most 8",
    ),
    ({"extra_body": {"regions": REGIONS[0]}}, "regions", "must be a list of regions"),
    ({"extra_body": {"regions": [REGIONS]}}, "regions", "Region 0 must have prompt"),
    ({"size": "4x4", "extra_body": {"regions": REGIONS}}, "regions", "of 4 x 4 pixels"),
    (
      {"size": "16x8", **of_regions(box=[0, 0, 8, 16])},
      "regions",
      "of 8 x 16 pixels (height x width)",
    ),
  ],
)
def test_what_cannot_be_drawn_is_a_bad_request_that_names_the_field(
  client, fields, param, message
):
  with pytest.raises(openai.BadRequestError) as caught:
    generate(client, **fields)
  assert message in caught.value.body["message"]
  assert caught.value.param == param
  assert caught.value.type == "invalid_request_error"
  assert caught.value.request_id


def test_another_model_is_not_found(client):
  with pytest.raises(openai.NotFoundError, match="this server has 'nano'") as caught:
    generate(client, model="gpt-image-2")
  assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def as_png(array, mode):
  content = io.BytesIO()
  Image.fromarray(array, mode=None if mode == "RGB" else mode).save(content, "png")
  return content.getvalue()


SOURCE = np.random.default_rng(0).integers(0, 256, (8, 16, 3), np.uint8)
INSIDE = np.arange(16)[None].repeat(8, 0) < 6


def transparent(inside):
  """A mask of OpenAI's: nothing is to be seen where it is drawn anew."""
  alpha = np.where(inside, 0, 255).astype(np.uint8)
  return as_png(np.dstack([np.zeros((*inside.shape, 3), np.uint8), alpha]), "RGBA")


def edit(client, image=None, **fields):
  own = {"num_inference_steps": worlds.STEPS} | fields.pop("extra_body", {})
  image = as_png(SOURCE, "RGB") if image is None else image
  return client.images.edit(
    image=image, prompt=fields.pop("prompt", PROMPT), extra_body=own, **fields
  )


def test_the_openai_client_edits_an_image(client):
  response = edit(client, n=2, extra_body={"seed": 3, "strength": 0.7})
  assert response.size == "16x8"
  assert response.usage.input_tokens_details.image_tokens == 32
  for number, item in enumerate(response.data):
    image, about = as_image(base64.b64decode(item.b64_json))
    assert same(image, expected(image=SOURCE, strength=0.7, seed=3 + number))
    assert about["strength"] == 0.7


def test_what_is_transparent_in_a_mask_is_drawn_anew_and_all_else_stays(client):
  [item] = edit(client, mask=transparent(INSIDE), extra_body={"seed": 3}).data
  image, _ = as_image(base64.b64decode(item.b64_json))
  assert same(image, expected(image=SOURCE, mask_image=INSIDE, seed=3))
  assert same(np.asarray(image)[~INSIDE], SOURCE[~INSIDE])
  assert not same(np.asarray(image)[INSIDE], SOURCE[INSIDE])


def test_the_openai_client_streams_an_edit(client):
  *partial, completed = edit(
    client,
    image=[as_png(SOURCE, "RGB")],
    stream=True,
    partial_images=2,
    extra_body={"seed": 3, "strength": 1.0, "num_inference_steps": 6},
  )
  assert [event.type for event in partial] == ["image_edit.partial_image"] * 2
  assert completed.type == "image_edit.completed"
  assert completed.usage.input_tokens_details.image_tokens == 32


@pytest.mark.parametrize(
  ("fields", "param", "message"),
  [
    ({"image": b"\x89PNG"}, "image", "must be a PNG, JPEG or WebP"),
    ({"image": b""}, "image", "must be a PNG, JPEG or WebP"),
    ({"image": [as_png(SOURCE, "RGB")] * 2}, "image", "one image to edit, not 2"),
    ({"image": as_png(SOURCE, "RGB")[:90]}, "image", "cannot be read"),
    (
      {"image": as_png(np.zeros((64, 64, 3), np.uint8), "RGB")},
      "image",
      "64 x 64 pixels (width x height), and at most 1,024",
    ),
    ({"mask": as_png(SOURCE, "RGB")}, "mask", "has no transparency"),
    ({"mask": transparent(INSIDE.T)}, None, "resize one of them"),
    ({"size": "8x8"}, None, "leave out height and width"),
    ({"extra_body": {"outpaint": [99] * 4}}, "size", "at most 1,024"),
    ({"extra_body": {"strength": 2}}, "strength", "must lie in 0 … 1"),
    ({"extra_body": {"hat": 1}}, "hat", "Unknown parameter 'hat'"),
    ({"input_fidelity": "high"}, "input_fidelity", "Unknown parameter"),
  ],
)
def test_what_cannot_be_edited_is_a_bad_request_that_names_the_field(
  client, fields, param, message
):
  with pytest.raises(openai.BadRequestError) as caught:
    edit(client, **fields)
  assert message in caught.value.body["message"]
  assert caught.value.param == param


def test_an_edit_without_an_image_or_of_another_kind_is_refused(address):
  path = f"{address}/v1/images/edits"
  files = {"prompt": (None, "x")}
  assert "one image to edit, not 0" in httpx.post(path, files=files).text
  files = {"image": ("a", as_png(SOURCE, "RGB")), "secrets": ("../../x", b"y")}
  answer = httpx.post(path, files=files, data={"prompt": "x"})
  assert answer.json()["error"]["param"] == "secrets"
  assert httpx.post(path, json={"prompt": "x"}).status_code == 415
  for content in (b"", b"--x--", b"--x\r\n\r\n", b"\0" * 100):
    for kind in ("multipart/form-data", "multipart/form-data; boundary=x"):
      answer = httpx.post(path, content=content, headers={"content-type": kind})
      assert answer.status_code == 400, answer.text


def test_all_settings_but_the_number_of_images_are_fields(client):
  asked = {
    name: list(setting.default)
    if isinstance(setting.default, tuple)
    else setting.default
    for name, setting in SETTINGS.items()
    if name != "num_images_per_prompt"
  }
  assert len(generate(client, extra_body=asked | FEW).data) == 1


def test_a_full_queue_is_a_rate_limit_that_says_when_to_come_back():
  gate = worlds.Gate()
  running = engine(pipeline(autoencoder=gate, batch_size=1), limits={"max_queue": 1})
  with (
    served(running) as (address, _),
    made_client(address) as client,
    concurrent.futures.ThreadPoolExecutor() as pool,
  ):
    first = pool.submit(generate, client)
    assert gate.reached.wait(worlds.PATIENCE)
    second = pool.submit(generate, client)
    until(lambda: waiting(running) == 1)
    with pytest.raises(openai.RateLimitError, match="1 images wait already") as caught:
      generate(client)
    assert int(caught.value.response.headers["retry-after"]) >= 1
    assert caught.value.code == "rate_limit_exceeded"
    # A client that may try again does, and is served in the end.
    patient = pool.submit(generate, client.with_options(max_retries=20))
    gate.opened.set()
    for each in (first, second, patient):
      assert each.result(worlds.PATIENCE).data


def test_what_was_begun_is_finished_after_sigterm_and_new_requests_meet_a_503():
  gate = worlds.Gate()
  running = engine(pipeline(autoencoder=gate))
  with (
    served(running, drain_delay=1.0) as (address, serving),
    made_client(address) as client,
    concurrent.futures.ThreadPoolExecutor() as pool,
  ):
    assert httpx.get(f"{address}/health/ready").json() == {"ready": True}
    begun = pool.submit(generate, client)
    assert gate.reached.wait(worlds.PATIENCE)
    waits = pool.submit(generate, client)
    until(lambda: waiting(running) == 1)
    serving.handle_exit(15, None)
    until(lambda: running.draining)
    assert httpx.get(f"{address}/health/ready").status_code == 503
    assert httpx.get(f"{address}/health/live").status_code == 200
    with pytest.raises(openai.InternalServerError, match="is being shut down") as error:
      generate(client)
    assert error.value.status_code == 503
    assert error.value.response.headers["retry-after"] == "5"
    gate.opened.set()
    assert begun.result(worlds.PATIENCE).data
    assert waits.result(worlds.PATIENCE).data


def test_a_request_past_its_deadline_is_told_so_also_in_a_stream():
  with (
    served(engine(pipeline(), limits={"deadline": 1e-9})) as (address, _),
    made_client(address) as client,
  ):
    with pytest.raises(openai.InternalServerError, match="was not drawn") as caught:
      generate(client)
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
    with pytest.raises(openai.APIError, match="was not drawn within"):
      list(generate(client, stream=True))


def test_an_image_that_breaks_is_a_server_error_without_others_words():
  broken = type("Broken", (worlds.models.Tracing,), {"decode": lambda *_: 1 / 0})()
  with (
    served(engine(pipeline(autoencoder=broken))) as (address, _),
    made_client(address) as client,
    pytest.raises(openai.InternalServerError, match="It could not be drawn") as caught,
  ):
    generate(client)
  assert (caught.value.status_code, caught.value.code) == (500, "drawing_failed")


def test_a_failure_of_the_server_says_where_to_look_and_nothing_of_others(
  monkeypatch, caplog
):
  file, running = io.StringIO(), engine(pipeline())
  monkeypatch.setattr(running, "check", lambda *_: {}[PROMPT])
  with (
    served(running, log=Log(file)) as (address, _),
    made_client(address) as client,
    pytest.raises(openai.InternalServerError, match="This server failed") as caught,
  ):
    generate(client)
  name = caught.value.request_id
  assert name in caught.value.body["message"]
  assert (caught.value.status_code, caught.value.code) == (500, "bug")
  [line] = [json.loads(text) for text in file.getvalue().splitlines() if name in text]
  assert (line["status"], line["error"]) == (500, "KeyError")
  assert any("test_app.py" in frame for frame in line["traceback"])
  assert PROMPT not in file.getvalue() + caplog.text


def test_a_client_that_goes_away_frees_its_place():
  gate = worlds.Gate()
  running = engine(pipeline(autoencoder=gate, batch_size=1))
  with served(running) as (address, _), made_client(address) as client:
    with concurrent.futures.ThreadPoolExecutor() as pool:
      first = pool.submit(generate, client)
      assert gate.reached.wait(worlds.PATIENCE)
      with pytest.raises(openai.APITimeoutError):
        generate(client, timeout=0.5)
      stream = generate(client, stream=True)
      stream.close()
      gate.opened.set()
      assert first.result(worlds.PATIENCE).data
    until(lambda: running.idle)
    cancelled = running.metrics.registry.get_sample_value("pixsigma_cancelled_total")
    assert cancelled == 2
    assert running.metrics.registry.get_sample_value("pixsigma_images_total") == 1


# ---------------------------------------------------------------------------- access


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokens") / "tokens.txt"
  path.write_text(f"# of ann\n{TOKEN}\n\n  {TOKEN[::-1]}  \n")
  with served(engine(pipeline()), access=Access.read(path)) as (address, _):
    yield address


@pytest.mark.parametrize("token", ["wrong", TOKEN[:-1], f"{TOKEN}x", "é" * 20])
def test_a_wrong_token_is_an_authentication_error(guarded, token):
  headers = {"authorization": f"Bearer {token}".encode()}
  for method, path in (("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/v1/x")):
    answer = httpx.request(method, f"{guarded}{path}", headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert TOKEN not in answer.text


def test_every_token_of_the_file_is_taken_and_health_needs_none(guarded):
  for token in (TOKEN, TOKEN[::-1]):
    with made_client(guarded, api_key=token) as client:
      assert generate(client).data
  with made_client(guarded) as client, pytest.raises(openai.AuthenticationError):
    generate(client)
  for path in ("/health/live", "/health/ready", "/"):
    assert httpx.get(f"{guarded}{path}").status_code == 200


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("# nothing\n", "has no token in it"),
    ("short\n", "Token 1 of .* must have 16 characters or more"),
    (f"{TOKEN}\nwith spaces in between\n", "Token 2 of"),
  ],
)
def test_a_file_of_tokens_that_protect_nothing_is_refused(tmp_path, content, message):
  path = tmp_path / "tokens"
  path.write_text(content)
  with pytest.raises(ValueError, match=message):
    Access.read(path)


def test_pages_of_other_sites_and_names_that_point_here_are_refused(address):
  for headers, code in (
    ({"origin": "http://evil.example"}, "foreign_origin"),
    ({"origin": "null"}, "foreign_origin"),
    ({"host": "evil.example"}, "foreign_host"),
    ({"host": ""}, "foreign_host"),
  ):
    answer = httpx.get(f"{address}/v1/models", headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, code)
  own = {"origin": address}
  assert httpx.get(f"{address}/v1/models", headers=own).status_code == 200


def test_only_addresses_of_this_machine_alone_are_loopback():
  for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
    assert is_loopback(host)
  for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", None, ""):
    assert not is_loopback(host)


# -------------------------------------------------------------------------- operation


def test_metrics_count_requests_batches_and_seconds_by_stage(address, client):
  generate(client)
  answer = httpx.get(f"{address}/metrics")
  assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
  for line in (
    'pixsigma_requests_total{route="/v1/images/generations",status="200"}',
    "pixsigma_batch_size_count",
    "pixsigma_queue_seconds_sum",
    "pixsigma_queue_images 0.0",
    'pixsigma_stage_seconds_total{stage="transformer"}',
    'pixsigma_stage_seconds_total{stage="text encoder"}',
    'pixsigma_stage_seconds_total{stage="autoencoder"}',
    "pixsigma_compilations_total",
    "process_resident_memory_bytes",
    "pixsigma_device_bytes",
  ):
    assert f"\n{line}" in answer.text, line


def test_a_request_keeps_its_name_in_answer_and_log_and_its_prompt_out_of_it(
  address, client, lines
):
  name = "my-request:1"
  generate(client, "a secret", extra_headers={"x-request-id": name})
  *_, line = [json.loads(text) for text in lines.getvalue().splitlines()]
  assert (line["event"], line["request_id"], line["status"]) == ("request", name, 200)
  assert (line["n"], line["size"], line["num_inference_steps"]) == (1, "8x8", 3)
  assert line["seconds"] >= line["queue_seconds"] >= 0
  assert "secret" not in lines.getvalue()
  answer = httpx.get(f"{address}/v1/models", headers={"x-request-id": "<b>"})
  assert len(answer.headers["x-request-id"]) == 32


def test_prompts_stand_in_the_log_where_it_is_asked_for():
  file = io.StringIO()
  with (
    served(engine(pipeline()), log=Log(file, prompts=True)) as (address, _),
    made_client(address) as client,
  ):
    generate(client, "not a secret")
  assert '"prompt": "not a secret"' in file.getvalue()


def waiting(running):
  return running.metrics.registry.get_sample_value("pixsigma_queue_images")


def until(condition):
  end = time.monotonic() + worlds.PATIENCE
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.01)


# -------------------------------------------------------------------- hostile clients


def post(address, content, **headers):
  headers = JSON | headers
  path = f"{address}/v1/images/generations"
  return httpx.post(path, content=content, headers=headers, timeout=worlds.PATIENCE)


def test_a_body_that_is_too_long_is_refused_while_it_comes(address):
  def endless():
    for _ in range(1 << 20):
      yield b" " * 4096

  with contextlib.suppress(httpx.WriteError):
    answer = post(address, endless())
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"
  assert post(address, b"[" * (1 << 20)).status_code == 400
  assert post(address, b" " * ((1 << 20) + 1)).status_code == 413


def test_a_client_that_sends_slowly_is_not_waited_for(monkeypatch):
  monkeypatch.setattr("pixsigma_jax.serve.server._HEADER_SECONDS", 0.5)
  with served(engine(pipeline()), body_seconds=0.5) as (address, _):
    host, port = address.removeprefix("http://").split(":")
    for begin, answered in (
      (b"", b""),
      (b"POST /v1/images/gen", b""),
      (b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\nGET /", b"HTTP/1.1 200"),
      (
        b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{",
        b"HTTP/1.1 408",
      ),
    ):
      with socket.create_connection((host, int(port))) as connection:
        connection.settimeout(worlds.PATIENCE)
        connection.sendall(begin)
        got = b""
        while part := connection.recv(65536):
          got += part
        assert got.startswith(answered)
        assert bool(got) == bool(answered)


def test_a_client_that_reads_slowly_holds_nobody_up(address, client):
  host, port = address.removeprefix("http://").split(":")
  body = json.dumps({"prompt": "x", "stream": True, "partial_images": 3, **FEW})
  with socket.create_connection((host, int(port))) as slow:
    slow.sendall(
      b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\n"
      b"Content-Type: application/json\r\n"
      b"Content-Length: %d\r\n\r\n%s" % (len(body), body.encode())
    )
    assert generate(client).data
    assert slow.recv(12) == b"HTTP/1.1 200"


def test_a_client_that_never_reads_is_given_up(monkeypatch):
  monkeypatch.setattr("pixsigma_jax.serve.app._WRITE_SECONDS", 0.1)
  running = engine(pipeline())
  limits = RequestLimits(max_pixels=1024)
  app = Service(engine=running, model=worlds.MODEL, limits=limits).app()
  scope = {
    **{"type": "http", "method": "GET", "path": "/v1/models", "raw_path": b""},
    **{"query_string": b"", "headers": [(b"host", b"localhost")]},
  }

  async def never(*_):
    await asyncio.Event().wait()

  with pytest.raises(TimeoutError):
    asyncio.run(app(scope, never, never))
  running.metrics.close()


def region(**fields):
  """A body with a region that is fine but for these values, in JSON."""
  values = {"prompt": '"a"', "box": "[0, 0, 8, 8]"} | fields
  said = ", ".join(f'"{name}": {value}' for name, value in values.items())
  return f'{{"prompt": "x", "regions": [{{{said}}}]}}'.encode()


@pytest.mark.parametrize(
  "content",
  [
    b"",
    b"null",
    b"[]",
    b'{"prompt": 3}',
    b'{"prompt": ["a", "b"]}',
    b"\xff\xfe{}",
    b"[" * 100000,
    b'{"prompt": "x", "n": 1e999}',
    b'{"prompt": "x", "n": true}',
    b'{"prompt": "x", "n": ' + b"9" * 5000 + b"}",
    b'{"prompt": "x", "guidance_scale": NaN}',
    b'{"prompt": "x", "height": 1e300}',
    b'{"prompt": "x", "output_format": ["png"]}',
    b'{"prompt": "x", "size": {"a": 1}}',
    b'{"prompt": "x", "seed": [1, 2]}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "x", "\\ud800": 1}',
    b'{"prompt": "x", "sampler": "\\ud800"}',
    b'{"prompt": "x", "user": "' + b"u" * 600 + b'"}',
    '{"prompt": "x", "size": "８x８"}'.encode(),
    b'{"prompt": "x", "regions": true}',
    b'{"prompt": "x", "regions": "<script>alert(1)</script>"}',
    b'{"prompt": "x", "regions": [null]}',
    b'{"prompt": "x", "regions": [' + b"[" * 900 + b"]" * 900 + b"]}",
    b'{"prompt": "x", "regions": [' + b"{}," * 99999 + b"{}]}",
    b'{"prompt": "x", "regions": [{"<img src=x onerror=alert(1)>": 1}]}',
    b'{"prompt": "x", "regions": [{"\\ud800": 1}]}',
    region(prompt='"\\ud800"'),
    region(prompt='"' + "x" * 500000 + '"'),
    region(box="[0, 0, 1e999, 8]"),
    region(box="[0, 0, 1e300, 8]"),
    region(box="[0, 0, NaN, 8]"),
    region(box="[0, 0, [4], 8]"),
    region(box="[" + "0," * 99999 + "0]"),
    region(weight="1e999"),
    region(weight="NaN"),
    region(weight="true"),
    region(weight="null"),
    region(mask='"../../../etc/passwd"'),
    region(mask='"https://example.org/mask.png"'),
    region(mask="null"),
  ],
)
def test_a_body_of_any_other_kind_is_a_bad_request(address, content):
  answer = post(address, content)
  assert answer.status_code == 400, answer.text
  assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
  assert len(answer.content) < 5000


@pytest.mark.parametrize("name", ["n", "seed", "sampler", "regions", "unknown"])
def test_lists_in_each_other_are_a_bad_request_however_deep(talk, name):
  for depth in range(940, 1000):  # around what JSON's reader takes
    lists = b"[" * depth + b"]" * depth
    content = b'{"prompt": "x", "%s": %s}' % (name.encode(), lists)
    answer = talk.post("/v1/images/generations", content=content, headers=JSON)
    assert answer.status_code == 400, (depth, answer.text)


def test_a_body_that_says_it_is_something_else_is_not_read(address):
  for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
    assert (
      post(address, b'{"prompt": "x"}', **{"content-type": kind}).status_code == 415
    )


@pytest.mark.parametrize(
  "path",
  [
    "/nowhere",
    "/../../etc/passwd",
    "/%2e%2e/%2e%2e/etc/passwd",
    "/static/page.js",
    "/page.py",
    "/v1/images/generations/",
    "/v1/images/../models/%00",
    "/<script>alert(1)</script>",
    "/v1/models/<script>",
  ],
)
def test_there_is_nothing_at_other_addresses_and_html_stays_text(address, path):
  host, port = address.removeprefix("http://").split(":")
  with socket.create_connection((host, int(port))) as connection:
    request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    connection.sendall(request.encode())
    got = b""
    while part := connection.recv(65536):
      got += part
  head, _, body = got.partition(b"\r\n\r\n")
  assert head.startswith(b"HTTP/1.1 404")
  assert b"content-type: application/json" in head
  assert b"x-content-type-options: nosniff" in head
  assert b"script" not in body
  assert b"root:" not in body


def test_methods_that_are_none_are_refused_in_the_same_shape(address):
  answer = httpx.get(f"{address}/v1/images/generations")
  assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
  assert answer.json()["error"]["code"] == "method_not_allowed"


def test_html_in_a_prompt_comes_back_as_json(address):
  answer = post(address, json.dumps({"prompt": "<script>", "model": "<b>"}).encode())
  assert answer.headers["content-type"] == "application/json"
  assert answer.headers["x-content-type-options"] == "nosniff"
  assert "default-src 'none'" in answer.headers["content-security-policy"]


VALUES = st.recursive(
  st.none()
  | st.booleans()
  | st.integers()
  | st.floats()
  | st.text(max_size=12)
  | st.sampled_from(["png", "8x8", "auto", "url", "ddim", "raw", worlds.MODEL]),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=5), inner, max_size=3)
  ),
  max_leaves=4,
)
NAMES = st.sampled_from(
  [
    *SETTINGS,
    *("model", "n", "size", "quality", "background", "moderation", "output_format"),
    *("output_compression", "response_format", "stream", "partial_images", "user"),
    "loras",
  ]
) | st.text(max_size=8)
# Some inside of the image, some not, and some of no kind at all.
PARTS = st.lists(
  VALUES
  | st.fixed_dictionaries(
    {
      "prompt": st.text(max_size=8),
      "box": st.lists(st.integers(-1, 9), min_size=4, max_size=4),
    },
    optional={"weight": st.floats(0, 1) | VALUES, "mask": st.text(max_size=4)},
  ),
  max_size=3,
)


@pytest.fixture(scope="module")
def talk(address):
  with httpx.Client(base_url=address, timeout=worlds.PATIENCE) as talk:
    yield talk


# The server's threads may draw random numbers while a body is made up.
@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisDeprecationWarning")
def test_random_bodies_meet_the_right_status_and_nothing_else(talk, request):
  """Of both kinds: bytes, and fields of JSON. One drawn is as it was asked for."""
  path = "/v1/images/generations"
  count = request.config.getoption("--bodies")

  @settings(max_examples=count)
  @given(st.binary(max_size=200))
  def of_bytes(content):
    answer = talk.post(path, content=content, headers=JSON)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_json"

  @settings(max_examples=count)
  @given(
    st.dictionaries(NAMES, VALUES, max_size=3),
    st.text(max_size=20),
    st.none() | VALUES | PARTS,
  )
  def of_fields(fields, prompt, parts):
    # As small as can be, for those that are drawn after all.
    fields = {"num_inference_steps": 1, "sampler": "ddim", "regions": parts} | fields
    fields |= {"prompt": prompt}
    answer = talk.post(path, content=json.dumps(fields), headers=JSON)
    if answer.status_code == 200:
      assert "error" not in answer.text
      return
    assert answer.status_code in (400, 404), answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]

  of_bytes()
  of_fields()


def test_under_more_load_than_it_can_bear_every_request_is_answered_or_refused():
  running = engine(pipeline(), limits={"max_queue": 6, "max_delay": 0.002})
  with served(running) as (address, _), made_client(address) as client:
    generate(client)  # compiled
    statuses, lock = [], threading.Lock()

    def ask(number):
      try:
        got = generate(client, extra_body={"seed": number}).data[0].seed == number
      except openai.RateLimitError:
        got = None
      with lock:
        statuses.append(got)

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
      list(pool.map(ask, range(120)))
    assert len(statuses) == 120
    assert False not in statuses
    assert statuses.count(True) >= 20
    refused = running.metrics.registry.get_sample_value("pixsigma_refused_total")
    assert statuses.count(None) == refused > 0
    assert running.idle
