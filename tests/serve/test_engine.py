"""The queue: which images share a batch, what they are, and how it ends."""

import queue
import threading
import time

import numpy as np
import pytest

from pixsigma_jax.convert.lora import write_lora
from pixsigma_jax.serve.engine import (
  Busy,
  DeadlineExceeded,
  Draining,
  Limits,
  Preview,
)
from tests.convert.test_lora import lora, random_adapter
from tests.sample import models
from tests.serve import worlds
from tests.serve.worlds import ask, drawn, engine, failure, pipeline

WARM = {"num_inference_steps": worlds.STEPS}


def batches(engine):
  """Sizes of the batches so far: their number, and their images together."""
  return [
    engine.metrics.registry.get_sample_value(f"pixsigma_batch_size_{what}")
    for what in ("count", "sum")
  ]


def count_of(engine, name, **labels):
  return engine.metrics.registry.get_sample_value(f"pixsigma_{name}_total", labels)


def equal(one, other):
  return np.array_equal(np.asarray(one), np.asarray(other))


def alone(pipeline, prompt, **settings):
  """The image of a call with nobody beside it."""
  asked = {"num_inference_steps": worlds.STEPS} | settings
  return pipeline(prompt, callback_on_step_end=lambda *_: None, **asked).images[0]


def test_an_image_of_a_batch_equals_that_of_a_call_of_its_own_to_the_bit():
  model = pipeline()
  wanted = [
    ("a red three", {"seed": 5}),
    ("a blue five", {"seed": 6, "height": 4, "width": 16}),
    ("", {"seed": 7, "height": 16, "width": 4}),
    ("a green nine", {"seed": 8, "negative_prompt": "red"}),
  ]
  with engine(model, limits={"max_delay": 60.0}) as running:
    asked = [ask(running, prompt, **settings)[1] for prompt, settings in wanted]
    found = [drawn(events) for events in asked]
    assert batches(running) == [1, 4]
  for (prompt, settings), [(image, about)] in zip(wanted, found, strict=True):
    assert equal(image, alone(model, prompt, **settings))
    assert (about["prompt"], about["seed"]) == (prompt, settings["seed"])


def test_each_image_has_the_loras_that_its_request_asks_for(tmp_path):
  model = pipeline()
  for seed, name in enumerate(("style", "subject")):
    spec = lora(("qkv",))
    change = random_adapter(spec, model.params, seed)
    write_lora(tmp_path / name, model.config, change, spec)
    model = model.load_lora_weights(tmp_path / name, name)
  wanted = [{}, {"style": 1.0}, {"style": 0.5, "subject": 1.0}, {"style": 0.0}]
  with engine(model, limits={"max_delay": 0.3}) as running:
    asked = []
    for loras in wanted:
      checked = running.check("a three", {"seed": 1, **WARM}, loras=loras)
      events = queue.Queue()
      running.submit(checked, events.put)
      asked.append(events)
    found = [drawn(events)[0] for events in asked]
    assert batches(running) == [3, 4]
    with pytest.raises(ValueError, match="no LoRA called 'none': loaded are style"):
      running.check("a three", WARM, loras={"none": 1.0})
  for loras, (image, about) in zip(wanted, found, strict=True):
    with_loras = model.set_adapters(list(loras), list(loras.values()))
    assert equal(image, alone(with_loras, "a three", seed=1))
    scales = {name: scale for name, scale in loras.items() if scale}
    assert [each["scale"] for each in about.get("loras", [])] == [*scales.values()]
  assert not equal(found[0][0], found[1][0])


