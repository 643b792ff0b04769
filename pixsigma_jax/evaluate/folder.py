"""The folder of an evaluation: one suite's prompts, models, images and scores.

  suite.json                           suite, version, options, sources, references
  prompts.jsonl                        one item a line, see `items.Item`
  models/NAME/model.json               where its images come from
  models/NAME/images/ID.png            ID_J.png with several images a prompt
  models/NAME/scores/SCORER/PART.parquet
  references/scores/SCORER/PART.parquet

Files are whole or not there. prompts.jsonl and model.json are written once, so that
whatever is beside them belongs to them; model.json changes only once what was beside it
is deleted.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from absl import logging

from pixsigma_jax import disk
from pixsigma_jax.evaluate import items as items_
from pixsigma_jax.evaluate.items import Item, ItemSet
from pixsigma_jax.wording import listed

FORMAT_VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9@.+_-]*")


@dataclasses.dataclass(frozen=True)
class ModelFolder:
  """One model's part of an evaluation.

  Attributes:
    path: models/NAME.
    items: of the suite.
    images_per_item: of each of them.
  """

  path: pathlib.Path
  items: tuple[Item, ...]
  images_per_item: int

  @property
  def name(self) -> str:
    return self.path.name

  @functools.cached_property
  def about(self) -> dict[str, Any]:
    """Content of model.json: `number`, `path`, `origin`, `settings` of sampling."""
    return _read_json(self.path / "model.json", "evaluate sample")

  @property
  def fingerprint(self) -> str:
    """Short hash of origin and settings, by which scores know whose they are."""
    text = json.dumps([self.about["origin"], self.about["settings"]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

  def image_path(self, item: Item, image: int = 0) -> pathlib.Path:
    """Path of one image of an item, whether it is there or not."""
    copy = "" if self.images_per_item == 1 else f"_{image}"
    return self.path / "images" / f"{item.id}{copy}.png"

  def images(self) -> Iterator[tuple[Item, int]]:
    """All images that the model owes, in the items' order."""
    for item in self.items:
      for image in range(self.images_per_item):
        yield item, image

  def missing(self) -> list[tuple[Item, int]]:
    """Images that are not there yet."""
    folder = self.path / "images"
    there = set(disk.whole_files(folder)) if folder.is_dir() else set()
    return [
      (item, image)
      for item, image in self.images()
      if self.image_path(item, image).name not in there
    ]


@dataclasses.dataclass(frozen=True)
class EvaluationFolder:
  """The folder of an evaluation; `create` and `open_folder` make one.

  Attributes:
    path: of the folder.
    about: content of suite.json.
    items: of the suite.
  """

  path: pathlib.Path
  about: Mapping[str, Any]
  items: tuple[Item, ...]

  @property
  def images_per_item(self) -> int:
    return self.about["images_per_item"]

  @property
  def fingerprint(self) -> str:
    """Short hash of the items."""
    return self.about["items"]

  def model(self, name: str) -> ModelFolder:
    """A model's part, whether it has begun or not.

    Raises:
      ValueError: the name cannot name a folder.
    """
    if not _NAME.fullmatch(name):
      raise ValueError(
        f"A model cannot be called {name!r}: use letters, digits and @ . + _ - in "
        "NAME=DIR."
      )
    return ModelFolder(self.path / "models" / name, self.items, self.images_per_item)

  def models(self) -> list[ModelFolder]:
    """Models that have begun, in the order in which they did."""
    found = [
      self.model(path.parent.name) for path in self.path.glob("models/*/model.json")
    ]
    return sorted(found, key=lambda model: (model.about["number"], model.name))

  def begin_model(
    self,
    name: str,
    *,
    path: str,
    origin: Mapping[str, Any],
    settings: Mapping[str, Any],
    replace: bool = False,
  ) -> ModelFolder:
    """A model's part with its model.json, new or of the same origin and settings.

    Args:
      path: where the checkpoint or the images were found; it may change.
      origin: what the images are of.
      settings: how they were drawn.
      replace: deletes images of an earlier origin or other settings, and their scores,
        where they would be refused; not those of another kind.

    Raises:
      FileExistsError: the name is taken by images of another origin or other settings.
    """
    model = self.model(name)
    file = model.path / "model.json"
    content = {"origin": dict(origin), "settings": dict(settings)}
    content = json.loads(json.dumps(content))  # as it will be read
    if file.exists():
      have = {key: model.about[key] for key in content}
      if have == content:
        return model
      difference = _difference(have, content)
      if not replace or have["origin"].get("kind") != content["origin"].get("kind"):
        raise FileExistsError(
          f"{model.path} holds images of another origin or other settings: "
          f"{difference}. Give this model another name with NAME=DIR, or delete that "
          "folder; `sample` draws a checkpoint's images anew with --redraw=stale."
        )
      logging.warning(
        "Images of %s are deleted and made anew: %s.", model.path, difference
      )
      # model.json is the last to change: a kill in between leaves fewer images, and
      # none beside a model.json that is not theirs.
      for part in ("scores", "images"):
        if (model.path / part).is_dir():
          shutil.rmtree(model.path / part)
      number = model.about["number"]
    else:
      number = 1 + max((other.about["number"] for other in self.models()), default=-1)
    _write_json(file, {"number": number, "path": path, **content})
    return self.model(name)

  def reference_path(self, item: Item) -> pathlib.Path:
    """Path of an item's reference image.

    Raises:
      ValueError: it has none.
    """
    root = self.about["references"]
    if item.reference is None or root is None:
      raise ValueError(f"The item {item.id} has no reference.")
    return pathlib.Path(root) / item.reference

  def score_path(self, model: ModelFolder | None, scorer: str) -> pathlib.Path:
    """Folder of a scorer's parts for a model; None for the references."""
    owner = self.path / "references" if model is None else model.path
    return owner / "scores" / scorer


