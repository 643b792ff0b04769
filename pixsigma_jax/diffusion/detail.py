"""Weights of the noise error by detail, for images of high resolution.

Two published ways to train on detail, as parts of the loss alone: the frequency
weights of FAPT (Zhao et al., UltraHR-100K, arXiv 2510.20661), and the wavelet mask of
LWD (Sigillo et al., Latent Wavelet Diffusion, ICLR 2026). Both see an image's tokens as
the image plane that they are patches of.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

LONGEST_RATIO = 4.0  # of an image's longer side to its shorter, as in published tables

_ROUND = 8  # sides of a spectrum are multiples of it, which FFTs are fast at


def frequency_weights(
  shape: tuple[int, int], gamma: float
) -> Float32[np.ndarray, "H W"]:
  """Excess weights (e^{γr} - 1)/(e^γ - 1) of a DFT's frequencies, from 0 to 1.

  FAPT's weight is 1 + λ times it. r is the frequency's radius over that of the highest,
  half a cycle a latent in both directions.

  Args:
    shape: of the DFT.
    gamma: γ, positive: how late the weights rise.
  """
  rows, columns = (np.fft.fftfreq(side) for side in shape)
  radius = np.hypot(rows[:, None], columns[None]) / math.hypot(0.5, 0.5)
  return (np.expm1(gamma * radius) / np.expm1(gamma)).astype(np.float32)


def spectral_excess(
  error: Float32[Array, "b n c"],
  *,
  coordinates: Int[Array, "b n 2"],
  grid: Int[Array, "b 2"],
  patch_size: int,
  gamma: float,
) -> Float32[Array, " b"]:
  """Mean of the squared error's spectrum, weighted by `frequency_weights`.

  Images of any grid share one canvas of zeros, on its side if they are taller than
  wide: the weights do not change by that. A longer DFT is the same spectrum at more
  frequencies, and by Parseval's theorem weights of 1 give the mean squared error.

  Args:
    error: of tokens `(p q c)`; zero where there is no token of the image.
    coordinates: row and column of each token.
    grid: token rows and columns; neither more than four times the other.
    patch_size: side of a token in latents.
    gamma: see `frequency_weights`.
  """
  b, n, channels = error.shape
  canvas = canvas_of(n)
  tall = (grid[:, 0] > grid[:, 1])[:, None]
  row = jnp.where(tall, coordinates[..., 1], coordinates[..., 0])
  column = jnp.where(tall, coordinates[..., 0], coordinates[..., 1])
  patches = error.reshape(b, n, patch_size, patch_size, -1)
  patches = jnp.where(tall[..., None, None, None], patches.swapaxes(2, 3), patches)
  plane = jnp.zeros((b, *canvas, *patches.shape[2:]), jnp.float32)
  # Padding adds zeros, wherever its coordinates point.
  at = (jnp.arange(b)[:, None], row, column)
  plane = plane.at[at].add(patches, mode="drop")
  sides = canvas[0] * patch_size, canvas[1] * patch_size
  plane = plane.transpose(0, 1, 3, 2, 4, 5).reshape(b, *sides, -1)
  spectrum = jnp.fft.fft2(plane, axes=(1, 2))
  power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
  weights = jnp.asarray(frequency_weights(sides, gamma))
  total = jnp.einsum("bhwc,hw->b", power, weights) / math.prod(sides)
  return total / (jnp.prod(grid, axis=1).astype(jnp.float32) * channels)


def canvas_of(length: int) -> tuple[int, int]:
  """Rows and columns of tokens that hold any image of up to `length` tokens.

  No side is more than four times the other, and the longer one lies along columns.
  """
  side = math.isqrt(max(length - 1, 0)) + 1  # rounded up
  longer = math.ceil(math.sqrt(LONGEST_RATIO)) * side
  return -(-side // _ROUND) * _ROUND, -(-longer // _ROUND) * _ROUND


def wavelet_mask(
  latents: Float[Array, "b n c"],
  *,
  mask: Bool[Array, "b n"],
  timesteps: Int[Array, " b"],
  num_timesteps: int,
  patch_size: int,
  offset: float,
) -> Bool[Array, "b n c"]:
  """Where LWD looks at the error: T (A + l) ≥ t.

  A is the energy of the Haar wavelets' three detail bands, over 2x2 latents and summed
  over channels, scaled to 0 … 1 within each image. So at little noise everything is
  kept, and at much noise what has detail.

  Args:
    latents: clean ones, as tokens `(p q c)`.
    mask: True for a token of the image.
    timesteps: t.
    num_timesteps: T.
    patch_size: side of a token in latents; even.
    offset: l; from 1 on everything is kept.

  Raises:
    ValueError: a token holds no whole 2x2 latents.
  """
  if patch_size % 2:
    raise ValueError(
      "Haar wavelets are of 2x2 latents, and a token here is "
      f"{patch_size}x{patch_size}: leave out "
      "loss.wavelet_offset, or take a model with an even patch size."
    )
  b, n, _ = latents.shape
  half = patch_size // 2
  blocks = latents.astype(jnp.float32).reshape(b, n, half, 2, half, 2, -1)
  details = jnp.stack(haar(blocks)[1:])
  energy = jnp.square(details).sum(axis=(0, -1))
  valid = mask[:, :, None, None]
  low = jnp.where(valid, energy, jnp.inf).min(axis=(1, 2, 3), keepdims=True)
  high = jnp.where(valid, energy, -jnp.inf).max(axis=(1, 2, 3), keepdims=True)
  # An image without any detail has none of it anywhere.
  scaled = (energy - low) / jnp.where(high > low, high - low, 1)
  times = timesteps.astype(jnp.float32)[:, None, None, None]
  keep = num_timesteps * (scaled + offset) >= times
  keep = jnp.broadcast_to(keep[:, :, :, None, :, None, None], blocks.shape)
  return keep.reshape(latents.shape)


def haar(blocks: Float[Array, "... p 2 q 2 c"]) -> tuple[Array, Array, Array, Array]:
  """Orthonormal Haar transform of 2x2 blocks: mean, and differences.

  Returns:
    four bands `[... p q c]`: the sum over 2, and the differences between columns,
    between rows, and between diagonals, over 2. Their squares add up to the block's.
  """
  a, b = blocks[..., 0, :, 0, :], blocks[..., 0, :, 1, :]
  c, d = blocks[..., 1, :, 0, :], blocks[..., 1, :, 1, :]
  rows, diagonals = (a + b - c - d) / 2, (a - b - c + d) / 2
  return (a + b + c + d) / 2, (a - b + c - d) / 2, rows, diagonals
