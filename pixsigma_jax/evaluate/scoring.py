"""Scores of images by a scorer, part by part, in Parquet."""

import concurrent.futures
import io
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import fsspec.core
import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging
from jaxtyping import UInt8
from PIL import Image

from pixsigma_jax import command, disk
from pixsigma_jax.data import parquet_images
from pixsigma_jax.evaluate.folder import EvaluationFolder, ModelFolder
from pixsigma_jax.evaluate.items import Item
from pixsigma_jax.evaluate.scorers import MadeScores, Scorer

ITEMS_PER_PART = 64  # work that a kill can undo
_READERS = 4  # threads that decode images ahead of the scorer
# Path of an image inside of a Parquet file: row 12 of column `image`.
_IN_TABLE = re.compile(r"(.+\.parquet)#(\d+)")
_PIXELS = 2**26  # decoded together: 200 MB, and as much ahead

# An image to score: its item, its number there, its file.
Row = tuple[Item, int, pathlib.Path]


def score(
  folder: EvaluationFolder,
  model: ModelFolder | None,
  name: str,
  scorer: Scorer | MadeScores,
) -> None:
  """Scores a model's images, or the references; parts that are there are skipped.

  Process i of n writes parts i, i + n, and so on. Parts of another scorer (another
  identity) or of other images are replaced, and the log says so.

  Args:
    model: None for the references.
    name: of the scorer.

  Raises:
    ValueError: images are missing, or one cannot be read; or scores that were made
      elsewhere are not those of the images.
  """
  directory = folder.score_path(model, name)
  metadata = _metadata(folder, model, scorer)
  parts = _parts(folder, model)
  whose = "references" if model is None else model.name
  if model is not None:
    check_whole(model)
  todo = []
  for part in range(jax.process_index(), len(parts), jax.process_count()):
    path = part_path(directory, part)
    have = stored_metadata(path)
    if have == metadata:
      continue
    if have is not None:
      logging.warning(
        "%s is of other images or of another %s: it is written anew.", path, name
      )
    todo.append(part)
  if not todo:
    logging.info("%s: all images of %s are scored.", name, whose)
    return
  directory.mkdir(parents=True, exist_ok=True)
  disk.remove_abandoned(directory)
  schema = schema_of(scorer, metadata)
  if isinstance(scorer, MadeScores):
    made = _made(parts, whose, scorer)
    tables = (_table(parts[part], schema, made[part]) for part in todo)
  else:
    tables = (score_rows(parts[part], scorer, schema) for part in todo)
  done = 0
  try:
    progress = command.progress(todo, len(todo), f"{name} of {whose}, parts")
    for part, table in zip(progress, tables, strict=True):
      disk.write_whole(
        part_path(directory, part), lambda partial, t=table: pq.write_table(t, partial)
      )
      done += 1
  except KeyboardInterrupt:
    raise command.Interrupted(
      f"{done} of {len(todo)} parts of {name} of {whose} are written to {directory}. "
      "The same command goes on behind them."
    ) from None


def check_whole(model: ModelFolder) -> None:
  """Refuses a model that lacks images.

  Raises:
    ValueError: it does.
  """
  if missing := model.missing():
    total = len(model.items) * model.images_per_item
    raise ValueError(
      f"{model.name} has {total - len(missing)} of {total} images, and lacks "
      f"{model.image_path(*missing[0])}: run `evaluate sample` to its end."
    )


def read_scores(
  folder: EvaluationFolder, model: ModelFolder | None, name: str
) -> pa.Table | None:
  """A scorer's rows in the items' order; None where parts are missing or stale.

  Raises:
    ValueError: parts are of different scorers.
  """
  directory = folder.score_path(model, name)
  tables = []
  for part in range(len(_parts(folder, model))):
    path = part_path(directory, part)
    have = stored_metadata(path)
    if have is None or have.get(b"of") != _owner(folder, model):
      return None
    tables.append(pq.read_table(path))
  if not tables:
    return None
  identities = {table.schema.metadata[b"identity"] for table in tables}
  if len(identities) > 1:
    raise ValueError(
      f"{directory} has parts of {len(identities)} versions of {name}: run `evaluate "
      "score` again, to its end."
    )
  return pa.concat_tables(tables)


def scorers_of(folder: EvaluationFolder, model: ModelFolder | None) -> list[str]:
  """Names of the scorers that have begun."""
  directory = folder.score_path(model, "any").parent
  return sorted(p.name for p in directory.iterdir()) if directory.is_dir() else []


def part_path(directory: pathlib.Path, part: int) -> pathlib.Path:
  """File of one part of a scorer's rows."""
  return directory / f"{part:05d}.parquet"


def read_image(path: pathlib.Path) -> UInt8[np.ndarray, "H W 3"]:
  """An image's RGB pixels.

  Args:
    path: of a file; or TABLE.parquet#ROW for the column `image` of a table, with bytes
      or the Hugging Face hub's {bytes, path}.

  Raises:
    ValueError: it cannot be read.
  """
  try:
    with Image.open(_opened(path)) as image:
      return np.asarray(image.convert("RGB"))
  except (OSError, SyntaxError) as error:  # Pillow's words for a broken PNG
    raise ValueError(f"{path} cannot be read: {error}. Delete or mend it.") from error


