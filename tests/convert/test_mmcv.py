"""The official repository's configs, in all their forms, as configs of ours."""

import importlib.util
import subprocess
import sys

import pytest

from pixsigma_jax.convert import mmcv
from pixsigma_jax.train.compatibility import check_config
from pixsigma_jax.train.config import model_config
from pixsigma_jax.train.program import make_program
from tests.train.runs import ROOT

# In the words of the official base and of a config on it, with every kind of value.
BASE = """
data_root = '/data/data'
data = dict(type='InternalData', root='images', load_vae_feat=True, load_t5_feat=True)
image_size = 256  # the generated image resolution
train_batch_size = 32
use_fsdp=False   # if use FSDP mode
fp32_attention = True
model = 'PixArt_XL_2'
pe_interpolation = 1.0
kv_compress = False
kv_compress_config = {'sampling': None, 'scale_factor': 1, 'kv_compress_layer': []}
num_workers=4
train_sampling_steps = 1000
model_max_length = 120
num_epochs = 80
gradient_accumulation_steps = 1
gradient_clip = 1.0
auto_lr = dict(rule='sqrt')
validation_prompts = ["dog", "a cat"]
optimizer = dict(type='AdamW', lr=1e-4, weight_decay=3e-2, eps=1e-10)
lr_schedule = 'constant'
lr_schedule_args = dict(num_warmup_steps=500)
mixed_precision = 'fp16'
scale_factor = 0.18215
ema_rate = 0.9999
log_interval = 50
load_from = None
resume_from = dict(checkpoint=None, load_ema=False)
snr_loss=False
real_prompt_ratio = 1.0
class_dropout_prob = 0.1
seed = 43
"""
CHILD = '''
"""A config of 1024 pixels."""
_base_ = ['../base.py']
image_list_json = ['data_info.json']
data = dict(
    type='InternalDataMSSigma', root='InternData', image_list_json=image_list_json,
    load_vae_feat=False)
image_size = 1024
model = 'PixArtMS_XL_2'
load_from = "output/pretrained_models/PixArt-Sigma-XL-2-1024-MS.pth"
resume_from = None
aspect_ratio_type = 'ASPECT_RATIO_1024'
multi_scale = True
pe_interpolation = 2.0
num_workers = 10
train_batch_size = 4  # 16
num_epochs = 2  # 3
grad_checkpointing = True
gradient_clip = 0.01
optimizer = dict(
    _delete_=True, type='CAMEWrapper', lr=2e-5, weight_decay=0.0,
    betas=(0.9, 0.999, 0.9999), eps=(1e-30, 1e-16))
visualize = True
scale_factor = 0.13025
real_prompt_ratio = 0.3
model_max_length = 300
kv_compress = True
kv_compress_config = {
    'sampling': 'conv', 'scale_factor': 2, 'kv_compress_layer': [14, 15, 26 + 1]}
skip_step = 0
my_own_field = -3
'''


@pytest.fixture
def source(tmp_path):
  (tmp_path / "configs" / "sigma").mkdir(parents=True)
  (tmp_path / "configs" / "base.py").write_text(BASE)
  path = tmp_path / "configs" / "sigma" / "img1024.py"
  path.write_text(CHILD)
  return path


def imported(path, gpus=16, images=100_000):
  return mmcv.import_mmcv(mmcv.read_mmcv(path), "s", gpus=gpus, images=images)


