"""The image side of preparing: kept images, cropped to their buckets, as PNG in shards.

A directory of pictures:

  plan.json, plan.npy            which rows of the index go into which shard, and how
  refused.jsonl                  images that go into none, each with its reason
  pictures-00000.array_record …  one `tf.train.Example` a picture
  pictures-00000.json …          sizes of a shard's pictures, and what was left out;
                                 comes last, so that a shard with it is complete

PNG loses nothing: what the autoencoder will see is what was cropped here, to the bit.
"""

import collections
import dataclasses
import functools
import hashlib
import io
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from array_record.python import (
  array_record_module,  # pyright: ignore[reportAttributeAccessIssue]  (compiled)
)
from jaxtyping import Float32, Int32
from PIL import Image

from pixsigma_jax import disk, metadata
from pixsigma_jax.convert import files
from pixsigma_jax.data import ingest, sources, wire
from pixsigma_jax.data.crops import CropRule
from pixsigma_jax.data.image_bytes import open_image
from pixsigma_jax.data.index import Index, open_index
from pixsigma_jax.wording import listed

_FORMAT = 1
_PLAN, _ROWS, _REFUSED = "plan.json", "plan.npy", "refused.jsonl"
# Columns of the index that decide what becomes of an image.
_PLANNED_BY = ("id", "error", "height", "width", "captions", "kept", "reason")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)  # arrays: no one bool
class Picture:
  """An image as a network will see it, and what is known of it.

  Sizes and the crop are in pixels of the image as it is displayed.
  """

  id: str
  png: bytes
  original_size: Int32[np.ndarray, "2"]  # height, width
  crop: Float32[np.ndarray, "4"]  # what the picture shows: top, left, bottom, right
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
  """How many were refused: what → reason → number."""
  counts: dict[str, collections.Counter[str]] = {}
  for refusal in refusals:
    counts.setdefault(refusal.what, collections.Counter())[refusal.reason] += 1
  return {what: dict(sorted(found.items())) for what, found in sorted(counts.items())}


@dataclasses.dataclass(frozen=True)
class Pictures:
  """A directory of pictures that has its plan.

  Attributes:
    directory: where it is.
    resolution: side in pixels of the square whose area the pictures have.
    crop_rule: identity of the rule that cropped them.
    num_shards: files of pictures that there are, or will be.
    num_planned: images that are to become pictures.
    refused: how many images go into no shard, by reason.
  """

  directory: pathlib.Path
  resolution: int
  crop_rule: dict[str, Any]
  num_shards: int
  num_planned: int
  refused: dict[str, int]

  def missing(self) -> list[int]:
    """Numbers of the shards that are not complete."""
    return [i for i in range(self.num_shards) if not self._report(i).exists()]

  def sizes(self, shard: int) -> list[tuple[int, int]]:
    """Height and width of each picture of a shard, in their order."""
    return [(height, width) for height, width in self._about(shard)["sizes"]]

  def ids(self, shard: int) -> list[str]:
    """The pictures of a shard by name, in their order."""
    return self._about(shard)["ids"]

  def refusals(self) -> Iterator[Refusal]:
    """Every image that became no picture, of the plan and of each shard."""
    lines = (self.directory / _REFUSED).read_text(encoding="utf-8").splitlines()
    yield from (Refusal(**json.loads(line)) for line in lines)
    for shard in range(self.num_shards):
      yield from (Refusal(**fields) for fields in self._about(shard)["refused"])

  def read(self, shard: int, positions: Sequence[int]) -> list[Picture]:
    """Pictures of a shard by their positions in it.

    Raises:
      ValueError: the shard is damaged.
    """
    path = self._shard(shard)
    try:
      reader = array_record_module.ArrayRecordReader(
        str(path), options="readahead_buffer_size:0,max_parallelism:0"
      )
      return [_decoded(data) for data in reader.read(list(positions))]
    except Exception as error:  # RuntimeError of Riegeli, or bytes that are no picture
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


def open_pictures(directory: str | pathlib.Path) -> Pictures:
  """The pictures of a directory, however many of them are there yet.

  Raises:
    FileNotFoundError: nothing was planned there.
    ValueError: the plan is damaged or of another version.
  """
  directory = pathlib.Path(directory)
  path = directory / _PLAN
  if not path.exists():
    raise FileNotFoundError(
      f"{directory} holds no pictures: prepare them first, with pictures among --parts."
    )
  plan = files.read_json(path)
  if not isinstance(plan, dict) or plan.get("format") != _FORMAT:
    raise ValueError(f"{path} is no plan of pictures that this version can read.")
  return Pictures(
    directory=directory,
    resolution=plan["arguments"]["resolution"],
    crop_rule=plan["arguments"]["crop_rule"],
    num_shards=plan["num_shards"],
    num_planned=plan["num_planned"],
    refused=plan["refused"],
  )


