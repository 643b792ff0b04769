"""Comparisons of trained models: what runs, is measured, and is taken for what."""

import ast
import dataclasses
import functools
import importlib
import json
import pathlib
import re
import shlex
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from pixsigma_jax import checkpoint, sharding
from pixsigma_jax.data import digits
from pixsigma_jax.data.records import open_dataset
from pixsigma_jax.metadata import Metadata
from pixsigma_jax.models.pixart import abstract_params, init_params
from pixsigma_jax.reproduce import (
  autoencoder,
  experiment,
  figure8a,
  full_size,
  measures,
  registry,
  result,
  stages,
)
from pixsigma_jax.reproduce.experiment import Experiment, Point
from pixsigma_jax.reproduce.miniature import BUDGETS, Compression, Miniature, Variant
from pixsigma_jax.reproduce.study import Claim, compared, judged
from pixsigma_jax.sample import image_files
from pixsigma_jax.train import compatibility
from pixsigma_jax.train.config import complete, model_config
from pixsigma_jax.transforms import TRANSFORMS
from tests import commands
from tests.test_configs import abstractly

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
# Pages of other commands lie there, too.
PAGES = [
  path
  for path in sorted(RESULTS.glob("*.json"))
  if path.stem in registry.REPRODUCTIONS or "reproduces" in json.loads(path.read_text())
]
SMOKE = BUDGETS["smoke"]
TRAINED = [name for name, found in registry.REPRODUCTIONS.items() if found.trains]
STUDIES = {
  name: importlib.import_module(f"pixsigma_jax.reproduce.{name}").STUDY
  for name in TRAINED
  if name != "figure8a"
}


@pytest.fixture
def reproduce(capsys, monkeypatch):
  return lambda *arguments: commands.run(capsys, monkeypatch, "reproduce", *arguments)


def real_images(snapshot, *, pixels, per_task, sampling_steps, frozen=None):
  """Real digits in the place of drawn ones."""
  del snapshot, sampling_steps, frozen
  draw = np.random.default_rng(7)
  prompts = measures.prompts_of(per_task)
  images = []
  for prompt in prompts:
    glyphs = [
      int(draw.choice(digits.handwriting("training", item.digit)))
      for item in prompt.scene.items
    ]
    image = digits.render(prompt.scene, glyphs, pixels)
    images.append(image_files.to_image(image))
  return measures.Drawn(images, prompts)


class Untrained:
  """In the place of the trainer: the parent through the transforms, and no step."""

  def __init__(self):
    self.begun = []

  def __call__(self, config, workdir):
    self.begun.append(workdir.name)
    compatibility.check_config(config)
    config = complete(config)
    model = model_config(config["model"])
    if parent := config["init"]["parent"]:
      read = checkpoint.read_snapshot(parent)
      mesh = sharding.make_mesh(data=1, fsdp=1, context=1, devices=jax.devices()[:1])
      transforms = config["init"]["transforms"]
      found = compatibility.transformed(read, transforms, model, mesh)
      params, metadata, null_caption = found.params, found.metadata, found.null_caption
    else:
      params = init_params(model, jax.random.key(config["seed"]))
      features = open_dataset(config["data"]["path"]).manifest
      metadata = Metadata(
        stage=config["stage"],
        model=json.loads(json.dumps(model.to_dict())),
        autoencoder=dict(features.autoencoder),
        scaling_factor=features.scaling_factor,
        text_encoder=dict(features.text_encoder),
        resolution=features.resolution,
        provenance=(),
      )
      null_caption = np.zeros((model.caption_length, model.caption_width), np.float32)
    every = config["checkpoint"]["snapshot_every"] or config["total_steps"]
    checkpoint.save_snapshot(
      workdir, 0, params=params, null_caption=null_caption, metadata=metadata
    )
    for step in range(every, config["total_steps"] + 1, every):
      first = workdir / checkpoint.SNAPSHOTS / "0"
      shutil.copytree(first, first.with_name(str(step)))
    (workdir / "metrics.jsonl").write_text('{"step": 1, "step_time": 0.5}\n')


