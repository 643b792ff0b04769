"""JPEGs that end early, of which libjpeg makes whole images, part of them made up.

Where data is missing it goes on in the last color and says so in a warning, and Pillow
passes on no warnings.
"""

import tensorstore
from PIL import Image

_START, _SCAN, _END = 0xD8, 0xDA, b"\xff\xd9"
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
_WITHOUT_LENGTH = (0x01, _START, *range(0xD0, 0xD8))
_CORNER = 2  # pixels: what a block of 16 is in an image that is decoded small
_WARNING = "premature end"


def is_whole(data: bytes, image: Image.Image) -> bool:
  """Whether an image that was decoded without an error is all in its file.

  One that could be cut, by the looks of its last corner, is decoded a second time by a
  library that passes on warnings; a progressive one always, as what it lacks may show
  nowhere. CMYK is not seen through, as that library does not read it.

  Args:
    data: the file's bytes.
    image: as Pillow has decoded it, at any scale, not turned.
  """
  position, is_progressive = 0, False
  while (marker := _marker(data, position)) != _SCAN:
    if marker is None:  # not as the standard has it, and Pillow knew what to do
      return True
    is_progressive |= marker in _PROGRESSIVE
    length = 0
    if marker not in _WITHOUT_LENGTH:
      length = int.from_bytes(data[position + 2 : position + 4], "big")
    position += 2 + length
    while data[position : position + 2] == b"\xff\xff":  # fill bytes
      position += 1
  # Without a mark of its end: a download had reserved its room, and stopped.
  if data.find(_END, position) < 0:
    return False
  return not ((is_progressive or _has_flat_corner(image)) and _is_cut(data))


def _marker(data: bytes, position: int) -> int | None:
  found = data[position : position + 2]
  return found[1] if len(found) == 2 and found[0] == 0xFF else None


def _has_flat_corner(image: Image.Image) -> bool:
  width, height = image.size
  corner = image.crop(
    (max(0, width - _CORNER), max(0, height - _CORNER), width, height)
  )
  colors = corner.getcolors()
  return colors is not None and len(colors) == 1


def _is_cut(data: bytes) -> bool:
  context = tensorstore.Context()
  place = {"driver": "memory", "path": "picture"}
  store = tensorstore.KvStore.open({"driver": "memory"}, context=context).result()
  store["picture"] = data
  try:
    tensorstore.open({"driver": "jpeg", "kvstore": place}, context=context).result()
  except ValueError as error:
    return _WARNING in str(error).lower()
  return False
