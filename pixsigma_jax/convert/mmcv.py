"""Configs of the official repository, made into config files of ours.

Theirs are Python that mmcv runs: names at the top level are the fields, `_base_` names
the files that they change, dicts are merged into the dicts of the base. Here nothing is
run: the file is parsed, and what is no literal value is refused with its line.

Nothing goes silently. Every field of the source is carried over, belongs to the data or
to a command line, does nothing in the official code either, or is named as unknown.
"""

import ast
import dataclasses
import math
import operator
import pathlib
import pprint
from collections.abc import Callable, Mapping
from typing import Any

from pixsigma_jax import disk
from pixsigma_jax.wording import listed, shortened

# Fields that the official training code does not read, or not to any effect; those of
# its latent consistency training, which is another program, among them.
INERT = {
  "class_dropout_prob": "never reaches the model: captions are dropped with 0.1 always",
  "ema_rate": "Σ's trainer keeps no average",
  "eval_batch_size": "not read",
  "gc_step": "each block is recomputed, whatever it says",
  "image_list_json": "part of `data`",
  "load_mask_index": "not read",
  "lora_rank": "not read by train.py",
  "mask_loss_coef": "not read",
  "mask_type": "not read",
  "num_group_tokens": "not read",
  "s3_work_dir": "not read",
  "save_image_epochs": "not read",
  "tensorboard_mox_interval": "not read",
  "cfg_scale": "of latent consistency training",
  "ema_decay": "of latent consistency training",
  "huber_c": "of latent consistency training",
  "loss_type": "of latent consistency training",
  "num_ddim_timesteps": "of latent consistency training",
  "w_max": "of latent consistency training",
  "w_min": "of latent consistency training",
}

# Fields whose place is elsewhere, and where.
ELSEWHERE = {
  "aspect_ratio_type": "prepare --resolution, --table",
  "data": "prepare --official or --index",
  "data_root": "prepare --official",
  "deterministic_validation": "grids of samples have fixed seeds always",
  "fp32_attention": "scores and softmax are float32 always",
  "multi_scale": "prepare --table: one that holds 1.0 alone gives squares",
  "resume_from": "a run goes on from its own workdir",
  "sample_posterior": "records hold the posterior, and every step draws from it",
  "save_model_epochs": "checkpoints count steps: config.checkpoint.every",
  "scale_factor": "the manifest of the data",
  "skip_step": "a run knows its place in the data",
  "use_fsdp": "config.mesh",
  "vae_pretrained": "prepare --frozen",
  "valid_num": "one program serves all aspect ratios: none has to be frequent",
  "work_dir": "train --workdir",
}

# Published files → their names among the releases of `convert --release`.
_PUBLISHED = {
  "PixArt-Sigma-XL-2-256x256": "sigma-256",
  "PixArt-Sigma-XL-2-512-MS": "sigma-512",
  "PixArt-Sigma-XL-2-1024-MS": "sigma-1024",
  "PixArt-Sigma-XL-2-2K-MS": "sigma-2048",
  "PixArt-XL-2-256x256": "alpha-256",
  "PixArt-XL-2-512x512": "alpha-512",
  "PixArt-XL-2-1024-MS": "alpha-1024",
}

_MODELS = ("PixArt_XL_2", "PixArtMS_XL_2")
_PATCH = 16  # pixels to a token of XL/2 on latents of a VAE
_OPERATORS = {"conv": "conv", "uniform": "discard", "ave": "discard"}
_DTYPES = {"fp16": "bfloat16", "bf16": "bfloat16", "fp32": "float32", "no": "float32"}
_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
  ast.Add: operator.add,
  ast.Sub: operator.sub,
  ast.Mult: operator.mul,
  ast.Div: operator.truediv,
  ast.FloorDiv: operator.floordiv,
  ast.Pow: operator.pow,
}


@dataclasses.dataclass(frozen=True)
class Imported:
  """An imported config, and what happened to each field of its source.

  Attributes:
    fields: ours by their dotted names; others have their defaults.
    notes: what to do or to know about it, a sentence each.
    elsewhere: fields that belong elsewhere → where.
    inert: fields that do nothing in the official code → why.
    unknown: all others.
  """

  fields: dict[str, Any]
  notes: tuple[str, ...]
  elsewhere: dict[str, str]
  inert: dict[str, str]
  unknown: tuple[str, ...]

  def report(self) -> list[str]:
    """One line for each source field that the written file does not contain."""
    lines = [f"note: {note}" for note in self.notes]
    lines += [f"elsewhere: {name}: {where}" for name, where in self.elsewhere.items()]
    lines += [f"inert: {name}: {why}" for name, why in self.inert.items()]
    lines += [f"unknown: {name}: left out" for name in self.unknown]
    return lines


