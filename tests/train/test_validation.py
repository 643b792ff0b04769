"""What a run looks at beside its steps: held-out images, sets of samples, a profile."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from pixsigma_jax import sharding
from pixsigma_jax.data.mixture import open_mixture
from pixsigma_jax.sample import encoders
from pixsigma_jax.train.batches import Batches
from pixsigma_jax.train.validation import Validation
from tests.train import runs

WATCHED = {
  "data__holdout": 0.25,
  "checkpoint__every": 3,
  "validation__every": 3,
  "validation__examples": 12,  # two batches, so that their means are put together
  "log__sample_set": {"every": 6, "count": 3},
  "log__profile": (2, 3),
}


@pytest.fixture(scope="module")
def watched(data, tmp_path_factory):
  """A run that looks at everything; resumed in the middle."""
  workdir = tmp_path_factory.mktemp("watched")
  runs.train(runs.low(data, **WATCHED | {"total_steps": 3}), workdir)
  runs.train(runs.low(data, **WATCHED), workdir)
  return workdir


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("plain")
  nothing = {"validation__every": 0, "log__profile": ()}
  nothing["log__sample_set"] = {"every": 0, "count": 0}
  runs.train(runs.low(data, **WATCHED | nothing), workdir)
  return workdir


def test_looking_changes_nothing_of_the_training(watched, plain):
  runs.assert_same(runs.arrays(watched, 6), runs.arrays(plain, 6))


def test_the_validation_loss_is_in_the_line_of_its_step_by_decile(watched):
  lines = {line["step"]: line for line in runs.metrics(watched)}
  assert [s for s, line in lines.items() if "validation/loss" in line] == [3, 6]
  for step in (3, 6):
    assert lines[step]["validation/step"] == step
    deciles = lines[step]["validation/decile_loss"]
    assert len(deciles) == 10
    finite = [x for x in deciles if x is not None]
    assert min(finite) <= lines[step]["validation/loss"] <= max(finite)
  # The same examples, noise and timesteps: what is left is what was learned.
  assert lines[6]["validation/loss"] != lines[3]["validation/loss"]
  empty = [[x is None for x in lines[s]["validation/decile_loss"]] for s in (3, 6)]
  assert empty[0] == empty[1]


def test_validation_is_the_same_whatever_was_trained_before(watched, data, tmp_path):
  # Step 6 again, from its own checkpoint at step 3.
  changes = WATCHED | {"log__profile": (), "checkpoint__every": 6}
  runs.train(runs.low(data, **changes), tmp_path)
  (again,) = [line for line in runs.metrics(tmp_path) if line["step"] == 6]
  (line,) = [line for line in runs.metrics(watched) if line["step"] == 6]
  assert again["validation/loss"] == line["validation/loss"]


class _Same(Batches):
  """The same batch for ever."""

  def __init__(self):
    pass

  def start(self, first_example):
    assert first_example == 0

  def __next__(self):
    return {}

  def close(self):
    pass


def test_each_batch_has_noise_of_its_own_and_the_same_at_the_next_validation():
  def loss(params, null_caption, batch, key):
    drawn = jax.random.uniform(key, (4,))
    return drawn.mean(), {"loss": drawn, "timesteps": jnp.zeros(4, jnp.int32)}

  def validation(examples):
    return Validation(
      loss,
      _Same(),
      examples=examples,
      batch_size=4,
      num_timesteps=1000,
      mesh=sharding.single_device_mesh(),
    )

  one, two = validation(4), validation(8)
  first = two({}, None)["validation/loss"]
  assert first != one({}, None)["validation/loss"]
  assert first == two({}, None)["validation/loss"]


def test_a_sample_set_has_the_datas_captions_at_their_images_sizes(watched, data):
  directory = watched / "sample_sets" / "00000006"
  lines = [
    json.loads(x) for x in (directory / "captions.jsonl").read_text().split("\n") if x
  ]
  mixture = open_mixture([data], weights=(), holdout=0.25, split="train")
  records = mixture.read(np.arange(3))
  assert [line["id"] for line in lines] == [record.id for record in records]
  for line, record in zip(lines, records, strict=True):
    assert line["caption"] == record.captions[0]
    with Image.open(directory / line["file"]) as image:
      assert image.size[::-1] == record.latents.shape[:2]  # pixels are latents here
  names = {path.name for path in directory.iterdir()}
  assert names == {"captions.jsonl", *(line["file"] for line in lines)}


def test_a_sample_set_alone_needs_no_text_encoder(data, tmp_path, monkeypatch):
  changes = {"log__sample_set": {"every": 2, "count": 1}, "total_steps": 2}
  with monkeypatch.context() as patch:
    patch.setattr(encoders, "load_text_encoder", lambda *_, **__: pytest.fail("loaded"))
    runs.train(runs.low(data, **changes), tmp_path)
  assert (tmp_path / "sample_sets" / "00000002" / "captions.jsonl").exists()


def test_the_chosen_steps_are_profiled(watched):
  assert list((watched / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"validation": {"every": 1, "examples": 8}}, "holdout=0.0 holds none out"),
    ({"validation": {"every": 1, "examples": 0}}, "config.validation.every=1 with 0"),
    ({"log__sample_set": {"every": 1, "count": 0}}, "config.log.sample_set.every=1"),
    ({"log__sample_set": {"every": 1, "counts": 8}}, "unknown .*sample_set.counts"),
    ({"log__sample_set": {"every": 1, "count": 100}}, r"count=100, but .* has 48 im"),
    (
      {"validation": {"every": 1, "examples": 8}, "data__holdout": 1e-9},
      "in the split",
    ),
    ({"log__profile": (3, 2)}, r"config.log.profile=\(3, 2\) must be \(first step"),
  ],
)
def test_what_could_not_be_looked_at_is_refused_at_once(
  data, tmp_path, changes, message
):
  config = runs.low(data)
  for name, value in changes.items():
    section, _, field = name.partition("__")
    if field:
      config[section][field] = value
    else:
      config[section] = value
  with pytest.raises(ValueError, match=message):
    runs.train(config, tmp_path)
  # Before anything else is written.
  assert {path.name for path in tmp_path.iterdir()} <= {"lock"}
