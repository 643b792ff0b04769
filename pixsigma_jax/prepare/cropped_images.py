"""The image side of preparing: kept images, cropped to their buckets, as PNG in shards.

A directory of cropped images:

  plan.json, plan.npy            which rows of the index go into which shard, and how
  contents.parquet               what is in these rows, so that changes are found
  refused.jsonl                  images that go into none, each with its reason
  pictures-00000.array_record …  one `tf.train.Example` an image
  pictures-00000.json …          sizes of a shard's images, and what was left out;
                                 comes last, so that a shard with it is complete

PNG loses nothing: what the autoencoder will see is what was cropped here, to the bit.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from absl import logging
from array_record.python import (
  array_record_module,  # pyright: ignore[reportAttributeAccessIssue]  (compiled)
)
from jaxtyping import Float32, Int32
from PIL import Image

from pixsigma_jax import disk, metadata
from pixsigma_jax.convert import files
from pixsigma_jax.data import ingest, records, sources, wire
from pixsigma_jax.data.crops import CropRule
from pixsigma_jax.data.image_bytes import open_image
from pixsigma_jax.data.index import COMMANDS, Index, open_index
from pixsigma_jax.prepare import contents
from pixsigma_jax.prepare.contents import CONTENTS, Contents
from pixsigma_jax.wording import listed

_FORMAT = 1
_PLAN, _ROWS, _REFUSED = "plan.json", "plan.npy", "refused.jsonl"
# How the pixels of an image's file are understood; earlier versions heeded no profile.
_COLORS = "sRGB"
# Columns of the index that decide what becomes of an image.
_PLANNED_BY = (
  *("id", "error", "sha256", "height", "width", "captions", "aesthetic", "kept"),
  "reason",
)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)  # arrays: no one bool
class CroppedImage:
  """An image as a network will see it, and what is known of it.

  Sizes and the crop are in pixels of the image as it is displayed.
  """

  id: str
  png: bytes
  original_size: Int32[np.ndarray, "2"]  # height, width
  crop: Float32[np.ndarray, "4"]  # what the image shows: top, left, bottom, right
  aesthetic_score: float  # nan if it has none
  captions: tuple[tuple[str, str], ...]  # text and kind, "long" or "short"

  def image(self) -> Image.Image:
    """The pixels."""
    image = Image.open(io.BytesIO(self.png))
    image.load()
    return image


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refusal:
  """An image or a caption that does not get into the records, or not whole.

  Attributes:
    id: of the image.
    reason: the same words for all of one kind, to count them by.
    detail: what exactly, for this one.
    what: "image", "caption", or "caption end" of one that was cut.
  """

  id: str
  reason: str
  detail: str = ""
  what: str = "image"


def count_reasons(refusals: Iterable[Refusal]) -> dict[str, dict[str, int]]:
  """Counts of refusals: what → reason → number."""
  counts: dict[str, collections.Counter[str]] = {}
  for refusal in refusals:
    counts.setdefault(refusal.what, collections.Counter())[refusal.reason] += 1
  return {what: dict(sorted(found.items())) for what, found in sorted(counts.items())}


@dataclasses.dataclass(frozen=True)
class CroppedImages:
  """A directory of cropped images that has its plan.

  Attributes:
    directory: where it is.
    resolution: side in pixels of the square whose area they have.
    crop_rule: identity of the rule that cropped them.
    num_shards: files of cropped images that there are, or will be.
    num_planned: images that are to be cropped.
    refused: how many images go into no shard, by reason.
  """

  directory: pathlib.Path
  resolution: int
  crop_rule: dict[str, Any]
  num_shards: int
  num_planned: int
  refused: dict[str, int]

  def contents(self) -> Contents | None:
    """Contents of the images; None if an older version planned them without."""
    return contents.read(self.directory)

  def missing(self) -> list[int]:
    """Numbers of the shards that are not complete."""
    return [i for i in range(self.num_shards) if not self._report(i).exists()]

  def sizes(self, shard: int) -> list[tuple[int, int]]:
    """Height and width of each image of a shard, in their order."""
    return [(height, width) for height, width in self._about(shard)["sizes"]]

  def ids(self, shard: int) -> list[str]:
    """The images of a shard by name, in their order."""
    return self._about(shard)["ids"]

  def refusals(self) -> Iterator[Refusal]:
    """Every image that is left out, of the plan and of each shard."""
    lines = (self.directory / _REFUSED).read_text(encoding="utf-8").splitlines()
    yield from (Refusal(**json.loads(line)) for line in lines)
    for shard in range(self.num_shards):
      yield from (Refusal(**fields) for fields in self._about(shard)["refused"])

  def read(self, shard: int, positions: Sequence[int]) -> list[CroppedImage]:
    """Images of a shard by their positions in it.

    Raises:
      ValueError: the shard is missing or damaged.
      OSError: it cannot be read.
    """
    path = self._shard(shard)
    try:
      reader = records.open_shard(path)
      return [_decoded(data) for data in reader.read(list(positions))]
    except (FileNotFoundError, RuntimeError, ValueError, IndexError) as error:
      records.check_damage(path, error)
      raise ValueError(
        f"{path} is missing or damaged: {error}. Delete {self._report(shard).name} "
        "beside it, and run the command again."
      ) from error

  def _about(self, shard: int) -> dict[str, Any]:
    return files.read_json(self._report(shard))

  def _shard(self, number: int) -> pathlib.Path:
    return self.directory / f"pictures-{number:05d}.array_record"

  def _report(self, number: int) -> pathlib.Path:
    return self.directory / f"pictures-{number:05d}.json"


def open_images(directory: str | pathlib.Path) -> CroppedImages:
  """The cropped images of a directory, however many of them are there yet.

  Raises:
    FileNotFoundError: nothing was planned there.
    ValueError: the plan is damaged or of another version.
  """
  directory = pathlib.Path(directory)
  path = directory / _PLAN
  if not path.exists():
    raise FileNotFoundError(
      f"{directory} holds no images: prepare them first, with pictures among --parts."
    )
  plan = files.read_json(path)
  if not isinstance(plan, dict) or plan.get("format") != _FORMAT:
    raise ValueError(f"{path} is no plan of images that this version can read.")
  return CroppedImages(
    directory=directory,
    resolution=plan["arguments"]["resolution"],
    crop_rule=plan["arguments"]["crop_rule"],
    num_shards=plan["num_shards"],
    num_planned=plan["num_planned"],
    refused=plan["refused"],
  )


def prepare_images(
  index_directory: str,
  directory: str | pathlib.Path,
  *,
  rule: CropRule,
  resolution: int,
  allow_upscaling: bool,
  images_per_shard: int,
  beam_options: Sequence[str],
  update: bool = False,
) -> CroppedImages:
  """Crops the kept images of an index into shards, those that are missing.

  Kept are the images that `curate filter` has kept or, without that step, all that
  could be read. Images stand in the order of the index.

  Args:
    index_directory: where `curate scan` wrote the index.
    directory: new, or begun with the same arguments.
    rule: how images are cropped.
    resolution: side in pixels of the square whose area the images have.
    allow_upscaling: whether an image smaller than its bucket is enlarged, as the
      reference does without a word, instead of refused.
    images_per_shard: of each but the last; undecodable ones among them are left out.
    beam_options: see `data.ingest`.
    update: if the directory was begun with other arguments or contents, whether it is
      made anew, from what has changed and the crops there of what has not.

  Returns:
    the cropped images, all of them there.

  Raises:
    FileExistsError: the directory was begun with other arguments or contents.
    FileNotFoundError: there is no index, or none of a shard's images is where it was.
    ValueError: no image is left, a step of the index is unfinished, or an argument is
      out of its range.
    OSError: something cannot be read or written.
  """
  if images_per_shard < 1:
    raise ValueError(f"images_per_shard {images_per_shard} must be at least 1.")
  directory = pathlib.Path(directory)
  index = open_index(index_directory)
  steps = _steps(index)
  plan = _planned(index, steps, rule, allow_upscaling)
  if not len(plan.rows):
    reasons = count_reasons(plan.refusals).get("image", {"is there": 0})
    raise ValueError(
      f"No image of {index_directory} can be used: "
      f"{', '.join(f'{count} {reason}' for reason, count in reasons.items())}."
    )
  arguments = {
    "source": index.source,
    "resolution": resolution,
    "crop_rule": rule.identity,
    "colors": _COLORS,
    "allow_upscaling": allow_upscaling,
    "images_per_shard": images_per_shard,
  }
  # Of plans without contents, all that there is to compare.
  digest = hashlib.sha256(plan.rows.tobytes()).hexdigest()
  earlier = {**arguments, "steps": steps, "rows": digest}
  del earlier["colors"]
  if lines := _differences(directory, arguments, earlier, plan.contents):
    if not update:
      raise FileExistsError(
        f"{directory} was begun with other arguments, or the index has changed (then → "
        f"now): {listed(lines, joint='; ')}. Give --update to make anew what has "
        "changed, the same arguments to go on, or choose another --pictures."
      )
    logging.info("Updating %s: %s.", directory, listed(lines, joint="; "))
    contents.set_aside(directory, is_complete=not open_images(directory).missing())
  _store_plan(directory, arguments, plan, images_per_shard)
  images = open_images(directory)
  missing = images.missing()
  if missing:
    write = functools.partial(
      write_shard, index_directory, str(directory), rule, images_per_shard
    )
    each = images_per_shard
    ingest.run_parts(
      write,
      missing,
      what="Images",
      beam_options=beam_options,
      by_image=True,
      images=sum(min(each, len(plan.rows) - shard * each) for shard in missing),
    )
  if not images.missing():
    contents.drop_previous(directory)
  return images


def _steps(index: Index) -> list[str]:
  """The steps of curation that there are, of those that count here.

  Raises:
    ValueError: one of them is unfinished: without it, others' work would be lost.
  """
  steps = ["scan"]
  for step in ("captions", "scores", "kept"):
    missing = index.missing(step)
    if not missing:
      steps.append(step)
    elif len(missing) < index.num_parts or index.settings(step) is not None:
      # Begun, or taken away by a scan that has found other images.
      raise ValueError(
        f"`curate {COMMANDS[step]}` is unfinished: {len(missing)} of "
        f"{index.num_parts} parts are missing in {index.directory}/{step}, the first "
        f"is {missing[0]}. Run it again, or delete {index.directory}/{step} to do "
        "without."
      )
  return steps


class _Plan(NamedTuple):
  """The plan: images to crop, in order, and the reasons against the others."""

  rows: Int32[np.ndarray, "n 2"]  # part of the index, and row in it
  contents: Contents
  refusals: list[Refusal]


def _planned(
  index: Index, steps: Sequence[str], rule: CropRule, allow_upscaling: bool
) -> _Plan:
  rows, refusals, tables = [], [], []
  for part in range(index.num_parts):
    table = index.read(part, *steps, columns=_PLANNED_BY)
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    kept = columns.get("kept", [True] * table.num_rows)
    made_of = []
    for row in range(table.num_rows):
      about = {name: values[row] for name, values in columns.items()}
      refusal = _refusal({**about, "kept": kept[row]}, rule, allow_upscaling)
      if refusal is None:
        rows.append((part, row))
        captions = [[caption["text"], caption["kind"]] for caption in about["captions"]]
        made_of.append(
          {
            "id": about["id"],
            "image": (about["sha256"] or "")[:16],
            "captions": captions,
            "score": about.get("aesthetic"),
          }
        )
      else:
        refusals.append(refusal)
    tables.append(contents.images(made_of))
  return _Plan(
    np.array(rows, np.int32).reshape(-1, 2),
    Contents(pa.concat_tables(tables).combine_chunks()),
    refusals,
  )


def _differences(
  directory: pathlib.Path,
  arguments: dict[str, Any],
  earlier: dict[str, Any],
  now: Contents,
) -> list[str]:
  """Differences of the stored plan from the one asked for.

  Args:
    earlier: the arguments as versions wrote them that noted no contents.
  """
  if not (directory / _PLAN).exists():
    return []
  have = files.read_json(directory / _PLAN).get("arguments")
  before = contents.read(directory)
  if before is None:
    lines = metadata.disagreements(have, json.loads(json.dumps(earlier)))
    if lines or open_images(directory).missing():
      return lines or ["colors: None, by an earlier version → 'sRGB'"]
    logging.warning(
      "%s is of an earlier version, which noted no captions and heeded no color "
      "profiles: whether the images are still the same cannot be told. Delete it to "
      "make it anew.",
      directory,
    )
    return []
  lines = metadata.disagreements(have, json.loads(json.dumps(arguments)))
  return lines + before.differences(now)


def _refusal(
  about: dict[str, Any], rule: CropRule, allow_upscaling: bool
) -> Refusal | None:
  """Why an image of the index is not cropped, as far as the index can tell."""
  if about["error"] is not None:
    return Refusal(id=about["id"], reason="could not be read", detail=about["error"])
  if not about["kept"]:
    detail = about.get("reason") or ""
    return Refusal(id=about["id"], reason="not kept by filter", detail=detail)
  if not any(caption["text"].strip() for caption in about["captions"] or ()):
    return Refusal(id=about["id"], reason="has no caption")
  height, width = about["height"], about["width"]
  crop = rule.plan(height, width)
  if crop.enlarges and not allow_upscaling:
    detail = (
      f"{height}x{width}, and its size is {crop.bucket.height}x{crop.bucket.width}"
    )
    return Refusal(id=about["id"], reason="smaller than its size", detail=detail)
  return None


def _store_plan(
  directory: pathlib.Path,
  arguments: dict[str, Any],
  plan: _Plan,
  images_per_shard: int,
) -> None:
  """Writes the plan; over one of the same contents, where it stands elsewhere now."""
  directory.mkdir(parents=True, exist_ok=True)
  disk.remove_abandoned(directory)
  is_new = not (directory / _PLAN).exists()
  if is_new:
    for name in disk.whole_files(directory):
      if name not in (_ROWS, _REFUSED, CONTENTS):  # left behind by a run that died
        raise FileExistsError(
          f"{directory} holds {name}, which is no part of a plan. Choose a new or an "
          "empty directory with --pictures."
        )
      (directory / name).unlink()
  elif not (directory / CONTENTS).exists():  # of an earlier version, and finished
    return
  lines = [json.dumps(dataclasses.asdict(refusal)) + "\n" for refusal in plan.refusals]
  rows = io.BytesIO()
  np.save(rows, plan.rows)
  content = {
    "format": _FORMAT,
    "arguments": arguments,
    "num_shards": -(-len(plan.rows) // images_per_shard),
    "num_planned": len(plan.rows),
    "refused": count_reasons(plan.refusals).get("image", {}),
  }
  plan.contents.write(directory)
  for name, data in (
    (_ROWS, rows.getvalue()),
    (_REFUSED, "".join(lines).encode()),
    (_PLAN, json.dumps(content, indent=2).encode()),
  ):
    path = directory / name
    if not path.exists() or path.read_bytes() != data:
      disk.write_whole(path, lambda partial, data=data: partial.write_bytes(data))


def write_shard(
  index_directory: str,
  directory: str,
  rule: CropRule,
  images_per_shard: int,
  number: int,
) -> None:
  """Writes one planned shard of images, whole or not at all.

  Raises:
    FileNotFoundError: not one of its images is where it was.
    OSError: an image's file is there and cannot be read, or the shard cannot be
      written.
  """
  index, images = open_index(index_directory), open_images(directory)
  rows = np.load(images.directory / _ROWS, mmap_mode="r")
  rows = rows[number * images_per_shard : (number + 1) * images_per_shard]
  previous = _previous(str(directory))
  about: dict[str, list[Any]] = {"ids": [], "sizes": []}
  refusals: list[Refusal] = []

  def write(partial: pathlib.Path) -> None:
    # PNG does not compress any further.
    with _storing(images, number):
      writer = array_record_module.ArrayRecordWriter(
        str(partial), "group_size:1,uncompressed"
      )
    try:
      for row in _rows(index, _steps(index), rows):
        made = previous.cropped(row) or _cropped(index.source, row, rule)
        ingest.count()
        if isinstance(made, Refusal):
          refusals.append(made)
          continue
        cropped, size = made
        with _storing(images, number):
          writer.write(_encoded(cropped))
        about["ids"].append(cropped.id)
        about["sizes"].append(size)
    finally:
      with _storing(images, number):
        writer.close()
    if len(refusals) == len(rows) and all(r.reason == "is gone" for r in refusals):
      raise FileNotFoundError(
        f"None of the {len(rows)} images of shard {number} is there any more, the "
        f"first is {refusals[0].id}: is {index.source} where it was when the index was "
        "made?"
      )

  disk.write_whole(images._shard(number), write)
  refused = [dataclasses.asdict(refusal) for refusal in refusals]
  files.write_json(images._report(number), {**about, "refused": refused})


@contextlib.contextmanager
def _storing(images: CroppedImages, number: int) -> Iterator[None]:
  """Names the shard of which ArrayRecord says that it cannot be written."""
  try:
    yield
  except RuntimeError as error:
    raise OSError(
      f"Cannot write {images._shard(number)}: {error}. "
      f"{disk.way_out(images.directory, '--pictures')}, and run the command again."
    ) from error


def _rows(index: Index, steps: Sequence[str], rows: np.ndarray) -> Iterator[dict]:
  """The index's rows, in order, each part read once."""
  for part in np.unique(rows[:, 0]).tolist():
    table = index.read(part, *steps).take(rows[rows[:, 0] == part, 1])
    yield from table.to_pylist()


