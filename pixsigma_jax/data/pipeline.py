"""From records to the batches of a training step, the same whatever the machines.

The stream of examples has no end and no state: which example is number g, and which
of its captions is shown, are functions of (seed, g). A batch is a function of its step,
a host's part of it a function of (step, host), and the position that a checkpoint keeps
is one number. Grain draws the batches ahead in threads.
"""

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any, TypeAlias

import grain
import numpy as np
from jaxtyping import Float64, Int64, UInt64

from pixsigma_jax.data.records import CAPTION_KINDS, Dataset, Record
from pixsigma_jax.models import tokens

Batch: TypeAlias = dict[str, np.ndarray]
Position: TypeAlias = dict[str, Any]

# Streams of random numbers, so that no two draws share their bits.
_ORDER, _CAPTION_KIND, _CAPTION = range(3)
_ROUNDS = 4


def batches(
  dataset: Dataset,
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
) -> Iterator[Batch]:
  """This host's part of every batch from example `start_example` on, without end.

  Batch s holds the examples start_example + s·batch_size + row of the global stream,
  row = 0 … batch_size - 1. A host gets a contiguous block of rows; `row` in the batch
  names them. Every example comes once an epoch, epochs follow each other without a gap,
  and the hosts' rows together do not depend on the number of hosts.

  A batch is a dict of arrays, b rows:
    latents                      float16 [b n p·p·c], unscaled tokens in window-major
                                 order, zero-padded; or latent_moments
    coordinates                  int32 [b n 2], row and column of each token
    grid                         int32 [b 2], token rows and columns of each image
    caption_embeddings           float16 [b t e], zero-padded
    caption_mask                 bool [b t]
    original_size                float32 [b 2], height and width in pixels
    aspect_ratio                 float32 [b], height / width of the latents
    row, example                 int32 [b], row of the global batch, record number

  Args:
    dataset: an open dataset.
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
  _check_captions(dataset, caption_length)
  source = _LocalBatches(
    dataset,
    batch_size=batch_size,
    seed=seed,
    start_example=start_example,
    patch_size=patch_size,
    window=window,
    caption_length=caption_length,
    long_caption_ratio=long_caption_ratio,
    sequence_length=_check_latents(dataset, patch_size, sequence_length),
    rows=np.arange(batch_size).reshape(process_count, -1)[process_index],
  )
  # An element is a whole batch: Grain costs microseconds a batch and not an example.
  steps = grain.MapDataset.source(source)
  options = grain.ReadOptions(
    num_threads=num_threads, prefetch_buffer_size=2 * num_threads
  )
  return iter(steps.to_iter_dataset(options))


def position(dataset: Dataset, *, seed: int, examples: int) -> Position:
  """What a checkpoint keeps: `examples` of the stream have been used."""
  return {
    "examples": examples,
    "seed": seed,
    "num_records": len(dataset),
    "fingerprint": dataset.fingerprint,
  }


def resume_from(stored: Position, dataset: Dataset, *, seed: int) -> int:
  """The example to start from, after a look whether it is still the same stream.

  Raises:
    ValueError: the position belongs to another seed or another dataset.
  """
  way_out = (
    "To go on with this run, give what it was started with. To start a new run from "
    "its weights, make it the parent of a run in a new directory."
  )
  now = position(dataset, seed=seed, examples=0)
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
      f"with fingerprint {stored['fingerprint']}; {dataset.directory} has "
      f"{len(dataset)} records and fingerprint {dataset.fingerprint}. {way_out}"
    )
  return stored["examples"]


def examples_at(
  positions: Int64[np.ndarray, " b"], *, seed: int, num_records: int
) -> tuple[Int64[np.ndarray, " b"], Int64[np.ndarray, " b"]]:
  """Epoch and record number of the examples at these positions of the stream.

  Each epoch is a permutation of its own, computed point by point: nothing is as long
  as the dataset, and any position costs the same. It is a Feistel network over the next
  power of two (a bijection whatever its round function), applied again to what lands
  outside the dataset until it lands inside ("cycle walking": Black and Rogaway,
  "Ciphers with arbitrary finite domains", 2002, section 4).
  """
  epoch, index = np.divmod(positions, num_records)
  bits = max(6, (num_records - 1).bit_length())  # halves of a bit or two mix poorly
  low_bits = np.uint64(bits // 2)
  low_mask = np.uint64((1 << bits // 2) - 1)
  high_mask = np.uint64((1 << bits - bits // 2) - 1)
  keys = [_hash(_ORDER, seed, epoch, i) for i in range(2 * _ROUNDS)]

  outside, point = np.arange(len(index)), index.astype(np.uint64)
  while len(outside):
    high, low = point[outside] >> low_bits, point[outside] & low_mask
    for i in range(0, 2 * _ROUNDS, 2):
      high ^= _scramble(keys[i][outside] ^ low) & high_mask
      low ^= _scramble(keys[i + 1][outside] ^ high) & low_mask
    point[outside] = (high << low_bits) | low
    outside = outside[point[outside] >= num_records]
  return epoch, point.astype(np.int64)


@dataclasses.dataclass(frozen=True, eq=False)
class _LocalBatches:
  """One host's part of each batch, by step."""

  dataset: Dataset
  batch_size: int
  seed: int
  start_example: int
  patch_size: int
  window: tokens.Grid
  caption_length: int
  long_caption_ratio: float
  sequence_length: int
  rows: np.ndarray  # int64 [b], of the global batch

  def __len__(self) -> int:
    return sys.maxsize  # Grain wants a length; the stream has none

  def __getitem__(self, index: int) -> Batch:
    positions = self.start_example + index * self.batch_size + self.rows
    epochs, examples = examples_at(
      positions, seed=self.seed, num_records=len(self.dataset)
    )
    records = self.dataset.read(examples)
    return {
      **self._images(records),
      **self._captions(records, epochs, examples),
      "original_size": np.stack([r.original_size for r in records]).astype(np.float32),
      "row": self.rows.astype(np.int32),
      "example": examples.astype(np.int32),
    }

  def _images(self, records: list[Record]) -> Batch:
    kind, b, n = self.dataset.manifest.kind, len(records), self.sequence_length
    latents = [getattr(record, kind) for record in records]
    sizes = np.array([x.shape[:2] for x in latents], np.int32)
    width = self.patch_size**2 * latents[0].shape[-1]
    sequences = np.zeros((b, n, width), np.float16)
    coordinates = np.zeros((b, n, 2), np.int32)
    for size in np.unique(sizes, axis=0):  # all images of a size at once
      rows = np.flatnonzero((sizes == size).all(axis=-1))
      images = np.stack([latents[row] for row in rows])
      grid = tokens.token_grid(tuple(size.tolist()), self.patch_size)
      length = grid[0] * grid[1]
      sequences[rows, :length] = tokens.to_tokens(images, self.patch_size, self.window)
      coordinates[rows, :length] = tokens.coordinates(grid, self.window)
    return {
      kind: sequences,
      "coordinates": coordinates,
      "grid": sizes // np.int32(self.patch_size),
      "aspect_ratio": (sizes[:, 0] / sizes[:, 1]).astype(np.float32),
    }

  def _captions(
    self,
    records: list[Record],
    epochs: Int64[np.ndarray, " b"],
    examples: Int64[np.ndarray, " b"],
  ) -> Batch:
    b, t = len(records), self.caption_length
    embeddings = np.zeros((b, t, self.dataset.manifest.caption_width), np.float16)
    lengths = np.zeros(b, np.int32)
    kind_draws = _uniform(_hash(_CAPTION_KIND, self.seed, epochs, examples))
    caption_draws = _uniform(_hash(_CAPTION, self.seed, epochs, examples))
    long, short = CAPTION_KINDS
    for row, record in enumerate(records):
      kind = long if kind_draws[row] < self.long_caption_ratio else short
      same = [i for i, other in enumerate(record.caption_kinds) if other == kind]
      candidates = same or range(len(record.captions))
      chosen = candidates[int(caption_draws[row] * len(candidates))]
      start = record.caption_lengths[:chosen].sum()
      length = lengths[row] = record.caption_lengths[chosen]
      embeddings[row, :length] = record.caption_embeddings[start : start + length]
    return {
      "caption_embeddings": embeddings,
      "caption_mask": np.arange(t) < lengths[:, None],
    }


