"""Names and layouts of PixArt's parameters in the official code and diffusers.

A layout is a table from our leaves to theirs, read in either direction: a leaf of ours
is one tensor of theirs, or several stacked, each moved by a permutation that has an
inverse. Source: `tools/convert_pixart_to_diffusers.py` of PixArt-alpha/PixArt-sigma.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from pixsigma_jax import tree
from pixsigma_jax.convert.files import Weights, check_names
from pixsigma_jax.models.pixart import PixArtConfig, abstract_params, segment_name
from pixsigma_jax.wording import listed

Array: TypeAlias = Float[np.ndarray, "..."]


@dataclasses.dataclass(frozen=True)
class Rearrangement:
  """One tensor's axes, from their layout to ours and the other way round."""

  to_ours: Callable[[Array], Array]
  to_theirs: Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Rule:
  """One leaf of ours: `names` of theirs, stacked in this order if there are several.

  `{i}` in a name is the layer.
  """

  names: tuple[str, ...]
  rearrangement: Rearrangement


def _fused(copies: int) -> tuple[Rearrangement, Rearrangement]:
  """Kernel and bias of `copies` linear maps in one torch matrix, one below another."""
  kernel = Rearrangement(
    lambda x: x.reshape(copies, -1, x.shape[-1]).swapaxes(-1, -2),
    lambda x: x.swapaxes(-1, -2).reshape(-1, x.shape[-2]),
  )
  bias = Rearrangement(lambda x: x.reshape(copies, -1), lambda x: x.reshape(-1))
  return kernel, bias


_SAME = Rearrangement(lambda x: x, lambda x: x)
_LINEAR = (Rearrangement(lambda x: x.T, lambda x: x.T), _SAME)
# torch: (out, in, row, column); ours: the patch as a token orders it, then out.
_PATCHES = Rearrangement(
  lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)
)
# torch: (channel, 1, row, column), a filter for each channel.
_WINDOW = Rearrangement(
  lambda x: x[:, 0].transpose(1, 2, 0), lambda x: x.transpose(2, 0, 1)[:, None]
)

Layout: TypeAlias = Mapping[str, Rule]


def _linear(
  ours: str, *theirs: str, ways: tuple[Rearrangement, Rearrangement] = _LINEAR
) -> dict[str, Rule]:
  kernel, bias = ways
  return {
    f"{ours}/kernel": Rule(tuple(f"{name}.weight" for name in theirs), kernel),
    f"{ours}/bias": Rule(tuple(f"{name}.bias" for name in theirs), bias),
  }


def _norm(ours: str, theirs: str) -> dict[str, Rule]:
  return {
    f"{ours}/scale": Rule((f"{theirs}.weight",), _SAME),
    f"{ours}/bias": Rule((f"{theirs}.bias",), _SAME),
  }


def _same(ours: str, theirs: str) -> dict[str, Rule]:
  return {ours: Rule((theirs,), _SAME)}


def _compressor(theirs_conv: str, theirs_norm: str) -> dict[str, Rule]:
  ours = "blocks/attention/kv_compressor"
  return {
    f"{ours}/kernel": Rule((f"{theirs_conv}.weight",), _WINDOW),
    f"{ours}/bias": Rule((f"{theirs_conv}.bias",), _SAME),
    **_norm(f"{ours}/norm", theirs_norm),
  }


