"""Writes the tables of fields into docs/training.md.

python -m tests.train.config_tables
"""

import dataclasses
import pathlib

from pixsigma_jax.train import fields

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "training.md"
_HEAD = "| Field | Default | Does |\n|---|---|---|\n"
_OWN_HEAD = "| `name` | Field | Default | Is |\n|---|---|---|---|\n"
# What a config must say, and what is too long for a table.
_SHOWN = {
  "total_steps": "required",
  "batch_size": "required",
  "data.path": "required",
  "log.prompts": "those of the official configs",
}


def _default(name, field):
  return _SHOWN.get(name, f"`{field.default!r}`")


def _row(*cells):
  return f"| {' | '.join(cells)} |\n"


def tables():
  """Heading → the table below it, in Markdown."""
  found = {}
  for dotted, field in fields.fields(
    fields.Config(optimizer=fields.Optimizer())
  ).items():
    section, _, name = dotted.partition(".")
    if not name:
      section, name = "Top level", dotted
    found.setdefault(section, _HEAD)
    found[section] += _row(f"`{name}`", _default(dotted, field), field.metadata["does"])
  return found


def own_table():
  """The fields that each optimizer has for itself."""
  shared = {field.name for field in dataclasses.fields(fields.Optimizer)}
  rows = [
    _row(f"`{name}`", f"`{field.name}`", f"`{field.default!r}`", field.metadata["does"])
    for name, section in fields.OPTIMIZERS.items()
    for field in dataclasses.fields(section)
    if field.name not in shared
  ]
  return _OWN_HEAD + "".join(rows)


def _replaced(page, start, table):
  end = page.index("\n\n", start) + 1
  return page[:start] + table + page[end:]


def written(page):
  """The page with the tables in it."""
  for heading, table in tables().items():
    start = page.index(_HEAD, page.index(f"\n### {heading}\n"))
    page = _replaced(page, start, table)
  return _replaced(page, page.index(_OWN_HEAD), own_table())


if __name__ == "__main__":
  PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