def load(path):
  spec = importlib.util.spec_from_file_location("imported", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


def test_dicts_of_a_child_are_merged_into_its_bases_unless_it_deletes_them(source):
  fields = mmcv.read_mmcv(source)
  assert fields["data"] == {
    "type": "InternalDataMSSigma",
    "root": "InternData",
    "image_list_json": ["data_info.json"],
    "load_vae_feat": False,
    "load_t5_feat": True,  # of the base
  }
  assert fields["optimizer"]["type"] == "CAMEWrapper"
  assert "_delete_" not in fields["optimizer"]
  assert fields["resume_from"] is None
  assert fields["kv_compress_config"]["kv_compress_layer"] == [14, 15, 27]
  assert fields["my_own_field"] == -3
  assert "_base_" not in fields


def test_what_is_written_is_a_config_of_ours_that_the_trainer_takes(source, tmp_path):
  target = tmp_path / "mine.py"
  command = [
    *(sys.executable, "-m", "pixsigma_jax.convert", "--from=mmcv"),
    *(str(source), str(target), "--gpus=16", "--images=100000"),
  ]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
  config = load(target)
  check_config(config.to_dict())
  make_program(config.to_dict(), mesh=None, scaling_factor=0.13025)
  model = model_config(config.model.to_dict())
  assert (model.base_size, model.pe_interpolation) == (64, 2.0)
  assert (model.caption_length, model.depth) == (300, 28)
  assert model.kv_compression.layers == (14, 15, 27)
  assert model.kv_compression.ratio == 4
  assert config.stage == "mine"
  assert config.batch_size == 64
  assert config.total_steps == 2 * (100_000 // 64)
  assert config.data.long_caption_ratio == 0.7
  assert config.init.parent == "weights/sigma-1024"
  assert config.seed == 43
  assert config.compute.to_dict()["remat"] == "block"
  assert config.compute.dtype == "bfloat16"
  assert config.log.prompts == ("dog", "a cat")
  assert config.log.sample_every == 250
  optimizer = config.optimizer
  assert (optimizer.name, optimizer.learning_rate) == ("came", 2e-5)
  assert (optimizer.clip_norm, optimizer.eps) == (0.01, (1e-30, 1e-16))
  assert optimizer.scale_rule == "sqrt"
  # accelerate moves the schedule on once a process: 500 / 16.
  assert optimizer.warmup_steps == 32
  # Everything else is said, both by the command and in the file.
  text = target.read_text()
  for line in (
    "inert: class_dropout_prob: never reaches the model",
    "inert: ema_rate: Σ's trainer keeps no average",
    "elsewhere: work_dir",
    "elsewhere: scale_factor: the manifest of the data",
    "unknown: my_own_field: left out",
    "note: auto_lr multiplies the learning rate by the sqrt of batch / 256",
    "note: mixed_precision fp16 became bfloat16",
  ):
    named = line in text
    assert named == (line in done.stdout)
    assert named == (line != "elsewhere: work_dir")  # which the source does not have
  assert done.stdout.endswith(f"{target}\n")


def test_every_field_of_the_source_goes_somewhere(source):
  fields = mmcv.read_mmcv(source)
  found = imported(source)
  named = {*found.elsewhere, *found.inert, *found.unknown}
  taken = set(fields) - named
  assert found.unknown == ("my_own_field",)
  assert taken.isdisjoint({*mmcv.INERT, *mmcv.ELSEWHERE})
  assert not set(mmcv.INERT) & set(mmcv.ELSEWHERE)
  # A field that is carried over changes ours when it changes.
  for name, other in {
    "image_size": 512,
    "pe_interpolation": 1.0,
    "model_max_length": 120,
    "train_batch_size": 8,
    "num_epochs": 3,
    "real_prompt_ratio": 0.25,
    "snr_loss": True,
    "gradient_clip": 1.0,
    "seed": 1,
    "log_interval": 7,
    "num_workers": 3,
    "grad_checkpointing": False,
    "gradient_accumulation_steps": 2,
    "kv_compress": False,
    "visualize": False,
    "load_from": None,
    "mixed_precision": "fp32",
    "lr_schedule": "cosine",
    "lr_schedule_args": {"num_warmup_steps": 0},
    "auto_lr": None,
    "validation_prompts": ["a dog"],
  }.items():
    assert name in taken | {"snr_loss"}
    changed = mmcv.import_mmcv(fields | {name: other}, "s", gpus=16, images=100_000)
    assert changed.fields != found.fields, name


def test_adamw_takes_the_place_of_came(tmp_path):
  (tmp_path / "base.py").write_text(BASE)
  mmcv.convert_config(tmp_path / "base.py", tmp_path / "ours.py", gpus=1, images=10_000)
  config = load(tmp_path / "ours.py")
  make_program(config.to_dict(), mesh=None, scaling_factor=0.18215)
  assert config.optimizer.name == "adamw"
  assert config.optimizer.eps == 1e-10
  assert config.optimizer.weight_decay == 3e-2
  assert "b3" not in config.optimizer
  assert config.optimizer.warmup_steps == 500


def test_alphas_own_name_for_the_scale_of_positions_is_read_too(source):
  fields = mmcv.read_mmcv(source)
  fields["lewei_scale"] = fields.pop("pe_interpolation")
  found = mmcv.import_mmcv(fields, "s", gpus=16, images=100_000)
  assert found.fields == imported(source).fields
  assert "lewei_scale" not in found.unknown


def test_compression_that_is_switched_off_is_spoken_of(source):
  source.write_text(CHILD.replace("kv_compress = True", "kv_compress = False"))
  found = imported(source)
  assert "model.kv_compression.ratio" not in found.fields
  assert any("kv_compress is False" in note for note in found.notes)


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("import os", r"img1024\.py, line 2: 'import os' is not a value"),
    ("x = open('f').read()", r"line 2: \"open\('f'\)\.read\(\)\" is not a value"),
    ("x = unknown", "line 2: 'unknown' is not a value"),
    ("x = [i for i in (1, 2)]", "is not a value"),
    ("x = dict(a)", r"'dict\(a\)' is not a value"),
    ("x = {**{}}", "is not a value"),
    ("x = 9 ** 99 ** 99", "is not a value"),
    ("x = 1 / 0", "is not a value"),
    ("x = 'a' + 'b'", "is not a value"),
    ("x = '{{_base_.image_size}}'", "is not a value"),
    ("x.y = 3", "is not a value"),
    ("x = (", "is no Python file"),
    ("_base_ = 'img1024.py'", "is a base of itself"),
    ("_base_ = 'gone.py'", r"There is no config .*gone\.py, the base of"),
    ("_base_ = ['../base.py', '../base.py']", "both set auto_lr, class_dropout_prob"),
  ],
)
def test_what_is_no_value_is_refused_with_its_line_and_never_run(source, line, message):
  source.write_text(f"\n{line}\n")
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    mmcv.read_mmcv(source)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"model": "PixArt_L_2"}, "model='PixArt_L_2' has no counterpart here"),
    ({"train_sampling_steps": 500}, "train_sampling_steps=500 has no counterpart"),
    ({"mixed_precision": "fp8"}, "mixed_precision='fp8' has no counterpart"),
    ({"lr_schedule": "cosine_decay_to_constant"}, "lr_schedule='cosine_decay_to_c"),
    ({"optimizer": {"type": "Lion", "lr": 1.0}}, r"optimizer\.type='Lion' has no"),
    (
      {"optimizer": {"type": "AdamW", "lr": 1.0, "foo": 1}},
      "optimizer has fields that are unknown: foo",
    ),
    (
      {"kv_compress_config": {"sampling": "uniform_every", "scale_factor": 2}},
      "sampling='uniform_every' and scale_factor=2, which have no counterpart",
    ),
  ],
)
def test_a_value_without_a_counterpart_is_named(source, change, message):
  fields = mmcv.read_mmcv(source) | change
  with pytest.raises(ValueError, match=message):
    mmcv.import_mmcv(fields, "s", gpus=1, images=1000)


def test_what_is_there_is_left_as_it_is(source, tmp_path):
  target = tmp_path / "mine.py"
  target.write_text("mine")
  with pytest.raises(FileExistsError, match=r"mine\.py exists already"):
    mmcv.convert_config(source, target, gpus=1, images=1)
  with pytest.raises(ValueError, match="--gpus=0 and --images=1 must be at least 1"):
    mmcv.convert_config(source, tmp_path / "b.py", gpus=0, images=1)
  assert not (tmp_path / "b.py").exists()