def test_images_with_regions_share_a_batch_with_those_of_as_many_captions():
  model = pipeline()
  left, right, whole = ((0, 0, 4, 8), (4, 0, 8, 8), (0, 0, 8, 8))
  wanted = [
    [{"prompt": "a blue two", "box": left}],
    [{"prompt": "a green nine", "box": right, "weight": 0.5}],
    None,
    [{"prompt": "a blue two", "box": whole}],
  ]
  with engine(model, limits={"max_delay": 0.3}) as running:
    asked = [ask(running, seed=1, regions=regions)[1] for regions in wanted]
    found = [drawn(events)[0] for events in asked]
    # The prompt of the last is heard nowhere, so it has one caption, as the third has.
    assert batches(running) == [2, 4]
  for regions, (image, about) in zip(wanted, found, strict=True):
    assert equal(image, alone(model, "a red three", seed=1, regions=regions))
    heard = [region["prompt"] for region in about.get("regions", [])]
    assert heard == [region["prompt"] for region in regions or []]
  assert equal(found[3][0], alone(model, "a blue two", seed=1))
  assert not equal(found[0][0], found[2][0])


def test_only_images_of_equal_shared_settings_and_length_join_a_batch():
  with engine(pipeline(), limits={"max_delay": 0.3}) as running:
    asked = [
      ask(running, seed=1)[1],
      ask(running, seed=1, guidance_scale=3)[1],
      ask(running, seed=1, height=16, width=8)[1],
      ask(running, seed=2)[1],
    ]
    found = [drawn(events)[0] for events in asked]
    assert batches(running) == [3, 4]
  assert found[1][1]["guidance_scale"] == 3
  assert found[2][0].size == (8, 16)
  assert not equal(found[0][0], found[1][0])


def test_images_of_a_request_have_following_seeds_and_may_lie_in_several_batches():
  model = pipeline()
  with engine(model) as running:
    _, events = ask(running, seed=3, num_images_per_prompt=6)
    found = drawn(events, 6)
    assert batches(running) == [2, 6]
  assert [about["seed"] for _, about in found] == [3, 4, 5, 6, 7, 8]
  assert equal(found[5][0], alone(model, "a red three", seed=8))


def test_a_lone_image_waits_for_company_as_long_as_it_is_said_to_and_a_full_batch_not():
  with engine(pipeline(), limits={"max_delay": 1.0}) as running:
    ticket, events = ask(running)
    drawn(events)
    assert ticket.queue_seconds >= 1.0
    full = [ask(running, seed=seed) for seed in range(4)]
    for _, events in full:
      drawn(events)
    assert all(ticket.queue_seconds < 1.0 for ticket, _ in full)


def test_previews_lie_evenly_among_the_steps_at_the_images_size():
  with engine(pipeline()) as running:
    _, events = ask(running, previews=3, num_inference_steps=8, height=16, width=8)
    shown = [events.get(timeout=worlds.PATIENCE) for _ in range(4)]
    assert [isinstance(event, Preview) for event in shown] == [True] * 3 + [False]
    assert {event.image.size for event in shown} == {(8, 16)}
    # Two steps have room for one: the last shows the image itself.
    _, events = ask(running, previews=3, num_inference_steps=2)
    assert isinstance(events.get(timeout=worlds.PATIENCE), Preview)
    drawn(events)


def test_a_request_beyond_the_queue_is_refused_whole_and_told_when_to_come_back():
  gate = worlds.Gate()
  model = pipeline(autoencoder=gate, batch_size=1)
  with engine(model, limits={"max_queue": 3}) as running:
    asked = [ask(running)]
    assert gate.reached.wait(worlds.PATIENCE)
    asked += [ask(running), ask(running)]
    with pytest.raises(Busy, match="2 images wait already, and at most 3 may") as busy:
      ask(running, num_images_per_prompt=2)
    assert busy.value.retry_after >= 1
    asked.append(ask(running))
    gate.opened.set()
    for _, events in asked:
      drawn(events)
    assert count_of(running, "refused") == 1


def test_what_waits_at_the_end_is_drawn_and_what_comes_then_is_refused():
  gate = worlds.Gate()
  running = engine(pipeline(autoencoder=gate, batch_size=1))
  running.start()
  first, second = ask(running)[1], ask(running)[1]
  assert gate.reached.wait(worlds.PATIENCE)
  running.drain()
  assert not running.ready
  with pytest.raises(Draining):
    ask(running)
  assert not running.join(0.1)
  gate.opened.set()
  drawn(first)
  drawn(second)
  assert running.join(worlds.PATIENCE)
  assert running.idle


