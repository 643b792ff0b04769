"""Shortened forms of prompts and lists of names, for messages.

A message is one line that somebody reads: it shows the beginning, and says how much
there is.
"""

from collections.abc import Collection


def shortened(text: str, most: int = 80) -> str:
  """`repr(text)`; of a longer text its first `most` characters, and how many it has."""
  if len(text) <= most:
    return repr(text)
  return f"{text[:most] + '…'!r} ({len(text):,} characters)"


def listed(items: Collection[object], most: int = 6, joint: str = ", ") -> str:
  """The first `most` items, and how many more there are; "nothing" of none.

  Args:
    items: shown as `str`, each of them shortened too.
    joint: between two items.
  """
  shown = [_short(str(item)) for _, item in zip(range(most), items, strict=False)]
  if len(items) > most:
    shown.append(f"and {len(items) - most:,} more")
  return joint.join(shown) or "nothing"


def install(extra: str) -> str:
  """The command that brings an extra of pyproject.toml, from a clone's root."""
  return f'in the repository\'s root, pip install -e ".[{extra}]"'


def _short(text: str, most: int = 120) -> str:
  return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"
