"""Detections in images, as GenEval's rules judge them: objects, and their colors.

They come from Mask2Former and CLIP, or from a file of JSON lines that another program
wrote, one an image:
  {"id": ID, "image": J, "detections": [
    {"name": …, "box": [left, top, right, bottom], "confidence": …, "color": …}, …]}

Colors are CLIP's zero-shot choice of ten, as `color_classification` of GenEval's
`evaluate_images.py` has it.
"""

import difflib
import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, UInt8
from PIL import Image

from pixsigma_jax import disk
from pixsigma_jax.evaluate.geneval import CLASSES, COLORS, MOST_OF_A_CLASS
from pixsigma_jax.evaluate.items import Item, read_json_lines
from pixsigma_jax.evaluate.options import Option
from pixsigma_jax.evaluate.scorers import ScorerType, clip, mask2former
from pixsigma_jax.evaluate.scorers.mask2former import Found, Mask2Former
from pixsigma_jax.models.clip import Clip
from pixsigma_jax.wording import listed

_TEMPLATES = (
  "a photo of a {color} {name}",
  "a photo of a {color}-colored {name}",
  "a photo of a {color} object",
)
_BACKGROUND = "#999"  # in place of what is not the object

_DETECTION = pa.struct(
  [
    pa.field("name", pa.string(), nullable=False),
    pa.field("box", pa.list_(pa.float64()), nullable=False),
    pa.field("confidence", pa.float64(), nullable=False),
    pa.field("color", pa.string()),
  ]
)
_SCHEMA = pa.schema([pa.field("detections", pa.list_(_DETECTION), nullable=False)])


class ColorClassifier:
  """The color of objects: one of `geneval.COLORS`."""

  def __init__(self, clip: Clip):
    """Takes a CLIP with both towers; GenEval's is OpenAI's ViT-L/14."""
    self._clip = clip
    self._directions = functools.cache(self._text_directions)

  def identity(self) -> dict[str, str]:
    """CLIP's patches and hash."""
    patch = self._clip.config.patch_size
    return {
      "colors": f"CLIP, {patch} x {patch} patches",
      "colors hash": str(self._clip.identity["hash"]),
    }

  def __call__(
    self, image: UInt8[np.ndarray, "h w 3"], found: Sequence[Found]
  ) -> list[str]:
    """The color of each object, seen alone: cut out by its mask, and cropped."""
    if not found:
      return []
    embeddings = self._clip.embed_images([crop(image, each) for each in found])
    colors = []
    for each, embedding in zip(found, embeddings, strict=True):
      colors.append(COLORS[int(np.argmax(self._directions(each.name) @ embedding))])
    return colors

  def _text_directions(self, name: str) -> Float32[np.ndarray, "10 e"]:
    texts = [
      template.format(color=color, name=name)
      for color in COLORS
      for template in _TEMPLATES
    ]
    embeddings = _unit(self._clip.embed_texts(texts))
    means = embeddings.reshape(len(COLORS), len(_TEMPLATES), -1).mean(axis=1)
    return _unit(means)


def _unit(vectors: np.ndarray) -> np.ndarray:
  return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def crop(image: UInt8[np.ndarray, "h w 3"], found: Found) -> Image.Image:
  """An object's box, with everything in it that is not the object in grey (#999)."""
  whole = Image.fromarray(image)
  blank = Image.new("RGB", whole.size, color=_BACKGROUND)
  return Image.composite(whole, blank, Image.fromarray(found.mask)).crop(found.box)


class DetectionScorer:
  """Detections in each image; colors of those that its prompt asks a color of."""

  batch_size = 1

  def __init__(self, detector: Mask2Former, colors: ColorClassifier):
    self._detector, self._colors = detector, colors

  def identity(self) -> dict[str, str]:
    return self._detector.identity() | self._colors.identity() | {"version": "1"}

  def schema(self) -> pa.Schema:
    return _SCHEMA

  def __call__(
    self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], items: Sequence[Item]
  ) -> dict[str, Any]:
    pairs = zip(images, items, strict=True)
    return {"detections": [self._of_image(image, item) for image, item in pairs]}

  def _of_image(
    self, image: UInt8[np.ndarray, "h w 3"], item: Item
  ) -> list[dict[str, Any]]:
    found: list[Found] = []
    for each in self._detector.detect(image):
      if sum(other.name == each.name for other in found) < MOST_OF_A_CLASS:
        found.append(each)
    asked = {c["class"] for c in item.data["include"] if c.get("color")}
    colored = [i for i, each in enumerate(found) if each.name in asked]
    colors = self._colors(image, [found[i] for i in colored])
    color_of = dict(zip(colored, colors, strict=True))
    return [
      {
        "name": each.name,
        "box": [float(side) for side in each.box],
        "confidence": each.confidence,
        "color": color_of.get(i),
      }
      for i, each in enumerate(found)
    ]


