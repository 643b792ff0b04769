"""Images out of bytes: upright, RGB, or refused with a reason."""

import io
import struct
import sys
import zlib

import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageFile, ImageOps

from pixsigma_jax.data import image_bytes
from pixsigma_jax.data.image_bytes import open_image
from tests.data.test_sources import encoded


def png(width, height, depth, color_type, *chunks):
  def chunk(name, data):
    return (
      struct.pack(">I", len(data))
      + name
      + data
      + struct.pack(">I", zlib.crc32(name + data))
    )

  head = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
  chunks = [(b"IHDR", head), *chunks]
  return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks)


def png_header(width, height):
  return png(width, height, 8, 2, (b"IDAT", b""))


def tiff(samples, *, bits=16, white_is_zero=False):
  """One row of grays, of little-endian bytes."""
  tags = {
    **{256: len(samples) * 8 // bits, 257: 1, 258: bits, 259: 1, 277: 1, 278: 1},
    **{262: 0 if white_is_zero else 1, 273: 200, 279: len(samples)},
  }
  entries = b"".join(struct.pack("<HHII", t, 4, 1, v) for t, v in sorted(tags.items()))
  head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
  return head.ljust(200, b"\0") + samples


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_stands_upright(format, orientation):
  # Four quadrants, so that each of the eight ways to lie is another image.
  levels = np.kron(
    np.array([[0, 80], [160, 240]], np.uint8), np.ones((16, 24), np.uint8)
  )
  upright = Image.fromarray(np.stack([levels] * 3, -1))
  lying = upright
  if orientation in image_bytes._UPRIGHT:  # the inverse: two of them swap
    way = {6: 8, 8: 6}.get(orientation, orientation)
    lying = upright.transpose(image_bytes._UPRIGHT[way])
  exif = Image.Exif()
  exif[0x0112] = orientation
  file = io.BytesIO()
  lossless = {"lossless": True} if format == "WEBP" else {}
  lying.save(file, format, exif=exif, **lossless)
  data = file.getvalue()
  assert image_bytes.image_header(data)[1:] == (32, 48)
  shown = np.asarray(open_image(data)).astype(int)
  assert shown.shape == (32, 48, 3)
  # 3 levels: what JPEG costs flat areas at quality 75, away from the edges
  pillows = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
  np.testing.assert_array_equal(shown, np.asarray(pillows))
  for y, x in [(4, 4), (4, 40), (28, 4), (28, 40)]:
    assert abs(shown[y, x] - levels[y, x]).max() <= 3, (y, x)


def test_a_png_may_say_behind_its_pixels_how_it_lies():
  exif = Image.Exif()
  exif[0x0112] = 6
  data = encoded(exif=exif)
  start = data.index(b"eXIf") - 4
  end = start + 12 + int.from_bytes(data[start : start + 4])
  moved = data[:start] + data[end:-12] + data[start:end] + data[-12:]
  assert image_bytes.image_header(moved)[1:] == (12, 8)
  assert open_image(moved).size == (8, 12)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "AVIF"])
def test_the_size_is_known_without_decoding(format, monkeypatch):
  data = encoded(format=format)

  def decode(_):
    raise AssertionError("decoded")

  for plugin in [ImageFile.ImageFile, *ImageFile.ImageFile.__subclasses__()]:
    monkeypatch.setattr(plugin, "load", decode)
  assert image_bytes.image_header(data) == (format, 8, 12)


def test_what_is_transparent_is_white():
  pixels = np.zeros((2, 2, 4), np.uint8)
  pixels[0, 0] = [255, 0, 0, 255]
  for image in (Image.fromarray(pixels), Image.fromarray(pixels).convert("RGBa")):
    file = io.BytesIO()
    image.convert("RGBA").save(file, "PNG")
    shown = np.asarray(open_image(file.getvalue()))
    assert shown[0, 0].tolist() == [255, 0, 0]
    assert shown[1, 1].tolist() == [255, 255, 255]
  palette = Image.new("P", (2, 2))
  palette.putpalette([1, 2, 3, 4, 5, 6])
  file = io.BytesIO()
  palette.save(file, "GIF", transparency=0)
  assert np.asarray(open_image(file.getvalue()))[0, 0].tolist() == [255, 255, 255]