def _opened(path: pathlib.Path) -> pathlib.Path | io.BytesIO:
  found = _IN_TABLE.fullmatch(str(path))
  if found is None:
    return path
  fs, table = fsspec.core.url_to_fs(found[1])
  try:
    value = parquet_images.cell(fs, table, "image", int(found[2]), is_local=True)
  except ValueError as error:
    raise ValueError(f"{path} cannot be read: {error}.") from error
  return io.BytesIO(value["bytes"] if isinstance(value, dict) else value)


def _parts(folder: EvaluationFolder, model: ModelFolder | None) -> list[list[Row]]:
  """The rows of each part."""
  if model is None:
    rows = [
      (item, 0, folder.reference_path(item))
      for item in folder.items
      if item.reference is not None
    ]
    step = ITEMS_PER_PART
  else:
    rows = [(item, j, model.image_path(item, j)) for item, j in model.images()]
    step = ITEMS_PER_PART * folder.images_per_item
  return [rows[start : start + step] for start in range(0, len(rows), step)]


def schema_of(
  scorer: Scorer | MadeScores, metadata: Mapping[bytes, bytes]
) -> pa.Schema:
  """Columns of a scorer's rows: `id`, `image` and its own."""
  own = scorer.schema()
  return pa.schema(
    [pa.field("id", pa.string()), pa.field("image", pa.int32()), *own],
    metadata=dict(metadata),
  )


def score_rows(rows: Sequence[Row], scorer: Scorer, schema: pa.Schema) -> pa.Table:
  """Scores of images, as `schema_of` has them; the next images are read meanwhile.

  Raises:
    ValueError: an image cannot be read.
  """
  columns: dict[str, list[Any]] = {field.name: [] for field in scorer.schema()}
  for chunk, images in _read_ahead(rows, scorer.batch_size):
    scored = scorer(images, [item for item, _, _ in chunk])
    for name, values in scored.items():
      columns[name].append(_array(values, schema.field(name).type))
  return _table(rows, schema, {k: pa.chunked_array(v) for k, v in columns.items()})


def _made(
  parts: Sequence[Sequence[Row]], whose: str, scores: MadeScores
) -> list[dict[str, Any]]:
  """The columns of each part, of scores that were made elsewhere."""
  keys = [(item.id, image) for rows in parts for item, image, _ in rows]
  columns, made, start = scores.of_model(whose, keys), [], 0
  for rows in parts:
    end = start + len(rows)
    made.append(
      {
        field.name: _array(columns[field.name][start:end], field.type)
        for field in scores.schema()
      }
    )
    start = end
  return made


def _table(
  rows: Sequence[Row], schema: pa.Schema, columns: Mapping[str, Any]
) -> pa.Table:
  arrays = {
    "id": pa.array([item.id for item, _, _ in rows], pa.string()),
    "image": pa.array([image for _, image, _ in rows], pa.int32()),
    **columns,
  }
  return pa.table([arrays[name] for name in schema.names], schema=schema)


def _array(values: Any, kind: pa.DataType) -> pa.Array:
  if pa.types.is_fixed_size_list(kind):
    flat = pa.array(np.asarray(values, np.float32).reshape(-1), pa.float32())
    return pa.FixedSizeListArray.from_arrays(flat, kind.list_size)
  return pa.array(values, kind)


def chunk_size(rows: Sequence[Row], most: int) -> int:
  """Number of images decoded together: fewer of large ones, to bound the memory."""
  areas = [item.height * item.width for item, *_ in rows if item.height and item.width]
  return max(1, min(most, _PIXELS // max(areas, default=1)))


def _read_ahead(
  rows: Sequence[Row], size: int
) -> Iterator[tuple[Sequence[Row], list[UInt8[np.ndarray, "_ _ 3"]]]]:
  """Chunks of rows with their images, the next chunk being read meanwhile."""
  size = chunk_size(rows, size)
  chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
  with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:

    def read(chunk: Sequence[Row]) -> list[Any]:
      return [pool.submit(read_image, path) for _, _, path in chunk]

    ahead = read(chunks[0]) if chunks else []
    for i, chunk in enumerate(chunks):
      now, ahead = ahead, read(chunks[i + 1]) if i + 1 < len(chunks) else []
      yield chunk, [future.result() for future in now]


def _owner(folder: EvaluationFolder, model: ModelFolder | None) -> bytes:
  """What scores say of the images that they are of."""
  of = {"items": folder.fingerprint}
  of = of if model is None else of | {"model": model.fingerprint}
  return json.dumps(of, sort_keys=True).encode()


def _metadata(
  folder: EvaluationFolder, model: ModelFolder | None, scorer: Scorer | MadeScores
) -> dict[bytes, bytes]:
  return {
    b"identity": json.dumps(scorer.identity(), sort_keys=True).encode(),
    b"of": _owner(folder, model),
  }


def stored_metadata(path: pathlib.Path) -> Mapping[bytes, bytes] | None:
  """Metadata of a part; None where there is none, or it is damaged."""
  if not path.is_file():
    return None
  try:
    metadata = pq.read_schema(path).metadata or {}
  except (pa.ArrowException, OSError):
    logging.warning("%s is damaged.", path)
    return {}
  return {key: metadata.get(key, b"null") for key in (b"identity", b"of")}