def read_mmcv(path: pathlib.Path) -> dict[str, Any]:
  """The fields of an mmcv config, those of its `_base_` included.

  Raises:
    FileNotFoundError: it, or a base, is not there.
    ValueError: it is no Python, or holds what is not a literal value; names the line.
  """
  return _read(path, ())


def _read(path: pathlib.Path, children: tuple[pathlib.Path, ...]) -> dict[str, Any]:
  path = path.resolve()
  if path in children:
    raise ValueError(f"{path} is a base of itself, through {children[-1]}.")
  if not path.is_file():
    whose = f", the base of {children[-1]}" if children else ""
    raise FileNotFoundError(f"There is no config {path}{whose}.")
  try:
    module = ast.parse(path.read_text(encoding="utf-8"))
  except (SyntaxError, ValueError) as error:
    raise ValueError(f"{path} is no Python file: {error}.") from error
  own: dict[str, Any] = {}
  for statement in module.body:
    if _is_text(statement):
      continue
    match statement:
      case ast.Assign(targets=[ast.Name(id=name)], value=value):
        own[name] = _value(value, own, path)
      case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
        own[name] = _value(value, own, path)
      case _:
        raise _refusal(statement, path)
  bases = own.pop("_base_", [])
  merged: dict[str, Any] = {}
  for base in [bases] if isinstance(bases, str) else bases:
    found = _read(path.parent / base, (*children, path))
    if twice := sorted(set(found) & set(merged)):
      raise ValueError(f"The bases of {path} both set {', '.join(twice)}.")
    merged |= found
  return _merge(merged, own)


def _is_text(statement: ast.stmt) -> bool:
  return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _merge(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
  """mmcv's rule: dict into dict, unless the child says `_delete_=True`."""
  merged = dict(base)
  for name, value in own.items():
    if isinstance(value, dict):
      value = dict(value)
      deletes = value.pop("_delete_", False)
      inherited = merged.get(name)
      if isinstance(inherited, dict) and not deletes:
        value = _merge(inherited, value)
    merged[name] = value
  return merged


def _value(node: ast.expr, known: Mapping[str, Any], path: pathlib.Path) -> Any:
  """A literal, or what simple arithmetic and names above it make of literals."""

  def value(node: ast.expr) -> Any:
    return _value(node, known, path)

  match node:
    case ast.Constant(value=constant) if "{{" not in str(constant):
      return constant
    case ast.List(elts=items):
      return [value(item) for item in items]
    case ast.Tuple(elts=items):
      return tuple(value(item) for item in items)
    case ast.Dict(keys=keys, values=values) if all(keys):
      pairs = zip(keys, values, strict=True)
      return {value(key): value(item) for key, item in pairs if key is not None}
    case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords) if all(
      keyword.arg for keyword in keywords
    ):
      return {keyword.arg: value(keyword.value) for keyword in keywords}
    case ast.Name(id=name) if name in known:
      return known[name]
    case ast.UnaryOp(op=ast.USub(), operand=operand):
      return -_number(value(operand), node, path)
    case ast.BinOp(left=left, op=kind, right=right) if type(kind) in _ARITHMETIC:
      numbers = [_number(value(side), node, path) for side in (left, right)]
      try:
        return _ARITHMETIC[type(kind)](*numbers)
      except ArithmeticError as error:
        raise _refusal(node, path) from error
  raise _refusal(node, path)


def _number(value: Any, node: ast.AST, path: pathlib.Path) -> Any:
  # Within what a config can mean: 9**9**9 must not be computed.
  if isinstance(value, bool) or not isinstance(value, int | float) or value**2 > 1e24:
    raise _refusal(node, path)
  return value


def _refusal(node: ast.stmt | ast.expr | ast.AST, path: pathlib.Path) -> ValueError:
  line = getattr(node, "lineno", "?")
  text = ast.unparse(node).splitlines()[0]
  return ValueError(
    f"{path}, line {line}: {shortened(text)} is not a value. A config is read, not "
    "run: write out what it stands for."
  )


