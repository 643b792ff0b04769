"""LoRAs of a pipeline: several at once, re-weighted without a new checkpoint.

Whatever changes, kernels are merged anew in float32 from those of the model, and only
then rounded, quantized and laid out as the pipeline has them. So a LoRA costs nothing
in a step, its scale is none of the compiled program's, and the images are those of
`merge_lora`. What the pipeline keeps for it in the host's memory are the model's own
kernels that some LoRA changes.
"""

import dataclasses
import hashlib
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Float32

from pixsigma_jax import checkpoint, tree
from pixsigma_jax.convert import files
from pixsigma_jax.convert.lora import note_of_lora, read_lora
from pixsigma_jax.models import int8
from pixsigma_jax.models.pixart import PixArtConfig, layer_name, segment_name
from pixsigma_jax.transforms.lora import merged, nested
from pixsigma_jax.wording import listed

_Model = TypeVar("_Model", bound="Adaptable")

_RUNS = "adapters"  # WORKDIR/adapters/STEP, as a run leaves them
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
  """A LoRA that was read.

  Attributes:
    path: where it is.
    change: see `transforms.lora`, its own scale in it already.
    fingerprint: a hash of `change`.
    note: what a run has written of it; None for others' files.
  """

  path: str
  change: Any
  fingerprint: str
  note: Mapping[str, Any] | None


def read_adapter(
  path: str | os.PathLike[str], config: PixArtConfig, weight_name: str | None = None
) -> Adapter:
  """Reads a LoRA for a model.

  Args:
    path: a file or folder of any format of `read_lora`; the workdir of a run that
      trains a LoRA, or its `adapters/` (the newest step); or a hub id of such a folder.
    config: the model's.
    weight_name: of one file in the folder.

  Raises:
    FileNotFoundError: there is no adapter.
    ValueError: see `read_lora`.
  """
  found = _find(path)
  if weight_name is not None:
    found = found / weight_name
  change = read_lora(found, config)
  return Adapter(
    path=str(found.absolute()),
    change=change,
    fingerprint=_hash(change),
    note=note_of_lora(found),
  )


def _hash(change: Any) -> str:
  digest = hashlib.sha256()
  for name, leaf in tree.named_leaves(change).items():
    digest.update(f"{name} {list(leaf.shape)}\n".encode() + leaf.tobytes())
  return digest.hexdigest()[:16]


def _find(path: str | os.PathLike[str]) -> pathlib.Path:
  name, path = os.fspath(path), pathlib.Path(path)
  if not path.exists() and _HUB_ID.fullmatch(name):
    patterns = ["*.safetensors", "*.bin", "adapter_config.json"]
    return files.hub_folder(name, patterns, "Give a LoRA's file or folder.")
  for folder in (path / _RUNS, path):
    steps = [int(p.name) for p in folder.glob("[0-9]*") if p.name.isdigit()]
    if steps:
      return folder / str(max(steps))
  if (path / checkpoint.SNAPSHOTS).is_dir():
    raise FileNotFoundError(
      f"{path} is a run without {_RUNS}/: it trains no LoRA, or has saved none yet."
    )
  return path


def read_flags(
  texts: Sequence[str], config: PixArtConfig
) -> dict[str, tuple[Adapter, float]]:
  """LoRAs of PATH[:SCALE] each, 1 without a scale, by the texts' paths.

  Raises:
    FileNotFoundError, ValueError: see `read_adapter`; or a scale is not finite, or a
      path is given twice.
  """
  found: dict[str, tuple[Adapter, float]] = {}
  for text in texts:
    path, scale = _parsed(text)
    if path in found:
      raise ValueError(f"The LoRA {path} is given twice: give it once, with a scale.")
    found[path] = read_adapter(path, config), scale
  return found


def _parsed(text: str) -> tuple[str, float]:
  path, colon, number = text.rpartition(":")
  if not colon or pathlib.Path(text).exists():
    return text, 1.0
  try:
    scale = float(number)
  except ValueError:  # a colon of the path's own
    return text, 1.0
  return path, _checked(path, scale)


def _checked(name: str, scale: Any) -> float:
  if not math.isfinite(scale):
    raise ValueError(f"The scale of the LoRA {name} must be finite, not {scale!r}.")
  return float(scale)


