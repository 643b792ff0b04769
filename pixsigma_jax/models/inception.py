"""Inception-v3, frozen: images to the features that FID and KID compare.

Szegedy et al. 2015 (arXiv 1512.00567), in two variants. `fid` is the network of
TensorFlow's 2015-12-05 graph, as pytorch-fid and torch-fidelity carry it: its average
pools do not count the padding, its last block pools by maximum, its classes are 1008.
`torchvision` is the one of that library, which TextAtlasEval takes.
"""

import dataclasses
import functools
from typing import Any, Literal, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, UInt8
from PIL import Image

Variant: TypeAlias = Literal["fid", "torchvision"]

SIZE = 299  # pixels a side that both variants were trained with
FEATURES = 2048
CLASSES: dict[Variant, int] = {"fid": 1008, "torchvision": 1000}


@dataclasses.dataclass(frozen=True)
class Conv:
  """A convolution of a branch: output channels, kernel and stride.

  Odd kernels of stride 1 keep the size, all others take no padding, but those of the
  stem: `valid` says so.
  """

  features: int
  kernel: tuple[int, int] = (1, 1)
  stride: int = 1
  valid: bool = False


# A branch is its convolutions by name, in order; what a tuple of two names holds runs
# side by side on the same input. "pool" stands for the block's pooling.
_Branch: TypeAlias = tuple[tuple[str, Conv], ...]


def _wide(features: int) -> Conv:
  return Conv(features, (1, 7))


def _tall(features: int) -> Conv:
  return Conv(features, (7, 1))


def _square(features: int, stride: int = 1) -> Conv:
  return Conv(features, (3, 3), stride, valid=stride > 1)


def _block_a(pool: int) -> tuple[_Branch, ...]:
  return (
    (("branch1x1", Conv(64)),),
    (("branch5x5_1", Conv(48)), ("branch5x5_2", Conv(64, (5, 5)))),
    (
      ("branch3x3dbl_1", Conv(64)),
      ("branch3x3dbl_2", _square(96)),
      ("branch3x3dbl_3", _square(96)),
    ),
    (("pool", Conv(0)), ("branch_pool", Conv(pool))),
  )


def _block_c(inner: int) -> tuple[_Branch, ...]:
  return (
    (("branch1x1", Conv(192)),),
    (
      ("branch7x7_1", Conv(inner)),
      ("branch7x7_2", _wide(inner)),
      ("branch7x7_3", _tall(192)),
    ),
    (
      ("branch7x7dbl_1", Conv(inner)),
      ("branch7x7dbl_2", _tall(inner)),
      ("branch7x7dbl_3", _wide(inner)),
      ("branch7x7dbl_4", _tall(inner)),
      ("branch7x7dbl_5", _wide(192)),
    ),
    (("pool", Conv(0)), ("branch_pool", Conv(192))),
  )


_BLOCK_E: tuple[_Branch, ...] = (
  (("branch1x1", Conv(320)),),
  (
    ("branch3x3_1", Conv(384)),
    ("branch3x3_2a", Conv(384, (1, 3))),
    ("branch3x3_2b", Conv(384, (3, 1))),
  ),
  (
    ("branch3x3dbl_1", Conv(448)),
    ("branch3x3dbl_2", _square(384)),
    ("branch3x3dbl_3a", Conv(384, (1, 3))),
    ("branch3x3dbl_3b", Conv(384, (3, 1))),
  ),
  (("pool", Conv(0)), ("branch_pool", Conv(192))),
)