@pytest.fixture
def untrained(monkeypatch):
  """Nothing is trained, and what is drawn is real; all else is as it is."""
  trainer = Untrained()
  monkeypatch.setattr(experiment.loop, "train", trainer)
  monkeypatch.setattr(measures, "draw", real_images)
  loss = {"loss": 0.5, "decile_loss": [0.5] * 9 + [None]}
  monkeypatch.setattr(measures, "held_out_loss", lambda *_, **__: loss)
  return trainer


def test_each_table_is_made_of_its_runs_which_are_shared_and_never_made_again(
  tmp_path, reproduce, untrained
):
  for name in STUDIES:
    done = reproduce(name, "--budget=smoke", f"--output={tmp_path}")
    assert done.code == 0, done.err
    content = json.loads((tmp_path / f"{name}_smoke.json").read_text())
    assert (tmp_path / f"{name}_smoke.md").read_text() == result.page(content)
    assert content["data"]["budget"]["name"] == "smoke"
    labels = {row["model"] for row in content["data"]["measured"]}
    assert labels == {row.label for row in STUDIES[name].rows}
    comes_from_its_measurements(STUDIES[name], content)
    plotted = (tmp_path / f"{name}_smoke.png").exists()
    assert plotted == (name in ("figure8b", "figure8c"))
  made = list(untrained.begun)
  assert len(set(made)) == len(made)  # parents are common to all tables
  again = reproduce("figure8c", "--budget=smoke", f"--output={tmp_path}")
  assert (again.code, untrained.begun) == (0, made)


def comes_from_its_measurements(study, content):
  """Whether each number and verdict of a page follows from what was measured."""
  rows = {
    (row["model"], row["step"]): row["seeds"] for row in content["data"]["measured"]
  }
  made = json.loads(json.dumps([dataclasses.asdict(t) for t in study.tables(rows)]))
  assert content["tables"][: len(made)] == made


def test_no_page_of_results_was_written_by_hand():
  assert {path.stem for path in RESULTS.glob("*.md")} <= {path.stem for path in PAGES}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_published_page_of_trained_models_is_what_was_measured(path):
  content = json.loads(path.read_text())
  assert content["reproduces"] == path.stem
  assert path.with_suffix(".md").read_text() == result.page(content)
  if content["plot"] is not None:
    assert (RESULTS / content["plot"]).exists()
  if path.stem not in TRAINED:
    return
  own = content["data"]["budget"]
  assert own == {"name": "laptop", **dataclasses.asdict(BUDGETS["laptop"])}
  assert all(len(row["seeds"]) >= 3 for row in content["data"]["measured"])
  study = STUDIES.get(path.stem)
  if study is None:
    names = dict.fromkeys(("first", "second"), "")
    study = figure8a.study(names, {}, BUDGETS["laptop"])
  comes_from_its_measurements(study, content)


@pytest.mark.parametrize("name", ["README.md", "docs/reproduce.md"])
def test_what_pages_say_of_a_published_table_stands_in_it(name):
  """Each `mean [lowest, highest]` of a row stands in the table that the row links."""
  rows = [
    (links, figures)
    for line in (ROOT / name).read_text().splitlines()
    if (links := re.findall(r"results/(\w+)\.md", line))
    and (figures := re.findall(r"[\d.]+ \[[\d.]+, [\d.]+\]", line))
  ]
  assert len(rows) >= 3
  for links, figures in rows:
    tables = "".join((RESULTS / f"{link}.md").read_text() for link in links)
    assert [figure for figure in figures if figure not in tables] == []


