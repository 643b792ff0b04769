"""Settings: checked once, Python's own from then on, and everywhere the same."""

import inspect
import json
import pathlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from diffusers import PixArtSigmaPipeline

from pixsigma_jax.sample import Pipeline, image_files, pipeline
from pixsigma_jax.sample.call_arguments import CALL_ARGUMENTS, CallArguments
from pixsigma_jax.sample.settings import (
  NOT_OF_DIFFUSERS,
  SETTINGS,
  UNGUIDED_SAMPLERS,
  Settings,
  check_prompts,
)
from tests.sample import models, settings_table

WHOLE = [np.int64, np.int32, np.uint8, np.float32, np.array, jnp.int32, jnp.array]
NUMBER = [np.float32, np.float64, np.float16, np.array, jnp.float32, jnp.asarray]
NUMBER += [np.longdouble, ml_dtypes.bfloat16, int]


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize(
  "name", ["height", "width", "seed", "num_inference_steps", "num_images_per_prompt"]
)
def test_whole_numbers_of_any_library_are_pythons(name, kind):
  value = getattr(Settings(**{name: kind(3)}), name)
  assert (value, type(value)) == (3, int)


@pytest.mark.parametrize("kind", NUMBER)
@pytest.mark.parametrize("name", ["guidance_scale", "guidance_rescale", "step_caching"])
def test_numbers_of_any_library_are_pythons(name, kind):
  value = getattr(Settings(**{name: kind(1)}), name)
  assert (value, type(value)) == (1.0, float)


@pytest.mark.parametrize("make", [list, tuple, np.array, jnp.array, lambda x: x])
def test_each_prompts_own_values_may_be_an_array(make):
  settings = Settings(seed=make(range(4, 6)), height=[np.int64(8), None])
  assert settings.of_prompts(2) == [
    {"negative_prompt": "", "height": 8, "width": None, "strength": None, "seed": 4},
    {"negative_prompt": "", "height": None, "width": None, "strength": None, "seed": 5},
  ]
  json.dumps(settings.of_prompts(2))


def test_all_that_files_say_can_be_written():
  settings = Settings(
    guidance_interval=np.array([0, 0.5], np.float32),
    use_resolution_binning=np.bool_(False),
    sampler=np.str_("ddim"),
  )
  said = json.loads(json.dumps(settings.of_all()))
  assert said["guidance_interval"] == [0, 0.5]
  assert (said["use_resolution_binning"], said["sampler"]) == (False, "ddim")
  assert Settings(**said) == settings


def test_an_image_of_numpys_numbers_is_drawn_and_saved(tmp_path):
  subject = models.pipeline(batch_size=np.int64(1), guidance_passes=np.int32(1))
  output = subject(
    np.array(["a one"]),
    seed=np.int64(5),
    num_inference_steps=np.int32(2),
    height=np.float32(8),
    width=np.array(8),
    guidance_scale=jnp.float32(2.5),
  )
  image_files.save(tmp_path / "a.png", output.images[0], output.settings[0])
  said = image_files.settings_of(tmp_path / "a.png")
  assert said == output.settings[0]
  assert (said["seed"], said["height"], said["guidance_scale"]) == (5, 8, 2.5)


@pytest.mark.parametrize(
  ("asked", "message"),
  [
    ({"seed": 1.5}, "seed must be a whole number, not 1.5"),
    ({"seed": [1, np.float32(1.5)]}, "seed must be a whole number, not 1.5"),
    ({"seed": True}, "seed must be a whole number, not True"),
    ({"seed": None}, "seed must be a whole number, not None"),
    ({"height": "512"}, "height must be a whole number, not '512'"),
    ({"height": float("inf")}, "height must be a whole number, not inf"),
    ({"num_inference_steps": np.zeros(2)}, "must be a whole number, not .0.0, 0.0."),
    ({"guidance_scale": -1}, r"guidance_scale=-1.0 must be 0 or more"),
    ({"guidance_scale": np.float32("nan")}, "guidance_scale must be a finite number"),
    ({"guidance_scale": 10**400}, "guidance_scale must be a finite number"),
    ({"guidance_scale": False}, "guidance_scale must be a finite number, not False"),
    ({"guidance_rescale": 1.1}, "guidance_rescale=1.1 must lie in 0 … 1"),
    ({"guidance_interval": (0, 0.5, 1)}, "must be two numbers, low and high"),
    ({"guidance_interval": 0.5}, "must be two numbers, low and high"),
    ({"guidance_interval": (0.5, 0.1)}, "0.5 … 0.1 must have the lower number first"),
    ({"guidance_interval": (0, 2)}, "guidance_interval=2.0 must lie in 0 … 1"),
    ({"use_resolution_binning": 1}, "must be True or False, not 1"),
    ({"timesteps": 999}, "timesteps must be a list of whole numbers, not 999"),
    ({"timesteps": []}, "timesteps must be a list of whole numbers"),
    ({"timesteps": [999, 0.5]}, "timesteps must be a whole number, not 0.5"),
    ({"timesteps": [9, 9]}, "timesteps 9, 9 must have no number twice"),
    (
      {"timesteps": [9, 8], "use_karras_sigmas": True},
      "timesteps and use_karras_sigmas each say where .* give one",
    ),
    (
      {"timesteps": [9], "sampler": "iddpm"},
      r"sampler iddpm takes no timesteps: leave it out, or choose one of dpm\+\+, dpm",
    ),
    (
      {"use_karras_sigmas": True, "sampler": "lcm"},
      "sampler lcm takes no use_karras_sigmas: .* heun",
    ),
    ({"sampler": 3}, "Unknown sampler 3; choose one of"),
    ({"negative_prompt": 3}, "negative_prompt must be a text, not 3"),
    ({"negative_prompt": "caf\udce9"}, "holds half a character"),
  ],
)
def test_a_value_that_a_setting_does_not_take_is_named(asked, message):
  with pytest.raises(ValueError, match=message):
    Settings(**asked)


