"""What the network reads beside the noisy tokens: one row an image of a batch."""

from typing import Any

import flax.struct


class Conditions(flax.struct.PyTreeNode):
  """Layout and conditions of a batch of noisy token sequences.

  Captions come as embeddings, or as the keys and values that
  `pixart.caption_keys_values` made of them: a sampler, whose captions stay while
  timesteps pass, makes those once.

  Attributes:
    coordinates: int `[b n 2]`, (row, column) of each token.
    grid: int `[b 2]`, (h, w) in tokens of each image; h·w tokens are real, the rest
      padding, whose contents change nothing.
    timesteps: `[b]`, 0 … 999, integer or float.
    caption_mask: bool `[b t]`, True where a caption token is to be seen.
    caption_embeddings: float `[b t e]`, the text encoder's output; None beside
      `caption_kv`.
    caption_kv: name of a segment → float `[layers 2 b t d]`, see above; or None.
    image_size: float `[b 2]`, (height, width) in pixels, and
    aspect_ratio: float `[b]`, height / width; both only with `size_conditions`.
    identity_attention: bool `[b layers]`, True where an image's self-attention returns
      each token's own value, as perturbed-attention guidance weakens a network; and
    skipped: bool `[b layers]`, True where an image passes by a whole block. None costs
      nothing.
  """

  # Untyped on purpose: JAX rebuilds this tree out of shapes, specs and shardings.
  coordinates: Any
  grid: Any
  timesteps: Any
  caption_mask: Any
  caption_embeddings: Any = None
  caption_kv: Any = None
  image_size: Any = None
  aspect_ratio: Any = None
  identity_attention: Any = None
  skipped: Any = None