class DetectionFiles:
  """Detections of files, each of one model."""

  def __init__(self, words: Sequence[str]):
    """Reads them.

    Args:
      words: NAME=FILE each.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a name is missing or comes twice, or a line is damaged.
    """
    self._hashes: dict[str, str] = {}
    self._paths: dict[str, pathlib.Path] = {}
    self._found: dict[str, dict[tuple[str, int], list[dict[str, Any]]]] = {}
    for word in words:
      name, equals, path = word.partition("=")
      if not equals or not name or name in self._found:
        raise ValueError(
          f"--detections={word}: give NAME=FILE, each model's name once, as --images "
          "or --checkpoints has it."
        )
      self._found[name] = read_detections(pathlib.Path(path))
      self._paths[name] = pathlib.Path(path)
      self._hashes[name] = disk.file_hash(path)[:16]

  def identity(self) -> dict[str, str]:
    files = ", ".join(f"{name} {self._hashes[name]}" for name in sorted(self._hashes))
    return {"detector": "of files", "files": files}

  def schema(self) -> pa.Schema:
    return _SCHEMA

  def of_model(
    self, model: str, images: Sequence[tuple[str, int]]
  ) -> dict[str, list[Any]]:
    if model not in self._found:
      raise ValueError(
        f"There are no detections of {model}, only of {listed(self._found)}: give "
        f"--detections={model}=FILE too."
      )
    found, path = self._found[model], self._paths[model]
    if missing := [key for key in images if key not in found]:
      raise ValueError(
        f"{path} has detections of {len(images) - len(missing)} of {len(images)} "
        f"images of {model}: it lacks {_images(missing)}. An image in which nothing "
        "was found has a line with no detections."
      )
    if others := sorted(set(found) - set(images)):
      raise ValueError(
        f"{path} has detections of images that {model} does not have: "
        f"{_images(others)}. It is of other prompts, or of more images of each."
      )
    return {"detections": [found[key] for key in images]}


def _images(keys: Sequence[tuple[str, int]]) -> str:
  return listed([f"{name} image {number}" for name, number in keys], 3)


def read_detections(
  path: pathlib.Path,
) -> dict[tuple[str, int], list[dict[str, Any]]]:
  """Detections by id and number of their image, of a file of JSON lines.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: a line is not of the form, or of an image that another line is of.
  """
  found: dict[tuple[str, int], list[dict[str, Any]]] = {}
  for number, line in enumerate(read_json_lines(path, "file of detections"), 1):
    key = (line.get("id"), line.get("image"))
    detections = line.get("detections")
    match key, detections:
      case ((str(name), int(image)), list()):
        if (name, image) in found:
          raise ValueError(f"{path} has two lines of {name} image {image}.")
      case _:
        raise ValueError(
          f"{path}, line {number}: give id, image (a number) and a list of detections, "
          f"not {listed(line)}."
        )
    for detection in detections:
      if why := _wrong(detection):
        raise ValueError(f"{path}, {name} image {image}: {why}.")
    found[name, image] = [
      {"color": None, **detection, "box": [float(x) for x in detection["box"]]}
      for detection in detections
    ]
  return found


def _wrong(detection: Any) -> str | None:
  """What is wrong with an entry of a file."""
  if not isinstance(detection, dict) or set(detection) - {"color"} != {
    *("name", "box", "confidence")
  }:
    return f"{detection!r} must have name, box and confidence, and may have color"
  name, box, confidence = (detection[key] for key in ("name", "box", "confidence"))
  if name not in CLASSES:
    near = difflib.get_close_matches(str(name), CLASSES, 1)
    near = near or [each for each in CLASSES if str(name) in each.split()]
    hint = f": it knows {near[0]!r}" if near else ""
    return f"GenEval has no class {name!r}{hint}"
  if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
    return f"the box of a {name} must be left, top, right and bottom, not {box!r}"
  if not _is_number(confidence) or not 0 <= confidence <= 1:
    return f"the confidence of a {name} must lie in 0 … 1, not be {confidence!r}"
  if detection.get("color") not in (None, *COLORS):
    return f"GenEval has no color {detection['color']!r}: {', '.join(COLORS)}"
  return None


def _is_number(x: Any) -> bool:
  return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def _load(options: Mapping[str, Any]) -> DetectionScorer | DetectionFiles:
  if options["detections"]:
    return DetectionFiles(options["detections"])
  colors = ColorClassifier(clip.load(options["color_clip"], ("image", "text")))
  return DetectionScorer(Mask2Former(options["detector"]), colors)


SCORERS = {
  "detections": ScorerType(
    options=(
      Option(
        "detections",
        None,
        "Files of detections as NAME=FILE, by commas, in place of a detector.",
        list,
      ),
      Option(
        "detector",
        mask2former.PUBLISHED,
        "Finds objects: a Mask2Former of transformers, folder or hub id.",
      ),
      Option(
        "color_clip",
        "openai/clip-vit-large-patch14",
        "Names their colors: a CLIP of transformers, folder or hub id.",
      ),
    ),
    load=_load,
  )
}