@dataclasses.dataclass(frozen=True, eq=False)
class Adapters:
  """A pipeline's LoRAs, and what it takes to change their scales.

  Attributes:
    snapshot: where the model's unrounded parameters are; None if nowhere.
    loaded: LoRAs by name.
    scales: of those that act; a LoRA of scale 0 is none.
    base: the model's own kernels that some of `loaded` changes, by their names.
  """

  snapshot: pathlib.Path | None = None
  loaded: Mapping[str, Adapter] = dataclasses.field(default_factory=dict)
  scales: Mapping[str, float] = dataclasses.field(default_factory=dict)
  base: Mapping[str, Float32[np.ndarray, "..."]] = dataclasses.field(
    default_factory=dict
  )

  def about(self) -> list[dict[str, Any]]:
    """Facts for images' settings, of each LoRA that acts."""
    return [
      {
        "path": self.loaded[name].path,
        "scale": scale,
        "fingerprint": self.loaded[name].fingerprint,
      }
      for name, scale in self.scales.items()
      if scale
    ]

  def without_folders(self) -> "Adapters":
    """The same, whose facts for images have names of LoRAs, not their folders."""
    loaded = {
      name: dataclasses.replace(one, path=pathlib.Path(one.path).name)
      for name, one in self.loaded.items()
    }
    return dataclasses.replace(self, loaded=loaded)

  def add(
    self, adapters: Mapping[str, Adapter], params: Any, config: PixArtConfig
  ) -> "Adapters":
    """With further LoRAs, none of which acts yet.

    Args:
      params: the pipeline's, with what `self` has made of them.

    Raises:
      ValueError: a name is taken; a LoRA is in the model already; or the parameters are
        quantized, and the model's own are nowhere.
    """
    if taken := sorted(self.loaded.keys() & adapters.keys()):
      raise ValueError(
        f"There is a LoRA called {taken[0]!r} already: give another adapter_name, or "
        "unload_lora_weights() first."
      )
    names = [
      f"{name.rpartition('/')[0]}/kernel"
      for adapter in adapters.values()
      for name in tree.named_leaves(adapter.change)
    ]
    names = [name for name in dict.fromkeys(names) if name not in self.base]
    snapshot = None
    leaves = _named(params)
    places = [place for name in names for place in _places(name, leaves, config)]
    exact = all(_is_exact(leaves[place]) for place in places)
    noted = any(adapter.note for adapter in adapters.values())
    if self.snapshot is not None and (noted or not exact):
      snapshot = checkpoint.read_snapshot(self.snapshot)
      for name, adapter in adapters.items():
        _check_base(name, adapter, snapshot)
    if snapshot is not None:
      originals = tree.named_leaves(snapshot.params)
      found = {name: np.asarray(originals[name]) for name in names}
    elif any(int8.is_quantized(leaves[place]) for place in places):
      raise ValueError(
        "These parameters are quantized, and a LoRA is merged before that: make the "
        "pipeline by from_checkpoint, which knows where the unrounded ones are."
      )
    else:
      found = {name: _stacked(name, leaves, config) for name in names}
    return dataclasses.replace(
      self, loaded={**self.loaded, **adapters}, base={**self.base, **found}
    )

  def scaled(
    self,
    names: str | Sequence[str],
    scales: float | int | Sequence[float | int] | None = None,
  ) -> "Adapters":
    """With these LoRAs acting, and no others.

    Args:
      names: of some that are loaded.
      scales: one for all or one for each; 1 by default.

    Raises:
      ValueError: there is none of a name, there are more or fewer scales than names, or
        one is not finite.
    """
    names = [names] if isinstance(names, str) else list(names)
    if unknown := [name for name in names if name not in self.loaded]:
      raise ValueError(
        f"There is no LoRA called {unknown[0]!r}: loaded are {listed(self.loaded)}."
      )
    scales = 1.0 if scales is None else scales
    given = list(scales) if isinstance(scales, Sequence) else [scales] * len(names)
    if len(given) != len(names) or len(set(names)) < len(names):
      raise ValueError(
        f"{len(given)} weights do not go with the LoRAs {listed(names)}: give one for "
        "all, or one for each, and none twice."
      )
    found = {n: _checked(n, scale) for n, scale in zip(names, given, strict=True)}
    return dataclasses.replace(self, scales=found)

  def applied(self, params: Any, config: PixArtConfig) -> Any:
    """Parameters with the acting LoRAs in them, and no others; the rest is shared.

    Args:
      params: the pipeline's, whatever LoRAs are in them.
    """
    leaves = _named(params)
    changed: dict[str, Any] = {}
    for name in self.base:
      kernel = self._merged(name)
      places = _places(name, leaves, config)
      parts = [kernel] if places == [name] else kernel
      for place, part in zip(places, parts, strict=True):
        changed[place] = _like(leaves[place], place, part)
    return jax.tree_util.tree_map_with_path(
      lambda path, leaf: changed.get(tree.path_name(path), leaf),
      params,
      is_leaf=int8.is_quantized,
    )

  def _merged(self, name: str) -> Any:
    """One kernel in float32, with one LoRA after the other merged into it."""
    base = kernels = nested({name: jnp.asarray(self.base[name])})
    for adapter, scale in self.scales.items():
      if scale:
        kernels = merged(kernels, self.loaded[adapter].change, scale, base)
    return tree.named_leaves(kernels)[name]


