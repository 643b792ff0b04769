"""Images to edit: what of them stays, what is drawn anew, and regions with prompts."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from pixsigma_jax import sharding
from pixsigma_jax.diffusion.schedule import linear_schedule
from pixsigma_jax.diffusion.solvers import SAMPLERS, later_start, solve, solver_table
from pixsigma_jax.sample import editing, image_files, regions
from tests.diffusion.denoisers import exact
from tests.sample import models

STEPS = 3
SAMPLE = {"num_inference_steps": STEPS, "seed": 4}


def photograph(height=8, width=8, seed=0):
  draw = np.random.default_rng(seed)
  return draw.integers(0, 256, (height, width, 3)).astype(np.uint8)


def right_half(height=8, width=8):
  mask = np.zeros((height, width), bool)
  mask[:, width // 2 :] = True
  return mask


@pytest.fixture(scope="module")
def subject():
  return models.pipeline(batch_size=2)


def latents_of(subject, prompt="a one", **arguments):
  return subject(prompt, **{**SAMPLE, "output_type": "latent", **arguments}).images


# ----------------------------------------------------------------------- image to image


@pytest.mark.parametrize("more", [{}, models.EVERYTHING, {"sampler": "heun"}])
def test_strength_1_is_text_to_image_to_the_bit(subject, more):
  plain = latents_of(subject, **more)
  ours = latents_of(subject, image=photograph(), strength=1, **more)
  np.testing.assert_array_equal(ours, plain)


def test_strength_0_is_the_autoencoders_round_trip_to_the_bit(subject):
  image = photograph()
  output = subject("a one", image=image, strength=0, **SAMPLE)
  # Pixels are latents here, and come back as they went.
  np.testing.assert_array_equal(output.images[0], image)
  assert output.settings[0]["strength"] == 0


def test_the_less_strength_the_nearer_is_the_image(subject):
  subject = subject.replace(params=jax.tree.map(lambda x: 0.1 * x, subject.params))
  image, ten = photograph(), {"num_inference_steps": 10, "guidance_scale": 1}
  scaled = np.asarray(image_files.from_image(Image.fromarray(image))) * 2
  distances = [
    np.abs(latents_of(subject, image=image, strength=s, **ten)[0] - scaled).mean()
    for s in (0.1, 0.8)
  ]
  assert distances == sorted(distances)
  assert distances[0] < 0.3 * distances[-1]


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s != "dmd"])
def test_a_later_start_of_a_network_that_knows_the_image_ends_at_the_image(sampler):
  schedule, steps = linear_schedule(), 8
  whole = solver_table(sampler, schedule, steps)
  clean = jnp.full(4, 0.7)
  for kept in (1, 2, 5):
    table = later_start(sampler, whole, steps, kept)
    rows = {"heun": 2 * kept - 1, "dpm++-2s": kept + (steps - kept) % 2}
    assert len(table.timesteps) == rows.get(sampler, kept)
    noise = jnp.array([1.0, -1.0, 2.0, 0.0])
    start = table.signal_scale[0] * clean + table.noise_scale[0] * noise
    end = solve(exact(schedule, clean), start, table, lambda _: jnp.zeros(4))
    # These stop where 1 % of noise is left.
    left = 0.05 if sampler in ("dpm++-reference", "sa-solver", "tcd") else 2e-3
    np.testing.assert_allclose(end, clean, rtol=0, atol=left)


@pytest.mark.parametrize("sampler", ["dpm++", "dpm++-sde", "ddim"])
def test_a_later_start_is_the_samplers_own_table_of_these_timesteps(sampler):
  schedule = linear_schedule()
  table = solver_table(sampler, schedule, 8)
  rest = [int(timestep) for timestep in table.timesteps[3:]]
  ours = later_start(sampler, table, 8, 5)
  own = solver_table(sampler, schedule, 5, timesteps=rest)
  for one, other in zip(ours, own, strict=True):
    if one is not None:
      np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


def test_an_image_that_is_edited_is_the_same_alone_and_beside_others(subject):
  images = [photograph(seed=i) for i in range(3)]
  prompts, strengths = ["a", "b", "c", "d"], [0.7, None, 0.7, None]
  arguments = {"image": [*images, None], "strength": strengths}
  masks = [None, right_half(), None, None]
  together = latents_of(subject, prompts, **arguments, mask_image=masks)
  alone = latents_of(subject, "c", image=images[2], strength=0.7, seed=6)
  np.testing.assert_array_equal(alone[0], together[2])
  masked = latents_of(subject, "b", image=images[1], mask_image=masks[1], seed=5)
  np.testing.assert_array_equal(masked[0], together[1])
  plain = latents_of(subject, "d", seed=7)
  np.testing.assert_array_equal(plain[0], together[3])


# --------------------------------------------------------------------------- inpainting


def test_an_empty_mask_is_the_original_to_the_bit(subject):
  image = photograph()
  nothing = np.zeros((8, 8), bool)
  output = subject("a one", image=image, mask_image=nothing, **SAMPLE)
  np.testing.assert_array_equal(output.images[0], image)
  latents = latents_of(subject, image=image, mask_image=nothing)
  scaled = image_files.from_image(Image.fromarray(image)) * 2
  np.testing.assert_array_equal(latents[0], scaled)


@pytest.mark.parametrize(
  "more", [{}, models.EVERYTHING, {"sampler": "euler-ancestral"}]
)
def test_a_full_mask_is_text_to_image(subject, more):
  everything = np.ones((8, 8), bool)
  plain = latents_of(subject, **more)
  ours = latents_of(subject, image=photograph(), mask_image=everything, **more)
  np.testing.assert_array_equal(ours, plain)


@pytest.mark.parametrize(
  ("sampler", "strength"),
  [("dpm++", None), ("dpm++", 0.7), ("unipc", 0.7), ("heun", 0.7), ("lcm", None)],
)
def test_pixels_outside_of_the_mask_are_the_originals(subject, sampler, strength):
  image, mask = photograph(), right_half()
  arguments = {"image": image, "mask_image": mask, "strength": strength}
  drawn, array = (
    subject("a one", **arguments, **SAMPLE, sampler=sampler, output_type=kind).images[0]
    for kind in ("pil", "np")
  )
  np.testing.assert_array_equal(np.asarray(drawn)[~mask], image[~mask])
  np.testing.assert_array_equal(np.round(array * 255)[~mask], image[~mask])
  assert (np.asarray(drawn)[mask] != image[mask]).mean() > 0.9


def test_what_is_drawn_sees_what_stays(subject):
  mask = right_half()
  first, second = (
    latents_of(subject, image=photograph(seed=i), mask_image=mask)[0] for i in (0, 1)
  )
  assert np.abs(first - second)[mask].max() > 1e-2


def test_a_callback_sees_what_stays_under_the_next_steps_noise(subject):
  image, mask, seen = photograph(), right_half(), []
  arguments = {"image": image, "mask_image": mask}
  plain = latents_of(subject, **arguments)
  watched = latents_of(
    subject, **arguments, callback_on_step_end=lambda *known: seen.append(known)
  )
  np.testing.assert_array_equal(watched, plain)
  scaled = image_files.from_image(Image.fromarray(image)) * 2
  table = solver_table("dpm++", linear_schedule(), STEPS)
  noise = np.asarray(jax.random.normal(jax.random.key(4), (8, 8, 3)))
  expected = table.signal_scale[1] * scaled + table.noise_scale[1] * noise
  kept = seen[0][-1]["latents"][0][~mask]
  np.testing.assert_allclose(kept, expected[~mask], rtol=0, atol=1e-5)


def test_two_devices_paint_the_same(subject):
  mesh = sharding.make_mesh(data=2, fsdp=1, context=1, devices=jax.devices()[:2])
  arguments = {"image": photograph(), "mask_image": right_half(), "strength": 0.7}
  regions = [{"prompt": "a blue", "box": (0, 0, 4, 8)}]
  ours = latents_of(subject.replace(mesh=mesh), **arguments, regions=regions)
  plain = latents_of(subject, **arguments, regions=regions)
  np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-4 * np.abs(plain).max())


def test_a_latent_is_drawn_anew_if_any_of_its_pixels_is():
  mask = np.zeros((32, 48), bool)
  mask[9, 20] = True
  source = editing.Source(np.zeros((32, 48, 3), np.uint8), mask)
  at = source.mask_at(editing.Bucket(32, 48), 8)
  assert np.argwhere(at).tolist() == [[1, 2]]
  larger = source.mask_at(editing.Bucket(64, 96), 8)
  assert np.argwhere(larger).tolist() == [[2, 5]]
  smaller = source.mask_at(editing.Bucket(16, 24), 8)
  assert np.argwhere(smaller).tolist() == [[0, 1]]


# -------------------------------------------------------------------------- outpainting


def test_around_an_image_there_is_more_and_inside_it_is_untouched(subject):
  image = photograph()
  output = subject("a one", image=image, outpaint=(2, 0, 6, 4), **SAMPLE)
  drawn = np.asarray(output.images[0])
  assert drawn.shape == (12, 16, 3)
  np.testing.assert_array_equal(drawn[:8, 2:10], image)
  assert drawn[8:].std() > 0
  about = output.settings[0]
  assert (about["height"], about["width"]) == (12, 16)
  assert about["outpaint"] == [2, 0, 6, 4]


def test_margins_of_nothing_are_an_empty_mask(subject):
  image = photograph()
  drawn = subject("a one", image=image, outpaint=(0, 0, 0, 0), **SAMPLE).images[0]
  np.testing.assert_array_equal(drawn, image)


# ------------------------------------------------------------------------------ regions


ALL = (0, 0, 8, 8)


@pytest.mark.parametrize("more", [{}, models.EVERYTHING])
def test_one_region_over_everything_is_the_plain_prompt_to_the_bit(subject, more):
  regions = [{"prompt": "a blue two", "box": ALL}]
  plain = latents_of(subject, "a blue two", **more)
  np.testing.assert_array_equal(latents_of(subject, regions=regions, **more), plain)


@pytest.mark.parametrize(
  ("more", "passes"), [({}, 1), (models.EVERYTHING, 1), (models.EVERYTHING, 2)]
)
def test_regions_of_one_prompt_are_that_prompt(subject, more, passes):
  subject = subject.replace(guidance_passes=passes)
  regions = [
    {"prompt": "a one", "box": (0, 0, 4, 8), "weight": 0.3},
    {"prompt": "a one", "mask": right_half()},
  ]
  ours, plain = (latents_of(subject, regions=r, **more)[0] for r in (regions, None))
  # Programs of other shapes, and sums of shares: float32 over three guided steps.
  np.testing.assert_allclose(ours, plain, rtol=0, atol=3e-4 * np.abs(plain).max())


def test_prompts_of_regions_take_turns_without_guidance_too(subject):
  regions = [{"prompt": "a blue two", "box": (0, 0, 4, 8)}]
  arguments = {"regions": regions, "guidance_scale": 1.0, "output_type": "latent"}
  outputs = [
    subject.replace(guidance_passes=passes)("a one", **SAMPLE, **arguments)
    for passes in (1, 2)
  ]
  assert [output.settings[0]["guidance_passes"] for output in outputs] == [1, 2]
  one, two = (output.images[0] for output in outputs)
  # Programs of other shapes, float32 over three steps.
  np.testing.assert_allclose(one, two, rtol=0, atol=1e-5 * np.abs(one).max())


def test_a_region_without_weight_changes_nothing(subject):
  regions = [{"prompt": "a blue two", "box": (0, 0, 4, 8), "weight": 0}]
  np.testing.assert_array_equal(
    latents_of(subject, regions=regions), latents_of(subject)
  )


def test_predictions_are_averaged_by_the_regions_shares(monkeypatch):
  """A network whose x_0 is what its caption says shows whose share is where."""
  models.use_exact(monkeypatch, lambda inputs: inputs["captions"][:, :1, :1])
  config = models.nano(mlp_ratio=77.0)  # no other network's program
  subject = models.pipeline(config, params={})
  texts = ["a one", "a blue two", "three"]
  embeddings, _ = models.ENCODER.encode(texts, config.caption_length)
  base, left, right = embeddings[:, 0, 0]
  regions = [
    {"prompt": texts[1], "box": (0, 0, 4, 8), "weight": 0.75},
    {"prompt": texts[2], "box": (2, 0, 6, 8)},
  ]
  ours = latents_of(subject, regions=regions, guidance_scale=1)[0]
  columns = [0.25 * base + 0.75 * left] * 2
  columns += [(0.75 * left + right) / 1.75] * 2 + [right] * 2 + [base] * 2
  truth = np.broadcast_to(np.array(columns)[None, :, None], ours.shape)
  np.testing.assert_allclose(ours, truth, rtol=0, atol=1e-4)


def test_a_box_lies_where_it_says_in_an_image_that_is_no_square():
  found = regions.read([{"prompt": "a", "box": (2, 0, 6, 1), "weight": 0.5}], 4, 8)
  weights = regions.weights(found, 4, 8, editing.Bucket(8, 16), 2)
  # Drawn at twice its size, of which a latent takes two: one for each pixel.
  share = np.zeros((4, 8), np.float32)
  share[0, 2:6] = 0.5
  np.testing.assert_array_equal(weights, [1 - share, share])


def test_an_image_with_regions_is_the_same_alone_and_beside_others(subject):
  regions = [{"prompt": "a blue two", "box": (0, 0, 4, 8)}]
  together = latents_of(subject, ["x", "a one", "y"], regions=[None, regions, regions])
  alone = latents_of(subject, "a one", regions=regions, seed=5)
  np.testing.assert_array_equal(alone[0], together[1])
  plain = latents_of(subject, "x")
  np.testing.assert_array_equal(plain[0], together[0])


# ----------------------------------------------------------------- how images are read


def test_images_come_as_files_bytes_images_and_arrays(subject, tmp_path):
  image = Image.fromarray(photograph())
  image.save(tmp_path / "a.png")
  data = (tmp_path / "a.png").read_bytes()
  kinds = [tmp_path / "a.png", str(tmp_path / "a.png"), data, image, np.asarray(image)]
  output = subject(["a"] * len(kinds), image=kinds, strength=0, **SAMPLE)
  for drawn in output.images:
    np.testing.assert_array_equal(drawn, image)
  assert [about.get("image_name") for about in output.settings] == [
    "a.png",
    "a.png",
    None,
    None,
    None,
  ]
  assert len({about["image_digest"] for about in output.settings}) == 1
  json.dumps(output.settings)


def test_images_are_turned_as_exif_says_and_laid_over_white(subject):
  upright = Image.fromarray(photograph(8, 16))
  exif = Image.Exif()
  exif[0x0112] = 6  # turn it by 90 degrees clockwise to see it
  lying = io.BytesIO()
  upright.transpose(Image.Transpose.ROTATE_90).save(lying, "png", exif=exif)
  opened = Image.open(io.BytesIO(lying.getvalue()))
  clear = Image.new("RGBA", (16, 8), (0, 0, 0, 0))
  kinds = [lying.getvalue(), opened, clear]
  images = subject(["a"] * 3, image=kinds, strength=0, **SAMPLE).images
  np.testing.assert_array_equal(images[0], upright)
  np.testing.assert_array_equal(images[1], upright)
  assert np.asarray(images[2]).min() == 255


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (
      {"image": photograph(), "mask_image": right_half(8, 16)},
      "image of prompt 0 has 8 x 8 pixels .* and its mask_image 8 x 16: resize",
    ),
    ({"mask_image": right_half()}, "mask_image is of an image, and prompt 0 has none"),
    ({"outpaint": (1, 1, 1, 1)}, "outpaint is of an image, and prompt 0 has none"),
    ({"strength": 0.5}, "strength=0.5 is of an image, and prompt 0 has none"),
    ({"image": photograph(), "strength": 2}, "strength=2.0 must lie in 0 … 1"),
    (
      {"image": photograph(), "strength": 0.1},
      "strength=0.1 of num_inference_steps=3 is no step: give at least 0.333, or 0",
    ),
    (
      {"image": photograph(), "height": 16},
      "has 8 x 8 pixels .* and 16 x 8 are asked for: leave out height and width",
    ),
    ({"image": photograph(7, 8)}, "7 x 8 pixels .* multiples of 2"),
    ({"image": [photograph()] * 2}, "image has 2 values for 1 prompts"),
    ({"image": photograph() / 255}, "uint8, not ndarray of float64"),
    ({"image": b"no"}, "image cannot be read: not an image"),
    ({"image": photograph(), "outpaint": (1, 1)}, "outpaint must be four whole numb"),
    ({"regions": 3}, "regions must be a list of regions, not 3"),
    ({"regions": [{"prompt": "a"}]}, "Region 0 must have either a box or a mask"),
    ({"regions": [{"text": "a"}]}, "Region 0 must have prompt, box, mask, weight and"),
    (
      {"regions": [{"prompt": "a", "box": (0, 0, 9, 8)}]},
      r"Region 0's box \(0, 0, 9, 8\) .* inside the image, of 8 x 8 pixels",
    ),
    ({"regions": [{"prompt": "a", "box": (4, 0, 4, 8)}]}, "and have an inside"),
    (
      {"regions": [{"prompt": "a", "mask": right_half(4, 4)}]},
      "Region 0's mask has 4 x 4 pixels .* and the image 8 x 8: resize it",
    ),
    (
      {"regions": [{"prompt": "a", "mask": np.zeros((8, 8), bool)}]},
      "Region 0's mask is black all over",
    ),
    (
      {"regions": [{"prompt": "a", "box": ALL, "weight": 2}]},
      "Region 0's weight=2.0 must lie in 0 … 1",
    ),
    ({"regions": [None, None]}, "regions has 2 lists for 1 prompts"),
  ],
)
def test_edits_that_cannot_be_are_refused_before_anything_is_drawn(
  subject, arguments, message
):
  with pytest.raises(ValueError, match=message):
    subject.stream("a", **{**SAMPLE, **arguments})


def test_a_file_that_is_not_there_is_named(subject, tmp_path):
  with pytest.raises(FileNotFoundError, match=r"image: there is no file .*none\.png"):
    subject.stream("a", image=tmp_path / "none.png")
