r"""From images to images at every size of every table, by the commands of the docs.

  python -m benchmarks.every_bucket --output=DIR [--resolutions=256,512,…]

For each size of each table an image a little larger is drawn, and the photographs of
scikit-image and scikit-learn come beside them. `curate` reads them, `prepare` makes
records of each resolution with a VAE and a T5 of random weights in their published
formats (few channels: it is about sizes, not about networks), and a transformer of two
layers is trained for 20 steps and draws an image. Above `--encode_up_to` images are
read and cropped, and no more. What is there from an earlier run is gone on with.
"""

import json
import pathlib
import subprocess
import sys
import time

import numpy as np
from absl import flags
from PIL import Image

from pixsigma_jax import command
from pixsigma_jax.data.buckets import BUCKETS
from pixsigma_jax.data.records import open_dataset
from pixsigma_jax.prepare.cropped_images import open_images

_OUTPUT = flags.DEFINE_string("output", None, "Directory for all of it.", required=True)
_RESOLUTIONS = flags.DEFINE_list(
  "resolutions", [str(resolution) for resolution in BUCKETS], "Tables to go through."
)

_ENCODE_UP_TO = flags.DEFINE_integer(
  "encode_up_to", 4096, "The highest resolution whose images the networks see."
)

_CHANNELS, _GROUPS = (8, 8, 8, 8), 4  # of the VAE


def write_networks(folder: pathlib.Path) -> None:
  """vae/, text_encoder/ and tokenizer/ as diffusers and transformers save them."""
  from tests.convert.published import write_t5, write_tokenizer
  from tests.convert.published_vae import make_vae

  make_vae(channels=_CHANNELS, norm_groups=_GROUPS).save_pretrained(folder / "vae")
  write_t5(folder / "text_encoder")
  write_tokenizer(folder / "tokenizer")


def draw_images(folder: pathlib.Path, resolution: int) -> None:
  """An image for each size, of the table's ratio and a little larger; photographs."""
  import skimage.data
  import sklearn.datasets

  folder.mkdir(parents=True)
  draw = np.random.default_rng(resolution)
  for number, (ratio, (height, width)) in enumerate(BUCKETS[resolution].items()):
    small = draw.integers(0, 255, (height // 32, width // 32, 3), np.uint8)
    # Some ratios are not quite those of their sizes: both sides must cover.
    high = 1.03 * max(height, width * ratio)
    size = (round(high / ratio), round(high))
    image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
    image.save(folder / f"{number:02d}.jpg", quality=90)
    (folder / f"{number:02d}.txt").write_text(f"an image of {number}")
  photographs = {
    "astronaut": skimage.data.astronaut(),
    "cat": skimage.data.chelsea(),
    "coffee": skimage.data.coffee(),
    "galaxies": skimage.data.hubble_deep_field(),
    "flower": sklearn.datasets.load_sample_image("flower.jpg"),
    "temple": sklearn.datasets.load_sample_image("china.jpg"),
  }
  for name, pixels in photographs.items():
    Image.fromarray(pixels).save(folder / f"{name}.jpg", quality=90)
    (folder / f"{name}.txt").write_text(f"a photo of one {name}")


def run(*arguments: str) -> float:
  """Runs a command of the package; returns its seconds."""
  print("──", *arguments, flush=True)
  began = time.perf_counter()
  subprocess.run([sys.executable, "-m", *arguments], check=True)
  return time.perf_counter() - began


def main(_: list[str]) -> None:
  """Entry point; flags are parsed."""
  root = pathlib.Path(_OUTPUT.value)
  if not (root / "frozen" / "tokenizer").exists():
    write_networks(root / "frozen")
  results = []
  for resolution in map(int, _RESOLUTIONS.value):
    here = root / str(resolution)
    if not (here / "photos").exists():
      draw_images(here / "photos", resolution)
    encoded = resolution <= _ENCODE_UP_TO.value
    seconds = {
      "scan": run(
        "pixsigma_jax.curate", "scan", f"{here}/index", f"--images={here}/photos"
      ),
      "prepare": run(
        "pixsigma_jax.prepare",
        f"--index={here}/index",
        f"--resolution={resolution}",
        f"--frozen={root}/frozen",
        f"--output={here}/data",
        f"--parts={'pictures,features' if encoded else 'pictures'}",
        "--text_dtype=float32",
        "--batch_size=1",
      ),
    }
    images = open_images(here / "data-pictures")
    own = {
      name: size
      for shard in range(images.num_shards)
      for name, size in zip(images.ids(shard), images.sizes(shard), strict=True)
    }
    if encoded:
      dataset = open_dataset(here / "data")
      own = {
        dataset[number].id: (8 * height, 8 * width)
        for number, (height, width) in enumerate(dataset.index["latent_size"].tolist())
      }
    sizes = list(BUCKETS[resolution].values())
    right = sum(own.get(f"{number:02d}") == size for number, size in enumerate(sizes))
    if encoded:
      seconds["train"] = run(
        "pixsigma_jax.train",
        "--config=configs/own_images.py",
        f"--workdir={here}/run",
        f"--config.data.path={here}/data",
        f"--config.frozen={root}/frozen",
        "--config.model.variant=Nano/2",
        f"--config.model.base_size={resolution // 16}",
        "--config.model.caption_width=32",
        "--config.total_steps=20",
        "--config.batch_size=4",
        "--config.optimizer.warmup_steps=2",
        "--config.init.parent=",
        "--config.data.num_threads=1",
        "--config.log.every=5",
        "--config.log.sample_every=0",
      )
      seconds["sample"] = run(
        "pixsigma_jax.sample",
        f"--checkpoint={here}/run",
        f"--frozen={root}/frozen",
        "--prompt=a photo of one cat",
        "--num_inference_steps=2",
        f"--output={here}/pictures",
      )
    results.append(
      {
        "resolution": resolution,
        "sizes": len(sizes),
        "right": right,
        "records": len(own),
        "seconds": {name: round(value) for name, value in seconds.items()},
      }
    )
    print(json.dumps(results[-1]), flush=True)
  print("resolution  sizes  records  images in their own size  seconds")
  for row in results:
    print(
      f"{row['resolution']:10}{row['sizes']:7}{row['records']:9}{row['right']:26}  "
      + ", ".join(f"{name} {value}" for name, value in row["seconds"].items())
    )


if __name__ == "__main__":
  command.run(main)
