"""From records to the batches of a training step, the same whatever the machines.

A batch is a function of its step, a host's part of it a function of (step, host), and
the position that a checkpoint keeps is one number. Grain draws the batches ahead, in
threads and in processes.
"""

import contextlib
import dataclasses
import gc
import itertools
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import resource_tracker
from typing import Any, Literal, TypeAlias

import grain
import numpy as np
from absl import flags
from jaxtyping import Float64, Int64

from pixsigma_jax.data import order
from pixsigma_jax.data.buffers import Buffers, Rows
from pixsigma_jax.data.mixture import Mixture
from pixsigma_jax.data.records import CAPTION_KINDS, Record
from pixsigma_jax.models import tokens

Batch: TypeAlias = dict[str, np.ndarray]
Position: TypeAlias = dict[str, Any]

_AT_A_TIME = 1 << 22  # bytes of records that are read before they are put in place

# For the trainer alone: a worker ends when it is told to, or its trainer is gone.
_TRAINERS = {signal.SIGINT, signal.SIGTERM}

# Captions and their length in tokens to arrays of a batch, `caption_mask` among them.
ReadCaptions: TypeAlias = Callable[[Sequence[str], int], Mapping[str, np.ndarray]]


def batches(
  mixture: Mixture,
  *,
  batch_size: int,
  seed: int,
  start_example: int,
  patch_size: int,
  window: tokens.Grid,
  caption_length: int,
  long_caption_ratio: float,
  sequence_length: int | None = None,
  process_index: int,
  process_count: int,
  num_threads: int,
  num_workers: int,
  damaged: Literal["stop", "replace"],
  read_captions: ReadCaptions | None = None,
) -> "Stream":
  """This host's part of every batch from example `start_example` on, without end.

  Batch s holds the examples start_example + s·batch_size + row of the global stream,
  row = 0 … batch_size - 1. A host gets a contiguous block of rows; `row` in the batch
  names them. Every example comes once an epoch, epochs follow each other without a gap,
  and the hosts' rows together do not depend on the number of hosts. Nor do batches on
  the number of threads or workers. Close the iterator to end its workers.

  A batch is a dict of arrays, b rows:
    latents                      float16 [b n p·p·c], unscaled tokens in window-major
                                 order, zero-padded; or latent_moments
    coordinates                  int32 [b n 2], row and column of each token
    grid                         int32 [b 2], token rows and columns of each image
    caption_embeddings           float16 [b t e], zero-padded; or, of captions stored
                                 as text, what `read_captions` makes of them
    caption_mask                 bool [b t]
    original_size                float32 [b 2], height and width in pixels
    aspect_ratio                 float32 [b], height / width of the latents
    row, example                 int32 [b], row of the global batch, record number
    replaced                     bool [b], whether it stands in for a damaged record

  Args:
    mixture: open datasets, one or more.
    batch_size: rows of the global batch, over all hosts.
    seed: decides order and captions.
    start_example: examples of the stream that were used before; 0 for a new run.
    patch_size: side of a token in latents.
    window: sides of the windows of the token order.
    caption_length: tokens that captions are padded to.
    long_caption_ratio: how often an example shows a long caption if it has both kinds.
    sequence_length: tokens that images are padded to; None for the dataset's longest.
    process_index: number of this part of the batch. Hosts that hold the same rows (they
      share the tokens of an image) give the same number.
    process_count: parts of the batch.
    num_threads: threads that draw batches ahead, each works on one; 0 for none.
    num_workers: processes that do so, with these threads each; 0 for this process.
    damaged: what a record that cannot be read does: end the stream in an error, or be
      replaced as `Mixture.read_or_replace` says.
    read_captions: for captions stored as text, a function that can be pickled.

  Raises:
    ValueError: an argument is wrong, or does not fit what the manifest says.
  """
  if process_count < 1 or not 0 <= process_index < process_count:
    raise ValueError(f"{process_index=} must lie in 0 … {process_count=} - 1.")
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(
      f"A batch of {batch_size} cannot be split over {process_count} processes: the "
      f"batch size must be a multiple of {process_count}."
    )
  if min(seed, start_example) < 0:
    raise ValueError(f"{seed=} and {start_example=} must not be negative.")
  if not 0.0 <= long_caption_ratio <= 1.0:
    raise ValueError(f"{long_caption_ratio=} must lie between 0 and 1.")
  _check_captions(mixture, caption_length, read_captions)
  source = _LocalBatches(
    mixture,
    batch_size=batch_size,
    seed=seed,
    start_example=start_example,
    patch_size=patch_size,
    window=window,
    caption_length=caption_length,
    long_caption_ratio=long_caption_ratio,
    sequence_length=_check_latents(mixture, patch_size, sequence_length),
    rows=np.arange(batch_size).reshape(process_count, -1)[process_index],
    damaged=damaged,
    read_captions=read_captions,
  )
  # An element is a whole batch: Grain costs microseconds a batch and not an example.
  steps = grain.MapDataset.source(source)
  options = grain.ReadOptions(
    num_threads=num_threads, prefetch_buffer_size=2 * num_threads
  )
  ahead = steps.to_iter_dataset(options)
  if num_workers:
    if not flags.FLAGS.is_parsed():  # outside absl.app Grain's own flags are asked for
      flags.FLAGS.mark_as_parsed()
    workers = grain.MultiprocessingOptions(num_workers=num_workers)
    ahead = ahead.mp_prefetch(workers, worker_init_fn=_end_with_the_trainer)
  return Stream(iter(ahead), num_workers)


