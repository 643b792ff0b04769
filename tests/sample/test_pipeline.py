"""The pipeline: what its images depend on, and what they are where that is known."""

import dataclasses
import itertools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pixsigma_jax
from pixsigma_jax import checkpoint, sharding
from pixsigma_jax.diffusion.schedule import linear_schedule
from pixsigma_jax.diffusion.solvers import dpm_solver_pp
from pixsigma_jax.models.kv_compression import KVCompression
from pixsigma_jax.models.pixart import PixArt, abstract_params
from pixsigma_jax.models.pixels import PixelAutoencoder
from pixsigma_jax.sample import image_files, program
from pixsigma_jax.sample.pipeline import Pipeline
from tests.sample import models
from tests.sample.models import ENCODER, SCALING_FACTOR

STEPS = 3
# An exact model's x_0 comes out of (x_t - σ ε) / α with α = 0.006 in the first step.
EXACT = 1e-4
_UNIQUE = itertools.count(5.0)


@pytest.fixture
def drawn_by(monkeypatch):
  """Puts a stand-in in the network's place, and gives what a call decodes."""

  def draw(clean, prompt, *, config=None, fields=None, **arguments):
    models.use_exact(monkeypatch, clean)
    # Hyper-parameters of its own, so that it finds no other network's program.
    config = dataclasses.replace(config or models.nano(), mlp_ratio=next(_UNIQUE))
    subject = models.pipeline(config, params={}, **(fields or {}))
    output = subject(prompt, num_inference_steps=STEPS, **arguments)
    return subject.autoencoder.decoded, output

  return draw


@pytest.fixture(scope="module")
def real():
  """A real network; three rows a program."""
  return models.pipeline(batch_size=3)


def latents_of(subject, *arguments, **more):
  subject.autoencoder.decoded.clear()
  output = subject(*arguments, num_inference_steps=STEPS, **more)
  return [x * SCALING_FACTOR for x in subject.autoencoder.decoded], output


# ------------------------------------------------------------ what an image depends on


def test_an_image_is_the_same_alone_in_a_batch_and_in_any_place(real):
  prompts = ["a red seven", "a blue two", "nothing", "a blue two", "one more"]
  together, output = latents_of(real, prompts, seed=5)
  assert [about["seed"] for about in output.settings] == [5, 6, 7, 8, 9]
  alone, _ = latents_of(real, "a blue two", seed=8)
  shifted, _ = latents_of(real, ["another", "a blue two", "others"], seed=7)
  np.testing.assert_array_equal(alone[0], together[3])  # row 0 of a second batch
  np.testing.assert_array_equal(alone[0], shifted[1])
  assert not np.array_equal(together[1], together[3])  # same prompt, other seed


def test_an_image_is_the_same_among_images_of_other_sizes(real):
  sizes = {"height": [8, 16, 8], "width": [16, 8, 8]}
  mixed, output = latents_of(real, ["a one"] * 3, seed=3, **sizes)
  assert [image.size for image in output.images] == [(16, 8), (8, 16), (8, 8)]
  wide, _ = latents_of(real, "a one", seed=3, height=8, width=16)
  square, _ = latents_of(real, "a one", seed=5)
  np.testing.assert_array_equal(wide[0], mixed[0])
  np.testing.assert_array_equal(square[0], mixed[2])


def by_hand(config, params, prompt, negative, scale, seed, size):
  """The same image by a plain loop over the network, one image, no sequences."""
  embeddings, mask = ENCODER.encode([prompt], config.caption_length)
  model = PixArt(config, models.FLOAT32)

  @jax.jit
  def noise_in(latents, timestep, embeddings, mask):
    output = model.apply({"params": params}, latents, timestep, embeddings, mask)
    return output[..., : config.in_channels]

  table = dpm_solver_pp(linear_schedule(), STEPS, "diffusers")
  shape = (*size, config.in_channels)
  latents, previous = jax.random.normal(jax.random.key(seed), shape)[None], 0.0
  for row in zip(*table[:6], strict=True):
    timestep, signal, noise_scale, carry, current, before = row
    conditional = noise_in(latents, timestep[None], embeddings, mask)
    unconditional = noise_in(latents, timestep[None], *negative(mask))
    noise = unconditional + scale * (conditional - unconditional)
    clean = (latents - noise_scale * noise) / signal
    latents = carry * latents + current * clean + before * previous
    previous = clean
  return np.asarray(latents[0])


