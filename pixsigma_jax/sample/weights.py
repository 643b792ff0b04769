"""Weights from where they lie: a checkpoint of ours out of whatever holds a PixArt.

What is no checkpoint of this package is converted into one, as `convert` does it, once:
the result lies in the user's cache, under a hash of the files, of the answers given and
of the code that converts.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging

import pixsigma_jax.convert
from pixsigma_jax import disk, metadata
from pixsigma_jax.convert import files, model
from pixsigma_jax.convert.model import Given, Options
from pixsigma_jax.convert.released import HUB_RELEASES
from pixsigma_jax.wording import listed

_INDEX, _CONFIG, _TRANSFORMER = "model_index.json", "config.json", "transformer"
_ENCODERS = ("vae", "text_encoder", "tokenizer")
# OWNER/NAME, or a file on its page: OWNER/NAME/FILE.pth.
_HUB_ID = re.compile(r"(?P<page>[\w-][\w.-]*/[\w-][\w.-]*)(/(?P<file>[\w./-]+))?")
# Of a pipeline's class: the default of its `max_sequence_length`.
_CAPTION_LENGTHS = {
  "PixArtSigmaPipeline": 300,
  "PixArtSigmaPAGPipeline": 300,
  "PixArtAlphaPipeline": 120,
}
_HYPER_PARAMETERS = [field.name for field in dataclasses.fields(Given)]
_ADVICE = (
  "Give a run's workdir or one of its snapshots, a folder of diffusers, a .pth or a "
  ".safetensors, or the id of one on the hub."
)
# Arguments of diffusers' from_pretrained, and what to do instead.
_NOT_OF_DIFFUSERS = {
  "torch_dtype": "give compute, such as program.compute_here('float32')",
  "dtype": "give compute, such as program.compute_here('float32')",
  "device_map": "give mesh",
  "cache_dir": "set PIXSIGMA_JAX_CACHE and HF_HOME",
  "local_files_only": "set HF_HUB_OFFLINE=1",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Located:
  """Where a model was found.

  Attributes:
    checkpoint: a workdir or snapshot of ours, perhaps in the cache.
    encoders: folder with its VAE, T5 and tokenizer; None if nothing lies beside it.
    origin: facts for images' settings, of what was converted.
  """

  checkpoint: pathlib.Path
  encoders: pathlib.Path | None = None
  origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def options_of(values: Mapping[str, Any]) -> Options:
  """The options of these names.

  Raises:
    TypeError: there is none of a name; says what stands in diffusers' name's place.
  """
  known = [field.name for field in dataclasses.fields(Options)]
  for name in values:
    if name not in known:
      way_out = _NOT_OF_DIFFUSERS.get(name, f"known are {', '.join(known)}")
      raise TypeError(f"Loading a model has no argument {name!r}: {way_out}.")
  return Options(**values)


def locate(source: str | os.PathLike[str], options: Options | None = None) -> Located:
  """A checkpoint of ours with a model's weights, converted if need be.

  Args:
    source: a checkpoint of ours, see `checkpoint.find_snapshot`; a folder of diffusers,
      the pipeline's or its transformer's; a .pth or a .safetensors; the hub's id of
      such a folder, or OWNER/NAME/FILE.
    options: what the source leaves open.

  Raises:
    FileNotFoundError: it is nowhere, and the hub has nothing of that name either.
    ValueError: see `convert.model.read`; or answers for a checkpoint of ours, which
      leaves nothing open.
  """
  name, path, options = os.fspath(source), pathlib.Path(source), options or Options()
  hub = _hub_id(name)
  if hub is not None:
    path = _fetched(hub["page"], hub["file"])
    if not _says_something(options):
      options = dataclasses.replace(options, release=HUB_RELEASES.get(name))
  elif not path.exists() and _is_weights(name):
    raise FileNotFoundError(f"There are no weights at {path}: no such file.")
  found = _weights_in(path)
  if found is None:
    if hub is not None and path.is_dir():
      raise FileNotFoundError(
        f"{name} on the hub has neither {_INDEX} nor {_TRANSFORMER}/config.json, but "
        f"{listed(disk.whole_files(path))}. One of its files is {name}/FILE.pth."
      )
    if said := _given(options):
      raise ValueError(
        f"{path} is to be a checkpoint of this package, which says itself what it is: "
        f"leave out {', '.join(f'--{field}' for field in said)}."
      )
    return Located(checkpoint=path)
  weights, pipeline = found
  if pipeline is not None:
    options = _completed(options, pipeline)
  cached, key = _converted(weights, options, name)
  whole = pipeline and all((pipeline / part).is_dir() for part in _ENCODERS)
  return Located(
    checkpoint=cached,
    encoders=pipeline if whole else None,
    origin={"checkpoint": name if hub else str(path.absolute()), "weights": key},
  )


def is_ours(source: str | os.PathLike[str]) -> bool:
  """Whether `locate` would look for a checkpoint of this package there."""
  return (
    _hub_id(os.fspath(source)) is None and _weights_in(pathlib.Path(source)) is None
  )


def _hub_id(name: str) -> re.Match[str] | None:
  """An id of the hub, its page and file; None for what may be a path alone."""
  found = None if pathlib.Path(name).exists() else _HUB_ID.fullmatch(name)
  return found if found and (found["file"] is None or _is_weights(name)) else None


def _is_weights(name: str) -> bool:
  return name.endswith((".safetensors", *files.PICKLES))


def _given(options: Options) -> list[str]:
  """Names of the options that are not at their defaults."""
  return [
    field.name
    for field in dataclasses.fields(Options)
    if getattr(options, field.name) != field.default
  ]


def _says_something(options: Options) -> bool:
  """Whether anything is said of what model it is."""
  return bool({"release", *_HYPER_PARAMETERS} & set(_given(options)))


def _fetched(page: str, file: str | None) -> pathlib.Path:
  """The hub's folder, or one of its files."""
  patterns = [_INDEX, *(f"{part}/*" for part in (_TRANSFORMER, *_ENCODERS))]
  folder = files.hub_folder(page, patterns if file is None else [file], _ADVICE)
  if file is None:
    return folder
  if not (folder / file).is_file():
    raise FileNotFoundError(f"{page} on the hub has no file {file}.")
  return folder / file


