"""Engines and servers of a tiny model, and stand-ins that hold them up."""

import contextlib
import io
import queue
import threading

from PIL import Image

from pixsigma_jax.sample import image_files
from pixsigma_jax.serve import server
from pixsigma_jax.serve.app import Service
from pixsigma_jax.serve.engine import Drawn, Engine, Failed, Limits
from pixsigma_jax.serve.fields import RequestLimits
from tests.sample import models

MODEL = "nano"
STEPS = 3
PATIENCE = 60.0  # seconds for anything to happen, on a busy machine


class Gate(models.Tracing):
  """An autoencoder that waits before each image until it is opened."""

  def __init__(self):
    super().__init__()
    object.__setattr__(self, "reached", threading.Event())
    object.__setattr__(self, "opened", threading.Event())

  def decode(self, latents):
    self.reached.set()
    assert self.opened.wait(PATIENCE)
    return super().decode(latents)


class Words(type(models.ENCODER)):
  """The text encoder, which notes what it was given at once."""

  calls = ()

  def encode(self, prompts, length):
    object.__setattr__(self, "calls", (*self.calls, list(prompts)))
    return super().encode(prompts, length)


def pipeline(**fields):
  return models.pipeline(**({"batch_size": 4} | fields))


def engine(pipeline, **options):
  limits = {"max_delay": 0.05} | options.pop("limits", {})
  return Engine(pipeline, limits=Limits(**limits), **options)


def ask(engine, prompt="a red three", previews=0, regions=None, **settings):
  """Submits a request; returns its ticket, and a queue of its events."""
  events = queue.Queue()
  asked = {"num_inference_steps": STEPS} | settings
  checked = engine.check(prompt, asked, regions=regions)
  return engine.submit(checked, events.put, previews), events


def drawn(events, count=1):
  """Images and settings in the order of their numbers, once all are there."""
  found = {}
  while len(found) < count:
    event = events.get(timeout=PATIENCE)
    if isinstance(event, Failed):
      raise event.error
    if isinstance(event, Drawn):
      found[event.number] = (event.image, event.settings)
  return [found[number] for number in sorted(found)]


def failure(events):
  event = events.get(timeout=PATIENCE)
  assert isinstance(event, Failed), event
  return event.error


@contextlib.contextmanager
def served(engine, **options):
  """A server of the engine, from a thread; hands over its address and itself."""
  limits = {"max_pixels": 1024, "max_steps": 20} | options.pop("request_limits", {})
  drain_delay = options.pop("drain_delay", 0.0)
  service = Service(
    engine=engine, model=MODEL, limits=RequestLimits(**limits), **options
  )
  listener = server.listen("127.0.0.1", 0)
  port = listener.getsockname()[1]
  serving = server.Server(service, drain_delay=drain_delay)
  engine.start()
  thread = threading.Thread(target=serving.run, kwargs={"sockets": [listener]})
  thread.start()
  try:
    yield f"http://127.0.0.1:{port}", serving
  finally:
    serving.handle_exit(15, None)
    thread.join(PATIENCE)
    engine.metrics.close()
    assert not thread.is_alive()
    assert engine.join(PATIENCE)


def as_image(content):
  """A file's image, and the settings in it."""
  return Image.open(io.BytesIO(content)), image_files.settings_of(io.BytesIO(content))
