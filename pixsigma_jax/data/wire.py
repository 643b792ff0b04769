"""`tf.train.Example` as bytes: written by protobuf, read in place.

Protobuf's own reader copies a feature twice before NumPy sees it. For a record of 1K
features that costs more than the disk does, so reading walks the few tags itself and
hands out views of the bytes.

Source: tensorflow/core/example/{example,feature}.proto, and the encoding of protocol
buffers (protobuf.dev/programming-guides/encoding).
"""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Float16, Float32
from tensorflow_datasets.proto import tf_example_pb2

# A value of a bytes feature, where it lies: start and end.
Span: TypeAlias = tuple[int, int]

_BYTES, _FLOATS, _INTEGERS = 0x0A, 0x12, 0x1A  # tags of Feature's three kinds
_FIRST, _SECOND = 0x0A, 0x12  # tags of a message's first and second field
# The class is built at import, out of a description that type checkers do not read.
_Example = tf_example_pb2.Example  # pyright: ignore[reportAttributeAccessIssue]


def encode(
  texts: Mapping[str, Sequence[bytes]],
  integers: Mapping[str, Sequence[int]],
  floats: Mapping[str, Sequence[float]],
) -> bytes:
  """A serialized `tf.train.Example` of these features, the same bytes every time."""
  example = _Example()
  features = example.features.feature
  for name, values in texts.items():
    features[name].bytes_list.value.extend(values)
  for name, values in integers.items():
    features[name].int64_list.value.extend(values)
  for name, values in floats.items():
    features[name].float_list.value.extend(values)
  # Protobuf orders a map by the process's own hash seed unless told otherwise.
  return example.SerializeToString(deterministic=True)


class Features:
  """The features of one serialized `tf.train.Example`, read from its bytes.

  Raises:
    ValueError: the bytes are no such example.
  """

  def __init__(self, data: bytes):
    self._data = data
    self._lists: dict[str, tuple[int, int, int]] = {}  # kind, start, end
    try:
      start, end = self._field(0, len(data), _FIRST)
      while start < end:
        entry, start = self._field(start, end, _FIRST)
        name, value = self._field(entry, start, _FIRST)
        feature, last = self._field(value, start, _SECOND)
        if feature < last:
          kind = data[feature]
          self._lists[data[name:value].decode()] = (
            kind,
            *self._field(feature, last, kind),
          )
        else:  # a list of nothing has no kind
          self._lists[data[name:value].decode()] = _BYTES, feature, feature
    except (IndexError, UnicodeDecodeError) as error:
      raise ValueError(f"not a tf.train.Example: {error}") from error

  def texts(self, name: str) -> tuple[str, ...]:
    """The values of a bytes feature, decoded as UTF-8."""
    return tuple([self._data[a:b].decode() for a, b in self._spans(name)])

  def bytes(self, name: str) -> bytes:
    """The one value of a bytes feature."""
    [(start, end)] = self._spans(name)
    return self._data[start:end]

  def array(self, name: str, shape: Sequence[int]) -> Float16[np.ndarray, "..."]:
    """The one value of a bytes feature as float16: a view, which cannot be written."""
    [(start, end)] = self._spans(name)
    count = (end - start) // 2
    return np.frombuffer(self._data, np.float16, count, start).reshape(shape)

  def integers(self, name: str) -> list[int]:
    """The values of an integer feature; negative ones do not occur in records."""
    start, end = self._list(name, _INTEGERS)
    values = []
    while start < end:
      start, stop = self._field(start, end, _FIRST)  # packed
      while start < stop:
        value, start = self._varint(start)
        values.append(value)
    return values

  def floats(self, name: str) -> Float32[np.ndarray, " n"]:
    """The values of a float feature."""
    start, end = self._list(name, _FLOATS)
    if start == end:
      return np.zeros(0, np.float32)
    start, end = self._field(start, end, _FIRST)  # packed
    return np.frombuffer(self._data, np.float32, (end - start) // 4, start)

  def _spans(self, name: str) -> list[Span]:
    start, end = self._list(name, _BYTES)
    spans = []
    while start < end:
      first, start = self._field(start, end, _FIRST)
      spans.append((first, start))
    return spans

  def _list(self, name: str, kind: int) -> Span:
    if name not in self._lists:
      raise ValueError(f"it has no feature {name!r}")
    found, start, end = self._lists[name]
    if found != kind and start < end:
      raise ValueError(f"its feature {name!r} is of another type")
    return start, end

  def _field(self, start: int, end: int, tag: int) -> Span:
    """Span of the contents of a length-delimited field."""
    data = self._data
    if data[start] != tag:
      raise ValueError(f"not a tf.train.Example: tag {data[start]} at {start}")
    length, start = data[start + 1], start + 2
    if length >= 0x80:  # most are shorter
      length, start = self._varint(start - 1)
    if start + length > end:
      raise ValueError(f"not a tf.train.Example: {length} bytes at {start} of {end}")
    return start, start + length

  def _varint(self, start: int) -> tuple[int, int]:
    data = self._data
    value = shift = 0
    while True:
      byte = data[start]
      start += 1
      value |= (byte & 0x7F) << shift
      if byte < 0x80:
        return value, start
      shift += 7
      if shift > 63:
        raise ValueError("not a tf.train.Example: an integer has no end")