def test_a_batch_that_nobody_waits_for_ends_at_its_next_step():
  with engine(pipeline(), limits={"max_delay": 0.0}) as running:
    ticket, events = None, worlds.queue.Queue()
    asked = running.check("", {"num_inference_steps": 20})

    def on_event(event):  # in the engine's thread: nothing goes on meanwhile
      events.put(event)
      ticket.cancel()

    ticket = running.submit(asked, on_event, 3)
    drawn(ask(running, seed=1)[1])
    assert [type(event) for event in events.queue] == [Preview]
    assert count_of(running, "images") == 1


def test_a_cancelled_image_leaves_the_queue_and_its_neighbours_stay():
  gate = worlds.Gate()
  with engine(pipeline(autoencoder=gate)) as running:
    first = ask(running)[1]
    assert gate.reached.wait(worlds.PATIENCE)
    gone, stays = ask(running, seed=1), ask(running, seed=2)
    gone[0].cancel()
    gate.opened.set()
    drawn(first)
    drawn(stays[1])
    assert gone[1].empty()
    assert batches(running) == [2, 2]


def test_an_image_that_waits_beyond_its_deadline_fails_and_the_next_does_not():
  gate = worlds.Gate()
  alone(pipeline(), "")  # compiled by then
  with engine(pipeline(autoencoder=gate), limits={"deadline": 2.0}) as running:
    first = ask(running)[1]
    assert gate.reached.wait(worlds.PATIENCE)
    late = ask(running, seed=1)[1]
    time.sleep(2.1)
    gate.opened.set()
    assert isinstance(failure(late), DeadlineExceeded)
    drawn(first)
    drawn(ask(running)[1])


def test_an_image_past_its_deadline_while_it_is_drawn_ends_at_the_next_step():
  with engine(pipeline(), limits={"deadline": 1e-9, "max_delay": 0.0}) as running:
    error = failure(ask(running, num_inference_steps=20)[1])
    assert "not drawn within 1e-09 seconds" in str(error)
    assert count_of(running, "images") == 0


class Breaking(models.Tracing):
  """Decodes into no numbers what is not good."""

  def decode(self, latents):
    image = super().decode(latents)
    return image if self.good(latents) else image * np.nan


def test_a_broken_image_fails_alone_in_its_own_words():
  model, secret = pipeline(), "secret of somebody"
  alone(model, secret, seed=1)
  broken = Breaking()
  marked = model.autoencoder.decoded[-1]
  object.__setattr__(broken, "good", lambda z: not np.array_equal(z[0], marked))
  with engine(model.replace(autoencoder=broken), limits={"max_delay": 60.0}) as running:
    prompts = ["a red three", secret, "a red three", "a red three"]
    asked = [ask(running, text, seed=i)[1] for i, text in enumerate(prompts)]
    error = failure(asked[1])
    for seed in (0, 2, 3):
      [(image, _)] = drawn(asked[seed])
      assert equal(image, alone(model, "a red three", seed=seed))
    assert count_of(running, "failures", error="ValueError") == 2
  assert secret in str(error)
  assert "not made of finite numbers" in str(error)


def test_captions_of_waiting_requests_fill_the_rows_that_a_batch_leaves_empty():
  words, gate = worlds.Words(models.ENCODER.width), worlds.Gate()
  model = pipeline(text_encoder=words, autoencoder=gate, batch_size=1)
  with engine(model, text_batch_size=4) as running:
    asked = [ask(running, "one")]
    assert gate.reached.wait(worlds.PATIENCE)
    assert {len(call) for call in words.calls} == {4}
    calls = len(words.calls)
    asked += [ask(running, text) for text in ("two", "three", "two", "four")]
    gate.opened.set()
    for _, events in asked:
      drawn(events)
  assert words.calls[calls:] == (["two", "three", "four", "four"],)


