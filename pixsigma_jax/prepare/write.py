"""Writes the shards of a dataset of records, each with a report of what it lacks."""

import collections
import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Generator, Iterable, Sequence

from absl import logging

from pixsigma_jax import command, disk
from pixsigma_jax.convert import files
from pixsigma_jax.data import records
from pixsigma_jax.data.records import Record
from pixsigma_jax.data.writing import Unfinished
from pixsigma_jax.prepare.cropped_images import Refusal, count_reasons

_REPORT, _REFUSED = "report.json", "refused.jsonl"


def check_process(index: int, count: int) -> None:
  """Refuses a process number that is none.

  Raises:
    ValueError: it is not among 0 … count - 1.
  """
  if count < 1 or not 0 <= index < count:
    raise ValueError(
      f"Process {index} of {count}: processes are numbered from 0, so give "
      "--process_index below --process_count."
    )


def write_shards(
  unfinished: Unfinished,
  make: Callable[[int], Iterable[Record | Refusal]],
  process_index: int,
  process_count: int,
  sizes: Sequence[int],
) -> None:
  """Writes the missing shards of one process, each with a report beside the dataset.

  Args:
    make: of a shard by its number: for each of its images the record, or a refusal of
      the image; and refusals of captions on the way.
    sizes: how many images each shard is made of.
  """
  reports = reports_of(unfinished.directory)
  reports.mkdir(parents=True, exist_ok=True)
  disk.remove_abandoned(reports)
  mine = [n for n in unfinished.missing() if n % process_count == process_index]

  def images() -> Generator[None, None, None]:
    """Encodes the missing shards; yields None for each image."""
    for number in mine:
      refusals = []
      with unfinished.shard(number) as shard:
        for made in make(number):
          if isinstance(made, Refusal):
            refusals.append(made)
            if made.what != "image":
              continue
          elif problem := records.problem(made, unfinished.features):
            reason = "makes no valid record"
            refusals.append(Refusal(id=made.id, reason=reason, detail=problem))
          else:
            shard.write(made)
          yield
        # Before the shard has its name: one that is there has its report.
        disk.write_text(reports / _shard_report(number), _lines(refusals))

  total = sum(sizes[number] for number in mine)
  with contextlib.closing(images()) as work:
    collections.deque(command.progress(work, total, "Images"), maxlen=0)


def finish_with_report(unfinished: Unfinished, earlier: Iterable[Refusal]) -> bool:
  """Finishes a dataset of which nothing is missing, and sums up what was refused.

  Args:
    earlier: refusals from before the shards.

  Returns:
    whether it is finished now; False if other processes' shards are missing.
  """
  if missing := unfinished.missing():
    logging.info("Done here; %d shards of other processes are missing.", len(missing))
    return False
  reports = reports_of(unfinished.directory)
  refusals = list(earlier)
  for number in range(unfinished.num_shards):  # there may be more, of another dataset
    lines = (reports / _shard_report(number)).read_text(encoding="utf-8").splitlines()
    refusals += [Refusal(**json.loads(line)) for line in lines]
  counts = count_reasons(refusals)
  disk.write_text(reports / _REFUSED, _lines(refusals))
  disk.write_text(
    reports / _REPORT, json.dumps(counts, indent=2, ensure_ascii=False) + "\n"
  )
  unfinished.finish()
  return True


def reports_of(directory: pathlib.Path) -> pathlib.Path:
  """The directory beside a dataset where preparing says what it left out.

  `report.json` counts by what and reason, `refused.jsonl` has a line for each.
  """
  return directory.with_name(f"{directory.name}-report")


def read_report(directory: pathlib.Path) -> dict[str, dict[str, int]]:
  """Counts of what was refused for a finished dataset: what → reason → number."""
  return files.read_json(reports_of(directory) / _REPORT)


def _shard_report(number: int) -> str:
  return f"shard-{number:05d}.jsonl"


def _lines(refusals: Iterable[Refusal]) -> str:
  return "".join(json.dumps(dataclasses.asdict(refusal)) + "\n" for refusal in refusals)
