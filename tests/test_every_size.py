"""An image of every size goes its whole way, from `curate` to a trained model."""

import numpy as np
from PIL import Image

from pixsigma_jax.data.buckets import BUCKETS
from pixsigma_jax.data.records import open_dataset
from tests import commands
from tests.convert.published import write_t5, write_tokenizer
from tests.convert.published_vae import make_vae
from tests.test_own_images import ROOT
from tests.train import runs

# The smallest sizes that the published VAEs and transformers can take.
SIZES = BUCKETS[256]


def test_four_more_tables_are_that_of_256_scaled():
  for factor in (2, 4, 8, 16):
    scaled = {
      ratio: (factor * height, factor * width)
      for ratio, (height, width) in SIZES.items()
    }
    assert BUCKETS[256 * factor] == scaled


def test_every_size_is_curated_prepared_and_trained_on(tmp_path, capsys, monkeypatch):
  (tmp_path / "photos").mkdir()
  noise = np.random.default_rng(0)
  for number, (ratio, (height, width)) in enumerate(SIZES.items()):
    high = 1.03 * max(height, width * ratio)  # some ratios are not quite their sizes'
    pixels = noise.integers(0, 255, (round(high), round(high / ratio), 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photos" / f"{number:02d}.png")
    (tmp_path / "photos" / f"{number:02d}.txt").write_text("a photo of one house")
  make_vae(channels=(8, 8, 8, 8), norm_groups=4).save_pretrained(
    tmp_path / "frozen" / "vae"
  )
  write_t5(tmp_path / "frozen" / "text_encoder")
  write_tokenizer(tmp_path / "frozen" / "tokenizer")

  def run(*arguments):
    done = commands.run(capsys, monkeypatch, *arguments)
    assert done.code == 0, done.err

  frozen = f"--frozen={tmp_path}/frozen"
  index, photos = tmp_path / "index", tmp_path / "photos"
  run("curate", "scan", index, f"--images={photos}")
  run(
    *("prepare", f"--index={index}", "--resolution=256", frozen),
    f"--output={tmp_path}/data",
    "--text_dtype=float32",
    "--batch_size=1",
  )
  dataset = open_dataset(tmp_path / "data")
  found = {
    dataset[number].id: (8 * height, 8 * width)
    for number, (height, width) in enumerate(dataset.index["latent_size"].tolist())
  }
  assert found == {f"{number:02d}": size for number, size in enumerate(SIZES.values())}

  run(
    *("train", f"--config={ROOT}/configs/own_images.py", f"--workdir={tmp_path}/run"),
    f"--config.data.path={tmp_path}/data",
    "--config.data.num_threads=1",
    "--config.model.variant=Nano/2",
    "--config.model.base_size=16",
    "--config.model.caption_width=32",
    "--config.compute.attention=xla",
    "--config.compute.remat=none",
    "--config.mesh.data=-1",
    "--config.mesh.fsdp=1",
    "--config.total_steps=20",
    "--config.batch_size=8",
    "--config.optimizer.warmup_steps=2",
    "--config.init.parent=",
    "--config.log.every=10",
    "--config.log.prompts=()",
  )
  assert all(np.isfinite(line["loss"]) for line in runs.metrics(tmp_path / "run"))
  run(
    *(
      "sample",
      f"--checkpoint={tmp_path}/run",
      frozen,
      "--prompt=a photo of one house",
    ),
    "--num_inference_steps=1",
    "--dtype=float32",
    f"--output={tmp_path}/pictures",
  )
  with Image.open(tmp_path / "pictures" / "00000.png") as image:
    assert image.size == (256, 256)
