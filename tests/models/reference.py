"""The published code's names and layouts, as this suite's golden files hold them.

`tests/golden/model_*.npz` were written by running PixArt-alpha/PixArt-sigma @ 1ce521a
in float32 on CPU with tiny random weights: `w.<official key>`, inputs `in.*`, outputs,
and gradients `g.<official key>` of mean((out - target)²).
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from pixsigma_jax.models.kv_compression import KVCompression
from pixsigma_jax.models.pixart import PixArtConfig, segment_name

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"

_COMPRESSED = (2, 3)
CASES: dict[str, dict] = {
  "ms_plain": {},
  "plain_square": {},
  "ms_kv2": {"kv_compression": KVCompression(ratio=4, layers=_COMPRESSED)},
  "ms_kv2_odd": {"kv_compression": KVCompression(ratio=4, layers=_COMPRESSED)},
  "ms_kv3": {"kv_compression": KVCompression(ratio=9, layers=_COMPRESSED)},
  "ms_qknorm": {"qk_norm": True},
  "ms_micro": {"size_conditions": True},
}


def load(case: str) -> tuple[PixArtConfig, dict[str, np.ndarray]]:
  config = PixArtConfig(
    depth=4,
    width=48,
    num_heads=4,
    patch_size=2,
    base_size=4,
    # The non-multi-scale model was saved with the table of its own resolution.
    pe_interpolation=2.0,
    caption_width=32,
    caption_length=10,
    **CASES[case],
  )
  with np.load(GOLDEN / f"model_{case}.npz") as file:
    return config, dict(file)


def channels_last(x: np.ndarray) -> np.ndarray:
  return np.moveaxis(x, 1, -1)


def params_from(
  arrays: dict[str, np.ndarray], prefix: str, config: PixArtConfig
) -> dict:
  """Our tree out of the official keys that start with `prefix` (`w.` or `g.`)."""
  source = {k[len(prefix) :]: v for k, v in arrays.items() if k.startswith(prefix)}
  for unused in ("pos_embed", "y_embedder.y_embedding"):  # buffers, not parameters
    source.pop(unused, None)

  def pop(key):
    return source.pop(key)

  def linear(key, copies=1):
    kernel, bias = pop(f"{key}.weight"), pop(f"{key}.bias")
    if copies > 1:
      kernel = kernel.reshape(copies, -1, kernel.shape[1])
      bias = bias.reshape(copies, -1)
    return {"kernel": np.swapaxes(kernel, -1, -2), "bias": bias}

  def mlp(key, first, second):
    return {"in": linear(f"{key}.{first}"), "out": linear(f"{key}.{second}")}

  def norm(key):
    return {"scale": pop(f"{key}.weight"), "bias": pop(f"{key}.bias")}

  def block(key, compressed):
    attention = {"qkv": linear(f"{key}.attn.qkv", 3), "out": linear(f"{key}.attn.proj")}
    if config.qk_norm:
      attention["query_norm"] = norm(f"{key}.attn.q_norm")
      attention["key_norm"] = norm(f"{key}.attn.k_norm")
    if compressed:
      attention["kv_compressor"] = {
        "kernel": np.moveaxis(pop(f"{key}.attn.sr.weight")[:, 0], 0, -1),
        "bias": pop(f"{key}.attn.sr.bias"),
        "norm": norm(f"{key}.attn.norm"),
      }
    return {
      "scale_shift_table": pop(f"{key}.scale_shift_table"),
      "attention": attention,
      "cross_attention": {
        "query": linear(f"{key}.cross_attn.q_linear"),
        "kv": linear(f"{key}.cross_attn.kv_linear", 2),
        "out": linear(f"{key}.cross_attn.proj"),
      },
      "mlp": mlp(f"{key}.mlp", "fc1", "fc2"),
    }

  def stack(*leaves):
    if isinstance(leaves[0], dict):
      return {k: stack(*(leaf[k] for leaf in leaves)) for k in leaves[0]}
    return np.stack(leaves)

  params = {
    "patch_embedding": {
      "kernel": pop("x_embedder.proj.weight").transpose(2, 3, 1, 0),
      "bias": pop("x_embedder.proj.bias"),
    },
    "timestep_embedding": mlp("t_embedder.mlp", 0, 2),
    "modulation": linear("t_block.1"),
    "caption_projection": mlp("y_embedder.y_proj", "fc1", "fc2"),
    "scale_shift_table": pop("final_layer.scale_shift_table"),
    "out": linear("final_layer.linear"),
  }
  if config.size_conditions:
    params["size_conditions"] = {
      "size": mlp("csize_embedder.mlp", 0, 2),
      "aspect_ratio": mlp("ar_embedder.mlp", 0, 2),
    }
  for layers, compression in config.segments():
    blocks = [block(f"blocks.{i}", bool(compression.layers)) for i in layers]
    params[segment_name(layers)] = stack(*blocks)
  assert not source, f"official keys left over: {sorted(source)}"
  return jax.tree.map(jnp.asarray, params)
