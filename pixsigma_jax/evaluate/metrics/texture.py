"""Metrics of fine texture in large images.

GLCM score and compression ratio are Diffusion-4K's (Zhang et al. 2025), as its
`eval.py` computes them.
"""

import io
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float64, Int, UInt8
from PIL import Image

_PATCH = 64
_LEVELS = 64
# Steps down and right of distance 1, 2, 3 and 4 at 0, 45, 90 and 135 degrees, rounded
# as scikit-image does.
_STEPS = [
  (round(np.sin(angle) * distance), round(np.cos(angle) * distance))
  for distance in (1, 2, 3, 4)
  for angle in (0, np.pi / 4, np.pi / 2, 3 * np.pi / 4)
]


def glcm_score(image: UInt8[np.ndarray, "H W 3"] | UInt8[np.ndarray, "H W"]) -> float:
  """GLCM score of one image as Diffusion-4K publishes it; higher has more detail.

  Grey levels in 64 steps, patches of 64 x 64, co-occurrence at distances 1 to 4 and
  angles 0, 45, 90, 135 degrees, normed for each. Of these 65,536 numbers, the entropy
  in bits of the *histogram of their values*, which is what scikit-image's
  `shannon_entropy` takes of an array; the mean over patches. That is not the entropy
  of the co-occurrence itself, see `glcm_entropy`.

  Args:
    image: RGB or grey; rows and columns that fill no patch are left out.

  Raises:
    ValueError: it is smaller than a patch.
  """
  return _mean_over_patches(image, lambda matrices: _histogram_entropy(matrices))


def glcm_entropy(image: UInt8[np.ndarray, "H W 3"] | UInt8[np.ndarray, "H W"]) -> float:
  """Entropy in bits of the co-occurrence of grey levels, mean over steps and patches.

  -Σ p·log₂ p of each of the matrices that `glcm_score` describes.

  Raises:
    ValueError: the image is smaller than a patch.
  """
  return _mean_over_patches(image, _true_entropy)


def _mean_over_patches(image, entropy) -> float:
  levels = grey(image) // (256 // _LEVELS)
  rows, columns = (side // _PATCH for side in levels.shape)
  if not rows * columns:
    raise ValueError(
      f"An image of {levels.shape[0]}x{levels.shape[1]} pixels has no patch of "
      f"{_PATCH}x{_PATCH} for a GLCM score."
    )
  scores = [
    entropy(_cooccurrence(levels[i : i + _PATCH, j : j + _PATCH]))
    for i in range(0, rows * _PATCH, _PATCH)
    for j in range(0, columns * _PATCH, _PATCH)
  ]
  return float(np.mean(scores))


def grey(
  image: UInt8[np.ndarray, "H W 3"] | UInt8[np.ndarray, "H W"],
) -> UInt8[np.ndarray, "H W"]:
  """Luma of Rec. 601 in OpenCV's fixed-point form."""
  if image.ndim == 2:
    return image
  red, green, blue = np.moveaxis(image.astype(np.int32), -1, 0)
  luma = (red * 4899 + green * 9617 + blue * 1868 + (1 << 13)) >> 14
  return luma.astype(np.uint8)


def _cooccurrence(
  patch: Int[np.ndarray, "p p"] | UInt8[np.ndarray, "p p"],
) -> Float64[np.ndarray, "s levels levels"]:
  """Share of each pair of levels, for each step."""
  patch = patch.astype(np.intp)
  side = len(patch)
  matrices = np.empty((len(_STEPS), _LEVELS, _LEVELS))
  for matrix, (down, right) in zip(matrices, _STEPS, strict=True):
    here = patch[: side - down, max(0, -right) : side - max(0, right)]
    there = patch[down:, max(0, right) : side + min(0, right)]
    pairs = np.bincount((here * _LEVELS + there).ravel(), minlength=_LEVELS**2)
    matrix[...] = pairs.reshape(_LEVELS, _LEVELS) / pairs.sum()
  return matrices


def _histogram_entropy(matrices: Float64[np.ndarray, "s l l"]) -> float:
  _, counts = np.unique(matrices, return_counts=True)
  p = counts / counts.sum()
  return float(-(p * np.log2(p)).sum())


def _true_entropy(matrices: Float64[np.ndarray, "s l l"]) -> float:
  logarithms = np.log2(np.where(matrices > 0, matrices, 1))
  return float(-(matrices * logarithms).sum(axis=(1, 2)).mean())


def compression_ratio(
  images: Iterable[UInt8[np.ndarray, "H W 3"]], *, quality: int = 95
) -> float:
  """Bytes of the images' pixels over bytes as JPEG; lower has more detail.

  Diffusion-4K's, over a whole set: sums of both, at Pillow's quality 95.

  Raises:
    ValueError: there is no image.
  """
  pixels = compressed = 0
  for image in images:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG", quality=quality)
    pixels += image.size
    compressed += file.tell()
  if not compressed:
    raise ValueError("A compression ratio needs at least one image.")
  return pixels / compressed


def seam_score(
  image: UInt8[np.ndarray, "H W 3"] | UInt8[np.ndarray, "H W"], period: int
) -> float:
  """Mean step of grey levels across borders of tiles over that between other pixels.

  1 where tiling leaves no trace; above where its seams show.

  Args:
    period: pixels between two borders, along both axes.

  Raises:
    ValueError: there is no border inside the image, or nothing beside them.
  """
  levels = grey(image).astype(np.float64)
  on_border, beside = [], []
  for axis in (0, 1):
    steps = np.abs(np.diff(levels, axis=axis))
    steps = steps.mean(axis=1 - axis)
    # Step i lies between pixels i and i + 1.
    border = (np.arange(len(steps)) + 1) % period == 0 if period > 1 else None
    if border is None or not border.any() or border.all():
      raise ValueError(
        f"Tiles of {period} pixels leave no border inside an image of "
        f"{levels.shape[0]}x{levels.shape[1]}, or nothing between borders."
      )
    on_border.append(steps[border])
    beside.append(steps[~border])
  rest = np.concatenate(beside).mean()
  seams = np.concatenate(on_border).mean()
  if rest == 0:
    return 1.0 if seams == 0 else float("inf")
  return float(seams / rest)


def high_frequency_share(
  image: UInt8[np.ndarray, "H W 3"] | UInt8[np.ndarray, "H W"], *, above: float = 0.25
) -> float:
  """Share of an image's power, its mean aside, at frequencies above a radius.

  Args:
    above: radius in cycles a pixel; 0.5 is the finest along an axis.

  Raises:
    ValueError: the radius is not between 0 and 0.5.
  """
  if not 0 <= above <= 0.5:
    raise ValueError(f"above={above} must lie between 0 and 0.5 cycles a pixel.")
  levels = grey(image).astype(np.float64)
  power = np.abs(np.fft.fft2(levels - levels.mean())) ** 2
  down, right = (np.fft.fftfreq(side) for side in levels.shape)
  radius = np.hypot(down[:, None], right[None])
  total = power.sum()
  return float(power[radius > above].sum() / total) if total else 0.0
