"""Preparing OpenMoji's scenes: for a miniature, and at 4096 pixels for stage_4k."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds

from configs import stage_4k
from pixsigma_jax import sharding
from pixsigma_jax.data import openmoji
from pixsigma_jax.data.mixture import open_mixture
from pixsigma_jax.data.records import open_dataset
from pixsigma_jax.models import tokens
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


def write_narrow_frozen(root):
  """A VAE and T5 as PixArt's in everything but their widths."""
  from tests.convert.published import write_t5, write_tokenizer
  from tests.convert.published_vae import make_vae

  make_vae(channels=(4, 4, 4, 4), norm_groups=2).save_pretrained(root / "vae")
  write_t5(root / "text_encoder")
  write_tokenizer(root / "tokenizer")
  return root


def test_records_of_4096_pixels_reach_stage_4ks_step_at_their_real_shape(tmp_path):
  """Drawn, encoded in tiles, stored, batched in window-major order."""
  drawing = Drawing(resolution=4096, count=2, seed=5)
  settings = Settings(
    frozen=str(write_narrow_frozen(tmp_path / "frozen")),
    text_dtype=jnp.float32,
    tile_size=512,
  )
  assert prepare_openmoji(tmp_path / "4096px", drawing, settings=settings)
  shapes = [scene.shape for scene, _ in drawing.scenes()]
  assert sorted(shapes) == ["square", "tall"]

  config = stage_4k.get_config()
  config.batch_size = 2
  config.model.caption_width = 32
  config.data.num_threads = 0
  model = model_config(config.model)
  dataset = open_dataset(tmp_path / "4096px")
  mixture = open_mixture([tmp_path / "4096px"], weights=(), holdout=0.0, split="train")
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
  assert model.base_size == 256
  for row, number in enumerate(batch["example"].tolist()):
    height, width = openmoji.size(shapes[number], 4096)
    grid = tuple(batch["grid"][row].tolist())
    assert grid == (height // 16, width // 16)
    there = batch["latent_moments"][row, : grid[0] * grid[1]]
    back = tokens.from_tokens(there, grid, model.patch_size, model.window)
    np.testing.assert_array_equal(back, dataset[number].latent_moments)
    assert np.std(back[..., :4].astype(np.float32), axis=(0, 1)).min() > 0