def _check_latents(
  dataset: Dataset, patch_size: int, sequence_length: int | None
) -> int:
  """The length that sequences are padded to."""
  for h, w, count in dataset.manifest.latent_sizes:
    if h % patch_size or w % patch_size:
      raise ValueError(
        f"{dataset.directory} holds {count} images with latents of {h}x{w}, which "
        f"cannot be cut into patches of {patch_size}x{patch_size}: choose another "
        "patch size, or prepare the dataset with other image sizes."
      )
  longest = dataset.manifest.longest_sequence(patch_size)
  if sequence_length is not None and sequence_length < longest:
    raise ValueError(
      f"{dataset.directory} holds images of {longest} tokens, {sequence_length=}: "
      f"raise it to {longest}, or prepare the dataset at a lower resolution."
    )
  return longest if sequence_length is None else sequence_length


def _check_captions(dataset: Dataset, caption_length: int) -> None:
  longest = dataset.manifest.longest_caption
  if longest > caption_length:
    lengths = dataset.index["caption_lengths"]
    raise ValueError(
      f"{(lengths > caption_length).sum()} of {len(lengths)} captions in "
      f"{dataset.directory} have more than {caption_length} tokens, the longest has "
      f"{longest}: raise the caption length to {longest}, or prepare the dataset again "
      "with shorter captions."
    )
  if caption_length > (encoded := len(dataset.null_caption)):
    raise ValueError(
      f"The null caption of {dataset.directory} has {encoded} tokens, captions are to "
      f"be padded to {caption_length}: lower the caption length to {encoded}, or "
      "prepare the dataset again with a greater one."
    )


def _scramble(x: UInt64[np.ndarray, " b"]) -> UInt64[np.ndarray, " b"]:
  """A bijection in which every bit depends on every bit.

  Stafford's variant 13, the output function of SplitMix64 (Steele, Lea and Flood, "Fast
  splittable pseudorandom number generators", 2014).
  """
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def _hash(*words: int | Int64[np.ndarray, " b"]) -> UInt64[np.ndarray, " b"]:
  """Random bits for each row, a function of all the words.

  Written out because the order of a run's examples must outlive any library's version.
  """
  state = np.zeros(1, np.uint64)
  for word in words:
    state = _scramble((state + np.uint64(0x9E3779B97F4A7C15)) ^ np.uint64(word))
  return state


def _uniform(bits: UInt64[np.ndarray, " b"]) -> Float64[np.ndarray, " b"]:
  """Numbers in [0, 1) from random bits."""
  return (bits >> np.uint64(11)) * 2.0**-53