class _Previous:
  """The crops from before an update, of images that have not changed."""

  def __init__(self, directory: pathlib.Path):
    self._places: dict[str, tuple[int, int]] = {}
    there = contents.previous_of(directory)
    if not (there / _PLAN).exists():
      return
    now, self._images = open_images(directory), open_images(there)
    before, after = self._images.contents(), now.contents()
    same = ("crop_rule", "colors")
    plans = [files.read_json(d / _PLAN)["arguments"] for d in (there, directory)]
    if (
      before is None
      or after is None
      or any(plans[0].get(name) != plans[1].get(name) for name in same)
    ):
      return
    unchanged = before.unchanged_images(after)
    for shard in set(range(self._images.num_shards)) - {*self._images.missing()}:
      for position, id in enumerate(self._images.ids(shard)):
        if id in unchanged:
          self._places[id] = shard, position

  def cropped(self, row: dict[str, Any]) -> tuple[CroppedImage, tuple[int, int]] | None:
    """A row's cropped image with its size; None if it has to be made."""
    place = self._places.get(row["id"])
    if place is None:
      return None
    [cropped] = self._images.read(place[0], [place[1]])
    size = self._images.sizes(place[0])[place[1]]
    return dataclasses.replace(cropped, **_from_index(row)), size


@functools.lru_cache(maxsize=1)
def _looked_up(directory: str, *_: int) -> _Previous:
  return _Previous(pathlib.Path(directory))


