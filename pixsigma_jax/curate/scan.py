"""Sizes, hashes, captions, damage and duplicates of a source's images."""

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import scipy.fft
from absl import logging
from jaxtyping import Int64, UInt64
from PIL import Image

from pixsigma_jax.curate import rescan
from pixsigma_jax.data import index as index_module
from pixsigma_jax.data import ingest, sources
from pixsigma_jax.data.image_bytes import decode, image_header
from pixsigma_jax.data.index import SCHEMAS, Index, open_index
from pixsigma_jax.data.rows import Reading
from pixsigma_jax.data.sources import Entry

HASH_BITS = 64
_HASH_SIDE, _GRAY_SIDE = 8, 32
# What rounding an image to 256 levels leaves in a coefficient has a deviation of 0.3.
_NOISE = 1.0
_FEWEST_COEFFICIENTS = 32  # of 63 that must be more than noise
_PASSED_OVER = "scan/passed_over.json"  # in listing the source
_PASSED_OVER_KEY = b"passed_over"  # in a part's metadata: in reading it
_NAMED = 20  # of the images with an error
_MOST_PAIRS = 2**24  # compared at once


def scan(
  directory: str,
  images: str,
  *,
  per_part: int,
  near_distance: int,
  beam_options: Sequence[str],
  reading: Reading = Reading(),
  previous: str | None = None,
) -> Index:
  """Lists a source into an index, and marks duplicates; goes on where it was killed.

  Args:
    previous: directory of an earlier index of the same images, which stays as it is:
      scores and captions of images that have not changed are taken over from it, and
      the report says what was added, changed and removed.

  Raises:
    FileNotFoundError: there is no such source.
    FileExistsError: the directory holds the index of another source, or of this one
      read in another way.
    ValueError: the source holds no images, or the distance is none.
  """
  if not 0 <= near_distance < HASH_BITS // 2:
    raise ValueError(
      f"--near_distance={near_distance} is not from 0 to {HASH_BITS // 2 - 1}: hashes "
      f"of images that have nothing in common differ in {HASH_BITS // 2} bits."
    )
  before = None if previous is None else rescan.earlier(previous, directory)
  # Of an index that is there the units stay: the source is not listed again.
  is_new = not index_module.exists(directory)
  units: list[sources.Unit] = []
  if is_new:
    passed_over: sources.PassedOver = collections.Counter()
    units = sources.list_units(
      images, per_unit=per_part, reading=reading, passed_over=passed_over
    )
    # Before there is an index: one that is there has both.
    new = Index(sources.absolute(directory), sources.absolute(images), tuple(units))
    new.note("scan", dataclasses.asdict(reading))
    new.write_json(_PASSED_OVER, passed_over)
  index = index_module.create_index(directory, images, units)
  _check_reading(index, reading)
  missing = index.missing("scan")
  ingest.run_parts(
    functools.partial(scan_part, directory),
    missing,
    what="Scanned images",
    beam_options=beam_options,
    by_image=True,
    images=_listed(index, missing),
  )
  parts = index.begin("duplicates", {"near_distance": near_distance})
  if parts:
    mark_duplicates(index, parts, near_distance, beam_options=beam_options)
  if before is not None:
    rescan.take_over(before, index)
  if missing or parts or before is not None:
    found = report(index)
    if before is not None:
      found["since_previous"] = rescan.changes(before, index)
    index.write_json("scan/report.json", found)
  else:
    logging.info("%s is scanned already.", directory)
  return index


def reading_of(index: Index) -> Reading:
  """Reading options of an index's source; the defaults for older indexes."""
  settings = index.settings("scan") or {}
  return Reading(
    tuple(settings.get("caption_fields", ())),
    settings.get("image_field"),
    settings.get("caption_per_line", False),
  )


def _check_reading(index: Index, reading: Reading) -> None:
  found = reading_of(index)
  if found != reading:
    raise FileExistsError(
      f"{index.directory} was scanned with {_flags(found)}, not with "
      f"{_flags(reading)}: give the same, or another directory for the index."
    )


def _flags(reading: Reading) -> str:
  given = {
    "caption_field": ",".join(reading.caption_fields),
    "image_field": reading.image_field,
  }
  shown = [f"--{name}={value}" for name, value in given.items() if value]
  shown += ["--caption_per_line"] if reading.caption_per_line else []
  return " ".join(shown) or "no flag of fields"


def _listed(index: Index, parts: Iterable[int]) -> int | None:
  """Number of images in parts; None for tars, which are not listed beforehand."""
  counts = [index.units[part].count for part in parts]
  return sum(counts) if all(counts) else None