def test_a_swap_of_autoencoders_is_between_two_that_are_trained_for_it(
  tmp_path, reproduce, untrained
):
  done = reproduce("figure8a", "--budget=smoke", f"--output={tmp_path}")
  assert done.code == 0, done.err
  content = json.loads((tmp_path / "figure8a_smoke.json").read_text())
  assert (tmp_path / "figure8a_smoke.md").read_text() == result.page(content)
  quality = content["data"]["autoencoders"]
  assert quality["bytes"] == SMOKE.side**2 // 4**2 * 4
  assert {kind for own in quality["psnr"].values() for kind in own} == {
    "photographs",
    "digits",
  }
  # Two steps are something.
  for which in ("first", "second"):
    trained, before = (quality["psnr"][f"{which}{s}"] for s in ("", ", untrained"))
    assert trained["photographs"] > before["photographs"]
  folders = [*(tmp_path / "smoke" / "autoencoders").iterdir()]
  first, second = (autoencoder.Trained.read(folder) for folder in sorted(folders))
  assert first.autoencoder.scaling_factor != second.autoencoder.scaling_factor
  [runs] = [tmp_path / "smoke" / "runs"]
  [swapped] = runs.glob("swapped_seed0_*")
  metadata = checkpoint.read_metadata(swapped / "snapshots" / "0")
  assert metadata.scaling_factor == second.autoencoder.scaling_factor
  made = list(untrained.begun)
  again = reproduce("figure8a", "--budget=smoke", f"--output={tmp_path}")
  assert (again.code, untrained.begun) == (0, made)


def test_the_psnr_of_images_that_differ_by_a_level_is_twenty_log_255():
  draw = np.random.default_rng(0)
  pixels = draw.integers(0, 255, (8, 8, 3), dtype=np.uint8)
  a, b = Image.fromarray(pixels), Image.fromarray(pixels + np.uint8(1))
  assert autoencoder.psnr(a, b) == pytest.approx(20 * np.log10(255), abs=1e-9)


def test_a_jpeg_of_fewer_bytes_is_further_away_and_one_of_none_is_refused():
  image = autoencoder.held_out_images(64)["photographs"][0]
  distances = [autoencoder.psnr(image, autoencoder.jpeg(image, n)) for n in (900, 3000)]
  assert 10 < distances[0] < distances[1]
  with pytest.raises(ValueError, match="No JPEG of 64 x 64 has 10 bytes"):
    autoencoder.jpeg(image, 10)


def test_photographs_that_are_held_out_are_not_trained_on():
  both = [autoencoder.photographs(split) for split in ("training", "held_out")]
  training, held_out = ({photo.tobytes() for photo in photos} for photos in both)
  assert len(training) > len(held_out) > 1
  assert training.isdisjoint(held_out)


@pytest.mark.parametrize("budget", full_size.BUDGETS)
def test_commands_for_a_full_size_swap_are_of_a_config_that_train_takes(budget):
  found = figure8a.run(registry.Options(budget=budget))
  for line in found.data["commands"]:
    _, training, _ = line.split("; ")
    compatibility.check_config(config_of(shlex.split(training.removeprefix("do "))))


def test_a_kill_loses_one_piece(tmp_path, untrained, monkeypatch):
  options = registry.Options(budget="smoke", output=str(tmp_path))
  whole = STUDIES["table3a"]
  pieces = []

  def counted(*arguments, **fields):
    if len(pieces) == 2:
      raise KeyboardInterrupt
    pieces.append(arguments[0])
    return real_images(*arguments, **fields)

  with monkeypatch.context() as patch:
    patch.setattr(measures, "draw", counted)
    with pytest.raises(KeyboardInterrupt):
      whole.run(options)
  begun = list(untrained.begun)
  found = whole.run(options)
  assert untrained.begun[: len(begun)] == begun
  assert len(set(untrained.begun)) == len(untrained.begun)
  assert len(list((tmp_path / "smoke" / "measured").glob("*.json"))) == len(whole.rows)
  assert len(found.data["measured"]) == len(whole.rows)


