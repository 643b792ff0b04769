"""LAION's aesthetic head from its published file."""

import os

import jax.numpy as jnp
import numpy as np

from pixsigma_jax.convert import files
from pixsigma_jax.models.aesthetic_head import LAYERS, WIDTH, Head
from pixsigma_jax.wording import listed


def load_head(path: str | os.PathLike[str]) -> Head:
  """The layers of a published head.

  Args:
    path: the .pth as published, or the same names in safetensors.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is not that head: says which tensor is missing, unknown or of
      another shape.
  """
  weights = files.open_weights(path)
  expected = {f"layers.{i}.{part}" for i in LAYERS for part in ("weight", "bias")}
  if missing := sorted(expected - set(weights)):
    raise ValueError(
      f"{path} is not LAION's aesthetic head: it lacks {listed(missing, 4)} and "
      f"holds {listed(sorted(weights), 4)}."
    )
  if unknown := sorted(set(weights) - expected):
    raise ValueError(
      f"{path} is not LAION's aesthetic head: it also holds {listed(unknown, 4)}, "
      "which nothing here would use."
    )
  layers, inputs = [], WIDTH
  for number, outputs in LAYERS.items():
    weight = weights[f"layers.{number}.weight"].astype(np.float32)
    bias = weights[f"layers.{number}.bias"].astype(np.float32)
    if (weight.shape, bias.shape) != ((outputs, inputs), (outputs,)):
      raise ValueError(
        f"{path}: layers.{number} is {list(weight.shape)} with a bias of "
        f"{list(bias.shape)}, not [{outputs}, {inputs}] with [{outputs}]: this head is "
        "of another make."
      )
    layers.append((jnp.asarray(weight.T), jnp.asarray(bias)))
    inputs = outputs
  return tuple(layers)