@dataclasses.dataclass(frozen=True, eq=False)
class Adaptable:
  """A model that LoRAs can change; each call returns another one.

  Attributes:
    config: the model's hyper-parameters.
    params: the model's parameters, with the acting LoRAs in them.
    loras: what LoRAs these are.
  """

  config: PixArtConfig
  params: Any
  loras: Adapters = dataclasses.field(default_factory=Adapters, kw_only=True)

  def replace(self: _Model, **fields: Any) -> _Model:
    """The same with other `params`, say; compiled programs stay shared.

    Programs belong to hyper-parameters and shapes, so pipelines of several checkpoints
    of one architecture share them too.
    """
    return dataclasses.replace(self, **fields)

  def load_lora_weights(
    self: _Model,
    path: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    weight_name: str | None = None,
  ) -> _Model:
    """The same with one more LoRA, which acts at the scale 1.

    Compiled programs stay shared, whichever LoRAs act at which scales.

    Args:
      path, weight_name: see `adapters.read_adapter`.
      adapter_name: for `set_adapters`; by default `default_NUMBER`.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is of another model or kind, it is in the model already, or the
        name is taken.
    """
    name = adapter_name or f"default_{len(self.loras.loaded)}"
    adapter = read_adapter(path, self.config, weight_name)
    return self.with_adapters({name: (adapter, 1.0)})

  def set_adapters(
    self: _Model,
    adapter_names: str | Sequence[str],
    adapter_weights: float | int | Sequence[float | int] | None = None,
  ) -> _Model:
    """The same with these of its LoRAs acting and no others.

    Args:
      adapter_names: of some of the loaded; an empty list for none of them.
      adapter_weights: their scales, one for all or one for each; 1 by default.

    Raises:
      ValueError: there is none of a name, or a scale is not finite.
    """
    return self._with(self.loras.scaled(adapter_names, adapter_weights))

  def unload_lora_weights(self: _Model) -> _Model:
    """The same without LoRAs: the model itself, to the bit."""
    own = self._with(self.loras.scaled([]))
    return own.replace(loras=Adapters(self.loras.snapshot))

  def with_adapters(
    self: _Model, further: Mapping[str, tuple[Adapter, float]]
  ) -> _Model:
    """The same with further LoRAs by name, each with its scale.

    Raises:
      ValueError: a name is taken, or a LoRA is in the model already.
    """
    read = {name: adapter for name, (adapter, _) in further.items()}
    added = self.loras.add(read, self.params, self.config)
    scales = {**added.scales, **{name: scale for name, (_, scale) in further.items()}}
    return self._with(added.scaled(list(scales), list(scales.values())))

  def _with(self: _Model, changed: Adapters) -> _Model:
    params = changed.applied(self.params, self.config)
    return self.replace(params=params, loras=changed)


def _named(params: Any) -> dict[str, Any]:
  """Leaves by name, a quantized kernel being one."""
  paths = jax.tree_util.tree_leaves_with_path(params, is_leaf=int8.is_quantized)
  return {tree.path_name(path): leaf for path, leaf in paths}


def _places(
  name: str, leaves: Mapping[str, Any], config: PixArtConfig
) -> Sequence[str]:
  """Names of the leaves that hold a kernel: itself, or one for each of its layers."""
  if name in leaves:
    return [name]
  stack, _, rest = name.partition("/")
  layers = {segment_name(each): each for each, _ in config.segments()}[stack]
  return [f"{layer_name(i)}/{rest}" for i in layers]


def _is_exact(leaf: Any) -> bool:
  return not int8.is_quantized(leaf) and leaf.dtype == jnp.float32


def _stacked(
  name: str, leaves: Mapping[str, Any], config: PixArtConfig
) -> Float32[np.ndarray, "..."]:
  places = _places(name, leaves, config)
  parts = [np.asarray(leaves[place], np.float32) for place in places]
  return parts[0] if places == [name] else np.stack(parts)


def _like(leaf: Any, name: str, kernel: Any) -> Any:
  """A kernel rounded or quantized and placed as a leaf is."""
  if int8.is_quantized(leaf):
    new = _named(int8.quantize(nested({name: kernel})))[name]
  else:
    new = jnp.asarray(kernel, leaf.dtype)
  return jax.tree.map(_placed, new, leaf)


def _placed(array: Any, old: Any) -> Any:
  return jax.device_put(array, old.sharding) if isinstance(old, jax.Array) else array


def _check_base(name: str, adapter: Adapter, snapshot: checkpoint.Snapshot) -> None:
  """Compares a model with what a run says of the one that its LoRA changes."""
  if adapter.note is None:
    return
  have, want = snapshot.with_fingerprint().fingerprint, adapter.note["base"]
  if have == want:
    return
  history = snapshot.metadata.history
  if history is not None and history.run == adapter.note["run"]:
    raise ValueError(
      f"The LoRA {name} was trained by the run that made {snapshot.path}, and is in it "
      "already: give the model that the run began with, its config.init.parent, or "
      "leave the LoRA out."
    )
  logging.warning(
    "The LoRA %s was trained on a model with the fingerprint %s, and %s has %s: expect "
    "it to fit less well.",
    *(name, want, snapshot.path, have),
  )