def scan_part(directory: str, part: int) -> None:
  """Reads the images of one part."""
  index, passed_over = open_index(directory), collections.Counter[str]()
  reading, rows = reading_of(index), []
  for entry in sources.entries(
    index.source, index.units[part], reading=reading, passed_over=passed_over
  ):
    rows.append(scanned(index.source, entry))
    ingest.count()
  table = pa.Table.from_pylist(rows, schema=SCHEMAS["scan"])
  metadata = {_PASSED_OVER_KEY: json.dumps(dict(sorted(passed_over.items())))}
  index.write("scan", part, table.replace_schema_metadata(metadata))


def scanned(source: str, entry: Entry) -> dict[str, Any]:
  """One row of the index. The size is the header's; damage shows in decoding."""
  row: dict[str, Any] = {
    "id": entry.id,
    "location": entry.location,
    "error": entry.error,
    "captions": [{"text": text, "kind": kind} for text, kind in entry.captions],
  }
  if entry.error is not None:
    return row
  try:
    data = sources.read_bytes(source, entry.location)
    row["bytes"] = len(data)
    row["sha256"] = hashlib.sha256(data).hexdigest()
    row |= image_header(data)._asdict()
    # Twice as fine as the hash looks, so that the decoder's own filter does not matter.
    image, row["profile"] = decode(data, at_least=4 * _GRAY_SIDE)
    row["phash"] = perceptual_hash(image)
  except FileNotFoundError:
    row["error"] = "no such file"
    if "\\" in entry.location:  # of a manifest that was written on Windows
      row["error"] += ": its path has \\, and folders are parted by /"
  except (OSError, ValueError) as error:
    row["error"] = str(error) or type(error).__name__
  return row


