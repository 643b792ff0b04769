"""Timing: whose seconds are whose."""

import time

import jax.monitoring
import pytest

from pixsigma_jax.sample.timing import COMPILATION, Timing
from tests.sample import models


class Slow:
  """A text encoder or an autoencoder that takes its time over one thing."""

  def __init__(self, inner, slow, seconds):
    self._inner, self._slow, self._seconds = inner, slow, seconds

  def __getattr__(self, name):
    if name == self._slow:
      time.sleep(self._seconds)
    return getattr(self._inner, name)


def test_each_part_has_its_own_seconds_and_compiling_is_in_none():
  whole = time.perf_counter()
  subject = models.pipeline(
    text_encoder=Slow(models.ENCODER, "encode", 0.3),
    autoencoder=Slow(models.Tracing(), "decode", 0.2),
  )
  subject("a seven", num_inference_steps=6)  # as in no other test here
  first = dict(subject.timing.seconds)
  assert list(first) == ["text encoder", COMPILATION, "transformer", "autoencoder"]
  assert first["text encoder"] >= 0.6  # the prompt and the negative one
  assert first["autoencoder"] >= 0.2
  assert first[COMPILATION] > 0.5 > 0 < first["transformer"]
  assert sum(first.values()) < time.perf_counter() - whole
  # A second image adds to all but the compiling, also of other parameters.
  other = models.random_params(subject.config, seed=1)
  subject.replace(params=other)("a two", num_inference_steps=6)
  more = subject.timing.seconds
  assert more["text encoder"] >= first["text encoder"] + 0.6
  assert more["transformer"] > first["transformer"]
  assert more[COMPILATION] < first[COMPILATION] + 0.3


def test_what_is_compiled_inside_of_something_compiled_counts_once():
  timing = Timing()
  with timing.part("work"):
    for _ in range(2):
      time.sleep(0.2)
      for event, seconds in (("inner", 0.05), ("outer", 0.15), ("next", 0.001)):
        time.sleep(0.002)
        jax.monitoring.record_event_duration_secs(f"/jax/core/compile/{event}", seconds)
        jax.monitoring.record_event_duration_secs(f"/jax/other/{event}", seconds)
  assert timing.seconds[COMPILATION] == pytest.approx(2 * 0.151)
  assert timing.seconds["work"] > 0.09


def test_what_fails_is_counted_too():
  timing = Timing()
  try:
    with timing.part("work"):
      time.sleep(0.05)
      raise ZeroDivisionError
  except ZeroDivisionError:
    pass
  assert timing.seconds["work"] >= 0.05