# The stem, then the blocks, by torchvision's names.
STEM: tuple[tuple[str, Conv | None], ...] = (
  ("Conv2d_1a_3x3", _square(32, 2)),
  ("Conv2d_2a_3x3", Conv(32, (3, 3), valid=True)),
  ("Conv2d_2b_3x3", _square(64)),
  ("maxpool1", None),
  ("Conv2d_3b_1x1", Conv(80)),
  ("Conv2d_4a_3x3", Conv(192, (3, 3), valid=True)),
  ("maxpool2", None),
)
BLOCKS: dict[str, tuple[_Branch, ...]] = {
  "Mixed_5b": _block_a(32),
  "Mixed_5c": _block_a(64),
  "Mixed_5d": _block_a(64),
  "Mixed_6a": (
    (("branch3x3", _square(384, 2)),),
    (
      ("branch3x3dbl_1", Conv(64)),
      ("branch3x3dbl_2", _square(96)),
      ("branch3x3dbl_3", _square(96, 2)),
    ),
    (("shrink", Conv(0)),),
  ),
  "Mixed_6b": _block_c(128),
  "Mixed_6c": _block_c(160),
  "Mixed_6d": _block_c(160),
  "Mixed_6e": _block_c(192),
  "Mixed_7a": (
    (("branch3x3_1", Conv(192)), ("branch3x3_2", _square(320, 2))),
    (
      ("branch7x7x3_1", Conv(192)),
      ("branch7x7x3_2", _wide(192)),
      ("branch7x7x3_3", _tall(192)),
      ("branch7x7x3_4", _square(192, 2)),
    ),
    (("shrink", Conv(0)),),
  ),
  "Mixed_7b": _BLOCK_E,
  "Mixed_7c": _BLOCK_E,
}


class Inception(nn.Module):
  """Images in [-1, 1] to features and logits.

  Batch norms are folded: each convolution has a `scale` and a `shift` for its outputs.
  """

  variant: Variant
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, images: Float32[Array, "b H W 3"]
  ) -> tuple[Float32[Array, "b 2048"], Float32[Array, "b k"]]:
    """Features after the last pooling, and logits of the classes without their bias.

    The Inception score is defined on logits without a bias (Salimans et al.'s code).
    """
    x = images
    for name, conv in STEM:
      x = _max_pool(x, 2) if conv is None else _Conv(conv, self.dtype, name=name)(x)
    for name, branches in BLOCKS.items():
      x = _Block(branches, self._pool(name), self.dtype, name=name)(x)
    features = x.mean(axis=(1, 2))
    kernel = self.param(
      "fc_kernel", nn.initializers.lecun_normal(), (FEATURES, CLASSES[self.variant])
    )
    return features, features @ kernel

  def _pool(self, block: str) -> Literal["whole", "inside", "max"]:
    if self.variant == "torchvision":
      return "whole"
    return "max" if block == "Mixed_7c" else "inside"


class _Block(nn.Module):
  branches: tuple[_Branch, ...]
  pool: Literal["whole", "inside", "max"]
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Float32[Array, "b h w c"]) -> Float32[Array, "b H W C"]:
    outputs = [y for branch in self.branches for y in self._branch(branch, x)]
    return jnp.concatenate(outputs, axis=-1)

  def _branch(self, branch: _Branch, x: Array) -> list[Array]:
    ends: list[Array] = []
    for name, conv in branch:
      if name == "pool":
        x = _max_pool(x, 1) if self.pool == "max" else _mean_pool(x, self.pool)
      elif name == "shrink":
        x = _max_pool(x, 2)
      elif name[-1] in "ab":  # two ends of one branch, side by side
        ends.append(_Conv(conv, self.dtype, name=name)(x))
      else:
        x = _Conv(conv, self.dtype, name=name)(x)
    return ends or [x]


