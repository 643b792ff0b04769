"""Cleaning of prompts before they are tokenized: none, lower case, or full.

The clean-up was made for captions from the web, which the α models were trained on:
addresses, file names, article numbers, marks of advertisers. diffusers applies it by
default; Σ's own code leaves prompts as they are. It is kept to the letter here, with
its oddities, since a prompt must mean to a model what it meant elsewhere.
Source: `T5Embedder.clean_caption` of PixArt-alpha, `_clean_caption` of diffusers.
"""

import html
import re
import urllib.parse
import warnings
from collections.abc import Callable, Iterable
from typing import TypeAlias

import ftfy
from bs4 import (
  BeautifulSoup,
  MarkupResemblesLocatorWarning,
  ParserRejectedMarkup,
  XMLParsedAsHTMLWarning,
)

from pixsigma_jax.wording import shortened

Rules: TypeAlias = tuple[tuple[re.Pattern[str], str], ...]

_ENDINGS = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DOMAIN = r"[a-z0-9.\-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"


def _rules(*pairs: tuple[str, str]) -> Rules:
  return tuple((re.compile(pattern), new) for pattern, new in pairs)


# In this order, each over the whole caption: what one leaves, the next one sees.
_ADDRESSES = _rules(
  ("<person>", "person"),
  *(
    (rf"\b(?:{scheme}:(?:/{{1,3}}|[a-z0-9%])|{_DOMAIN})", "")
    for scheme in ("https?", "www")
  ),
)
_MARKS = _rules(
  (r"@\w+\b", ""),  # @nickname
  ("[\u31c0-\u9fff]+", ""),  # from CJK strokes to ideographs
  (
    "[-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030"
    "\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d]+",
    "-",
  ),
  ("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
  ("[\u2018\u2019]", "'"),
  ("&quot;?", ""),
  ("&amp", ""),
  (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # IP address
  (r"\d:\d\d\s+$", ""),  # article number
  (r"\\n", " "),  # a backslash and an n
  (r"#\d{1,3}\b", ""),
  (r"#\d{5,}\b", ""),
  (r"\b\d{6,}\b", ""),
  (rf"\S+\.(?:{_ENDINGS})", ""),  # file name
  ("[\"']{2,}", '"'),
  (r"\.{2,}", " "),
  ("[#®•©™&@·º½¾¿¡§~()\\[\\]{}|\\\\/*]+", " "),
  (r"\s+\.\s+", " "),
)
_SEPARATOR = re.compile("[-_]")
_NOISE = _rules(
  (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # jc6640
  (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
  (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
  (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
  (r"(?:free\s)?download(?:\sfree)?", ""),
  (r"\bclick\b\s(?:for|on)\s\w+", ""),
  (rf"\b(?:{_ENDINGS})(?:\simages?)?", ""),
  (r"\bpage\s+\d+\b", ""),
  (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # j2d1a2a
  (
    "\\b\\d+\\.?\\d*[x\u0445\u00d7]\\d+\\.?\\d*\\b",
    "",
  ),  # 1920x1080; the middle is Cyrillic
  (r"\b\s+:\s+", ": "),
  (r"(\D[,./])\b", r"\1 "),
  (r"\s+", " "),
  # The caption is not stripped here, so the rules on its ends miss what a blank hides.
  (r"^[\"']([\w\W]+)[\"']$", r"\1"),
  (r"^['_,\-:;]", ""),
  (r"['_,\-:+]$", ""),
  (r"^\.\S+$", ""),
)


def _apply(rules: Iterable[tuple[re.Pattern[str], str]], caption: str) -> str:
  for pattern, new in rules:
    caption = pattern.sub(new, caption)
  return caption


def _text_of_html(caption: str) -> str:
  with warnings.catch_warnings():
    # That a prompt looks like a file name or like XML is nothing to worry about here.
    warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)
    warnings.simplefilter("ignore", XMLParsedAsHTMLWarning)
    try:
      return BeautifulSoup(caption, "html.parser").text
    except ParserRejectedMarkup as error:
      raise ValueError(
        f"The caption {shortened(caption)} cannot be cleaned, since it is broken HTML: "
        "correct it, or choose --caption_cleaning=lower or raw."
      ) from error


def _cleaned_once(caption: str) -> str:
  caption = urllib.parse.unquote_plus(caption).strip().lower()
  caption = _text_of_html(_apply(_ADDRESSES, caption))
  caption = _apply(_MARKS, caption)
  if len(_SEPARATOR.findall(caption)) > 3:  # this-is-my-cute-cat
    caption = _SEPARATOR.sub(" ", caption)
  caption = html.unescape(html.unescape(ftfy.fix_text(caption)))
  return _apply(_NOISE, caption).strip()


MODES: dict[str, Callable[[str], str]] = {
  "raw": lambda caption: caption.strip(),
  "lower": lambda caption: caption.lower().strip(),
  # Twice, as everywhere: the first pass may lay bare what the second removes.
  "clean": lambda caption: _cleaned_once(_cleaned_once(caption)),
}


def clean_caption(caption: str, mode: str) -> str:
  """A caption as the text encoder is to read it.

  Args:
    mode: "raw", blanks at the ends removed, as Σ's own code does; "lower", lower case
      too, diffusers without clean_caption; "clean", all the rules, diffusers' default.

  Raises:
    ValueError: an unknown mode, or "clean" for a caption that is broken HTML.
  """
  if mode not in MODES:
    raise ValueError(
      f"Unknown caption mode {mode!r}; choose one of {', '.join(MODES)}."
    )
  return MODES[mode](caption)