def _weights_in(path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path | None] | None:
  """Weights of another format at `path`, and the pipeline's folder around them."""
  if path.is_file():
    return path, None
  if (path / _INDEX).is_file():
    return model.transformer_at(path), path
  if (path / _TRANSFORMER / _CONFIG).is_file():
    return path / _TRANSFORMER, path
  if (path / _CONFIG).is_file() and files.weights_in(path):
    return path, path.parent if (path.parent / _INDEX).is_file() else None
  return None


def _completed(options: Options, pipeline: pathlib.Path) -> Options:
  """Options with what a pipeline's own files answer, where nobody else has."""
  if options.release is not None:
    return options
  found: dict[str, Any] = {}
  if (pipeline / _INDEX).is_file():
    index = files.read_json(pipeline / _INDEX)
    kind = index.get("_class_name") if isinstance(index, dict) else None
    if kind not in _CAPTION_LENGTHS:
      raise ValueError(
        f"{pipeline} is a pipeline of the class {kind!r}, not one of "
        f"{', '.join(_CAPTION_LENGTHS)}."
      )
    found["caption_length"] = _CAPTION_LENGTHS[kind]
  if (pipeline / "vae" / _CONFIG).is_file():
    vae = files.read_json(pipeline / "vae" / _CONFIG)
    found["scaling_factor"] = vae.get("scaling_factor")
  found = {name: x for name, x in found.items() if getattr(options, name) is None}
  return dataclasses.replace(options, **found)


def _converted(
  path: pathlib.Path, options: Options, name: str
) -> tuple[pathlib.Path, str]:
  """The cache's checkpoint of weights, converted first if it is not there; its key."""
  form = "diffusers" if path.is_dir() else model.form_of(path)
  folder = disk.user_cache()
  key = _key(model.sources_of(path, form, options.variant), form, options, folder)
  target = folder / "converted" / key
  if target.is_dir():
    return target, key
  if jax.process_count() > 1:
    raise ValueError(
      f"{name} is not converted yet, which several processes cannot do together: "
      "sample in one process first, or give what python -m pixsigma_jax.convert makes "
      "of it."
    )
  logging.info("Converting %s into %s, once.", name, target)
  disk.check_writable(target.parent)
  converted = model.read(
    path,
    form,
    options.given(),
    ema=options.ema,
    stored_positions=options.pos_embed,
    variant=options.variant,
  )
  logging.info("Read %s: %s.", name, converted.summary())
  try:
    with disk.whole_folder(target) as partial:
      model.write(partial, "orbax", converted)
  except OSError:
    if not target.is_dir():  # else another process was faster, with the same
      raise
  return target, key


def _key(
  sources: list[pathlib.Path], form: str, options: Options, cache: pathlib.Path
) -> str:
  """Hash of files, answers, and the code that makes a checkpoint of them."""
  about = {
    "files": [_file_hash(path, cache) for path in sources],
    "form": form,
    "options": dataclasses.asdict(options),
    "code": _code(),
    "format": metadata.FORMAT,
  }
  return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]


@functools.cache
def _code() -> str:
  package = pathlib.Path(pixsigma_jax.convert.__file__).parent
  digest = hashlib.sha256()
  for file in sorted(package.glob("*.py")):
    digest.update(file.read_bytes())
  return digest.hexdigest()


def _file_hash(path: pathlib.Path, cache: pathlib.Path) -> str:
  """SHA-256 of a file, remembered as long as size, time and inode stay the same.

  Reading gigabytes at each start would take as long as the rest of it.
  """
  path = path.resolve()
  stat = path.stat()
  state = {"path": str(path), "size": stat.st_size, "inode": stat.st_ino}
  state["changed"] = [stat.st_mtime_ns, stat.st_ctime_ns]
  name = hashlib.sha256(str(path).encode()).hexdigest()[:32]
  note = cache / "hashes" / f"{name}.json"
  with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
    found = json.loads(note.read_text(encoding="utf-8"))
    if found["of"] == state:
      return found["sha256"]
  sha256 = disk.file_hash(path)
  disk.write_text(note, json.dumps({"of": state, "sha256": sha256}))
  return sha256