class WorkerError(RuntimeError):
  """A process that draws batches ahead has gone: killed, or out of memory."""


class Stream:
  """An iterator over batches; see `batches`. A worker that goes is named."""

  def __init__(self, batches: grain.DatasetIterator[Batch], num_workers: int):
    self._batches: Any = batches
    self._num_workers = num_workers
    self._workers: set[int | None] | None = None  # process ids, once they run

  def __iter__(self) -> "Stream":
    return self

  def __next__(self) -> Batch:
    if not self._num_workers:
      return next(self._batches)
    try:
      if self._workers is not None:
        return next(self._batches)
      before = _children()
      resource_tracker.ensure_running()  # else made on the way, it undoes what follows
      with _blocked(_TRAINERS):  # workers inherit it, from their first moment on
        batch = next(self._batches)
      self._workers = _children() - before
      return batch
    except RuntimeError as error:
      # Grain has no type for it.
      code = re.search(r"Worker process was .* exit code (-?\d+)", str(error))
      if code is None:
        raise
      raise WorkerError(self._describe(int(code[1]))) from error

  def close(self) -> None:
    """Ends threads and workers."""
    self._batches.close()
    if self._num_workers:
      # What was read ahead lies in shared memory, and in cycles of Grain's objects.
      self._batches = iter(())
      gc.collect()
      _wait_for_deletions()

  def _describe(self, code: int) -> str:
    gone = sorted(map(str, (self._workers or set()) - _children()))
    named = f" (process {', '.join(gone)})" if gone else ""
    how = f"ended with exit code {code}; what it said stands above"
    if code < 0:
      how = f"was killed by {signal.Signals(-code).name}"
    if code == -signal.SIGKILL:
      how += (
        ", as the system does when memory is out: fewer of config.data.num_workers "
        "take less"
      )
    return f"A worker that reads data{named}, of {self._num_workers}, {how}."


def _wait_for_deletions() -> None:
  """Returns when Grain has given back the shared memory that nobody holds any more.

  It does so in a thread of its own, in order, which a process that ends does not wait
  for. Not public, and the only way to wait for it.
  """
  from grain._src.python.ipc.shared_memory_array import SharedMemoryArray

  deleting = SharedMemoryArray._del_thread_pool
  if deleting is not None:
    deleting.apply(int)  # what was asked for before is done before


def _children() -> set[int | None]:
  return {child.pid for child in multiprocessing.active_children()}


@contextlib.contextmanager
def _blocked(signals: set[signal.Signals]) -> Iterator[None]:
  """Blocks signals in this thread and its children while the block runs."""
  before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_the_trainer(index: int, count: int) -> None:
  """Ends a worker whose trainer has died."""
  trainer = multiprocessing.parent_process()
  assert trainer is not None

  def wait() -> None:
    multiprocessing.connection.wait([trainer.sentinel])
    os._exit(0)

  threading.Thread(target=wait, daemon=True, name="trainer").start()