def test_a_model_is_trained_and_measured_and_then_remembered(tmp_path, monkeypatch):
  point = Point(Miniature(SMOKE).low(0), SMOKE.low_steps)
  where = Experiment(tmp_path, SMOKE)
  before = where.estimate([point])
  [found] = where.measure([point])
  figures = [found["distance"], found["loss"], found["step_seconds"]]
  assert np.isfinite(figures).all()
  assert min(figures) > 0
  assert len(found["decile_loss"]) == 10
  assert set(found["accuracy"]) == {*digits.TASKS, "pairs", "seen", "unseen"}
  assert where.samples(point).size == (8 + 16 + 8 + 4, 16)
  monkeypatch.setattr(experiment.loop, "train", None)  # nothing is left to do
  monkeypatch.setattr(measures, "draw", None)
  assert Experiment(tmp_path, SMOKE).measure([point]) == [found]
  assert where.estimate([point]) == 0 < before


def test_real_digits_follow_their_prompts_and_are_as_near_to_real_ones_as_the_floor():
  drawn = real_images(None, pixels=16, per_task=10, sampling_steps=0)
  assert measures.accuracies(drawn)["pairs"] > 90
  prompts = measures.prompts_of(10)
  distance = measures.Distances(16, prompts, taught=10, epochs=60)
  assert distance.accuracy > 60  # of 70 classes
  noise = np.random.default_rng(0)
  noisy = [
    image_files.to_image(noise.uniform(-1, 1, (i.height, i.width, 3)))
    for i in drawn.images
  ]
  assert distance(drawn) < 2 * distance.floor < distance(measures.Drawn(noisy, prompts))


def test_models_differ_where_the_ranges_of_their_seeds_do_not_meet():
  assert compared([3.0, 4.0], [1.0, 2.0], higher_is_better=True) == "better"
  assert compared([3.0, 4.0], [1.0, 2.0], higher_is_better=False) == "worse"
  assert compared([1.0, 3.0], [2.0, 4.0], higher_is_better=True) == "none"
  assert compared([1.0, 2.0], [2.0, 3.0], higher_is_better=True) == "none"
  assert compared([2.0, 3.0], [1.0, 2.0], higher_is_better=True) == "none"


def accuracy(*pairs):
  return [{"accuracy": {"pairs": value}} for value in pairs]


@pytest.mark.parametrize(
  ("expected", "than", "verdict"),
  [
    ("better", (10.0, 20.0), "so here"),
    ("better", (40.0, 60.0), "not reproduced: the difference is inside the spread"),
    ("better", (70.0, 80.0), "not reproduced: a is worse"),
    ("none", (40.0, 60.0), "so here: no difference beyond the spread"),
    ("none", (70.0, 80.0), "not reproduced: a is worse"),
  ],
)
def test_a_claim_is_held_against_the_spread_of_seeds(expected, than, verdict):
  rows = {
    ("a", 0): accuracy(0.0, 0.0),
    ("a", 100): accuracy(50.0, 52.0),
    ("b", 0): accuracy(0.0, 0.0),
    ("b", 100): accuracy(*than),
  }
  claim = Claim(says="so", of="a", than="b", measure="pairs", expected=expected)
  said, ours, found = judged(claim, rows)
  assert (said, found) == ("so", verdict)
  assert "a 51.0 [50.0, 52.0]" in ours


def test_a_claim_of_a_model_that_is_not_there_is_refused():
  claim = Claim(says="so", of="a", than="c", measure="pairs")
  with pytest.raises(ValueError, match="'so' names 'c', which is no row"):
    judged(claim, {("a", 0): accuracy(1.0)})


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("budget", ["laptop", "smoke"])
def test_every_claim_is_about_rows_that_are_measured(name, budget):
  points = STUDIES[name].points(BUDGETS[budget])
  rows = {
    (label, point.step): accuracy(1.0) for label, own in points.items() for point in own
  }
  for claim in STUDIES[name].claims:
    pairs = Claim(says="", of=claim.of, than=claim.than, measure="pairs", at=claim.at)
    judged(pairs, rows)


