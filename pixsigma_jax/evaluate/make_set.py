"""The command `make-set`: held-out images and captions of a curate index.

  python -m pixsigma_jax.evaluate make-set INDEX --output=SET --resolution=1024 \
    --holdout=0.01 --training=DATASET,…

Images are chosen by hashes of their ids alone: the same index gives the same set, and a
larger set has the smaller one's images. `--holdout` takes them of what a training with
that `config.data.holdout` never sees, `--training` refuses what a training has seen.
"""

import collections
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from pixsigma_jax import command, disk
from pixsigma_jax.data import index as index_
from pixsigma_jax.data import sources
from pixsigma_jax.data.buckets import BUCKETS, Bucket
from pixsigma_jax.data.crops import CropRule, filter_at
from pixsigma_jax.data.image_bytes import open_image
from pixsigma_jax.data.index import Index, open_index
from pixsigma_jax.data.records import id_hash, open_dataset
from pixsigma_jax.evaluate import items as items_
from pixsigma_jax.evaluate.commands import Command
from pixsigma_jax.evaluate.items import Item
from pixsigma_jax.evaluate.options import Option, OptionFlags
from pixsigma_jax.evaluate.set_files import (
  FORMAT_VERSION,
  IMAGES,
  MANIFEST,
  PROMPTS,
  read_manifest,
)
from pixsigma_jax.wording import listed

_OPTIONS = (
  Option("output", None, "Folder of the set."),
  Option("count", 30_000, "Images of the set.", int),
  Option("resolution", 1024, "Side of the square whose area they are cropped to.", int),
  Option(
    "holdout", 0.0, "Take them of this share of ids, as config.data.holdout.", float
  ),
  Option("training", None, "Datasets or indexes that a model was trained on.", list),
  Option("keep_quantile", 1.0, "Best part by aesthetic score of what fits.", float),
  Option("caption", "long", "Kind of caption.", choices=("long", "short", "any")),
  Option("min_caption_words", 1, "Words that a caption must have.", int),
  Option("max_caption_words", None, "Words that it may have.", int),
  Option(
    "aspect_mix",
    "natural",
    "Sizes as the index has them, as many of each, or squares alone.",
    choices=("natural", "even", "square"),
  ),
)
_SALT = "evaluate make-set"  # so that the order is none that training knows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
  """Choice of the images of a set; fields are the command's flags.

  Raises:
    ValueError: a value is out of its range.
  """

  count: int
  resolution: int
  holdout: float
  keep_quantile: float
  caption: str
  min_caption_words: int
  max_caption_words: int | None
  aspect_mix: str

  def __post_init__(self):
    if self.count < 1:
      raise ValueError(f"--count={self.count} must be at least 1.")
    if self.resolution not in BUCKETS:
      raise ValueError(
        f"--resolution={self.resolution} has no table of sizes: known are "
        f"{', '.join(map(str, BUCKETS))}."
      )
    if not 0 <= self.holdout < 1:
      raise ValueError(f"--holdout={self.holdout} must be at least 0 and less than 1.")
    if not 0 < self.keep_quantile <= 1:
      raise ValueError(
        f"--keep_quantile={self.keep_quantile} must be above 0 and at most 1."
      )
    most = self.max_caption_words
    if self.min_caption_words < 1 or (
      most is not None and most < self.min_caption_words
    ):
      raise ValueError(
        f"--min_caption_words={self.min_caption_words} and --max_caption_words={most} "
        "allow no caption."
      )


@dataclasses.dataclass(frozen=True)
class Candidate:
  """An image of the index that a set may have."""

  id: str
  location: str
  sha256: str
  caption: str
  aesthetic: float | None
  bucket: Bucket


def define(name: str, arguments: Sequence[str]) -> Command:
  """Defines the command's flags; see `commands.define`."""
  flags = OptionFlags(_OPTIONS)

  def run(words: list[str]) -> None:
    values = flags.values()
    if values["output"] is None:
      raise ValueError("Give --output=SET, a folder for the set.")
    names = [field.name for field in dataclasses.fields(Rules)]
    rules = Rules(**{name: values[name] for name in names})
    output = pathlib.Path(values["output"])
    make_set(words[0], output, rules, training=values["training"] or [])
    print(output / MANIFEST)

  return Command(run, ("INDEX",))