def test_sixteen_bits_keep_their_range():
  levels = np.array([[0, 32768], [65535, 257]], np.uint16)
  file = io.BytesIO()
  Image.fromarray(levels).save(file, "PNG")
  shown = np.asarray(open_image(file.getvalue()))[..., 0]
  np.testing.assert_array_equal(shown, [[0, 127], [255, 1]])


@pytest.mark.parametrize(
  ("depth", "color_type", "samples", "transparent", "shown"),
  [
    # of white, black, and a gray or color that is transparent
    (1, 0, b"\xa0", (0,), [255, 255, 255, 255]),
    (2, 0, b"\xc4", (1,), [255, 0, 255, 0]),
    (4, 0, b"\xf0\x10", (1,), [255, 0, 255, 0]),
    (8, 0, b"\xff\0\x07\0", (7,), [255, 0, 255, 0]),
    # 300 is 1 of 255, and so is 301, which is not transparent
    (16, 0, struct.pack(">4H", 300, 0, 301, 44 * 257), (300,), [255, 0, 1, 44]),
    (16, 2, struct.pack(">6H", 0x8000, 9, 0, 0, 0, 0), (0x8000, 9, 0), [255, 0]),
  ],
)
def test_what_is_transparent_in_a_png_is_white_at_every_depth(
  depth, color_type, samples, transparent, shown
):
  data = png(
    *(len(shown), 1, depth, color_type),
    (b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)),
    (b"IDAT", zlib.compress(b"\0" + samples)),
    (b"IEND", b""),
  )
  assert np.asarray(open_image(data))[0, :, 1].tolist() == shown


@pytest.mark.parametrize("white_is_zero", [False, True])
@pytest.mark.parametrize(
  ("bits", "samples"),
  [
    (16, struct.pack("<3H", 0, 32896, 65535)),
    (12, b"\x00\x08\x08\xff\xf0\x00"),  # 0, 0x808, 0xfff, and what fills the byte
    (8, bytes([0, 128, 255])),
  ],
)
def test_a_scanners_gray_keeps_its_white_and_its_black(bits, samples, white_is_zero):
  data = tiff(samples, bits=bits, white_is_zero=white_is_zero)
  if bits == 12 and white_is_zero:  # which Pillow does not know
    with pytest.raises(ValueError, match="not an image"):
      open_image(data)
    return
  shown = np.asarray(open_image(data))[0, :3, 0]
  assert shown.tolist() == ([255, 127, 0] if white_is_zero else [0, 128, 255])


MODES = {"RGB": {}, "L": {}, "progressive": {"progressive": True}}


def jpeg(kind):
  image = Image.open(io.BytesIO(encoded(size=(160, 160))))
  image = image.convert("L") if kind == "L" else image
  file = io.BytesIO()
  image.save(file, "JPEG", **MODES[kind])
  return file.getvalue()