def perceptual_hash(image: Image.Image) -> int | None:
  """64 bits that stay when an image is scaled or compressed (pHash).

  The 8 x 8 lowest frequencies (DCT-II) of the image in 32 x 32 grays, each compared
  with their median. None where fewer than half of them are more than the noise of
  rounding: flat images and plain gradients. Their bits would be noise, or all the
  same, and they would pass for duplicates of one another.
  """
  gray = image.convert("L").resize(
    (_GRAY_SIDE, _GRAY_SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0
  )
  frequencies = scipy.fft.dctn(np.asarray(gray, np.float64), norm="ortho")
  low = np.asarray(frequencies)[:_HASH_SIDE, :_HASH_SIDE].ravel()
  if np.count_nonzero(np.abs(low[1:]) > _NOISE) < _FEWEST_COEFFICIENTS:
    return None
  return int.from_bytes(np.packbits(low > np.median(low)).tobytes())


# ---- duplicates ----


class Candidate(NamedTuple):
  """An image among others like it; of two the lesser is the better."""

  minus_area: int
  id: str
  part: int
  row: int


RowKey: TypeAlias = tuple[int, int]  # part and row
# Key, image, and its perceptual hash in hex: Beam's integers are signed.
Keyed: TypeAlias = tuple[str, tuple[Candidate, str]]


def mark_duplicates(
  index: Index, parts: Sequence[int], near_distance: int, *, beam_options: Sequence[str]
) -> None:
  """Finds the duplicates among all images and writes them into `parts`.

  Two images are alike if their bytes are equal (sha256), or if at most `near_distance`
  bits of their perceptual hashes differ. An image is the duplicate of the best that it
  is like: of the largest area, then of the smaller id. Chance has no say in that: any
  runner and any number of workers write the same.
  """
  beam = ingest.beam()
  keys = functools.partial(keys_of_part, index.directory, near_distance)
  compare = functools.partial(compare_group, near_distance)
  write = functools.partial(_write_duplicates, index.directory)
  total = index.num_parts + len(parts)
  with ingest.run("Comparing parts", total, beam_options) as (pipeline, noting):
    duplicates = (
      pipeline
      | "All parts" >> beam.Create(list(range(index.num_parts)))
      | "Spread" >> beam.Reshuffle()
      | "Keys" >> beam.Map(noting(keys))
      | "One by one" >> beam.FlatMap(_or_nothing)
      | "Of a key" >> beam.GroupByKey()
      | "Compare" >> beam.FlatMap(compare)
      | "Best" >> beam.CombinePerKey(_least)
      | "To its part" >> beam.Map(_to_its_part)
    )
    asked = pipeline | "Parts" >> beam.Create([(part, None) for part in parts])
    _ = (
      (asked, duplicates)
      | "Of a part" >> beam.CoGroupByKey()
      | "Write" >> beam.Map(noting(write))
    )


def keys_of_part(directory: str, near_distance: int, part: int) -> list[Keyed]:
  """Keys of a part's images: alike images share at least one.

  Of the hash, `near_distance + 1` bands of bits: hashes that differ in fewer bits than
  there are bands agree in one of them.
  """
  table = open_index(directory).read(part)
  keyed: list[Keyed] = []
  for row, image in enumerate(table.to_pylist()):
    if image["error"] is not None:
      continue
    area = image["height"] * image["width"]
    candidate = Candidate(-area, image["id"], part, row)
    phash = image["phash"]
    keyed.append((image["sha256"], (candidate, "")))
    if phash is not None:
      like = candidate, f"{phash:x}"
      keyed += [(band, like) for band in _bands(phash, near_distance)]
  return keyed


def _bands(phash: int, near_distance: int) -> Iterator[str]:
  count = near_distance + 1
  edges = [HASH_BITS * band // count for band in range(count + 1)]
  for band, (low, high) in enumerate(itertools.pairwise(edges)):
    yield f"{band}:{phash >> low & (1 << high - low) - 1:x}"


def compare_group(
  near_distance: int, group: tuple[str, Iterable[tuple[Candidate, str]]]
) -> list[tuple[RowKey, Candidate]]:
  """Duplicates among images that share a key, each with the best that it is like."""
  key, members = group
  ordered = sorted((Candidate(*candidate), phash) for candidate, phash in members)
  if ":" not in key:  # equal bytes
    best = ordered[0][0]
    return [((other.part, other.row), best) for other, _ in ordered[1:]]
  first: dict[str, Candidate] = {}  # hash → its best image, from best to worst
  for candidate, phash in ordered:
    first.setdefault(phash, candidate)
  near = nearest_best(
    np.array([int(phash, 16) for phash in first], np.uint64), near_distance
  )
  bests = list(first.values())
  best_of = {phash: bests[int(place)] for phash, place in zip(first, near, strict=True)}
  return [
    ((candidate.part, candidate.row), best_of[phash])
    for candidate, phash in ordered
    if best_of[phash] != candidate
  ]


def nearest_best(
  hashes: UInt64[np.ndarray, "n"], near_distance: int
) -> Int64[np.ndarray, "n"]:
  """For each hash the first of all `hashes` within `near_distance` bits of it."""
  step = max(1, _MOST_PAIRS // len(hashes))
  found = [
    # An image is within 0 of itself: there is always one.
    np.argmax(np.bitwise_count(rows[:, None] ^ hashes[None]) <= near_distance, axis=1)
    for rows in (hashes[start : start + step] for start in range(0, len(hashes), step))
  ]
  return np.concatenate(found)


def _or_nothing(found: list[Keyed] | None) -> list[Keyed]:
  return found or []  # None of a run that has failed


def _least(candidates: Iterable[Candidate]) -> Candidate:
  return min(Candidate(*candidate) for candidate in candidates)


def _to_its_part(found: tuple[RowKey, Candidate]) -> tuple[int, tuple[int, str]]:
  (part, row), best = found
  return part, (row, Candidate(*best).id)


def _write_duplicates(directory: str, of_a_part: tuple[int, Any]) -> None:
  part, (asked, duplicates) = of_a_part
  if not list(asked):  # it is written already
    return
  index = open_index(directory)
  best = dict(duplicates)
  column = pa.array([best.get(row) for row in range(index.rows(part))], pa.string())
  index.write("duplicates", part, pa.table({"duplicate_of": column}))


# ---- report ----


def report(index: Index) -> dict[str, Any]:
  """Counts of images, of unusable ones by reason, and the first of these.

  The reason is an error's text up to the colon. `without_caption` are images that can
  be used and have none; `passed_over` is what else there is, by extension or by reason.
  """
  images, duplicates, without = 0, 0, 0
  passed_over = _passed_over_in_listing(index)
  reasons: collections.Counter[str] = collections.Counter()
  profiles: collections.Counter[str] = collections.Counter()
  first: list[dict[str, str]] = []
  for part in range(index.num_parts):
    columns = ["id", "error", "captions", "profile", "duplicate_of"]
    table = index.read(part, "scan", "duplicates", columns=columns)
    images += len(table)
    duplicates += len(table) - table["duplicate_of"].null_count
    profiles.update(table["profile"].drop_null().to_pylist())
    failed = table.filter(table["error"].is_valid()).to_pylist()
    fine = table.filter(table["error"].is_null())
    without += sum(not captions for captions in fine["captions"].to_pylist())
    passed_over.update(
      json.loads(index.metadata(part, "scan").get(_PASSED_OVER_KEY, b"{}"))
    )
    reasons.update(row["error"].partition(":")[0] for row in failed)
    room = _NAMED - len(first)
    first += [{"id": row["id"], "error": row["error"]} for row in failed[:room]]
  errors = dict(sorted(reasons.items()))
  return {
    "images": images,
    "duplicates": duplicates,
    "color_profiles": dict(sorted(profiles.items())),
    "errors": errors,
    "first_errors": first,
    "without_caption": without,
    "passed_over": dict(sorted(passed_over.items())),
  }


def _passed_over_in_listing(index: Index) -> collections.Counter[str]:
  fs, path = sources.file_system(posixpath.join(index.directory, _PASSED_OVER))
  # An index of before this was counted has none.
  counted = json.loads(fs.cat_file(path)) if fs.exists(path) else {}
  return collections.Counter(counted)