def test_the_laptops_budget_has_three_seeds_of_everything_and_takes_about_an_hour(
  tmp_path,
):
  budget = BUDGETS["laptop"]
  everything = {}
  for own in STUDIES.values():
    for label, points in own.points(budget).items():
      assert {point.run.config["seed"] for point in points} == {0, 1, 2}, label
      everything |= {(point.run.key, point.step): point for point in points}
  seconds = Experiment(tmp_path, budget).estimate(list(everything.values()))
  assert 1800 < seconds < 3600


def test_a_run_is_another_where_its_config_or_an_ancestor_is():
  miniature = Miniature(SMOKE)
  variant = Variant(label="a", compression=Compression())
  same = Variant(label="b", compression=Compression())
  assert miniature.branch(variant, 0).key == miniature.branch(same, 0).key
  longer = Miniature(dataclasses.replace(SMOKE, low_steps=SMOKE.low_steps + 1))
  keys = {
    miniature.branch(variant, 0).key,
    miniature.branch(variant, 1).key,
    longer.branch(variant, 0).key,
    miniature.branch(Variant(label="a", compression=Compression(norm=True)), 0).key,
  }
  assert len(keys) == 4


def test_halves_of_the_layers_are_the_papers():
  # Table 3a counts from 1, or from 0: docs/stages.md takes 14-27 for the deep ones.
  layers = {
    where: Compression(where=where).fields(28)["layers"]
    for where in ("shallow", "middle", "deep")
  }
  assert {where: (own[0], own[-1]) for where, own in layers.items()} == {
    "shallow": (0, 13),
    "middle": (7, 20),
    "deep": (14, 27),
  }


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("budget", full_size.BUDGETS)
def test_commands_for_full_size_are_of_configs_that_train_takes(
  tmp_path, name, budget, reproduce
):
  done = reproduce(name, f"--budget={budget}", f"--output={tmp_path}")
  assert done.code == 0, done.err
  content = json.loads((tmp_path / f"{name}_{budget}.json").read_text())
  assert content["setting"]["state"] == "not run"
  *trainings, evaluation = content["data"]["commands"]
  assert len(trainings) == len(STUDIES[name].variants)
  for line in trainings:
    loop, training, _ = line.split("; ")
    assert loop == "for seed in 0 1 2"
    config = config_of(shlex.split(training.removeprefix("do ")))
    compatibility.check_config(config)
    leads_to_its_model(config)
    workdir = training.split("--workdir=")[1].split()[0]
    assert workdir.replace("$seed", "2") in evaluation


def config_of(words):
  """The config that a command trains, with the changes of its flags."""
  flags = [word for word in words if word.startswith("--")]
  given = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
  file = given.pop("config").removeprefix("configs/").replace(".py", "")
  config = complete(stages.config_of(file))
  for flag, value in given.items():
    if flag == "workdir":
      continue
    *sections, last = flag.removeprefix("config.").split(".")
    place = config
    for section in sections:
      place = place[section]
    assert last in place, flag
    is_text = isinstance(place[last], str)
    place[last] = value if is_text else ast.literal_eval(value.replace("$seed", "0"))
  return config


@functools.cache
def shapes(config):
  return abstract_params(config)


def leads_to_its_model(config):
  """Whether the transforms, from the parent's config, end at the config's model."""
  names = ("stage_256_align", "stage_512", "stage_1k:full")
  parent = config["init"]["parent"].rpartition("/")[2]
  [name] = [name for name in names if name.replace(":", "_") == parent]
  model = model_config(complete(stages.config_of(name))["model"])
  params = shapes(model)
  for transform in config["init"]["transforms"]:
    fields = dict(transform)
    model, params = abstractly(TRANSFORMS[fields.pop("name")], model, params, fields)
  assert model == model_config(config["model"])