def position(mixture: Mixture, *, seed: int, examples: int) -> Position:
  """The position for a checkpoint, after `examples` of the stream were used."""
  return {
    "examples": examples,
    "seed": seed,
    "num_records": len(mixture),
    "fingerprint": mixture.fingerprint,
  }


def resume_from(stored: Position, mixture: Mixture, *, seed: int) -> int:
  """The example to start from, after a check that the stream is the same.

  Raises:
    ValueError: the position belongs to another seed, other datasets, other weights of
      the same, or another holdout.
  """
  way_out = (
    "To go on with this run, give what it was started with. To start a new run from "
    "its weights, make it the parent of a run in a new directory."
  )
  now = position(mixture, seed=seed, examples=0)
  if missing := sorted(now.keys() - stored.keys()):
    raise ValueError(f"The stored position in the data lacks {', '.join(missing)}.")
  if stored["seed"] != seed:
    raise ValueError(
      f"The checkpoint's position in the data is of seed {stored['seed']}, this run "
      f"has seed {seed}: the order of examples differs. {way_out}"
    )
  if any(stored[name] != now[name] for name in ("num_records", "fingerprint")):
    raise ValueError(
      f"The checkpoint's position is in a dataset of {stored['num_records']} records "
      f"with fingerprint {stored['fingerprint']}; {mixture} has {len(mixture)} records "
      f"and fingerprint {now['fingerprint']}. Datasets, weights and holdout decide the "
      f"order of examples. {way_out}"
    )
  return stored["examples"]


