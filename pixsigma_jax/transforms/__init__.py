"""Named, pure transforms of a trained model: weak to strong (PixArt-Σ, section 3.4).

Each takes hyper-parameters and parameters and returns new ones, sharing every leaf that
it does not touch. A stage's config names the transforms between its parent and itself.
"""

from collections.abc import Callable
from typing import Any

from pixsigma_jax.models.pixart import PixArtConfig
from pixsigma_jax.transforms.kv_compression import add_kv_compression
from pixsigma_jax.transforms.positions import extend_pe, interpolate_pe

__all__ = ["TRANSFORMS", "add_kv_compression", "extend_pe", "interpolate_pe"]

TRANSFORMS: dict[str, Callable[..., tuple[PixArtConfig, Any]]] = {
  "interpolate_pe": interpolate_pe,
  "extend_pe": extend_pe,
  "add_kv_compression": add_kv_compression,
}
