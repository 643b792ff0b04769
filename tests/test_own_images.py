"""The way of docs/own_images.md, from photographs to images, every command of it."""

import json
import pathlib
import re
import shlex

import numpy as np
import pytest
import skimage.data
import sklearn.datasets
from PIL import Image

from pixsigma_jax.data.records import open_dataset
from tests import commands
from tests.prepare import world

ROOT = pathlib.Path(__file__).parents[1]

# Photographs that two packages ship: all in the public domain, CC0 or CC BY.
PHOTOGRAPHS = {
  "astronaut": skimage.data.astronaut,
  "cat": skimage.data.chelsea,
  "coffee": skimage.data.coffee,
  "rocket": skimage.data.rocket,
  "galaxies": skimage.data.hubble_deep_field,
  "temple": lambda: sklearn.datasets.load_sample_image("china.jpg"),
  "flower": lambda: sklearn.datasets.load_sample_image("flower.jpg"),
}
# The page's full size in small: a VAE of few channels, a T5 of two layers, a
# transformer of two, images of 64 pixels.
SMALLER = {
  "filter": ["--min_side=64"],
  "contact-sheet": ["--resolution=64", "--table={folder}/table.json"],
  "prepare": [
    "--resolution=64",
    "--table={folder}/table.json",
    "--images_per_shard=4",
    "--text_dtype=float32",
  ],
  "train": [
    "--config.model.variant=Nano/2",
    "--config.model.base_size=4",
    "--config.model.caption_width=32",
    "--config.total_steps=20",
    "--config.batch_size=8",
    "--config.mesh.fsdp=1",
    "--config.mesh.data=-1",
    "--config.optimizer.warmup_steps=2",
    "--config.init.parent=",
    "--config.data.num_threads=1",
    "--config.log.every=5",
    "--config.log.sample_every=20",
    "--config.log.prompts=('a cat',)",
  ],
  "sample": ["--num_inference_steps=2", "--dtype=float32"],
}


def page_commands():
  """The commands of the page that are ours, in order."""
  text = (ROOT / "docs" / "own_images.md").read_text()
  for line in re.findall(r"^python -m pixsigma_jax\.(.*)$", text, re.MULTILINE):
    yield shlex.split(line)


def test_the_page_goes_through_all_rooms_in_order():
  assert [arguments[0] for arguments in page_commands()] == [
    *["curate"] * 5,
    "prepare",
    "convert",
    "train",
    "sample",
  ]


@pytest.fixture
def folder(tmp_path):
  """photos/, captions.jsonl and weights/frozen/, as the page speaks of them."""
  (tmp_path / "photos" / "more").mkdir(parents=True)
  captions = []
  for i, (name, load) in enumerate(PHOTOGRAPHS.items()):
    image = Image.fromarray(load())
    image.thumbnail((300, 300))
    path = tmp_path / "photos" / ("more" if i % 2 else "") / f"{name}.jpg"
    image.save(path, quality=95)
    captions.append(
      {
        "id": str(path.relative_to(tmp_path / "photos").with_suffix("")),
        "caption_short": f"a {name}",
        "caption_long": f"a photo of one {name} on the left",
      }
    )
  # Generated ones beside them: tall, wide, too small, broken, and a copy.
  noise = np.random.default_rng(0)
  for name, (height, width) in {"tall": (256, 72), "wide": (70, 200)}.items():
    pixels = noise.integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photos" / f"{name}.png")
    (tmp_path / "photos" / f"{name}.txt").write_text(f"a {name} image")
  Image.new("RGB", (20, 20)).save(tmp_path / "photos" / "small.png")
  whole = (tmp_path / "photos" / "astronaut.jpg").read_bytes()
  (tmp_path / "photos" / "broken.jpg").write_bytes(whole[:2000])
  (tmp_path / "photos" / "more" / "copy.jpg").write_bytes(whole)
  text = "".join(json.dumps(line) + "\n" for line in captions)
  (tmp_path / "captions.jsonl").write_text(text)
  world.write_frozen(tmp_path / "weights" / "frozen")
  return tmp_path


def test_from_photographs_to_images(folder, capsys, monkeypatch):
  monkeypatch.chdir(folder)

  def run(*arguments):
    done = commands.run(capsys, monkeypatch, *arguments)
    assert done.code == 0, done.err
    return done

  run("curate", "buckets", "table.json", "--resolution=64")
  sizes = json.loads((folder / "table.json").read_text())
  assert [64, 64] in sizes.values()
  for module, *arguments in page_commands():
    if module == "convert":
      continue  # the weights of the release are not at hand: training starts fresh
    step = arguments[0] if module == "curate" else module
    arguments = [
      argument.replace("--config=configs", f"--config={ROOT / 'configs'}")
      for argument in arguments
    ]
    smaller = [flag.format(folder=folder) for flag in SMALLER.get(step, [])]
    run(module, *arguments, *smaller)

  report = json.loads((folder / "runs/own/index/kept/report.json").read_text())
  assert report["images"] == 12
  assert report["kept"] == 9  # neither the copy nor the small nor the broken one
  dataset = open_dataset(folder / "runs/own/data/512px")
  records = {record.id: record for record in map(dataset.__getitem__, range(9))}
  assert set(records) >= {"astronaut", "more/cat", "tall", "wide"}
  assert records["more/cat"].captions == (
    "a photo of one cat on the left",
    "a cat",
  )
  assert len({record.latent_moments.shape for record in records.values()}) > 3
  lines = (folder / "runs/own/512px/metrics.jsonl").read_text().splitlines()
  losses = [json.loads(line)["loss"] for line in lines]
  assert np.isfinite(losses).all()
  assert json.loads(lines[-1])["step"] == 20
  [path] = (folder / "runs/own/pictures").glob("*.png")
  with Image.open(path) as image:
    assert image.size == (64, 64)
  for sheet in ("sheet.png", "check.png", "512px/samples/00000020.png"):
    with Image.open(folder / "runs/own" / sheet) as image:
      image.load()
