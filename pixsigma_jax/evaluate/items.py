"""Items of a suite: a prompt each, with its seed, size, reference and metadata."""

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pixsigma_jax import disk
from pixsigma_jax.wording import shortened

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SEEDS = 2**32


@dataclasses.dataclass(frozen=True)
class Item:
  """One prompt of a suite.

  Attributes:
    id: name of its files: letters, digits, `.`, `_` and `-`.
    prompt: what to draw.
    seed: of its first image; the j-th further one has seed + j.
    height, width: in pixels; None where the model's resolution decides, see `cells`.
    cells: rows and columns of squares of the model's resolution that an image without
      a height and width consists of.
    reference: path of its reference image, relative to the suite's references; None
      without one.
    data: the suite's own metadata, which JSON must hold.
  """

  id: str
  prompt: str
  seed: int = 0
  height: int | None = None
  width: int | None = None
  cells: tuple[int, int] = (1, 1)
  reference: str | None = None
  data: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def size(self, resolution: int) -> tuple[int, int]:
    """Height and width in pixels, drawn by a model of this resolution."""
    if self.height is None or self.width is None:
      rows, columns = self.cells
      return rows * resolution, columns * resolution
    return self.height, self.width


@dataclasses.dataclass(frozen=True)
class ItemSet:
  """All items of a suite.

  Attributes:
    items: in the order of the report.
    images_per_item: images drawn of each prompt.
    sources: file → SHA-256 of what the items were made from.
    references: folder that the items' references are relative to.
  """

  items: tuple[Item, ...]
  images_per_item: int = 1
  sources: Mapping[str, str] = dataclasses.field(default_factory=dict)
  references: str | None = None


def check(item_set: ItemSet) -> None:
  """Checks that the items can be drawn and told apart.

  Raises:
    ValueError: there is none; an id is no file name or comes twice; two items are the
      same prompt with the same seed and size; or a seed or size is out of range.
  """
  items, copies = item_set.items, item_set.images_per_item
  if not items:
    raise ValueError("The suite has no prompt.")
  ids: set[str] = set()
  drawn: dict[tuple[Any, ...], str] = {}
  for item in items:
    if not _ID.fullmatch(item.id):
      raise ValueError(
        f"The id {item.id!r} of {shortened(item.prompt)} cannot name a file: use "
        "letters, digits, '.', '_' and '-'."
      )
    if item.id.lower() in ids:  # some file systems know no upper case
      raise ValueError(f"The id {item.id!r} comes twice: give each prompt its own.")
    ids.add(item.id.lower())
    if not item.prompt.strip():
      raise ValueError(f"The prompt of {item.id} is empty.")
    if (item.height is None) != (item.width is None) or min(
      item.height or 1, item.width or 1, *item.cells
    ) < 1:
      raise ValueError(
        f"{item.id} has height={item.height}, width={item.width} and cells="
        f"{list(item.cells)}: give height and width in pixels, or neither."
      )
    if not 0 <= item.seed <= _SEEDS - copies:
      raise ValueError(
        f"{item.id} has seed {item.seed}: seeds must lie in 0 … {_SEEDS - copies}."
      )
    key = (item.prompt, item.seed, item.height, item.width, item.cells)
    if key in drawn:
      raise ValueError(
        f"{drawn[key]} and {item.id} are the same prompt {shortened(item.prompt)} with "
        f"the same seed {item.seed} and size: their images would be equal. Take one "
        "away, or give it another seed."
      )
    drawn[key] = item.id


def write(path: pathlib.Path, items: Iterable[Item]) -> None:
  """Writes items as JSON lines, whole or not at all."""
  lines = [
    json.dumps(dataclasses.asdict(item), ensure_ascii=False, sort_keys=True)
    for item in items
  ]
  text = "".join(f"{line}\n" for line in lines)
  disk.write_text(path, text)


def read(path: pathlib.Path) -> list[Item]:
  """Reads what `write` wrote.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: a line is no item.
  """
  names = {field.name for field in dataclasses.fields(Item)}
  items = []
  for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
    if not line:
      continue
    try:
      fields = json.loads(line)
      if set(fields) != names:
        raise ValueError(f"it has the fields {sorted(fields)}, not {sorted(names)}")
      items.append(Item(**fields | {"cells": tuple(fields["cells"])}))
    except (ValueError, TypeError, AttributeError) as error:
      raise ValueError(
        f"{path}:{number} is damaged: {error}. Delete it and run `evaluate prompts`."
      ) from error
  return items


def fingerprint(items: Sequence[Item]) -> str:
  """Short hash of items, by which scores and images know that they belong to them."""
  text = json.dumps([dataclasses.asdict(item) for item in items], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_json_lines(path: str | pathlib.Path, what: str) -> list[dict[str, Any]]:
  """Objects of a file of JSON lines, for suites whose prompts come in one.

  Args:
    what: the file's role, for messages.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: a line is no JSON object, or there is none.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"There is no {what} at {path}.")
  objects = []
  for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
    if not line.strip():
      continue
    try:
      content = json.loads(line)
    except ValueError as error:
      raise ValueError(f"{path}:{number} is not JSON: {error}.") from error
    if not isinstance(content, dict):
      raise ValueError(f"{path}:{number} is not a JSON object.")
    objects.append(content)
  if not objects:
    raise ValueError(f"{path} is empty: the {what} needs at least one line.")
  return objects
