"""The command `prepare`, from an index to a dataset, as a user types it."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from pixsigma_jax.data.buckets import BUCKETS, Bucket, table_text
from pixsigma_jax.data.records import open_dataset
from pixsigma_jax.prepare import cropped_images
from tests import commands
from tests.prepare import world

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """images/, their index/, frozen/ and table.json."""
  root = tmp_path_factory.mktemp("command")
  world.write_frozen(root / "frozen")
  world.make_index(root / "index", world.make_folder(root / "images"))
  (root / "table.json").write_text(table_text({1.0: Bucket(32, 32)}))
  return root


def arguments(root, output, **changes):
  named = {
    "index": root / "index",
    "table": root / "table.json",
    "frozen": root / "frozen",
    "resolution": 32,
    "output": output,
    "images_per_shard": 2,
    "caption_length": 12,
    "text_dtype": "float32",
    "batch_size": 2,
  } | changes
  return [f"--{name}={value}" for name, value in named.items() if value is not None]


@pytest.fixture
def prepare(root, capsys, monkeypatch):
  device = jax.local_devices()[:1]  # whose programs compile fastest
  monkeypatch.setattr(jax, "local_devices", lambda: device)
  return lambda output, **changes: commands.run(
    capsys, monkeypatch, "prepare", *arguments(root, output, **changes)
  )


def test_an_index_becomes_a_dataset_and_the_same_again_says_so(prepare, tmp_path):
  output, sheet = tmp_path / "512px", tmp_path / "sheet.png"
  done = prepare(output, check=sheet)
  assert done.code == 0, done.err
  lines = done.out.splitlines()
  assert lines[0].startswith(f"{output}-pictures holds the cropped images, 7 but for")
  assert lines[1:3] == [
    f"{output} holds 7 records.",
    "  left out, image: 1 smaller than its size",
  ]
  assert [line[6:12] for line in lines[3:10]] == [" dB  0"] * 7
  assert lines[10].endswith(" dB  in all 7 records that were decoded")
  assert lines[-1] == str(sheet)
  with Image.open(sheet) as image:
    image.load()
  dataset, before = open_dataset(output), world.files_of(output)
  assert len(dataset) == 7
  assert dataset.manifest.crop_rule["buckets"] == [[1.0, 32, 32]]
  again = prepare(output)
  assert again.out.splitlines()[1] == f"{output} already holds these 7 records."
  assert world.files_of(output) == before


def test_the_parts_may_be_done_apart_and_by_several(prepare, root, tmp_path):
  output, cropped = tmp_path / "records", tmp_path / "cropped"
  text = {"captions": "text", "pictures": cropped}
  done = prepare(output, parts="features", **text)
  assert (done.code, f"{cropped} holds no images" in done.err) == (1, True)
  assert "with pictures among --parts" in done.err
  # The image side needs none of the networks.
  done = prepare(output, parts="pictures", frozen=None, **text)
  assert done.code == 0, done.err
  assert not output.exists()
  for index in range(2):
    done = prepare(
      *(output,), parts="features", process_index=index, process_count=2, **text
    )
    assert done.code == 0, done.err
    is_last = index == 1
    assert ("is unfinished: shards of other processes" in done.out) == (not is_last)
    assert (output / "manifest.json").exists() == is_last
  assert len(open_dataset(output)) == 7


def test_official_features_are_read_by_the_same_command(capsys, monkeypatch, tmp_path):
  intern = tmp_path / "data" / "InternData"
  latents = intern / "img_sdxl_vae_features_512resolution_ms_new"
  captions = intern / "caption_features_new"
  for folder in (latents, captions):
    folder.mkdir(parents=True)
  entry = {"path": "0.png", "height": 40, "width": 60, "ratio": 1.5, "prompt": "a cat"}
  (intern / "data_info.json").write_text(json.dumps([entry, entry | {"path": "1.png"}]))
  np.save(latents / "0.npy", np.ones((8, 4, 6), np.float16))
  features = np.ones((1, 5, 3), np.float16)
  mask = np.array([[1, 1, 0, 0, 0]], np.int16)
  np.savez(captions / "0.npz", caption_feature=features, attention_mask=mask)
  np.save(tmp_path / "null.npy", np.zeros((5, 3), np.float32))
  flags = [
    *(f"--official={tmp_path / 'data'}", "--resolution=512"),
    *(f"--output={tmp_path / 'records'}", f"--null_caption={tmp_path / 'null.npy'}"),
  ]
  done = commands.run(capsys, monkeypatch, "prepare", *flags)
  assert done.code == 0, done.err
  assert done.out.splitlines() == [
    f"{tmp_path / 'records'} holds 1 records.",
    "  left out, caption: 1 is empty",
    f"  left out, image: 1 has no features in {latents.name}",
  ]
  done = commands.run(capsys, monkeypatch, "prepare", *flags[:3])
  assert (done.code, "Give --null_caption=FILE" in done.err) == (1, True)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"index": None}, "Give one of --index, --official and --dataset"),
    ({"dataset": "digits"}, "not --index and --dataset"),
    ({"frozen": None}, "Give --frozen=FOLDER"),
    ({"parts": "pictures,check"}, "must be one or more of pictures,features"),
    ({"table": None}, "no published table of sizes for 32 pixels"),
    ({"process_index": 0}, "Give --process_index and --process_count together"),
    ({"index": None, "dataset": "digits"}, "Give --count"),
    ({"index": "nowhere"}, "nowhere is not an index"),
  ],
)
def test_a_mistake_is_one_line(prepare, tmp_path, changes, message):
  done = prepare(tmp_path / "new", **changes)
  assert (done.code, done.err.strip().count("\n")) == (1, 0)
  assert message in done.err
  assert not (tmp_path / "new").exists()


def test_a_table_that_cannot_be_cut_into_tokens_is_refused(prepare, tmp_path):
  (tmp_path / "table.json").write_text(table_text({1.0: Bucket(32, 40)}))
  done = prepare(tmp_path / "new", table=tmp_path / "table.json")
  assert (done.code, "1: 32x40: both sides must be" in done.err) == (1, True)


def test_without_a_table_the_published_one_is_taken(prepare, tmp_path):
  cropped = tmp_path / "pictures"
  done = prepare(
    tmp_path / "records",
    **{"parts": "pictures", "pictures": cropped, "table": None, "resolution": 256},
    allow_upscaling=True,
  )
  assert done.code == 0, done.err
  rule = cropped_images.open_images(cropped).crop_rule
  assert rule["buckets"] == [[k, *size] for k, size in BUCKETS[256].items()]


def run(root, output, **changes):
  """The command in a process of its own, which compiles what none has before."""
  environment = os.environ | {
    "JAX_COMPILATION_CACHE_DIR": str(root / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PLATFORMS": "cpu",
  }
  return subprocess.Popen(
    [
      *(sys.executable, "-m", "pixsigma_jax.prepare"),
      *arguments(root, output, captions="text", **changes),
    ],
    cwd=ROOT,
    env=environment,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.slow
def test_killed_outright_the_same_command_finishes_to_the_same_bytes(root, tmp_path):
  whole = run(root, tmp_path / "whole")
  assert whole.wait() == 0, whole.stderr.read()
  output = tmp_path / "killed"
  for number in range(2):  # with the first shards of images, then of records
    kind = ("killed-pictures/pictures-00000.json", "killed/*-00000.array_record")[
      number
    ]
    process = run(root, output)
    while process.poll() is None and not list(tmp_path.glob(kind)):
      time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
  last = run(root, output)
  assert last.wait() == 0, last.stderr.read()
  assert world.files_of(output) == world.files_of(tmp_path / "whole")
  for process in (whole, last):
    process.stderr.close()
