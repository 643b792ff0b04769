"""What a reproduction finds, and the files that it becomes."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

import pixsigma_jax
from pixsigma_jax import disk


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of a result.

  Attributes:
    title: what it shows, and whose numbers they are.
    header: names of the columns.
    rows: cells as they are printed; as many in each as there are columns.
  """

  title: str
  header: Sequence[str]
  rows: Sequence[Sequence[str]]

  def __post_init__(self):
    for row in self.rows:
      if len(row) != len(self.header):
        raise ValueError(
          f"{self.title}: a row of {len(row)} cells under {len(self.header)} columns."
        )

  def markdown(self) -> str:
    """The table in Markdown, without its title."""
    lines = [self.header, ["---"] * len(self.header), *self.rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


@dataclasses.dataclass(frozen=True)
class Result:
  """The paper's numbers and ours.

  Attributes:
    title: of the page.
    setting: what ours were made with, by name: data, machines, model.
    tables: the paper's and ours.
    remarks: paragraphs to read them with.
    data: every number of ours unrounded, for JSON.
    plot: an image of it, or None.
  """

  title: str
  setting: Mapping[str, str]
  tables: Sequence[Table]
  remarks: Sequence[str]
  data: Mapping[str, Any]
  plot: Image.Image | None = None

  def as_dict(self, name: str) -> dict[str, Any]:
    """The result for JSON, with all that its page has.

    Args:
      name: of the reproduction; its plot, if there is one, is NAME.png.
    """
    return {
      "reproduces": name,
      "version": pixsigma_jax.__version__,
      "title": self.title,
      "setting": dict(self.setting),
      "tables": [dataclasses.asdict(table) for table in self.tables],
      "remarks": list(self.remarks),
      "plot": None if self.plot is None else f"{name}.png",
      "data": self.data,
    }


def page(content: Mapping[str, Any]) -> str:
  """The page of a result in Markdown, of what NAME.json has."""
  setting = content["setting"].items()
  parts = [f"# {content['title']}\n"]
  parts.append("".join(f"- {name}: {value}\n" for name, value in setting))
  for fields in content["tables"]:
    table = Table(**fields)
    parts.append(f"## {table.title}\n\n{table.markdown()}")
  parts += [f"{remark}\n" for remark in content["remarks"]]
  if content["plot"] is not None:
    parts.append(f"![{content['title']}]({content['plot']})\n")
  return "\n".join(parts)


def write(result: Result, name: str, folder: pathlib.Path) -> list[pathlib.Path]:
  """Writes NAME.json, NAME.md and, of a plot, NAME.png; returns their paths.

  Raises:
    OSError: a file cannot be written.
  """
  folder.mkdir(parents=True, exist_ok=True)
  text = json.dumps(result.as_dict(name), indent=2, ensure_ascii=False) + "\n"
  paths = [folder / f"{name}.json", folder / f"{name}.md"]
  disk.write_text(paths[0], text)
  # Of what was written, so that the page holds nothing that the file does not.
  disk.write_text(paths[1], page(json.loads(text)))
  plot = result.plot
  if plot is not None:
    paths.append(folder / f"{name}.png")
    disk.write_whole(paths[-1], lambda partial: plot.save(partial, "png"))
  return paths