# Leaves of a layer stand under `blocks`, whichever segment they are stacked in.
OFFICIAL: Layout = {
  **_linear("patch_embedding", "x_embedder.proj", ways=(_PATCHES, _SAME)),
  **_linear("timestep_embedding/in", "t_embedder.mlp.0"),
  **_linear("timestep_embedding/out", "t_embedder.mlp.2"),
  **_linear("size_conditions/size/in", "csize_embedder.mlp.0"),
  **_linear("size_conditions/size/out", "csize_embedder.mlp.2"),
  **_linear("size_conditions/aspect_ratio/in", "ar_embedder.mlp.0"),
  **_linear("size_conditions/aspect_ratio/out", "ar_embedder.mlp.2"),
  **_linear("modulation", "t_block.1"),
  **_linear("caption_projection/in", "y_embedder.y_proj.fc1"),
  **_linear("caption_projection/out", "y_embedder.y_proj.fc2"),
  **_same("scale_shift_table", "final_layer.scale_shift_table"),
  **_linear("out", "final_layer.linear"),
  **_same("blocks/scale_shift_table", "blocks.{i}.scale_shift_table"),
  **_linear("blocks/attention/qkv", "blocks.{i}.attn.qkv", ways=_fused(3)),
  **_linear("blocks/attention/out", "blocks.{i}.attn.proj"),
  **_norm("blocks/attention/query_norm", "blocks.{i}.attn.q_norm"),
  **_norm("blocks/attention/key_norm", "blocks.{i}.attn.k_norm"),
  **_compressor("blocks.{i}.attn.sr", "blocks.{i}.attn.norm"),
  **_linear("blocks/cross_attention/query", "blocks.{i}.cross_attn.q_linear"),
  **_linear(
    "blocks/cross_attention/kv", "blocks.{i}.cross_attn.kv_linear", ways=_fused(2)
  ),
  **_linear("blocks/cross_attention/out", "blocks.{i}.cross_attn.proj"),
  **_linear("blocks/mlp/in", "blocks.{i}.mlp.fc1"),
  **_linear("blocks/mlp/out", "blocks.{i}.mlp.fc2"),
}

_LAYER = "transformer_blocks.{i}"
_SELF, _CROSS = f"{_LAYER}.attn1", f"{_LAYER}.attn2"
_EMBEDDERS = "adaln_single.emb"
# diffusers has no key/value compression: those names are ours (docs/convert.md).
DIFFUSERS: Layout = {
  **_linear("patch_embedding", "pos_embed.proj", ways=(_PATCHES, _SAME)),
  **_linear("timestep_embedding/in", f"{_EMBEDDERS}.timestep_embedder.linear_1"),
  **_linear("timestep_embedding/out", f"{_EMBEDDERS}.timestep_embedder.linear_2"),
  **_linear("size_conditions/size/in", f"{_EMBEDDERS}.resolution_embedder.linear_1"),
  **_linear("size_conditions/size/out", f"{_EMBEDDERS}.resolution_embedder.linear_2"),
  **_linear(
    "size_conditions/aspect_ratio/in", f"{_EMBEDDERS}.aspect_ratio_embedder.linear_1"
  ),
  **_linear(
    "size_conditions/aspect_ratio/out", f"{_EMBEDDERS}.aspect_ratio_embedder.linear_2"
  ),
  **_linear("modulation", "adaln_single.linear"),
  **_linear("caption_projection/in", "caption_projection.linear_1"),
  **_linear("caption_projection/out", "caption_projection.linear_2"),
  **_same("scale_shift_table", "scale_shift_table"),
  **_linear("out", "proj_out"),
  **_same("blocks/scale_shift_table", f"{_LAYER}.scale_shift_table"),
  **_linear("blocks/attention/qkv", f"{_SELF}.to_q", f"{_SELF}.to_k", f"{_SELF}.to_v"),
  **_linear("blocks/attention/out", f"{_SELF}.to_out.0"),
  **_norm("blocks/attention/query_norm", f"{_SELF}.norm_q"),
  **_norm("blocks/attention/key_norm", f"{_SELF}.norm_k"),
  **_compressor(f"{_SELF}.kv_compress.conv", f"{_SELF}.kv_compress.norm"),
  **_linear("blocks/cross_attention/query", f"{_CROSS}.to_q"),
  **_linear("blocks/cross_attention/kv", f"{_CROSS}.to_k", f"{_CROSS}.to_v"),
  **_linear("blocks/cross_attention/out", f"{_CROSS}.to_out.0"),
  **_linear("blocks/mlp/in", f"{_LAYER}.ff.net.0.proj"),
  **_linear("blocks/mlp/out", f"{_LAYER}.ff.net.2"),
}


