"""Folders of images that anybody made for a suite's prompts, as one of its models.

Images are matched to prompts by id, if any file is named as `EvaluationFolder` names
images (ID.* or ID_J.*), in whatever subfolder. Otherwise by order: of their paths, with
numbers in them compared as numbers, as many as there are images to match, those of one
prompt next to each other.
"""

import functools
import hashlib
import os
import pathlib
import re
import shutil
from collections.abc import Sequence

from absl import logging
from PIL import Image

from pixsigma_jax import command, disk
from pixsigma_jax.evaluate.folder import EvaluationFolder, ModelFolder
from pixsigma_jax.evaluate.items import Item
from pixsigma_jax.wording import listed

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_DIGITS = re.compile(r"(\d+)")


def find_images(words: Sequence[str]) -> dict[str, pathlib.Path]:
  """Folders by model name, from [NAME=]DIR each; a folder's own name by default.

  Raises:
    NotADirectoryError: there is no such folder.
    ValueError: a name is empty or comes twice.
  """
  found: dict[str, pathlib.Path] = {}
  for word in words:
    name, equals, given = word.partition("=")
    # A folder may have an equals sign in its own name.
    if not equals or pathlib.Path(word).exists():
      name, given = pathlib.Path(word).absolute().name, word
    path = pathlib.Path(given)
    if not path.is_dir():
      raise NotADirectoryError(f"--images={word}: {path} is no folder.")
    if not name:
      raise ValueError(f"--images={word} does not name the model: give NAME=DIR.")
    if name in found:
      raise ValueError(
        f"--images has two models called {name}: tell them apart with NAME=DIR."
      )
    found[name] = path
  return found


def add_images(
  folder: EvaluationFolder, name: str, directory: pathlib.Path, *, any_size: bool
) -> ModelFolder:
  """Copies images into a model of the evaluation; those that are there stay.

  PNGs are copied as they are, others are written as PNGs.

  Args:
    any_size: takes images of other sizes than the items ask for.

  Raises:
    FileExistsError: the name is taken by images of another origin.
    ValueError: there are not as many files as images to match, two are the same, or
      one is damaged or of another size.
  """
  matched, rule = match_images(folder.model(name), directory, any_size=any_size)
  listing = [
    [str(path.relative_to(directory)), path.stat().st_size] for path in matched
  ]
  digest = hashlib.sha256(repr(listing).encode()).hexdigest()[:16]
  model = folder.begin_model(
    name,
    path=str(directory.absolute()),
    origin={"kind": "pictures", "files": digest},
    settings={"matched": rule, "any_size": any_size},
  )
  logging.info("Images of %s are matched to prompts by %s.", directory, rule)
  images = model.path / "images"
  images.mkdir(parents=True, exist_ok=True)
  disk.remove_abandoned(images)
  missing = {model.image_path(item, image) for item, image in model.missing()}
  pairs = [
    (source, model.image_path(item, image))
    for (item, image), source in zip(model.images(), matched, strict=True)
  ]
  pairs = [pair for pair in pairs if pair[1] in missing]
  for source, target in command.progress(pairs, len(pairs), f"Copying {name}"):
    copy = functools.partial(_copy, source)
    disk.write_whole(target, copy, of_many=True)
  return model


def match_images(
  model: ModelFolder, directory: pathlib.Path, *, any_size: bool
) -> tuple[list[pathlib.Path], str]:
  """The file of each image that a model owes, and whether by `id` or by `order`.

  Raises:
    ValueError: see `add_images`.
  """
  matched, rule = _match(model, images_below(directory), directory)
  _check_equal(matched)
  if not any_size:
    _check_sizes(model, matched)
  return matched, rule


def _copy(source: pathlib.Path, partial: pathlib.Path) -> None:
  with Image.open(source) as image:
    if image.format == "PNG":
      shutil.copyfile(source, partial)
    else:
      image.convert("RGB").save(partial, format="PNG", compress_level=1)