def _previous(directory: str) -> _Previous:
  """Earlier cropped images that an update may reuse, looked up once an update."""
  now = pathlib.Path(directory)
  plans = [folder / _PLAN for folder in (now, contents.previous_of(now))]
  return _looked_up(
    directory, *(plan.stat().st_mtime_ns if plan.exists() else 0 for plan in plans)
  )


def _from_index(row: dict[str, Any]) -> dict[str, Any]:
  """Fields of a cropped image that come from the index."""
  score = row.get("aesthetic")
  return {
    "aesthetic_score": float("nan") if score is None else score,
    "captions": tuple((c["text"], c["kind"]) for c in row["captions"]),
  }


def _cropped(
  source: str, row: dict[str, Any], rule: CropRule
) -> tuple[CroppedImage, tuple[int, int]] | Refusal:
  """A row's image, cropped, with its size, or why not."""
  changed = "has changed since the scan"
  try:
    data = sources.read_bytes(source, row["location"])
    image = open_image(data)
  except FileNotFoundError as error:
    return Refusal(id=row["id"], reason="is gone", detail=str(error))
  except ValueError as error:
    return Refusal(id=row["id"], reason="cannot be decoded", detail=str(error))
  if (image.height, image.width) != (row["height"], row["width"]):
    detail = f"{row['height']}x{row['width']} → {image.height}x{image.width}"
    return Refusal(id=row["id"], reason=changed, detail=detail)
  if row["sha256"] not in (None, hashlib.sha256(data).hexdigest()):
    detail = f"{row['bytes']} → {len(data)} bytes, of other content"
    return Refusal(id=row["id"], reason=changed, detail=detail)
  crop = rule.plan(image.height, image.width)
  png = io.BytesIO()
  rule.apply(image).save(png, "png", compress_level=1)
  cropped = CroppedImage(
    id=row["id"],
    png=png.getvalue(),
    original_size=np.array([image.height, image.width], np.int32),
    crop=crop.box,
    **_from_index(row),
  )
  return cropped, (crop.bucket.height, crop.bucket.width)


def _encoded(cropped: CroppedImage) -> bytes:
  texts, kinds = zip(*cropped.captions, strict=True)
  return wire.encode(
    {
      "id": [cropped.id.encode()],
      "png": [cropped.png],
      "captions": [text.encode() for text in texts],
      "caption_kinds": [kind.encode() for kind in kinds],
    },
    {"original_size": cropped.original_size.tolist()},
    {"crop": cropped.crop.tolist(), "aesthetic_score": [cropped.aesthetic_score]},
  )


def _decoded(data: bytes) -> CroppedImage:
  features = wire.Features(data)
  [identity] = features.texts("id")
  [score] = features.floats("aesthetic_score").tolist()
  captions = zip(
    features.texts("captions"), features.texts("caption_kinds"), strict=True
  )
  return CroppedImage(
    id=identity,
    png=features.bytes("png"),
    original_size=np.array(features.integers("original_size"), np.int32),
    crop=features.floats("crop"),
    aesthetic_score=score,
    captions=tuple(captions),
  )
