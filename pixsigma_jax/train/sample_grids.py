"""Samples during training: grids of fixed prompts and seeds, and sets for FID."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pixsigma_jax import disk, distributed
from pixsigma_jax.data.mixture import Mixture
from pixsigma_jax.models.autoencoders import downsampling
from pixsigma_jax.models.layers import Compute
from pixsigma_jax.models.pixart import PixArtConfig
from pixsigma_jax.sample import encoders
from pixsigma_jax.sample.pipeline import Pipeline
from pixsigma_jax.train.metrics import MetricWriter
from pixsigma_jax.train.step import TrainState

_CAPTIONS = "captions.jsonl"


def make_sampler(
  config: Mapping[str, Any],
  model: PixArtConfig,
  state: TrainState,
  mixture: Mixture,
  compute: Compute,
  captions: encoders.RememberedCaptions,
) -> Pipeline:
  """Makes a pipeline that draws what it has `captions` of."""
  if jax.process_count() > 1:  # one of them draws, on a device of its own
    compute = dataclasses.replace(compute, mesh=None)
  return Pipeline(
    model,
    None,  # an image's own come with it, see `_with`
    np.asarray(jax.device_get(state.null_caption)),
    encoders.load_autoencoder(
      mixture.features, config["frozen"] or None, dtype=compute.dtype
    ),
    captions,
    mixture.features.resolution,
    compute,
  )


def prompts_of(
  config: Mapping[str, Any],
  model: PixArtConfig,
  mixture: Mixture,
  compute: Compute,
  text_encoder: Any | None,
) -> encoders.RememberedCaptions:
  """Embeddings of the fixed prompts, so the encoder can be dropped.

  Args:
    text_encoder: None loads it for them.
  """
  if text_encoder is None:
    source = config["frozen"] or None
    text_encoder = encoders.load_text_encoder(
      mixture.features, source, dtype=compute.dtype
    )
  return encoders.RememberedCaptions.of(
    text_encoder, config["log"]["prompts"], model.caption_length
  )


def write_grid(
  sampler: Pipeline,
  params: Any,
  prompts: Sequence[str],
  workdir: pathlib.Path,
  step: int,
  writer: MetricWriter,
) -> None:
  """Writes a sample grid, of the same prompts and seeds throughout a run."""
  sampler = _with(sampler, params)
  if distributed.is_first():
    image = sampler(list(prompts), seed=0).grid()
    path = workdir / "samples" / f"{step:08d}.png"
    disk.write_whole(path, lambda partial: image.save(partial, format="PNG"))
    writer.write_image(step, "samples", np.asarray(image))
  distributed.wait_for_all()


def _with(sampler: Pipeline, params: Any) -> Pipeline:
  if jax.process_count() > 1:
    # One process draws, and has the parameters of all.
    return sampler.replace(params=jax.tree.map(distributed.whole, params))
  # A copy: the next step is given the state's own buffers to write over.
  return sampler.replace(params=jax.tree.map(jnp.copy, params))


class SampleSet:
  """Images of the first captions of the data at their images' sizes, as FID wants.

  Captions and sizes are those of a dataset, so that the set and the dataset's images
  are two samples of what should be one distribution.
  """

  def __init__(self, mixture: Mixture, model: PixArtConfig, count: int):
    """Remembers the captions' embeddings, so that T5 is not needed."""
    assert mixture.null_caption is not None, "see compatibility.check_data"
    records = mixture.read(np.arange(count))
    length = model.caption_length
    side = downsampling(mixture.features.autoencoder)
    texts = {"": mixture.null_caption[:length]}
    self._prompts, self._sizes, self._ids = [], [], []
    for record in records:
      self._prompts.append(record.captions[0])
      latents = getattr(record, mixture.features.kind)
      self._sizes.append(tuple(side * s for s in latents.shape[:2]))
      self._ids.append(record.id)
      texts[record.captions[0]] = record.embeddings(0)
    embeddings = np.zeros((len(texts), length, model.caption_width), np.float32)
    mask = np.zeros((len(texts), length), bool)
    for row, text in enumerate(texts.values()):
      embeddings[row, : len(text)], mask[row, : len(text)] = text, True
    self.captions = encoders.RememberedCaptions(
      mixture.features.text_encoder, list(texts), embeddings, mask
    )

  def write(self, sampler: Pipeline, params: Any, directory: pathlib.Path) -> None:
    """DIRECTORY/NUMBER.png, and captions.jsonl last: with it, the set is whole."""
    if (directory / _CAPTIONS).exists():
      return
    sampler = _with(sampler.replace(text_encoder=self.captions), params)
    if distributed.is_first():
      self._write(sampler, directory)
    distributed.wait_for_all()

  def _write(self, sampler: Pipeline, directory: pathlib.Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    disk.remove_abandoned(directory)
    heights, widths = zip(*self._sizes, strict=True)
    drawn = sampler.stream(
      self._prompts,
      height=list(heights),
      width=list(widths),
      seed=0,
      use_resolution_binning=False,
    )
    for number, image, _ in drawn:
      path = directory / f"{number:06d}.png"
      disk.write_whole(
        path, lambda partial, p=image: p.save(partial, format="PNG"), of_many=True
      )
    lines = (
      json.dumps({"file": f"{number:06d}.png", "id": name, "caption": caption})
      for number, (name, caption) in enumerate(
        zip(self._ids, self._prompts, strict=True)
      )
    )
    text = "".join(line + "\n" for line in lines)
    disk.write_text(directory / _CAPTIONS, text)
