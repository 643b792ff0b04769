"""Inception-v3 from torch's files, with its batch norms folded into scales and shifts.

The FID variant is published as `pt_inception-2015-12-05-6726825d.pth` (pytorch-fid and
torch-fidelity), torchvision's as `inception_v3_google-0cc3c7bd.pth`.
"""

import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pixsigma_jax import disk, tree
from pixsigma_jax.convert.files import Weights, check_names, open_weights
from pixsigma_jax.models.inception import (
  CLASSES,
  Variant,
  abstract_inception_params,
)

_EPSILON = 1e-3  # of every batch norm
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
# Heads of training, a counter of torch, and a bias that no metric here has.
_UNUSED = ("AuxLogits.", "num_batches_tracked", "fc.bias")


def inception_from_weights(weights: Weights, variant: Variant) -> dict[str, Any]:
  """Parameters from torch's names.

  Raises:
    ValueError: tensors are missing, left over or of another shape; names them.
  """
  shapes = abstract_inception_params(variant)
  modules = {
    name.rpartition("/")[0] for name in tree.named_leaves(shapes) if "/" in name
  }
  names = {"fc.weight"}
  for module in modules:
    theirs = module.replace("/", ".")
    names |= {f"{theirs}.conv.weight", *(f"{theirs}.bn.{x}" for x in _BATCH_NORM)}
  check_names(
    weights,
    sorted(names),
    "Inception-v3",
    lambda name: any(part in name for part in _UNUSED),
  )
  classes = weights["fc.weight"].shape[0]
  if classes != CLASSES[variant]:
    raise ValueError(
      f"These weights tell {classes} classes apart, and the variant {variant!r} "
      f"{CLASSES[variant]}: FID takes the weights of pt_inception-2015-12-05, "
      "TextAtlasEval's those of torchvision."
    )

  def place(ours: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    array = _tensor(weights, ours).astype(np.float32)
    if array.shape != leaf.shape:
      raise ValueError(
        f"{ours} becomes {list(array.shape)}, where Inception-v3 has "
        f"{list(leaf.shape)}: these are another network's weights."
      )
    return jnp.asarray(array)

  return tree.map_with_name(place, shapes)


def _tensor(weights: Weights, ours: str) -> np.ndarray:
  if ours == "fc_kernel":
    return weights["fc.weight"].T
  module, _, leaf = ours.rpartition("/")
  theirs = module.replace("/", ".")
  if leaf == "kernel":
    return weights[f"{theirs}.conv.weight"].transpose(2, 3, 1, 0)
  weight, bias, mean, variance = (
    weights[f"{theirs}.bn.{name}"].astype(np.float64) for name in _BATCH_NORM
  )
  scale = weight / np.sqrt(variance + _EPSILON)
  return scale if leaf == "scale" else bias - mean * scale


def load_inception(
  path: str | os.PathLike[str], variant: Variant
) -> tuple[dict[str, Any], str]:
  """Parameters of a file, and the SHA-256 of the file, which a report names.

  Args:
    path: a .pth as published, or the same names in safetensors.
    variant: see `models.inception`.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is another network's, the other variant's or damaged.
  """
  path = pathlib.Path(path)
  try:
    params = inception_from_weights(open_weights(path), variant)
  except ValueError as error:
    raise ValueError(f"Could not load Inception-v3 of {path}: {error}") from error
  return params, disk.file_hash(path)
