"""Two models that draw as one, and a weaker one to guide away from."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from pixsigma_jax import checkpoint, sharding
from pixsigma_jax.convert.lora import read_lora, write_lora
from pixsigma_jax.diffusion.solvers import SAMPLERS, restarted, solver_table
from pixsigma_jax.models.kv_compression import KVCompression
from pixsigma_jax.sample import program
from pixsigma_jax.sample.companions import Refiner, WeakModel
from pixsigma_jax.sample.pipeline import Pipeline
from pixsigma_jax.transforms import merge_lora
from tests.convert.test_lora import lora, random_adapter
from tests.sample import models

CONFIG = models.nano()
FIRST, SECOND = (models.random_params(CONFIG, seed) for seed in (0, 1))
STEPS = 4  # ddim: timesteps 999, 749, 499, 249
# Samplers whose steps remember nothing of earlier ones, but for the one of one step.
FIRST_ORDER = [
  name
  for name in SAMPLERS
  if name != "dmd" and solver_table(name, program.SCHEDULE, STEPS).previous is None
]


def drawn(prompt="a one", *, refiner=None, weak=None, params=FIRST, **settings):
  fields = {"refiner": refiner, "weak_model": weak, "params": params}
  subject = models.pipeline(CONFIG, batch_size=2, guidance_passes=1, **fields)
  arguments = {"sampler": "ddim", "num_inference_steps": STEPS} | settings
  subject(prompt, **arguments)
  return np.stack(subject.autoencoder.decoded)


@pytest.fixture(scope="module")
def single():
  return drawn()


@pytest.mark.parametrize("sampler", FIRST_ORDER)
def test_two_equal_models_draw_what_one_draws_to_the_bit(sampler):
  equal = drawn(refiner=Refiner(CONFIG, FIRST, 400), sampler=sampler)
  np.testing.assert_array_equal(equal, drawn(sampler=sampler))


def test_above_the_switch_the_first_model_draws_and_below_it_the_second(
  single, monkeypatch
):
  seen, step = [], program.step

  def watched(params, *arguments, **static):
    seen.append("first" if params is FIRST else "second")
    return step(params, *arguments, **static)

  monkeypatch.setattr(program, "step", watched)
  both = drawn(
    refiner=Refiner(CONFIG, SECOND, 749)
  )  # the step at 749 is the first one's
  assert seen == ["first", "first", "second", "second"]
  assert np.abs(both - single).max() > 0.01
  np.testing.assert_array_equal(drawn(refiner=Refiner(CONFIG, SECOND, 249)), single)


def test_the_second_model_goes_on_from_the_first_ones_latents():
  """By hand: the first model's latents, given to the second model's last steps."""
  kept = []

  def keep(_pipeline, step, _timestep, known):
    kept.append(known["latents"][0])

  drawn(callback_on_step_end=keep)

  def put(_pipeline, step, _timestep, known):
    return {"latents": [kept[1]] if step == 1 else known["latents"]}

  by_hand = drawn(params=SECOND, callback_on_step_end=put)
  np.testing.assert_array_equal(drawn(refiner=Refiner(CONFIG, SECOND, 600)), by_hand)


def test_callbacks_and_step_caching_see_both_models():
  seen = []

  def watch(_pipeline, step, timestep, known):
    seen.append((step, timestep, known["num_steps"]))

  refiner = Refiner(CONFIG, SECOND, 400)
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
  both = drawn(refiner=Refiner(CONFIG, SECOND, 600), **settings)
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


def test_a_refiner_of_another_architecture_is_refused():
  deeper = dataclasses.replace(CONFIG, depth=3)
  with pytest.raises(ValueError, match=r"refiner does not go .*depth: 2 → 3"):
    models.pipeline(CONFIG, refiner=Refiner(deeper, {}, 400))


@pytest.mark.parametrize("switch_at", [0, 1000])
def test_a_switch_that_is_no_timestep_between_others_is_refused(switch_at):
  with pytest.raises(ValueError, match=f"switch_at={switch_at} must be a timestep"):
    Refiner(CONFIG, FIRST, switch_at)


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


def test_devices_share_all_models_with_all_guidance_caching_and_sizes():
  """As each image by itself on one device: another program, which rounds otherwise."""
  mesh = sharding.make_mesh(data=2, fsdp=1, context=1, devices=jax.devices()[:2])
  both = {"refiner": Refiner(CONFIG, SECOND, 400), "weak_model": WEAK}
  both |= {"batch_size": 2, "guidance_passes": 1}
  settings = models.EVERYTHING | {
    "sampler": "ddim",
    "num_inference_steps": 3,
    "guidance_interval": (0.1, 0.9),
    "autoguidance_scale": 2,
  }
  sizes = {"height": [8, 4], "width": [8, 16]}
  subject = models.pipeline(CONFIG, mesh=mesh, **both)
  together = subject(["a one", "two threes"], **sizes, **settings)
  for i, prompt in enumerate(("a one", "two threes")):
    alone = models.pipeline(CONFIG, **both)
    size = {name: sides[i] for name, sides in sizes.items()}
    output = alone(prompt, seed=i, **size, **settings)
    found, expected = (p.autoencoder.decoded[j] for p, j in ((subject, i), (alone, 0)))
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    computed = [
      o.settings[j]["computed_steps"] for o, j in ((together, i), (output, 0))
    ]
    assert computed[0] == computed[1]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
  folder = tmp_path_factory.mktemp("companions")
  models.save_snapshot(folder / "one", CONFIG, 1)
  models.save_snapshot(folder / "two", CONFIG, 1, seed=1)
  models.save_snapshot(folder / "small", WEAK_CONFIG, 1, seed=2)
  models.save_snapshot(folder / "scaled", CONFIG, 1, scaling_factor=3.0)
  checkpoint.save_snapshot(
    folder / "unlike",
    1,
    params=SECOND,
    null_caption=models.null_caption(CONFIG) + 1,
    metadata=models.metadata(CONFIG),
  )
  return folder


def of_three(places, **loras):
  return Pipeline.from_checkpoint(
    places / "one",
    compute=models.FLOAT32,
    batch_size=2,
    guidance_passes=1,
    refiner=places / "two",
    switch_at=400,
    autoguidance=places / "small",
    **loras,
  )


def test_a_pipeline_is_made_of_three_checkpoints_and_says_so(places):
  subject = of_three(places)
  assert subject.origin["switch_at"] == 400
  assert subject.origin["refiner"].endswith("two")
  assert subject.origin["autoguidance"].endswith("small")
  subject = dataclasses.replace(subject, autoencoder=models.Tracing())
  settings = {"sampler": "ddim", "num_inference_steps": STEPS, "autoguidance_scale": 2}
  subject("a one", **settings)
  np.testing.assert_array_equal(
    np.stack(subject.autoencoder.decoded),
    drawn(refiner=Refiner(CONFIG, SECOND, 400), weak=WEAK, **settings),
  )


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
  """Two LoRAs of the first two models' shape, and one of the smaller one's."""
  folder = tmp_path_factory.mktemp("loras")
  spec = lora(("qkv",))
  for seed, (name, config) in enumerate(
    {"one": CONFIG, "two": CONFIG, "small": WEAK_CONFIG}.items()
  ):
    params = models.random_params(config)
    write_lora(folder / name, config, random_adapter(spec, params, seed), spec)
  return folder


def merged(path, config, params, scale):
  change = read_lora(path, config)
  return merge_lora(config, params, adapter=change, scale=scale)[1]


def test_each_model_has_its_own_loras(places, loras):
  """Given as the command does; compared with models that they are merged into."""
  subject = of_three(
    places,
    lora=[f"{loras / 'one'}:0.5"],
    refiner_lora=[f"{loras / 'two'}", f"{loras / 'one'}:-1"],
    autoguidance_lora=[f"{loras / 'small'}:2"],
  )
  settings = {"sampler": "ddim", "num_inference_steps": STEPS, "autoguidance_scale": 2}
  subject = subject.replace(autoencoder=models.Tracing())
  output = subject("a one", **settings)
  second = merged(loras / "two", CONFIG, SECOND, 1.0)
  expected = drawn(
    params=merged(loras / "one", CONFIG, FIRST, 0.5),
    refiner=Refiner(CONFIG, merged(loras / "one", CONFIG, second, -1.0), 400),
    weak=WeakModel(WEAK_CONFIG, merged(loras / "small", WEAK_CONFIG, WEAK.params, 2.0)),
    **settings,
  )
  found = np.stack(subject.autoencoder.decoded)
  np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
  about = output.settings[0]
  said = {
    name: [(pathlib.Path(one["path"]).name, one["scale"]) for one in about[name]]
    for name in ("loras", "refiner_loras", "autoguidance_loras")
  }
  assert said == {
    "loras": [("one", 0.5)],
    "refiner_loras": [("two", 1.0), ("one", -1.0)],
    "autoguidance_loras": [("small", 2.0)],
  }
  # Those of one model are taken out and changed without the others'.
  refiner = subject.refiner.unload_lora_weights()
  jax.tree.map(np.testing.assert_array_equal, refiner.params, SECOND)
  about = subject.replace(refiner=refiner)("a one", **settings).settings[0]
  assert ("loras" in about, "refiner_loras" in about) == (True, False)


def test_loras_of_a_model_that_is_not_there_or_of_another_shape_are_refused(
  places, loras
):
  for fields, message in (
    ({"refiner_lora": [str(loras / "one")]}, "refiner_lora=.*one is for a model that"),
    (
      {"autoguidance_lora": ["x:1"]},
      "autoguidance_lora=x:1 is for .*give auto",
    ),
    (
      {
        "autoguidance": places / "small",
        "autoguidance_lora": [str(loras / "one")],
      },
      "is no LoRA for a PixArt of 1 layers of width 32",
    ),
    (
      {
        "refiner": places / "two",
        "switch_at": 400,
        "refiner_lora": [str(loras / "small")],
      },
      f"is no LoRA for a PixArt of 2 layers of width {CONFIG.width}",
    ),
  ):
    with pytest.raises(ValueError, match=message):
      Pipeline.from_checkpoint(places / "one", **fields)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"refiner": "small", "switch_at": 400}, r"refiner .*model\.depth: 2 → 1"),
    ({"refiner": "scaled", "switch_at": 400}, r"scaling_factor: 2\.0 → 3\.0"),
    ({"refiner": "unlike", "switch_at": 400}, "trained with another null caption"),
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
