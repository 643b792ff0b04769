"""Classifier-free guidance (Ho & Salimans 2022): exaggerates what a caption changes."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32


def guide(
  unconditional: Float[Array, "*shape"],
  conditional: Float[Array, "*shape"],
  scale: float | Float[Array, ""],
) -> Float32[Array, "*shape"]:
  """Moves a prediction `scale` times the way from unconditional to conditional.

  0 is unconditional, 1 conditional, more exaggerates. In float32 even where the
  network answers in bfloat16: the difference is small and is multiplied.
  """
  unconditional = unconditional.astype(jnp.float32)
  conditional = conditional.astype(jnp.float32)
  return unconditional + scale * (conditional - unconditional)


def guide_first_three(
  unconditional: Float[Array, "*shape"],
  conditional: Float[Array, "*shape"],
  scale: float | Float[Array, ""],
  channels: int,
) -> Float32[Array, "*shape"]:
  """As `guide`, but every channel from the fourth on stays conditional.

  So does the reference when it samples with IDDPM, and the variance stays conditional
  too (`PixArtMS.py: forward_with_cfg`, from the days of three-channel pixels).

  Args:
    unconditional, conditional: the last axis holds latents or whole patches of them,
      channels fastest.
    scale: see `guide`.
    channels: of the latents.

  Raises:
    ValueError: if the last axis does not hold whole latents.
  """
  length = conditional.shape[-1]
  if length % channels:
    raise ValueError(
      f"The last axis, {length} long, does not hold latents of {channels} channels: "
      f"it must be a multiple of {channels}."
    )
  guided = guide(unconditional, conditional, scale)
  first = jnp.broadcast_to(jnp.arange(length) % channels < 3, guided.shape)
  return jnp.where(first, guided, conditional.astype(jnp.float32))


def rescale(
  guided: Float[Array, "b n c"],
  conditional: Float[Array, "b n c"],
  factor: float | Float[Array, ""],
  mask: Bool[Array, "b n"],
) -> Float32[Array, "b n c"]:
  """Takes back the contrast that guidance adds (Lin et al. 2023, section 3.4).

  Args:
    guided, conditional: predictions, as tokens.
    factor: 0 leaves `guided` as it is, 1 gives each image the standard deviation of
      its conditional prediction; the paper's choice is 0.7.
    mask: True for a token of the image; the others are scaled along, uncounted.
  """
  guided = guided.astype(jnp.float32)
  wanted, found = (_deviation(tokens, mask) for tokens in (conditional, guided))
  # A prediction without contrast, as of a network before its first update, stays.
  ratio = jnp.where(found > 0, wanted / jnp.where(found > 0, found, 1), 1)
  return guided * (1 + factor * (ratio - 1))


def scale_within(
  timestep: Float32[Array, ""],
  scale: float | Float[Array, ""],
  low: float | Float[Array, ""],
  high: float | Float[Array, ""],
  num_timesteps: int,
) -> Float32[Array, ""]:
  """The guidance scale of a timestep: `scale` inside an interval, 1 outside.

  Guidance hurts variety where there is most noise and does nothing where there is
  least (Kynkäänniemi et al. 2024).

  Args:
    timestep: 0 … `num_timesteps` - 1, or a fraction between them.
    scale: see `guide`.
    low, high: ends of the interval, both inside, as fractions of the way from timestep
      0 to the last: 0 and 1 are all of the schedule.
    num_timesteps: of the schedule.
  """
  fraction = timestep / (num_timesteps - 1)
  inside = (fraction >= low) & (fraction <= high)
  return jnp.where(inside, jnp.float32(scale), jnp.float32(1))


def _deviation(
  tokens: Float[Array, "b n c"], mask: Bool[Array, "b n"]
) -> Float32[Array, "b 1 1"]:
  """Standard deviation of each image's valid values."""
  valid = jnp.broadcast_to(mask[..., None], tokens.shape)
  values = tokens.astype(jnp.float32)
  return values.std(axis=(1, 2), keepdims=True, where=valid)
