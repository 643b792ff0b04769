"""Images inside of Parquet files, as the Hugging Face hub has them, row by row."""

import threading
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pixsigma_jax import errors

_BUFFER_BYTES = 2**20  # read at once of a column, whose row group may have gigabytes
_of_thread = threading.local()


def holds_images(type: pa.DataType) -> bool:
  """Whether a column may hold images themselves: bytes, or the hub's {bytes, path}."""
  if pa.types.is_struct(type):
    return "bytes" in [type.field(number).name for number in range(type.num_fields)]
  if pa.types.is_dictionary(type):  # each different value once, as pandas may have it
    type = type.value_type
  return (
    pa.types.is_binary(type)
    or pa.types.is_large_binary(type)
    or pa.types.is_binary_view(type)
  )


def cell(fs: Any, path: str, column: str, row: int, *, is_local: bool) -> Any:
  """One row's value of one column.

  Rows that are asked for in order are read in one go; each thread is at a place of its
  own, in one file.

  Raises:
    ValueError: there is no such column or row, or the file is damaged.
  """
  key = (path, column, fs.ukey(path))
  try:
    column_at = getattr(_of_thread, "column", None)
    if column_at is None or column_at.key != key:
      file = pq.ParquetFile(
        path if is_local else fs.open(path, "rb"),
        buffer_size=_BUFFER_BYTES,
        pre_buffer=False,
      )
      column_at = _of_thread.column = _Column(file, key, column)
    return column_at.value(row)
  except (pa.ArrowException, OSError) as error:
    _of_thread.column = None
    if not errors.of_content(error):
      raise
    raise ValueError(f"damaged Parquet: {type(error).__name__}") from error


class _Column:
  """A column of a Parquet file, and how far it was read."""

  def __init__(self, file: pq.ParquetFile, key: Any, column: str):
    if column not in file.schema_arrow.names:
      raise ValueError(f"no column {column}")
    self.key = key
    self._file, self._column = file, column
    self._next, self._end = 0, 0  # rows: the one to come, and where its group ends
    self._values: Iterator[Any] = iter(())

  def value(self, row: int) -> Any:
    if not self._next <= row < self._end:
      self._open_group_of(row)
    for value in self._values:
      self._next += 1
      if self._next > row:
        return value.as_py()
    raise ValueError(f"no row {row}")

  def _open_group_of(self, row: int) -> None:
    metadata, start = self._file.metadata, 0
    for group in range(metadata.num_row_groups):
      end = start + metadata.row_group(group).num_rows
      if start <= row < end:
        self._next, self._end = start, end
        self._values = (
          value
          for batch in self._file.iter_batches(
            1, row_groups=[group], columns=[self._column], use_threads=False
          )
          for value in batch.column(0)
        )
        return
      start = end
    raise ValueError(f"no row {row}")
