"""Color profiles (ICC), written by hand: what cameras and presses embed."""

import struct

import numpy as np

# x and y of red, green, blue and white, and the exponent of the curve; by the
# standards: SMPTE EG 432 with sRGB's curve, Adobe RGB (1998) 4.3, ISO 22028-2.
D65, D50 = (0.3127, 0.3290), (0.3457, 0.3585)
DISPLAY_P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), D65, "sRGB")
ADOBE_RGB = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06), D65, 563 / 256)
PROPHOTO = ((0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001), D50, 1.8)
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), D65, "sRGB")
_BRADFORD = np.array(
  [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)


def _xyz(xy):
  x, y = xy
  return np.array([x / y, 1, (1 - x - y) / y])


def matrix(space):
  """From a space's linear red, green and blue to XYZ under D50 `[3 3]`."""
  red, green, blue, white, _ = space
  columns = np.stack([_xyz(red), _xyz(green), _xyz(blue)], axis=1)
  columns = columns * np.linalg.solve(columns, _xyz(white))
  scale = (_BRADFORD @ _xyz(D50)) / (_BRADFORD @ _xyz(white))
  return np.linalg.inv(_BRADFORD) @ np.diag(scale) @ _BRADFORD @ columns


def linear(space, levels):
  """Light of levels in [0, 1]."""
  curve = space[-1]
  if curve != "sRGB":
    return levels**curve
  return np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)


def as_srgb(space, levels):
  """By the formulas: levels `[… 3]` of a space as sRGB's, both in [0, 255]."""
  light = linear(space, levels / 255) @ matrix(space).T
  light = np.clip(light @ np.linalg.inv(matrix(SRGB)).T, 0, 1)
  low, high = 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055
  return 255 * np.where(light <= 0.0031308, low, high)


def _fixed(*numbers):
  return struct.pack(f">{len(numbers)}i", *(round(65536 * n) for n in numbers))


def _curve(curve):
  if curve == "sRGB":
    table = linear(SRGB, np.arange(1024) / 1023)
    values = np.round(65535 * table).astype(">u2")
    return b"curv" + struct.pack(">II", 0, len(values)) + values.tobytes()
  return b"curv" + struct.pack(">IIH", 0, 1, round(256 * curve))


def _profile(space, kind, connection, tags):
  described = b"desc" + struct.pack(">II", 0, 5) + b"made\0" + bytes(78)
  white = b"XYZ " + bytes(4) + _fixed(0.9642, 1, 0.8249)
  tags = {b"desc": described, b"wtpt": white, b"cprt": b"text\0\0\0\0none\0", **tags}
  directory, body = struct.pack(">I", len(tags)), b""
  start = 128 + 4 + 12 * len(tags)
  for name, data in tags.items():
    directory += name + struct.pack(">II", start + len(body), len(data))
    body += data + bytes(-len(data) % 4)
  header = struct.pack(">I4sI", start + len(body), b"none", 0x02400000)
  header += kind + space + connection + bytes(12) + b"acsp" + bytes(28)
  header += _fixed(0.9642, 1, 0.8249)
  return header + bytes(128 - len(header)) + directory + body


def rgb_profile(space):
  """Three curves and a matrix."""
  columns, tags = matrix(space), {}
  for i, name in enumerate(b"rgb"):
    tags[bytes([name]) + b"XYZ"] = b"XYZ " + bytes(4) + _fixed(*columns[:, i])
    tags[bytes([name]) + b"TRC"] = _curve(space[-1])
  return _profile(b"RGB ", b"mntr", b"XYZ ", tags)


def gray_profile(exponent):
  """One curve."""
  return _profile(b"GRAY", b"mntr", b"XYZ ", {b"kTRC": _curve(exponent)})


def cmyk_profile(ink=0.5):
  """A press that prints grays: Lab of L = 100 less `ink` of 100 for each full ink."""
  grid = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), axis=-1).reshape(-1, 4)
  light = np.clip(255 * (1 - ink * grid.sum(axis=1)), 0, 255)
  table = np.stack([light, np.full(16, 128), np.full(16, 128)], axis=1)
  ramp = bytes(range(256))
  lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
  lut += ramp * 4 + np.round(table).astype(np.uint8).tobytes() + ramp * 3
  return _profile(b"CMYK", b"prtr", b"Lab ", {b"A2B0": lut, b"A2B1": lut})
