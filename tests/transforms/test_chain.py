"""Transforms of a whole model: what it says of itself stays true."""

import dataclasses

import numpy as np
import pytest

from pixsigma_jax import tree
from pixsigma_jax.metadata import disagreements
from pixsigma_jax.transforms import (
  TRANSFORMS,
  Model,
  apply_transforms,
  summary,
  with_defaults,
)
from tests.sample import models

CONFIG = models.nano()
SD = {"name": "sd-vae", "latent_channels": 3, "downsampling": 8}


def model(config=CONFIG, seed=0, **fields):
  fields = {"provenance": ({"stage": "first"},), **fields}
  return Model(
    config=config,
    params=models.random_params(config, seed),
    null_caption=models.null_caption(config),
    metadata=models.metadata(config, **fields),
  )


def unread(path):
  raise AssertionError(path)


def applied(before, *transforms, read=unread):
  return apply_transforms(before, transforms, read=read, read_lora=unread)


def test_a_transform_is_found_by_its_own_name():
  assert {name: f.__name__ for name, f in TRANSFORMS.items()} == {
    name: name for name in TRANSFORMS
  }
  assert set(TRANSFORMS) == {
    *("interpolate_pe", "extend_pe", "swap_vae", "alpha_to_sigma", "average"),
    *("post_hoc_ema", "grow_depth"),
    *("add_kv_compression", "remove_kv_compression", "merge_lora", "unmerge_lora"),
  }


def test_each_transform_is_told_of_with_what_it_changed():
  told = []

  def on_change(name, before, after):
    told.append((name, before, after, summary(before, after)))

  first = model(autoencoder=SD, scaling_factor=0.18215)
  chain = (
    {"name": "interpolate_pe", "base_size": 8},
    {"name": "swap_vae", "scaling_factor": 0.25},
    {"name": "remove_kv_compression"},
  )
  last = apply_transforms(
    first, chain, read=unread, read_lora=unread, on_change=on_change
  )
  assert [name for name, *_ in told] == [transform["name"] for transform in chain]
  assert told[0][1] is first
  assert told[1][1] is told[0][2]
  assert told[-1][2] is last
  positions, swap, removal = (line for *_, line in told)
  leaves = len(tree.named_leaves(first.params))
  assert positions == (
    "base_size: 4 → 8; pe_interpolation: 1.0 → 2.0; "
    f"{leaves} of {leaves} leaves as they were"
  )
  assert "autoencoder.name: 'sd-vae' → 'kl-vae'" in swap
  assert "scaling_factor: 0.18215 → 0.25" in swap
  assert swap.endswith(f"{leaves} of {leaves} leaves as they were")
  assert "kv_compression.ratio: 4 → 1" in removal
  sizes = f"{tree.size(first.params):,} → {tree.size(last.params):,} parameters"
  assert removal.endswith(f"leaves as they were; {sizes}")
  assert tree.size(first.params) > tree.size(last.params)


def test_transforms_follow_each_other_and_metadata_follow_them():
  before = model()
  after = applied(
    before,
    {"name": "interpolate_pe", "base_size": 8},
    {"name": "remove_kv_compression"},
  )
  config = dataclasses.replace(
    CONFIG,
    base_size=8,
    pe_interpolation=2.0,
    kv_compression=type(CONFIG.kv_compression)(),
  )
  assert after.config == config
  assert after.null_caption is before.null_caption
  # Lists, as JSON has them: compared with what is read back, tuples would differ.
  fields = {
    **config.to_dict(),
    "kv_compression": after.metadata.model["kv_compression"],
  }
  assert after.metadata.model["kv_compression"]["layers"] == []
  assert after.metadata == dataclasses.replace(
    before.metadata, model=fields, resolution=16
  )


def test_no_transform_is_the_model_itself():
  before = model()
  assert applied(before) is before


def test_a_swapped_vae_is_named_and_its_image_size_is_said():
  before = model(autoencoder=SD, scaling_factor=0.18215, resolution=64)
  after = applied(before, {"name": "swap_vae", "scaling_factor": 0.13025})
  assert after.metadata.autoencoder == {**SD, "name": "sdxl-vae"}
  assert after.metadata.scaling_factor == 0.13025
  assert after.metadata.resolution == 64
  assert after.params is before.params

  coarse = {"name": "mine", "latent_channels": 5, "downsampling": 32}
  arguments = {"scaling_factor": 0.4, "channels": 5, "autoencoder": coarse}
  after = applied(before, {"name": "swap_vae", **arguments})
  assert after.metadata.autoencoder == coarse
  assert after.metadata.resolution == 4 * 2 * 32
  assert after.metadata.model["in_channels"] == 5


