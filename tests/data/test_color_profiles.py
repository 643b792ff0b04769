"""What an image looks like is what is read, whatever space its numbers are in."""

import io
import zlib

import numpy as np
import pytest
import skimage.data
from PIL import Image

from pixsigma_jax.data.image_bytes import decode, open_image
from tests.data import icc

SPACES = {"P3": icc.DISPLAY_P3, "Adobe": icc.ADOBE_RGB, "ProPhoto": icc.PROPHOTO}
PHOTO = Image.fromarray(skimage.data.coffee()).resize((150, 100))


def encoded(image, format="PNG", **options):
  file = io.BytesIO()
  image.save(file, format, **options)
  return file.getvalue()


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_colors_are_those_of_the_formulas(name, format):
  profile = icc.rgb_profile(SPACES[name])
  lossless = {"WEBP": {"lossless": True}}.get(format, {})
  data = encoded(PHOTO, format, icc_profile=profile, **lossless)
  found = decode(data)
  stored = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), float)
  expected = icc.as_srgb(SPACES[name], stored)
  # A level for rounding, one for the curves' tables.
  assert np.abs(np.asarray(found.image, float) - expected).max() <= 2
  assert np.abs(stored - expected).mean() > 2  # there is something to convert
  assert found.profile == "converted"
  assert found.image.info == {}  # what is saved of it does not claim the old space


def test_an_image_of_srgb_stays_as_it_is():
  data = encoded(PHOTO, icc_profile=icc.rgb_profile(icc.SRGB))
  assert decode(data).profile == "sRGB"
  np.testing.assert_array_equal(open_image(data), PHOTO)
  assert decode(encoded(PHOTO)).profile is None
  np.testing.assert_array_equal(open_image(encoded(PHOTO)), PHOTO)


@pytest.mark.parametrize(
  "profile",
  [
    b"no profile",
    icc.rgb_profile(icc.DISPLAY_P3)[:200],
    icc.gray_profile(1.8),
    icc.cmyk_profile(),
  ],
  ids=["none", "cut", "of grays", "of inks"],
)
def test_a_profile_that_says_nothing_of_the_pixels_is_ignored_and_counted(profile):
  data = encoded(PHOTO, icc_profile=profile)
  assert decode(data).profile == "ignored"
  np.testing.assert_array_equal(open_image(data), PHOTO)


def test_a_png_whose_profile_does_not_inflate_is_ignored_and_counted():
  data = encoded(PHOTO, icc_profile=icc.rgb_profile(icc.DISPLAY_P3))
  start = data.index(b"iCCP") + 4
  length = int.from_bytes(data[start - 8 : start - 4])
  name_end = data.index(b"\0", start) + 2
  broken = bytearray(data)
  broken[name_end : start + length] = bytes(start + length - name_end)
  crc = zlib.crc32(bytes(broken[start - 4 : start + length]))
  broken[start + length : start + length + 4] = crc.to_bytes(4)
  assert decode(bytes(broken)).profile == "ignored"
  np.testing.assert_array_equal(open_image(bytes(broken)), PHOTO)


def test_grays_have_profiles_too():
  ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None].repeat(4, 0))
  for exponent in (1.0, 1.8):
    data = encoded(ramp, icc_profile=icc.gray_profile(exponent))
    shown = np.asarray(open_image(data), float)
    space = (*icc.SRGB[:-1], exponent)
    expected = icc.as_srgb(space, np.arange(256.0)[None, :, None].repeat(3, -1))
    assert np.abs(shown - expected).max() <= 1
    assert decode(data).profile == "converted"


def test_inks_are_converted_by_the_press_and_keep_white_and_black():
  inks = np.zeros((8, 8, 4), np.uint8)
  inks[:, 2:4, 0], inks[:, 4:6] = 128, 255
  image = Image.fromarray(inks, "CMYK")
  data = encoded(image, "TIFF", icc_profile=icc.cmyk_profile())
  shown = np.asarray(open_image(data), int)
  assert decode(data).profile == "converted"
  assert shown[0, 0].tolist() == [255, 255, 255]
  assert shown[0, 5].max() <= 1
  # L = 75 is a gray of 185; by itself Pillow makes a light cyan of it.
  assert abs(shown[0, 3] - 185).max() <= 3


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "key", "16 bits"])
def test_other_pixels_are_converted_by_their_profile(mode):
  profile = icc.rgb_profile(icc.ADOBE_RGB)
  color, other = (200, 60, 40), (0, 255, 0)
  expected = icc.as_srgb(icc.ADOBE_RGB, np.array(color, float))
  options = {"icc_profile": profile}
  image = Image.new("RGB", (4, 4), color)
  image.paste(other, (0, 0, 2, 4))
  clear = None
  if mode == "P":
    image = image.quantize(2)
  elif mode == "RGBA":
    image.putalpha(255)
    image.paste((*other, 0), (0, 0, 2, 4))
    clear = (0, 0)
  elif mode == "key":  # green is transparent
    options["transparency"], clear = other, (0, 0)
  elif mode == "LA":
    options = {"icc_profile": icc.gray_profile(1.0)}
    image = Image.merge("LA", [Image.new("L", (4, 4), 100), Image.new("L", (4, 4), 0)])
    image.paste((100, 255), (2, 0, 4, 4))
    expected, clear = icc.as_srgb((*icc.SRGB[:-1], 1.0), np.full(3, 100.0)), (0, 0)
  else:
    options = {"icc_profile": icc.gray_profile(1.0)}
    image = Image.fromarray(np.full((4, 4), 100 * 257, np.uint16))
    expected = icc.as_srgb((*icc.SRGB[:-1], 1.0), np.full(3, 100.0))
  found = decode(encoded(image, **options))
  assert found.profile == "converted"
  shown = np.asarray(found.image, float)
  assert np.abs(shown[0, 3] - expected).max() <= 2
  if clear is not None:
    assert shown[clear].tolist() == [255, 255, 255]


def test_a_small_jpeg_is_converted_too():
  large = PHOTO.resize((600, 400))
  data = encoded(large, "JPEG", icc_profile=icc.rgb_profile(icc.PROPHOTO))
  small = decode(data, at_least=100)
  assert (small.profile, small.image.size) == ("converted", (150, 100))
  whole = open_image(data).resize(small.image.size, Image.Resampling.BOX)
  difference = np.asarray(whole, int) - np.asarray(small.image, int)
  assert np.abs(difference).mean() < 2
