"""Two models that draw as one, and a weaker one to guide away from."""

import dataclasses

import jax
import numpy as np
import pytest

from pixsigma_jax import sharding
from pixsigma_jax.diffusion.solvers import SAMPLERS, restarted, solver_table
from pixsigma_jax.models.kv_compression import KVCompression
from pixsigma_jax.sample import program
from pixsigma_jax.sample.adapters import Adapter
from pixsigma_jax.sample.companions import Refiner, WeakModel
from pixsigma_jax.sample.pipeline import Pipeline
from tests.sample import models

CONFIG = models.nano()
FIRST, SECOND = (models.random_params(CONFIG, seed) for seed in (0, 1))
STEPS = 4  # ddim: timesteps 999, 749, 499, 249


def drawn(prompt="a one", *, refiner=None, weak=None, params=FIRST, **settings):
  fields = {"refiner": refiner, "weak_model": weak, "params": params}
  subject = models.pipeline(CONFIG, batch_size=2, guidance_passes=1, **fields)
  arguments = {"sampler": "ddim", "num_inference_steps": STEPS} | settings
  subject(prompt, **arguments)
  return np.stack(subject.autoencoder.decoded)


@pytest.fixture(scope="module")
def single():
  return drawn()


def test_two_equal_models_draw_what_one_draws_to_the_bit(single):
  np.testing.assert_array_equal(drawn(refiner=Refiner(FIRST, 400)), single)


def test_above_the_switch_the_first_model_draws_and_below_it_the_second(
  single, monkeypatch
):
  seen, step = [], program.step

  def watched(params, *arguments, **static):
    seen.append("first" if params is FIRST else "second")
    return step(params, *arguments, **static)

  monkeypatch.setattr(program, "step", watched)
  both = drawn(refiner=Refiner(SECOND, 749))  # the step at 749 is the first one's
  assert seen == ["first", "first", "second", "second"]
  assert np.abs(both - single).max() > 0.01
  np.testing.assert_array_equal(drawn(refiner=Refiner(SECOND, 249)), single)


def test_the_second_model_goes_on_from_the_first_ones_latents():
  """By hand: the first model's latents, given to the second model's last steps."""
  kept = []

  def keep(_pipeline, step, _timestep, known):
    kept.append(known["latents"][0])

  drawn(callback_on_step_end=keep)

  def put(_pipeline, step, _timestep, known):
    return {"latents": [kept[1]] if step == 1 else known["latents"]}

  by_hand = drawn(params=SECOND, callback_on_step_end=put)
  np.testing.assert_array_equal(drawn(refiner=Refiner(SECOND, 600)), by_hand)


def test_callbacks_and_step_caching_see_both_models():
  seen = []

  def watch(_pipeline, step, timestep, known):
    seen.append((step, timestep, known["num_steps"]))

  refiner = Refiner(SECOND, 400)
  both = drawn(refiner=refiner)
  np.testing.assert_array_equal(
    drawn(refiner=refiner, callback_on_step_end=watch), both
  )
  assert [(step, count) for step, _, count in seen] == [(i, 4) for i in range(4)]
  subject = models.pipeline(CONFIG, batch_size=1, refiner=refiner)
  settings = {"sampler": "ddim", "num_inference_steps": STEPS, "step_caching": 1e9}
  output = subject("a one", **settings)
  # Each model's first step is computed, whatever the threshold.
  assert output.settings[0]["computed_steps"] == 2


