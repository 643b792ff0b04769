"""LoRAs of a pipeline: what they draw is what the merged model draws."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

from pixsigma_jax import checkpoint, tree
from pixsigma_jax.convert.lora import read_lora, write_lora
from pixsigma_jax.metadata import History
from pixsigma_jax.models import int8
from pixsigma_jax.models.layers import Compute
from pixsigma_jax.models.pixart import inference_params
from pixsigma_jax.sample import Pipeline, image_files, program
from pixsigma_jax.sample.adapters import read_adapter, read_flags
from pixsigma_jax.transforms import merge_lora
from tests import commands
from tests.convert.test_lora import (
  Adaptable,
  lora,
  output_of,
  random_adapter,
  theirs,
)
from tests.convert.test_pixart import random_model
from tests.sample import models

DRAW = {"num_inference_steps": 2, "guidance_scale": 1.0}
# Everything above the rounding of float32 through a few layers.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def config():
  return models.nano()


@pytest.fixture(scope="module")
def files(config, tmp_path_factory):
  """Three adapters on a disk: two LoRAs of other kernels and ranks, and a DoRA."""
  root = tmp_path_factory.mktemp("loras")
  params = models.random_params(config)
  for seed, (name, spec) in enumerate(
    {
      "style": lora(("qkv",)),
      "subject": lora(("qkv", "patch_embedding"), rank=2, alpha=1.0),
      "dora": lora(("qkv",), dora=True),
    }.items()
  ):
    write_lora(root / name, config, random_adapter(spec, params, seed), spec)
  return root


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
  root = tmp_path_factory.mktemp("model")
  models.save_snapshot(root, config, 7)
  return root


@pytest.fixture(scope="module")
def base(workdir):
  return Pipeline.from_checkpoint(workdir, compute=models.FLOAT32)


def latents_of(pipeline, **settings):
  pipeline = pipeline.replace(autoencoder=models.Tracing())
  pipeline("a red seven", seed=1, **{**DRAW, **settings})
  return pipeline.autoencoder.decoded[0]


def merged(pipeline, *adapters):
  """The same pipeline of parameters that the transform has merged."""
  params = models.random_params(pipeline.config)
  for path, scale in adapters:
    change = read_lora(path, pipeline.config)
    _, params = merge_lora(pipeline.config, params, adapter=change, scale=scale)
  return pipeline.replace(params=inference_params(params, pipeline.compute))


def assert_equal_params(one, other):
  have, want = tree.named_leaves(one.params), tree.named_leaves(other.params)
  assert have.keys() == want.keys()
  for name, leaf in want.items():
    np.testing.assert_array_equal(have[name], leaf, err_msg=name)


def test_a_lora_draws_what_the_merged_model_draws_to_the_bit(base, workdir, files):
  # As parameters lie on an accelerator, and on a CPU.
  apart = Compute(dtype=jnp.float32, unroll=True)
  apart = Pipeline.from_checkpoint(workdir, compute=apart)
  for pipeline in (apart, base):
    for name, scale in (("subject", 0.7), ("dora", 1.0)):
      with_lora = pipeline.load_lora_weights(files / name, "it")
      with_lora = with_lora.set_adapters("it", scale)
      assert_equal_params(with_lora, merged(pipeline, (files / name, scale)))
  np.testing.assert_array_equal(
    latents_of(with_lora), latents_of(merged(base, (files / "dora", 1.0)))
  )
  assert np.abs(latents_of(with_lora) - latents_of(base)).max() > 0.01


def test_a_lora_of_scale_0_and_one_taken_out_again_change_nothing(base, files):
  before = latents_of(base)
  with_lora = base.load_lora_weights(files / "style", "style")
  with_two = with_lora.load_lora_weights(files / "dora", "dora")
  for same in (
    with_lora.set_adapters("style", 0.0),
    with_two.set_adapters([]),
    with_two.set_adapters(["dora", "style"], 0),
    with_two.unload_lora_weights(),
  ):
    assert_equal_params(same, base)
  np.testing.assert_array_equal(latents_of(same), before)
  # What was loaded is still there for whoever holds it.
  assert_equal_params(with_lora, merged(base, (files / "style", 1.0)))


def test_two_loras_are_their_merged_sum(base, files):
  scales = {"style": 0.8, "subject": -0.5}
  both = base
  for name in scales:
    both = both.load_lora_weights(files / name, name)
  both = both.set_adapters(list(scales), list(scales.values()))
  want = merged(base, *((files / name, scale) for name, scale in scales.items()))
  have, want = latents_of(both), latents_of(want)
  assert np.abs(have - want).max() < TOLERANCE * np.abs(want).max()
  assert np.abs(latents_of(base) - want).max() > 0.01


def test_switching_and_weighting_compile_nothing(base, files):
  first = latents_of(base, num_inference_steps=3)
  compiled = program.sample._cache_size()
  pipeline = base.load_lora_weights(files / "style", "style")
  pipeline = pipeline.load_lora_weights(files / "subject", "subject")
  drawn = [first]
  for names, weights in (
    ("style", 1.0),
    ("style", 0.3),
    (["style", "subject"], [0.3, 2.0]),
    ("subject", None),
  ):
    pipeline = pipeline.set_adapters(names, weights)
    drawn.append(latents_of(pipeline, num_inference_steps=3))
  assert program.sample._cache_size() == compiled
  for i, one in enumerate(drawn):
    for other in drawn[:i]:
      assert np.abs(one - other).max() > 1e-4


def test_rounded_and_quantized_kernels_are_merged_before_they_are_rounded(
  workdir, config, files
):
  pytest.importorskip("qwix")
  for compute, quantize in (
    (Compute(dtype=jnp.bfloat16, unroll=True), "none"),
    (Compute(dtype=jnp.bfloat16), "int8"),
  ):
    pipeline = Pipeline.from_checkpoint(workdir, compute=compute, quantize=quantize)
    with_lora = pipeline.load_lora_weights(files / "style")
    params = models.random_params(config)
    change = read_lora(files / "style", config)
    _, params = merge_lora(config, params, adapter=change)
    if quantize == "int8":
      params = int8.quantize(params)
    want = pipeline.replace(params=inference_params(params, compute))
    assert_equal_params(with_lora, want)
    assert_equal_params(with_lora.unload_lora_weights(), pipeline)
  # Without the checkpoint nobody knows the unrounded ones.
  with pytest.raises(ValueError, match=r"are quantized, .* make the pipeline by from_"):
    models.pipeline(config, pipeline.params).load_lora_weights(files / "style")
  # A pipeline of parameters in memory merges into those.
  own = models.pipeline(config)
  assert_equal_params(
    own.load_lora_weights(files / "style"), merged(own, (files / "style", 1.0))
  )


def test_devices_keep_their_shards(files, workdir):
  from pixsigma_jax import sharding

  mesh = sharding.make_mesh(data=1, fsdp=2, context=1, devices=jax.devices()[:2])
  compute = Compute(dtype=jnp.float32)
  pipeline = Pipeline.from_checkpoint(workdir, compute=compute, batch_size=2, mesh=mesh)
  with_lora = pipeline.load_lora_weights(files / "style")
  assert_equal_params(with_lora, merged(pipeline, (files / "style", 1.0)))
  for new, old in zip(
    *map(jax.tree.leaves, (with_lora.params, pipeline.params)), strict=True
  ):
    assert new.sharding == old.sharding


def test_peft_with_several_adapters_is_our_pipeline(tmp_path):
  config, params = random_model()
  model = theirs(config, params)
  torch.manual_seed(0)
  for name, fields in (
    ("style", {"target_modules": ["to_q", "to_v", "ff.net.2"]}),
    ("subject", {"target_modules": ["to_q"], "use_rslora": True}),
    ("dora", {"target_modules": ["to_q", "to_k"], "use_dora": True}),
  ):
    settings = peft.LoraConfig(r=4, lora_alpha=6, **fields)
    if isinstance(model, peft.PeftModel):
      model.add_adapter(name, settings)
    else:
      model = peft.get_peft_model(model, settings, adapter_name=name)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if "lora_" in name:
        parameter.add_(0.1 * torch.randn_like(parameter))
  model.save_pretrained(tmp_path)
  pipeline = models.pipeline(
    config, params, null_caption=None, autoencoder=_Any(4), text_encoder=_Any(32)
  )
  for name in ("style", "subject", "dora"):
    pipeline = pipeline.load_lora_weights(tmp_path / name, name)
  two = pipeline.set_adapters(["style", "subject"])
  model.eval()
  for ours, names in (
    (two, ["style", "subject"]),
    (pipeline, list(pipeline.loras.scales)),
  ):
    model.base_model.set_adapter(names)
    want = output_of(model, config)
    have = output_of(theirs(config, ours.params), config)
    assert np.abs(have - want).max() < TOLERANCE * np.abs(want).max()


class _Any:
  """An autoencoder or a text encoder that nobody calls."""

  scaling_factor = 1.0
  downsampling = 8

  def __init__(self, size):
    self.channels = self.width = size


def test_diffusers_with_a_weight_is_our_pipeline_at_that_scale(tmp_path):
  config, params = random_model()
  spec = lora(("attention/", "mlp/"))
  write_lora(tmp_path / "style", config, random_adapter(spec, params), spec)
  model = theirs(config, params, Adaptable)
  file = "pytorch_lora_weights.safetensors"
  model.load_lora_adapter(
    str(tmp_path / "style"), weight_name=file, adapter_name="style"
  )
  model.set_adapters("style", 0.4)
  pipeline = models.pipeline(
    config, params, null_caption=None, autoencoder=_Any(4), text_encoder=_Any(32)
  )
  pipeline = pipeline.load_lora_weights(tmp_path / "style", "s", weight_name=file)
  pipeline = pipeline.set_adapters("s", 0.4)
  have, want = (output_of(m, config) for m in (theirs(config, pipeline.params), model))
  assert np.abs(have - want).max() < TOLERANCE * np.abs(want).max()


def test_an_image_says_which_loras_drew_it_at_which_scale(
  capsys, monkeypatch, workdir, files, tmp_path
):
  arguments = (
    *(f"--checkpoint={workdir}", "--prompt=a red seven", "--num_inference_steps=1"),
    "--dtype=float32",
  )

  def draw(folder, *more):
    return commands.run(
      *(capsys, monkeypatch, "sample", *arguments, f"--output={tmp_path / folder}"),
      *more,
    )

  done = draw("both", f"--lora={files / 'style'}:0.5", f"--lora={files / 'dora'}")
  assert done.code == 0, done.err
  about = image_files.settings_of(tmp_path / "both" / "00000.png")
  assert [(x["path"], x["scale"]) for x in about["loras"]] == [
    (str(files / "style"), 0.5),
    (str(files / "dora"), 1.0),
  ]
  found = {x["fingerprint"] for x in about["loras"]}
  assert len(found) == 2
  done = draw("none", f"--lora={files / 'style'}:0")
  assert done.code == 0, done.err
  assert "loras" not in image_files.settings_of(tmp_path / "none" / "00000.png")
  # The command that draws the rest after Ctrl-C has each of them.
  with monkeypatch.context() as patch:

    def interrupt(*_, **__):
      raise KeyboardInterrupt

    stream = Pipeline.stream

    def one(self, *given, **settings):
      yield next(iter(stream(self, *given, **settings)))
      interrupt()

    patch.setattr(Pipeline, "stream", one)
    loras = [f"--lora={files / name}" for name in ("style", "dora")]
    done = draw("rest", *loras, "--prompt=a green two")
  assert done.code == 130
  assert all(word in done.err.split() for word in loras), done.err


def test_a_run_that_trains_a_lora_is_one_and_not_twice(config, tmp_path, caplog):
  params = models.random_params(config)
  base = tree.fingerprint(params)
  spec = lora(("qkv",))
  run = History("a" * 12)
  for step in (5, 10):
    adapter = random_adapter(spec, params, seed=step)
    note = {"base": base, "run": run.run, "step": step}
    write_lora(tmp_path / "run" / "adapters" / str(step), config, adapter, spec, note)
  # As the run's own snapshot has it.
  checkpoint.save_snapshot(
    tmp_path / "run",
    10,
    params=spec.merged(params, adapter),
    null_caption=models.null_caption(config),
    metadata=models.metadata(config, history=run),
  )
  models.save_snapshot(tmp_path / "parent", config, 3)
  models.save_snapshot(tmp_path / "other", config, 3, seed=9)
  parent, other, own = (
    Pipeline.from_checkpoint(tmp_path / name, compute=models.FLOAT32)
    for name in ("parent", "other", "run")
  )
  newest = tmp_path / "run" / "adapters" / "10"
  for path in (newest, newest.parent):
    assert read_adapter(path, config).path == str(newest)
  with_lora = parent.load_lora_weights(tmp_path / "run")
  have, want = (
    p.params["blocks_00_00"]["attention"]["qkv"]["kernel"] for p in (with_lora, own)
  )
  # The trainer scales the product, a file one of its factors.
  np.testing.assert_allclose(have, want, rtol=0, atol=1e-6)
  assert "fit less well" not in caplog.text
  other.load_lora_weights(tmp_path / "run")
  assert re.search(rf"fingerprint {base}, and .*other.* fit less well", caplog.text)
  with pytest.raises(ValueError, match=r"trained by the run that made .*already"):
    own.load_lora_weights(tmp_path / "run")
  with pytest.raises(FileNotFoundError, match=r"is a run without adapters/"):
    parent.load_lora_weights(tmp_path / "parent")


def test_what_cannot_be_is_refused_by_name(base, files, config, tmp_path):
  wider = dataclasses.replace(config, width=64)
  spec = lora(("qkv",))
  params = models.random_params(wider)
  write_lora(tmp_path / "wider", wider, random_adapter(spec, params), spec)
  with pytest.raises(
    ValueError, match=rf"is no LoRA for a PixArt of {config.depth} layers of width"
  ):
    base.load_lora_weights(tmp_path / "wider")
  with pytest.raises(FileNotFoundError, match="There is no adapter at"):
    base.load_lora_weights(tmp_path / "none")
  with_lora = base.load_lora_weights(files / "style", "style")
  for call, message in (
    (lambda: with_lora.load_lora_weights(files / "dora", "style"), "'style' already"),
    (
      lambda: with_lora.set_adapters("other"),
      "no LoRA called 'other': loaded are style",
    ),
    (lambda: with_lora.set_adapters("style", np.nan), "style must be finite, not nan"),
    (lambda: with_lora.set_adapters(["style"], [1.0, 2.0]), "2 weights do not go with"),
    (lambda: read_flags([f"{files}/style:inf"], config), "must be finite, not inf"),
    (lambda: read_flags([f"{files}/style"] * 2, config), "style is given twice"),
  ):
    with pytest.raises(ValueError, match=message):
      call()
  # A colon in a name is the name's.
  (tmp_path / "a:1").symlink_to(files / "style")
  assert list(read_flags([f"{tmp_path}/a:1", f"{files}/dora:0.5"], config)) == [
    f"{tmp_path}/a:1",
    f"{files}/dora",
  ]


KINDS = {
  "hada_w1_a": "a LoHa",
  "lokr_w1": "a LoKr",
  "lora_mid.weight": "a LoCon in Tucker's form",
  "dora_scale": "a DoRA of LyCORIS",
  "oft_blocks": "an OFT or BOFT",
  "on_input": r"an \(IA\)³",
  "a1.weight": "a GLoRA",
  "diff_b": "a change of whole matrices",
}


@pytest.mark.parametrize("ending", KINDS)
def test_a_kind_of_lycoris_is_refused_by_its_name(config, files, tmp_path, ending):
  tensors = load_file(files / "style" / "pytorch_lora_weights.safetensors")
  name = f"lora_transformer_transformer_blocks_0_attn1_to_q.{ending}"
  save_file({**tensors, name: np.ones(4, np.float32)}, tmp_path / "it.safetensors")
  with pytest.raises(ValueError, match=rf"{KINDS[ending]} \({re.escape(name)}\)"):
    read_lora(tmp_path / "it.safetensors", config)