def prepare_pictures(
  index_directory: str,
  directory: str | pathlib.Path,
  *,
  rule: CropRule,
  resolution: int,
  allow_upscaling: bool,
  images_per_shard: int,
  beam_options: Sequence[str],
) -> Pictures:
  """Crops the kept images of an index into shards of pictures, those that are missing.

  Kept are the images that `curate filter` has kept or, without that step, all that
  could be read. Pictures stand in the order of the index.

  Args:
    index_directory: where `curate scan` wrote the index.
    directory: new, or begun with the same arguments.
    rule: how images are cropped.
    resolution: side in pixels of the square whose area the pictures have.
    allow_upscaling: whether an image smaller than its bucket is enlarged, as the
      reference does without a word, instead of refused.
    images_per_shard: of each but the last; undecodable ones among them are left out.
    beam_options: see `data.ingest`.

  Returns:
    the pictures, all of them there.

  Raises:
    FileExistsError: the directory was begun with other arguments or another index.
    FileNotFoundError: there is no index, or none of a shard's images is where it was.
    ValueError: no image is left, or an argument is out of its range.
    OSError: something cannot be read or written.
  """
  if images_per_shard < 1:
    raise ValueError(f"images_per_shard {images_per_shard} must be at least 1.")
  directory = pathlib.Path(directory)
  index = open_index(index_directory)
  steps = _steps(index)
  rows, refusals = _planned(index, steps, rule, allow_upscaling)
  if not len(rows):
    reasons = count_reasons(refusals).get("image", {"is there": 0})
    raise ValueError(
      f"No image of {index_directory} can be used: "
      f"{', '.join(f'{count} {reason}' for reason, count in reasons.items())}."
    )
  arguments = {
    "source": index.source,
    "steps": steps,
    "resolution": resolution,
    "crop_rule": rule.identity,
    "allow_upscaling": allow_upscaling,
    "images_per_shard": images_per_shard,
    "rows": hashlib.sha256(rows.tobytes()).hexdigest(),
  }
  _store_plan(directory, arguments, rows, refusals, images_per_shard)
  pictures = open_pictures(directory)
  missing = pictures.missing()
  if missing:
    write = functools.partial(
      write_shard, index_directory, str(directory), rule, images_per_shard
    )
    ingest.run_parts(write, missing, what="Pictures", beam_options=beam_options)
  return pictures


def _steps(index: Index) -> list[str]:
  """The steps of curation that there are, of those that count here."""
  return ["scan", *(s for s in ("captions", "scores", "kept") if index.has(s))]


def _planned(
  index: Index, steps: Sequence[str], rule: CropRule, allow_upscaling: bool
) -> tuple[Int32[np.ndarray, "n 2"], list[Refusal]]:
  """Part and row of each image that becomes a picture, and the others' reasons."""
  rows, refusals = [], []
  for part in range(index.num_parts):
    table = index.read(part, *steps, columns=_PLANNED_BY)
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    kept = columns.get("kept", [True] * table.num_rows)
    for row in range(table.num_rows):
      about = {name: values[row] for name, values in columns.items()}
      refusal = _refusal({**about, "kept": kept[row]}, rule, allow_upscaling)
      if refusal is None:
        rows.append((part, row))
      else:
        refusals.append(refusal)
  return np.array(rows, np.int32).reshape(-1, 2), refusals