def test_draws_what_a_plain_loop_over_the_network_draws(real):
  scale, config = 3.0, real.config
  (ours,), _ = latents_of(real, "a red seven", seed=11, guidance_scale=scale)
  theirs = by_hand(
    config,
    real.params,
    "a red seven",
    lambda mask: (models.null_caption(config)[None], mask),
    scale,
    seed=11,
    size=(8, 8),
  )
  # Measured 1e-6: float32 through six calls of a network of two layers.
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
  assert np.abs(theirs).std() > 0.1


def test_one_program_serves_every_prompt_seed_scale_shape_and_checkpoint(real, caplog):
  caplog.set_level(logging.INFO, logger="absl")

  def compilations():
    return sum("Compiling the sampler" in record.message for record in caplog.records)

  wide_and_high = {"height": [8, 16], "width": [16, 8]}
  steps = {"num_inference_steps": 5}  # as in no other test
  ours = real(["a two", "a one"], **wide_and_high, **steps)
  assert compilations() == 1
  assert "batch 3 of 32 tokens, 5 steps, with guidance" in caplog.text
  real("a six", height=16, width=8, guidance_scale=7.0, **steps)
  real("a six", height=16, width=8, sampler="dpm++-reference", **steps)
  real("a six", height=16, width=8, negative_prompt="a blue", **steps)
  other = real.replace(params=models.random_params(real.config, seed=1))
  theirs = other(["a two", "a one"], **wide_and_high, **steps)
  assert compilations() == 1
  assert not np.array_equal(ours.images[0], theirs.images[0])


def test_tokens_discarded_at_random_are_the_same_in_every_drawing():
  compression = KVCompression(ratio=4, layers=(1,), operator="random_discard")
  subject = models.pipeline(models.nano(kv_compression=compression), batch_size=2)
  (alone,), _ = latents_of(subject, "a one", seed=4)
  together, _ = latents_of(subject, ["a two", "a one"], seed=3)
  np.testing.assert_array_equal(alone, together[1])
  assert np.isfinite(alone).all()


# ------------------------------------------------------ what it is, where that is known


def landscape(height, width):
  """An image without symmetry, as a formula of row, column and channel."""
  y, x, c = np.meshgrid(
    np.arange(height), np.arange(width), np.arange(3), indexing="ij"
  )
  return np.sin(0.7 * y + 1) * np.cos(0.3 * x) * (1 - 0.3 * c)


def landscape_tokens(inputs):
  """The same, from the coordinates of 2x2 patches in the order (p q c)."""
  p, q, c = (part.reshape(-1) for part in np.indices((2, 2, 3)))
  row, column = inputs["coordinates"][..., :1], inputs["coordinates"][..., 1:]
  y, x = 2 * row + p[None, None], 2 * column + q[None, None]
  return jnp.sin(0.7 * y + 1) * jnp.cos(0.3 * x) * (1 - 0.3 * c[None, None])


@pytest.mark.parametrize("size", [(8, 8), (16, 8), (6, 10), (12, 10)])
@pytest.mark.parametrize("base_size", [4, 8])
def test_a_model_that_knows_the_image_draws_it_at_any_size(drawn_by, base_size, size):
  # At base size 8, sequences are padded to multiples of 4: 15 tokens to 16, 30 to 32.
  decoded, output = drawn_by(
    landscape_tokens,
    "a landscape",
    config=models.nano(base_size=base_size),
    height=size[0],
    width=size[1],
  )
  truth = landscape(*size) / SCALING_FACTOR
  np.testing.assert_allclose(decoded[0], truth, rtol=0, atol=EXACT)
  levels = np.asarray(output.images[0], int)
  assert np.abs(levels - (truth + 1) * 127.5).max() < 0.5 + 127.5 * EXACT


