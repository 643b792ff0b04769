"""The whole pipeline beside diffusers' `PixArtSigmaPipeline`, on equal random weights.

Transformer, VAE, T5 and tokenizer are small and in the real formats; ours are converted
and read from the folders that diffusers saved.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
  AutoencoderKL,
  DPMSolverMultistepScheduler,
  PixArtSigmaPAGPipeline,
  PixArtSigmaPipeline,
  PixArtTransformer2DModel,
)
from transformers import AutoTokenizer, T5EncoderModel

from pixsigma_jax import checkpoint, sharding
from pixsigma_jax.convert import files
from pixsigma_jax.diffusion import guidance
from pixsigma_jax.diffusion.solvers import SAMPLERS
from pixsigma_jax.models.layers import Compute
from pixsigma_jax.sample import Pipeline, image_files, program
from pixsigma_jax.sample.encoders import RememberedCaptions
from pixsigma_jax.sample.weighting import WeightedEncoder
from tests import commands
from tests.convert.published import write_t5, write_tokenizer
from tests.convert.published_vae import make_vae
from tests.convert.test_main import write_diffusers
from tests.test_house import ROOT

PROMPTS = ("a red fox in the snow", "two birds above a small house and a tree")
LENGTH = 20
KNOWN = (f"--caption_length={LENGTH}", "--scaling_factor=0.13025")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """transformer/, vae/, text_encoder/ and tokenizer/, as they are published."""
  root = tmp_path_factory.mktemp("published")
  write_diffusers(root / "transformer")
  make_vae().save_pretrained(root / "vae")
  write_t5(root / "text_encoder")
  write_tokenizer(root / "tokenizer")
  return root


@pytest.fixture(scope="module")
def converted(folder, tmp_path_factory):
  """The transformer as a snapshot of ours."""
  with pytest.MonkeyPatch.context() as monkeypatch:
    workdir = tmp_path_factory.mktemp("converted") / "run"

    class Captured:
      def readouterr(self):
        return "", ""

    done = commands.run(
      *(Captured(), monkeypatch, "convert", "--from=diffusers", "--to=orbax"),
      *(folder / "transformer", workdir, *KNOWN),
    )
  assert done.code == 0
  return workdir


@pytest.fixture(scope="module")
def ours(folder, converted):
  return Pipeline.from_checkpoint(
    converted, frozen=folder, compute=Compute(dtype=jnp.float32), batch_size=2
  )


@pytest.fixture(scope="module")
def theirs(folder):
  pipeline = PixArtSigmaPipeline(
    tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
    text_encoder=T5EncoderModel.from_pretrained(folder / "text_encoder"),
    vae=AutoencoderKL.from_pretrained(folder / "vae"),
    transformer=PixArtTransformer2DModel.from_pretrained(folder / "transformer"),
    # The published scheduler's settings.
    scheduler=DPMSolverMultistepScheduler(
      beta_start=1e-4, beta_end=0.02, beta_schedule="linear"
    ),
  )
  pipeline.set_progress_bar_config(disable=True)
  return pipeline


class Spy:
  """An autoencoder that keeps the latents it decodes."""

  def __init__(self, autoencoder):
    self._autoencoder = autoencoder
    self.latents = []

  def __getattr__(self, name):
    return getattr(self._autoencoder, name)

  def decode(self, latents):
    self.latents.append(np.asarray(latents) * self._autoencoder.scaling_factor)
    return self._autoencoder.decode(latents)


def noise(seed, height, width):
  shape = (height // 8, width // 8, 4)
  return np.asarray(jax.random.normal(jax.random.key(seed), shape))


# diffusers' scheduler hands torch tensors to NumPy's functions.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
  ("height", "width", "negative", "cleaning"),
  [
    (64, 64, "", "lower"),
    (64, 96, "a Black CAR, <person> www.example.com", "clean"),
  ],
  ids=["square", "wide, with a negative prompt"],
)
def test_latents_and_images_are_those_of_diffusers(
  ours, theirs, height, width, negative, cleaning
):
  spy = Spy(ours.autoencoder)
  output = ours.replace(autoencoder=spy)(
    PROMPTS,
    negative_prompt=negative,
    height=height,
    width=width,
    seed=3,
    unconditional_mask="own",
    caption_cleaning=cleaning,
  )
  start = np.stack([noise(3 + i, height, width) for i in range(len(PROMPTS))])
  arguments = {
    "prompt": list(PROMPTS),
    "negative_prompt": negative,
    "height": height,
    "width": width,
    "num_inference_steps": 20,
    "guidance_scale": 4.5,
    "latents": torch.tensor(np.moveaxis(start, -1, 1)),
    "clean_caption": cleaning == "clean",
    "use_resolution_binning": False,
    "max_sequence_length": LENGTH,
  }
  latents = theirs(**arguments, output_type="latent").images.numpy()
  # Twenty guided steps multiply what float32 leaves between the two networks.
  scale = np.abs(latents).max()
  difference = np.concatenate(spy.latents) - np.moveaxis(latents, 1, -1)
  assert np.abs(difference).max() < 1e-3 * max(1, scale)

  images = theirs(**arguments).images
  for mine, peer in zip(output.images, images, strict=True):
    levels = np.abs(np.asarray(mine, int) - np.asarray(peer, int))
    assert np.mean(levels.max(axis=-1) <= 1) >= 0.999


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
  ("layers", "guidance_scale"),
  [((0,), 4.5), ((0, 1), 1.0)],
  ids=["beside guidance", "alone, in both layers"],
)
def test_perturbed_attention_guidance_is_that_of_diffusers(
  ours, theirs, layers, guidance_scale
):
  spy = Spy(ours.autoencoder)
  ours.replace(autoencoder=spy)(
    PROMPTS,
    height=64,
    width=64,
    seed=3,
    guidance_scale=guidance_scale,
    pag_scale=3.0,
    pag_applied_layers=layers,
    unconditional_mask="own",
    caption_cleaning="lower",
  )
  start = np.stack([noise(3 + i, 64, 64) for i in range(len(PROMPTS))])
  before = dict(theirs.transformer.attn_processors)
  peer = PixArtSigmaPAGPipeline(
    **theirs.components, pag_applied_layers=[f"blocks.{i}" for i in layers]
  )
  peer.set_progress_bar_config(disable=True)
  latents = peer(
    prompt=list(PROMPTS),
    negative_prompt="",
    height=64,
    width=64,
    num_inference_steps=20,
    guidance_scale=guidance_scale,
    pag_scale=3.0,
    latents=torch.tensor(np.moveaxis(start, -1, 1)),
    clean_caption=False,
    use_resolution_binning=False,
    max_sequence_length=LENGTH,
    output_type="latent",
  ).images.numpy()
  theirs.transformer.set_attn_processor(before)
  scale = np.abs(latents).max()
  difference = np.concatenate(spy.latents) - np.moveaxis(latents, 1, -1)
  assert np.abs(difference).max() < 1e-3 * max(1, scale)


def test_their_default_layer_perturbs_those_eleven_that_the_page_lists(theirs):
  deep = PixArtTransformer2DModel(
    num_attention_heads=1,
    attention_head_dim=8,
    in_channels=4,
    out_channels=8,
    num_layers=28,  # as XL/2
    cross_attention_dim=8,
    sample_size=8,
    caption_channels=32,
    use_additional_conditions=False,
  )
  peer = PixArtSigmaPAGPipeline(**theirs.components | {"transformer": deep})
  peer._set_pag_attn_processor(
    pag_applied_layers=peer.pag_applied_layers, do_classifier_free_guidance=True
  )
  perturbed = [
    i
    for i, block in enumerate(deep.transformer_blocks)
    if "PAG" in type(block.attn1.processor).__name__
  ]
  page = (ROOT / "docs" / "sampling.md").read_text(encoding="utf-8")
  listed = re.findall(r"--pag_applied_layers=([\d,]+)", page)
  assert listed == [",".join(map(str, perturbed))]
  assert len(perturbed) == 11


def test_the_unconditional_masks_differ_and_the_empty_caption_comes_from_t5(ours):
  own, caption = (
    ours(PROMPTS[0], num_inference_steps=2, unconditional_mask=mask).images[0]
    for mask in ("own", "caption")
  )
  assert np.abs(np.asarray(own, int) - np.asarray(caption, int)).max() > 0
  # The official file's null caption is T5's of the empty prompt.
  null_caption = ours.text_encoder.encode([""], LENGTH)[0][0]
  known = ours.replace(null_caption=null_caption)
  again = known(PROMPTS[0], num_inference_steps=2).images[0]
  np.testing.assert_array_equal(again, caption)


def test_remembered_captions_draw_the_same_without_t5(
  ours, folder, converted, tmp_path
):
  remembered = RememberedCaptions.of(ours.text_encoder, PROMPTS, LENGTH)
  remembered.save(tmp_path / "captions.safetensors")
  loaded = RememberedCaptions.load(tmp_path / "captions.safetensors")
  without = Pipeline.from_checkpoint(
    converted,
    frozen=folder,
    text_encoder=loaded,
    compute=Compute(dtype=jnp.float32),
    batch_size=2,
  )
  in_memory = ours.replace(text_encoder=remembered)
  encoded, expected, found = (
    p(PROMPTS, num_inference_steps=2).images for p in (ours, in_memory, without)
  )
  for of_t5, one, other in zip(encoded, expected, found, strict=True):
    np.testing.assert_array_equal(one, other)
    # T5 saw these captions in another batch, whose sums XLA may order otherwise: a
    # number near the middle of two steps of 255 may be rounded to either.
    steps = np.abs(np.asarray(of_t5, np.int16) - np.asarray(other, np.int16))
    assert steps.max() <= 1
    assert np.mean(steps > 0) < 1e-3
  with pytest.raises(
    ValueError, match="'a cat' is not among the 3 that were remembered"
  ):
    without("a cat")


def test_frozen_networks_of_our_own_format_draw_the_same(
  ours, capsys, monkeypatch, folder, converted, tmp_path
):
  def convert(*arguments):
    return commands.run(capsys, monkeypatch, "convert", *arguments)

  own, back = tmp_path / "own", tmp_path / "back"
  own.mkdir()
  (own / "tokenizer").symlink_to(folder / "tokenizer")
  for kind, part in (("vae", "vae"), ("t5", "text_encoder")):
    there = (f"--model={kind}", "--from=diffusers", "--to=orbax")
    again = (f"--model={kind}", "--from=orbax", "--to=diffusers")
    done = convert(*there, folder / part, own / part)
    assert done.code == 0, done.err
    done = convert(*again, own / part, back / part)
    assert done.code == 0, done.err
    first, last = (files.open_weights(root / part) for root in (folder, back))
    assert set(first) == set(last)
    for name in first:
      np.testing.assert_array_equal(first[name], last[name])
    done = convert(*there, folder / part, own / part)
    assert (done.code, "exists already" in done.err) == (1, True)
  done = convert(*again, folder / "text_encoder", tmp_path / "no")
  assert (done.code, "is not of the format 'orbax'" in done.err) == (1, True)

  pipeline = Pipeline.from_checkpoint(
    converted, frozen=own, compute=Compute(dtype=jnp.float32), batch_size=2
  )
  draw = {"num_inference_steps": 2}
  for one, other in zip(
    ours(PROMPTS, **draw).images, pipeline(PROMPTS, **draw).images, strict=True
  ):
    np.testing.assert_array_equal(one, other)


def test_captions_of_another_encoder_are_refused(converted, folder):
  identity = {"name": "t5", "width": 99}
  others = RememberedCaptions(
    identity, [""], np.zeros((1, LENGTH, 99), np.float32), np.ones((1, LENGTH), bool)
  )
  with pytest.raises(ValueError, match=r"'width': 32.* and these are of .*'width': 99"):
    Pipeline.from_checkpoint(converted, frozen=folder, text_encoder=others)


def test_the_command_draws_from_folders(
  capsys, monkeypatch, folder, converted, tmp_path
):
  lines = [
    {"prompt": PROMPTS[0], "seed": 7, "width": 96},
    {"prompt": PROMPTS[1], "negative_prompt": "a dog", "width": 64},
  ]
  (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
  arguments = [
    f"--checkpoint={converted}",
    f"--frozen={folder}",
    "--height=64",
    "--num_inference_steps=2",
    "--sampler=sa-solver",
    "--format=webp",
    f"--prompts_file={tmp_path / 'prompts.jsonl'}",
  ]
  saved = tmp_path / "captions.safetensors"
  done = commands.run(
    *(capsys, monkeypatch, "sample", *arguments),
    *(f"--save_captions={saved}", f"--output={tmp_path / 'first'}"),
  )
  assert done.code == 0, done.err
  about = [
    image_files.settings_of(tmp_path / "first" / f"0000{i}.webp") for i in range(2)
  ]
  assert [(a["seed"], a["width"], a["negative_prompt"]) for a in about] == [
    (7, 96, ""),
    (1, 64, "a dog"),
  ]
  # From the file, with no text encoder anywhere.
  bare = tmp_path / "bare"
  bare.mkdir()
  (bare / "vae").symlink_to(folder / "vae")
  arguments[1] = f"--frozen={bare}"
  done = commands.run(
    *(capsys, monkeypatch, "sample", *arguments),
    *(f"--captions={saved}", f"--output={tmp_path / 'second'}"),
  )
  assert done.code == 0, done.err
  for i in range(2):
    first, second = (tmp_path / f / f"0000{i}.webp" for f in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("missing", ["vae", "text_encoder", "tokenizer"])
def test_a_missing_part_is_named(converted, folder, tmp_path, missing):
  for part in {"vae", "text_encoder", "tokenizer"} - {missing}:
    (tmp_path / part).symlink_to(folder / part)
  with pytest.raises(FileNotFoundError, match=missing):
    Pipeline.from_checkpoint(converted, frozen=tmp_path)


def test_another_vae_is_refused(converted, folder, tmp_path):
  for part in ("text_encoder", "tokenizer"):
    (tmp_path / part).symlink_to(folder / part)
  make_vae(scaling_factor=0.18215).save_pretrained(tmp_path / "vae")
  with pytest.raises(
    ValueError, match=r"scaling_factor 0.18215, and 0.13025 was asked"
  ):
    Pipeline.from_checkpoint(converted, frozen=tmp_path)


def test_a_hub_that_cannot_be_reached_says_what_to_give(converted, monkeypatch):
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  with pytest.raises(
    FileNotFoundError, match="nobody/nothing is neither a folder"
  ) as e:
    Pipeline.from_checkpoint(converted, frozen="nobody/nothing")
  # An argument of a function that nobody here has called.
  assert "local_files_only" not in str(e.value)


def test_the_snapshot_knows_whose_latents_and_captions_it_was_trained_on(converted):
  metadata = checkpoint.read_metadata(converted)
  assert metadata.autoencoder["name"] == "sdxl-vae"
  assert metadata.text_encoder == {"name": "t5", "width": 32}


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name[:5] != "dpm++"])
def test_every_sampler_gives_each_seed_its_image_whatever_the_batch(ours, sampler):
  steps = 1 if sampler == "dmd" else 3
  draw = {"num_inference_steps": steps, "sampler": sampler, "height": 64, "width": 64}
  together = ours(PROMPTS, seed=5, **draw).images
  alone = ours(PROMPTS[1], seed=6, **draw).images[0]
  np.testing.assert_array_equal(together[1], alone)
  assert np.asarray(together[0]).std() > 0


def test_devices_share_a_batch_and_draw_the_same(ours, folder, converted):
  mesh = sharding.make_mesh(data=2, fsdp=1, context=1, devices=jax.devices()[:2])
  shared = Pipeline.from_checkpoint(
    converted,
    frozen=folder,
    compute=Compute(dtype=jnp.float32),
    batch_size=2,
    mesh=mesh,
  )
  draw = {"num_inference_steps": 3, "sampler": "sa-solver"}
  for one, other in zip(
    ours(PROMPTS, **draw).images, shared(PROMPTS, **draw).images, strict=True
  ):
    # Programs of other shapes round differently, by less than a grey level.
    assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
  with pytest.raises(ValueError, match="batch_size 3 cannot be shared by 2 devices"):
    shared.replace(batch_size=3)


def test_sizes_of_the_training_are_drawn_and_fitted_to_what_was_asked(ours):
  # 512 pixels have a table; a model of that name that is small enough to draw here.
  spy = Spy(ours.autoencoder)
  wide = ours.replace(resolution=256, autoencoder=spy, batch_size=1)
  config = wide.config.__class__(**{**vars(wide.config), "base_size": 16})
  wide = wide.replace(config=config)
  image = wide("a fox", height=200, width=390, num_inference_steps=1).images[0]
  assert image.size == (390, 200)
  assert spy.latents[0].shape == (1, 22, 42, 4)  # 176 x 336, nearest to 0.513
  with pytest.raises(ValueError, match=r"390 pixels .* cannot be cut into tokens"):
    wide("a fox", height=200, width=390, use_resolution_binning=False)


def latents_of(pipeline, **settings):
  spy = Spy(pipeline.autoencoder)
  pipeline.replace(autoencoder=spy, batch_size=1)(PROMPTS[0], **settings)
  return spy.latents[0]


def test_guidance_outside_its_interval_is_no_guidance(ours):
  draw = {"num_inference_steps": 3}
  # No timestep of three lies in the last thousandth.
  never = latents_of(ours, guidance_interval=(0, 0.001), **draw)
  without = latents_of(ours, guidance_scale=1, **draw)
  # Two programs, one of them of twice the rows: float32 over three steps.
  np.testing.assert_allclose(never, without, rtol=0, atol=1e-4 * np.abs(without).max())
  always = latents_of(ours, **draw)
  assert np.abs(always - without).max() > 0.1 * np.abs(without).max()


def test_rescaling_takes_back_the_contrast_of_strong_guidance(ours):
  draw = {"num_inference_steps": 3, "guidance_scale": 12.0}
  loud, half, tame = (
    latents_of(ours, guidance_rescale=factor, **draw).std() for factor in (0, 0.5, 1)
  )
  assert loud > half > tame


def test_only_iddpm_guides_three_channels_as_the_official_code(ours, monkeypatch):
  called = []

  def spied(*arguments):
    called.append(arguments[-1])
    return guidance.guide_first_three(*arguments)

  monkeypatch.setattr(program, "guide_first_three", spied)
  for sampler in ("dpm++", "iddpm"):  # in steps that no other test has compiled
    latents_of(ours, sampler=sampler, num_inference_steps=7)
  assert called == [ours.config.in_channels]


def test_noise_on_the_way_is_new_in_every_step_and_of_the_seed_alone(ours, monkeypatch):
  unique = iter(range(31, 40))  # numbers of steps that no other test has compiled

  def fresh(step, seed, pipeline=ours):
    def stand_in(_denoise, _noisy, _table, fresh_noise, memory, _after_step):
      return fresh_noise(jnp.int32(step)), memory

    monkeypatch.setattr(program, "solve_remembering", stand_in)
    return latents_of(
      pipeline, sampler="sa-solver", num_inference_steps=next(unique), seed=seed
    )

  first, second, other = fresh(0, 5), fresh(1, 5), fresh(0, 6)
  start = noise(5, 64, 64)[None]
  for one, another in ((first, second), (first, other), (first, start)):
    # Of 256 independent numbers the correlation is 0.06 in the mean of squares.
    assert abs(np.corrcoef(one.ravel(), another.ravel())[0, 1]) < 0.3
  np.testing.assert_array_equal(first, fresh(0, 5))
  assert abs(first.std() - 1) < 0.2


def test_a_vaes_round_trip_is_strength_0_and_what_a_mask_keeps_is_the_images(ours):
  draw = np.random.default_rng(0)
  image = draw.integers(0, 256, (64, 96, 3)).astype(np.uint8)
  there = ours.autoencoder.encode(image[None].astype(np.float32) / 127.5 - 1)
  truth = image_files.to_image(np.asarray(ours.autoencoder.decode(there)[0]))
  unchanged, vaes = (ours(PROMPTS[0], image=image, strength=0).images[0], truth)
  levels = np.abs(np.asarray(unchanged, int) - np.asarray(vaes, int))
  assert levels.max() <= 1  # scaled and back, which may round to the next level
  mask = np.zeros((64, 96), bool)
  mask[:, 50:] = True
  edit = {"image": image, "mask_image": mask, "num_inference_steps": 3}
  drawn = np.asarray(ours(PROMPTS[0], **edit).images[0])
  np.testing.assert_array_equal(drawn[~mask], image[~mask])
  assert (drawn[mask] != image[mask]).mean() > 0.5


def test_a_weight_moves_the_tokens_of_its_words_alone(ours):
  encoder = WeightedEncoder(ours.text_encoder)
  weighed, plain, empty = (
    encoder.encode([text], LENGTH)[0][0]
    for text in ("a (red fox:1.4) in the snow", PROMPTS[0], "")
  )
  first, last = (ours.text_encoder.count(t) - 1 for t in ("a", "a red fox"))
  moved = np.abs(weighed - plain).max(axis=-1) > 0
  assert np.flatnonzero(moved).tolist() == list(range(first, last))
  truth = empty + np.float32(1.4) * (plain - empty)
  np.testing.assert_allclose(weighed[first:last], truth[first:last], rtol=0, atol=1e-5)
