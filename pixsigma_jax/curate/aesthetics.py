"""LAION's aesthetic score, with which the paper filters images (AES).

Source: christophschuhmann/improved-aesthetic-predictor, the weights
`sac+logos+ava1-l14-linearMSE.pth` and `simple_inference.py`. Five linear layers rate
the embedding of CLIP ViT-L/14, about from 1 to 10.
"""

import os
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32
from PIL import Image

from pixsigma_jax import errors
from pixsigma_jax.convert import files
from pixsigma_jax.curate.loading import loading
from pixsigma_jax.wording import install, listed

# Kernel [inputs, outputs] and bias of each layer, in their order.
Head: TypeAlias = tuple[tuple[jax.Array, jax.Array], ...]

WIDTH = 768  # of the embedding, as ViT-L/14 has it

# Number of a linear layer in torch's Sequential → how many numbers it makes. Between
# them are dropouts, which only training has, and no activations.
_LAYERS = {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}


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
  expected = {f"layers.{i}.{part}" for i in _LAYERS for part in ("weight", "bias")}
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
  for number, outputs in _LAYERS.items():
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


@jax.jit
def scores(head: Head, embeddings: Float32[Array, "b e"]) -> Float32[Array, "b"]:
  """Scores of images from their CLIP embeddings, of any length but zero.

  In float32 wherever it runs: scores in bfloat16 would move images over a threshold.
  """
  norms = jnp.linalg.norm(embeddings, axis=-1, keepdims=True)
  features = embeddings / jnp.where(norms == 0, 1, norms)  # as the source does
  for kernel, bias in head:
    features = jnp.matmul(features, kernel, precision=jax.lax.Precision.HIGHEST)
    features = features + bias[None]
  return features[:, 0]


class Scorer:
  """CLIP and the head, loaded."""

  def __init__(self, clip: str, head: str):
    """Loads both.

    Args:
      clip: folder or hub id of a CLIP of transformers, openai/clip-vit-large-patch14
        for the published head; of the whole model or of its image side.
      head: file of the head.

    Raises:
      FileNotFoundError: one of them is not there.
      ValueError: one is something else, they do not fit each other, or torch is not
        installed.
    """
    self._head = load_head(head)
    self._embed = _load_clip(clip)

  def score(self, images: Sequence[Image.Image]) -> Float32[np.ndarray, "b"]:
    """The score of each image, whatever else is scored with it."""
    if not images:
      return np.zeros(0, np.float32)
    return np.asarray(scores(self._head, jnp.asarray(self._embed(images))))


def _load_clip(clip: str) -> Any:
  """The function from images to embeddings `[b e]` of a CLIP."""
  try:
    import torch
  except ImportError as error:
    if not errors.of_absence(error, "torch"):
      raise
    raise ValueError(f"Scoring needs torch for CLIP: {install('curate')}.") from None
  from transformers import AutoConfig, CLIPVisionModelWithProjection
  from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
  from transformers.utils import logging

  # Half of a whole CLIP is its text side: that it is left out is no news.
  verbosity = logging.get_verbosity()
  logging.set_verbosity_error()
  advice = "Give CLIP ViT-L/14, openai/clip-vit-large-patch14."
  try:
    with loading(f"--clip={clip}", "a CLIP to score with", advice):
      config: Any = AutoConfig.from_pretrained(clip)
      if config.model_type == "clip":
        config.vision_config.projection_dim = config.projection_dim
        config = config.vision_config
      if config.model_type != "clip_vision_model":
        raise ValueError(f"it is a {config.model_type}, not a CLIP")
      if config.projection_dim != WIDTH:
        raise ValueError(
          f"its embeddings have {config.projection_dim} numbers and the head rates "
          f"{WIDTH}"
        )
      # Pillow's own resizing, which the head was trained with, also where torchvision
      # is.
      processor = CLIPImageProcessorPil.from_pretrained(clip)
      loaded: Any = CLIPVisionModelWithProjection.from_pretrained(
        clip, config=config, dtype=torch.float32, output_loading_info=True
      )
      model, about = loaded
      if missing := sorted(about["missing_keys"]):
        raise ValueError(f"its weights lack {listed(missing, 4)}")
  finally:
    logging.set_verbosity(verbosity)
  model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

  def embed(images: Sequence[Image.Image]) -> np.ndarray:
    pixels = processor(list(images), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
      output = model(pixel_values=pixels.to(model.device))
    return output.image_embeds.cpu().numpy()

  return embed