@pytest.mark.parametrize(
  ("prompt", "message"),
  [
    (None, "prompt must be a text or a list of texts, not None"),
    (["a", None], "prompt must be a text, not None"),
    (b"a", "prompt must be a text or a list of texts"),
    ([], "no prompt to draw"),
    ("caf\udce9", "holds half a character"),
  ],
)
def test_a_prompt_that_is_no_text_is_named(prompt, message):
  with pytest.raises(ValueError, match=message):
    check_prompts(prompt)


def test_no_negative_prompt_is_an_empty_one():
  assert Settings(negative_prompt=None).negative_prompt == ""
  assert Settings(negative_prompt=["a", None]).negative_prompt == ("a", "")


def test_the_number_of_timesteps_is_the_number_of_steps():
  asked = Settings(timesteps=np.array([900, 500, 100]), num_inference_steps=50)
  assert (asked.timesteps, asked.num_inference_steps) == ((900, 500, 100), 3)
  assert Settings(timesteps=None).timesteps is None


def test_samplers_of_few_steps_draw_without_guidance_unless_it_is_asked_for():
  assert Settings().guidance_scale == 4.5
  for sampler in UNGUIDED_SAMPLERS:
    assert Settings(sampler=sampler).guidance_scale == 1
    assert Settings(sampler=sampler, guidance_scale=2).guidance_scale == 2
  assert not Settings(guidance_scale=0).guided
  assert not Settings(guidance_scale=1).guided
  assert Settings(guidance_scale=1.01).guided


# ----------------------------------------------------------- the same wherever it shows


def test_the_pipelines_signature_has_every_setting_and_its_default():
  for call in (Pipeline.stream, Pipeline.__call__):
    parameters = list(inspect.signature(call).parameters.values())
    names = [p.name for p in parameters]
    assert names == ["self", "prompt", *SETTINGS, *CALL_ARGUMENTS]
    assert {p.name: p.default for p in parameters[2:]} == {
      **{name: setting.default for name, setting in SETTINGS.items()},
      **vars(CallArguments()),
    }


def test_every_difference_from_diffusers_is_written_down():
  theirs = inspect.signature(PixArtSigmaPipeline.__call__).parameters
  names = set(theirs) - {"self", "prompt", "kwargs"}
  ours = {*SETTINGS, *CALL_ARGUMENTS}
  assert set(NOT_OF_DIFFUSERS) == names - ours
  for name in (*NOT_OF_DIFFUSERS, *(ours - names)):
    assert f"`{name}`" in pipeline.__doc__, name
  # Where both have an argument, it has the same default.
  for name in names & ours:
    of = Settings() if name in SETTINGS else CallArguments()
    assert theirs[name].default == getattr(of, name), name


def test_an_argument_of_diffusers_that_there_is_not_says_what_to_do():
  with pytest.raises(TypeError, match=r"no argument 'generator': give seed\."):
    models.pipeline().stream("a", generator=None)
  with pytest.raises(TypeError, match="no argument 'steps': known are negative_prompt"):
    models.pipeline().stream("a", steps=3)


def test_the_documentation_has_the_table_of_settings():
  page = pathlib.Path(__file__).parents[2] / "docs" / "sampling.md"
  # `python -m tests.sample.settings_table` writes it.
  assert settings_table.written(page.read_text(encoding="utf-8")) == page.read_text(
    encoding="utf-8"
  )