def create(
  path: pathlib.Path,
  *,
  suite: str,
  version: str,
  options: Mapping[str, Any],
  item_set: ItemSet,
) -> EvaluationFolder:
  """A new folder, or the one that is there if it is of the same suite and items.

  Raises:
    FileExistsError: the folder holds another suite, other prompts or something else.
    ValueError: the items cannot be drawn, see `items.check`.
  """
  items_.check(item_set)
  about = {
    "format_version": FORMAT_VERSION,
    "suite": suite,
    "version": version,
    "options": dict(options),
    "sources": dict(item_set.sources),
    "references": item_set.references,
    "images_per_item": item_set.images_per_item,
    "count": len(item_set.items),
    "items": items_.fingerprint(item_set.items),
  }
  about = json.loads(json.dumps(about))
  if (path / "suite.json").exists():
    there = open_folder(path)
    if there.about != about:
      raise FileExistsError(
        f"{path} holds other prompts: {_difference(there.about, about)}. Give another "
        "--output, or the options it was made with."
      )
    return there
  if path.is_dir() and (found := disk.whole_files(path)) and found != ["prompts.jsonl"]:
    raise FileExistsError(
      f"{path} is no folder of `evaluate`: it holds {listed(found)}. Give an --output "
      "that is empty or not there."
    )
  disk.check_writable(path)
  items_.write(path / "prompts.jsonl", item_set.items)
  _write_json(path / "suite.json", about)  # last: with it the folder is whole
  return open_folder(path)


def open_folder(path: str | pathlib.Path) -> EvaluationFolder:
  """The evaluation in a folder.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is damaged, or of a newer version.
  """
  path = pathlib.Path(path)
  if not (path / "suite.json").is_file():
    raise FileNotFoundError(
      f"There are no prompts in {path}: run `evaluate prompts SUITE --output={path}`."
    )
  about = _read_json(path / "suite.json", "evaluate prompts")
  if about["format_version"] != FORMAT_VERSION:
    raise ValueError(
      f"{path} is of format {about['format_version']}, and this program reads "
      f"{FORMAT_VERSION}: use the version that wrote it, or another --output."
    )
  items = tuple(items_.read(path / "prompts.jsonl"))
  if items_.fingerprint(items) != about["items"]:
    raise ValueError(
      f"{path}/prompts.jsonl was changed: its {len(items)} items are not those of "
      f"suite.json. Delete both files and run `evaluate prompts {about['suite']}`, or "
      "take another --output: images and scores belong to their prompts."
    )
  return EvaluationFolder(path, about, items)


def _difference(have: Any, want: Any, name: str = "") -> str:
  """The first field in which two JSON values differ, with both values."""
  if isinstance(have, dict) and isinstance(want, dict):
    for key in {**have, **want}:
      if have.get(key) != want.get(key):
        inner = f"{name}.{key}" if name else key
        return _difference(have.get(key), want.get(key), inner)
  return f"{name} is {json.dumps(have)[:120]} there and {json.dumps(want)[:120]} here"


def _read_json(path: pathlib.Path, command: str) -> dict[str, Any]:
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(
      f"{path} is damaged: delete it and run `{command}` again."
    ) from error


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
  text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
  disk.write_text(path, text)
