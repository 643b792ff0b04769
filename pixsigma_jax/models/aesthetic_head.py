"""LAION's aesthetic head: five linear layers that rate an embedding of CLIP ViT-L/14.

Source: christophschuhmann/improved-aesthetic-predictor, the weights
`sac+logos+ava1-l14-linearMSE.pth` and `simple_inference.py`. Scores lie about between 1
and 10.
"""

from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

# Kernel [inputs, outputs] and bias of each layer, in their order.
Head: TypeAlias = tuple[tuple[jax.Array, jax.Array], ...]

WIDTH = 768  # of the embedding, as ViT-L/14 has it

# Number of a linear layer in torch's Sequential → how many numbers it makes. Between
# them are dropouts, which only training has, and no activations.
LAYERS = {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}


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
