"""Named, pure transforms of a trained model: weak to strong (PixArt-Σ, section 3.4).

Each takes hyper-parameters and parameters and returns new ones, sharing every leaf that
it does not touch. A stage's config names the transforms between its parent and itself;
`python -m pixsigma_jax.transform` applies one to a snapshot.
"""

from pixsigma_jax.transforms.alpha_to_sigma import alpha_to_sigma
from pixsigma_jax.transforms.average import average
from pixsigma_jax.transforms.chain import (
  OF_SEVERAL,
  TRANSFORMS,
  Model,
  apply_transforms,
  summary,
  with_defaults,
)
from pixsigma_jax.transforms.depth import grow_depth
from pixsigma_jax.transforms.kv_compression import (
  add_kv_compression,
  remove_kv_compression,
)
from pixsigma_jax.transforms.lora import merge_lora, unmerge_lora
from pixsigma_jax.transforms.positions import extend_pe, interpolate_pe
from pixsigma_jax.transforms.post_hoc_ema import post_hoc_ema
from pixsigma_jax.transforms.vae_swap import swap_vae

__all__ = [
  "OF_SEVERAL",
  "TRANSFORMS",
  "Model",
  "add_kv_compression",
  "alpha_to_sigma",
  "apply_transforms",
  "average",
  "extend_pe",
  "grow_depth",
  "interpolate_pe",
  "merge_lora",
  "post_hoc_ema",
  "remove_kv_compression",
  "summary",
  "swap_vae",
  "unmerge_lora",
  "with_defaults",
]