def test_an_image_of_which_only_the_end_is_drawn_is_the_second_models():
  image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
  settings = {"image": image, "strength": 0.5}
  both = drawn(refiner=Refiner(SECOND, 600), **settings)
  np.testing.assert_array_equal(both, drawn(params=SECOND, **settings))


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_no_step_below_the_switch_remembers_one_above(sampler):
  steps = 1 if sampler == "dmd" else 8
  table = solver_table(sampler, program.SCHEDULE, steps)
  changed, first = restarted(sampler, table, 500)
  timesteps = np.asarray(table.timesteps)
  np.testing.assert_array_equal(changed.timesteps, timesteps)
  assert (timesteps[first:] < 500).all() or sampler == "dpm++-2s"
  assert (timesteps[: max(first - 1, 0)] >= 500).all()
  if table.previous is None:
    jax.tree.map(np.testing.assert_array_equal, changed, table)
    return
  if first < len(timesteps):
    assert changed.previous[first] == 0
    if changed.earlier is not None:
      np.testing.assert_array_equal(changed.earlier[first : first + 2], 0)

  def total(t):
    return t.current + t.previous + (0 if t.earlier is None else t.earlier)

  # Weights of a step's estimates sum to what they summed to.
  np.testing.assert_allclose(total(changed), total(table), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("switch_at", [0, 1000])
def test_a_switch_that_is_no_timestep_between_others_is_refused(switch_at):
  with pytest.raises(ValueError, match=f"switch_at={switch_at} must be a timestep"):
    Refiner(FIRST, switch_at)


# Smaller in depth and in width.
WEAK_CONFIG = dataclasses.replace(
  CONFIG, depth=1, width=32, kv_compression=KVCompression(ratio=4, layers=(0,))
)
WEAK = WeakModel(WEAK_CONFIG, models.random_params(WEAK_CONFIG, 2))


def test_a_scale_of_1_is_no_autoguidance_to_the_bit(single):
  np.testing.assert_array_equal(drawn(weak=WEAK, autoguidance_scale=1), single)


def test_guiding_away_from_the_model_itself_changes_nothing(single):
  same = drawn(weak=WeakModel(CONFIG, FIRST), autoguidance_scale=3)
  np.testing.assert_allclose(same, single, atol=1e-4 * np.abs(single).max())


def test_autoguidance_of_one_step_is_its_formula():
  """One DDIM step is linear in the prediction: D_0 + w (D_1 - D_0)."""
  one = {"num_inference_steps": 1, "guidance_scale": 1.0}
  weak = models.pipeline(
    WEAK_CONFIG, params=WEAK.params, batch_size=2, guidance_passes=1
  )
  weak("a one", sampler="ddim", **one)
  d0, d1 = weak.autoencoder.decoded[0], drawn(**one)[0]
  found = drawn(weak=WEAK, autoguidance_scale=2.5, **one)[0]
  expected = d0 + 2.5 * (d1 - d0)
  np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
  assert np.abs(found - d1).max() > 0.01 * np.abs(d1).max()


def test_a_weaker_model_of_other_tokens_is_refused():
  other = dataclasses.replace(WEAK_CONFIG, kv_compression=KVCompression())
  with pytest.raises(ValueError, match=r"window: \[2, 2\] → \[1, 1\].*may differ"):
    models.pipeline(CONFIG, weak_model=WeakModel(other, {}))


def test_autoguidance_without_a_weaker_model_is_refused():
  with pytest.raises(ValueError, match="autoguidance_scale=2 needs a weaker model"):
    drawn(autoguidance_scale=2)


def test_a_lora_beside_a_refiner_is_refused():
  subject = models.pipeline(CONFIG, refiner=Refiner(SECOND, 400))
  loaded = dataclasses.replace(subject.loras, loaded={"one": Adapter.__new__(Adapter)})
  with pytest.raises(ValueError, match=r"A LoRA acts in one model.*merge_lora"):
    subject.replace(loras=loaded)


def test_devices_share_both_models_and_the_weaker_one():
  mesh = sharding.make_mesh(data=2, fsdp=1, context=1, devices=jax.devices()[:2])
  subject = models.pipeline(
    CONFIG, batch_size=2, mesh=mesh, refiner=Refiner(SECOND, 400), weak_model=WEAK
  )
  settings = {"sampler": "ddim", "num_inference_steps": 2, "autoguidance_scale": 2}
  subject("a one", **settings)
  alone = drawn(refiner=Refiner(SECOND, 400), weak=WEAK, **settings)
  scale = np.abs(alone).max()
  np.testing.assert_allclose(
    subject.autoencoder.decoded[0], alone[0], atol=1e-4 * scale
  )


@pytest.fixture(scope="module")
def places(tmp_path_factory):
  folder = tmp_path_factory.mktemp("companions")
  models.save_snapshot(folder / "one", CONFIG, 1)
  models.save_snapshot(folder / "two", CONFIG, 1, seed=1)
  models.save_snapshot(folder / "small", WEAK_CONFIG, 1, seed=2)
  models.save_snapshot(folder / "scaled", CONFIG, 1, scaling_factor=3.0)
  return folder


def test_a_pipeline_is_made_of_three_checkpoints_and_says_so(places):
  subject = Pipeline.from_checkpoint(
    places / "one",
    compute=models.FLOAT32,
    batch_size=2,
    guidance_passes=1,
    refiner=places / "two",
    switch_at=400,
    autoguidance=places / "small",
  )
  assert subject.origin["switch_at"] == 400
  assert subject.origin["refiner"].endswith("two")
  assert subject.origin["autoguidance"].endswith("small")
  subject = dataclasses.replace(subject, autoencoder=models.Tracing())
  settings = {"sampler": "ddim", "num_inference_steps": STEPS, "autoguidance_scale": 2}
  subject("a one", **settings)
  np.testing.assert_array_equal(
    np.stack(subject.autoencoder.decoded),
    drawn(refiner=Refiner(SECOND, 400), weak=WEAK, **settings),
  )


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"refiner": "small", "switch_at": 400}, r"refiner .*model\.depth: 2 → 1"),
    ({"refiner": "scaled", "switch_at": 400}, r"scaling_factor: 2\.0 → 3\.0"),
    ({"autoguidance": "scaled"}, r"cannot guide .*scaling_factor: 2\.0 → 3\.0"),
    ({"refiner": "two"}, "switch_at=None go together"),
    ({"switch_at": 400}, "refiner=None and switch_at=400 go together"),
    ({"refiner": "two", "switch_at": 1000}, "switch_at=1000 must be a timestep"),
  ],
)
def test_models_that_do_not_go_together_are_refused(places, fields, message):
  for name in ("refiner", "autoguidance"):
    if name in fields:
      fields = fields | {name: places / fields[name]}
  with pytest.raises(ValueError, match=message):
    Pipeline.from_checkpoint(places / "one", **fields)
