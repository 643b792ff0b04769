"""PNG files without what they say of their making, for those who must not know it."""

import struct

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# What a decoder needs to show the image as it is meant; texts, dates and camera data
# are not among it. `sample` writes prompt, settings and the checkpoint's path.
_SHOWN = {
  *(b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS"),
  *(b"cHRM", b"gAMA", b"iCCP", b"sBIT", b"sRGB", b"cICP", b"pHYs"),
}


def without_notes(content: bytes) -> bytes:
  """The same pixels and colors, with no other chunk of the file.

  Raises:
    ValueError: the bytes are no PNG, or end early.
  """
  if not content.startswith(_SIGNATURE):
    raise ValueError("These bytes are no PNG.")
  kept, at = [_SIGNATURE], len(_SIGNATURE)
  kind = b""
  while kind != b"IEND":
    if at + 12 > len(content):
      raise ValueError("The PNG ends early.")
    (length,) = struct.unpack_from(">I", content, at)
    kind = content[at + 4 : at + 8]
    end = at + 12 + length  # length, kind and checksum have four bytes each
    if end > len(content):
      raise ValueError("The PNG ends early.")
    if kind in _SHOWN:
      kept.append(content[at:end])
    at = end
  return b"".join(kept)
