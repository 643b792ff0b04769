"""The way of docs/fine_tuning.md, from photographs to a LoRA and its images."""

import json
import re
import shlex

import jax
import numpy as np
import peft
import torch
from diffusers import PixArtTransformer2DModel
from PIL import Image

from configs import dreambooth
from pixsigma_jax import checkpoint
from pixsigma_jax.convert.pixart import diffusers_config, to_diffusers
from pixsigma_jax.data.mixture import open_mixture
from pixsigma_jax.metadata import Metadata
from pixsigma_jax.models.pixart import PixArtConfig
from tests import commands
from tests.prepare import world
from tests.sample import models
from tests.test_own_images import PHOTOGRAPHS, ROOT

# The page's full size in small, as tests/test_own_images.py has it.
SMALLER = {
  "prepare": [
    "--resolution=64",
    "--table=table.json",
    "--images_per_shard=4",
    "--text_dtype=float32",
  ],
  "train": [
    "--config.model.variant=Nano/2",
    "--config.model.base_size=4",
    "--config.model.caption_width=32",
    "--config.adapter.rank=2",
    "--config.total_steps=4",
    "--config.batch_size=8",
    "--config.optimizer.warmup_steps=1",
    "--config.data.num_threads=1",
    "--config.checkpoint.snapshot_every=2",
    "--config.log.every=2",
    "--config.log.sample_every=4",
  ],
  "sample": ["--num_inference_steps=2", "--dtype=float32"],
}


def page_commands(part):
  """The commands of the page that are ours, in order: the LoRA's, or the rest."""
  text = (ROOT / "docs" / "fine_tuning.md").read_text()
  lora, others = text.split("\n## An adapter of others\n")
  for line in re.findall(
    r"^python -m pixsigma_jax\.(.*)$", {"lora": lora, "rest": others}[part], re.M
  ):
    yield shlex.split(line)


def test_the_page_goes_through_all_rooms_in_order():
  assert [arguments[0] for arguments in page_commands("lora")] == [
    *("curate", "curate", "prepare", "convert", "train", "sample"),
  ]


def test_dreambooths_data_are_what_its_config_reads():
  merge, draw, *scans, of_class, of_subject, train = page_commands("rest")
  assert merge[:2] == ["transform", "merge_lora"]
  config = dreambooth.get_config()
  assert f"--prompt={config.log.prompts[1]}" in draw
  assert f"--checkpoint={config.init.parent}" in draw
  subject, prior = config.data.path.split(",")
  assert f"--output={subject}" in of_subject
  assert f"--output={prior}" in of_class
  for scan, prepare in zip(scans, (of_class, of_subject), strict=True):
    assert f"--index={scan[2]}" in prepare
  images = next(flag for flag in draw if flag.startswith("--output="))
  assert images.replace("output", "images") in scans[0]
  assert config.data.weights == (1.0, 1.0)
  assert train[1:] == [
    "--config=configs/dreambooth.py",
    "--workdir=runs/dreambooth/512px",
  ]


def write_parent(folder, dataset):
  """What stands in for the release: a model of random numbers, of these features."""
  mixture = open_mixture([dataset], weights=(), holdout=0.0, split="train")
  features = mixture.features
  config = PixArtConfig.from_variant(
    "Nano/2", base_size=4, pe_interpolation=1.0, caption_width=32
  )
  checkpoint.save_snapshot(
    folder,
    0,
    params=models.random_params(config),
    null_caption=None,
    metadata=Metadata(
      stage="sigma-512",
      model=config.to_dict(),
      autoencoder=dict(features.autoencoder),
      scaling_factor=features.scaling_factor,
      text_encoder=dict(features.text_encoder),
      resolution=64,
    ),
  )


def test_from_photographs_to_an_adapter(tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "photos").mkdir()
  for name in ("cat", "coffee", "astronaut"):
    image = Image.fromarray(PHOTOGRAPHS[name]())
    image.thumbnail((128, 128))
    image.save(tmp_path / "photos" / f"{name}.png")
    # What the page's loop over the files does.
    (tmp_path / "photos" / f"{name}.txt").write_text("a photo of the red dog\n")
  world.write_frozen(tmp_path / "weights" / "frozen")
  table = ("curate", "buckets", "table.json", "--resolution=64")
  assert commands.run(capsys, monkeypatch, *table).code == 0
  for module, *arguments in page_commands("lora"):
    if module == "convert":  # the weights of the release are not at hand
      write_parent("weights/sigma-512", "runs/lora/data/512px")
      continue
    arguments = [
      argument.replace("--config=configs", f"--config={ROOT / 'configs'}")
      for argument in arguments
    ]
    done = commands.run(
      capsys, monkeypatch, module, *arguments, *SMALLER.get(module, [])
    )
    assert done.code == 0, done.err

  run = tmp_path / "runs" / "lora" / "512px"
  lines = (run / "metrics.jsonl").read_text().splitlines()
  assert np.isfinite([json.loads(line)["loss"] for line in lines]).all()
  with Image.open(run / "samples" / "00000004.png") as image:
    image.load()
  [path] = (tmp_path / "runs" / "lora" / "pictures").glob("*.png")
  with Image.open(path) as image:
    assert image.size == (64, 64)

  parent = checkpoint.read_snapshot("weights/sigma-512")
  for step in (2, 4):
    after = checkpoint.read_snapshot(run / "snapshots" / str(step))
    transformer = PixArtTransformer2DModel.from_config(diffusers_config(parent.config))
    transformer.load_state_dict(as_torch(parent))
    adapted = peft.PeftModel.from_pretrained(transformer, run / "adapters" / str(step))
    have, want = adapted.merge_and_unload().state_dict(), as_torch(after)
    assert have.keys() == want.keys()
    for name, tensor in want.items():
      torch.testing.assert_close(have[name], tensor, rtol=0, atol=1e-6)


def as_torch(snapshot):
  weights = to_diffusers(snapshot.config, jax.device_get(snapshot.params))
  return {name: torch.tensor(array) for name, array in weights.items()}
