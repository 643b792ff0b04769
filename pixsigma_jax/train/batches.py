"""A stage's batches on the mesh, from any example of its stream on."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from pixsigma_jax import sharding
from pixsigma_jax.data import pipeline
from pixsigma_jax.data.mixture import Mixture
from pixsigma_jax.mesh_axes import CONTEXT
from pixsigma_jax.models.pixart import PixArtConfig
from pixsigma_jax.train.loss import check_aspect


class Batches:
  """An iterator that can be started anywhere, and again."""

  def __init__(
    self,
    mixture: Mixture,
    config: Mapping[str, Any],
    model: PixArtConfig,
    mesh: Mesh,
    captions: Any | None,
    *,
    process_index: int,
    process_count: int,
  ):
    """Stores what batches are made of; `start` begins.

    Args:
      config: of the stage; its seed, batch size and sections `data` and `loss` count.
      captions: the text encoder of captions that are stored as text, or None.
      process_index, process_count: which part of the batch this process reads.
    """
    check_aspect(config["loss"]["frequency_weight"], mixture.latent_sizes)
    self._mesh, self._captions = mesh, captions
    self._mixture = mixture
    data = config["data"]
    self._arguments = {
      "batch_size": config["batch_size"],
      "seed": config["seed"],
      "patch_size": model.patch_size,
      "window": model.window,
      "caption_length": model.caption_length,
      "long_caption_ratio": data["long_caption_ratio"],
      "sequence_length": sharding.split_length(
        mixture.longest_sequence(model.patch_size), mesh.shape[CONTEXT], model.window
      ),
      "process_index": process_index,
      "process_count": process_count,
      "num_threads": data["num_threads"],
      "num_workers": data["num_workers"],
      "damaged": data["damaged"],
      "read_captions": captions.read_captions if captions else None,
    }
    self._stream: Any = None

  def start(self, example: int) -> None:
    """Starts with this example of the stream."""
    self.close()
    self._stream = pipeline.batches(
      self._mixture, start_example=example, **self._arguments
    )

  def __iter__(self) -> Iterator[dict[str, Any]]:
    return self

  def __next__(self) -> dict[str, Any]:
    return self.put(next(self._stream))

  def next_local(self) -> dict[str, np.ndarray]:
    """This process's part of the next batch, on the host; `put` makes it global."""
    return next(self._stream)

  def put(self, local: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Global batch from this process's part."""
    batch = sharding.global_batch(local, sharding.batch_shardings(local, self._mesh))
    if self._captions and "caption_ids" in batch:
      place = batch["caption_mask"].sharding
      ids = batch.pop("caption_ids")
      embeddings = self._captions.embed(ids, batch["caption_mask"], place)
      batch["caption_embeddings"] = embeddings.astype(np.float16)  # as it is stored
    return batch

  def close(self) -> None:
    """Ends the threads and processes that read ahead."""
    if self._stream is not None:
      self._stream.close()
      self._stream = None