def test_images_of_several_sizes_come_back_in_the_order_of_their_prompts(drawn_by):
  heights, widths = [8, 16, 8, 8], [8, 8, 16, 8]
  _, output = drawn_by(
    landscape_tokens,
    ["a", "b", "c", "d"],
    height=heights,
    width=widths,
    fields={"batch_size": 2},
  )
  assert [about["prompt"] for about in output.settings] == ["a", "b", "c", "d"]
  for image, height, width in zip(output.images, heights, widths, strict=True):
    expected = image_files.to_image(landscape(height, width) / SCALING_FACTOR)
    assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).max() <= 1


def caption_mean(inputs):
  """x_0 is the mean of what the captions' visible tokens hold: shows who saw what."""
  mask = inputs["mask"][..., None]
  total = jnp.where(mask, inputs["captions"][..., :1], 0).sum(axis=1, keepdims=True)
  return total / mask.sum(axis=1, keepdims=True)


def mean_under(embeddings, mask):
  return embeddings[0, mask[0], 0].mean()


@pytest.mark.parametrize("negative_prompt", ["", "some blue"])
@pytest.mark.parametrize("scale", [1.5, 4.5])
def test_guidance_leads_from_the_negative_caption_to_the_prompt_and_beyond(
  drawn_by, scale, negative_prompt
):
  """The null caption is seen under the prompt's mask, a negative prompt under its own.

  ε is linear in x_0, so guided x_0 = x_0⁻ + scale · (x_0⁺ - x_0⁻).
  """
  config, prompt = models.nano(), "a red seven above it"
  decoded, _ = drawn_by(
    caption_mean, prompt, guidance_scale=scale, negative_prompt=negative_prompt
  )
  embeddings, mask = ENCODER.encode([prompt], config.caption_length)
  null, end = ENCODER.encode([negative_prompt], config.caption_length)
  positive = mean_under(embeddings, mask)
  negative = mean_under(null, end if negative_prompt else mask)
  truth = (negative + scale * (positive - negative)) / SCALING_FACTOR
  np.testing.assert_allclose(decoded[0], truth, rtol=0, atol=10 * EXACT)


def test_each_image_of_a_batch_has_its_own_captions_mask(drawn_by):
  config, prompts = models.nano(), ["one", "one two three four five"]
  decoded, _ = drawn_by(
    caption_mean, prompts, guidance_scale=2.0, fields={"batch_size": 2}
  )
  null = models.null_caption(config)[None]
  for image, prompt in zip(decoded, prompts, strict=True):
    embeddings, mask = ENCODER.encode([prompt], config.caption_length)
    positive, negative = mean_under(embeddings, mask), mean_under(null, mask)
    truth = (2 * positive - negative) / SCALING_FACTOR
    np.testing.assert_allclose(image, truth, rtol=0, atol=10 * EXACT)


@pytest.mark.parametrize(
  ("scale", "rows"), [(1.0, 3), (1, 3), (0, 3), (0.5, 3), (2, 6)]
)
def test_without_guidance_there_is_no_unconditional_half(drawn_by, scale, rows):
  seen = []

  def clean(inputs):
    seen.append(len(inputs["noisy"]))
    return caption_mean(inputs)

  decoded, _ = drawn_by(
    clean, "a seven", guidance_scale=scale, fields={"batch_size": 3}
  )
  assert set(seen) == {rows}
  if scale <= 1:
    embeddings, mask = ENCODER.encode(["a seven"], models.nano().caption_length)
    truth = mean_under(embeddings, mask) / SCALING_FACTOR
    np.testing.assert_allclose(decoded[0], truth, rtol=0, atol=EXACT)


