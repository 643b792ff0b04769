"""Low-rank adapters: a change of some kernels, small enough to train and to pass on.

LoRA (Hu et al. 2021, section 4.1) adds s · down · up to a kernel, of rank r, with
s = α / r. DoRA (Liu et al. 2024, equation 5) then gives every column, the weights of
one output, a length of its own, `magnitude`. An adapter is a tree like the parameters',
in which a kernel of theirs `[… i o]` has become

  down [… i r]   up [… r o]   magnitude [… o], of DoRA alone

Layers of a stack, and stacked maps of one input, each have an adapter of their own: to
diffusers these are to_q, to_k and to_v of each block. A convolution is the matrix that
acts on a whole patch.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from pixsigma_jax import tree
from pixsigma_jax.models.layers import uniform_init
from pixsigma_jax.models.pixart import PixArtConfig
from pixsigma_jax.wording import listed

_KERNEL = "/kernel"
_CONVOLUTION = "patch_embedding"
_NO_MATRIX = "/kv_compressor/"  # a filter for each channel: there is no rank to lower
DOWN, UP, MAGNITUDE = "down", "up", "magnitude"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
  """The section `adapter` of a training config.

  Attributes:
    rank: r; 0 for no adapter.
    alpha: α: the change is scaled with alpha / rank, so that another rank trains well
      with the same learning rate.
    targets: regular expressions; a kernel gets an adapter if one is found in its name.
    dora: whether the columns' lengths are trained, too.

  Raises:
    ValueError: numbers that make no sense, or no regular expression.
  """

  rank: int
  alpha: float
  targets: tuple[str, ...]
  dora: bool

  def __post_init__(self):
    if self.rank < 0 or not self.alpha > 0:
      raise ValueError(
        f"config.adapter has rank={self.rank} and alpha={self.alpha}: the rank must be "
        "at least 0 (for no adapter), alpha above 0."
      )
    for target in self.targets:
      try:
        re.compile(target)
      except re.error as error:
        raise ValueError(
          f"config.adapter.targets: {target!r} is no regular expression: {error}."
        ) from None

  @property
  def scale(self) -> float:
    """Factor s of down · up."""
    return self.alpha / self.rank

  def init(self, params: Any, key: Key[Array, ""]) -> Any:
    """An adapter that changes nothing yet, as PEFT starts one.

    `down` is uniform with the bound 1/√i (torch's Kaiming-uniform of a linear map), up
    is zero, `magnitude` the lengths that columns have.

    Raises:
      ValueError: a target is found in no kernel's name.
    """
    modules = self._modules(params)
    leaves: dict[str, Any] = {}
    keys = jax.random.split(key, len(modules))
    for module_key, (module, matrices) in zip(keys, modules.items(), strict=True):
      *stack, fan_in, features = matrices.shape
      down = uniform_init(fan_in**-0.5)(module_key, (*stack, fan_in, self.rank))
      leaves[f"{module}/{DOWN}"] = down
      leaves[f"{module}/{UP}"] = jnp.zeros((*stack, self.rank, features), jnp.float32)
      if self.dora:
        leaves[f"{module}/{MAGNITUDE}"] = _lengths(matrices)
    return nested(leaves)

  def merged(self, params: Any, adapter: Any) -> Any:
    """Parameters with this adapter merged; see `merged`."""
    return merged(params, adapter, self.scale)

  def _modules(self, params: Any) -> dict[str, Any]:
    """Name of each module with a changed kernel → its matrices."""
    kernels = {
      name: leaf
      for name, leaf in tree.named_leaves(params).items()
      if name.endswith(_KERNEL) and _NO_MATRIX not in name
    }
    for target in self.targets or ("",):
      if not target or not any(re.search(target, name) for name in kernels):
        raise ValueError(
          f"config.adapter.targets={self.targets}: {target!r} is found in the name of "
          f"no kernel. They are {listed(kernels, 20)}."
        )
    return {
      name.removesuffix(_KERNEL): _matrices(name, leaf)
      for name, leaf in kernels.items()
      if any(re.search(target, name) for target in self.targets)
    }


def merged(params: Any, adapter: Any, scale: float, base: Any = None) -> Any:
  """The parameters with the adapter's change in them; all other leaves are shared.

  Where `magnitude` is not a number columns keep the length that down · up gives them:
  so a layer stays what it was of which a stack's adapter knows nothing.

  Args:
    params: of the model.
    adapter: of some of its kernels, see above.
    scale: what down · up is multiplied with.
    base: the model that the adapter was trained on, where `params` have other adapters
      in them already: a DoRA's lengths relate to it, as in PEFT. By default `params`.
  """
  originals = {} if base is None else tree.named_leaves(base)
  parts: dict[str, dict[str, Any]] = {}
  for name, leaf in tree.named_leaves(adapter).items():
    module, _, part = name.rpartition("/")
    parts.setdefault(module, {})[part] = leaf

  def changed(name: str, kernel: Any) -> Any:
    part = parts.get(name.removesuffix(_KERNEL)) if name.endswith(_KERNEL) else None
    if part is None:
      return kernel
    change = scale * jnp.matmul(part[DOWN], part[UP], precision="highest")
    matrices = _matrices(name, kernel) + change
    if MAGNITUDE in part:
      # Section 4.3: no gradient through the length, which saves a third of the memory
      # and costs nothing in accuracy.
      original = originals.get(name)
      alone = matrices if original is None else _matrices(name, original) + change
      length = jax.lax.stop_gradient(_lengths(alone))
      magnitude = part[MAGNITUDE]
      factor = magnitude / jnp.where(length > 0, length, 1)
      factor = jnp.where(jnp.isnan(magnitude), 1, factor)
      matrices = matrices * factor[..., None, :]
    return matrices.reshape(kernel.shape)

  return tree.map_with_name(changed, params)


def merge_lora(
  config: PixArtConfig, params: Any, *, adapter: Any, scale: float = 1.0
) -> tuple[PixArtConfig, Any]:
  """Puts an adapter into the parameters.

  Args:
    adapter: as `convert.lora.read_lora` finds it in a file.
    scale: of the adapter's own effect; 0.5 for half of it.
  """
  return config, merged(params, adapter, scale)


def unmerge_lora(
  config: PixArtConfig, params: Any, *, adapter: Any, scale: float = 1.0
) -> tuple[PixArtConfig, Any]:
  """Takes an adapter out again: undoes `merge_lora` with the same arguments.

  What comes back is what was there, within the rounding of float32.

  Raises:
    ValueError: the adapter is of DoRA.
  """
  if any(name.endswith(f"/{MAGNITUDE}") for name in tree.named_leaves(adapter)):
    raise ValueError(
      "A DoRA adapter cannot be taken out again: the columns' lengths that it has "
      "replaced are not in it. Go back to the model that it was merged into; the "
      "provenance names it."
    )
  return config, merged(params, adapter, -scale)


def nested(leaves: dict[str, Any]) -> Any:
  """The tree whose leaves have these names."""
  root: dict[str, Any] = {}
  for name, leaf in leaves.items():
    *path, last = name.split("/")
    place = root
    for step in path:
      place = place.setdefault(step, {})
    place[last] = leaf
  return root


def _matrices(name: str, kernel: Any) -> Any:
  if name.startswith(_CONVOLUTION):
    return kernel.reshape(-1, kernel.shape[-1])
  return kernel


def _lengths(matrices: Any) -> Float[Array, "*stack o"]:
  return jnp.linalg.norm(matrices, axis=-2)