def images_below(directory: pathlib.Path) -> list[pathlib.Path]:
  """Images below a folder, in the order of their paths.

  Raises:
    ValueError: there is none.
  """
  paths = [
    pathlib.Path(folder, name)
    for folder, _, names in os.walk(directory)
    for name in names
    if pathlib.Path(name).suffix.lower() in _SUFFIXES
  ]
  if not paths:
    raise ValueError(
      f"{directory} has no images in it: known are {', '.join(_SUFFIXES)}."
    )
  return sorted(paths, key=lambda path: _natural(path.relative_to(directory)))


def _natural(path: pathlib.Path) -> list[list[tuple[int, int, str]]]:
  """Sorting key of a path, part by part, in which 10 follows 9."""
  return [
    [(0, int(t), t) if t.isdigit() else (1, 0, t) for t in _DIGITS.split(part) if t]
    for part in path.parts
  ]


def _match(
  model: ModelFolder, paths: Sequence[pathlib.Path], directory: pathlib.Path
) -> tuple[list[pathlib.Path], str]:
  """The file of each image that the model owes, and by which rule."""
  owed = list(model.images())
  stems = [model.image_path(*each).stem for each in owed]
  by_stem: dict[str, pathlib.Path] = {}
  for path in paths:
    if path.stem in by_stem and path.stem in stems:
      raise ValueError(
        f"{by_stem[path.stem]} and {path} are both named for the image {path.stem}: "
        "take one away."
      )
    by_stem[path.stem] = path
  if any(stem in by_stem for stem in stems):
    if missing := [stem for stem in stems if stem not in by_stem]:
      raise ValueError(
        f"{directory} has {len(stems) - len(missing)} of {len(stems)} images and "
        f"lacks {listed(missing, 3)}: each prompt needs "
        f"{_each(model)}, named by the ids of prompts.jsonl."
      )
    if extra := len(by_stem) - len(stems):
      logging.warning(
        "%d images in %s are named for no prompt, and left out.", extra, directory
      )
    return [by_stem[stem] for stem in stems], "id"
  if len(paths) != len(owed):
    raise ValueError(
      f"{directory} has {len(paths)} images, none of them named by the ids of "
      f"prompts.jsonl (such as {stems[0]}.png), and the suite needs {len(owed)}: "
      f"{_each(model)} for each of {len(model.items)} prompts, in their order."
    )
  return list(paths), "order"


def _each(model: ModelFolder) -> str:
  copies = model.images_per_item
  return "one image" if copies == 1 else f"{copies} images"


def _check_equal(paths: Sequence[pathlib.Path]) -> None:
  """Refuses two files of the same bytes: one of two prompts got the other's image."""
  by_size: dict[int, list[pathlib.Path]] = {}
  for path in paths:
    by_size.setdefault(path.stat().st_size, []).append(path)
  for alike in by_size.values():
    seen: dict[str, pathlib.Path] = {}
    for path in alike if len(alike) > 1 else ():
      digest = disk.file_hash(path)
      if digest in seen:
        raise ValueError(
          f"{seen[digest]} and {path} are the same image: each prompt needs its own."
        )
      seen[digest] = path


def _check_sizes(model: ModelFolder, paths: Sequence[pathlib.Path]) -> None:
  wrong: list[str] = []
  for (item, _), path in zip(model.images(), paths, strict=True):
    try:
      with Image.open(path) as image:
        width, height = image.size
    except (OSError, SyntaxError) as error:
      raise ValueError(f"{path} is no image: {error}. Mend or replace it.") from error
    if not _fits(item, height, width):
      wrong.append(f"{path} is {height} x {width} and {_wanted(item)} is asked for")
  if wrong:
    raise ValueError(
      f"{len(wrong)} of {len(paths)} images are of another size (height x width): "
      f"{wrong[0]}. Make them of that size, or give --any_size, and the report says so."
    )


def _fits(item: Item, height: int, width: int) -> bool:
  if item.height is not None:
    return (height, width) == (item.height, item.width)
  rows, columns = item.cells
  return height * columns == width * rows


def _wanted(item: Item) -> str:
  if item.height is not None:
    return f"{item.height} x {item.width}"
  return "{} to {}".format(*item.cells)