@pytest.mark.parametrize("sampler", ["dpm++", "iddpm"])
@pytest.mark.parametrize("size_conditions", [False, True])
def test_guidance_in_two_passes_draws_what_it_draws_in_one(sampler, size_conditions):
  config = models.nano(size_conditions=size_conditions)
  arguments = {
    "prompt": ["a red seven", "a blue two above it"],
    "negative_prompt": ["", "grey"],
    "guidance_rescale": 0.3,
    "height": [8, 6],
    "width": [8, 10],
    "sampler": sampler,
  }
  one, two = (
    latents_of(
      models.pipeline(config, batch_size=2, guidance_passes=passes), **arguments
    )
    for passes in (1, 2)
  )
  for passes, (latents, output) in ((1, one), (2, two)):
    assert [about["guidance_passes"] for about in output.settings] == [passes] * 2
    assert not np.array_equal(*latents[:1], latents[1][:8, :8])
  for ours, theirs in zip(two[0], one[0], strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize(
  ("asked", "batch_size", "rows"),
  [
    (None, 2, [4]),
    (1, 2, [4]),
    (2, 2, [2]),
    (None, 129, [129]),  # 129 · 16 tokens are more than 2048
    (1, 129, [258]),
  ],
)
def test_a_pass_has_one_half_of_what_one_batch_has_and_size_decides(
  drawn_by, asked, batch_size, rows
):
  seen = []

  def clean(inputs):
    seen.append(len(inputs["noisy"]))
    return caption_mean(inputs)

  fields = {"batch_size": batch_size, "guidance_passes": asked}
  drawn_by(clean, "a seven", fields=fields)
  assert seen == rows


def test_the_devices_of_a_mesh_have_their_own_share_of_the_tokens():
  mesh = sharding.make_mesh(data=4, fsdp=2, context=1)
  assert program.passes_by_size(8, 1024, mesh) == 1
  assert program.passes_by_size(8, 1024, None) == 2
  assert program.passes_by_size(8, 4096, mesh) == 2


def test_two_passes_need_hardly_more_than_half_the_memory():
  config = models.nano(base_size=24)  # 576 tokens: their scores outweigh the rest

  def temporary(passes):
    rows, length, shape = 2, config.base_size**2, jax.ShapeDtypeStruct
    captions = (rows, config.caption_length)
    sizes = {"coordinates": (rows, length, 2), "grid": (rows, 2)}
    batch = {
      "noise": shape((rows, length, 12), jnp.float32),
      "seed": shape((rows,), jnp.uint32),
      **{name: shape(sides, jnp.int32) for name, sides in sizes.items()},
      "image_size": shape((rows, 2), jnp.float32),
      "aspect_ratio": shape((rows,), jnp.float32),
    }
    for half in ("caption", "negative"):
      batch[f"{half}_embeddings"] = shape((*captions, ENCODER.width), jnp.float32)
      batch[f"{half}_mask"] = shape(captions, jnp.bool_)
    compiled = program.sample.lower(
      abstract_params(config),
      batch,
      dpm_solver_pp(linear_schedule(), STEPS),
      program.Guidance(4.5, 0.0, 1.0, 0.0),
      config=config,
      compute=models.FLOAT32,
      passes=passes,
    ).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert 0.45 < temporary(2) / temporary(1) < 0.6


def test_the_network_is_told_size_and_aspect_ratio_in_pixels_height_first(drawn_by):
  def clean(inputs):
    height, width = jnp.unstack(inputs["image_size"], axis=-1)
    ratio = inputs["aspect_ratio"]
    return (height / 10 + width / 100 + ratio / 1000)[:, None, None]

  decoded, _ = drawn_by(clean, "a", height=16, width=8)
  truth = (1.6 + 0.08 + 0.002) / SCALING_FACTOR
  np.testing.assert_allclose(decoded[0], truth, rtol=0, atol=EXACT)


def test_the_default_size_is_that_of_the_training(drawn_by):
  _, output = drawn_by(landscape_tokens, "a")
  assert output.images[0].size == (8, 8)


def test_each_prompt_can_have_several_images_and_settings_tell_them_apart(drawn_by):
  _, output = drawn_by(
    landscape_tokens,
    ["a", "b"],
    num_images_per_prompt=2,
    seed=4,
    height=[8, 16],
    width=8,
    negative_prompt="c",
    guidance_scale=2.5,
    sampler="dpm++",
    fields={"origin": {"checkpoint": "runs/x", "step": 3}},
  )
  rows = [(s["prompt"], s["seed"], s["height"], s["width"]) for s in output.settings]
  assert rows == [("a", 4, 8, 8), ("a", 5, 8, 8), ("b", 6, 16, 8), ("b", 7, 16, 8)]
  del output.settings[0]["prompt"], output.settings[0]["seed"]
  assert output.settings[0] == {
    "height": 8,
    "width": 8,
    "drawn_height": 8,
    "drawn_width": 8,
    "negative_prompt": "c",
    "guidance_rescale": 0.0,
    "guidance_interval": [0.0, 1.0],
    "guidance_method": "cfg",
    "autoguidance_scale": 1.0,
    "apg_eta": 0.0,
    "apg_threshold": 15.0,
    "apg_momentum": -0.5,
    "pag_scale": 0.0,
    "pag_applied_layers": None,
    "skip_layer_guidance_scale": 0.0,
    "skip_guidance_layers": None,
    "timesteps": None,
    "use_karras_sigmas": False,
    "step_caching": 0.0,
    "outpaint": None,
    "use_resolution_binning": True,
    "unconditional_mask": "caption",
    "caption_cleaning": "raw",
    "prompt_weighting": False,
    "num_inference_steps": STEPS,
    "guidance_scale": 2.5,
    "sampler": "dpm++",
    "dtype": "float32",
    "batch_size": 1,
    "guidance_passes": 1,
    "pixsigma_jax": pixsigma_jax.__version__,
    "checkpoint": "runs/x",
    "step": 3,
  }


def test_the_reference_sampler_leaves_a_hundredth_of_noise(drawn_by):
  clean = lambda inputs: jnp.zeros((1, 1, 1))  # noqa: E731
  to_the_end, _ = drawn_by(clean, "a", seed=3)
  reference, _ = drawn_by(clean, "a", seed=3, sampler="dpm++-reference")
  assert np.abs(to_the_end[0]).max() < EXACT
  # Fractions of a timestep fall between this model's: it takes some noise for image.
  left = reference[0].std() * SCALING_FACTOR
  assert 0.002 < left < 0.05


def test_an_image_that_is_not_finite_is_refused(drawn_by):
  with pytest.raises(ValueError, match=r"Image 0, of 'a' \(seed 5\), is not made of"):
    drawn_by(lambda inputs: jnp.full((1, 1, 1), jnp.nan), "a", seed=5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_image_whose_pixels_are_not_finite_is_refused(value):
  decoded = itertools.count()

  class DamagedByTheSecond(PixelAutoencoder):
    def decode(self, latents):
      images = np.array(latents)
      if next(decoded) == 1:
        images[0, 1, 2, 0] = value
      return images

  subject = models.pipeline(autoencoder=DamagedByTheSecond())
  drawn = subject.stream(["a", "b"], seed=5, num_inference_steps=STEPS)
  assert next(drawn)[0] == 0
  with pytest.raises(
    ValueError,
    match=r"Image 1, of 'b' \(seed 6\), is not made of finite numbers once it is "
    "decoded.* Try float32",
  ):
    next(drawn)


# ---------------------------------------------------------------- what is remarked upon


@pytest.fixture
def binned():
  """A model of 256 pixels, the least that has a table of sizes."""
  return models.pipeline(models.nano(base_size=128), params={}, resolution=256)


@pytest.mark.parametrize(
  ("height", "width", "message"),
  [
    (2048, 2048, "2048 x 2048 pixels is drawn at 256 x 256, .* enlarged 8 times, with"),
    (400, 400, "enlarged 1.56 times"),
    (128, 128, "128 x 128 pixels is drawn at 256 x 256, .* and then reduced 2 times"),
    (64, 512, "64 x 512 pixels is drawn at 128 x 512, .* and then cropped by 50 %"),
    (128, 2048, "enlarged 4 times, .* and cropped by 75 %"),
  ],
)
def test_resizing_that_shows_is_remarked_upon(binned, caplog, height, width, message):
  binned.stream("a", height=height, width=width)
  assert re.search(message, caplog.text), caplog.text
  assert len(caplog.messages) == 1


def test_resizing_that_hardly_shows_is_not_remarked_upon(binned, caplog):
  sizes = [(256, 256), (300, 300), (200, 390), (140, 490), (150, 500)]
  heights, widths = zip(*sizes, strict=True)
  binned.stream(["a"] * len(sizes), height=heights, width=widths)
  assert caplog.text == ""


def test_settings_say_at_what_size_an_image_was_drawn(drawn_by):
  _, output = drawn_by(
    landscape_tokens,
    "a",
    config=models.nano(base_size=128),
    fields={"resolution": 256},
    height=600,
    width=300,
  )
  said = output.settings[0]
  assert output.images[0].size == (300, 600)
  assert (said["height"], said["width"]) == (600, 300)
  assert (said["drawn_height"], said["drawn_width"]) == (352, 176)


@pytest.mark.parametrize("sampler", ["lcm", "dmd"])
def test_guidance_of_a_model_that_has_learned_it_is_remarked_upon(
  real, caplog, sampler
):
  steps = {"num_inference_steps": 1, "sampler": sampler}
  real.stream("a", **steps)
  real.stream("a", guidance_scale=1, **steps)
  real.stream("a", guidance_scale=0, **steps)
  real.stream("a", guidance_scale=2, num_inference_steps=1, sampler="dpm++")
  assert caplog.text == ""
  real.stream("a", guidance_scale=2, **steps)
  assert f"sampler {sampler} is for have guidance in them" in caplog.text


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"height": 9}, "9 x 8 pixels .* multiples of 2, for example 8 x 8"),
    ({"width": 0}, "8 x 0 pixels .* multiples of 2, for example 8 x 2"),
    ({"height": [8, 8]}, "height has 2 values for 1 prompts"),
    (
      {"height": 18, "width": 18},
      "18 x 18 pixels .* 9 x 9 tokens, .* base_size=4, .* near 8 x 8, "
      "or .* interpolate_pe with base_size=9",
    ),
    ({"height": 2, "width": 4}, "1 x 2 tokens, .* base_size=4"),
    ({"num_inference_steps": 0}, "num_inference_steps=0 must be at least 1"),
    ({"sampler": "magic"}, r"Unknown sampler 'magic'; choose one of dpm\+\+, dpm"),
    ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number"),
    ({"step_caching": -0.1}, "step_caching=-0.1 must be 0 or more"),
    ({"step_caching": float("nan")}, "step_caching must be a finite number, not nan"),
    ({"seed": -1}, "Image 0 has seed -1: seeds must lie in 0"),
    ({"seed": 2**32}, "seeds must lie in 0 … 4294967295"),
    ({"num_images_per_prompt": 0}, "num_images_per_prompt=0 must be at least 1"),
    ({"prompt": []}, "no prompt to draw"),
    ({"prompt": "a b c d e f g h"}, "'a b c d e f g h' has 9 tokens.* limit is 8"),
    ({"negative_prompt": "a b c d e f g h"}, "has 9 tokens"),
  ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is(real, arguments, message):
  with pytest.raises(ValueError, match=message):
    real.stream(
      **(
        {
          "prompt": "a",
          "negative_prompt": "",
          "height": None,
          "width": None,
          "num_inference_steps": 2,
          "guidance_scale": 2.0,
          "seed": 0,
          "sampler": "dpm++",
          "num_images_per_prompt": 1,
        }
        | arguments
      )
    )


