"""How fast records are read, decoded and batched, beside plain ArrayRecord.

  python -m benchmarks.records --output=DIR

Writes 2.5 GB of records as a 1K stage has them (moments of 128x128 latents; a long
caption of 240 tokens and a short one of 48, 4096 wide) into DIR, unless they are there,
and reads them in random order: from the page cache, with one thread, in one process.
"""

import contextlib
import itertools
import os
import pathlib
import time
from collections.abc import Callable

import numpy as np
from absl import flags

from pixsigma_jax import command
from pixsigma_jax.data import pipeline, records, wire
from pixsigma_jax.data.mixture import open_mixture
from pixsigma_jax.data.records import Features, Record, open_dataset
from pixsigma_jax.data.writing import RecordWriter

_OUTPUT = flags.DEFINE_string(
  "output", None, "Directory for the records.", required=True
)

COUNT, BATCH, ROUNDS = 960, 32, 3
SIDE, LENGTHS, WIDTH, CAPTION_LENGTH = 128, (240, 48), 4096, 300


def write(directory: pathlib.Path) -> None:
  """Records of random numbers."""
  features = Features(
    kind="latent_moments",
    channels=4,
    resolution=1024,
    autoencoder={"name": "sdxl-vae", "latent_channels": 4, "downsampling": 8},
    scaling_factor=0.13025,
    text_encoder={"name": "t5", "width": WIDTH},
    caption_storage="embeddings",
    caption_length=CAPTION_LENGTH,
    caption_width=WIDTH,
    crop_rule={"name": "none"},
    hashes={},
  )
  null_caption = np.zeros((CAPTION_LENGTH, WIDTH), np.float32)
  draw = np.random.default_rng(0)
  noise = draw.normal(size=(SIDE * SIDE * 8 + sum(LENGTHS) * WIDTH)).astype(np.float16)
  began = time.perf_counter()
  with RecordWriter(directory, features, null_caption) as writer:
    for number in range(COUNT):
      moments, embeddings = np.split(np.roll(noise, number), [SIDE * SIDE * 8])
      writer.write(
        Record(
          id=str(number),
          captions=("long", "short"),
          caption_kinds=("long", "short"),
          caption_lengths=np.array(LENGTHS, np.int32),
          caption_embeddings=embeddings.reshape(-1, WIDTH),
          original_size=np.array([1024, 1024], np.int32),
          crop=np.array([0, 0, 1024, 1024], np.float32),
          latent_moments=moments.reshape(SIDE, SIDE, 8),
        )
      )
  seconds = time.perf_counter() - began
  size = sum(path.stat().st_size for path in directory.iterdir())
  print(
    f"written: {size / 1e9:.2f} GB in {seconds:.1f} s, {size / seconds / 1e6:.0f} MB/s"
  )


def main(_: list[str]) -> None:
  """Entry point; flags are parsed."""
  directory = pathlib.Path(_OUTPUT.value)
  if not (directory / records.MANIFEST).exists():
    write(directory)
  dataset = open_dataset(directory)
  mixture = open_mixture([directory], weights=(), holdout=0.0, split="train")
  size = dataset.manifest.num_bytes / len(dataset)
  readers = [
    records._open_shard(dataset.directory, shard) for shard in dataset.manifest.shards
  ]

  def plain(numbers: np.ndarray) -> None:
    for number in numbers:
      shard, position = dataset.place(int(number))
      readers[shard].read([position])

  def decoded(numbers: np.ndarray) -> None:
    for number in numbers:
      dataset.read([number])

  def parsed(numbers: np.ndarray) -> None:
    data = readers[0].read([0])[0]
    for _number in numbers:
      wire.Features(data)

  def batched(threads: int) -> Callable[[np.ndarray], None]:
    def run(numbers: np.ndarray) -> None:
      stream = pipeline.batches(
        mixture,
        batch_size=BATCH,
        seed=0,
        start_example=0,
        patch_size=2,
        window=(2, 2),
        caption_length=CAPTION_LENGTH,
        long_caption_ratio=0.6,
        process_index=0,
        process_count=1,
        num_threads=threads,
        num_workers=0,
        damaged="stop",
      )
      with contextlib.closing(stream):
        for _batch in itertools.islice(stream, len(numbers) // BATCH):
          pass

    return run

  measured = {
    "plain ArrayRecord": plain,
    "read and decoded": decoded,
    "batched, no thread": batched(0),
    "batched, 1 thread": batched(1),
    "batched, 2 threads": batched(2),
    "(finding the fields alone)": parsed,
  }
  order = np.random.default_rng(1).permutation(len(dataset))
  plain(order)  # into the page cache
  # Interleaved, so that what else the machine does falls on all of them.
  times = {name: [] for name in measured}
  for _round in range(ROUNDS):
    for name, run in measured.items():
      wall, cpu = time.perf_counter(), time.process_time()
      run(order)
      times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
  print(f"{size / 1e6:.2f} MB a record, {os.cpu_count()} cores, best of {ROUNDS}")
  print("| | records/s | MB/s | records a CPU second | of plain: wall | CPU |")
  print("|---|---|---|---|---|---|")
  best = {
    name: (min(wall for wall, _ in taken), min(cpu for _, cpu in taken))
    for name, taken in times.items()
  }
  for name, (wall, cpu) in best.items():
    shares = [
      plain_time / time_
      for plain_time, time_ in zip(best["plain ArrayRecord"], (wall, cpu), strict=True)
    ]
    print(
      f"| {name} | {len(order) / wall:.0f} | {len(order) * size / wall / 1e6:.0f} "
      f"| {len(order) / cpu:.0f} | {shares[0]:.0%} | {shares[1]:.0%} |"
    )


if __name__ == "__main__":
  command.run(main)
