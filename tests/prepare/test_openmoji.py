"""Preparing OpenMoji's scenes: for a miniature, and at 4096 pixels for stage_4k."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds

from configs import stage_4k
from pixsigma_jax import sharding
from pixsigma_jax.convert import vae
from pixsigma_jax.data import openmoji
from pixsigma_jax.data.mixture import open_mixture
from pixsigma_jax.data.records import open_dataset
from pixsigma_jax.models import tokens
from pixsigma_jax.models.vae import KLAutoencoder, VAEConfig
from pixsigma_jax.prepare import openmoji as module
from pixsigma_jax.prepare.openmoji import Drawing, prepare_openmoji
from pixsigma_jax.prepare.settings import Settings
from pixsigma_jax.train.batches import Batches
from pixsigma_jax.train.config import model_config
from tests import commands
from tests.train import runs

COUNT = 12
DRAWING = Drawing(resolution=64, count=COUNT, seed=5, objects=40)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  directory = tmp_path_factory.mktemp("openmoji") / "64px"
  assert prepare_openmoji(directory, DRAWING, scaling_factor=2.0)
  return directory


def test_every_record_is_a_drawn_scene_with_its_captions_and_license(finished):
  dataset = open_dataset(finished)
  assert len(dataset) == COUNT
  license = dataset.manifest.license
  assert "OpenMoji" in license
  assert "creativecommons.org/licenses/by-sa/4.0" in license
  names = openmoji.names()
  for record, (scene, boxes) in zip(
    dataset.read(range(COUNT)), DRAWING.scenes(), strict=True
  ):
    assert record.license == license
    ways = openmoji.captions(scene)
    assert list(record.captions) == ways["long"] + ways["short"]
    wanted = tuple(names[code] for code in scene.objects)
    assert {openmoji.parse(text)[0] for text in record.captions} == {wanted}
    pixels = openmoji.render(scene, boxes, 64)
    assert record.original_size.tolist() == list(pixels.shape[:2])
    # float16 keeps numbers up to 1 to half of 2^-11.
    np.testing.assert_allclose(
      record.latents, pixels / 127.5 - 1, rtol=0, atol=2**-12 + 1e-6
    )


def test_tfds_reads_each_records_license(finished):
  source = tfds.builder_from_directory(finished).as_data_source("train")
  assert "CC BY-SA 4.0" in source[COUNT - 1]["license"].decode()


def test_the_command_says_the_license_and_leaves_its_dataset_alone(
  tmp_path, capsys, monkeypatch
):
  def prepare(**changes):
    fields = {"resolution": 64, "count": 2, "objects": 30} | changes
    named = [f"--{name}={value}" for name, value in fields.items()]
    arguments = ["--dataset=openmoji", f"--output={tmp_path / 'new'}", *named]
    return commands.run(capsys, monkeypatch, "prepare", *arguments)

  first, again = prepare(), prepare()
  assert (first.code, again.code) == (0, 0)
  assert "holds 2 records" in first.out
  assert "already holds these 2 records" in again.out
  assert "CC BY-SA 4.0" in again.out
  other = prepare(objects=31, pairs=0.0)
  assert (other.code, other.err.count("\n")) == (1, 1)
  assert "of another seed or version" in other.err


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"resolution": 8192}, "resolution 8192 must be at most 4096"),
    ({"resolution": 72}, "must be a multiple of 64"),
    ({"count": 0}, "count 0 must be at least 1"),
    ({"seed": -1}, "seed -1 must not be negative"),
  ],
)
def test_what_cannot_be_drawn_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    Drawing(**{"resolution": 64, "count": 1} | fields)


def test_a_miniature_trains_on_the_drawings_of_three_shapes(finished, tmp_path):
  config = runs.low(
    finished,
    total_steps=2,
    batch_size=2,
    model__base_size=32,
    model__caption_length=32,
    checkpoint__every=2,
  )
  runs.train(config, tmp_path / "run")
  losses = [line["loss"] for line in runs.metrics(tmp_path / "run")]
  assert len(losses) == 2
  assert np.isfinite(losses).all()


def write_frozen(root):
  from tests.prepare import world

  world.write_frozen(root)
  return Settings(frozen=str(root), text_dtype=jnp.float32)


class Averaging(KLAutoencoder):
  """SDXL's shapes at no cost: latents are the means of 8x8 pixels."""

  def moments(self, images):
    b, height, width, _ = images.shape
    blocks = images.reshape(b, height // 8, 8, width // 8, 8, 3).mean(axis=(2, 4))
    mean = np.concatenate([blocks, blocks[..., :1]], axis=-1)
    return mean, np.full_like(mean, -30.0)


AVERAGING = Averaging(
  config=VAEConfig(), params={}, scaling_factor=0.13025, dtype=jnp.float32
)


def test_with_a_vae_and_t5_records_hold_their_moments_and_embeddings(tmp_path):
  settings = write_frozen(tmp_path / "frozen")
  drawing = Drawing(resolution=64, count=1, seed=5)
  devices = jax.devices()[:1]
  directory = tmp_path / "64px"
  assert prepare_openmoji(directory, drawing, settings=settings, devices=devices)
  (record,) = open_dataset(directory).read([0])
  [(scene, boxes)] = drawing.scenes()
  image = openmoji.render(scene, boxes, 64).astype(np.float32) / 127.5 - 1
  autoencoder = vae.load_autoencoder(tmp_path / "frozen" / "vae", dtype=jnp.float32)
  moments = np.concatenate(autoencoder.moments(image[None]), axis=-1)[0]
  # Stored as float16, of numbers up to about 4.
  np.testing.assert_allclose(record.latent_moments, moments, atol=2e-3, rtol=1e-3)
  assert record.caption_embeddings.shape == (record.caption_lengths.sum(), 32)
  assert "OpenMoji" in record.license


def test_records_of_4096_pixels_reach_stage_4ks_step_at_their_real_shape(
  tmp_path, monkeypatch
):
  """Drawn, stored and batched in window-major order, 65,536 tokens an image."""
  monkeypatch.setattr(module.vae, "load_autoencoder", lambda *_, **__: AVERAGING)
  settings = write_frozen(tmp_path / "frozen")
  drawing = Drawing(resolution=4096, count=2, seed=5)
  directory = tmp_path / "4096px"
  assert prepare_openmoji(
    directory, drawing, settings=settings, devices=jax.devices()[:1]
  )

  config = stage_4k.get_config()
  config.batch_size = 2
  config.model.caption_width = 32
  config.data.num_threads = 0
  config = config.to_dict()
  model = model_config(config["model"])
  assert model.base_size == 256
  mixture = open_mixture([directory], weights=(), holdout=0.0, split="train")
  mesh = sharding.make_mesh(data=1, fsdp=1, context=1, devices=jax.devices()[:1])
  batches = Batches(
    mixture, config, model, mesh, None, process_index=0, process_count=1
  )
  batches.start(0)
  batch = batches.next_local()
  batches.close()
  # 4096 pixels are 512 latents, 256 tokens a side.
  assert batch["latent_moments"].shape == (2, 65_536, 2 * 2 * 8)
  assert batch["caption_embeddings"].shape == (2, 300, 32)
  scenes = list(drawing.scenes())
  assert sorted(scene.shape for scene, _ in scenes) == ["square", "tall"]
  for row, number in enumerate(batch["example"].tolist()):
    scene, boxes = scenes[number]
    height, width = openmoji.size(scene.shape, 4096)
    grid = tuple(batch["grid"][row].tolist())
    assert grid == (height // 16, width // 16)
    there = batch["latent_moments"][row, : grid[0] * grid[1]]
    back = tokens.from_tokens(there, grid, model.patch_size, model.window)
    # The mean of 8x8 pixels is what is drawn at an eighth of the size, but for edges.
    small = openmoji.render(scene, boxes, 512) / 127.5 - 1
    assert np.abs(back[..., :3] - small).mean() < 0.01
