"""LAION's aesthetic score, with which the paper filters images (AES).

The head of `models/aesthetic_head.py` on the embeddings of CLIP ViT-L/14, which torch
computes here.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32
from PIL import Image

from pixsigma_jax.convert.aesthetic_head import load_head
from pixsigma_jax.models.aesthetic_head import WIDTH, scores
from pixsigma_jax.wording import install


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
  except ImportError:
    raise ValueError(f"Scoring needs torch for CLIP: {install('curate')}.") from None
  from transformers import AutoConfig, CLIPVisionModelWithProjection
  from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
  from transformers.utils import logging

  # Half of a whole CLIP is its text side: that it is left out is no news.
  verbosity = logging.get_verbosity()
  logging.set_verbosity_error()
  try:
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
    # Pillow's own resizing, which the head was trained with, also where torchvision is.
    processor = CLIPImageProcessorPil.from_pretrained(clip)
    loaded: Any = CLIPVisionModelWithProjection.from_pretrained(
      clip, config=config, dtype=torch.float32, output_loading_info=True
    )
    model, loading = loaded
    if loading["missing_keys"]:
      missing = sorted(loading["missing_keys"])
      raise ValueError(f"its weights lack {', '.join(missing[:4])}")
  except OSError as error:
    raise FileNotFoundError(
      f"--clip={clip} is neither a folder with a CLIP nor could it be fetched from the "
      f"hub: {_first_line(error)}"
    ) from error
  except (ValueError, RuntimeError) as error:
    raise ValueError(
      f"--clip={clip} cannot be used: {_first_line(error)}. Give CLIP ViT-L/14, "
      "openai/clip-vit-large-patch14."
    ) from error
  finally:
    logging.set_verbosity(verbosity)
  model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

  def embed(images: Sequence[Image.Image]) -> np.ndarray:
    pixels = processor(list(images), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
      output = model(pixel_values=pixels.to(model.device))
    return output.image_embeds.cpu().numpy()

  return embed


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0].rstrip(".")
