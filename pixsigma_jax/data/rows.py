"""Rows of manifests and files beside images: what captions they have, in any form."""

import codecs
import dataclasses
import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

Captions: TypeAlias = tuple[tuple[str, str], ...]  # (text, "long" or "short")

CAPTION_FIELDS = {
  "captions": None,  # each with a kind of its own
  "caption": None,
  "caption_long": "long",
  "caption_short": "short",
  "sharegpt4v": "long",  # the official repository's names
  "prompt": "short",
}
FALLBACK_FIELD = "text"  # read where none of these has a caption
TEXT_ENDINGS = ("txt", "text", "caption")  # of files of captions
CAPTION_ENDINGS = (*TEXT_ENDINGS, "json")
_KINDS = ("long", "short")
MOST_LINE_BYTES = 2**24  # of one line of a manifest
# UTF-32's mark begins with UTF-16's: it is looked for first.
_MARKS = {
  codecs.BOM_UTF8: "utf-8-sig",
  codecs.BOM_UTF32_LE: "utf-32",
  codecs.BOM_UTF32_BE: "utf-32",
  codecs.BOM_UTF16_LE: "utf-16",
  codecs.BOM_UTF16_BE: "utf-16",
}
# Unicode's categories: control characters, and halves of surrogate pairs.
_REPLACED = {"Cc": " ", "Cs": "\N{REPLACEMENT CHARACTER}"}


@dataclasses.dataclass(frozen=True)
class Reading:
  """Reading options for what a source leaves open; its fields are JSON.

  `caption_fields` are read in place of `CAPTION_FIELDS`, each a NAME or NAME:long;
  `image_field` in place of path, file_name and image. With `caption_per_line` each line
  of a text file beside an image is a caption.

  Raises:
    ValueError: a field has no name.
  """

  caption_fields: tuple[str, ...] = ()
  image_field: str | None = None
  caption_per_line: bool = False

  def __post_init__(self):
    if self.image_field == "" or not all(n for n, _ in self.named_caption_fields()):
      raise ValueError("--caption_field and --image_field are names of fields, not ''.")

  def named_caption_fields(self) -> list[tuple[str, str | None]]:
    """The names of `caption_fields`, each with its kind if that is given."""
    return [named_field(field) for field in self.caption_fields]


def named_field(field: str) -> tuple[str, str | None]:
  """Name and kind of a field: of "alt:long" "alt" and "long", of "alt" "alt", None."""
  name, colon, kind = field.rpartition(":")
  return (name, kind) if colon and kind in _KINDS else (field, None)


# ---- rows ----


def parse_json(data: bytes | str) -> Any:
  """Parses JSON that others wrote.

  Raises:
    ValueError: it is none, or is nested too deep to be meant.
  """
  try:
    return json.loads(data)
  except (ValueError, RecursionError) as error:
    reason = str(error) if isinstance(error, json.JSONDecodeError) else "unreadable"
    raise ValueError(f"not JSON: {reason}") from None


def lines(file: Any) -> Iterator[tuple[bytes | None, int]]:
  """Lines that are not blank, and where each ends; None for one of many megabytes."""
  while line := file.readline(MOST_LINE_BYTES):
    too_long = len(line) == MOST_LINE_BYTES and not line.endswith(b"\n")
    while too_long and line and not line.endswith(b"\n"):
      line = file.readline(MOST_LINE_BYTES)
    if too_long:
      yield None, file.tell()
    elif line.strip():
      yield line, file.tell()


# ---- captions ----


def captions_of(
  row: Mapping[str, Any], fields: Sequence[str] = ()
) -> list[tuple[str, str]]:
  """The captions in the fields of a manifest's row or a file beside an image.

  As they stand there. A field is a text or a list of texts. `caption` goes with a
  `kind`; `captions` may list `{text, kind}`; `caption_short`, `caption_long`; the
  official `prompt` (short) and `sharegpt4v` (long); `text` if none of these has one.
  Without a kind a caption is short.

  Args:
    fields: what is read in place of these, as `Reading.caption_fields`.

  Raises:
    ValueError: one is something else than text, or of another kind.
  """
  named = dict(map(named_field, fields)) or CAPTION_FIELDS
  captions = []
  for field, kind in named.items():
    captions += _captions_of_a_field(row, field, kind)
  if not captions and not fields:
    # Of this common name: what is no text, such as tokens, was not meant.
    texts = [t for t in _listed(row.get(FALLBACK_FIELD)) if _is_there(t)]
    if all(isinstance(text, str) for text in texts):
      captions = _captions_of_a_field(row, FALLBACK_FIELD, None)
  return captions


def _captions_of_a_field(
  row: Mapping[str, Any], field: str, kind: str | None
) -> list[tuple[str, str]]:
  captions = []
  for item in _listed(row.get(field)):
    text, of_its_own = item, None if field == "captions" else row.get("kind")
    if field == "captions" and isinstance(item, Mapping):
      text, of_its_own = item.get("text"), item.get("kind")
    if not _is_there(text):
      continue
    if not isinstance(text, str):
      raise ValueError(f"{field} has {type(text).__name__} where text belongs")
    its_kind = kind or of_its_own or "short"
    if its_kind not in _KINDS:
      raise ValueError(f"{field} is of kind {its_kind!r}, not long or short")
    captions.append((text, its_kind))
  return captions


def _listed(value: Any) -> Sequence[Any]:
  return value if isinstance(value, list | tuple) else [value]


def _is_there(value: Any) -> bool:
  # pandas writes NaN where there is none
  return value is not None and not (isinstance(value, float) and value != value)


def clean_captions(captions: Iterable[tuple[str, str]]) -> Captions:
  """Captions in composed form (NFC), on one line, without empty or repeated ones.

  Control characters become spaces. The marks that order scripts from right to left
  stay; half a surrogate pair, which no file can hold, becomes U+FFFD.
  """
  cleaned: dict[str, str] = {}
  for text, kind in captions:
    if not text.isprintable():
      text = "".join(_REPLACED.get(unicodedata.category(c), c) for c in text)
    text = " ".join(unicodedata.normalize("NFC", text).split())
    if text:
      cleaned.setdefault(text, kind)
  return tuple(cleaned.items())


def captions_in_file(ending: str, data: bytes, reading: Reading) -> Captions:
  """The captions in a file beside an image; none if its JSON is of another program.

  Args:
    ending: one of `CAPTION_ENDINGS`.

  Raises:
    ValueError: it is neither text nor JSON that can be read.
  """
  text = _decoded(data)
  if ending != "json":
    texts = text.splitlines() if reading.caption_per_line else [text]
    return clean_captions((each, "short") for each in texts)
  row = parse_json(text)
  if not isinstance(row, Mapping):
    return ()
  try:
    return clean_captions(captions_of(row, reading.caption_fields))
  except ValueError:  # a field of the name of ours that holds something else
    return ()


def _decoded(data: bytes) -> str:
  marked = (encoding for mark, encoding in _MARKS.items() if data.startswith(mark))
  try:
    text = data.decode(next(marked, "utf-8"))
  except UnicodeDecodeError:
    raise ValueError("not UTF-8, nor UTF-16 that begins with its mark") from None
  if "\0" in text:  # as ASCII in UTF-16 has it, which is UTF-8 by its bytes
    raise ValueError("text with zero bytes, such as UTF-16 that lacks its mark")
  return text