@dataclasses.dataclass(frozen=True, eq=False)
class _LocalBatches:
  """One host's part of each batch, by step."""

  mixture: Mixture
  batch_size: int
  seed: int
  start_example: int
  patch_size: int
  window: tokens.Grid
  caption_length: int
  long_caption_ratio: float
  sequence_length: int
  rows: np.ndarray  # int64 [b], of the global batch
  damaged: Literal["stop", "replace"]
  read_captions: ReadCaptions | None
  buffers: Buffers = dataclasses.field(default_factory=Buffers)

  def __len__(self) -> int:
    return sys.maxsize  # Grain wants a length; the stream has none

  def __getitem__(self, index: int) -> Batch:
    positions = self.start_example + index * self.batch_size + self.rows
    epochs, examples = self.mixture.examples_at(positions, seed=self.seed)
    draws = np.stack(
      [
        order.uniform(order.hashed(stream, self.seed, epochs, examples))
        for stream in (order.CAPTION_KIND, order.CAPTION)
      ],
      axis=-1,
    )
    features, b, n = self.mixture.features, len(self.rows), self.sequence_length
    channels = features.channels * (2 if features.kind == "latent_moments" else 1)
    images = self.buffers.rows((b, n, self.patch_size**2 * channels), np.float16)
    captions = None
    if self.read_captions is None:
      shape = (b, self.caption_length, features.caption_width)
      captions = self.buffers.rows(shape, np.float16)
    batch = {
      features.kind: images.array,
      "coordinates": np.zeros((b, n, 2), np.int32),
      "grid": np.zeros((b, 2), np.int32),
      "original_size": np.zeros((b, 2), np.float32),
      "row": self.rows.astype(np.int32),
      "replaced": np.zeros(b, bool),
    }
    texts, lengths = [], []
    # A few records at a time, each let go of before the next: their memory is used
    # again, where fresh memory would cost more than reading.
    some = max(1, _AT_A_TIME // self.mixture.mean_bytes)
    for start in range(0, b, some):
      rows = np.arange(start, min(start + some, b))
      shown, count = self._put(batch, images, captions, rows, examples, draws[rows])
      texts += shown
      lengths += count
    if self.read_captions is not None:
      batch.update(self.read_captions(texts, self.caption_length))
    elif captions is not None:
      batch["caption_embeddings"] = captions.array
      batch["caption_mask"] = (
        np.arange(self.caption_length) < np.array(lengths)[:, None]
      )
    batch["aspect_ratio"] = (batch["grid"][:, 0] / batch["grid"][:, 1]).astype(
      np.float32
    )
    batch["example"] = examples.astype(np.int32)
    return batch

  def _put(
    self,
    batch: Batch,
    images: Rows,
    captions: Rows | None,
    rows: Int64[np.ndarray, " k"],
    examples: Int64[np.ndarray, " b"],
    draws: Float64[np.ndarray, "k 2"],
  ) -> tuple[list[str], list[int]]:
    """Reads the records of some rows; returns the captions shown and their lengths.

    Where a record is replaced, its number in `examples` is, too.
    """
    if self.damaged == "replace":
      read = self.mixture.read_or_replace(examples[rows])
      records, examples[rows], batch["replaced"][rows] = read
    else:
      records = self.mixture.read(examples[rows])
    batch["original_size"][rows] = [record.original_size for record in records]
    self._put_images(batch, images, rows, records)
    pairs = list(zip(records, map(self._choose, records, draws), strict=True))
    if captions is not None:
      captions.put(rows.tolist(), itertools.starmap(Record.embeddings, pairs))
    texts = [record.captions[i] for record, i in pairs]
    return texts, [int(record.caption_lengths[i]) for record, i in pairs]

  def _put_images(
    self,
    batch: Batch,
    images: Rows,
    rows: Int64[np.ndarray, " b"],
    records: list[Record],
  ) -> None:
    """Writes images' tokens, coordinates and grids into these rows of a batch."""
    same_size: dict[tuple[int, int], tuple[list[int], list[np.ndarray]]] = {}
    for row, record in zip(rows.tolist(), records, strict=True):
      latents = getattr(record, self.mixture.features.kind)
      places, stack = same_size.setdefault(latents.shape[:2], ([], []))
      places.append(row)
      stack.append(latents)
    for size, (places, stack) in same_size.items():
      latents = stack[0][None] if len(stack) == 1 else np.stack(stack)
      images.put(places, tokens.to_tokens(latents, self.patch_size, self.window))
      grid = tokens.token_grid(size, self.patch_size)
      where = tokens.coordinates(grid, self.window)
      batch["coordinates"][places, : len(where)] = where
      batch["grid"][places] = grid

  def _choose(self, record: Record, draws: Float64[np.ndarray, " 2"]) -> int:
    """Chooses a record's caption: draws the kind, then one caption of it."""
    long, short = CAPTION_KINDS
    kind = long if draws[0] < self.long_caption_ratio else short
    same = [i for i, other in enumerate(record.caption_kinds) if other == kind]
    candidates = same or range(len(record.captions))
    return candidates[int(draws[1] * len(candidates))]


def _check_latents(
  mixture: Mixture, patch_size: int, sequence_length: int | None
) -> int:
  """The length that sequences are padded to."""
  for (h, w), count in mixture.latent_sizes.items():
    if h % patch_size or w % patch_size:
      raise ValueError(
        f"{mixture} holds {count} images with latents of {h}x{w}, which cannot be cut "
        f"into patches of {patch_size}x{patch_size}: choose another patch size, or "
        "prepare the dataset with other image sizes."
      )
  longest = mixture.longest_sequence(patch_size)
  if sequence_length is not None and sequence_length < longest:
    raise ValueError(
      f"{mixture} holds images of {longest} tokens, {sequence_length=}: raise it to "
      f"{longest}, or prepare the dataset at a lower resolution."
    )
  return longest if sequence_length is None else sequence_length


def _check_captions(
  mixture: Mixture, caption_length: int, read_captions: ReadCaptions | None
) -> None:
  storage = mixture.features.caption_storage
  if (read_captions is not None) != (storage == "text"):
    raise ValueError(
      f"{mixture} holds captions as {storage}: text needs something that reads it, "
      "embeddings do not."
    )
  longest = max(dataset.manifest.longest_caption for dataset in mixture.datasets)
  if longest > caption_length:
    lengths = mixture.caption_lengths()
    raise ValueError(
      f"{(lengths > caption_length).sum()} of {len(lengths)} captions in {mixture} "
      f"have more than {caption_length} tokens, the longest has {longest}: raise the "
      f"caption length to {longest}, or prepare the dataset again with shorter ones."
    )
  encoded = mixture.features.caption_length
  if storage == "embeddings" and caption_length > encoded:
    raise ValueError(
      f"The null caption of {mixture} has {encoded} tokens, captions are to be padded "
      f"to {caption_length}: lower the caption length to {encoded}, or prepare the "
      "dataset again with a greater one."
    )
