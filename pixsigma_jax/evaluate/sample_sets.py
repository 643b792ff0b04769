"""Sets of samples that a trainer draws, and the scores of each.

WORKDIR/sample_sets/STEP/
  NUMBER.png      images
  captions.jsonl  written last: with it, the set is whole; a run that goes back from a
                  step deletes it, and draws the images anew
  scores.json     of `evaluate watch`
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from pixsigma_jax import disk
from pixsigma_jax.evaluate import items as items_
from pixsigma_jax.evaluate.items import Item
from pixsigma_jax.evaluate.scoring import Row
from pixsigma_jax.wording import listed

FOLDER = "sample_sets"
_CAPTIONS, _SCORES = "captions.jsonl", "scores.json"


@dataclasses.dataclass(frozen=True)
class SampleSet:
  """A whole set.

  Attributes:
    path: its folder.
    rows: its images in order, each with its caption.
    fingerprint: of the images, see `fingerprint_of`.
  """

  path: pathlib.Path
  rows: tuple[Row, ...]
  fingerprint: str

  @property
  def step(self) -> int:
    """The step that it was drawn at."""
    return int(self.path.name)


def begun(workdir: pathlib.Path) -> list[pathlib.Path]:
  """Folders of all sets, whole or not, by their steps."""
  found = [path for path in (workdir / FOLDER).glob("[0-9]*") if path.name.isdigit()]
  return sorted(found, key=lambda path: int(path.name))


def read(path: pathlib.Path) -> SampleSet | None:
  """The set in a folder; None while it is not whole.

  Raises:
    ValueError: captions.jsonl is damaged, or has images that are not there.
  """
  try:
    lines = items_.read_json_lines(path / _CAPTIONS, "captions")
  except FileNotFoundError:
    return None
  rows = []
  for line in lines:
    if not all(isinstance(line.get(key), str) for key in ("file", "id", "caption")):
      raise ValueError(
        f"{path / _CAPTIONS} has a line with {listed(line)}: each needs file, id and "
        "caption, as the trainer writes them."
      )
    rows.append((Item(line["id"], line["caption"]), 0, path / line["file"]))
  if missing := [image.name for _, _, image in rows if not image.is_file()]:
    raise ValueError(
      f"{path} lacks {len(missing)} of {len(rows)} images ({listed(missing, 3)}): "
      "put them back, or delete the whole folder."
    )
  return SampleSet(path, tuple(rows), fingerprint_of(row[2] for row in rows))


def state_of(path: pathlib.Path) -> tuple[tuple[int, ...], ...]:
  """What changes with a set's captions, with its scores, and with files of its folder.

  Costs three looks at the disk, however many images there are. An image that is
  changed in its place, without a new file, does not show.
  """
  found = []
  for each in (path, path / _CAPTIONS, path / _SCORES):
    try:
      stat = each.stat()
    except FileNotFoundError:
      found.append(())
    else:
      found.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
  return tuple(found)


def fingerprint_of(images: Iterable[pathlib.Path]) -> str:
  """Hash of images' names and numbers of bytes.

  Pixels are not read, so that it may be taken often; times do not count, so that a
  copy has the same one.
  """
  lines = (f"{path.name}\t{path.stat().st_size}\n" for path in images)
  return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_scores(of: SampleSet) -> dict[str, Any]:
  """Entries of scores.json by scorer; those of other images are left out.

  Raises:
    ValueError: it is damaged.
  """
  path = of.path / _SCORES
  try:
    entries = json.loads(path.read_text(encoding="utf-8"))["scorers"]
    return {k: v for k, v in entries.items() if v["pictures"] == of.fingerprint}
  except FileNotFoundError:
    return {}
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f"{path} is damaged: {error!r}. Delete it, and the set is scored again."
    ) from error


def write_scores(of: SampleSet, entries: Mapping[str, Any]) -> None:
  """Writes scores.json, whole."""
  content = {"step": of.step, "images": len(of.rows), "scorers": entries}
  text = json.dumps(content, indent=2) + "\n"
  disk.write_text(of.path / _SCORES, text)
