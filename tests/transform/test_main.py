"""`python -m pixsigma_jax.transform`: from snapshot to snapshot, or only the report."""

import inspect
import re

import jax
import numpy as np
import pytest

from pixsigma_jax import checkpoint
from pixsigma_jax.convert.lora import write_lora
from pixsigma_jax.models.kv_compression import KVCompression
from pixsigma_jax.transforms import TRANSFORMS, lora
from pixsigma_jax.transforms.lora import Lora
from tests import commands
from tests.sample import models

PLAIN = models.nano(kv_compression=KVCompression())
FIRST = ({"stage": "first", "parent": None},)


@pytest.fixture
def transform(capsys, monkeypatch):
  return lambda *arguments: commands.run(capsys, monkeypatch, "transform", *arguments)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """A snapshot of Nano/2 without compression, at step 7."""
  return write(tmp_path_factory.mktemp("runs") / "low")


def write(workdir, config=PLAIN, seed=0, step=7, **fields):
  checkpoint.save_snapshot(
    workdir,
    step,
    params=models.random_params(config, seed),
    null_caption=models.null_caption(config),
    metadata=models.metadata(config, **{"provenance": FIRST, **fields}),
  )
  return workdir


def files(folder):
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob("*")
    if path.is_file()
  }


def assert_equal(found, expected):
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_snapshot_is_transformed_and_says_from_what_and_how(
  transform, source, tmp_path
):
  before, target = files(source), tmp_path / "high"
  done = transform("interpolate_pe", source, target, "--base_size=8")
  assert done.code == 0, done.err
  assert done.out.splitlines() == [
    "config.base_size: 4 → 8",
    "config.pe_interpolation: 1.0 → 2.0",
    "metadata.resolution: 8 → 16",
    "30 leaves: 30 shared, 0 copied as they were, 0 others; "
    "109,416 → 109,416 parameters",
    str(target),
  ]
  assert files(source) == before

  parent, child = checkpoint.read_snapshot(source), checkpoint.read_snapshot(target)
  assert (child.step, child.metadata.stage) == (0, "high")
  assert (child.config.base_size, child.config.pe_interpolation) == (8, 2.0)
  assert child.metadata.resolution == 16
  assert_equal(child.params, parent.params)
  np.testing.assert_array_equal(child.null_caption, parent.null_caption)
  assert child.metadata.provenance == (
    *FIRST,
    {
      "stage": "high",
      "parent": {
        "path": str(source / "snapshots" / "7"),
        "stage": "test",
        "step": 7,
      },
      "transforms": [{"name": "interpolate_pe", "base_size": 8}],
    },
  )


def test_compression_comes_and_goes_and_the_report_shows_the_blocks_regrouped(
  transform, source, tmp_path
):
  there, back = tmp_path / "there", tmp_path / "back"
  done = transform(
    *("add_kv_compression", source, there, "--ratio=4", "--layers=1-1", "--nonorm")
  )
  assert done.code == 0, done.err
  lines = done.out.splitlines()
  assert "config.kv_compression.layers: [] → [1]" in lines
  assert (
    "= blocks_00_01 → blocks_00_00, blocks_01_01: 15 leaves regrouped, "
    "every layer as it was" in lines
  )
  kernel = "blocks_01_01/attention/kv_compressor/kernel"
  # 2·2·48 quarters: √(192 / 16) is their norm.
  assert f"+ {kernel} float32[1, 2, 2, 48], norm 3.464" in lines
  assert not [line for line in lines if line.startswith(("-", "~"))]
  last = checkpoint.read_metadata(there).provenance[-1]
  assert last["transforms"] == [
    {
      "name": "add_kv_compression",
      **{"ratio": 4, "layers": [1], "operator": "conv", "norm": False},
      **{"initialization": "average", "seed": 0},
    }
  ]

  done = transform("remove_kv_compression", there, back)
  assert done.code == 0, done.err
  assert f"- {kernel} float32[1, 2, 2, 48]" in done.out
  parent, child = checkpoint.read_snapshot(source), checkpoint.read_snapshot(back)
  assert child.config == parent.config
  assert_equal(child.params, parent.params)
  stages = [entry["stage"] for entry in child.metadata.provenance]
  assert stages == ["first", "there", "back"]