def test_an_unusual_area_is_remarked_upon_and_a_usual_one_is_not(drawn_by, caplog):
  drawn_by(landscape_tokens, ["a", "b"], height=[8, 16], width=[16, 8])
  assert "area" not in caplog.text
  drawn_by(landscape_tokens, "a", height=16, width=16)
  assert "16 x 16 pixels has 4 times the area" in caplog.text
  assert "(8 x 8)" in caplog.text


def test_parts_that_were_not_trained_together_are_refused():
  with pytest.raises(ValueError, match="latent channels 4 and the autoencoder 3"):
    models.pipeline(models.nano(in_channels=4), params={})
  with pytest.raises(ValueError, match="caption width 8 and the text encoder 16"):
    models.pipeline(models.nano(caption_width=8), params={})
  with pytest.raises(ValueError, match=r"null caption \(8, 16\) .*\(7, 16\)"):
    models.pipeline(params={}, null_caption=np.zeros((7, 16), np.float32))
  with pytest.raises(ValueError, match="batch_size 0"):
    models.pipeline(params={}, batch_size=0)
  with pytest.raises(ValueError, match="guidance_passes 3 must be 1, 2, or None"):
    models.pipeline(params={}, guidance_passes=3)


# ---------------------------------------------------------------------- from a snapshot