def make_set(
  index_directory: str, output: pathlib.Path, rules: Rules, *, training: Sequence[str]
) -> None:
  """Writes a set, or what is missing of it; see `set_files`.

  Args:
    training: directories of datasets or indexes that a model was trained on, of which
      `rules.holdout` says what it never saw.

  Raises:
    FileExistsError: the folder holds another set.
    ValueError: the index overlaps the training data, has too few images that fit, or
      an image has changed since the scan.
  """
  if not rules.holdout and not training:
    raise ValueError(
      "A set must not meet training data: give --holdout=SHARE, as config.data.holdout "
      "of the training, or --training=DIR,… with what it was trained on."
    )
  index = open_index(index_directory)
  rule = CropRule(BUCKETS[rules.resolution], filter_at(rules.resolution))
  candidates, left_out = _candidates(index, rules, rule)
  _check_overlap(candidates, rules.holdout, training)
  chosen = choose(candidates, rules)
  about = {
    "format_version": FORMAT_VERSION,
    "index": index.directory,
    "source": index.source,
    "rules": dataclasses.asdict(rules),
    "training": sorted(training),
    "crop_rule": rule.hash,
    "count": len(chosen),
    "candidates": len(candidates),
    "left_out": left_out,
    "sizes": _sizes(chosen),
  }
  found = [_item(i, candidate) for i, candidate in enumerate(chosen)]
  disk.check_writable(output)
  _begin(output, about, found)
  _write_images(index, output, rule, found, chosen)
  about["prompts_sha256"] = disk.file_hash(output / PROMPTS)
  text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
  disk.write_text(output / MANIFEST, text)
  logging.info(
    "Chose %d of %d images of %s.", len(chosen), len(candidates), index.directory
  )


def _begin(output: pathlib.Path, about: Mapping[str, Any], found: list[Item]) -> None:
  """Writes the prompts, or checks that those that are there are the same."""
  if (output / MANIFEST).exists():
    have = read_manifest(output)
    now = json.loads(json.dumps(about))
    for key, value in now.items():
      if have.get(key) != value:
        raise FileExistsError(
          f"{output} holds another set: {key} is {json.dumps(have.get(key))[:100]} "
          f"there and {json.dumps(value)[:100]} here. Give another --output."
        )
  if (output / PROMPTS).exists():
    if items_.fingerprint(items_.read(output / PROMPTS)) != items_.fingerprint(found):
      raise FileExistsError(
        f"{output / PROMPTS} is of another choice of images: delete {output}, or give "
        "another --output."
      )
  elif output.is_dir() and (there := disk.whole_files(output)):
    raise FileExistsError(
      f"{output} is no set: it holds {listed(there)}. Give an --output that is empty "
      "or not there."
    )
  else:
    items_.write(output / PROMPTS, found)


def _write_images(
  index: Index,
  output: pathlib.Path,
  rule: CropRule,
  found: Sequence[Item],
  chosen: Sequence[Candidate],
) -> None:
  folder = output / IMAGES
  folder.mkdir(parents=True, exist_ok=True)
  disk.remove_abandoned(folder)
  there = set(disk.whole_files(folder))
  pairs = [
    (output / str(item.reference), candidate)
    for item, candidate in zip(found, chosen, strict=True)
    if f"{item.id}.png" not in there
  ]
  for path, candidate in command.progress(pairs, len(pairs), "Images"):
    data = sources.read_bytes(index.source, candidate.location)
    if hashlib.sha256(data).hexdigest() != candidate.sha256:
      raise ValueError(
        f"{candidate.id} has changed since the scan of {index.directory}: run `curate "
        "scan` again."
      )
    image = rule.apply(open_image(data))
    disk.write_whole(
      path,
      lambda partial, i=image: i.save(partial, format="PNG", compress_level=1),
      of_many=True,
    )


def choose(candidates: Sequence[Candidate], rules: Rules) -> list[Candidate]:
  """The set's images, in the order of their hashes.

  Raises:
    ValueError: there are too few.
  """
  fitting = list(candidates)
  if rules.aspect_mix == "square":
    fitting = [c for c in fitting if c.bucket.height == c.bucket.width]
  if rules.keep_quantile < 1:
    scores = [c.aesthetic for c in fitting if c.aesthetic is not None]
    if len(scores) < len(fitting):
      raise ValueError(
        f"--keep_quantile={rules.keep_quantile} needs aesthetic scores, and "
        f"{len(fitting) - len(scores)} of {len(fitting)} images have none: run "
        "`curate score`."
      )
    least = np.quantile(scores, 1 - rules.keep_quantile) if scores else 0.0
    fitting = [c for c in fitting if c.aesthetic is not None and c.aesthetic >= least]
  fitting.sort(key=lambda c: (_rank(c.id), c.id))
  if rules.aspect_mix == "even":
    fitting = _evenly(fitting)
  if len(fitting) < rules.count:
    raise ValueError(
      f"{len(fitting)} of {len(candidates)} images fit, and --count={rules.count} asks "
      "for more: give a smaller --count, or looser rules."
    )
  return fitting[: rules.count]


