"""From prompts to images with a trained model."""

from pixsigma_jax.sample.call_arguments import StopDrawing
from pixsigma_jax.sample.pipeline import Output, Pipeline

__all__ = ["Output", "Pipeline", "StopDrawing"]