def test_an_autoencoder_without_weights_stays_what_it_is():
  before = model()
  after = applied(before, {"name": "swap_vae", "scaling_factor": 0.5})
  assert after.metadata.autoencoder == before.metadata.autoencoder
  assert after.metadata.scaling_factor == 0.5


def test_sigma_has_sdxls_latents_and_the_text_encoders_null_caption():
  alpha = {"autoencoder": SD, "scaling_factor": 0.18215, "resolution": 64}
  after = applied(model(**alpha), {"name": "alpha_to_sigma"})
  assert after.null_caption is None
  assert after.metadata.autoencoder == {**SD, "name": "sdxl-vae"}
  assert after.metadata.scaling_factor == 0.13025
  assert after.metadata.model["caption_length"] == 300

  kept = {"name": "alpha_to_sigma", "scaling_factor": None}
  after = applied(model(**alpha), kept)
  assert after.metadata.autoencoder == SD
  assert after.metadata.scaling_factor == 0.18215


def test_others_are_read_by_path_and_averaged_in_their_order():
  first, others, read = model(), {"b": model(seed=1), "c": model(seed=2)}, []

  def reader(path):
    return others[path].metadata, lambda: read.append(path) or others[path].params

  transform = {"name": "average", "others": ["b", "c"], "weights": (0.5, 0.25, 0.25)}
  after = applied(first, transform, read=reader)
  name = "patch_embedding"
  expected = 0.5 * first.params[name]["bias"] + 0.25 * (
    others["b"].params[name]["bias"] + others["c"].params[name]["bias"]
  )
  np.testing.assert_allclose(after.params[name]["bias"], expected, atol=1e-6)
  assert read == ["b", "c"]  # each once
  assert disagreements(after.metadata.to_json(), first.metadata.to_json()) == []


@pytest.mark.parametrize(
  ("other", "message"),
  [
    ({"scaling_factor": 1.0}, r"b is another model .*: scaling_factor: 2.0 → 1.0"),
    ({"config": models.nano(qk_norm=True)}, r"b is another .*model.qk_norm: False → T"),
  ],
)
def test_models_that_do_not_go_together_are_not_even_read(other, message):
  transform = {"name": "average", "others": "b", "weights": (0.5, 0.5)}
  with pytest.raises(ValueError, match=message):
    applied(
      model(), transform, read=lambda _: (model(**other).metadata, lambda: unread("b"))
    )


@pytest.mark.parametrize(
  ("transform", "message"),
  [
    ({"name": "swap"}, r"Unknown transform 'swap' \(choose from interpolate_pe, "),
    ({"base_size": 8}, "Unknown transform None"),
    (
      {"name": "interpolate_pe"},
      r"interpolate_pe cannot .*missing .*'base_size'\. Its arguments are base_size\.",
    ),
    (
      {"name": "remove_kv_compression", "ratio": 4},
      r"unexpected keyword argument 'ratio'\. Its arguments are none\.",
    ),
    (
      {"name": "swap_vae", "scaling_factor": 1.0, "old_scaling_factor": 0.5},
      r"old_scaling_factor=0.5, but the model was trained with 2.0",
    ),
    (
      {"name": "swap_vae", "scaling_factor": 1.0, "channels": 4},
      r"pixels.* have 3 channels: say with autoencoder whose latents have 4",
    ),
    (
      {"name": "swap_vae", "scaling_factor": 1.0, "channels": 4, "autoencoder": SD},
      r"sd-vae.* do not have 4 channels",
    ),
  ],
)
def test_a_transform_that_does_not_fit_is_named(transform, message):
  with pytest.raises(ValueError, match=message):
    applied(model(), transform)


def test_all_transforms_are_looked_at_before_the_first_works(monkeypatch):
  monkeypatch.setitem(TRANSFORMS, "extend_pe", lambda config, params: unread("early"))
  with pytest.raises(ValueError, match="Unknown transform 'typo'"):
    applied(model(), {"name": "extend_pe"}, {"name": "typo"})


def test_what_is_not_said_is_filled_in():
  assert with_defaults("add_kv_compression", {"ratio": 4, "layers": (1,)}) == {
    **{"ratio": 4, "layers": (1,), "operator": "conv", "norm": True},
    **{"initialization": "average", "seed": 0},
  }
