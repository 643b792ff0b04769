"""The headers of a tar, read one by one and checked."""

import re
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

_MOST_NAME_BYTES = 2**16  # of one long name in a tar
_BLOCK = 512  # of a tar
# How files begin that are compressed, or no tar at all.
_OTHERS = {
  b"\x1f\x8b": "gzip",
  b"BZh": "bzip2",
  b"\xfd7zXZ\0": "xz",
  b"\x28\xb5\x2f\xfd": "zstd",
  b"PK\x03\x04": "zip",
}
FOLDER = tarfile.DIRTYPE
PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_WITHOUT_CONTENT = (
  *(tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE),
  *(tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE),
)


class Member(NamedTuple):
  """A file, folder or link of a tar; `offset` and `size` are its content's."""

  name: str
  offset: int
  size: int
  type: bytes


def members(file: Any, size: int) -> Iterator[Member]:
  """The headers of a tar, one after the other.

  `tarfile.TarFile` takes damage in the middle for the end, keeps all headers in memory,
  and in Pythons before 3.11.14 and 3.12.12 goes in circles on a negative size.

  Raises:
    ValueError: the tar is damaged from here on.
  """
  position, long_name, long_size = 0, None, None
  while True:
    file.seek(position)
    block = file.read(_BLOCK)
    if not block.strip(b"\0") and len(block) == _BLOCK:
      return
    try:
      header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
      kind = next((k for start, k in _OTHERS.items() if block.startswith(start)), None)
      if not position and kind:
        raise ValueError(f"it is a {kind}, not a tar: unpack it first") from None
      what = "damaged" if len(block) == _BLOCK else "truncated"
      raise ValueError(f"the tar is {what} at byte {position}") from None
    offset = position + _BLOCK
    if header.size < 0:
      raise ValueError(f"the tar is damaged at byte {position}")
    is_extension = header.type in (b"L", b"K", b"x", b"X", b"g")
    if is_extension and header.size > _MOST_NAME_BYTES:
      raise ValueError(f"the tar is damaged at byte {position}: a name too long")
    length = header.size
    if not is_extension and long_size is not None:
      length = long_size
    if header.type in _WITHOUT_CONTENT:
      length = 0  # whatever it says
    if offset + length > size:
      raise ValueError(f"the tar is truncated at byte {position}")
    if header.type == b"L":
      text = file.read(length).partition(b"\0")[0]
      long_name = text.decode("utf-8", "surrogateescape")
    elif header.type in (b"x", b"X"):
      fields = _pax_fields(file.read(length))
      long_name = fields.get("path", long_name)
      long_size = _pax_size(fields, position)
    elif not is_extension:
      yield Member(long_name or header.name, offset, length, header.type)
      long_name, long_size = None, None
    position = offset + -(-length // _BLOCK) * _BLOCK


def _pax_fields(data: bytes) -> dict[str, str]:
  """Records `LENGTH KEY=VALUE\\n`; what is none ends them."""
  fields, position = {}, 0
  while match := re.compile(rb"(\d{1,9}) ([^=\n]+)=").match(data, position):
    end = position + int(match[1])
    if end <= match.end() or end > len(data):
      break
    value = data[match.end() : end - 1]
    fields[match[2].decode(errors="replace")] = value.decode("utf-8", "surrogateescape")
    position = end
  return fields


def _pax_size(fields: Mapping[str, str], position: int) -> int | None:
  if "size" not in fields:
    return None
  if not re.fullmatch(r"[0-9]{1,18}", fields["size"]):
    raise ValueError(f"the tar is damaged at byte {position}")
  return int(fields["size"])