def test_a_dry_run_prints_every_change_and_writes_nothing(transform, source, tmp_path):
  arguments = ("--scaling_factor=0.5", "--old_scaling_factor=2.0", "--dry_run")
  moments = ("--old_mean=0,0,0", "--old_std=1,1,1", "--new_mean=0,0,0")
  target, before = tmp_path / "target", files(source)
  done = transform("swap_vae", source, target, *arguments, *moments, "--new_std=2,2,2")
  assert done.code == 0, done.err
  lines = done.out.splitlines()
  assert lines[0] == "metadata.scaling_factor: 2.0 → 0.5"
  # Twice as large: the change is as long as what was there.
  embedding = next(x for x in lines if x.startswith("~ patch_embedding/kernel"))
  found = re.fullmatch(
    r".* float32\[2, 2, 3, 48\], norm (\S+) changed by (\S+)", embedding
  )
  assert found
  assert found[1] == found[2]
  assert [line.split(" ")[1] for line in lines if line.startswith("~")] == [
    *("out/bias", "out/kernel", "patch_embedding/kernel")
  ]
  assert lines[-1].startswith("30 leaves: 27 shared, 0 copied as they were, 3 others")
  assert not target.exists()
  assert files(source) == before


def test_a_dry_run_shows_new_channels_as_another_shape(transform, source, tmp_path):
  identity = '--autoencoder={"name": "wide", "latent_channels": 5, "downsampling": 4}'
  done = transform(
    *("swap_vae", source, tmp_path / "no", "--scaling_factor=2", "--channels=5"),
    *(identity, "--dry_run"),
  )
  assert done.code == 0, done.err
  assert "config.in_channels: 3 → 5" in done.out
  assert "metadata.autoencoder.name: 'pixels' → 'wide'" in done.out
  assert "metadata.resolution: 8 → 32" in done.out
  assert re.search(
    r"~ patch_embedding/kernel float32\[2, 2, 3, 48\] → \[2, 2, 5, 48\], "
    r"norm (\S+) → \1\n",
    done.out,
  )


def test_a_sigma_is_made_of_an_alpha(transform, tmp_path):
  config = models.nano(size_conditions=True, kv_compression=KVCompression())
  alpha = write(tmp_path / "alpha", config)
  done = transform(
    *("alpha_to_sigma", alpha, tmp_path / "sigma", "--fold_size=8,8"),
    *("--caption_length=12", "--scaling_factor=0.25"),
  )
  assert done.code == 0, done.err
  assert 'null caption: dropped; it is what the text encoder makes of ""' in done.out
  assert "- size_conditions/size/in/kernel float32[256, 16]" in done.out
  assert "~ timestep_embedding/out/bias float32[48], norm " in done.out
  sigma = checkpoint.read_snapshot(tmp_path / "sigma")
  assert sigma.null_caption is None
  assert sigma.metadata.scaling_factor == 0.25
  assert sigma.config.caption_length == 12
  assert sigma.metadata.provenance[-1]["transforms"][0]["fold_size"] == [8, 8]


def test_snapshots_are_averaged_and_named_by_their_steps(transform, source, tmp_path):
  write(tmp_path / "run", seed=1, step=3)
  other = write(tmp_path / "run", seed=2, step=5)
  done = transform(
    *("average", source, tmp_path / "mean", "--weights=0.25,0.75"),
    f"--others={other}",
  )
  assert done.code == 0, done.err
  found = checkpoint.read_snapshot(tmp_path / "mean")
  first, second = (checkpoint.read_snapshot(path).params for path in (source, other))
  jax.tree.map(
    # Two ways to round a mean in float32.
    lambda a, b, c: np.testing.assert_allclose(a, b / 4 + c * 0.75, atol=1e-6),
    *(jax.tree.map(np.asarray, tree) for tree in (found.params, first, second)),
  )
  assert found.metadata.provenance[-1]["transforms"] == [
    {
      "name": "average",
      "others": [str(other / "snapshots" / "5")],
      "weights": [0.25, 0.75],
    }
  ]


def test_given_again_it_does_nothing_and_interrupted_it_begins_again(
  transform, source, tmp_path
):
  target = tmp_path / "high"
  # As Orbax leaves it when it is killed.
  (target / "snapshots" / "0.orbax-checkpoint-tmp").mkdir(parents=True)
  command = ("interpolate_pe", source, target, "--base_size=8")
  assert transform(*command).code == 0
  before = files(target)
  done = transform(*command)
  assert done.code == 0, done.err
  assert done.out.splitlines()[-1] == f"{target} has been written already."
  assert files(target) == before

  done = transform("interpolate_pe", source, target, "--base_size=12")
  assert done.code == 1
  assert "high holds another model, and is left as it is" in done.err
  assert files(target) == before