def import_mmcv(
  source: Mapping[str, Any], name: str, *, gpus: int, images: int
) -> Imported:
  """Fields of an official config as fields of ours.

  Args:
    source: see `read_mmcv`.
    name: of the stage.
    gpus: how many the official launcher would have had: batch size, length, warm-up and
      learning rate depend on it.
    images: in the official data: an epoch.

  Raises:
    ValueError: a value that has no counterpart here; names it.
  """
  if min(gpus, images) < 1:
    raise ValueError(f"--gpus={gpus} and --images={images} must be at least 1.")
  left = dict(source)
  notes: list[str] = []
  fields: dict[str, Any] = {"stage": name}

  def take(field: str, default: Any) -> Any:
    return left.pop(field, default)

  def known(field: str, default: Any, choices: Any) -> Any:
    value = take(field, default)
    if value not in choices:
      raise ValueError(
        f"{field}={value!r} has no counterpart here: only "
        f"{', '.join(map(repr, choices))} have."
      )
    return value

  # ------------------------------------------------------------------------- model
  known("model", "PixArt_XL_2", _MODELS)
  resolution = take("image_size", 256)
  scale = take("pe_interpolation", None)
  if scale is None:  # as α's own repository calls it
    scale = take("lewei_scale", 1.0)
  fields["model.base_size"] = resolution // _PATCH
  fields["model.pe_interpolation"] = float(scale)
  fields["model.caption_length"] = take("model_max_length", 120)
  fields["model.qk_norm"] = take("qk_norm", False)
  fields["model.size_conditions"] = take("micro_condition", False)
  compression = take("kv_compress_config", None) or {}
  if take("kv_compress", False):
    for field, value in _kv_compression(compression, notes).items():
      fields[f"model.kv_compression.{field}"] = value
  elif compression.get("kv_compress_layer"):
    notes.append(
      "kv_compress is False, so its kv_compress_config does nothing in the official "
      "code either"
    )

  # ------------------------------------------------------------------ data and loss
  fields["data.path"] = f"runs/{name}/data/{resolution}px"
  fields["data.long_caption_ratio"] = round(1 - take("real_prompt_ratio", 1.0), 6)
  fields["data.num_threads"] = take("num_workers", 4)
  fields["loss.snr_switch"] = take("snr_loss", False)
  known("train_sampling_steps", 1000, (1000,))
  notes.append(
    f"prepare the data in {fields['data.path']}: docs/data.md; latents are of "
    f"scale_factor {source.get('scale_factor', 0.18215)}"
  )

  # --------------------------------------------------- length, batch, learning rate
  accumulation = take("gradient_accumulation_steps", 1)
  rows = take("train_batch_size", 32) * gpus
  fields["batch_size"] = rows * accumulation
  fields["accumulation"] = accumulation
  epochs = take("num_epochs", 80)
  fields["total_steps"] = max(epochs * (images // fields["batch_size"]), 1)
  fields |= _optimizer(left, gpus, fields["total_steps"], notes)
  fields["seed"] = take("seed", 43)

  # ------------------------------------------------------------------------ compute
  precision = known("mixed_precision", "fp16", _DTYPES)
  fields["compute.dtype"] = _DTYPES[precision]
  if precision == "fp16":
    notes.append("mixed_precision fp16 became bfloat16, which needs no loss scaling")
  fields["compute.remat"] = "block" if take("grad_checkpointing", False) else "none"

  # ------------------------------------------------------------------------- parent
  fields["init.parent"], fields["init.transforms"] = (
    _parent(take("load_from", None)),
    (),
  )
  if parent := fields["init.parent"]:
    notes.append(f"convert load_from={source['load_from']!r} to {parent}")

  # ------------------------------------------------------------------------ logging
  fields["log.every"] = take("log_interval", 50)
  fields["checkpoint.every"] = take("save_model_steps", 1_000_000)
  grid_every = take("eval_sampling_steps", 250)
  fields["log.sample_every"] = grid_every if take("visualize", False) else 0
  if prompts := take("validation_prompts", None):
    fields["log.prompts"] = tuple(prompts)

  return Imported(
    fields,
    tuple(notes),
    {field: where for field, where in ELSEWHERE.items() if field in left},
    {field: why for field, why in INERT.items() if field in left},
    tuple(sorted(set(left) - set(ELSEWHERE) - set(INERT))),
  )


def _kv_compression(source: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
  sampling, side = source.get("sampling"), int(source.get("scale_factor", 1))
  if sampling not in _OPERATORS or side not in (2, 3, 4):
    raise ValueError(
      f"kv_compress_config has sampling={sampling!r} and scale_factor={side}, which "
      f"have no counterpart here: only {', '.join(_OPERATORS)}, and 2, 3, 4 have."
    )
  if sampling == "ave":
    notes.append("sampling 'ave' takes each window's first token, no average: discard")
  return {
    "ratio": side**2,
    "layers": tuple(source.get("kv_compress_layer", ())),
    "operator": _OPERATORS[sampling],
    "norm": True,
  }


def _optimizer(
  left: dict[str, Any], gpus: int, total_steps: int, notes: list[str]
) -> dict[str, Any]:
  """Takes the optimizer's fields out of `left`."""
  source = dict(left.pop("optimizer", {"type": "AdamW", "lr": 1e-4}))
  kind, adamw = source.pop("type", None), {}
  fields: dict[str, Any] = {
    "learning_rate": source.pop("lr"),
    "weight_decay": source.pop("weight_decay", 0.0),
  }
  if kind == "CAMEWrapper":
    betas = source.pop("betas", (0.9, 0.999, 0.9999))
    fields |= dict(zip(("b1", "b2", "b3"), betas, strict=True))
    fields["eps"] = tuple(source.pop("eps", (1e-30, 1e-16)))
    fields["clip_threshold"] = source.pop("clip_threshold", 1.0)
  elif kind == "AdamW":
    b1, b2 = source.pop("betas", (0.9, 0.999))
    adamw = {"name": "adamw", "b1": b1, "b2": b2, "eps": source.pop("eps", 1e-8)}
  else:
    raise ValueError(
      f"optimizer.type={kind!r} has no counterpart here: only 'CAMEWrapper' and "
      "'AdamW' have."
    )
  if source:
    raise ValueError(f"optimizer has fields that are unknown: {listed(source)}.")
  fields["clip_norm"] = left.pop("gradient_clip", 1.0)
  rule = left.pop("auto_lr", None)
  fields["scale_rule"] = rule["rule"] if rule else "none"
  if rule:
    notes.append(
      f"auto_lr multiplies the learning rate by the {rule['rule']} of batch / 256, in "
      "the official code without a word: optimizer.scale_rule does, and is logged"
    )
  schedule = left.pop("lr_schedule", "constant")
  if schedule not in ("constant", "cosine"):
    raise ValueError(
      f"lr_schedule={schedule!r} has no counterpart here: only 'constant' and "
      "'cosine' have."
    )
  fields["schedule"] = schedule
  warmup = left.pop("lr_schedule_args", {}).get("num_warmup_steps", 0)
  # Each of the processes advances accelerate's schedule at every update.
  updates = min(math.ceil(warmup / gpus), total_steps - 1)
  fields["warmup_steps"] = updates
  if updates != warmup:
    notes.append(
      f"num_warmup_steps={warmup} are {updates} updates on {gpus} GPUs, of "
      f"{total_steps} in all"
    )
  return ({"optimizer": adamw} if adamw else {}) | {
    f"optimizer.{name}": value for name, value in fields.items()
  }


def _parent(load_from: str | None) -> str:
  """Folder, as in the docs, of the published model that a file's name refers to."""
  if not load_from:
    return ""
  stem = pathlib.PurePath(load_from).stem
  return f"weights/{_PUBLISHED.get(stem, stem)}"


def config_text(imported: Imported, source: str) -> str:
  """A file for `train --config`: the defaults, and what the source says."""
  exchanges = "optimizer" in imported.fields
  names = "default_config, use_optimizer" if exchanges else "default_config"
  lines = [
    f'"""Imported from {source}, a config of PixArt\'s own code.',
    "",
    *(imported.report() or ["Every field was carried over."]),
    '"""',
    "",
    f"from pixsigma_jax.train.config import {names}",
    "",
    "",
    "def get_config():",
    '  """The fields of the source; all others are the defaults."""',
    "  config = default_config()",
  ]
  for name, value in imported.fields.items():
    text = pprint.pformat(value, width=80, sort_dicts=False).replace("\n", "\n  ")
    if name == "optimizer":  # another than the base has, with fields of its own
      arguments = ", ".join(f"{field}={given!r}" for field, given in value.items())
      lines.append(f"  use_optimizer(config, {arguments})")
    else:
      lines.append(f"  config.{name} = {text}")
  return "\n".join([*lines, "  return config", ""])


def convert_config(
  source: pathlib.Path, target: pathlib.Path, *, gpus: int, images: int
) -> Imported:
  """Reads an official config and writes one of ours; see `import_mmcv`.

  Raises:
    FileExistsError: the target is there.
  """
  if target.exists():
    raise FileExistsError(f"{target} exists already and is left as it is.")
  imported = import_mmcv(read_mmcv(source), target.stem, gpus=gpus, images=images)
  text = config_text(imported, source.name)
  disk.write_text(target, text)
  return imported