@pytest.mark.parametrize("at_least", [None, 32])
@pytest.mark.parametrize("kind", MODES)
def test_a_jpeg_that_ends_early_is_truncated_whatever_stands_behind_it(kind, at_least):
  data = jpeg(kind)
  half = len(data) // 2
  cuts = [
    data[:half] + b"\xff\xd9",  # by a program that closed what it had
    data[: 9 * len(data) // 10] + b"\xff\xd9",
    data[:2] + b"\xff" + data[2:half] + b"\xff\xd9",  # a fill byte before a marker
    data[:half] + bytes(half),  # by a download that had reserved its room
  ]
  for cut in cuts:
    with pytest.raises(ValueError, match="truncated"):
      open_image(cut, at_least=at_least)


@pytest.mark.parametrize("kind", MODES)
def test_a_jpeg_that_is_whole_is_read_with_whatever_else_is_in_its_file(kind):
  data = jpeg(kind)
  whole = np.asarray(open_image(data))
  for more in (
    data[:-2] + b"\0\0\0" + data[-2:],  # libjpeg warns of these, and has it all
    data + b"behind the end",
    data[:2] + b"\xff" + data[2:],
  ):
    np.testing.assert_array_equal(np.asarray(open_image(more)), whole)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_flat_jpeg_is_whole(mode, progressive):
  file = io.BytesIO()
  Image.new(mode, (40, 24)).save(file, "JPEG", progressive=progressive)
  assert open_image(file.getvalue()).size == (40, 24)


def test_a_small_jpeg_is_the_image_made_smaller():
  smooth = np.add.outer(np.arange(256), np.arange(512)) // 3
  file = io.BytesIO()
  Image.fromarray(np.stack([smooth.astype(np.uint8)] * 3, -1)).save(file, "JPEG")
  small = open_image(file.getvalue(), at_least=64)
  assert small.size == (128, 64)
  whole = open_image(file.getvalue()).resize(small.size, Image.Resampling.BOX)
  # 2 levels: both are means of 4x4 pixels, one of them taken in the frequencies
  assert np.abs(np.asarray(small, int) - np.asarray(whole, int)).max() <= 2


@pytest.mark.parametrize(
  ("data", "reason"),
  [
    (b"", "not an image"),
    (b"<html>", "not an image"),
    (encoded()[:-40], "truncated"),
    (encoded(format="JPEG", size=(64, 64))[:-300], "truncated"),
    (png_header(2**30, 2**30), "too many pixels"),
    (png_header(12_000, 12_000), "too many pixels"),
    (png_header(0, 5), "not an image"),
    (png_header(64, 64), "damaged|truncated"),
    (b"\xff\x0a" + b"x" * 50, "JPEG XL, which is not read: save it as JPEG or PNG"),
    (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "damaged: HEIC"),
    (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", "not an image"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
  ],
)
def test_an_image_that_cannot_be_shown_has_a_reason(data, reason):
  with pytest.raises(ValueError, match=reason):
    open_image(data)


def heic(size=(64, 48), **options):
  """A photograph as a phone writes it, with two halves of its own brightness."""
  pixels = np.full((*size[::-1], 3), 60, np.uint8)
  pixels[:, size[0] // 2 :] = 200
  file = io.BytesIO()
  pillow_heif.from_pillow(Image.fromarray(pixels)).save(file, **options)
  return file.getvalue()


def test_a_phones_heic_is_an_image_and_stands_upright():
  exif = Image.Exif()
  exif[0x0112] = 6  # the camera's left is the bottom
  data = heic(exif=exif.tobytes())
  assert image_bytes.image_header(data) == ("HEIF", 64, 48)
  shown = np.asarray(open_image(data)).astype(int)
  assert shown.shape == (64, 48, 3)
  # 3 levels: what HEVC costs flat areas, away from the edge
  assert abs(shown[:24] - 60).max() <= 3
  assert abs(shown[40:] - 200).max() <= 3


def test_a_heic_is_decoded_whole_whatever_its_thumbnail_is_like():
  data = heic((512, 256), thumbnails=[128])
  assert open_image(data, at_least=32).size == (512, 256)


def test_without_its_library_heic_is_named_with_the_way_out(monkeypatch):
  monkeypatch.setitem(sys.modules, "pillow_heif", None)
  with pytest.raises(
    ValueError, match=r"^HEIC, which needs pillow-heif: in the .*\[heif\]"
  ):
    image_bytes.image_header(heic())


def test_a_heic_of_too_many_pixels_is_not_decoded(monkeypatch):
  data = heic()
  monkeypatch.setattr(image_bytes, "MOST_PIXELS", 64 * 48 - 1)
  with pytest.raises(ValueError, match="too many pixels: 48x64"):
    open_image(data)
