"""Guidance: exaggerates what a caption, or a stronger network, changes.

Each function says in which space it works: on the network's own predictions of noise ε,
or on clean estimates x_0 = (x_t - σ ε) / α. Where a formula is linear in the
predictions the space makes no difference; where it projects or measures them, it does.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32


def guide(
  unconditional: Float[Array, "*shape"],
  conditional: Float[Array, "*shape"],
  scale: float | Float[Array, ""],
) -> Float32[Array, "*shape"]:
  """Moves a prediction `scale` times the way from unconditional to conditional.

  Classifier-free guidance (Ho & Salimans 2022, equation 6, whose w is `scale` - 1).
  Linear, so of noise and of clean estimates alike. It costs two calls of the network,
  one for each prediction. 0 is unconditional, 1 conditional, more exaggerates. In
  float32 even where the network answers in bfloat16: the difference is small and is
  multiplied.
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
  outside: float = 1.0,
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
    outside: the scale there; 0 is none for `guide_away`.
  """
  fraction = timestep / (num_timesteps - 1)
  inside = (fraction >= low) & (fraction <= high)
  return jnp.where(inside, jnp.float32(scale), jnp.float32(outside))


def guide_away(
  guided: Float[Array, "*shape"],
  conditional: Float[Array, "*shape"],
  weakened: Float[Array, "*shape"],
  scale: float | Float[Array, ""],
) -> Float32[Array, "*shape"]:
  """Adds `scale` times the way from a weakened network to the whole one.

  Perturbed-attention guidance (Ahn et al. 2024, section 4), where self-attention of
  some layers is the identity, and skip-layer guidance (Hyung et al. 2024),
  where some blocks are left out. Linear, so of noise and of clean estimates alike. It
  costs one more call of the network: 1.5 times a guided step, twice an unguided one.

  Autoguidance too (Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of
  Itself", equation 3: D_0 + w (D_1 - D_0), D_0 being a smaller or less trained model
  with the caption), whose w is `scale` + 1 here. It costs one call of that model.

  Args:
    guided: what other guidance made, or `conditional`.
    conditional, weakened: predictions with the caption, of both networks.
  """
  conditional = conditional.astype(jnp.float32)
  return guided + scale * (conditional - weakened.astype(jnp.float32))


def guide_projected(
  unconditional: Float[Array, "b n c"],
  conditional: Float[Array, "b n c"],
  scale: float | Float[Array, ""],
  mask: Bool[Array, "b n"],
  average: Float32[Array, "b n c"],
  *,
  momentum: float | Float[Array, ""],
  threshold: float | Float[Array, ""],
  eta: float | Float[Array, ""],
) -> tuple[Float32[Array, "b n c"], Float32[Array, "b n c"]]:
  """Adaptive projected guidance (Sadat et al. 2024, algorithm 1), of clean estimates.

  The difference of both, averaged over steps and limited in length, loses the part
  along the conditional estimate, which is what saturates images. It costs no call of
  the network beyond those of `guide`.

  Args:
    unconditional, conditional: clean estimates, as tokens. On predictions of noise the
      projection would be another.
    scale: see `guide`.
    mask: True for a token of the image; the others count for nothing.
    average: of the differences of earlier steps; zeros in the first.
    momentum: β; below 0 it takes back what earlier steps did.
    threshold: r, the length that a difference of an image can have.
    eta: η, share of the part along the conditional estimate that stays; 1 with no
      momentum and no limit is `guide`.

  Returns:
    The guided clean estimates, and the average.
  """
  unconditional, conditional = (
    x.astype(jnp.float32) for x in (unconditional, conditional)
  )
  average = conditional - unconditional + momentum * average
  length = jnp.sqrt(_product(average, average, mask))
  # Equal predictions have no direction to limit.
  limited = average * jnp.minimum(1, threshold / jnp.where(length > 0, length, 1))
  squared = _product(conditional, conditional, mask)
  share = _product(limited, conditional, mask) / jnp.where(squared > 0, squared, 1)
  along = share * conditional
  return conditional + (scale - 1) * (limited - along + eta * along), average


def guide_from_optimal(
  unconditional: Float[Array, "b n c"],
  conditional: Float[Array, "b n c"],
  scale: float | Float[Array, ""],
  mask: Bool[Array, "b n"],
) -> Float32[Array, "b n c"]:
  """CFG-Zero*'s optimised scale (Fan et al. 2025), of predictions of noise.

  As `guide`, but the unconditional prediction u is first multiplied by the α of each
  image that brings it nearest to the conditional one c, ⟨c, u⟩ / ‖u‖². The paper has it
  for velocities; its other half, zeros in the first steps, is for these alone. It
  costs no call of the network beyond those of `guide`.

  Args:
    unconditional, conditional: predictions of noise, as tokens.
    scale: see `guide`.
    mask: True for a token of the image; the others count for nothing.
  """
  unconditional, conditional = (
    x.astype(jnp.float32) for x in (unconditional, conditional)
  )
  squared = _product(unconditional, unconditional, mask)
  share = _product(conditional, unconditional, mask) / (squared + 1e-8)
  return guide(share * unconditional, conditional, scale)


def _product(
  one: Float32[Array, "b n c"], other: Float32[Array, "b n c"], mask: Bool[Array, "b n"]
) -> Float32[Array, "b 1 1"]:
  """Inner product of each image's valid values."""
  return (one * other).sum(axis=(1, 2), keepdims=True, where=mask[..., None])


def _deviation(
  tokens: Float[Array, "b n c"], mask: Bool[Array, "b n"]
) -> Float32[Array, "b 1 1"]:
  """Standard deviation of each image's valid values."""
  valid = jnp.broadcast_to(mask[..., None], tokens.shape)
  values = tokens.astype(jnp.float32)
  return values.std(axis=(1, 2), keepdims=True, where=valid)
