"""Steps that come back to Python one by one, and arguments that are arrays."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixsigma_jax import sharding
from pixsigma_jax.diffusion.solvers import SAMPLERS
from pixsigma_jax.sample import StopDrawing, image_files, previews
from tests.sample import models
from tests.sample.models import ENCODER, SCALING_FACTOR

STEPS = 3
PROMPTS = ("a red seven", "a blue two", "nothing")
# Larger and smaller than the training's square, and of another length.
SIZES = {"height": [8, 16, 8], "width": [8, 8, 8]}


@pytest.fixture(scope="module")
def subject():
  return models.pipeline(batch_size=2)


def latents_of(subject, prompts=PROMPTS, **arguments):
  arguments = {"num_inference_steps": STEPS, "output_type": "latent", **arguments}
  return subject(prompts if prompts is None else list(prompts), **arguments).images


class Seen(list):
  """A callback that keeps what it sees, and changes nothing."""

  def __call__(self, pipeline, step, timestep, known):
    self.append((step, timestep, known))
    return known


# ------------------------------------------------------------------------ the callback


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_callback_that_changes_nothing_changes_nothing(subject, sampler):
  """To the bit, in what tests compile; on a mesh and beside guidance to rounding."""
  steps = 1 if sampler == "dmd" else STEPS
  settings = {"sampler": sampler, "num_inference_steps": steps}
  plain = latents_of(subject, **settings)
  seen = Seen()
  watched = latents_of(subject, **settings, callback_on_step_end=seen)
  np.testing.assert_array_equal(watched, plain)
  calls = {"heun": 2 * steps - 1}.get(sampler, steps)
  assert [step for step, _, _ in seen] == [*range(calls)] * 2
  assert {known["num_steps"] for *_, known in seen} == {calls}
  times = [timestep for _, timestep, _ in seen[:calls]]
  assert times == sorted(times, reverse=True)
  np.testing.assert_array_equal(seen[-1][-1]["latents"][0], plain[2])


def test_a_callback_sees_the_images_of_each_batch_at_their_own_sizes(subject):
  seen = Seen()
  plain = latents_of(subject, **SIZES)
  watched = latents_of(subject, **SIZES, callback_on_step_end=seen)
  for one, other in zip(watched, plain, strict=True):
    np.testing.assert_array_equal(one, other)
  # Two batches: images 0 and 2, then 1, which is twice as high.
  assert [known["images"] for *_, known in seen] == [[0, 2]] * STEPS + [[1]] * STEPS
  for *_, known in seen:
    for name in ("latents", "clean_latents"):
      shapes = [image.shape for image in known[name]]
      assert shapes == [(16 if n == 1 else 8, 8, 3) for n in known["images"]]


@pytest.mark.parametrize("passes", [1, 2])
def test_it_changes_nothing_beside_all_guidance_and_step_caching(subject, passes):
  subject = subject.replace(guidance_passes=passes)
  plain = latents_of(subject, **models.EVERYTHING)
  watched = latents_of(subject, **models.EVERYTHING, callback_on_step_end=Seen())
  scale = np.abs(plain).max()
  # The loop and the scan are two programs: float32 over three guided steps.
  np.testing.assert_allclose(watched, plain, rtol=0, atol=1e-4 * scale)


def test_it_changes_nothing_on_a_mesh_and_compiles_one_step(subject, caplog):
  caplog.set_level(logging.INFO, logger="absl")
  mesh = sharding.make_mesh(data=2, fsdp=1, context=1, devices=jax.devices()[:2])
  shared = subject.replace(mesh=mesh)
  plain = latents_of(shared, num_inference_steps=4)
  seen = Seen()
  watched = latents_of(shared, num_inference_steps=4, callback_on_step_end=seen)
  np.testing.assert_allclose(watched, plain, rtol=0, atol=1e-4 * np.abs(plain).max())
  assert sum("the sampler's step" in m for m in caplog.messages) == 1
  assert len(seen) == 2 * 4


@pytest.mark.parametrize("more", [{}, models.EVERYTHING])
def test_the_step_is_compiled_once_on_devices_whatever_changes(subject, caplog, more):
  devices = jax.devices()[:4]
  mesh = sharding.make_mesh(data=1, fsdp=1, guidance=2, context=2, devices=devices)

  def halve(_pipeline, step, _timestep, known):
    return {"latents": [image / 2 for image in known["latents"]]} if step else None

  with jax.log_compiles():
    latents_of(subject.replace(mesh=mesh), callback_on_step_end=halve, **more)
  compiled = "Finished XLA compilation of jit(step)"
  assert sum(compiled in message for message in caplog.messages) == 1


def test_the_step_is_compiled_once_for_all_steps_prompts_and_changes(subject, caplog):
  caplog.set_level(logging.INFO, logger="absl")

  def compiled():
    return sum("Finished XLA compilation" in m for m in caplog.messages)

  def halve(_pipeline, _step, _timestep, known):
    return {"latents": [image / 2 for image in known["latents"]]}

  with jax.log_compiles():
    latents_of(subject, num_inference_steps=7, callback_on_step_end=halve)
    first = compiled()
    latents_of(
      subject, ("some", "other"), num_inference_steps=7, callback_on_step_end=halve
    )
  assert sum("the sampler's step" in m for m in caplog.messages) == 1
  assert compiled() == first


def test_the_next_step_takes_the_latents_that_are_returned(subject):
  plain = latents_of(subject)

  def replace(_pipeline, step, _timestep, known):
    if step == STEPS - 1 and 1 in known["images"]:
      known["latents"][1] *= 0
      known["latents"][1] += 5
      return known
    return None

  changed = latents_of(subject, callback_on_step_end=replace)
  np.testing.assert_array_equal(changed[0], plain[0])
  np.testing.assert_array_equal(changed[1], np.full_like(plain[1], 5))

  def restart(_pipeline, step, _timestep, known):  # an earlier step moves the rest
    return {"latents": [0 * x for x in known["latents"]]} if step == 0 else None

  moved = latents_of(subject, callback_on_step_end=restart)
  assert np.abs(moved[0] - plain[0]).max() > 1e-2


def test_clean_latents_of_the_last_step_are_the_image(subject):
  seen = Seen()
  plain = latents_of(subject, callback_on_step_end=seen)
  for image, clean in zip(plain, seen[STEPS - 1][-1]["clean_latents"], strict=False):
    np.testing.assert_allclose(clean, image, rtol=0, atol=1e-5)


def test_images_that_a_callback_stops_are_left_out_and_others_drawn(subject, caplog):
  caplog.set_level(logging.INFO, logger="absl")
  steps = []

  def stop(_pipeline, step, _timestep, known):
    steps.append((step, known["images"]))
    if step == 1 and 0 in known["images"]:
      raise StopDrawing

  plain = subject(list(PROMPTS), num_inference_steps=STEPS)
  rest = subject(list(PROMPTS), num_inference_steps=STEPS, callback_on_step_end=stop)
  assert [about["prompt"] for about in rest.settings] == ["nothing"]
  np.testing.assert_array_equal(rest.images[0], plain.images[2])
  assert steps == [(0, [0, 1]), (1, [0, 1]), *((step, [2]) for step in range(STEPS))]
  assert "not drawn: images [0, 1]" in caplog.text


def test_other_exceptions_of_a_callback_end_the_call(subject):
  def fail(*_):
    raise KeyError("mine")

  with pytest.raises(KeyError, match="mine"):
    subject("a", num_inference_steps=STEPS, callback_on_step_end=fail)


@pytest.mark.parametrize(
  ("returned", "message"),
  [
    (3, "returned 3: it must return None, or a dict"),
    ({"noise": 1}, "returned the keys noise: it must return None, or a dict"),
    ({"latents": [np.zeros((4, 4, 3))]}, r"\(4, 4, 3\) \(1\) for those of \(8, 8, 3\)"),
    ({"latents": []}, r"shapes .* for those of \(8, 8, 3\) \(1\)"),
  ],
)
def test_what_a_callback_may_not_return_is_named(subject, returned, message):
  with pytest.raises(ValueError, match=message):
    subject("a", num_inference_steps=STEPS, callback_on_step_end=lambda *_: returned)


# --------------------------------------------------------------- captions given as such


def embedded(prompts, length=8, **arguments):
  embeddings, mask = ENCODER.encode(list(prompts), length)
  return {"prompt_embeds": embeddings, "prompt_attention_mask": mask, **arguments}


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_the_encoders_own_embeddings_draw_the_same(subject, make):
  negative = {"negative_prompt": "grey"}
  plain = latents_of(subject, **negative, num_images_per_prompt=2)
  given = {name: make(value) for name, value in embedded(PROMPTS).items()}
  grey = embedded(["grey"])
  given |= {f"negative_{name}": make(value) for name, value in grey.items()}
  ours = latents_of(subject, None, **given, num_images_per_prompt=2)
  np.testing.assert_array_equal(ours, plain)


def test_shorter_embeddings_draw_the_same_and_no_encoder_is_asked(subject):
  plain = latents_of(subject, ("a one",), guidance_scale=1)
  without = subject.replace(text_encoder=NoEncoder())
  given = {name: value[:, :3] for name, value in embedded(["a one"]).items()}
  np.testing.assert_array_equal(
    latents_of(without, None, **given, guidance_scale=1), plain
  )


class NoEncoder:
  width = ENCODER.width

  def count(self, text):
    assert text == ""
    return 1


def test_the_null_caption_stands_beside_given_embeddings(subject):
  plain = latents_of(subject)
  np.testing.assert_array_equal(latents_of(subject, None, **embedded(PROMPTS)), plain)


def test_settings_name_what_was_given(subject):
  noise = [np.zeros((8, 8, 3), np.float32)]
  given = embedded(["a one"])
  first = subject(None, **given, latents=noise, num_inference_steps=1).settings[0]
  other = embedded(["a two"])
  second = subject(None, **other, latents=noise, num_inference_steps=1).settings[0]
  assert first["prompt"] == ""
  assert first["latents_digest"] == second["latents_digest"]
  assert first["prompt_embeds_digest"] != second["prompt_embeds_digest"]
  assert "latents_digest" not in subject("a", num_inference_steps=1).settings[0]


# ------------------------------------------------------------ latents, kinds of output


def test_the_seeds_own_noise_draws_the_same(subject):
  plain = latents_of(subject, seed=7, **SIZES)
  noise = [
    np.asarray(jax.random.normal(jax.random.key(7 + i), (height, 8, 3)))
    for i, height in enumerate(SIZES["height"])
  ]
  ours = latents_of(subject, latents=noise, seed=7, **SIZES)
  for one, other in zip(ours, plain, strict=True):
    np.testing.assert_array_equal(one, other)
  others = latents_of(subject, latents=[-n for n in noise], seed=7, **SIZES)
  assert np.abs(others[0] - plain[0]).max() > 1e-2


def test_every_kind_of_output_is_the_same_image(subject):
  arguments = {"num_inference_steps": STEPS, **SIZES}
  kinds = {
    kind: subject(list(PROMPTS), output_type=kind, **arguments).images
    for kind in ("pil", "np", "latent")
  }
  for pil, array, latent in zip(*kinds.values(), strict=True):
    assert array.dtype == np.float32
    np.testing.assert_array_equal(np.round(array * 255).astype(np.uint8), pil)
    image = image_files.to_image(latent / SCALING_FACTOR)
    np.testing.assert_array_equal(np.asarray(image), pil)


def test_arrays_are_fitted_as_images_are():
  y, x, c = np.meshgrid(np.arange(16), np.arange(24), np.arange(3), indexing="ij")
  image = (0.8 * np.sin(0.3 * y + 0.2 * x + c)).astype(np.float32)
  fitted = image_files.resized_array(image_files.fit, image, 9, 18)
  peer = image_files.fit(image_files.to_image(image), 9, 18)
  assert fitted.shape == (9, 18, 3)
  assert np.abs(fitted * 255 - np.asarray(peer, int)).max() <= 2  # rounded twice


# --------------------------------------------------------------------------- previews


class Blocks:
  """Decodes a latent to a block of pixels whose mean is linear in it, and no pixel."""

  channels, downsampling, scaling_factor = 4, 8, 0.5
  weights = np.random.default_rng(1).normal(0, 0.1, (4, 3)).astype(np.float32)

  def decode(self, latents):
    texture = np.random.default_rng(2).normal(0, 0.05, (8, 8, 3))
    texture -= texture.mean(axis=(0, 1))
    colors = np.einsum("bhwc,cd->bhwd", latents, self.weights) + self.weights[:1]
    blocks = colors[:, :, None, :, None] + texture[:, None]
    return blocks.reshape(len(latents), 8 * blocks.shape[1], -1, 3).astype(np.float32)


def test_previews_of_a_linear_decoder_are_its_mean_colors():
  known, draw = Blocks(), np.random.default_rng(5)
  latents = draw.normal(size=(1, 4, 6, 4)).astype(np.float32)
  truth = previews.mean_colors(known.decode(latents / 0.5), 8)[0]
  ours = previews.fit(known).colors(latents[0])
  # What the map was fitted to was clipped to [-1, 1] here and there.
  np.testing.assert_allclose(ours, truth, rtol=0, atol=0.03)


def test_the_preview_of_pixels_are_the_pixels(subject):
  soft = np.random.default_rng(3).uniform(-1, 1, (8, 10, 3)).astype(np.float32)
  ours = subject.preview(soft)
  assert ours.size == (10, 8)
  truth = np.asarray(image_files.to_image(soft / SCALING_FACTOR), int)
  assert np.abs(np.asarray(ours, int) - truth).max() <= 12  # clipped colors bend it


# ---------------------------------------------------------------------- what is refused


GIVEN = embedded(["a", "b"])


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"prompt": "a", **GIVEN}, "prompt and prompt_embeds say the same thing"),
    (
      {"prompt_embeds": GIVEN["prompt_embeds"]},
      "prompt_attention_mask belong together",
    ),
    (
      {**GIVEN, "negative_prompt": "c", "negative_prompt_embeds": 0}
      | {"negative_prompt_attention_mask": 0},
      "negative_prompt='c' and negative_prompt_embeds say",
    ),
    (
      {**GIVEN, "prompt_embeds": np.zeros((2, 8, 5))},
      r"prompt_embeds has shape \(2, 8, 5\); .* b = 2, t up to 8 and e = 16",
    ),
    (
      {**GIVEN, "prompt_embeds": np.full((2, 8, 16), np.nan)},
      "prompt_embeds must be finite numbers",
    ),
    (
      {**GIVEN, "prompt_attention_mask": np.full((2, 8), 0.5)},
      r"prompt_attention_mask of shape \(2, 8\) must have a 0 or 1",
    ),
    (
      {**GIVEN, "prompt_attention_mask": np.zeros((2, 8))},
      "prompt_attention_mask hides all tokens of row 0",
    ),
    (
      {"prompt": "a", "latents": np.zeros((1, 3, 8, 8))},
      r"latents have the shapes \(3, 8, 8\) \(1\), .* \(8, 8, 3\) \(1\): .* last",
    ),
    (
      {"prompt": "a", "latents": np.full((1, 8, 8, 3), np.inf)},
      "latents must be finite numbers",
    ),
    (
      {"prompt": "a", "output_type": "pt"},
      "Unknown output_type 'pt'; choose one of pil, np, latent",
    ),
    (
      {"prompt": "a", "callback_on_step_end": 3},
      "callback_on_step_end must be a function, not 3",
    ),
    ({}, "prompt must be a text or a list of texts, not None"),
  ],
)
def test_arrays_that_do_not_fit_are_refused_before_anything_is_drawn(
  subject, arguments, message
):
  with pytest.raises(ValueError, match=message):
    subject.stream(**arguments)