def _evenly(candidates: Sequence[Candidate]) -> list[Candidate]:
  """Candidates in an order whose beginnings have as many of each size as there are."""
  turns: collections.Counter[Bucket] = collections.Counter()
  keyed = []
  for position, candidate in enumerate(candidates):
    keyed.append((turns[candidate.bucket], position))
    turns[candidate.bucket] += 1
  return [candidates[position] for _, position in sorted(keyed)]


def _rank(id: str) -> int:
  digest = hashlib.blake2b(id.encode(), digest_size=8, key=_SALT.encode()).digest()
  return int.from_bytes(digest, "little")


def _candidates(
  index: Index, rules: Rules, rule: CropRule
) -> tuple[list[Candidate], dict[str, int]]:
  """Images that the rules allow but for score and count, and how many others why not.

  Raises:
    ValueError: a step of curation is missing.
  """
  steps = ["scan", "duplicates"]
  steps += [step for step in ("captions", "scores", "kept") if index.has(step)]
  # The share of ids that no training with this holdout sees.
  limit = rules.holdout * 2.0**64
  found, left_out = [], collections.Counter()
  for part in range(index.num_parts):
    table = index.read(part, *steps)
    for row in table.to_pylist():
      reason = _reason_against(row, rules, limit)
      if reason is None:
        crop = rule.plan(row["height"], row["width"])
        reason = "smaller than its size" if crop.enlarges else None
        if reason is None:
          found.append(_candidate(row, rules, crop.bucket))
      if reason is not None:
        left_out[reason] += 1
  return found, dict(sorted(left_out.items()))


def _reason_against(row: Mapping[str, Any], rules: Rules, limit: float) -> str | None:
  """Why an image is no candidate, as far as its row says without its size."""
  if row["error"] is not None:
    return "could not be read"
  if row["duplicate_of"] is not None:
    return "duplicate"
  if row.get("kept") is False:
    return "not kept by filter"
  if limit and id_hash(row["id"]) >= limit:
    return "not held out"
  return None if _caption(row["captions"], rules) else "has no such caption"


def _candidate(row: Mapping[str, Any], rules: Rules, bucket: Bucket) -> Candidate:
  return Candidate(
    id=row["id"],
    location=row["location"],
    sha256=row["sha256"],
    caption=str(_caption(row["captions"], rules)),
    aesthetic=row.get("aesthetic"),
    bucket=bucket,
  )


def _caption(captions: Sequence[Mapping[str, str]] | None, rules: Rules) -> str | None:
  """The first caption that fits."""
  for caption in captions or ():
    words = len(caption["text"].split())
    is_kind = rules.caption in ("any", caption["kind"])
    most = rules.max_caption_words
    if is_kind and words >= rules.min_caption_words and (most is None or words <= most):
      return caption["text"]
  return None


def _check_overlap(
  candidates: Sequence[Candidate], holdout: float, training: Sequence[str]
) -> None:
  """Refuses candidates that a training has seen, by id or by content."""
  ids = {id_hash(c.id): c.id for c in candidates}
  contents = {c.sha256: c.id for c in candidates}
  limit = np.uint64(holdout * 2.0**64)
  for directory in training:
    if index_.exists(directory):
      met = _met_by_index(open_index(directory), ids, contents, holdout)
    else:
      hashes = open_dataset(directory).index["id_hash"]
      trained = set(hashes[hashes >= limit].tolist())
      met = [ids[number] for number in ids.keys() & trained]
    if met:
      raise ValueError(
        f"The index overlaps the training data: {len(met)} of {len(candidates)} images "
        f"that fit are in {directory} too, such as {min(met)}. Give the --holdout that "
        "it is trained with (config.data.holdout), or the index of other images."
      )


def _met_by_index(
  index: Index, ids: Mapping[int, str], contents: Mapping[str, str], holdout: float
) -> list[str]:
  limit = holdout * 2.0**64
  met = set()
  for part in range(index.num_parts):
    for row in index.read(part, "scan", columns=["id", "sha256"]).to_pylist():
      number = id_hash(row["id"])
      if number < limit:
        continue
      if number in ids:
        met.add(ids[number])
      if row["sha256"] in contents:
        met.add(contents[row["sha256"]])
  return sorted(met)


def _item(number: int, candidate: Candidate) -> Item:
  name = f"{number:05d}"
  return Item(
    id=name,
    prompt=candidate.caption,
    seed=number,
    height=candidate.bucket.height,
    width=candidate.bucket.width,
    reference=f"{IMAGES}/{name}.png",
    data={
      "source": candidate.id,
      "sha256": candidate.sha256,
      "aesthetic": candidate.aesthetic,
    },
  )


def _sizes(chosen: Sequence[Candidate]) -> dict[str, int]:
  counts = collections.Counter(f"{c.bucket.height}x{c.bucket.width}" for c in chosen)
  return dict(sorted(counts.items()))
