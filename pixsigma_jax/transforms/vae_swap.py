"""Fits a model to another autoencoder: VAE adaptation (PixArt-Σ, section 3.4).

The network sees x = s · l, latents l of an autoencoder times its scaling factor s. Two
autoencoders make different latents of one image; as far as they differ in each
channel's mean m and standard deviation d alone,

  (l_old - m_old) / d_old = (l_new - m_new) / d_new,

so that x_old = a · x_new + b, with a = s_old d_old / (s_new d_new) and
b = s_old m_old - a s_new m_new. Given these statistics the network is rewritten so that
it computes on any z what it did on a · z + b:

  patch embedding  W (a z + b) + c = (W a) z + (c + W b), exactly;
  noise            a z + b = α x_old + σ n_old and z = α x_new + σ n_new give
                   n_new = n_old / a - (1 - α) / (σ a) · b: the head's noise rows are
                   divided by a, which is exact for b = 0. What remains of b depends on
                   the timestep, which a linear head cannot follow; it vanishes with σ;
  variance logits  stay: they interpolate between variances of the schedule, which knows
                   nothing of the data.

For b = 0 a deterministic sampler that starts from its old noise over a therefore ends
at its old latents over a. But noise has unit variance whatever the latents: where a is
not 1, the model meets other ratios of signal to noise than it knows, and training has
to mend that (the paper: within about 2,000 steps).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64

from pixsigma_jax.metadata import Metadata
from pixsigma_jax.models.autoencoders import vae_identity
from pixsigma_jax.models.pixart import PixArtConfig


def swap_vae(
  config: PixArtConfig,
  params: Any,
  *,
  scaling_factor: float,
  autoencoder: Mapping[str, Any] | None = None,
  channels: int | None = None,
  old_scaling_factor: float | None = None,
  old_mean: Sequence[float] = (),
  old_std: Sequence[float] = (),
  new_mean: Sequence[float] = (),
  new_std: Sequence[float] = (),
) -> tuple[PixArtConfig, Any]:
  """Fits the patch embedding and the head to the latents of another autoencoder.

  Without statistics and with as many channels, no parameter changes: then only the
  metadata say whose latents the model is for, as in the paper's adaptation.

  With more channels the new ones come last. Their input kernel is zero and so is their
  part of the head, as a fresh head is: what the model says of the others is what it
  said before. With fewer, the last ones are cut off, and what they contributed is lost.

  Args:
    scaling_factor: what the new latents are multiplied with for the network.
    autoencoder: identity of the new autoencoder, as a dataset's manifest has it; None
      for what follows from the other arguments, see `swapped`.
    channels: of the new latents; None for as many as before.
    old_scaling_factor, old_mean, old_std: of the latents that the model knows, before
      scaling, a number for each channel, and
    new_mean, new_std: of the new latents. All five, or none of them.

  Returns:
    The new hyper-parameters and tree; leaves that do not change are shared.

  Raises:
    ValueError: the arguments contradict each other or the model.
  """
  _check_positive("scaling_factor", scaling_factor)
  channels = config.in_channels if channels is None else channels
  if channels < 1:
    raise ValueError(f"channels={channels} must be at least 1.")
  scale, shift = _affine(
    (config.in_channels, channels),
    scaling_factor=(old_scaling_factor, scaling_factor),
    mean=(old_mean, new_mean),
    std=(old_std, new_std),
  )
  parts = {
    "patch_embedding": _patch_embedding(
      params["patch_embedding"], channels, scale, shift
    ),
    "out": _head(params["out"], config, channels, scale),
  }
  changed = {name: part for name, part in parts.items() if part is not params[name]}
  if changed:
    params = {**params, **changed}
  return dataclasses.replace(config, in_channels=channels), params


def swapped(
  metadata: Metadata,
  config: PixArtConfig,
  *,
  scaling_factor: float,
  autoencoder: Mapping[str, Any] | None = None,
  channels: int | None = None,
  old_scaling_factor: float | None = None,
  **_: Any,
) -> Metadata:
  """Metadata of a model's latents after `swap_vae` with the same arguments.

  An autoencoder that is not named is, after a VAE, the VAE of that scaling factor and
  as many channels, `models/autoencoders.py: vae_identity`; after one that has no
  weights, the same one.

  Args:
    config: of the model before.

  Raises:
    ValueError: the model is not of `old_scaling_factor`, or its autoencoder cannot have
      so many channels.
  """
  if old_scaling_factor not in (None, metadata.scaling_factor):
    raise ValueError(
      f"old_scaling_factor={old_scaling_factor}, but the model was trained with "
      f"{metadata.scaling_factor}: give the statistics of those latents."
    )
  channels = config.in_channels if channels is None else channels
  if autoencoder is None:
    identity = metadata.autoencoder
    if "downsampling" in identity:
      identity = vae_identity(scaling_factor, channels, identity["downsampling"])
    elif channels != config.in_channels:
      raise ValueError(
        f"The latents of {identity} have {config.in_channels} channels: say with "
        f"autoencoder whose latents have {channels}."
      )
  else:
    identity = dict(autoencoder)
    if identity.get("latent_channels", channels) != channels:
      raise ValueError(
        f"The latents of {identity} do not have {channels} channels: correct "
        "autoencoder or channels."
      )
  return dataclasses.replace(
    metadata, autoencoder=identity, scaling_factor=scaling_factor
  )


def _affine(
  channels: tuple[int, int],
  *,
  scaling_factor: tuple[float | None, float],
  mean: tuple[Sequence[float], Sequence[float]],
  std: tuple[Sequence[float], Sequence[float]],
) -> tuple[Float64[np.ndarray, " c"], Float64[np.ndarray, " c"]]:
  """a and b of x_old = a · x_new + b, for the channels that both latents have.

  Args:
    channels, scaling_factor, mean, std: of the old latents and of the new.
  """
  old_factor, new_factor = scaling_factor
  kept = min(channels)
  given = {
    "old_scaling_factor": old_factor is not None,
    "old_mean": len(mean[0]) > 0,
    "new_mean": len(mean[1]) > 0,
    "old_std": len(std[0]) > 0,
    "new_std": len(std[1]) > 0,
  }
  if not any(given.values()):
    return np.ones(kept), np.zeros(kept)
  if old_factor is None or not all(given.values()):
    missing = [name for name, is_given in given.items() if not is_given]
    raise ValueError(
      f"swap_vae was given statistics of the latents, but not {', '.join(missing)}: "
      "give all five, or none."
    )
  for age, count, m, d in zip(("old", "new"), channels, mean, std, strict=True):
    for name, values in ((f"{age}_mean", m), (f"{age}_std", d)):
      if len(values) != count:
        raise ValueError(f"{name} has {len(values)} numbers for {count} channels.")
    if not np.isfinite(m).all():
      raise ValueError(f"{age}_mean={', '.join(map(str, m))} must be finite.")
    _check_positive(f"{age}_std", *d)
  _check_positive("old_scaling_factor", old_factor)
  (old_mean, new_mean), (old_std, new_std) = (
    [np.asarray(values, np.float64)[:kept] for values in pair] for pair in (mean, std)
  )
  scale = (old_factor * old_std) / (new_factor * new_std)
  return scale, old_factor * old_mean - scale * (new_factor * new_mean)


def _check_positive(name: str, *values: float) -> None:
  if not all(0 < value < float("inf") for value in values):
    raise ValueError(
      f"{name}={', '.join(map(str, values))} must be positive and finite."
    )


def _patch_embedding(
  embedding: Mapping[str, Any],
  channels: int,
  scale: Float64[np.ndarray, " c"],
  shift: Float64[np.ndarray, " c"],
) -> Mapping[str, Any]:
  """Kernel `[p q c d]` and bias of W (scale · z + shift) + c."""
  kernel, bias = embedding["kernel"], embedding["bias"]
  kept, new = len(scale), channels - kernel.shape[2]
  if shift.any():
    moved = jnp.asarray(shift.reshape(1, 1, -1, 1), kernel.dtype)
    bias = bias + (kernel[:, :, :kept] * moved).sum(axis=(0, 1, 2))
  if new < 0:
    kernel = kernel[:, :, :kept]
  if (scale != 1).any():
    kernel = kernel * jnp.asarray(scale.reshape(1, 1, -1, 1), kernel.dtype)
  if new > 0:
    kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, new), (0, 0)))
  if kernel is embedding["kernel"] and bias is embedding["bias"]:
    return embedding
  return {"kernel": kernel, "bias": bias}


def _head(
  head: Mapping[str, Any],
  config: PixArtConfig,
  channels: int,
  scale: Float64[np.ndarray, " c"],
) -> Mapping[str, Any]:
  """Kernel and bias with the noise over `scale`; outputs are `(p q halves c)`."""
  kept, new = len(scale), channels - config.in_channels
  same = (scale == 1).all()
  if same and not new:
    return head
  halves = config.out_channels // config.in_channels
  factors = np.ones((halves, kept))
  factors[0] = 1 / scale  # the second half are variance logits

  def rewritten(leaf: Any) -> Any:
    rows = leaf.shape[:-1]
    parts = leaf.reshape(*rows, -1, halves, config.in_channels)[..., :kept]
    if not same:
      ones = (1,) * (parts.ndim - 2)
      parts = parts * jnp.asarray(factors.reshape(*ones, halves, kept), leaf.dtype)
    if new > 0:
      parts = jnp.pad(parts, ((0, 0),) * (parts.ndim - 1) + ((0, new),))
    return parts.reshape(*rows, -1)

  return {name: rewritten(leaf) for name, leaf in head.items()}