@pytest.fixture
def saved(real, tmp_path):
  """A directory with the real model's snapshot of step 12."""
  checkpoint.save_snapshot(
    tmp_path,
    12,
    params=real.params,
    null_caption=real.null_caption,
    metadata=models.metadata(real.config),
  )
  return tmp_path


def test_a_snapshot_draws_what_the_model_in_memory_draws(real, saved):
  read = Pipeline.from_checkpoint(
    saved, compute=real.compute, batch_size=real.batch_size
  )
  ours = real("a red one", num_inference_steps=STEPS)
  theirs = read("a red one", num_inference_steps=STEPS)
  np.testing.assert_array_equal(ours.images[0], theirs.images[0])
  assert theirs.settings[0]["step"] == 12
  assert theirs.settings[0]["stage"] == "test"
  assert theirs.settings[0]["checkpoint"] == str(saved / "snapshots" / "12")


def test_a_snapshot_is_read_as_it_is_best_computed_here(saved):
  read = Pipeline.from_checkpoint(saved)
  assert read.compute == program.compute_here("bfloat16", "auto")
  mlp = read.params["block_00"]["mlp"]["in"]  # layers lie apart, on a CPU
  assert mlp["kernel"].dtype == jnp.bfloat16
  assert mlp["bias"].dtype == jnp.float32


