"""Named, pure transforms of a trained model: weak to strong (PixArt-Σ, section 3.4).

Each takes hyper-parameters and parameters and returns new ones, sharing every leaf that
it does not touch. A stage's config names the transforms between its parent and itself;
`python -m pixsigma_jax.transform` applies one to a snapshot.
"""

from pixsigma_jax.transforms.alpha_to_sigma import alpha_to_sigma
from pixsigma_jax.transforms.average import average
from pixsigma_jax.transforms.chain import (
  TRANSFORMS,
  Model,
  apply_transforms,
  with_defaults,
)
from pixsigma_jax.transforms.kv_compression import (
  add_kv_compression,
  remove_kv_compression,
)
from pixsigma_jax.transforms.positions import extend_pe, interpolate_pe
from pixsigma_jax.transforms.vae_swap import swap_vae

__all__ = [
  "TRANSFORMS",
  "Model",
  "add_kv_compression",
  "alpha_to_sigma",
  "apply_transforms",
  "average",
  "extend_pe",
  "interpolate_pe",
  "remove_kv_compression",
  "swap_vae",
  "with_defaults",
]