def test_captions_of_regions_go_through_the_text_encoder_as_others_do():
  words, gate = worlds.Words(models.ENCODER.width), worlds.Gate()
  model = pipeline(text_encoder=words, autoencoder=gate, batch_size=1)
  with engine(model, text_batch_size=4) as running:
    asked = [ask(running, "one")]
    assert gate.reached.wait(worlds.PATIENCE)
    calls = len(words.calls)
    regions = [
      {"prompt": text, "box": (left, 0, left + 2, 8)}
      for left, text in enumerate(("two", "three", "two"))
    ]
    asked.append(ask(running, "one", regions=regions))
    gate.opened.set()
    for _, events in asked:
      drawn(events)
  assert words.calls[calls:] == (["two", "three", "three", "three"],)


def test_programs_of_fewer_rows_are_used_where_the_warm_up_saw_equal_bits():
  running = engine(pipeline(), smaller_batches=[2, 1], warm_up=[WARM])
  # As this model, of four tokens a side, need not round alike: as if it did.
  running._latents = lambda pipeline, settings: [np.zeros((2, 2, 3))]
  running.start()
  _, events = ask(running, num_images_per_prompt=7)
  found = drawn(events, 7)
  assert [about["batch_size"] for _, about in found] == [4] * 7
  assert drawn(ask(running)[1])[0][1]["batch_size"] == 1
  # What was not warmed up has the rows of all.
  assert drawn(ask(running, num_inference_steps=2)[1])[0][1]["batch_size"] == 4
  running.drain()
  assert running.join(worlds.PATIENCE)


def test_programs_that_round_differently_are_not_used():
  running = engine(pipeline(), smaller_batches=[1], warm_up=[WARM])
  latents = running._latents
  running._latents = lambda pipeline, settings: [
    image + (pipeline.batch_size == 1) * 1e-6 for image in latents(pipeline, settings)
  ]
  running.start()
  [(_, about)] = drawn(ask(running)[1])
  assert about["batch_size"] == 4
  running.drain()
  assert running.join(worlds.PATIENCE)


def test_an_engine_is_ready_once_it_is_warm():
  gate = worlds.Gate()
  running = engine(pipeline(autoencoder=gate), warm_up=[WARM])
  running.start()
  assert gate.reached.wait(worlds.PATIENCE)
  assert not running.ready
  assert running.alive
  gate.opened.set()
  drawn(ask(running)[1])
  assert running.ready
  running.drain()
  assert running.join(worlds.PATIENCE)


def test_compiled_programs_are_forgotten_before_there_are_too_many(monkeypatch):
  cleared = []
  monkeypatch.setattr("jax.clear_caches", lambda: cleared.append(True))
  with engine(pipeline(), limits={"max_programs": 2}) as running:
    for steps in (3, 2, 3, 2):
      drawn(ask(running, num_inference_steps=steps)[1])
    assert not cleared
    drawn(ask(running, height=16)[1])
    assert cleared


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("max_delay", -1.0, "--max_delay=-1 must be 0 or more"),
    ("max_queue", 0, "--max_queue=0 must be at least 1"),
    ("max_programs", 0, "--max_programs=0 must be at least 1"),
    ("deadline", 0.0, "--deadline=0 must be more than 0"),
  ],
)
def test_limits_out_of_range_are_named(field, value, message):
  with pytest.raises(ValueError, match=message):
    Limits(**{field: value})


def test_sizes_that_are_no_smaller_batches_are_named():
  with pytest.raises(ValueError, match="--smaller_batches has 4, which does not lie"):
    engine(pipeline(), smaller_batches=[4])
  with pytest.raises(ValueError, match="--text_batch_size=0 must be at least 1"):
    engine(pipeline(), text_batch_size=0)


def test_many_threads_ask_and_each_gets_its_own():
  with engine(pipeline(), limits={"max_delay": 0.01}) as running:
    found = {}

    def client(number):
      [(_, about)] = drawn(ask(running, f"number {number}", seed=number)[1])
      found[number] = about["prompt"], about["seed"]

    threads = [threading.Thread(target=client, args=[number]) for number in range(12)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join(worlds.PATIENCE)
  assert found == {number: (f"number {number}", number) for number in range(12)}