def test_a_folder_of_others_is_left_alone_and_nothing_is_read_before(
  transform, tmp_path
):
  (tmp_path / "photo.png").touch()
  done = transform("remove_kv_compression", tmp_path / "no", tmp_path)
  assert done.code == 1
  assert "exists already and is left as it is" in done.err
  assert list(files(tmp_path)) == ["photo.png"]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("swap",), "Unknown transform 'swap' (choose from interpolate_pe, "),
    (("extend_pe",), "argument: 'base_size'. Its arguments are base_size."),
    (("extend_pe", "--base_size=8", "--ratio=4"), "'ratio'. Its arguments are base_"),
    (("add_kv_compression", "--ratio=4", "--layers=1-x"), "'1-x' is neither a number"),
    (("average", "--others=a,b", "--weights=1,x"), "--weights=1,x: could not convert"),
    (
      ("swap_vae", "--scaling_factor=1", "--autoencoder={"),
      "--autoencoder is not JSON: ",
    ),
    (
      ("swap_vae", "--scaling_factor=1", "--autoencoder=[1]"),
      "--autoencoder=[1] must be an object",
    ),
    (("remove_kv_compression",), "does not compress keys and values"),
    (("grow_depth", "--depth=2"), "depth=2 must be above the 2 blocks"),
    (("extend_pe", "--base_size=0"), "base_size 0 must be at least 1"),
  ],
)
def test_a_mistake_is_told_in_a_line_and_leaves_nothing(
  transform, source, tmp_path, arguments, message
):
  name, *given = arguments
  done = transform(name, source, tmp_path / "new", *given)
  assert done.code == 1
  assert message in done.err
  assert "Traceback" not in done.err
  assert not (tmp_path / "new").exists()


def test_a_deeper_model_says_in_its_provenance_which_blocks_are_copies(
  transform, source, tmp_path
):
  target = tmp_path / "deep"
  done = transform("grow_depth", source, target, "--depth=3", "--layers=1")
  assert done.code == 0, done.err
  assert "config.depth: 2 → 3" in done.out.splitlines()
  child = checkpoint.read_snapshot(target)
  assert child.config.depth == 3
  assert child.metadata.provenance[-1]["transforms"] == [
    {"name": "grow_depth", "depth": 3, "layers": [1]}
  ]


def test_a_source_that_is_none_is_named(transform, tmp_path):
  done = transform("extend_pe", tmp_path / "no", tmp_path / "new", "--base_size=8")
  assert done.code == 1
  assert f"There is no checkpoint at {tmp_path / 'no'}" in done.err


def test_every_argument_of_every_transform_has_its_flag_and_no_other_does(transform):
  done = transform("--help")
  found = set(re.findall(r"^ +--(?:\[no\])?(\w+):", done.out, re.MULTILINE))
  arguments = {
    name
    for function in TRANSFORMS.values()
    for name in list(inspect.signature(function).parameters)[2:]
  }
  arguments -= {"stored"}  # snapshots say it themselves
  assert found - {"traceback"} == arguments | {"dry_run"}


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_is_merged_by_its_path_and_taken_out_again(
  transform, source, tmp_path, monkeypatch, dora
):
  monkeypatch.chdir(tmp_path)
  before = checkpoint.read_snapshot(source)
  spec = Lora(rank=2, alpha=4.0, targets=("mlp/",), dora=dora)
  adapter = jax.tree.map(
    lambda leaf: np.asarray(leaf) + np.float32(0.1),
    spec.init(before.params, jax.random.key(0)),
  )
  write_lora(tmp_path / "lora", PLAIN, adapter, spec)

  done = transform("merge_lora", source, "merged", "--adapter=lora", "--scale=0.5")
  assert done.code == 0, done.err
  assert "30 leaves: 28 shared, 0 copied as they were, 2 others" in done.out
  merged = checkpoint.read_snapshot("merged")
  assert_equal(merged.params, lora.merged(before.params, adapter, 0.5 * 4 / 2))
  [entry] = merged.metadata.provenance[1:]
  path = str(tmp_path / "lora")
  assert entry["transforms"] == [{"name": "merge_lora", "adapter": path, "scale": 0.5}]

  done = transform("unmerge_lora", "merged", "back", "--adapter=lora", "--scale=0.5")
  if dora:
    assert done.code == 1
    assert "A DoRA adapter cannot be taken out again" in done.err
    assert not (tmp_path / "back").exists()
    return
  assert done.code == 0, done.err
  back = checkpoint.read_snapshot("back")
  jax.tree.map(
    # Two roundings of numbers below two.
    lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=5e-7),
    *(back.params, before.params),
  )
  assert len(back.metadata.provenance) == 3
