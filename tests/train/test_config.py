"""Each section stands for a call; a typo or a gap is found before anything is built."""

import dataclasses

import pytest

from pixsigma_jax.models.kv_compression import KVCompression
from pixsigma_jax.models.layers import Compute
from pixsigma_jax.models.pixart import PixArtConfig
from pixsigma_jax.sharding import make_mesh_of_slices
from pixsigma_jax.train import fields
from pixsigma_jax.train.config import call, check_fields, model_config
from pixsigma_jax.train.ema import Ema
from pixsigma_jax.train.loss import make_loss
from pixsigma_jax.train.optimizer import make_optimizer

MODEL = {
  "variant": "Nano/2",
  "base_size": 4,
  "pe_interpolation": 0.5,
  "mlp_ratio": 4.0,
  "in_channels": 3,
  "learn_variance": True,
  "caption_width": 16,
  "caption_length": 8,
  "qk_norm": True,
  "size_conditions": False,
  "kv_compression": {"ratio": 4, "layers": (1,), "operator": "conv", "norm": False},
}

SECTIONS = {
  # Its own fields; the rest are of the optimizer that it names.
  "optimizer": (make_optimizer, ["name", "weight_decay", "clip_norm", "groups"]),
  "mesh": (make_mesh_of_slices, ["slices", "data", "fsdp", "context"]),
  "compute": (Compute, ["dtype", "attention", "remat", "unroll"]),
  "loss": (
    make_loss,
    [
      *("caption_dropout", "snr_switch", "min_snr_gamma", "snr_shift"),
      *("timestep_beta", "timestep_range"),
      *("frequency_weight", "frequency_gamma", "wavelet_offset"),
    ],
  ),
  "ema": (Ema, ["kind", "values", "unit", "offload"]),
}
GIVEN = {
  "mesh": {"devices": None, "batch_size": 8, "width": 128},
  "compute": {"merge_rows": True, "mesh": None},
  "loss": {"scaling_factor": 1.0},
  "ema": {"batch_size": 8},
}


def change(section, **renamed):
  return {renamed.get(name, name): value for name, value in section.items()}


# Names at the top level.
FIELDS = [field.name for field in dataclasses.fields(fields.Config)]


def test_a_config_with_exactly_its_fields_passes():
  assert check_fields("", dict.fromkeys(FIELDS), FIELDS) is None


def test_a_typo_names_the_nearest_field_and_what_is_missing():
  fields = change(dict.fromkeys(FIELDS), batch_size="bach_size")
  message = (
    r"unknown config\.bach_size \(did you mean config\.batch_size\?\); "
    r"missing config\.batch_size\. Its fields here are stage, seed"
  )
  with pytest.raises(ValueError, match=message):
    check_fields("", fields, FIELDS)


def test_a_field_like_no_other_gets_no_hint():
  with pytest.raises(ValueError, match=r"unknown config\.log\.xyz\. Its fields"):
    check_fields("log", {"every": 1, "xyz": 2}, ["every"])


@pytest.mark.parametrize("section", SECTIONS)
def test_each_section_spells_out_the_call_it_stands_for(section):
  function, names = SECTIONS[section]
  more = GIVEN.get(section, {})
  wrong = {**dict.fromkeys(names[1:]), names[0] + "s": None}
  dot = rf"config\.{section}\."
  message = (
    rf"unknown {dot}{names[0]}s \(did you mean {dot}{names[0]}\?\); "
    rf"missing {dot}{names[0]}\. Its fields here are {', '.join(names)}\."
  )
  with pytest.raises(ValueError, match=message):
    call(function, section, wrong, **more)


def test_a_call_gets_its_section_and_what_the_program_adds():
  def build(first, *, b, c, d=4):
    return first, b, c, d

  assert call(build, "s", {"b": 2, "d": 5}, 1, c=3) == (1, 2, 3, 5)
  # A default of the code is no default of a config.
  with pytest.raises(ValueError, match=r"missing config\.s\.d"):
    call(build, "s", {"b": 2}, 1, c=3)
  # What the program gives is not the config's to say.
  with pytest.raises(ValueError, match=r"unknown config\.s\.c"):
    call(build, "s", {"b": 2, "c": 3, "d": 5}, 1, c=3)


def test_a_model_is_its_variant_and_every_other_field():
  assert model_config(MODEL) == PixArtConfig(
    depth=2,
    width=48,
    num_heads=4,
    patch_size=2,
    base_size=4,
    pe_interpolation=0.5,
    in_channels=3,
    caption_width=16,
    caption_length=8,
    qk_norm=True,
    kv_compression=KVCompression(ratio=4, layers=(1,), operator="conv", norm=False),
  )


@pytest.mark.parametrize("name", MODEL)
def test_a_model_is_made_of_every_field_by_name(name):
  fields = {key: value for key, value in MODEL.items() if key != name}
  with pytest.raises(ValueError, match=rf"missing config\.model\.{name}\."):
    model_config(fields)


def test_a_variant_leaves_no_size_to_the_config():
  with pytest.raises(ValueError, match=r"unknown config\.model\.depth"):
    model_config({**MODEL, "depth": 3})


def test_a_typo_in_the_compression_is_found_in_its_own_section():
  compression = change(MODEL["kv_compression"], layers="layer")
  dot = r"config\.model\.kv_compression\."
  with pytest.raises(ValueError, match=rf"{dot}layer \(did you mean {dot}layers\?\)"):
    model_config({**MODEL, "kv_compression": compression})


def test_reading_a_section_leaves_it_as_it_was():
  before = {**MODEL, "kv_compression": dict(MODEL["kv_compression"])}
  model_config(MODEL)
  assert before == MODEL
