"""Checkpoints of other projects, in and out."""

from pixsigma_jax.convert.pixart import (
  from_diffusers,
  from_pixart,
  to_diffusers,
  to_pixart,
)

__all__ = ["from_diffusers", "from_pixart", "to_diffusers", "to_pixart"]