def _refusal(
  about: dict[str, Any], rule: CropRule, allow_upscaling: bool
) -> Refusal | None:
  """Why an image of the index becomes no picture, as far as the index can tell."""
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
  rows: np.ndarray,
  refusals: Sequence[Refusal],
  images_per_shard: int,
) -> None:
  """Writes the plan, or compares it with the one that is there."""
  path = directory / _PLAN
  arguments = json.loads(json.dumps(arguments))  # as it will be read
  if path.exists():
    lines = metadata.disagreements(files.read_json(path).get("arguments"), arguments)
    if lines:
      raise FileExistsError(
        f"{directory} was begun with other arguments, or the index has changed (then → "
        f"now): {listed(lines, joint='; ')}. Give the same ones to go on, or choose "
        "another --pictures."
      )
    return
  directory.mkdir(parents=True, exist_ok=True)
  for name in disk.whole_files(directory):
    if name not in (_ROWS, _REFUSED):  # left behind by a run that died
      raise FileExistsError(
        f"{directory} holds {name}, which is no part of a plan. Choose a new or an "
        "empty directory with --pictures."
      )

  def save_rows(partial: pathlib.Path) -> None:
    with open(partial, "wb") as file:
      np.save(file, rows)

  lines = [json.dumps(dataclasses.asdict(refusal)) + "\n" for refusal in refusals]
  disk.write_whole(directory / _ROWS, save_rows)
  disk.write_whole(
    directory / _REFUSED, lambda partial: partial.write_text("".join(lines))
  )
  plan = {
    "format": _FORMAT,
    "arguments": arguments,
    "num_shards": -(-len(rows) // images_per_shard),
    "num_planned": len(rows),
    "refused": count_reasons(refusals).get("image", {}),
  }
  files.write_json(path, plan)


def write_shard(
  index_directory: str,
  directory: str,
  rule: CropRule,
  images_per_shard: int,
  number: int,
) -> None:
  """Writes one planned shard of pictures, whole or not at all.

  Raises:
    FileNotFoundError: not one of its images is where it was.
    OSError: an image's file is there and cannot be read, or the shard cannot be
      written.
  """
  index, pictures = open_index(index_directory), open_pictures(directory)
  rows = np.load(pictures.directory / _ROWS, mmap_mode="r")
  rows = rows[number * images_per_shard : (number + 1) * images_per_shard]
  about: dict[str, list[Any]] = {"ids": [], "sizes": []}
  refusals: list[Refusal] = []

  def write(partial: pathlib.Path) -> None:
    # PNG does not compress any further.
    writer = array_record_module.ArrayRecordWriter(
      str(partial), "group_size:1,uncompressed"
    )
    try:
      for row in _rows(index, _steps(index), rows):
        made = _picture(index.source, row, rule)
        if isinstance(made, Refusal):
          refusals.append(made)
          continue
        picture, size = made
        writer.write(_encoded(picture))
        about["ids"].append(picture.id)
        about["sizes"].append(size)
    finally:
      writer.close()
    if len(refusals) == len(rows) and all(r.reason == "is gone" for r in refusals):
      raise FileNotFoundError(
        f"None of the {len(rows)} images of shard {number} is there any more, the "
        f"first is {refusals[0].id}: is {index.source} where it was when the index was "
        "made?"
      )

  try:
    disk.write_whole(pictures._shard(number), write)
  except RuntimeError as error:  # ArrayRecord's
    raise OSError(
      f"Cannot write {pictures._shard(number)}: {error}. "
      f"{disk.way_out(pictures.directory, '--pictures')}, and run the command again."
    ) from error
  refused = [dataclasses.asdict(refusal) for refusal in refusals]
  files.write_json(pictures._report(number), {**about, "refused": refused})


def _rows(index: Index, steps: Sequence[str], rows: np.ndarray) -> Iterator[dict]:
  """The index's rows, in order, each part read once."""
  for part in np.unique(rows[:, 0]).tolist():
    table = index.read(part, *steps).take(rows[rows[:, 0] == part, 1])
    yield from table.to_pylist()


def _picture(
  source: str, row: dict[str, Any], rule: CropRule
) -> tuple[Picture, tuple[int, int]] | Refusal:
  """A row's image as a picture with its size, or why not."""
  try:
    image = open_image(sources.read_bytes(source, row["location"]))
  except FileNotFoundError as error:
    return Refusal(id=row["id"], reason="is gone", detail=str(error))
  except ValueError as error:
    return Refusal(id=row["id"], reason="cannot be decoded", detail=str(error))
  if (image.height, image.width) != (row["height"], row["width"]):
    detail = f"{row['height']}x{row['width']} → {image.height}x{image.width}"
    return Refusal(id=row["id"], reason="has changed since the scan", detail=detail)
  crop = rule.plan(image.height, image.width)
  png = io.BytesIO()
  rule.apply(image).save(png, "png", compress_level=1)
  score = row.get("aesthetic")
  picture = Picture(
    id=row["id"],
    png=png.getvalue(),
    original_size=np.array([image.height, image.width], np.int32),
    crop=crop.box,
    aesthetic_score=float("nan") if score is None else score,
    captions=tuple((caption["text"], caption["kind"]) for caption in row["captions"]),
  )
  return picture, (crop.bucket.height, crop.bucket.width)


def _encoded(picture: Picture) -> bytes:
  texts, kinds = zip(*picture.captions, strict=True)
  return wire.encode(
    {
      "id": [picture.id.encode()],
      "png": [picture.png],
      "captions": [text.encode() for text in texts],
      "caption_kinds": [kind.encode() for kind in kinds],
    },
    {"original_size": picture.original_size.tolist()},
    {"crop": picture.crop.tolist(), "aesthetic_score": [picture.aesthetic_score]},
  )


def _decoded(data: bytes) -> Picture:
  features = wire.Features(data)
  [identity] = features.texts("id")
  [score] = features.floats("aesthetic_score").tolist()
  captions = zip(
    features.texts("captions"), features.texts("caption_kinds"), strict=True
  )
  return Picture(
    id=identity,
    png=features.bytes("png"),
    original_size=np.array(features.integers("original_size"), np.int32),
    crop=features.floats("crop"),
    aesthetic_score=score,
    captions=tuple(captions),
  )
