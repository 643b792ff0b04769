"""Sheets of samples while a stage trains: fixed prompts and seeds, step after step."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pixsigma_jax.data.mixture import Mixture
from pixsigma_jax.models.layers import Compute
from pixsigma_jax.models.pixart import PixArtConfig
from pixsigma_jax.sample import frozen
from pixsigma_jax.sample.pipeline import Pipeline
from pixsigma_jax.train.metrics import MetricWriter
from pixsigma_jax.train.step import TrainState


def make_sampler(
  config: Mapping[str, Any],
  model: PixArtConfig,
  state: TrainState,
  mixture: Mixture,
  compute: Compute,
  text_encoder: Any | None,
) -> Pipeline:
  """Draws the fixed prompts, whose embeddings are all that it keeps of the encoder."""
  features, source = mixture.features, config["frozen"] or None
  if text_encoder is None:
    text_encoder = frozen.load_text_encoder(features, source, dtype=compute.dtype)
  return Pipeline(
    model,
    state.ema_params,
    np.asarray(jax.device_get(state.null_caption)),
    frozen.load_autoencoder(features, source, dtype=compute.dtype),
    frozen.RememberedCaptions.of(
      text_encoder, config["log"]["prompts"], model.caption_length
    ),
    features.resolution,
    compute,
  )


def write_sheet(
  sampler: Pipeline,
  state: TrainState,
  prompts: Sequence[str],
  workdir: pathlib.Path,
  step: int,
  writer: MetricWriter,
) -> None:
  """Fixed prompts and seeds, so that the pictures of a run form a film."""
  # A copy: the next step is given the state's own buffers to write over.
  params = jax.tree.map(jnp.copy, state.ema_params)
  image = sampler.replace(params=params)(list(prompts), seed=0).grid()
  directory = workdir / "samples"
  directory.mkdir(parents=True, exist_ok=True)
  image.save(directory / f"{step:08d}.png")
  writer.write_image(step, "samples", np.asarray(image))