class _Conv(nn.Module):
  """Convolution, folded batch norm and ReLU."""

  conv: Conv
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Float32[Array, "b h w i"]) -> Float32[Array, "b H W o"]:
    conv = self.conv
    shape = (*conv.kernel, x.shape[-1], conv.features)
    kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
    scale = self.param("scale", nn.initializers.ones, (conv.features,))
    shift = self.param("shift", nn.initializers.zeros, (conv.features,))
    within = [
      (n - k) // conv.stride + 1 for n, k in zip(x.shape[1:3], conv.kernel, strict=True)
    ]
    x = jax.lax.conv_general_dilated(
      x.astype(self.dtype),
      kernel.astype(self.dtype),
      (conv.stride, conv.stride),
      # XLA's way for CPUs without any padding takes twice as long: the outputs that
      # would see this row and column are cut off.
      [(0, 1), (0, 1)] if conv.valid else "SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      preferred_element_type=jnp.float32,
    )
    if conv.valid:
      x = x[:, : within[0], : within[1]]
    return jax.nn.relu(x * scale[None, None, None] + shift[None, None, None])


def _max_pool(x: Float[Array, "b h w c"], stride: int) -> Float[Array, "b H W c"]:
  """Max pooling of 3 x 3: without padding if it shrinks the image, else padded."""
  padding = "VALID" if stride > 1 else "SAME"
  return nn.max_pool(x, (3, 3), (stride, stride), padding)


def _mean_pool(
  x: Float[Array, "b h w c"], counts: Literal["whole", "inside"]
) -> Float[Array, "b h w c"]:
  """Mean of 3 x 3 at stride 1, over nine or over those that lie inside."""
  return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=counts == "whole")


def abstract_inception_params(variant: Variant) -> dict[str, Any]:
  """Shapes of the parameters, as float32, without making them."""
  image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
  init = functools.partial(Inception(variant).init, jax.random.key(0))
  return jax.eval_shape(init, image)["params"]


def resize_tensorflow(
  image: UInt8[np.ndarray, "H W 3"],
) -> Float32[np.ndarray, "299 299 3"]:
  """Bilinear as TensorFlow 1 did it: no smoothing, and pixels begin at their corner.

  The `fid` resize of torch-fidelity; its result is in [0, 255].
  """
  x = image.astype(np.float32)
  for axis, side in enumerate(image.shape[:2]):
    source = np.arange(SIZE, dtype=np.float32) * np.float32(side / SIZE)
    below = np.floor(source).astype(int)
    above = np.minimum(below + 1, side - 1)
    weight = (source - below).astype(np.float32)
    weight = weight.reshape((SIZE, 1, 1) if axis == 0 else (1, SIZE, 1))
    x = x.take(below, axis) + (x.take(above, axis) - x.take(below, axis)) * weight
  return x


def resize_clean(
  image: UInt8[np.ndarray, "H W 3"],
) -> Float32[np.ndarray, "299 299 3"]:
  """Pillow's bicubic on float channels, cut to [0, 255] (Parmar et al. 2022)."""
  channels = [
    Image.fromarray(image[..., c].astype(np.float32)).resize(
      (SIZE, SIZE), Image.Resampling.BICUBIC
    )
    for c in range(3)
  ]
  return np.stack([np.asarray(c).clip(0, 255) for c in channels], axis=-1)


def resize_textatlas(image: Image.Image) -> Float32[np.ndarray, "299 299 3"]:
  """The shorter side by Pillow's bilinear filter, then the middle; in [0, 255].

  `Resize(299)` and `CenterCrop(299)` of torchvision, as TextAtlasEval calls them.
  """
  width, height = image.size
  short, long = sorted((width, height))
  other = int(SIZE * long / short)
  target = (SIZE, other) if width <= height else (other, SIZE)
  image = image.convert("RGB").resize(target, Image.Resampling.BILINEAR)
  left, top = (round((side - SIZE) / 2.0) for side in target)
  image = image.crop((left, top, left + SIZE, top + SIZE))
  return np.asarray(image, np.float32)


def normalized(
  pixels: Float32[Array, "b H W 3"], variant: Variant
) -> Float32[Array, "b H W 3"]:
  """Pixels in [0, 255] as a variant's network takes them."""
  # torchvision's own weights turn ImageNet's normalisation back into this one.
  return (pixels - 128) / 128 if variant == "fid" else pixels / 127.5 - 1