def params_from(weights: Weights, config: PixArtConfig, layout: Layout) -> Any:
  """Our parameters, float32, out of a state dict that holds these and nothing else.

  Raises:
    ValueError: tensors are missing, left over or of another shape; names them.
  """
  what = f"{config.depth} layers of width {config.width} in this layout"
  check_names(weights, names_of(config, layout), what)
  problems: list[str] = []

  def leaf(name: str, abstract: jax.ShapeDtypeStruct) -> Array:
    rule, layers = _rule_of(name, config, layout)
    array = np.empty(abstract.shape, abstract.dtype)
    # Filled slot by slot: a stack is in memory once, beside one tensor of theirs.
    for slot, layer in enumerate(layers or [None]):
      place = array if layers is None else array[slot]
      places = [place] if len(rule.names) == 1 else list(place)
      for their_name, into in zip(rule.names, places, strict=True):
        their_name = their_name.format(i=layer)
        shape = rule.rearrangement.to_theirs(into).shape
        tensor = weights[their_name]
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
          problems.append(f"{their_name} is {tensor.dtype}, which is quantised")
        elif tensor.shape == shape:
          into[...] = rule.rearrangement.to_ours(tensor)
        else:
          found = f"{list(tensor.shape)}, not {list(shape)}"
          problems.append(f"{their_name} has shape {found}")
    return array

  params = tree.map_with_name(leaf, abstract_params(config))
  if problems:
    raise ValueError(
      f"These are not the weights of {what}: {listed(problems, joint='; ')}."
    )
  return params


def names_of(config: PixArtConfig, layout: Layout) -> dict[str, None]:
  """Names of all tensors that a model has in a layout, in our order."""
  return dict.fromkeys(slots_of(config, layout))


@dataclasses.dataclass(frozen=True)
class TensorSlot:
  """Where one of their tensors lies: a leaf of ours, and the `index` in it."""

  leaf: str
  index: tuple[int, ...]
  rearrangement: Rearrangement


def slots_of(config: PixArtConfig, layout: Layout) -> dict[str, TensorSlot]:
  """Slot of every tensor that a model has in a layout, by the tensor's name."""
  slots: dict[str, TensorSlot] = {}
  for name in tree.named_leaves(abstract_params(config)):
    rule, layers = _rule_of(name, config, layout)
    for place, layer in enumerate(layers or [None]):
      stack = () if layers is None else (place,)
      for copy, their_name in enumerate(rule.names):
        index = stack if len(rule.names) == 1 else (*stack, copy)
        slots[their_name.format(i=layer)] = TensorSlot(name, index, rule.rearrangement)
  return slots


def weights_from(params: Any, config: PixArtConfig, layout: Layout) -> dict[str, Array]:
  """The inverse of `params_from`, equal to the bit."""
  weights: dict[str, Array] = {}
  for name, leaf in tree.named_leaves(params).items():
    rule, layers = _rule_of(name, config, layout)
    array = np.asarray(leaf)
    for slot, layer in enumerate(layers or [None]):
      part = array if layers is None else array[slot]
      parts = [part] if len(rule.names) == 1 else list(part)
      for their_name, piece in zip(rule.names, parts, strict=True):
        weights[their_name.format(i=layer)] = np.ascontiguousarray(
          rule.rearrangement.to_theirs(piece)
        )
  return weights


def shapes_in(weights: Weights, layout: Layout) -> dict[str, tuple[int, ...]]:
  """Shapes, in their own order, of the first tensor behind each leaf of ours.

  Only of leaves that are there, and for layers only the first that has them.
  """
  depth = depth_in(weights, layout)
  shapes = {}
  for ours, rule in layout.items():
    for i in range(depth) if ours.startswith("blocks/") else [None]:
      name = rule.names[0].format(i=i)
      if name in weights:
        shapes[ours] = weights[name].shape
        break
  return shapes


def layers_in(weights: Weights, layout: Layout, ours: str) -> tuple[int, ...]:
  """The layers in which the leaf `blocks/…` is there."""
  rule = layout[ours]
  depth = depth_in(weights, layout)
  return tuple(i for i in range(depth) if rule.names[0].format(i=i) in weights)


def depth_in(weights: Weights, layout: Layout) -> int:
  """Number of layers, counted from 0 up to the first gap."""
  (name,) = layout["blocks/scale_shift_table"].names
  return next(i for i in itertools.count() if name.format(i=i) not in weights)


def _rule_of(
  name: str, config: PixArtConfig, layout: Layout
) -> tuple[Rule, range | None]:
  """A leaf's rule, and the layers stacked in it."""
  for layers, _ in config.segments():
    prefix = f"{segment_name(layers)}/"
    if name.startswith(prefix):
      return layout[f"blocks/{name.removeprefix(prefix)}"], layers
  return layout[name], None
