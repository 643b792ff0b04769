"""Makes a PixArt-Σ out of PixArt-α: longer captions, Σ's positions, no conditions."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pixsigma_jax.metadata import Metadata
from pixsigma_jax.models.autoencoders import SDXL_SCALING_FACTOR
from pixsigma_jax.models.embeddings import SizeConditions
from pixsigma_jax.models.layers import Compute
from pixsigma_jax.models.pixart import PixArtConfig
from pixsigma_jax.transforms import vae_swap

# Positions of every Σ lie in [0, 32) (pe_interpolation is image_size / 512); those of
# α-256 lie in [0, 16), of α-512 and α-1024 in [0, 32).
SPAN = 32


def alpha_to_sigma(
  config: PixArtConfig,
  params: Any,
  *,
  caption_length: int = 300,
  pe_interpolation: float | None = None,
  scaling_factor: float | None = SDXL_SCALING_FACTOR,
  fold_size: tuple[int, int] | None = None,
) -> tuple[PixArtConfig, Any]:
  """Carries α's parameters to Σ; what they compute changes as little as it can.

  Longer captions change nothing for those that fitted before: a caption's padding is
  masked, and no parameter has its length. The field of positions changes for α-256
  alone. α-1024's conditions on size and aspect ratio go: the reference drops what they
  add to the timestep's embedding; `fold_size` keeps it for images of that size, for
  which the model then is what it was, and gives it to images of all others.

  Args:
    caption_length: tokens of a caption.
    pe_interpolation: scale of the positions; None for Σ's, base_size / 32.
    scaling_factor: of the new latents, for the metadata, as `swap_vae` without
      statistics; None for those that the model was trained on.
    fold_size: (height, width) in pixels of the images whose conditions are kept; None
      drops them.

  Returns:
    The new hyper-parameters and tree; leaves that do not change are shared.

  Raises:
    ValueError: captions would become shorter, or `fold_size` has nothing to fold.
  """
  if caption_length < config.caption_length:
    raise ValueError(
      f"caption_length={caption_length} is below the {config.caption_length} tokens "
      "that the model was trained with: captions would be cut."
    )
  if pe_interpolation is None:
    pe_interpolation = config.base_size / SPAN
  if not pe_interpolation > 0:
    raise ValueError(f"pe_interpolation={pe_interpolation} must be above 0.")
  if fold_size is not None and not config.size_conditions:
    raise ValueError(
      f"fold_size={tuple(fold_size)} names images whose conditions are to be kept, but "
      "the model has no size_conditions: leave it out."
    )
  if fold_size is not None and (len(fold_size) != 2 or min(fold_size) < 1):
    raise ValueError(
      f"fold_size={tuple(fold_size)} must be the height and width of an image."
    )
  if config.size_conditions:
    params = dict(params)
    conditions = params.pop("size_conditions")
    if fold_size is not None:
      embedding = params["timestep_embedding"]
      bias = embedding["out"]["bias"]
      folded = bias + _condition(config, conditions, *fold_size)
      out = {**embedding["out"], "bias": folded}
      params["timestep_embedding"] = {**embedding, "out": out}
  target = dataclasses.replace(
    config,
    caption_length=caption_length,
    pe_interpolation=pe_interpolation,
    size_conditions=False,
  )
  return target, params


def became_sigma(
  metadata: Metadata,
  config: PixArtConfig,
  *,
  scaling_factor: float | None = SDXL_SCALING_FACTOR,
  **_: Any,
) -> Metadata:
  """Metadata of a model after `alpha_to_sigma` with these arguments."""
  if scaling_factor is None:
    return metadata
  return vae_swap.swapped(metadata, config, scaling_factor=scaling_factor)


def _condition(config: PixArtConfig, params: Any, height: int, width: int) -> Any:
  """Condition that images of that size add to the timestep's embedding, `[d]`."""
  conditions = SizeConditions(config.width, Compute(dtype=jnp.float32))
  image_size = jnp.array([[height, width]], jnp.float32)
  aspect_ratio = jnp.array([height / width], jnp.float32)
  with jax.default_matmul_precision("highest"):
    # Compiled in one: op by op would take longer.
    added: Any = jax.jit(conditions.apply)({"params": params}, image_size, aspect_ratio)
  return added[0]
