"""PixArt-Σ in JAX and Flax: training, fine-tuning and sampling up to 4K."""

__version__ = "0.1.0"