def test_a_snapshot_in_8_bit_integers_draws_nearly_the_same_and_says_so(real, saved):
  pytest.importorskip("qwix")
  read = Pipeline.from_checkpoint(
    saved, compute=real.compute, batch_size=real.batch_size, quantize="int8"
  ).replace(autoencoder=models.Tracing())
  (ours,), output = latents_of(read, "a red one")
  (theirs,), _ = latents_of(real, "a red one")
  assert output.settings[0]["quantize"] == "int8"
  error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
  assert 1e-4 < error < 0.05
  with pytest.raises(ValueError, match="Unknown quantize 'int4'; choose one of none"):
    Pipeline.from_checkpoint(saved, quantize="int4")


@pytest.mark.parametrize(
  ("identity", "message"),
  [
    ({"text_encoder": {"name": "t6"}}, "Unknown text encoder 't6'.* hashed-words"),
    ({"autoencoder": {"name": "sdxm"}}, "Unknown autoencoder 'sdxm'.* pixels"),
    (
      {"autoencoder": {"name": "pixels", "version": 99}},
      "'version': 99.* is not what this version",
    ),
    (
      {"text_encoder": ENCODER.identity | {"version": 99}},
      "'version': 99.* is not what this version",
    ),
  ],
)
def test_a_snapshot_of_unknown_parts_is_refused(
  real, tmp_path, monkeypatch, identity, message
):
  snapshot = checkpoint.Snapshot(
    path=tmp_path,
    step=1,
    metadata=models.metadata(real.config, **identity),
    config=real.config,
    params=real.params,
    null_caption=real.null_caption,
  )
  monkeypatch.setattr(checkpoint, "read_metadata", lambda _path: snapshot.metadata)
  monkeypatch.setattr(checkpoint, "read_snapshot", lambda _path, _mesh: snapshot)
  with pytest.raises(ValueError, match=message):
    Pipeline.from_checkpoint(tmp_path)
