"""Files of a held-out set of images and captions, which `make-set` writes.

prompts.jsonl    one item a line, see `items.Item`; its reference is an image below
images/ID.png    cropped to the item's size
manifest.json    how the set was chosen; written last, so that with it the set is whole
"""

import json
import pathlib
from typing import Any

PROMPTS, MANIFEST, IMAGES = "prompts.jsonl", "manifest.json", "images"
FORMAT_VERSION = 1


def read_manifest(directory: pathlib.Path) -> dict[str, Any]:
  """The manifest of a set.

  Raises:
    FileNotFoundError: there is no set, or it is not whole.
    ValueError: it is damaged, or of a newer version.
  """
  path = directory / MANIFEST
  if not path.is_file():
    unfinished = (directory / PROMPTS).exists()
    why = "is not finished" if unfinished else "is no set"
    raise FileNotFoundError(
      f"{directory} {why}: it has no {MANIFEST}. `evaluate make-set INDEX "
      f"--output={directory}` makes it."
    )
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
    version = content["format_version"]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{path} is damaged: make the set again.") from error
  if version != FORMAT_VERSION:
    raise ValueError(
      f"{directory} is a set of format {version}, and this program reads "
      f"{FORMAT_VERSION}: use the version that made it, or make it again."
    )
  return content
